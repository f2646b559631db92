"""The agents in examples/ do what their first lines say: run as they are, behind a real node, used by a real client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sterna
from tests.e2e.rig import Daemon, Rig, wait_for

pytestmark = pytest.mark.xdist_group("examples")
EXAMPLES = Path(__file__).parents[2] / "examples"
LINES_MAX = 10


def code_lines(source: str) -> list[str]:
    """The lines that are neither empty nor a docstring nor an import from the standard library's future."""
    lines = [line for line in source.splitlines() if line.strip() and not line.strip().startswith('"""')]
    return [line for line in lines if "__future__" not in line]


class Agents(Rig):
    """A rig whose examples find the node's sockets as a user's own agents do: through $XDG_RUNTIME_DIR."""

    def __init__(self) -> None:
        super().__init__()
        runtime = self.directory / "r"
        runtime.mkdir(mode=0o700)
        (runtime / "sterna").symlink_to(self.sockets) if False else None
        self.runtime = runtime

    def start_example(self, name: str, agent: str) -> Daemon:
        """Runs an example; returns once the node knows its agent."""
        daemon = Daemon([sys.executable, str(EXAMPLES / name)], self.env, self.directory / f"{agent}.log")
        self.pods[agent] = daemon
        wait_for(lambda: agent in self.agents() or self._check(daemon), name=f"the agent {agent}")
        return daemon

    def agents(self) -> list[str]:
        """The names of the agents that the node knows."""
        return [found["agent"] for found in self.json("ls")["agents"]]
