"""The simpler terminal engine on pyte, in pure Python, for machines without libghostty-vt.

It knows no alternate screen, links, underline styles, character sets or soft wraps, answers only DA and DSR, and is
some hundred times slower. Its snapshots tell what it knows.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, Final

import pyte
from pyte import graphics

from sterna import limits
from sterna.pod.snapshot import MODES, Cursor, Pen, Row, Run, ScreenState, TerminalState, write_snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

_PRIVATE: Final = 5  # pyte keeps DEC private modes shifted by this
_PIECES: Final = re.compile(rb"\x1b[^\x1b]*|[^\x1b]+")


def _codes(*tables: dict[int, str]) -> dict[str, bytes]:
    return {name: b";%d" % code for table in tables for code, name in table.items() if name != "default"}


_COLORS: Final = _codes(graphics.FG, graphics.FG_AIXTERM)
_BACKGROUNDS: Final = _codes(graphics.BG, graphics.BG_AIXTERM)


class _Screen(pyte.HistoryScreen):
    """pyte's screen, with the answers and bells it gives collected."""

    def __init__(self, cols: int, rows: int, history: int) -> None:
        self.answers = bytearray()
        self.rung = 0
        super().__init__(cols, rows, history=max(history, 1), ratio=0.5)

    def write_process_input(self, data: str) -> None:
        """Collects an answer."""
        self.answers += data.encode()

    def bell(self, *_: object) -> None:
        """Counts a bell."""
        self.rung += 1


