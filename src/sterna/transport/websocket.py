"""A client's link over a WebSocket: the server's side of RFC 6455 on top of the pump that drives every TLS socket.

A message holds whole frames of the protocol; what one event causes goes out as one message. There is no coroutine and
no task of a connection, and nothing is kept of the HTTP request that it began with.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable

from sterna import limits
from sterna.errors import Code
from sterna.protocol.link import Link
from sterna.transport.pump import Conduit, Owner, Pump, Reactor

SUBPROTOCOL = "clawterm.v1"
# Four frames of the largest kind, which is what a whole window takes: more is never there to be sent at once, and
# less would split it. Held twice while the last piece of a message comes.
MESSAGE_MAX_BYTES = 4 * (limits.HEADER_BYTES + limits.PAYLOAD_MAX_BYTES)
# As much as of any connection before its first proof: one frame.
STRANGER_MAX_BYTES = limits.HEADER_BYTES + limits.PAYLOAD_MAX_BYTES
CONTROL_MAX_BYTES = 125
# Of one read: a proxy's PING now and then. 40,000 in one read, which is what fits, would hold the loop for 40 ms.
EMPTIES_MAX = 256

assert MESSAGE_MAX_BYTES >= limits.WINDOW_BYTES

# RFC 6455, section 5.2 (opcodes) and 7.4.1 (codes of CLOSE).
_CONTINUATION, _TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_OPCODES = frozenset((_CONTINUATION, _TEXT, BINARY, CLOSE, PING, PONG))
NORMAL, WRONG, NO_TEXT, TOO_OFTEN, TOO_BIG = 1000, 1002, 1003, 1008, 1009
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY_BYTES = 16
_SMALL = 128
_LEAST_BYTES = 6 + limits.HEADER_BYTES

_lanes: list[bytes] = []


def accept_key(key: str) -> str | None:
    """Returns the Sec-WebSocket-Accept for a client's Sec-WebSocket-Key, None if that is none (section 4.2.2)."""
    try:
        if len(base64.b64decode(key, validate=True)) != _KEY_BYTES:
            return None
    except (binascii.Error, ValueError):
        return None
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _GUID, usedforsecurity=False).digest()).decode()


