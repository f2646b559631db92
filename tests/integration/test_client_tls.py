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


@pytest.fixture
def identity(tmp_path: Path) -> NodeIdentity:
    return NodeIdentity.load(os.fspath(tmp_path / "node"), now_s=int(time.time()))


class Sender:
    """A TLS server that sends `pieces`, each in records of its own, to its only client, and is silent from then on."""

    def __init__(self, identity: NodeIdentity, pieces: list[bytes]) -> None:
        self.identity = identity
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
def sender(identity: NodeIdentity, pieces: list[bytes]) -> Iterator[Sender]:
    made = Sender(identity, pieces)
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


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(WAIT_SECONDS)
        yield made


@pytest.mark.parametrize("said", [b"", b"\x16"], ids=["silent", "a-byte-now-and-then"])
def test_a_line_waits_no_longer_than_it_was_told(listener: socket.socket, identity: NodeIdentity, said: bytes) -> None:
    over = threading.Event()

    def dribble() -> None:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):
            sock.sendall(said and b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")  # a long record
            while not over.wait(0.01):
                sock.sendall(said)

    thread = threading.Thread(target=dribble)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            Line((socket.AF_INET, listener.getsockname()), client_context(identity.ca), start + 0.1)
    finally:
        took = time.monotonic() - start
        over.set()
        thread.join()
    assert 0.1 <= took < WAIT_SECONDS / 2


class Reluctant:
    """A socket that takes something only every other time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._calls = 0
        self.fileno, self.recv = sock.fileno, sock.recv

    def send(self, data: bytes) -> int:
        self._calls += 1
        if self._calls % 2:
            raise BlockingIOError
        return self._sock.send(data)


def test_a_line_sends_all_and_waits_for_nobody_for_ever(listener: socket.socket, identity: NodeIdentity) -> None:
    got, over = bytearray(), threading.Event()
    data = os.urandom(300_000)

    def take() -> None:
        sock, _ = listener.accept()
        with identity.server_context().wrap_socket(sock, server_side=True) as tls:
            while len(got) < len(data) and (piece := tls.recv(65_536)):
                got.extend(piece)
            over.wait(WAIT_SECONDS)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        end = time.monotonic() + WAIT_SECONDS
        with Line((socket.AF_INET, listener.getsockname()), client_context(identity.ca), end) as line:
            assert line._tls is not None
            line._tls.raw = Reluctant(line._sock)  # type: ignore[assignment]  # as good as one
            line.send(data)
            assert not line._tls.unsent
            while len(got) < len(data):
                assert time.monotonic() < end, f"{len(data) - len(got)} bytes did not come"
                time.sleep(0.001)
            assert got == data
            line.deadline = time.monotonic() + 0.1
            with pytest.raises(TimeoutError):
                line.send(bytes(32 * 1024 * 1024))
    finally:
        over.set()
        thread.join()
