"""Recordings of sessions: asciicast v3, one line of JSON for each event, times relative to the line before.

Source: docs.asciinema.org/manual/asciicast/v3.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeGuard

import msgspec

from sterna.errors import StorageError, UsageError
from sterna.limits import SIZE_MAX_CELLS
from sterna.units import MILLISECOND

VERSION = 3
LINE_MAX_BYTES = 1024 * 1024
EVENT_MAX_CHARS = 64 * 1024
HEADER_MAX_BYTES = 64 * 1024
INTERVAL_MAX_SECONDS = 366 * 86_400.0
OUTPUT, INPUT, RESIZE, MARKER, EXIT = "o", "i", "r", "m", "x"
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})\Z")

# Six bytes of JSON ("\u0000") for each character at the worst, and the rest of the line.
assert EVENT_MAX_CHARS * 6 + 100 < LINE_MAX_BYTES


class CastWriter:
    """Writes a recording; every event is one write of a whole line, so that a killed recorder leaves a good file.

    Times are monotonic nanoseconds; the first event's is measured from `now`. Raises StorageError when the disk fails.
    """

    def __init__(
        self, fd: int, path: str, cols: int, rows: int, *, now: int, wall_s: int, title: str, term: str
    ) -> None:
        self._fd = fd
        self._path = path
        self._start = now
        self._written_ms = 0
        self._size = (cols, rows)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown = {"cols": cols, "rows": rows} | ({"type": term} if term else {})
        self._write({"version": VERSION, "term": shown, "timestamp": wall_s, "title": title})

    def output(self, data: bytes, now: int) -> None:
        """Notes output; a character that is cut in two waits for its rest, a broken one becomes U+FFFD."""
        text = self._decoder.decode(data)
        for start in range(0, len(text), EVENT_MAX_CHARS):
            self._event(OUTPUT, text[start : start + EVENT_MAX_CHARS], now)

    def resize(self, cols: int, rows: int, now: int) -> None:
        """Notes the terminal's size in cells, if it has changed."""
        if (cols, rows) != self._size and cols > 0 and rows > 0:
            self._size = (cols, rows)
            self._event(RESIZE, f"{cols}x{rows}", now)

    def marker(self, label: str, now: int) -> None:
        """Notes a place by a label."""
        self._event(MARKER, label, now)

    def exit(self, status: int, now: int) -> None:
        """Notes that the program ended, by its exit status; nothing may follow."""
        self.flush(now)
        self._event(EXIT, str(status), now)

    def flush(self, now: int) -> None:
        """Notes what is left of a character that was cut in two and will have no rest."""
        rest = self._decoder.decode(b"", True)
        if rest:
            self._event(OUTPUT, rest, now)

    def _event(self, code: str, data: str, now: int) -> None:
        # Rounded from the beginning, not from event to event: else a long recording would drift.
        elapsed = max((now - self._start) // MILLISECOND, self._written_ms)
        interval, self._written_ms = elapsed - self._written_ms, elapsed
        self._write([interval / 1000, code, data])

    def _write(self, value: object) -> None:
        data = msgspec.json.encode(value) + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise StorageError(f"The recording {self._path} cannot be written: {error.strerror}.") from error


class Header(msgspec.Struct):
    """What a recording says about itself; `idle` bounds pauses in seconds (None: as they were)."""

    cols: int
    rows: int
    title: str = ""
    idle: float | None = None


class CastReader:
    """Reads a recording; raises UsageError with file and line when it is none."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path
        self._number = 0
        self.header = self._header()

    def _line(self, most: int) -> bytes | None:
        """Returns the next line that is no comment; None at the end."""
        while True:
            line = self._file.readline(most + 1)
            self._number += 1
            if not line:
                return None
            if len(line) > most:
                raise self._wrong(f"is longer than {most} bytes")
            if not line.startswith(b"#") and line.strip():
                return line

    def _wrong(self, why: str) -> UsageError:
        return UsageError(f"{self._path} is no asciicast v3 recording: line {self._number} {why}.")

    def _decode(self, line: bytes) -> Any:
        try:
            return msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self._wrong("is no JSON") from None

    def _header(self) -> Header:
        line = self._line(HEADER_MAX_BYTES)
        found = self._decode(line) if line is not None else None
        if not isinstance(found, dict):
            raise self._wrong("is no header")
        if found.get("version") != VERSION:
            raise self._wrong(f"has the version {str(found.get('version'))[:20]}, and only {VERSION} is played")
        term = found.get("term")
        cols, rows = (term.get("cols"), term.get("rows")) if isinstance(term, dict) else (None, None)
        if not _is_size(cols) or not _is_size(rows):
            raise self._wrong(f"has no size of a terminal from 1 to {SIZE_MAX_CELLS} columns and rows")
        title, idle = found.get("title"), found.get("idle_time_limit")
        if idle is not None and not (_is_number(idle) and 0 < idle <= INTERVAL_MAX_SECONDS):
            raise self._wrong("has an impossible idle_time_limit")
        return Header(cols, rows, title if isinstance(title, str) else "", idle)

    def events(self) -> Iterator[tuple[float, str, str]]:
        """Yields (seconds since the event before, code, data); codes that nobody knows are left in."""
        while (line := self._line(LINE_MAX_BYTES)) is not None:
            found = self._decode(line)
            if not isinstance(found, list) or len(found) != 3:
                raise self._wrong("is no event: expected [interval, code, data]")
            interval, code, data = found
            if not _is_number(interval) or not 0 <= interval <= INTERVAL_MAX_SECONDS:
                raise self._wrong("has an impossible interval")
            if not isinstance(code, str) or not isinstance(data, str):
                raise self._wrong("is no event: expected texts for code and data")
            if code == RESIZE and not parse_size(data):
                raise self._wrong("has an impossible size: expected COLSxROWS")
            yield float(interval), code, data


def parse_size(text: str) -> tuple[int, int] | None:
    """Returns columns and rows of a resize event's `80x24`, or None."""
    found = _SIZE.match(text)
    cols, rows = (int(found[1]), int(found[2])) if found else (0, 0)
    return (cols, rows) if _is_size(cols) and _is_size(rows) else None


def _is_size(value: object) -> TypeGuard[int]:
    # A bool is an int to Python only.
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= SIZE_MAX_CELLS


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
