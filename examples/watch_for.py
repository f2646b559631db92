"""Watches a session and tells when a text appears in its output; says so when the network fails or somebody joins.

python examples/watch_for.py AGENT|SESSION TEXT

A name that an agent has means that agent's latest session, as with `sterna attach`.
"""

from __future__ import annotations

import asyncio
import sys

import sterna


def tell(event: sterna.Gap | sterna.Uncertain | sterna.Trouble | sterna.Notice) -> None:
    """Prints what happens beside the bytes."""
    if isinstance(event, sterna.Trouble):
        print("connection well again" if event.since is None else f"connection in trouble: {event.reason}")
    elif isinstance(event, sterna.Notice):
        print(f"{event.event.kind} {event.event.label}".rstrip())
    elif isinstance(event, sterna.Gap):
        print(f"{event.end - event.start} bytes were overwritten before we got them")


async def main(name: str, text: bytes) -> int:
    """Returns 0 once the text came, 1 if the session ended before."""
    tail = b""
    async with await sterna.connect(name, mode="watch", on_event=tell) as session:
        print(f"watching the session {session.name}", flush=True)
        async for output in session:
            tail = (tail + output)[-len(output) - len(text) :]
            if text in tail:
                print(f"{text.decode()!r} came before position {session.position}")
                return 0
    return 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: watch_for.py AGENT|SESSION TEXT")
    try:
        sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2].encode())))
    except sterna.SternaError as error:
        sys.exit(f"watch_for: {error}")
