"""TLS in the clients that poll(2): what one read of the socket brought is given out to its last byte."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sterna.client.driver import PollDriver
from sterna.client.endpoint import Endpoint
from sterna.client.line import Line
from sterna.protocol.client import ClientMachine, Dial
from sterna.trust.node_identity import NodeIdentity
from sterna.trust.pins import client_context
from sterna.units import SECOND

WAIT_SECONDS = 10


class Greedy(ClientMachine):
    """A machine that dials once and takes whatever comes."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.input = SimpleNamespace(end=0, base=0)  # type: ignore[assignment]  # all that a driver looks at
        self._actions: list[Dial] = [Dial(1)]  # type: ignore[assignment]  # all that a driver asks for

    @property
    def active(self) -> None:
        return None

    def next_action(self) -> Dial | None:
        return self._actions.pop() if self._actions else None

    def data_to_send(self) -> list[tuple[int, list[bytes]]]:
        return []

    def next_event(self) -> None:
        return None

    def next_timeout(self) -> None:
        return None

    def connected(self, number: int, now: int) -> None: ...

    def established(self, number: int, now: int) -> None: ...

    def handle_timeout(self, now: int) -> None: ...

    def receive(self, number: int, data: bytes | bytearray | memoryview, now: int) -> None:
        self.got += data


class Sender:
    """A TLS server that sends `pieces`, each in records of its own, to its only client, and is silent from then on."""

    def __init__(self, directory: Path, pieces: list[bytes]) -> None:
        self.identity = NodeIdentity.load(os.fspath(directory), now_s=int(time.time()))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WAIT_SECONDS)
        self.address = (socket.AF_INET, self._listener.getsockname())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pieces,))
        self._thread.start()

    def context(self) -> ssl.SSLContext:
        return client_context(self.identity.ca)

    def _run(self, pieces: list[bytes]) -> None:
        sock, _ = self._listener.accept()
        with self.identity.server_context().wrap_socket(sock, server_side=True) as tls:
            for piece in pieces:
                tls.sendall(piece)
            self._over.wait(WAIT_SECONDS)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._listener.close()


def burst(seed: int) -> list[bytes]:
    """Records of all sizes, by far more than one buffer of a driver holds; at last small ones that come at once."""
    print("seed", seed)
    rng = random.Random(seed)
    sizes = [rng.choice((1, 20, 900, 16_384, 40_000, rng.randrange(1, 70_000))) for _ in range(120)]
    return [rng.randbytes(size) for size in (*sizes, *(20,) * 300)]


@pytest.fixture
def pieces() -> list[bytes]:
    return burst(int(os.environ.get("SEED", random.randrange(1 << 32))))


@pytest.fixture
def sender(tmp_path: Path, pieces: list[bytes]) -> Iterator[Sender]:
    made = Sender(tmp_path / "node", pieces)
    yield made
    made.close()


def test_a_driver_leaves_nothing_behind(sender: Sender, pieces: list[bytes]) -> None:
    machine, wanted = Greedy(), b"".join(pieces)
    endpoint = Endpoint("n", [sender.address], sender.identity.node_id, context=sender.context(), credential="")
    deadline = time.monotonic_ns() + WAIT_SECONDS * SECOND
    with contextlib.closing(PollDriver(machine, endpoint, lambda _event: None)) as driver:
        while len(machine.got) < len(wanted):
            time.sleep(0.005)  # much waits when it looks again
            driver.turn(deadline)
            assert time.monotonic_ns() < deadline, f"{len(wanted) - len(machine.got)} bytes are missing"
    assert machine.got == wanted


def test_a_line_leaves_nothing_behind(sender: Sender, pieces: list[bytes]) -> None:
    wanted, got = b"".join(pieces), bytearray()
    with Line(sender.address, sender.context(), time.monotonic() + WAIT_SECONDS) as line:
        while len(got) < len(wanted):
            got += line.receive()
        assert got == wanted
        line.deadline = time.monotonic() + 0.1
        with pytest.raises(TimeoutError):
            line.receive()
