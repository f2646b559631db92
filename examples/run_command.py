"""Runs a command in a session of its own and prints what it prints, through any loss of the network.

python examples/run_command.py AGENT COMMAND…
"""

from __future__ import annotations

import asyncio
import sys

import sterna


async def main(agent: str, command: list[str]) -> int:
    """Returns the command's exit status."""
    async with await sterna.connect(agent, argv=command) as session:
        print(f"session {session.name}", file=sys.stderr)
        async for output in session:
            sys.stdout.buffer.write(output)
            sys.stdout.buffer.flush()
        return session.exit_status or 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: run_command.py AGENT COMMAND…")
    try:
        sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2:])))
    except sterna.SternaError as error:
        sys.exit(f"run_command: {error}")
