"""One attachment over TCP, a WebSocket or QUIC, on a plain loop: what the web and quic benchmarks measure with."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sterna.protocol import client as machine_events
from sterna.protocol.client import ClientMachine
from sterna.protocol.messages import CONTEXT_CONNECT, ConnectBody
from sterna.transport.quic_client import QuicChannel
from sterna.trust.device import DeviceKey
from sterna.trust.pins import Pin

SECONDS = 10.0
_READ_BYTES = 256 * 1024
_MASK = b"\0\0\0\0"
_UPGRADE = (
    "GET /ws HTTP/1.1\r\nHost: localhost:{port}\r\nOrigin: https://localhost:{port}\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: clawterm.v1\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Wire(Protocol):
    """What carries one session's bytes."""

    def send(self, parts: list[bytes]) -> None:
        """Sends bytes."""

    def receive(self, seconds: float) -> bytes:
        """Returns what came, b"" if nothing did for so long."""

    def close(self) -> None:
        """Ends it."""


class Tls:
    """TCP and TLS."""

    def __init__(self, port: int, pin: Pin, source: str, alpn: str = "clawterm/1") -> None:
        plain = socket.socket()
        plain.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT, ip(7)
        plain.bind((source, 0))
        plain.settimeout(SECONDS)
        plain.connect(("127.0.0.1", port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = pin.context((alpn,))
        self.sock = context.wrap_socket(plain)
        self.poll = select.poll()
        self.poll.register(self.sock.fileno(), select.POLLIN)

    def send(self, parts: list[bytes]) -> None:
        """Sends bytes."""
        self.sock.sendall(b"".join(parts))

    def receive(self, seconds: float) -> bytes:
        """Returns what came, b"" if nothing did for so long."""
        if not self.sock.pending() and not self.poll.poll(seconds * 1e3):
            return b""
        data = self.sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionError("the node closed the connection")
        return data

    def close(self) -> None:
        """Ends it."""
        self.sock.close()


class WebSocket(Tls):
    """A WebSocket as a browser makes one (RFC 6455); the mask is zero, which is as valid as another."""

    def __init__(self, port: int, pin: Pin, source: str) -> None:
        super().__init__(port, pin, source, "http/1.1")
        self.sock.sendall(_UPGRADE.format(port=port).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.sock.recv(4096)
        if not head.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(head.decode())
        self._rest = head.partition(b"\r\n\r\n")[2]

    def send(self, parts: list[bytes]) -> None:
        """Sends one binary message."""
        data = b"".join(parts)
        size = len(data)
        if size < 126:
            head = bytes((0x82, 0x80 | size))
        elif size < 65536:
            head = bytes((0x82, 0x80 | 126)) + size.to_bytes(2, "big")
        else:
            head = bytes((0x82, 0x80 | 127)) + size.to_bytes(8, "big")
        self.sock.sendall(head + _MASK + data)

    def receive(self, seconds: float) -> bytes:
        """Returns the content of the messages that are whole."""
        data = super().receive(seconds)
        if not data:
            return b""
        data = self._rest + data if self._rest else data
        at, found, size = 0, [], len(data)
        while size - at >= 2:
            length, begin = data[at + 1] & 0x7F, at + 2
            if length >= 126:
                begin += 2 if length == 126 else 8
                length = int.from_bytes(data[at + 2 : begin], "big")
            if begin + length > size:
                break
            if data[at] == 0x82:
                found.append(data[begin : begin + length])
            at = begin + length
        self._rest = data[at:]
        return b"".join(found)


class Quic:
    """QUIC, as the client has it."""

    def __init__(self, port: int, pin: Pin, source: str) -> None:
        self.channel = QuicChannel(socket.AF_INET, ("127.0.0.1", port), pin.ca)
        self.poll = select.poll()
        self.poll.register(self.channel.fileno(), select.POLLIN)
        self._came: list[bytes] = []
        until = time.monotonic() + SECONDS
        while not self.channel.established:
            self._turn(0.1)
            if self.channel.over or time.monotonic() > until:
                raise ConnectionError(self.channel.over or "no answer over QUIC")

    def _turn(self, seconds: float) -> None:
        due, now = self.channel.next_timeout(), time.monotonic_ns()
        wait = seconds * 1e3 if due is None else min(seconds * 1e3, max(0, due - now) / 1e6)
        if self.poll.poll(wait):
            if data := self.channel.receive():
                self._came.append(data)
        else:
            self.channel.handle_timeout(time.monotonic_ns())

    def send(self, parts: list[bytes]) -> None:
        """Sends bytes."""
        self.channel.send(parts)

    def receive(self, seconds: float) -> bytes:
        """Returns what came, b"" if nothing did for so long."""
        until = time.monotonic() + seconds
        self._turn(0.0 if self._came else seconds)
        while not self._came and (left := until - time.monotonic()) > 0:
            self._turn(left)
            if self.channel.over or self.channel.ended:
                raise ConnectionError(self.channel.over or "the node ended the stream")
        came, self._came = self._came, []
        return b"".join(came)

    def close(self) -> None:
        """Ends it."""
        self.channel.close()


class Attachment:
    """A session of its own, begun over a wire; `cells` for one with a terminal."""

    key = DeviceKey(Ed25519PrivateKey.generate())

    def __init__(
        self, wire: Wire, pin: Pin, token: str, tenant: str, agent: str, cells: tuple[int, int] = (0, 0)
    ) -> None:
        self.wire = wire
        body = ConnectBody(
            context=CONTEXT_CONNECT, node=pin.node_id, request=os.urandom(16), key=self.key.public,
            attachment=os.urandom(16), credential=token, tenant=tenant, agent=agent, want="new", exact=True,
            cols=cells[0], rows=cells[1], term="xterm-256color" if cells[0] else "",
        )  # fmt: skip
        key = self.key
        self.machine = ClientMachine(
            body, device=key.id, sign=lambda c, b: key.sign(c, pin.node_id, b), counter=time.time_ns,
            raise_counter=lambda _value: None, random=os.urandom, now=time.monotonic_ns(),
        )  # fmt: skip
        action = self.machine.next_action()
        assert isinstance(action, machine_events.Dial)
        self.opened = False
        self.machine.established(action.connection, time.monotonic_ns())
        self._number = action.connection
        until = time.monotonic() + SECONDS
        while not self.opened:
            self.turn(0.1)
            if time.monotonic() > until:
                raise ConnectionError("no session")

    def turn(self, seconds: float) -> bytes:
        """Sends, waits for something to come for so long at most, and returns the output that came."""
        machine = self.machine
        self._send()
        due, now = machine.next_timeout(), time.monotonic_ns()
        wait = seconds if due is None else min(seconds, max(0, due - now) / 1e9)
        data = self.wire.receive(wait)
        now = time.monotonic_ns()
        if data:
            machine.receive(self._number, data, now)
        if due is not None and now >= due:
            machine.handle_timeout(now)
        found = []
        while (event := machine.next_event()) is not None:
            if isinstance(event, machine_events.Output):
                found.append(event.data)
                machine.handled(event.end, now)
            elif isinstance(event, machine_events.Opened):
                self.opened = True
            elif isinstance(event, machine_events.Failed):
                raise event.error
        self._send()
        return found[0] if len(found) == 1 else b"".join(found)

    def _send(self) -> None:
        for _, parts in self.machine.data_to_send():
            self.wire.send(parts)

    def write(self, data: bytes) -> None:
        """Types."""
        self.machine.write(data, time.monotonic_ns())
        self._send()

    def idle(self, seconds: float) -> None:
        """Lets time pass."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.turn(left)

    def expect(self, text: bytes) -> None:
        """Waits for the program to say something."""
        said, until = b"", time.monotonic() + SECONDS
        while text not in said:
            said += self.turn(0.1)
            if time.monotonic() > until:
                raise RuntimeError(f"the program said {said!r} instead of {text!r}")

    def echo(self) -> float:
        """Types a key; returns the seconds until its echo came."""
        began = time.perf_counter()
        self.write(b"k")
        while not self.turn(SECONDS):
            pass
        return time.perf_counter() - began

    def bulk(self, size: int) -> float:
        """Asks the program for `size` bytes; returns the seconds until all had come."""
        began = time.perf_counter()
        self.write(b"%d\n" % size)
        got, until = 0, time.monotonic() + 6 * SECONDS
        while got < size and time.monotonic() < until:
            got += len(self.turn(SECONDS))
        if got != size:
            raise RuntimeError(f"{got} bytes came instead of {size}")
        return time.perf_counter() - began


WIRES: dict[str, type[Tls] | type[WebSocket] | type[Quic]] = {"tcp": Tls, "web": WebSocket, "quic": Quic}
