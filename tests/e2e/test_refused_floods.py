"""Thousands of connections that say nothing, say half of it, or do not listen, while a session goes on unharmed."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import time
from collections.abc import Iterator

import pytest

from sterna import limits
from sterna.errors import Code
from sterna.protocol.frame import Type, encode
from tests.e2e.raw_client import MIB, Site, unharmed
from tests.e2e.rig import Rig, wait_for

pytestmark = pytest.mark.xdist_group("refused-floods")

HALF_OPEN = 10_000
WAVE = 1_000
SILENT_MAX = 256
UNPROVED_MAX = 1024
# Nothing is kept of them but their sockets; this is what accepting so many at once leaves behind in the heap.
HALVES_MIB = 4.0
# What 1,024 TLS handshakes that stand still cost the node: some 80 KiB each.
SHAKING_MIB = 96.0


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        yield Site(rig)


def client_hello(site: Site) -> bytes:
    """The first bytes of a TLS client (RFC 8446, section 4.1.2)."""
    come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        site.context.wrap_bio(come, go).do_handshake()
    return go.read()


def open_files(site: Site) -> int:
    return len(os.listdir(f"/proc/{site.pid}/fd"))


def wave(site: Site, first: bytes, count: int) -> list[socket.socket]:
    """Opens connections that send `first` and then nothing."""
    found = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", site.rig.port), 8)
        if first:
            sock.sendall(first)
        found.append(sock)
    return found


def honest(site: Site) -> float:
    """Connects and types as anybody would; returns how long it took, in seconds."""
    start = time.monotonic()
    with site.client() as raw:
        raw.connect()
        assert raw.echo(b"hello", 0) == b"hello"
    return time.monotonic() - start


def left(socks: list[socket.socket]) -> list[socket.socket]:
    """Those of these connections that the node has not ended; the others are closed here too, for files are few."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLRDHUP)
    gone = {fd for fd, _ in poll.poll(0)}
    for sock in socks:
        if sock.fileno() in gone:
            sock.close()
    return [sock for sock in socks if sock.fileno() >= 0]


def close(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.close()


def flood(site: Site, first: bytes, kept: int, stack: contextlib.ExitStack) -> None:
    """Ten thousand connections that send `first` and then nothing, of which at most `kept` are kept, for `stack`."""
    socks: list[socket.socket] = []
    stack.callback(close, socks)
    slowest, start = 0.0, time.monotonic()
    before = open_files(site)
    for _ in range(HALF_OPEN // WAVE):
        socks += wave(site, first, WAVE)
        socks[:] = left(socks)
        slowest = max(slowest, honest(site))
        assert open_files(site) - before <= kept + 32
    print(f"{HALF_OPEN} connections in {time.monotonic() - start:.1f} s; the slowest honest one {slowest:.3f} s")
    assert slowest < 2.0


def test_ten_thousand_half_open_handshakes_of_each_kind(site: Site) -> None:
    """Those that say nothing, half a ClientHello, or all of it: few are kept, none for longer than 10 seconds."""
    hello = client_hello(site)
    honest(site)
    before = open_files(site)
    with unharmed(site, SHAKING_MIB), contextlib.ExitStack() as stack:
        memory = site.memory()
        flood(site, b"", SILENT_MAX, stack)
        flood(site, hello[: len(hello) // 2], SILENT_MAX, stack)
        grown = site.memory() - memory
        print(f"the node's memory grew by {grown / MIB:.2f} MiB")
        assert grown <= HALVES_MIB * MIB
        flood(site, hello, UNPROVED_MAX, stack)
        wait_for(lambda: open_files(site) <= before + 8, limits.HANDSHAKE_SECONDS + 3, name="the last to be given up")


def dropped(sock: socket.socket) -> bool:
    """Whether the node ends a connection without a word; with bytes it has not read, the kernel does so by a reset."""
    sock.settimeout(3)
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_a_hello_in_two_pieces_is_a_hello(site: Site, size: int) -> None:
    """What waits for the rest of a ClientHello goes on when it comes, and ends when it cannot come any more."""
    come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = site.context.wrap_bio(come, go)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = go.read()
    with wave(site, hello[:size], 1)[0] as sock:
        time.sleep(0.05)
        sock.sendall(hello[size:])
        come.write(sock.recv(65536))
        tls.do_handshake()
        assert tls.version() == "TLSv1.3"
    with wave(site, hello[:size], 1)[0] as sock:
        sock.shutdown(socket.SHUT_WR)
        assert dropped(sock)
    with wave(site, b"G" * size, 1)[0] as sock:
        assert dropped(sock)


def test_a_handshake_that_stops_is_given_up_with_its_error(site: Site) -> None:
    """After TLS nothing, half a frame, or only PINGs: ERROR `timeout` after 10 seconds; before it: silence."""
    hello = client_hello(site)
    with unharmed(site, 16):
        start = time.monotonic()
        mute, half, pinging = site.client(), site.client(), site.client()
        torn = wave(site, hello[:100], 1)[0]
        half.raw(encode(Type.CONNECT, 1, 0, b"\x80" * 100)[:50])
        while time.monotonic() - start < limits.HANDSHAKE_SECONDS - 1:
            assert pinging.alive()
            time.sleep(0.5)
        for raw in (mute, half, pinging):
            assert raw.code() == Code.TIMEOUT
            assert raw.ended()
            raw.close()
        assert dropped(torn)
        torn.close()
        assert time.monotonic() - start >= limits.HANDSHAKE_SECONDS


def test_strangers_who_do_not_listen_cost_nothing(site: Site) -> None:
    """Before any proof, every frame that asks for an answer is sent without end, and nothing is read."""
    noise = encode(Type.PING, 0, 0, bytes(limits.PING_MAX_BYTES)) * 2000
    with unharmed(site, 24):  # what 32 answers of 240 KiB, dropped again, leave behind in the heap
        raws = [site.client() for _ in range(32)]
        sent = 0
        deadline = time.monotonic() + 8
        alive = set(raws)
        while alive and time.monotonic() < deadline:
            for raw in list(alive):
                raw.sock.settimeout(0.05)
                try:
                    sent += raw.sock.send(noise)
                except TimeoutError:
                    continue
                except OSError:
                    alive.discard(raw)
        print(f"{sent / 1e6:.0f} MB were sent; {len(alive)} connections are left")
        assert not alive
        for raw in raws:
            raw.close()
