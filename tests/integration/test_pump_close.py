"""The orderly end of a connection: the last word arrives, and a peer that goes on sending costs next to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

from sterna.errors import Code
from sterna.protocol.link import Link
from sterna.transport.pump import _LINGER_MAX_BYTES, _LINGER_SECONDS, _NOBODY, READ_BYTES, Pump, Reactor

BUFFERED_MAX_BYTES = 12 * 1024 * 1024
"""What the sockets of both sides may hold besides."""


class Flood:
    """A peer that reads nothing and sends for as long as it may, as fast as it can."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        self._until = time.monotonic() + seconds
        self.sent = 0
        self.refused = 0.0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self._sock.settimeout(0.2)
        block = bytes(1024 * 1024)
        while time.monotonic() < self._until:
            try:
                self.sent += self._sock.send(block)
            except TimeoutError:
                continue
            except OSError:
                self.refused = time.monotonic()
                return


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setblocking(False)
    return ours, theirs


async def test_a_peer_that_does_not_stop_is_read_for_four_mebibytes_at_most() -> None:
    ours, theirs = tcp_pair()
    loop = asyncio.get_running_loop()
    link = Link()
    pump = Pump(Reactor(loop), ours, link, _NOBODY)
    pump.start()
    flood = Flood(theirs, 3.0)
    try:
        start = last = time.monotonic()
        longest = 0.0
        link.fail(Code.PROTOCOL, "Broken.")
        while flood.thread.is_alive():
            await asyncio.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
    finally:
        await loop.run_in_executor(None, flood.thread.join)
        theirs.close()
    print(
        f"{flood.sent / 2**20:.1f} MiB sent, refused after {flood.refused - start:.2f} s, pause {longest * 1000:.0f} ms"
    )
    assert flood.refused
    assert flood.sent < _LINGER_MAX_BYTES + READ_BYTES + BUFFERED_MAX_BYTES
    assert longest < 0.5


async def test_a_peer_that_does_nothing_is_waited_for_a_second() -> None:
    ours, theirs = tcp_pair()
    link = Link()
    pump = Pump(Reactor(asyncio.get_running_loop()), ours, link, _NOBODY)
    pump.start()
    start = time.monotonic()
    link.fail(Code.PROTOCOL, "Broken.")
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    with contextlib.closing(theirs):
        said = await loop.sock_recv(theirs, 4096)
        assert b"Broken." in said
        assert await loop.sock_recv(theirs, 4096) == b""
        while ours.fileno() >= 0:
            assert time.monotonic() - start < _LINGER_SECONDS + 2
            await asyncio.sleep(0.01)
    assert time.monotonic() - start >= _LINGER_SECONDS - 0.1
