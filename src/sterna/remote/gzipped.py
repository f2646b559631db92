"""A gzip stream read the way compress/gzip reads one, with its words for what is wrong."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

from sterna.errors import SternaError

UNEXPECTED_END: Final = "unexpected EOF"
END: Final = "EOF"
_HEADER: Final = "gzip: invalid header"
_CHECKSUM: Final = "gzip: invalid checksum"

_EXTRA, _NAME, _COMMENT, _HEADER_CRC = 4, 8, 16, 2
_NAME_MAX_BYTES = 512
_READ_BYTES = 64 * 1024
_PIECE_BYTES = 256 * 1024  # of unpacked data made at once: a bomb is unpacked piece by piece


class GzipError(SternaError):
    """The stream is broken or ends early; the text is that of compress/gzip."""


class GzipReader:
    """Unpacked bytes of all members of a stream.

    Parameters: `read(size)`, gives at most `size` raw bytes, none at the end. The first header is read at once.

    Raises `GzipError`: `EOF` for an empty stream.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._source = read
        self._raw = b""
        self._ready = bytearray()
        self._taken = 0  # of _ready
        self._problem = ""  # what the next read beyond _ready runs into
        self._offset = 0  # of _raw's end in the stream
        self._header()

    def read_full(self, size: int) -> bytes:
        """Returns exactly `size` bytes. Raises `GzipError`: `EOF` when there are none, `unexpected EOF` for too few."""
        while len(self._ready) - self._taken < size and not self._problem:
            self._unpack()
        start, end = self._taken, min(self._taken + size, len(self._ready))
        if end - start < size:
            self._taken = end
            raise GzipError(UNEXPECTED_END if self._problem == END and end > start else self._problem)
        data = bytes(memoryview(self._ready)[start:end])
        self._taken = end
        if end > _PIECE_BYTES:
            del self._ready[:end]
            self._taken = 0
        return data

    def _fill(self) -> bool:
        more = self._source(_READ_BYTES)
        self._raw += more
        self._offset += len(more)
        return bool(more)

    def _take(self, size: int) -> bytes:
        while len(self._raw) < size:
            if not self._fill():
                raise GzipError(UNEXPECTED_END if self._raw else END)
        data, self._raw = self._raw[:size], self._raw[size:]
        return data

    def _need(self, size: int) -> bytes:
        """As `_take` within a member, where no end is expected."""
        try:
            return self._take(size)
        except GzipError as error:
            raise GzipError(UNEXPECTED_END) from error

    def _header(self) -> None:
        """Reads a member's header. Raises `GzipError`: `EOF` when there is no further member."""
        head = self._take(10)
        if head[:3] != b"\x1f\x8b\x08":
            raise GzipError(_HEADER)
        flags = head[3]
        if flags & _EXTRA:
            length = self._need(2)
            head += length + self._need(int.from_bytes(length, "little"))
        for flag in (_NAME, _COMMENT):
            if flags & flag:
                head += self._zero_ended()
        if flags & _HEADER_CRC and int.from_bytes(self._need(2), "little") != zlib.crc32(head) & 0xFFFF:
            raise GzipError(_HEADER)
        self._inflater = zlib.decompressobj(-15)
        self._crc = self._size = 0

    def _zero_ended(self) -> bytes:
        text = b""
        while not text.endswith(b"\0"):
            if len(text) >= _NAME_MAX_BYTES:
                raise GzipError(_HEADER)
            text += self._need(1)
        return text

    def _unpack(self) -> None:
        """Adds to `_ready` or sets `_problem`."""
        if not self._raw and not self._fill():
            # Data may still be inside the inflater; it gives everything that it has with every call.
            self._problem = UNEXPECTED_END
            return
        before = self._inflater.copy()
        try:
            data = self._inflater.decompress(self._raw, _PIECE_BYTES)
        except zlib.error:
            data = self._salvaged(before)
        else:
            self._raw = self._inflater.unconsumed_tail or self._inflater.unused_data
        self._ready += data
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        if self._inflater.eof and not self._problem:
            try:
                self._next_member()
            except GzipError as error:
                self._problem = str(error)

    def _salvaged(self, inflater: zlib._Decompress) -> bytes:
        """Returns what comes before broken data, found byte by byte."""
        data, raw = b"", self._raw
        start = self._offset - len(raw)
        for position in range(len(raw)):
            try:
                data += inflater.decompress(raw[position : position + 1])
            except zlib.error:
                self._problem = f"flate: corrupt input before offset {start + position + 1}"
                break
        return data

    def _next_member(self) -> None:
        trailer = self._need(8)
        if trailer != self._crc.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little"):
            raise GzipError(_CHECKSUM)
        self._header()
