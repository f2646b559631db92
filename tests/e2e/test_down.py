"""`sterna down` where something does not take connections any more: it ends in time, stops the others, and says so."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.rig import Rig, wait_for

# Two waits of 5 s at most, and the start of the interpreter.
DOWN_SECONDS = 15.0


@contextlib.contextmanager
def full(path: Path) -> Iterator[None]:
    """Listens at a path and accepts nobody; its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(os.fspath(path))
        listener.listen(0)
        while True:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            try:
                waiting.connect(os.fspath(path))
            except BlockingIOError:
                break
        yield


@pytest.mark.parametrize("who", ["node", "agent"])
def test_down_ends_in_time_where_a_queue_is_full(who: str) -> None:
    with Rig() as rig:
        agent = rig.start_pod()
        path = rig.state / "node" / "node.sock" if who == "node" else rig.sockets / "local_aaa"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with full(path):
            began = time.monotonic()
            done = rig.sterna("down", "--state", os.fspath(rig.state), timeout=DOWN_SECONDS)
            assert time.monotonic() - began < DOWN_SECONDS
        assert (done.returncode, done.stdout) == (1, "Stopped 1 process.\n")
        assert done.stderr.count("\n") == 1
        assert f"What serves {path} hangs" in done.stderr
        wait_for(lambda: not agent.running, name="the agent's end")
