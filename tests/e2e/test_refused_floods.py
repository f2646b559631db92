"""Thousands of connections that say nothing, say half of it, or do not listen, while a session goes on unharmed."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import ssl
import time
from collections.abc import Iterator

import pytest

from sterna import limits
from sterna.errors import Code
from sterna.protocol.frame import Type, encode
from tests.e2e.raw_client import Site, unharmed
from tests.e2e.rig import Rig, wait_for

pytestmark = pytest.mark.xdist_group("refused-floods")

HALF_OPEN = 10_000
WAVE = 1_000
SILENT_MAX = 256
SHAKING_MAX = limits.HANDSHAKES_MAX
# What 256 TLS handshakes that stand still cost the node: some 80 KiB each. Those that said less cost none of its memory.
FLOOD_MIB = 24.0


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


def closed(socks: list[socket.socket]) -> int:
    """How many of these connections the node has ended."""
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        return len(selector.select(0))


def honest(site: Site) -> float:
    """Connects and types as anybody would; returns how long it took, in seconds."""
    start = time.monotonic()
    with site.client() as raw:
        raw.connect()
        assert raw.echo(b"hello", 0) == b"hello"
    return time.monotonic() - start


def test_ten_thousand_half_open_handshakes_of_each_kind(site: Site) -> None:
    """Those that say nothing, half a ClientHello, or all of it and then nothing: few are kept, none for over 10 seconds."""
    hello = client_hello(site)
    honest(site)
    before, start = open_files(site), time.monotonic()
    socks: list[socket.socket] = []
    try:
        with unharmed(site, FLOOD_MIB):
            half_frame = site.client()
            half_frame.raw(encode(Type.CONNECT, 1, 0, b"\x80" * 100)[:50])
            slowest = 0.0
            for first in (b"", hello[: len(hello) // 2], hello):
                for _ in range(HALF_OPEN // WAVE):
                    new = wave(site, first, WAVE)
                    socks += new
                    slowest = max(slowest, honest(site))
                    assert open_files(site) - before <= SILENT_MAX + SHAKING_MAX + 32
                wait_for(lambda: closed(socks) >= len(socks) - SILENT_MAX - SHAKING_MAX, name="the oldest to make room")
                # Ours are closed as well where the node has closed them: the machine's files are few.
                socks = [sock for sock in socks if not ended(sock)]
            print(f"{3 * HALF_OPEN} connections in {time.monotonic() - start:.1f} s; the slowest honest one {slowest:.3f} s")
            assert slowest < 2.0
            wait_for(
                lambda: closed(socks) == len(socks), limits.HANDSHAKE_SECONDS + 3, name="the last ones to be given up"
            )
            wait_for(lambda: open_files(site) <= before + 8, name="their files")
            # It was pushed out by the flood or told why; either way it is gone.
            assert half_frame.ended()
            half_frame.close()
    finally:
        for sock in socks:
            sock.close()


def ended(sock: socket.socket) -> bool:
    """Whether the node has closed this connection; then it is closed here."""
    if not closed([sock]):
        return False
    sock.close()
    return True


def test_a_handshake_that_stops_is_given_up_with_its_error(site: Site) -> None:
    """After TLS nothing, half a frame, or only PINGs: ERROR `timeout` after 10 seconds; half a TLS handshake: silence."""
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
        torn.settimeout(3)
        assert torn.recv(100) == b""
        torn.close()
        assert time.monotonic() - start >= limits.HANDSHAKE_SECONDS


def test_strangers_who_do_not_listen_cost_nothing(site: Site) -> None:
    """Before any proof, every frame that asks for an answer is sent without end, and nothing is read."""
    noise = encode(Type.PING, 0, 0, bytes(limits.PING_MAX_BYTES)) * 2000
    with unharmed(site, 16):
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
