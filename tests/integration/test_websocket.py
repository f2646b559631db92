"""The protocol over WebSocket against a real node: echo, back-pressure, close codes, draining, and what is left of it.

`WebSock` is a WebSocket client over a blocking TLS socket, made by hand so that every byte is the test's; with it `Raw`
speaks to the node's web port as it does to the other one.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.codec import Decoder
from sterna.protocol.frame import Type, encode
from sterna.protocol.link import Link
from sterna.protocol.messages import Accept, Resumed
from sterna.transport.websocket import BINARY, CLOSE, MESSAGE_MAX_BYTES, PING, PONG, SUBPROTOCOL, unmask
from tests.e2e.raw_client import MIB, WAIT_SECONDS, Raw, Site, new_device, unharmed
from tests.e2e.rig import Rig, free_port, wait_for

pytestmark = pytest.mark.xdist_group("websocket")

# Counts lines without end: what came can be compared with what it has to be.
COUNTER = """import sys
n = 0
while True:
    sys.stdout.write("".join("%08d\\n" % i for i in range(n, n + 4096)))
    n += 4096
"""
LINE_BYTES = 9


class RefusedError(Exception):
    """The node answered something else than 101; `status` and `text` say what."""

    def __init__(self, head: str, text: str) -> None:
        super().__init__(head)
        self.status = int(head.split(" ", 2)[1])
        self.head = head
        self.text = text


def request(host: str, /, **changes: str | None) -> bytes:
    """The bytes of a WebSocket's request; `changes` replace headers (None: leave one out), with _ for -."""
    headers: dict[str, str | None] = {
        "Host": host, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(), "Sec-WebSocket-Protocol": SUBPROTOCOL,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }  # fmt: skip
    lines = ["GET /ws HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    return "\r\n".join((*lines, "", "")).encode()


def client_frame(opcode: int, data: bytes, *, first: int = 0x80, masked: bool = True) -> bytes:
    """A client's frame; `first` holds FIN and the reserved bits."""
    size, mask = len(data), os.urandom(4)
    bit = 0x80 if masked else 0
    if size < 126:
        head = bytes((first | opcode, bit | size))
    elif size < 1 << 16:
        head = bytes((first | opcode, bit | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((first | opcode, bit | 127)) + size.to_bytes(8, "big")
    return head + mask + unmask(data, mask) if masked else head + data


class WebSock:
    """A WebSocket that looks like a socket: what is sent is one binary message, what is received the content of one.

    `close_code` is the code with which the node closed; `messages` counts what came.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.tls = sock
        self._rest = b""
        self.close_code = 0
        self.messages = 0

    @classmethod
    def open(cls, context: ssl.SSLContext, port: int, *, source: str = "", ask: bytes = b"") -> WebSock:
        """Connects; raises RefusedError if the answer is not 101."""
        origin = (source, 0) if source else None
        sock = socket.create_connection(("127.0.0.1", port), WAIT_SECONDS, origin)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = context.wrap_socket(sock)
        except OSError:
            sock.close()
            raise
        try:
            tls.sendall(ask or request(f"127.0.0.1:{port}"))
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += cls._some(tls)
        except OSError:
            tls.close()
            raise
        head, _, rest = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            with contextlib.suppress(OSError), tls:
                while len(rest) < _length(head):
                    rest += cls._some(tls)
            raise RefusedError(head.decode(), rest.decode())
        return cls(tls)

    @staticmethod
    def _some(tls: ssl.SSLSocket) -> bytes:
        data = tls.recv(65536)
        if not data:
            raise ConnectionResetError("the node closed the connection")
        return data

    def settimeout(self, seconds: float) -> None:
        self.tls.settimeout(seconds)

    def close(self) -> None:
        self.tls.close()

    def sendall(self, data: bytes) -> None:
        self.tls.sendall(client_frame(BINARY, data))

    def recv(self, _size: int) -> bytes:
        """The content of the next binary message; b"" at the end."""
        while True:
            opcode, content = self.receive()
            if opcode == BINARY:
                return content
            if opcode == CLOSE:
                return b""

    def receive(self) -> tuple[int, bytes]:
        """The next message of any kind; (CLOSE, b"") also when the connection just ends."""
        while (found := self._message()) is None:
            try:
                data = self.tls.recv(262144)
            except (ConnectionResetError, ssl.SSLEOFError):
                data = b""
            if not data:
                return CLOSE, b""
            self._rest += data
        opcode, content = found
        self.messages += 1
        if opcode == CLOSE and len(content) >= 2:
            self.close_code = int.from_bytes(content[:2], "big")
        return opcode, content

    def _message(self) -> tuple[int, bytes] | None:
        rest = self._rest
        if len(rest) < 2:
            return None
        assert rest[0] & 0xF0 == 0x80, "the node sends whole messages without extensions"
        size, start = rest[1], 2
        assert size < 0x80, "a node does not mask"
        if size >= 126:
            more = 2 if size == 126 else 8
            if len(rest) < 2 + more:
                return None
            size, start = int.from_bytes(rest[2 : 2 + more], "big"), 2 + more
        if len(rest) < start + size:
            return None
        self._rest = rest[start + size :]
        return rest[0] & 15, rest[start : start + size]


def _length(head: bytes) -> int:
    found = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return int(found[0].partition(b":")[2]) if found else 0


class WebRaw(Raw):
    """`Raw` over the node's web port; `ask` is the request that it begins with."""

    def __init__(self, site: Site, port: int, *, source: str = "", ask: bytes = b"", **options: Any) -> None:
        self.site = site
        self.device = options.get("device") or new_device()
        self.credential = options.get("credential", site.token)
        self.link = Link()
        self._frames = []
        self.eof = False
        self.web = WebSock.open(site.context, port, source=source, ask=ask)
        self.sock = self.web  # type: ignore[assignment]  # it has what Raw needs of a socket

    def __enter__(self) -> WebRaw:
        return self


class Web:
    """A running node with its web port."""

    def __init__(self, rig: Rig, port: int) -> None:
        self.rig = rig
        self.port = port
        self.site = Site(rig)

    def client(self, **options: Any) -> WebRaw:
        return WebRaw(self.site, self.port, **options)


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_pod("count", sys.executable, "-c", COUNTER, kind="stream")
        port = free_port()
        rig.start_node("--web-port", str(port))
        yield Web(rig, port)


def counted(start: int, size: int) -> bytes:
    """The output of COUNTER at a position."""
    first, last = start // LINE_BYTES, (start + size) // LINE_BYTES + 1
    text = "".join(f"{line % 10**8:08d}\n" for line in range(first, last)).encode()
    return text[start - first * LINE_BYTES :][:size]


def test_a_session_echoes_and_the_web_port_is_another_way_to_the_same_one(web: Web) -> None:
    attachment = os.urandom(16)
    with web.client() as raw:
        accept = raw.connect(attachment=attachment)
        assert raw.echo(b"hello", 0) == b"hello"
        assert raw.alive()
        device = raw.device
    with web.site.client(device=device) as tcp:
        answer = tcp.resume(1, accept, attachment, output=5)
        assert isinstance(answer, Resumed)
        assert tcp.echo(b"there", 5) == b"there"
    with web.client(device=device) as back:
        assert isinstance(back.resume(1, accept, attachment, output=10), Resumed)
        assert back.echo(b"back", 10) == b"back"


def test_every_message_holds_whole_frames_and_many_of_them(web: Web) -> None:
    with web.client() as raw:
        raw.connect(agent="count")
        position = acked = sizes = frames = 0
        while position < 8 * MIB:
            opcode, content = raw.web.receive()
            assert opcode == BINARY
            assert len(content) <= MESSAGE_MAX_BYTES
            decoder = Decoder()
            for kind, _handle, _seq, payload in decoder.feed(content):
                frames += 1
                if kind == Type.DATA:
                    assert payload == counted(position, len(payload))
                    position += len(payload)
            assert decoder.fault is None
            assert decoder.waiting == 0, "a message ended inside a frame"
            sizes += 1
            if position - acked >= limits.ACK_EVERY_BYTES:
                acked = position
                raw.send(Type.ACK, 1, acked & 0xFFFFFFFF, acked.to_bytes(8, "big"))
        print(f"{position} bytes in {sizes} messages of {frames} frames")


def test_what_nobody_takes_waits_in_bounds_and_comes_whole(web: Web) -> None:
    """Fifty attachments whose window is open all the time, and who do not read for a while."""
    with unharmed(web.site, 48), contextlib.ExitStack() as stack:
        slow = []
        for _ in range(8):
            raw = stack.enter_context(web.client())
            raw.connect(agent="count")
            slow.append(raw)
        time.sleep(1)
        for raw in slow:
            data = raw.data(limits.WINDOW_BYTES)
            assert data == counted(0, len(data))


def test_a_client_that_asks_without_reading_is_ended(web: Web) -> None:
    """PINGs of the protocol ask for answers without end; what waits for one client is bounded."""
    noise = encode(Type.PING, 0, 0, bytes(limits.PING_MAX_BYTES)) * 800
    with unharmed(web.site, 32), web.client() as raw, web.client() as stranger:
        raw.connect()
        for client in (stranger, raw):
            client.web.settimeout(5)
            with pytest.raises((OSError, ssl.SSLError)):
                pour(client, noise)


def pour(raw: WebRaw, noise: bytes) -> None:
    """Sends without reading, until the node has enough of it or 256 MiB went."""
    for _ in range(256 * MIB // len(noise)):
        raw.web.sendall(noise)


FAULTS = {
    "text": (client_frame(1, b"hello"), 1003),
    "oversized": (client_frame(BINARY, bytes(MESSAGE_MAX_BYTES + 1)), 1009),
    "oversized-in-pieces": (
        client_frame(BINARY, bytes(MESSAGE_MAX_BYTES), first=0) + client_frame(0, b"x", first=0x80), 1009,
    ),
    "empty": (client_frame(BINARY, b"") * 5000, 1008),
    "pings": (client_frame(PING, b"x") * 5000, 1008),
    "announced": (bytes((0x82, 0xFF)) + (1 << 62).to_bytes(8, "big") + bytes(4), 1009),
    "unmasked": (client_frame(BINARY, b"hello", masked=False), 1002),
    "compressed": (client_frame(BINARY, b"hello", first=0xC0), 1002),
    "unknown-opcode": (client_frame(3, b""), 1002),
    "stray-piece": (client_frame(0, b"hello"), 1002),
    "long-ping": (client_frame(PING, bytes(126)), 1002),
    "ping-in-pieces": (client_frame(PING, b"x", first=0), 1002),
    "long-length": (bytes((0x82, 0xFE)) + (5).to_bytes(2, "big") + bytes(9), 1002),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_broken_messages_end_only_their_connection(web: Web, name: str) -> None:
    data, code = FAULTS[name]
    with unharmed(web.site), web.client() as raw:
        raw.connect()
        assert raw.echo(b"hello", 0) == b"hello"
        with contextlib.suppress(OSError):  # closed before all of it was taken
            raw.web.tls.sendall(data)
        assert raw.ended()
        assert raw.web.close_code == code


def test_a_stranger_may_say_no_more_than_a_frame(web: Web) -> None:
    with unharmed(web.site), web.client() as raw:
        raw.web.tls.sendall(client_frame(BINARY, bytes(2 * 65_550))[:100])
        assert raw.ended()
        assert raw.web.close_code == 1009


def test_messages_in_pieces_and_pings_are_fine(web: Web) -> None:
    with web.client() as raw:
        raw.connect()
        frame = encode(Type.DATA, 1, 0, b"in pieces")
        pieces = [frame[:1], b"", frame[1:20], frame[20:]]
        for at, piece in enumerate(pieces):
            raw.web.tls.sendall(client_frame(BINARY if at == 0 else 0, piece, first=0x80 if at == 3 else 0))
            raw.web.tls.sendall(client_frame(PING, b"between"))
        seen: list[tuple[int, bytes]] = []
        while sum(opcode == BINARY for opcode, _ in seen) == 0 or (PONG, b"between") not in seen:
            seen.append(raw.web.receive())
        content = next(content for opcode, content in seen if opcode == BINARY)
        assert Decoder().feed(content)[0][3] == b"in pieces"
        whole = client_frame(BINARY, encode(Type.DATA, 1, 9, b"!"))
        for byte in whole:
            raw.web.tls.sendall(bytes((byte,)))
        assert raw.data(1) == b"!"


def test_a_message_that_ends_inside_a_frame_is_refused(web: Web) -> None:
    with unharmed(web.site), web.client() as raw:
        raw.connect()
        raw.web.sendall(encode(Type.DATA, 1, 0, b"hello")[:-1])
        assert raw.code() == Code.TRUNCATED
        assert raw.ended()
        assert raw.web.close_code == 1000


def test_a_close_is_answered_and_the_session_stays(web: Web) -> None:
    attachment = os.urandom(16)
    with web.client() as raw:
        accept = raw.connect(attachment=attachment)
        assert raw.echo(b"a", 0) == b"a"
        raw.web.tls.sendall(client_frame(CLOSE, (1001).to_bytes(2, "big") + b"bye"))
        assert raw.ended()
        assert raw.web.close_code == 1000
        with web.client(device=raw.device) as back:
            assert isinstance(back.resume(1, accept, attachment, output=1), Resumed)
            assert back.echo(b"b", 1) == b"b"


def test_who_proves_nothing_is_told_and_ended(web: Web) -> None:
    start = time.monotonic()
    with web.client() as raw:
        late = raw.until(Type.ERROR, handle=0, seconds=limits.HANDSHAKE_SECONDS + 4)
        assert messages.unpack(messages.Error, late[3]).code == Code.TIMEOUT
        assert raw.ended()
        assert raw.web.close_code == 1000
        assert limits.HANDSHAKE_SECONDS - 1 <= time.monotonic() - start < limits.HANDSHAKE_SECONDS + 4


def test_a_wrong_token_is_refused_in_the_message(web: Web) -> None:
    with web.client(credential="nonsense") as raw:
        answer = raw.ask()
        assert isinstance(answer, messages.Error)
        assert answer.code == Code.DENIED
        assert raw.ended()


def test_draining_closes_websockets_in_order_and_stops_the_site() -> None:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        port = free_port()
        rig.start_node("--web-port", str(port))
        web = Web(rig, port)
        attachment = os.urandom(16)
        with contextlib.ExitStack() as stack:
            raws = [stack.enter_context(web.client()) for _ in range(5)]
            accepts = [raw.connect(attachment=attachment if at == 0 else os.urandom(16)) for at, raw in enumerate(raws)]
            assert raws[0].echo(b"a", 0) == b"a"
            idle = stack.enter_context(web.site.context.wrap_socket(socket.create_connection(("127.0.0.1", port))))
            assert rig.node is not None
            start = time.monotonic()
            rig.node.process.terminate()
            for raw in raws:
                assert raw.code() == Code.DRAINING
                assert raw.ended()
                assert raw.web.close_code == 1000
            idle.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert idle.recv(1) == b""
            assert rig.node.process.wait(5) == 0
            assert time.monotonic() - start < 3
            assert "error" not in rig.node.output()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 2)
        rig.start_node("--web-port", str(port))
        with WebRaw(web.site, port, device=raws[0].device) as back:
            assert isinstance(back.resume(1, accepts[0], attachment, output=1), Resumed)
            assert back.echo(b"b", 1) == b"b"


def test_nothing_is_left_of_connections_that_are_over(web: Web) -> None:
    def files() -> int:
        return len(os.listdir(f"/proc/{web.site.pid}/fd"))

    def some() -> None:
        for _ in range(200):
            with web.client() as raw:
                assert isinstance(raw.ask(), Accept)

    before = files()
    some()
    memory = web.site.memory()
    some()
    wait_for(lambda: files() <= before, 5, name="the files to be closed")
    grown = web.site.memory() - memory
    print(f"the second 200 connections left {grown / 1024:.0f} KiB")
    # A session of each stays, as nobody closed it.
    assert grown < 200 * 24 * 1024
