"""The 15-byte header and the frame types (docs/protocol.md, section 1)."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from sterna import limits
from sterna.protocol.crc import crc16

MAGIC = 0x434C
_HEAD = Struct(">HBIIH")
HEADER = Struct(">HBIIHH")
assert HEADER.size == limits.HEADER_BYTES

LOW = 0xFFFF_FFFF
_HALF = 1 << 31
_pack_head = _HEAD.pack


class Type(IntEnum):
    """Frame types; those from 0x80 up may be ignored by who does not know them."""

    CONNECT = 0x01
    ACCEPT = 0x02
    DATA = 0x03
    SUSPEND = 0x04
    RESUME = 0x05
    RESUMED = 0x06
    ACK = 0x07
    PING = 0x08
    PONG = 0x09
    CLOSE = 0x0A
    ERROR = 0x0B
    RESIZE = 0x0C
    SIGNAL = 0x0D
    EOF = 0x0E
    SNAPSHOT = 0x0F
    CALL = 0x10
    RESULT = 0x11
    HELLO = 0x40
    OPEN = 0x41
    OPENED = 0x42
    LANE = 0x43
    FREEZE = 0x44
    THAW = 0x45
    SOUL = 0x46
    READY = 0x47
    EXIT = 0x48
    CAPTURE = 0x49
    AUDIENCE = 0x4A
    ROAM = 0x50
    EVENT = 0x80


OPTIONAL_FROM = 0x80

PAYLOAD_LIMITS_BYTES = {
    **dict.fromkeys(Type, limits.CONTROL_MAX_BYTES),
    Type.DATA: limits.PAYLOAD_MAX_BYTES,
    Type.SNAPSHOT: limits.PAYLOAD_MAX_BYTES,
    Type.RESULT: limits.PAYLOAD_MAX_BYTES,
    Type.SOUL: limits.PAYLOAD_MAX_BYTES,
    Type.OPENED: limits.PAYLOAD_MAX_BYTES,
    Type.PING: limits.PING_MAX_BYTES,
    Type.PONG: limits.PING_MAX_BYTES,
    Type.ACK: 8,
    Type.EOF: 0,
}
"""The most payload bytes that each type may carry; what is not named here is ignored unread."""


def header(kind: int, handle: int, seq: int, payload: bytes | memoryview) -> bytes:
    """Returns the 15 header bytes of a frame.

    `handle` is the session's u32 on this connection, `seq` is cut to its low 32 bits, `payload` has at most 65,535
    bytes.
    """
    head = _pack_head(MAGIC, kind, handle, seq & LOW, len(payload))
    return head + crc16(payload, crc16(head)).to_bytes(2, "big")


def encode(kind: int, handle: int, seq: int, payload: bytes = b"") -> bytes:
    """Returns a whole frame as bytes."""
    return header(kind, handle, seq, payload) + payload


def expand(low: int, near: int) -> int:
    """Returns the 64-bit position that has these low 32 bits and lies nearest to `near` (docs/protocol.md, section 1).

    The result is negative when the nearest one would lie before position 0, which no honest peer sends.
    """
    ahead = (low - near) & LOW
    return near + ahead - (1 << 32) if ahead >= _HALF else near + ahead
