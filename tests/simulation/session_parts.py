"""What the world of sessions is built from: bytes with a known place, a bounded log, wires that hold and lose bytes."""

from __future__ import annotations

from collections import deque

from sterna.errors import Code
from sterna.ids import SessionUid
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.podside import PodMachine
from sterna.protocol.session import Session
from sterna.protocol.stream import Intake, SendStream

MS = 1_000_000
SECOND = 1_000_000_000
UID = SessionUid(b"U" * 16)
NODE = b"N" * 32
HANDLE = 7
STREAM_KINDS = (int(Type.DATA), int(Type.SIGNAL), int(Type.EOF))
# Codes after which a client simply resumes; any other one is a fault of the node in a world of honest peers.
RESUMABLE = (Code.RESYNC, Code.DISPLACED)

_PERIOD = 65_521
_PATTERN = bytes((i * i * 7 + i * 13 + (i >> 7)) & 0xFF for i in range(_PERIOD)) * 2


def true_bytes(salt: int, position: int, size: int) -> bytes:
    """What stands at a position of a stream: every stream has a salt of its own."""
    out = bytearray()
    while size > 0:
        at = (position + salt * 9973) % _PERIOD
        piece = _PATTERN[at : at + min(size, _PERIOD)]
        out += piece
        position += len(piece)
        size -= len(piece)
    return bytes(out)


class ViolationError(AssertionError):
    """Something that must always hold does not."""


def check(condition: object, text: str) -> None:
    if not condition:
        raise ViolationError(text)


class RingLog:
    """A durable log with an exact bound."""

    def __init__(self, start: int, ring_bytes: int) -> None:
        self.tail = self.end = start
        self.ring_bytes = ring_bytes
        self._data = bytearray()

    def append(self, data: bytes | memoryview) -> None:
        self._data += data
        self.end += len(data)
        surplus = len(self._data) - self.ring_bytes
        if surplus > 0:
            del self._data[:surplus]
            self.tail += surplus

    def read(self, position: int, limit: int) -> bytes:
        check(
            self.tail <= position < self.end and limit > 0, f"the log was read at {position} ({self.tail}-{self.end})"
        )
        return bytes(self._data[position - self.tail : position - self.tail + limit])

    def keep_from(self, position: int | None) -> None:
        check(position is None or position <= self.end, f"{position} is kept, but the log ends at {self.end}")


class Wire:
    """One direction of a connection: what was sent and has not arrived."""

    def __init__(self) -> None:
        self.pieces: deque[bytes] = deque()
        self.size = 0

    def put(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            if piece:
                self.pieces.append(piece)
                self.size += len(piece)

    def get(self, size: int) -> bytes:
        out = bytearray()
        while self.pieces and len(out) < size:
            piece = self.pieces.popleft()
            take = size - len(out)
            out += piece[:take]
            if len(piece) > take:
                self.pieces.appendleft(piece[take:])
        self.size -= len(out)
        return bytes(out)


class Connection:
    """Two links and the wires between them; `near` dials, `far` listens."""

    def __init__(self, capacity: int) -> None:
        self.near, self.far = Link(), Link()
        self.up, self.down = Wire(), Wire()  # up: near to far
        self.capacity = capacity

    def collect(self) -> None:
        for link, wire in ((self.near, self.up), (self.far, self.down)):
            wire.put(link.data_to_send())
            link.blocked = wire.size >= self.capacity


class Config:
    """Sizes in bytes, first positions, and the classes under test (controls put broken ones here)."""

    def __init__(
        self,
        *,
        start: int = 0,
        input_start: int = 0,
        window: int = 4096,
        pod_window: int = 8192,
        ring: int = 32_768,
        capacity: int = 8192,
        session: type[Session] = Session,
        pod: type[PodMachine] = PodMachine,
        client_intake: type[Intake] = Intake,
        client_stream: type[SendStream] = SendStream,
        snapshots: bool = True,
    ) -> None:
        self.start, self.input_start = start, input_start
        self.window, self.pod_window, self.ring, self.capacity = window, pod_window, ring, capacity
        self.session, self.pod = session, pod
        self.client_intake, self.client_stream = client_intake, client_stream
        self.snapshots = snapshots