def unmask(data: bytes | memoryview, mask: bytes) -> bytes:
    """Returns the bytes under a client's mask of 4 bytes (section 5.3), or masks them.

    Long ones by tables, one for each byte of the mask: 0.7 GB/s, where a number's xor does 0.3.
    """
    size = len(data)
    if size <= _SMALL:
        key = (mask * (size // 4 + 1))[:size]
        return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")
    if not _lanes:
        _lanes.extend(bytes(byte ^ key for byte in range(256)) for key in range(256))
    source, clear = bytes(data), bytearray(size)
    for lane in range(4):
        clear[lane::4] = source[lane::4].translate(_lanes[mask[lane]])
    return bytes(clear)


def head(opcode: int, size: int) -> bytes:
    """Returns the header of an unmasked, whole message (section 5.2)."""
    first = 0x80 | opcode
    if size < 126:
        return bytes((first, size))
    if size < 1 << 16:
        return bytes((first, 126)) + size.to_bytes(2, "big")
    return bytes((first, 127)) + size.to_bytes(8, "big")


class Reader:
    """Turns a client's bytes into messages; after the first fault it takes nothing more.

    It holds at most one message of `most` bytes. `fault` is the code to close with, `reason` says what was wrong.
    """

    __slots__ = ("_open", "_partial", "_rest", "_wanted", "fault", "most", "reason")

    def __init__(self, most: int = MESSAGE_MAX_BYTES) -> None:
        self.most = most
        self._rest = bytearray()
        self._wanted = 0
        self._partial = bytearray()
        self._open = False
        self.fault = 0
        self.reason = ""

    def feed(self, data: bytes | memoryview) -> list[tuple[int, bytes]]:
        """Returns what these bytes complete: pairs of opcode (BINARY, CLOSE, PING, PONG) and content."""
        found: list[tuple[int, bytes]] = []
        if self.fault:
            return found
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return found
            data, self._rest = bytes(self._rest), bytearray()
        self._wanted = 2
        view = memoryview(data)
        at, size, empties = 0, len(view), 0
        while size - at >= 2 and not self.fault:
            end = self._frame(view, at, size, found)
            if end == at:
                break
            if end - at < _LEAST_BYTES:
                empties += 1
                if empties > EMPTIES_MAX:
                    self._fail(0, TOO_OFTEN, "too many messages with nothing in them")
            at = end
        if at < size and not self.fault:
            self._rest = bytearray(view[at:])
        return found

    def _frame(self, view: memoryview, at: int, size: int, found: list[tuple[int, bytes]]) -> int:
        """Takes one frame; returns where it ends, or `at` when it is not whole yet."""
        first, second = view[at], view[at + 1]
        opcode, length, start = first & 15, second & 127, at + 6
        if length >= 126:
            more = 2 if length == 126 else 8
            if size - at < 2 + more:
                self._wanted = 2 + more
                return at
            least = length if more == 2 else 1 << 16
            length, start = int.from_bytes(view[at + 2 : at + 2 + more], "big"), start + more
            if length < least:
                return self._fail(at, WRONG, "a length is longer than it need be")
        if not self._check(opcode, first, second, length):
            return at
        end = start + length
        if end > size:
            self._wanted = end - at
            return at
        payload = unmask(view[start:end], bytes(view[start - 4 : start]))
        whole = bool(first & 0x80)
        if opcode >= CLOSE:
            found.append((opcode, payload))
        elif whole and not self._open:
            found.append((BINARY, payload))
        else:
            self._partial += payload
            self._open = not whole
            if whole:
                found.append((BINARY, bytes(self._partial)))
                self._partial = bytearray()
        return end

    def _check(self, opcode: int, first: int, second: int, length: int) -> bool:
        """Judges a frame's header, before its content has come."""
        if first & 0x70 or opcode not in _OPCODES:
            self._fail(0, WRONG, "reserved bits or an unknown opcode")
        elif not second & 0x80:
            self._fail(0, WRONG, "a client's frame without a mask")
        elif opcode >= CLOSE:
            if length > CONTROL_MAX_BYTES or not first & 0x80:
                self._fail(0, WRONG, "a control frame that is too long or in pieces")
        elif opcode == _TEXT:
            self._fail(0, NO_TEXT, "binary messages only")
        elif (opcode == _CONTINUATION) is not self._open:
            self._fail(0, WRONG, "pieces out of order")
        elif length + len(self._partial) > self.most:
            self._fail(0, TOO_BIG, f"a message has at most {self.most} bytes here")
        return not self.fault

    def _fail(self, at: int, code: int, reason: str) -> int:
        self.fault, self.reason, self._partial = code, reason, bytearray()
        return at


class Wire(Link):
    """What the pump sends: bytes of HTTP at first, then the messages of the link that is `carried`."""

    __slots__ = ("carried", "close_code", "close_reason", "pong")

    def __init__(self) -> None:
        super().__init__()
        self.carried: Link | None = None
        self.pong: bytes | None = None
        self.close_code = NORMAL
        self.close_reason = ""

    def push(self, data: bytes) -> None:
        """Queues bytes as they are."""
        if not self.closing and data:
            self._out.append(data)
            self.out_bytes += len(data)
            self.wake()

    def data_to_send(self) -> list[bytes]:
        """Returns what is queued: one message for all frames of the link, or several if they are too much for one."""
        out = super().data_to_send()
        link = self.carried
        if link is None or self.closing:
            return out
        if self.pong is not None:
            out += (head(PONG, len(self.pong)), self.pong)
            self.pong = None
        size = link.out_bytes
        parts = link.data_to_send()
        if 0 < size <= MESSAGE_MAX_BYTES:
            out.append(head(BINARY, size))
            out += parts
        elif size:
            _split(parts, out)
        if link.closing:
            self.closing = True
            content = self.close_code.to_bytes(2, "big") + self.close_reason.encode()[: CONTROL_MAX_BYTES - 2]
            out += (head(CLOSE, len(content)), content)
        return out


def _split(parts: Iterable[bytes], out: list[bytes]) -> None:
    """Puts frames into messages; a long frame is two parts, header and payload (`Link.send`)."""
    group: list[bytes] = []
    size = 0
    rest = iter(parts)
    for part in rest:
        frame = [part]
        if len(part) == limits.HEADER_BYTES and any(part[11:13]):
            frame.append(next(rest))
        more = sum(map(len, frame))
        if size + more > MESSAGE_MAX_BYTES:
            out.append(head(BINARY, size))
            out += group
            group, size = [], 0
        group += frame
        size += more
    out.append(head(BINARY, size))
    out += group


def _ignore() -> None:
    """Stands for the hook of a link whose connection is over."""


class WebSocket:
    """A conduit over a connection whose HTTP request was answered with 101; `peer` is the other side's address.

    It takes the connection's pump over from who answered, and `wire`, which the pump sends.
    """

    __slots__ = ("_marked", "_owner", "_pump", "_reactor", "_reader", "_wire", "data", "link", "peer")

    def __init__(self, reactor: Reactor, pump: Pump, wire: Wire, link: Link, owner: Owner) -> None:
        self._reactor = reactor
        self._pump = pump
        self._wire = wire
        self._owner: Owner | None = owner
        self._reader = Reader(STRANGER_MAX_BYTES)
        self._marked = False
        self.link = link
        self.peer = pump.peer
        self.data: object = None
        link.wake = self._wake
        wire.carried = link
        pump.owner = self

    @property
    def handshaking(self) -> bool:
        """Whether nothing can be said to the other side yet: never."""
        return False

    @property
    def queued(self) -> int:
        """How many bytes wait for the other side to take them."""
        pending = self._pump.queued - self._wire.out_bytes
        return pending + self.link.out_bytes

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._pump.closed

    def start(self) -> None:
        """Begins to read: the pump does so already."""

    def _wake(self) -> None:
        if not self._marked:
            self._marked = True
            self._reactor.mark(self)

    def flush(self) -> None:
        """Sends what the link has; what the other side does not take blocks the link until it does."""
        self._marked = False
        if self._pump.closed:
            return
        # By this the pump judges whether too much waits.
        self._wire.out_bytes = self.link.out_bytes
        self._pump.flush()
        if not self._pump.closed:
            self.link.blocked = self._wire.blocked

    def hold(self, on: bool) -> None:
        """Stops reading, or goes on."""
        self._pump.hold(on)

    def abort(self, reason: str) -> None:
        """Ends the connection at once."""
        self._pump.abort(reason)

    # ---- the pump's owner --------------------------------------------------------------------------------------

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Takes the client's bytes."""
        link, reader = self.link, self._reader
        for opcode, content in reader.feed(data):
            if link.closing or self._owner is None:
                break
            if opcode == BINARY:
                self._owner.received(self, memoryview(content))
                if reader.most < MESSAGE_MAX_BYTES and getattr(self._owner, "proved", True):
                    reader.most = MESSAGE_MAX_BYTES
                if link.waiting and not link.more and not link.closing:
                    link.fail(Code.TRUNCATED, "A message ended inside a frame: it has to hold whole ones.")
            elif opcode == PING:
                self._wire.pong = content  # the last one answers for all (section 5.5.3)
                self._wake()
            elif opcode == CLOSE:
                link.closing = True
        if reader.fault and not link.closing:
            self._wire.close_code, self._wire.close_reason = reader.fault, reader.reason
            link.closing = True
        if link.closing:
            self.flush()

    def drained(self, pump: Conduit) -> None:
        """Lets bulk data go on."""
        self.link.blocked = False
        if self._owner is not None:
            self._owner.drained(self)

    def ended(self, pump: Conduit, reason: str) -> None:
        """Passes on that the connection is over; nothing of it points at anything then."""
        owner, self._owner = self._owner, None
        self.link.closing = True
        if owner is not None:
            owner.ended(self, reason)
        self.link.wake = _ignore
        self._wire.carried = None
