"""An agent that repeats what it is told: run this file, then `sterna attach echo`."""

from __future__ import annotations

from sterna.pod.serve import AgentSession, run


async def echo(session: AgentSession) -> None:
    """Answers every input with itself; an input counts as handled once the next one is asked for."""
    async for data in session:
        await session.write(data)


if __name__ == "__main__":
    run(echo, name="echo")
