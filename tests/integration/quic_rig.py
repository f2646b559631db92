"""A QUIC listener in the test's own process, and a client of it whose every datagram is the test's."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qh3.quic import events
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection

from sterna.protocol.link import Link
from sterna.transport.pump import Conduit, Owner, Reactor
from sterna.transport.quic import QuicListener, server_configuration
from sterna.transport.udp import udp_socket
from sterna.trust.node_identity import LEAF_FILE, NodeIdentity
from sterna.trust.tls import ALPN

SECONDS = 10.0
HEAD = bytes((0xC3, 0, 0, 0, 1))
"""How a client's Initial of version 1 begins."""


async def until(done: Callable[[], object]) -> None:
    """Lets the loop work until `done()` is true."""
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.001)


def made_up(size: int, *, version: int = 1, target: bytes = b"") -> bytes:
    """A datagram that looks like a client's Initial from outside; nobody can read what is in it."""
    ids = b"".join(bytes((len(each),)) + each for each in (target or os.urandom(8), os.urandom(8)))
    head = HEAD[:1] + version.to_bytes(4, "big") + ids + b"\0"
    rest = size - len(head) - 2
    return head + (0x4000 | rest).to_bytes(2, "big") + os.urandom(rest)


class Echo:
    """The owner of a stream, and what it was told; it echoes unless `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.link = Link()
        self.quiet = quiet
        self.got = b""
        self.drains = 0
        self.end = ""
        self.conduit: Conduit

    def received(self, pump: Conduit, data: memoryview) -> None:
        self.got += data
        if not self.quiet:
            self.push(bytes(data))

    def push(self, data: bytes) -> None:
        """Queues bytes that need be no frames."""
        self.link._out.append(data)
        self.link.out_bytes += len(data)
        self.link.wake()

    def drained(self, pump: Conduit) -> None:
        self.drains += 1

    def ended(self, pump: Conduit, reason: str) -> None:
        self.end = reason


class Served:
    """A listener on a real socket; `streams` are the owners of all that were adopted, `quiet` what new ones are."""

    def __init__(self, directory: Path, host: str = "127.0.0.1", *, alpn: bool = True, **bounds: Any) -> None:
        identity = NodeIdentity.load(os.fspath(directory / "node"), now_s=int(time.time()))
        self.ca = identity.ca
        configuration = server_configuration((directory / "node" / LEAF_FILE).read_bytes())
        if not alpn:
            configuration.alpn_protocols = None
        self.reactor = Reactor(asyncio.get_running_loop())
        self.listener = QuicListener(self.reactor, udp_socket(host, 0), self._adopt, configuration, **bounds)
        self.streams: list[Echo] = []
        self.quiet = False

    def _adopt(self, carry: Callable[[Link, Owner], Conduit]) -> bool:
        echo = Echo(quiet=self.quiet)
        self.streams.append(echo)
        echo.conduit = carry(echo.link, echo)
        return True


@asynccontextmanager
async def serving(directory: Path, host: str = "127.0.0.1", **more: Any) -> AsyncIterator[Served]:
    served = Served(directory, host, **more)
    try:
        yield served
    finally:
        served.listener.close()


def speaking(source: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A client's socket."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind((source, port))
    return sock


class Speaker:
    """A client: `sent` has its datagrams, `came` those of the server, `heard` the events; `told` says how it ended."""

    def __init__(self, served: Served, *, source: str = "127.0.0.1", **more: Any) -> None:
        self.target = served.listener.address
        self.sock = speaking(source)
        configuration = QuicConfiguration(
            is_client=True, alpn_protocols=[ALPN], verify_hostname=False, initial_rtt=0.1,
            cadata=ssl.DER_cert_to_PEM_cert(served.ca).encode(), **more,
        )  # fmt: skip
        self.tickets: list[object] = []
        self.quic = QuicConnection(configuration=configuration, session_ticket_handler=self.tickets.append)
        self.sent: list[bytes] = []
        self.came: list[bytes] = []
        self.heard: list[events.QuicEvent] = []
        self.pings = 0

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def connect(self) -> None:
        """Says hello."""
        self.quic.connect(self.target, time.monotonic())
        self.say()

    def say(self) -> None:
        """Sends what there is to send."""
        for data in self.made():
            self.sock.sendto(data, self.target)

    def made(self) -> list[bytes]:
        """Returns what there is to send instead of sending it."""
        found = [data for data, _ in self.quic.datagrams_to_send(time.monotonic())]
        self.sent += found
        return found

    async def something(self) -> list[bytes]:
        """Returns what there is to send, once that may be sent."""
        while not (found := self.made()):
            await asyncio.sleep(0.001)
        return found

    def hear(self) -> None:
        """Takes what came, and answers it."""
        for data in drained(self.sock):
            self.came.append(data)
            self.quic.receive_datagram(data, self.target, time.monotonic())
        due = self.quic.get_timer()
        if due is not None and due <= time.monotonic():
            self.quic.handle_timer(time.monotonic())
        while (event := self.quic.next_event()) is not None:
            self.heard.append(event)
        self.say()

    async def until(self, done: Callable[[], object]) -> None:
        """Takes part until `done()` is true."""

        def over() -> object:
            self.hear()
            return done()

        await until(over)

    async def shake(self) -> None:
        """Connects, to the end of the handshake on both sides."""
        self.connect()
        await self.until(lambda: self.quic._handshake_confirmed)

    async def ask(self) -> None:
        """Comes back once the server has dealt with all that was sent before."""
        self.pings += 1
        self.quic.send_ping(self.pings)
        self.say()
        await self.until(lambda: any(event.uid == self.pings for event in self.all(events.PingAcknowledged)))

    def write(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Sends bytes on a stream."""
        self.quic.send_stream_data(stream, data, end)
        self.say()

    def all(self, kind: type[Any]) -> list[Any]:
        """Returns the events of a kind."""
        return [event for event in self.heard if isinstance(event, kind)]

    def read(self, stream: int) -> bytes:
        """Returns what has come on a stream."""
        return b"".join(e.data for e in self.all(events.StreamDataReceived) if e.stream_id == stream)

    @property
    def told(self) -> events.ConnectionTerminated | None:
        """How the server ended the connection, if it did."""
        return self.quic._close_event


def drained(sock: socket.socket) -> list[bytes]:
    """All datagrams that wait in a socket."""
    found = []
    while True:
        try:
            found.append(sock.recv(65_536))
        except BlockingIOError:
            return found


async def fence(served: Served, sock: socket.socket) -> list[bytes]:
    """Comes back once the listener has dealt with all that was sent from a socket; returns what came there before.

    What is asked for that is a version that nobody has, which is answered without any state. That is done as soon as it
    is read, other answers follow when all is read that there was: hence twice.
    """
    found: list[bytes] = []
    for times in (1, 2):
        sock.sendto(made_up(1_200, version=0x1A2A3A4A), served.listener.address)

        def answered(times: int = times) -> bool:
            found.extend(drained(sock))
            return sum(data[1:5] == bytes(4) for data in found) == times

        await until(answered)
    return [data for data in found if data[1:5] != bytes(4)]
