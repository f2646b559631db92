"""The entries of a tar stream, read the way archive/tar reads them: USTAR, PAX and GNU headers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from sterna.errors import SternaError
from sterna.remote.gotext import text_of
from sterna.remote.gzipped import END, UNEXPECTED_END, GzipError

REGULAR: Final = "0"
DIRECTORY: Final = "5"

_BLOCK = 512
_SIZE_MAX_DIGITS = 18
_ZERO: Final = b"\0" * _BLOCK
_SPECIAL_MAX_BYTES = 1024 * 1024  # of a PAX header or a long name
_EXTRA_HEADERS_MAX = 16  # before one entry; writers put two there at the most
_HEADER_ONLY: Final = frozenset("123456")  # links, devices, directories and pipes have no data
_PAX_RECORD: Final = re.compile(rb"([0-9]{1,9}) ")
_SPARSE: Final = b"GNU.sparse."


class TarError(SternaError):
    """The stream is no tar; the text is that of archive/tar."""

    def __init__(self, text: str = "archive/tar: invalid tar header") -> None:
        super().__init__(text)


class Entry:
    """One entry; `kind` is the type flag, NUL already turned into what it means."""

    __slots__ = ("kind", "name", "size")

    def __init__(self, name: str, kind: str, size: int) -> None:
        self.name, self.kind, self.size = name, kind, size


class TarReader:
    """Entries one after another; the data of one is to be read, if at all, before the next is asked for.

    Parameters: `read(size)`, gives exactly so many bytes or raises `GzipError`.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._left = self._pad = 0

    def next(self) -> Entry | None:
        """Returns the next entry, None at the end. Raises `TarError` and `GzipError`."""
        records: dict[bytes, bytes] = {}
        long_name = b""
        for _ in range(_EXTRA_HEADERS_MAX + 1):
            self._skip()
            block = self._block()
            if block is None:
                return None
            entry = _entry(block)
            self._begin(entry)
            if entry.kind in "xg":
                records = _pax_records(self._special(entry))
                if entry.kind == "g":
                    return entry
            elif entry.kind in "LK":
                text = self._special(entry).split(b"\0", 1)[0]
                if entry.kind == "L":
                    long_name = text
            else:
                self._merge(entry, records, long_name)
                return entry
        raise TarError

    def _merge(self, entry: Entry, records: dict[bytes, bytes], long_name: bytes) -> None:
        if records.get(b"path"):
            entry.name = text_of(records[b"path"])
        if records.get(b"size"):
            if not records[b"size"].isdigit() or len(records[b"size"]) > _SIZE_MAX_DIGITS:
                raise TarError
            entry.size = int(records[b"size"])
        if long_name:
            entry.name = text_of(long_name)
        if entry.kind == "\0":
            entry.kind = DIRECTORY if entry.name.endswith("/") else REGULAR
        if any(name.startswith(_SPARSE) for name in records):
            entry.kind = "S"  # unpacked as it stands it would be wrong
        self._begin(entry)

    def data(self) -> Iterator[bytes]:
        """Returns the data of the entry read last, in pieces."""
        while self._left:
            piece = self._inside(min(self._left, 64 * 1024))
            self._left -= len(piece)
            yield piece

    def _begin(self, entry: Entry) -> None:
        if entry.size < 0:
            raise TarError
        self._left = 0 if entry.kind in _HEADER_ONLY else entry.size
        self._pad = -self._left % _BLOCK

    def _special(self, entry: Entry) -> bytes:
        if entry.size > _SPECIAL_MAX_BYTES:
            raise TarError("archive/tar: header field too long")
        return b"".join(self.data())

    def _inside(self, size: int) -> bytes:
        try:
            return self._read(size)
        except GzipError as error:
            if str(error) == END:
                raise GzipError(UNEXPECTED_END) from error
            raise

    def _skip(self) -> None:
        for _ in self.data():
            pass
        try:
            self._read(self._pad)  # padding may be missing at the very end
        except GzipError as error:
            if str(error) not in {END, UNEXPECTED_END}:
                raise
        self._pad = 0

    def _block(self) -> bytes | None:
        """Returns a header block, None at the end: no more data, or two blocks of zeros."""
        try:
            block = self._read(_BLOCK)
            if block == _ZERO:
                if self._read(_BLOCK) == _ZERO:
                    return None
                raise TarError
        except GzipError as error:
            if str(error) == END:
                return None
            raise
        return block


def _entry(block: bytes) -> Entry:
    stored = _number(block[148:156])
    plain = block[:148] + b" " * 8 + block[156:]
    if stored not in {sum(plain), sum(byte - 256 if byte > 127 else byte for byte in plain)}:
        raise TarError
    name = _text(block[0:100])
    if block[257:263] == b"ustar\0" and block[263:265] == b"00":
        # old star archives keep times where the end of the prefix would be
        prefix = _text(block[345:476] if block[508:512] == b"tar\0" else block[345:500])
        if prefix:
            name = prefix + b"/" + name
    for start, end in ((100, 108), (108, 116), (116, 124), (136, 148)):
        _number(block[start:end])
    return Entry(text_of(name), chr(block[156]), _number(block[124:136]))


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _number(field: bytes) -> int:
    """Returns an octal or, with the first bit set, a binary number. Raises `TarError`."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
        if not -(1 << 63) <= value < 1 << 63:
            raise TarError
        return value
    digits = field.strip(b" \0").split(b"\0", 1)[0]
    if not digits:
        return 0
    if any(byte not in b"01234567" for byte in digits):
        raise TarError
    return int(digits, 8)


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Returns the records that count here. Raises `TarError`."""
    records = {}
    start = 0
    while start < len(data):
        match = _PAX_RECORD.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or end <= match.end() or end > len(data) or data[end - 1] != 0x0A:
            raise TarError
        key, equals, value = data[match.end() : end - 1].partition(b"=")
        if not equals or not key or b"\0" in key:
            raise TarError
        if key in {b"path", b"size"} or key.startswith(_SPARSE):
            records[key] = value
        start = end
    return records
