"""Runs a build on another machine over ssh, through any loss of the connection, and shows what it changed.

python examples/remote_build.py HOST TOKEN-FILE DIRECTORY COMMAND…

HOST needs a running daemon (`sterna-remote -serve -token-file …`); TOKEN-FILE is a local copy of its token, which lies
there in `~/.claude/remote/daemon.token`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from sterna import SternaError
from sterna.remote import Client, Exit, Gap


async def main(host: str, token: str, directory: str, command: list[str]) -> int:
    """Returns the build's exit status."""
    bridge = ["ssh", "-T", host, "sterna-remote", "-bridge"]
    async with await Client.over(bridge, token=token) as client:
        build = await client.spawn(command[0], command[1:], cwd=directory)
        async for event in build:
            if isinstance(event, Gap):
                print(f"[{event.last - event.first + 1} pieces of output are gone]", file=sys.stderr)
            elif not isinstance(event, Exit):
                (sys.stderr if event.stream == "stderr" else sys.stdout).buffer.write(event.data)
                sys.stdout.flush()
        for change in (await client.git_status(directory)).changes:
            print(change, file=sys.stderr)
        return build.exit_code or 0


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit("usage: remote_build.py HOST TOKEN-FILE DIRECTORY COMMAND…")
    try:
        secret = Path(sys.argv[2]).read_text(encoding="utf-8").strip()
    except OSError as error:
        sys.exit(f"remote_build: {sys.argv[2]} cannot be read ({error.strerror}): copy the daemon's token there.")
    try:
        sys.exit(asyncio.run(main(sys.argv[1], secret, sys.argv[3], sys.argv[4:])))
    except SternaError as error:
        sys.exit(f"remote_build: {error}")
