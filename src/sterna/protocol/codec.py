"""The incremental frame decoder: bounded, and the same for any split of the bytes (docs/protocol.md, section 1)."""

from __future__ import annotations

from typing import TypeAlias

from sterna import limits
from sterna.errors import Code
from sterna.protocol.crc import crc16
from sterna.protocol.frame import HEADER, MAGIC, OPTIONAL_FROM, PAYLOAD_LIMITS_BYTES

Frame: TypeAlias = tuple[int, int, int, bytes]
"""(type, handle, seq, payload); the seq is the header's low 32 bits."""

ALL_FRAMES = 1 << 62
_LENGTH = limits.HEADER_BYTES
_unpack = HEADER.unpack_from


class Decoder:
    """Turns bytes into frames; after the first fault it takes nothing more.

    It holds at most one partial frame (65,550 bytes), and what its owner has not asked for. `fault` and `reason` say
    what was wrong with the peer's bytes, `more` that the last call left what may be whole frames.
    """

    __slots__ = ("_rest", "fault", "more", "reason")

    def __init__(self) -> None:
        self._rest = b""
        self.more = False
        self.fault: Code | None = None
        self.reason = ""

    def keep(self, data: bytes | memoryview) -> None:
        """Takes bytes to look at them later."""
        if self.fault is None:
            self._rest += bytes(data)

    def feed(self, data: bytes | memoryview, most: int = ALL_FRAMES) -> list[Frame]:
        """Returns the frames that these bytes complete, of `most` that are looked at; a fault ends the list."""
        frames: list[Frame] = []
        self.more = False
        if self.fault is not None:
            return frames
        if self._rest:
            data = self._rest + bytes(data)
        view = memoryview(data)
        size, at = len(view), 0
        while size - at >= _LENGTH:
            magic, kind, handle, seq, length, crc = _unpack(view, at)
            if magic != MAGIC:
                self._fail(Code.BAD_MAGIC, "a frame does not begin with CL")
                break
            limit = PAYLOAD_LIMITS_BYTES.get(kind)
            if limit is None:
                if kind < OPTIONAL_FROM:
                    self._fail(Code.UNKNOWN_TYPE, f"frame type 0x{kind:02x} is unknown")
                    break
            elif length > limit:
                self._fail(Code.TOO_LARGE, f"{length} bytes are too many for frame type 0x{kind:02x}")
                break
            end = at + _LENGTH + length
            if end > size:
                break
            payload = bytes(view[at + _LENGTH : end])
            if crc16(payload, crc16(view[at : at + 13])) != crc:
                self._fail(Code.BAD_CRC, f"the checksum of a frame of type 0x{kind:02x} is wrong")
                break
            at = end
            if limit is not None:
                frames.append((kind, handle, seq, payload))
            most -= 1
            if not most:
                self.more = size > at
                break
        self._rest = bytes(view[at:]) if at < size and self.fault is None else b""
        return frames

    def eof(self) -> None:
        """Notes the end of the bytes; a fault if it comes inside a frame."""
        if self._rest and self.fault is None:
            self._fail(Code.TRUNCATED, "the connection ended inside a frame")

    @property
    def waiting(self) -> int:
        """The number of bytes held of a frame that is not whole yet."""
        return len(self._rest)

    def _fail(self, code: Code, reason: str) -> None:
        self.fault, self.reason, self._rest = code, reason, b""