class PyteTerminal:
    """A terminal of `cols` x `rows` cells that keeps at most `scrollback_lines` lines above its screen."""

    __slots__ = ("_screen", "_stream", "cols", "rows", "scrollback_lines")

    def __init__(self, cols: int, rows: int, scrollback_lines: int = limits.SCROLLBACK_LINES) -> None:
        self.cols = cols
        self.rows = rows
        self.scrollback_lines = scrollback_lines
        self._screen = _Screen(cols, rows, scrollback_lines)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def bells(self) -> int:
        """How often the program rang."""
        return self._screen.rung

    @bells.setter
    def bells(self, value: int) -> None:
        self._screen.rung = value

    def feed(self, data: bytes) -> bytes:
        """Takes what the program has written; returns the terminal's answers to the queries in it."""
        for piece in _PIECES.findall(data):
            # pyte raises on some sequences it does not know, and is at ground again then; the rest must not be lost.
            with contextlib.suppress(Exception):
                self._stream.feed(piece)
        answers = bytes(self._screen.answers)
        self._screen.answers.clear()
        return answers

    def resize(self, cols: int, rows: int) -> None:
        """Changes the size in cells; lines are cut, not wrapped anew."""
        self._screen.resize(rows, cols)
        self.cols, self.rows = cols, rows

    def at_ground(self) -> bool:
        """Says whether the parser is between sequences and characters."""
        return bool(self._stream._taking_plain_text) and not self._stream.utf8_decoder.getstate()[0]

    def scrolls(self) -> bool:
        """Says whether lines move through the whole screen: there are no margins."""
        return self._screen.margins is None

    def pack(self) -> bytes | None:
        """Returns None: this engine cannot be packed."""
        return None

    def title(self) -> str:
        """Returns the window title that the program has set, as it set it."""
        return self._screen.title

    def cursor(self) -> tuple[int, int]:
        """Returns the cursor's column and row."""
        return min(self._screen.cursor.x, self.cols - 1), self._screen.cursor.y

    def mode(self, number: int, *, ansi: bool = False) -> bool:
        """Says whether a DEC private mode, or an ANSI mode, is set."""
        return (number if ansi else number << _PRIVATE) in self._screen.mode

    def text(self, *, scrollback: bool = False) -> str:
        """Returns the screen's lines, with those above it if asked, without trailing blanks."""
        return "\n".join(row.text().rstrip() for row in self.cells(scrollback=scrollback))

    def cells(self, *, scrollback: bool = False) -> list[Row]:
        """Returns the rows of the screen, with those above it if asked."""
        above = list(self._screen.history.top)[-self.scrollback_lines :] if scrollback and self.scrollback_lines else []
        return [self._row(line) for line in (*above, *(self._screen.buffer[y] for y in range(self.rows)))]

    def snapshot(self, *, scrollback: bool = True, final: bool = False) -> bytes:
        """Returns what repaints this terminal on any other of the same size; see `sterna.pod.snapshot`."""
        screen = self._screen
        x, y = self.cursor()
        pen = Pen(b"\x1b[0" + _sgr(screen.cursor.attrs) + b"m")
        cursor = Cursor(x, y, screen.cursor.x >= self.cols, self.mode(6), pen)
        saved = Cursor(0, 0, False, False, Pen())
        if screen.savepoints:
            point = screen.savepoints[-1]
            pen = Pen(b"\x1b[0" + _sgr(point.cursor.attrs) + b"m")
            saved = Cursor(min(point.cursor.x, self.cols - 1), point.cursor.y, False, point.origin, pen)
        state = TerminalState(self.cols, self.rows, ScreenState(self.cells(scrollback=scrollback), cursor, saved, []))
        state.scrollback, state.final = scrollback, final
        state.modes = {number: self.mode(number) or (default and number > 1000) for number, default in MODES.items()}
        state.ansi_modes = {4: self.mode(4, ansi=True), 20: self.mode(20, ansi=True)}
        state.title = screen.title.encode()
        state.tab_stops = b"\x1b[3g" + b"".join(b"\x1b[%dG\x1bH" % (stop + 1) for stop in sorted(screen.tabstops))
        if screen.margins is not None:
            state.margins = b"\x1b[%d;%dr" % (screen.margins.top + 1, screen.margins.bottom + 1)
            state.margin_top = screen.margins.top
        return write_snapshot(state)

    def close(self) -> None:
        """Forgets the screen's lines now."""
        self._screen.history.top.clear()
        self._screen.buffer.clear()

    def _row(self, line: Mapping[int, Any]) -> Row:
        runs: list[Run] = []
        x = 0
        while x < self.cols:
            char = line[x]
            wide = x + 1 < self.cols and line[x + 1].data == "" and char.data != ""
            look, background = _sgr(char, fore_only=True), _background(char)
            text = "" if char.data in ("", " ") and not char.underscore and not char.reverse else char.data
            cluster = wide or len(text) > 1
            run = Run(text, 2 if wide else 1, look if text else b"", background, cluster=cluster)
            if (
                runs
                and not (cluster or runs[-1].cluster)
                and bool(text) is bool(runs[-1].text)
                and run.look() == runs[-1].look()
            ):
                runs[-1].text += text
                runs[-1].width += 1
            else:
                runs.append(run)
            x += run.width
        return Row(runs)


def _background(char: Any) -> bytes:
    if char.bg == "default":
        return b""
    if char.bg in _BACKGROUNDS:
        return _BACKGROUNDS[char.bg]
    return b";48;2;%d;%d;%d" % tuple(bytes.fromhex(char.bg))


def _sgr(char: Any, *, fore_only: bool = False) -> bytes:
    """Returns a character's SGR parameters, each with a semicolon before it."""
    out = bytearray()
    for on, parameter in (
        (char.bold, b";1"),
        (char.italics, b";3"),
        (char.underscore, b";4"),
        (char.blink, b";5"),
        (char.reverse, b";7"),
        (char.strikethrough, b";9"),
    ):
        if on:
            out += parameter
    if char.fg in _COLORS:
        out += _COLORS[char.fg]
    elif char.fg != "default":
        out += b";38;2;%d;%d;%d" % tuple(bytes.fromhex(char.fg))
    return bytes(out) if fore_only else bytes(out) + _background(char)
