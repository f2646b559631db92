"""How a pump reads and writes: all that came, some at a time, and not without end what nobody takes."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sterna import limits
from sterna.protocol.link import Link
from sterna.transport.pump import _BUDGET_BYTES, _READS_MAX, Conduit, Pump, Reactor
from sterna.transport.tls import PIECE_BYTES, TlsSocket
from sterna.transport.websocket import BINARY, CLOSE, PONG, WebSocket, Wire
from sterna.trust.node_identity import NodeIdentity
from sterna.trust.pins import client_context
from tests.integration.quic_rig import until
from tests.integration.test_websocket import client_frame

RECORD_OVERHEAD_BYTES = 22


class Taker:
    """An owner that keeps what it gets; with `hold` it stops its pump after the first."""

    def __init__(self, *, hold: bool = False) -> None:
        self.hold = hold
        self.pieces: list[bytes] = []
        self.drains = 0
        self.end = ""

    @property
    def got(self) -> bytes:
        return b"".join(self.pieces)

    def received(self, pump: Conduit, data: memoryview) -> None:
        self.pieces.append(bytes(data))
        if self.hold:
            pump.hold(True)

    def drained(self, pump: Conduit) -> None:
        self.drains += 1

    def ended(self, pump: Conduit, reason: str) -> None:
        self.end = reason


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        # Twice that is what waits in the kernel at most.
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _BUDGET_BYTES)
        yield ours, theirs


@pytest.fixture
async def secure(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> AsyncIterator[tuple[TlsSocket, ssl.SSLSocket]]:
    """Both ends of a TLS connection after its handshake, which a pump need not do."""
    ours, theirs = pair
    identity = NodeIdentity.load(os.fspath(tmp_path / "node"), now_s=int(time.time()))
    made: list[ssl.SSLSocket] = []
    tls = TlsSocket(ours, identity.server_context(), server_side=True)
    thread = threading.Thread(target=lambda: made.append(client_context(identity.ca).wrap_socket(theirs)))
    thread.start()

    def done() -> bool:
        try:
            tls.do_handshake()
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        return True

    await until(done)
    await until(lambda: not thread.is_alive())
    with made[0]:
        yield tls, made[0]


@pytest.mark.parametrize("hold", [False, True], ids=["at-once", "held"])
async def test_what_openssl_holds_comes_although_the_socket_is_empty(
    secure: tuple[TlsSocket, ssl.SSLSocket], monkeypatch: pytest.MonkeyPatch, *, hold: bool
) -> None:
    tls, theirs = secure
    monkeypatch.setattr("sterna.transport.pump._READS_MAX", 1_000)
    size = 1_000
    records = _BUDGET_BYTES // size + 2
    # The last piece is read before the budget is used up, and a record in it is left then.
    assert -(-_BUDGET_BYTES // size) < records
    assert records * (size + RECORD_OVERHEAD_BYTES) % PIECE_BYTES > 2 * (size + RECORD_OVERHEAD_BYTES)
    for number in range(records):
        theirs.sendall(b"%d" % (number % 10) * size)
    taker = Taker(hold=hold)
    pump = Pump(Reactor(asyncio.get_running_loop()), tls, Link(), taker)
    pump.start()
    await until(lambda: taker.pieces)
    if hold:
        await asyncio.sleep(0)
        assert tls.more
        assert len(taker.pieces) == 1, "it is not read on"
        taker.hold = False
        pump.hold(False)
    await until(lambda: len(taker.got) == records * size)
    assert len(taker.pieces) == 2
    pump.abort("")


async def test_small_records_leave_others_their_turn(secure: tuple[TlsSocket, ssl.SSLSocket]) -> None:
    tls, theirs = secure
    for _ in range(1_000):
        theirs.sendall(b"k")
    taker = Taker()
    pump = Pump(Reactor(asyncio.get_running_loop()), tls, Link(), taker)
    pump.start()
    await until(lambda: len(taker.got) == 1_000)
    assert max(map(len, taker.pieces)) <= _READS_MAX
    pump.abort("")


async def test_an_end_that_comes_while_nothing_is_read_is_told_afterwards(
    secure: tuple[TlsSocket, ssl.SSLSocket],
) -> None:
    tls, theirs = secure
    theirs.sendall(bytes(16 * 1024))  # a whole record: the end behind it is read, too
    theirs.close()
    taker = Taker(hold=True)
    pump = Pump(Reactor(asyncio.get_running_loop()), tls, Link(), taker)
    pump.start()
    await until(lambda: taker.pieces)
    await asyncio.sleep(0)
    assert not pump.closed
    pump.hold(False)
    await until(lambda: taker.end)
    assert taker.got == bytes(16 * 1024)
    assert taker.end == "closed by the other side"


def conduit_of(kind: str, reactor: Reactor, sock: socket.socket, taker: Taker) -> Conduit:
    """A pump, or a WebSocket on one."""
    if kind == "pump":
        pump = Pump(reactor, sock, Link(), taker)
        pump.start()
        return pump
    wire = Wire()
    pump = Pump(reactor, sock, wire, taker)
    pump.start()
    return WebSocket(reactor, pump, wire, Link(), taker)


def push(conduit: Conduit, data: bytes) -> None:
    conduit.link._out.append(data)
    conduit.link.out_bytes += len(data)
    conduit.link.wake()


@pytest.mark.parametrize("kind", ["pump", "websocket"])
async def test_who_takes_nothing_and_has_too_much_waiting_is_ended(
    pair: tuple[socket.socket, socket.socket], kind: str
) -> None:
    ours, _theirs = pair
    taker = Taker()
    conduit = conduit_of(kind, Reactor(asyncio.get_running_loop()), ours, taker)
    push(conduit, bytes(8 * _BUDGET_BYTES))
    await until(lambda: conduit.link.blocked)
    before = conduit.queued
    assert 0 < before <= 8 * _BUDGET_BYTES + 14
    push(conduit, bytes(limits.OUTBOUND_MAX_BYTES))
    await asyncio.sleep(0)
    assert not taker.end, "so much may wait"
    assert conduit.queued == before + limits.OUTBOUND_MAX_BYTES
    push(conduit, b"x")
    await until(lambda: taker.end)
    assert "too much waits" in taker.end
    assert conduit.closed


@pytest.mark.parametrize("kind", ["pump", "websocket"])
async def test_what_waits_comes_whole_and_then_bulk_data_goes_on(
    pair: tuple[socket.socket, socket.socket], kind: str
) -> None:
    ours, theirs = pair
    theirs.setblocking(False)
    taker = Taker()
    conduit = conduit_of(kind, Reactor(asyncio.get_running_loop()), ours, taker)
    size = 8 * _BUDGET_BYTES
    push(conduit, bytes(size))
    await until(lambda: conduit.link.blocked)
    push(conduit, b"later")
    got = bytearray()

    def whole() -> bool:
        try:
            got.extend(theirs.recv(1 << 20))
        except BlockingIOError:
            pass
        return got.endswith(b"later") and taker.drains > 0

    await until(whole)
    assert conduit.queued == 0
    assert not conduit.link.blocked
    assert taker.drains == 1
    conduit.abort("")


async def test_nothing_after_a_close_is_taken(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    taker = Taker()
    conduit_of("websocket", Reactor(asyncio.get_running_loop()), ours, taker)
    theirs.setblocking(False)
    before, after = client_frame(BINARY, b"before"), client_frame(BINARY, b"after") + client_frame(9, b"ping")
    theirs.sendall(before + client_frame(CLOSE, b"") + after)
    said = await asyncio.get_running_loop().sock_recv(theirs, 100)
    assert said[0] == 0x80 | CLOSE
    assert bytes((0x80 | PONG,)) not in said
    theirs.sendall(after)
    theirs.shutdown(socket.SHUT_WR)
    await until(lambda: taker.end)
    assert await asyncio.get_running_loop().sock_recv(theirs, 100) == b""
    assert taker.pieces == [b"before"]
