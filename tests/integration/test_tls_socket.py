"""TLS on sockets that take and give so many bytes at a time: its bounds, its last words, and what waits."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sterna.transport.tls import BARREN_MAX_BYTES, PIECE_BYTES, SEND_BYTES, TlsSocket
from sterna.trust.node_identity import NodeIdentity
from sterna.trust.pins import client_context

if TYPE_CHECKING:
    from tests.e2e.keyupdates import Side

SECONDS = 10.0
RECORD_BYTES = 16 * 1024
needs_libssl = pytest.mark.skipif(ctypes.util.find_library("ssl") is None, reason="libssl is not installed")


@pytest.fixture
def identity(tmp_path: Path) -> NodeIdentity:
    return NodeIdentity.load(os.fspath(tmp_path / "node"), now_s=int(time.time()))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end, which does not block, and theirs, which does."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(SECONDS)
    with ours, theirs:
        yield ours, theirs


def finish(tls: TlsSocket, step: Callable[[], object]) -> None:
    """Repeats what has to wait, until it is done."""
    deadline = time.monotonic() + SECONDS
    while True:
        assert time.monotonic() < deadline
        try:
            step()
        except (BlockingIOError, ssl.SSLWantReadError):
            select.select([tls.raw], [tls.raw] if tls.unsent else [], [], SECONDS)
        else:
            return


def read(tls: TlsSocket, size: int) -> bytes:
    """The next so many bytes of data."""
    view, got = memoryview(bytearray(65_536)), bytearray()
    while len(got) < size:
        finish(tls, lambda: got.extend(view[: tls.recv_into(view)]))
    return bytes(got)


def nothing_left(tls: TlsSocket) -> None:
    """Reads what is there; there must be no data."""
    view = memoryview(bytearray(65_536))
    while select.select([tls.raw], [], [], 0)[0] or tls.more:
        with pytest.raises(BlockingIOError):
            tls.recv_into(view)


@pytest.fixture
def met(pair: tuple[socket.socket, socket.socket], identity: NodeIdentity) -> Iterator[tuple[TlsSocket, Side]]:
    """A server's end after its handshake, and a client that can do what Python's ssl cannot."""
    from tests.e2e import keyupdates

    keyupdates.declare()
    ours, theirs = pair
    tls, side = TlsSocket(ours, identity.server_context(), server_side=True), keyupdates.Side(theirs)
    thread = threading.Thread(target=side.shake)
    thread.start()
    finish(tls, tls.do_handshake)
    thread.join()
    yield tls, side
    keyupdates.lib.SSL_free(ctypes.c_void_p(side.tls))


def said(side: Side, data: bytes, times: int) -> bytes:
    """The records of some data, each in its own."""
    from tests.e2e.keyupdates import lib

    made = bytearray()
    for _ in range(times):
        assert lib.SSL_write(ctypes.c_void_p(side.tls), data, len(data)) == len(data)
        made += side.made()
    return bytes(made)


def updates(side: Side, size: int) -> bytes:
    """So many bytes of KeyUpdates, or a few more."""
    from tests.e2e.keyupdates import lib

    made = bytearray()
    while len(made) < size:
        lib.SSL_key_update(side.tls, 0)
        lib.SSL_do_handshake(side.tls)
        made += side.made()
    return bytes(made)


@needs_libssl
def test_records_without_data_are_bounded_and_data_makes_up_for_no_later_ones(met: tuple[TlsSocket, Side]) -> None:
    tls, side = met
    side.sock.sendall(said(side, bytes(RECORD_BYTES), 9))
    assert read(tls, 9 * RECORD_BYTES) == bytes(9 * RECORD_BYTES)
    side.sock.sendall(updates(side, BARREN_MAX_BYTES - 2_000))
    nothing_left(tls)
    side.sock.sendall(said(side, b"k", 1))
    assert read(tls, 1) == b"k"
    side.sock.sendall(updates(side, 3_000))
    with pytest.raises(ConnectionAbortedError, match="records without data"):
        read(tls, 1)


@needs_libssl
def test_small_records_of_data_never_add_up(met: tuple[TlsSocket, Side]) -> None:
    """Keys, for days: each has a record of 23 bytes."""
    tls, side = met
    keys = 2 * BARREN_MAX_BYTES // 23
    side.sock.sendall(said(side, b"k", keys) + updates(side, 1))
    assert read(tls, keys) == b"k" * keys
    nothing_left(tls)


@needs_libssl
def test_a_byte_now_and_then_does_not_make_up_for_all(met: tuple[TlsSocket, Side]) -> None:
    tls, side = met
    pieces = [updates(side, PIECE_BYTES - 100) + said(side, b"k", 1) for _ in range(5)]
    for piece in pieces[:3]:
        side.sock.sendall(piece)
        assert read(tls, 1) == b"k"
    side.sock.sendall(b"".join(pieces[3:]))
    with pytest.raises(ConnectionAbortedError, match="records without data"):
        read(tls, 2)


def shaken(tls: TlsSocket, theirs: socket.socket, context: ssl.SSLContext, *, server: bool) -> ssl.SSLSocket:
    """Does the handshake; returns their end."""
    made: list[ssl.SSLSocket] = []
    thread = threading.Thread(target=lambda: made.append(context.wrap_socket(theirs, server_side=server)))
    thread.start()
    finish(tls, tls.do_handshake)
    thread.join()
    return made[0]


def test_what_reading_has_to_answer_goes_out_at_once(
    pair: tuple[socket.socket, socket.socket], identity: NodeIdentity
) -> None:
    """A server may ask for a certificate at any time (RFC 8446, section 4.6.2): a client that has none says so."""
    ours, theirs = pair
    context, asking = client_context(identity.ca), identity.server_context()
    context.post_handshake_auth = True
    asking.verify_mode = ssl.CERT_OPTIONAL
    asking.load_default_certs()
    tls = TlsSocket(ours, context)
    with shaken(tls, theirs, asking, server=True) as server:
        server.verify_client_post_handshake()
        server.do_handshake()
        assert select.select([ours], [], [], SECONDS)[0]
        nothing_left(tls)
        assert select.select([server], [], [], 0)[0]


def test_who_sends_a_broken_record_is_told(pair: tuple[socket.socket, socket.socket], identity: NodeIdentity) -> None:
    ours, theirs = pair
    tls = TlsSocket(ours, identity.server_context(), server_side=True)
    with shaken(tls, theirs, client_context(identity.ca), server=False) as client:
        os.write(client.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError, match=r"(?i)bad.record.mac"):
            read(tls, 1)
        with pytest.raises(ssl.SSLError, match=r"(?i)alert.bad.record.mac"):
            client.recv(1)


def long_hello(size: int) -> bytes:
    """A ClientHello of `size` bytes in all, but for its end, in whole records."""
    left = b"\x01" + (size * 2).to_bytes(3, "big") + bytes(size)
    made = bytearray()
    while len(made) < size:
        part, left = left[:RECORD_BYTES], left[RECORD_BYTES:]
        made += b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part
    return bytes(made[:size])


def test_a_handshake_has_a_length(pair: tuple[socket.socket, socket.socket], identity: NodeIdentity) -> None:
    ours, theirs = pair
    for size in (BARREN_MAX_BYTES - 6_000, BARREN_MAX_BYTES + 1):
        tls = TlsSocket(ours, identity.server_context(), server_side=True)
        theirs.sendall(long_hello(size))
        refused = False
        while select.select([ours], [], [], 0)[0] and not refused:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ConnectionAbortedError:
                refused = True
        assert refused is (size > BARREN_MAX_BYTES)


def test_a_long_handshake_leaves_the_bound_for_what_follows(
    pair: tuple[socket.socket, socket.socket], identity: NodeIdentity, tmp_path: Path
) -> None:
    """A client with a server whose chain is long and who has many tickets to give."""
    pem = (tmp_path / "node" / "node-leaf.pem").read_bytes()
    start = pem.index(b"-----BEGIN CERTIFICATE")
    certificate = pem[start : pem.index(b"-----END CERTIFICATE-----") + 26]
    (tmp_path / "chain.pem").write_bytes(pem + certificate * 80)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem")
    context.num_tickets = 120
    ours, theirs = pair
    came: list[int] = []
    tls = TlsSocket(Counting(ours, came), client_context(identity.ca))  # type: ignore[arg-type]  # as good as one

    def serve() -> None:
        with context.wrap_socket(theirs, server_side=True) as sock:
            sock.sendall(b"data")
            sock.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        finish(tls, tls.do_handshake)
        shaken = sum(came)
        assert read(tls, 4) == b"data"
        print(f"{shaken} bytes of handshake, {sum(came) - shaken} after it")
        assert max(shaken, sum(came) - shaken) < BARREN_MAX_BYTES < sum(came)
    finally:
        ours.shutdown(socket.SHUT_WR)
        thread.join()


class Counting:
    """A socket that notes how much is read from it."""

    def __init__(self, sock: socket.socket, came: list[int]) -> None:
        self._sock, self._came = sock, came
        self.fileno, self.send = sock.fileno, sock.send

    def recv(self, size: int) -> bytes:
        data = self._sock.recv(size)
        self._came.append(len(data))
        return data


@pytest.mark.parametrize("server", [True, False], ids=["server", "client"])
def test_a_handshake_that_fails_says_why(
    pair: tuple[socket.socket, socket.socket], identity: NodeIdentity, *, server: bool
) -> None:
    ours, theirs = pair
    old = client_context(identity.ca)
    if server:
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        tls = TlsSocket(ours, identity.server_context(), server_side=True)
    else:
        tls = TlsSocket(ours, ssl.create_default_context(), server_side=False)
    errors: list[str] = []

    def shake() -> None:
        try:
            if server:
                old.wrap_socket(theirs)
            else:
                identity.server_context().wrap_socket(theirs, server_side=True)
        except OSError as error:
            errors.append(getattr(error, "reason", None) or str(error))

    thread = threading.Thread(target=shake)
    thread.start()
    with pytest.raises(ssl.SSLError):
        finish(tls, tls.do_handshake)
    ours.close()
    thread.join()
    assert errors == ["TLSV1_ALERT_PROTOCOL_VERSION" if server else "TLSV1_ALERT_UNKNOWN_CA"]


def test_nothing_is_taken_while_something_waits(
    pair: tuple[socket.socket, socket.socket], identity: NodeIdentity
) -> None:
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
    tls = TlsSocket(ours, identity.server_context(), server_side=True)
    client = shaken(tls, theirs, client_context(identity.ca), server=False)
    data = memoryview(os.urandom(8 * 1024 * 1024))
    taken = 0
    while not tls.unsent:
        taken += tls.send(data[taken:])
    with pytest.raises(BlockingIOError):
        tls.send(data[taken:])
    assert SEND_BYTES < taken < 1024 * 1024
    with pytest.raises(BlockingIOError):
        tls.flush()
    got = bytearray()
    with client as sock:
        while len(got) < taken:
            got += sock.recv(65_536)
            if select.select([], [ours], [], 0)[1]:
                try:
                    tls.flush()
                except BlockingIOError:
                    continue
    assert got == data[:taken]
