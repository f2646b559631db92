"""An agent that counts, whoever watches: run this file, then `sterna attach count`; leave, come back, miss nothing."""

from __future__ import annotations

import asyncio
import itertools

from sterna.pod.serve import AgentSession, run


async def count(session: AgentSession) -> None:
    """Writes a number every tenth of a second; whoever reads slowly slows it down."""
    for number in itertools.count(1):
        await session.write(b"%d\r\n" % number)
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    run(count, name="count")
