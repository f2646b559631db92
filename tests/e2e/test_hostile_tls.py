"""A node that sends TLS records without data, and no end of them: its clients stay with their users."""

from __future__ import annotations

import ctypes.util
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.client.calls import Caller
from sterna.client.driver import PollDriver
from sterna.client.endpoint import Endpoint
from sterna.client.session import Wish, make_machine
from sterna.errors import ConnectionLostError
from sterna.trust.node_identity import LEAF_FILE, NodeIdentity
from sterna.trust.pins import client_context
from sterna.units import MILLISECOND

pytestmark = pytest.mark.skipif(ctypes.util.find_library("ssl") is None, reason="libssl is not installed")

COUNT = 100_000  # some 2.7 MB, and 0.8 s of OpenSSL's time
TURN_MAX_SECONDS = 0.2
WAIT_SECONDS = 30
WHY = "it sends TLS records without data"


class Hostile:
    """A server that floods the first client that says something."""

    def __init__(self, directory: Path) -> None:
        identity = NodeIdentity.load(os.fspath(directory), now_s=int(time.time()))
        pem = os.fspath(directory / LEAF_FILE)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "keyupdates.py"), pem, pem, str(COUNT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.out = self._process.stdout.fileno()
        port = int(self.line())
        address = (socket.AF_INET, ("127.0.0.1", port))
        self.endpoint = Endpoint(
            f"127.0.0.1:{port}", [address], identity.node_id, context=client_context(identity.ca), credential="st1.x"
        )

    def line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.out, 1)
            assert byte, line
            line += byte
        return line.decode().strip()

    def let_go(self) -> None:
        """Has the flood sent once it is prepared; it waits for that by itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    node = Hostile(tmp_path / "node")
    yield node
    node.close()


def test_a_call_is_given_up(hostile: Hostile, tmp_path: Path) -> None:
    hostile.let_go()
    with pytest.raises(ConnectionLostError, match=WHY):
        Caller(hostile.endpoint, state=str(tmp_path), timeout=WAIT_SECONDS)
    assert [hostile.line() for _ in range(3)] == ["connected", "ready", "refused"]


def test_a_terminal_program_goes_on_between_the_records(hostile: Hostile, tmp_path: Path) -> None:
    machine = make_machine(hostile.endpoint, Wish("latest"), state=str(tmp_path))
    driver = PollDriver(machine, hostile.endpoint, lambda _event: None)
    said = bytearray()
    driver.watch(hostile.out, select.POLLIN, lambda _events: said.extend(os.read(hostile.out, 4096)))

    def turn() -> float:
        """Returns how long it works for, in seconds of the processor."""
        assert time.monotonic() < deadline, said
        began = time.thread_time()
        driver.turn(time.monotonic_ns() + 50 * MILLISECOND)
        return time.thread_time() - began

    deadline = time.monotonic() + WAIT_SECONDS
    while said.count(b"\n") < 1:
        turn()
    hostile.let_go()
    assert hostile.line() == "ready"
    longest = turn()
    while said.count(b"\n") < 2:
        longest = max(longest, turn())
    driver.close()
    assert longest < TURN_MAX_SECONDS
    assert said == b"connected\nrefused\n"
