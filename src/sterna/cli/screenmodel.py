"""The screen model of the status line, on the engine that pods use; imported only once the connection is gone."""

from __future__ import annotations

import re

from sterna.pod.screen_ghostty import GhosttyTerminal
from sterna.pod.snapshot import ScreenState

# The engine writes the first eight colours of the pen by number; terminals may brighten only SGR 30 to 37 when bold.
_PALETTE = re.compile(rb"\x1b\[([34])8;5;([0-7])m")


def _first_colour(found: re.Match[bytes]) -> bytes:
    return b"\x1b[" + found[1] + found[2] + b"m"


class EngineModel:
    """A `sterna.client.status.ScreenModel` of `cols` x `rows` cells.

    Raises libghostty.EngineMissingError without libghostty-vt: the fallback engine knows too little to be trusted.
    """

    __slots__ = ("_read", "_terminal")

    def __init__(self, cols: int, rows: int) -> None:
        self._terminal = GhosttyTerminal(cols, rows, 0)
        self._read: ScreenState | None = None

    def _state(self) -> ScreenState:
        if self._read is None:
            state = self._terminal.state(scrollback=False)
            self._read = state.alternate or state.main
        return self._read

    def feed(self, data: bytes) -> None:
        """Takes output of the session."""
        self._terminal.feed(data)
        self._read = None

    def cursor(self) -> tuple[int, int, bool]:
        """Returns row, column, and whether the next character wraps."""
        cursor = self._state().cursor
        return cursor.y, cursor.x, cursor.wrap_pending

    def pen_vt(self) -> bytes:
        """Returns the bytes that select the current style, beginning with a reset."""
        return _PALETTE.sub(_first_colour, self._state().cursor.pen.write())

    def row_text(self, row: int) -> str:
        """Returns the text of a row."""
        return self._state().rows[row].text()

    def row_joined(self, row: int) -> bool:
        """Returns whether a row goes on softly in the next one, or is what the one above it goes on in."""
        rows = self._state().rows
        return rows[row].wrapped or (row > 0 and rows[row - 1].wrapped)

    def row_vt(self, row: int) -> bytes:
        """Returns what paints a cleared row from its first column on."""
        painted = b"\x1b[m"
        for run in self._state().rows[row].runs:
            if run.text:
                painted += b"\x1b[0%b%bm%b" % (run.style, run.background, run.text.encode())
            elif run.background:
                painted += b"\x1b[0%bm\x1b[%dX\x1b[%dC" % (run.background, run.width, run.width)
            else:
                painted += b"\x1b[%dC" % run.width
        return painted
