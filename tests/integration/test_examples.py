"""The agents in examples/ do what their first lines say: run as they are, behind a real node, used by a real client."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.client import blocking
from tests.e2e.rig import Daemon, Rig, wait_for

pytestmark = pytest.mark.xdist_group("examples")
EXAMPLES = Path(__file__).parents[2] / "examples"
LINES_MAX = 10
SECONDS = 20.0


def code_lines(name: str) -> list[str]:
    """The lines of an example that are neither empty nor a docstring nor an import."""
    lines = [line.strip() for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith(('"""', "import ", "from "))]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A node that watches the user's own socket directory, where the examples put theirs without being told."""
    with Rig() as rig:
        runtime = rig.directory / "r"
        runtime.mkdir(mode=0o700)
        state = str(rig.state / "node")
        words = rig.words("node", "--port", str(rig.port), "--state", state, "--sockets", str(runtime / "sterna"))
        rig.node = Daemon(words, rig.env, rig.directory / "node.log")
        wait_for((rig.state / "node" / "node.sock").exists, name="the node")
        for name, agent in (("echo_agent.py", "echo"), ("counting_agent.py", "count")):
            rig.pods[agent] = Daemon([sys.executable, str(EXAMPLES / name)], rig.env, rig.directory / f"{agent}.log")
        wait_for(lambda: {"echo", "count"} <= known(rig), name="the agents")
        yield rig


def known(rig: Rig) -> set[str]:
    """The names of the agents that the node knows."""
    return {found["name"] for found in rig.json("ls")["agents"]}


def read_until(session: blocking.BlockingSession, what: bytes) -> bytes:
    seen = b""
    while what not in seen:
        data = session.read(timeout=SECONDS)
        assert data, f"it ended after {seen!r}"
        seen += data
    return seen


@pytest.mark.parametrize("name", ["echo_agent.py", "counting_agent.py"])
def test_ten_lines_are_enough(name: str) -> None:
    assert 0 < len(code_lines(name)) <= LINES_MAX


def test_the_echo_agent_repeats_every_byte_also_to_who_comes_back(rig: Rig) -> None:
    every = bytes(range(256))
    with blocking.connect(agent="echo", new=True, state=str(rig.state), timeout=SECONDS) as session:
        session.write(every)
        assert read_until(session, every) == every
        name = session.name
    with blocking.connect(name=name, output=200, state=str(rig.state), timeout=SECONDS) as session:
        session.write(b"again")
        assert read_until(session, b"again") == every[200:] + b"again"
        session.close(timeout=SECONDS)


def test_the_counting_agent_counts_on_while_nobody_is_there_and_nothing_is_missed(rig: Rig) -> None:
    with blocking.connect(agent="count", new=True, state=str(rig.state), timeout=SECONDS) as session:
        first = read_until(session, b"5\r\n")
        name, position = session.name, session.position
    left = time.monotonic()
    while time.monotonic() - left < 0.5:
        time.sleep(0.1)  # the agent's own pace: some numbers are written while nobody reads
    with blocking.connect(name=name, output=position, state=str(rig.state), timeout=SECONDS) as session:
        rest = read_until(session, b"12\r\n")
        session.close(timeout=SECONDS)
    numbers = [int(line) for line in (first + rest).split(b"\r\n")[:12]]
    assert numbers == list(range(1, 13))
