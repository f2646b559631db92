"""Writes a terminal's state as the bytes that repaint it on another terminal (docs/protocol.md, section 4).

The bytes begin with resets, so they may go to a terminal in any state; to be the same it must have the same size, a
smaller one is left without what it cannot show: no tab stop and, without scroll-back, no lines. They use what
"XTerm Control Sequences" documents, and are the same for the same state. What they cannot tell: images, marks of shell
integration (OSC 133), the pointer's shape, synchronized output (2026), which of several mouse modes came last, what the
alternate screen keeps while it is not shown, a soft wrap of the lowest line, a changed grapheme mode (2027) within the
text, clusters side by side that would join, protected blanks, a blank in the last column from a space there while the
cursor waits to wrap, a character for REP that finds no place on the screen, and a cursor that was restored to where it
is outside of the margins in origin mode.
"""

from __future__ import annotations

import re
from typing import Final

from sterna import limits

# DEC private modes that are restored one by one, with their value after a reset.
MODES: Final[dict[int, bool]] = {
    1: False,  # application cursor keys
    5: False,  # reverse video
    7: True,  # autowrap
    9: False,  # X10 mouse
    25: True,  # cursor visible
    45: False,  # reverse wrap
    66: False,  # application keypad
    67: False,  # backarrow sends backspace
    69: False,  # left and right margins
    1000: False,  # mouse: buttons
    1002: False,  # mouse: and drags
    1003: False,  # mouse: and moves
    1004: False,  # focus events
    1005: False,  # mouse: UTF-8 coordinates
    1006: False,  # mouse: SGR coordinates
    1015: False,  # mouse: urxvt coordinates
    1016: False,  # mouse: SGR pixels
    1045: False,  # extended reverse wrap
    2004: False,  # bracketed paste
    2027: False,  # grapheme clusters
    2031: False,  # reports of the colour scheme
    2048: False,  # reports of the size
    # What a terminal has set here without being told is its user's affair: only told if it differs.
    1007: True,  # the wheel sends arrows on the alternate screen
    1035: True,  # the numeric keypad heeds NumLock
    1036: True,  # alt sends escape
    1039: False,  # alt sends escape, too
}
_RESET: Final = tuple(n for n, value in MODES.items() if not value and n not in (69, 1039, 2027))
ALT_SCREEN_MODES: Final = (1049, 1047, 47)

_ASCII: Final = b"\x1b(B\x1b)B\x1b*B\x1b+B\x0f"
_PLAIN: Final = b'\x1b[0m\x1b]8;;\x07\x1b[0"q'
# C1 controls count in UTF-8 too: some terminals obey them, and a title must not carry sequences to who attaches later.
_C1: Final = re.compile("[\x80-\x9f]")
_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f]")
_GAPS: Final = re.compile("(\0+)")


def _clean(text: bytes, controls: re.Pattern[str] = _CONTROLS) -> bytes:
    """Removes control characters from what a program has said in UTF-8, where a broken sequence may not hide one."""
    return controls.sub("", text.decode(errors="replace")).encode()


class Run:
    """Neighbouring cells that look alike: blanks (`text` empty), narrow characters, or one cluster of any width.

    A cluster is one character with what combines with it, or a wide one. `style` and `background` are SGR parameters,
    each with a semicolon before it; `link` is a URI.
    """

    __slots__ = ("background", "cluster", "link", "protected", "style", "text", "width")

    def __init__(
        self,
        text: str,
        width: int,
        style: bytes = b"",
        background: bytes = b"",
        link: bytes = b"",
        *,
        protected: bool = False,
        cluster: bool = False,
    ) -> None:
        self.cluster = cluster
        self.text = text
        self.width = width
        self.style = style
        self.background = background
        self.link = link
        self.protected = protected

    def look(self) -> tuple[bytes, bytes, bytes, bool]:
        """Returns everything but the text."""
        return self.style, self.background, self.link, self.protected

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Run)
            and (self.text, self.width, self.cluster) == (other.text, other.width, other.cluster)
            and self.look() == other.look()
        )

    def __hash__(self) -> int:
        return hash((self.text, self.width, self.look()))

    def __repr__(self) -> str:
        return f"Run({self.text!r}, {self.width}, {self.style!r}, {self.background!r}, {self.link!r}, {self.protected})"


class Row:
    """One line of cells: its runs, whether it goes on softly in the next row, and whether it ends in a spacer.

    A spacer is the last column left empty because a wide character did not fit there.
    """

    __slots__ = ("runs", "spacer", "wrapped")

    def __init__(self, runs: list[Run], *, wrapped: bool = False, spacer: bool = False) -> None:
        self.runs = runs
        self.wrapped = wrapped
        self.spacer = spacer

    @classmethod
    def plain(cls, text: str, *, wrapped: bool) -> Row:
        """Makes a row of narrow characters without any style; NUL stands for a blank."""
        if "\0" not in text:
            return cls([Run(text, len(text))], wrapped=wrapped)
        parts = _GAPS.split(text)
        return cls([Run("" if p[0] == "\0" else p, len(p)) for p in parts if p], wrapped=wrapped)

    def text(self) -> str:
        """Returns the row's characters, blanks as spaces."""
        return "".join(run.text or " " * run.width for run in self.runs)

    def at(self, x: int) -> tuple[int, Run] | None:
        """Returns the character at column `x` with the column where it begins; None for a blank."""
        start = 0
        for run in self.runs:
            if x < start + run.width:
                if not run.text:
                    return None
                if not run.cluster and run.width > 1:
                    return x, Run(run.text[x - start], 1, *run.look()[:3], protected=run.protected)
                return start, run
            start += run.width
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and (self.runs, self.wrapped) == (other.runs, other.wrapped)

    def __hash__(self) -> int:
        return hash((tuple(self.runs), self.wrapped))

    def __repr__(self) -> str:
        return f"Row({self.runs!r}, wrapped={self.wrapped}, spacer={self.spacer})"


class Pen:
    """How the next character looks: the sequences that set rendition, link, protection and character sets."""

    __slots__ = ("charsets", "link", "protection", "style")

    def __init__(
        self, style: bytes = b"\x1b[0m", link: bytes = b"", protection: bytes = b"", charsets: bytes = b""
    ) -> None:
        self.style = style
        self.link = link
        self.protection = protection
        self.charsets = charsets

    def write(self) -> bytes:
        """Returns the sequences that give this pen to a terminal, whatever it had."""
        return _PLAIN + self.style + _clean(self.link, _C1) + self.protection + _ASCII + self.charsets


class Cursor:
    """A cursor, also a saved one: column and row from 0, whether it waits to wrap, origin mode, pen."""

    __slots__ = ("origin", "pen", "wrap_pending", "x", "y")

    def __init__(self, x: int, y: int, wrap_pending: bool, origin: bool, pen: Pen) -> None:
        self.x = x
        self.y = y
        self.wrap_pending = wrap_pending
        self.origin = origin
        self.pen = pen


class ScreenState:
    """One of the two screens: its rows (those above it first), cursor, saved cursor, keyboard flags from the oldest.

    `shape` is the parameter of DECSCUSR.
    """

    __slots__ = ("cursor", "keyboard", "rows", "saved", "shape")

    def __init__(self, rows: list[Row], cursor: Cursor, saved: Cursor, keyboard: list[int], shape: int = 0) -> None:
        self.shape = shape
        self.rows = rows
        self.cursor = cursor
        self.saved = saved
        self.keyboard = keyboard


class TerminalState:
    """Everything a snapshot tells. `margins`, `tab_stops`, `colors`, `modify_keys` are ready sequences.

    `written_last` is the character that REP repeats. With `final` nothing goes on from there: the bytes are also good
    for a terminal of another size, where lines wrap elsewhere.
    `entered` is the mode by which the alternate screen was entered, 0 if the main one is shown; `margin_left` and
    `margin_top` are what origin mode counts from.
    """

    __slots__ = (
        "alternate",
        "ansi_modes",
        "cols",
        "colors",
        "entered",
        "final",
        "main",
        "margin_left",
        "margin_top",
        "margins",
        "modes",
        "modify_keys",
        "pwd",
        "rows",
        "saved_modes",
        "scrollback",
        "tab_stops",
        "title",
        "written_last",
    )

    def __init__(self, cols: int, rows: int, main: ScreenState) -> None:
        self.cols = cols
        self.rows = rows
        self.main = main
        self.alternate: ScreenState | None = None
        self.entered = 0
        self.scrollback = self.final = False
        self.modes: dict[int, bool] = dict(MODES)
        self.saved_modes: dict[int, bool] = {}
        self.ansi_modes: dict[int, bool] = {}
        self.margins = self.tab_stops = self.colors = self.modify_keys = self.title = self.pwd = b""
        self.margin_left = self.margin_top = 0
        self.written_last = ""


def write_snapshot(state: TerminalState) -> bytes:
    """Returns the bytes that repaint `state` on a terminal of its size."""
    if state.final:
        # Where lines wrap elsewhere, a character that is written again would stand in a row that is not its own.
        state.written_last = ""
        for screen in filter(None, (state.main, state.alternate)):
            screen.cursor.wrap_pending = screen.saved.wrap_pending = False
            _trim(screen, state.rows)
    out = bytearray(_prefix(state))
    # Without scroll-back, what the terminal has there must stay as it is, and some put there what ED clears: not so DL.
    erase = b"\x1b[H\x1b[J\x1b[3J" if state.scrollback else b"\x1b[H\x1b[%dM" % limits.SIZE_MAX_CELLS
    out += _paint(state.main, erase=erase, held=not state.scrollback)
    active = state.main
    if state.alternate is not None:
        # The main screen's cursor comes back from its saved one, or is the alternate screen's: it needs no place here.
        out += _save(state.main, state) + b"\x1b[%d q\x1b[?%dh\x1b[?6l" % (state.main.shape, state.entered)
        active = state.alternate
        out += _PLAIN + _ASCII + _paint(active, erase=b"\x1b[H\x1b[J")
    out += _tabs(state)
    # With margins the painting has left the last row.
    from_below = state.final and (state.scrollback or active is state.alternate)
    out += b"\x1b7" if from_below else _save(active, state) + b"\x1b[?6l"
    out += _modes(state)
    out += state.colors + state.modify_keys
    if state.title:
        out += b"\x1b]2;" + _clean(state.title) + b"\x1b\\"
    if state.pwd:
        out += b"\x1b]7;" + _clean(state.pwd) + b"\x1b\\"
    out += b"\x1b[%d q" % active.shape
    out += _repeat(active, state)
    # From here on only what must come last, as margins and origin mode move the cursor.
    out += state.margins
    if from_below:
        up = min(state.rows, len(active.rows)) - 1 - active.cursor.y
        out += b"\x1b8" + (b"\x1b[%dA" % up if up else b"") + b"\x1b[%dG" % (active.cursor.x + 1)
    else:
        if active.cursor.origin:
            out += b"\x1b[?6h"
        out += _place(active, active.cursor, state, relative=active.cursor.origin)
    if state.ansi_modes.get(4):
        out += b"\x1b[4h"
    if not state.modes[7]:
        out += b"\x1b[?7l"
    out += active.cursor.pen.write()
    return bytes(out)


def _trim(screen: ScreenState, height: int) -> None:
    """Drops the blank rows below the cursor, which would push the text out of a lower terminal.

    Where lines have scrolled out, they stay: without them those lines would come back.
    """
    rows = screen.rows
    blank = len(rows) == height
    while blank and len(rows) > screen.cursor.y + 1 and not rows[-2].wrapped:
        blank = not any(run.text or run.background for run in rows[-1].runs)
        if blank:
            rows.pop()


def _prefix(state: TerminalState) -> bytes:
    """Ends whatever the terminal is in the middle of and undoes what would disturb the painting."""
    out = bytearray(b"\x18\x1b\\\x1b[?2026l\x1b[?1049l\x1b[?1047l\x1b[?47l\x1b[!p")
    out += b"\x1b[?69l\x1b[r\x1b[?6l\x1b[?7h\x1b[4;20l"
    for start in range(0, len(_RESET), 10):
        numbers = b";".join(b"%d" % n for n in _RESET[start : start + 10])
        # Saved as well (XTSAVE), so that nothing older comes back with XTRESTORE.
        out += b"\x1b[?%bl\x1b[?%bs" % (numbers, numbers)
    out += b"\x1b[?25h\x1b[?7;25s"
    out += b"\x1b]104\x1b\\\x1b]110\x1b\\\x1b]111\x1b\\\x1b]112\x1b\\\x1b[>4m"
    out += b"\x1b[?2027%c" % (b"h" if state.modes[2027] else b"l")
    out += _PLAIN + _ASCII
    return bytes(out)


def _modes(state: TerminalState) -> bytes:
    """Sets the modes that do not move the cursor, after what XTRESTORE would bring back."""
    out = bytearray()
    saved = {n: value for n, value in state.saved_modes.items() if value != MODES[n]}
    for number, value in saved.items():
        out += b"\x1b[?%d%c\x1b[?%ds" % (number, b"h" if value else b"l", number)
    for number, default in MODES.items():
        value = state.modes[number]
        if number == 66:
            out += b"\x1b=" if value else b"\x1b>"
        elif number not in (7, 25, 69, 2027) and (value != default or number in saved):
            out += b"\x1b[?%d%c" % (number, b"h" if value else b"l")
    # Autowrap is still needed for the cursor's place; 2027 was set before the painting.
    out += b"\x1b[?7h\x1b[?69%c\x1b[?25%c" % (b"h" if state.modes[69] else b"l", b"h" if state.modes[25] else b"l")
    if 2027 in saved:
        out += b"\x1b[?2027%c" % (b"h" if state.modes[2027] else b"l")
    if state.ansi_modes.get(20):
        out += b"\x1b[20h"
    return bytes(out)


def _tabs(state: TerminalState) -> bytes:
    """Sets the tab stops; what is beyond the width of a narrower terminal must not leave one in its last column."""
    last = b"\x1b[%dG\x1bH" % state.cols
    out = state.tab_stops.replace(last, b"") + b"\x1b[%dG\x1b[0g" % limits.SIZE_MAX_CELLS
    return out + last if last in state.tab_stops else out


def _save(screen: ScreenState, state: TerminalState) -> bytes:
    """Puts the saved cursor where it was and saves it (DECSC); there are no margins yet."""
    saved = screen.saved
    origin = b"\x1b[?6h" if saved.origin else b""
    return origin + _place(screen, saved, state) + saved.pen.write() + b"\x1b7"


def _place(screen: ScreenState, cursor: Cursor, state: TerminalState, *, relative: bool = False) -> bytes:
    """Moves the cursor; where it waits to wrap, by writing the last character again."""
    left, top = (state.margin_left, state.margin_top) if relative else (0, 0)
    x, y = max(cursor.x - left, 0), max(cursor.y - top, 0)
    if cursor.wrap_pending:
        row = screen.rows[len(screen.rows) - state.rows + cursor.y]
        found = row.at(cursor.x)
        start, run = found if found is not None else (cursor.x, Run(" ", 1))
        return _PLAIN + b"\x1b[%d;%dH" % (y + 1, max(start - left, 0) + 1) + _write_one(run)
    return b"\x1b[%d;%dH" % (y + 1, x + 1)


def _repeat(screen: ScreenState, state: TerminalState) -> bytes:
    """Writes a character again that is on the screen already, for REP repeats what was written last (ECMA-48 8.3.103).

    It is looked for where it was most likely written: before the cursor, then anywhere from the bottom; else it is
    written on a blank and erased again.
    """
    if not state.written_last or screen.cursor.wrap_pending:
        return b""
    last, rows = state.written_last, screen.rows[-state.rows :]
    places = [(screen.cursor.x - 1, screen.cursor.y), (screen.cursor.x - 2, screen.cursor.y)]
    blank: tuple[int, int, Run] | None = None
    for y in range(len(rows) - 1, -1, -1):
        x = 0
        for run in rows[y].runs:
            if last in run.text:
                places.append((x + (0 if run.cluster else run.text.index(last)), y))
            elif not run.text and run.width > 3 and not rows[y].wrapped:
                blank = (x, y, run)
            x += run.width
    for x, y in places:
        found = rows[y].at(x) if x >= 0 else None
        before = rows[y].at(x - 1) if x > 0 else None
        # Behind a joiner it would become part of that cluster.
        if found is None or (before is not None and before[1].text.endswith("\u200d")):
            continue
        if found[1].text == last or (found[1].width == 1 and found[1].text[0] == last):
            return _PLAIN + b"\x1b[%d;%dH" % (y + 1, found[0] + 1) + _write_one(found[1])
    if blank is None:
        return b""
    x, y, run = blank
    out = bytearray(_PLAIN + b"\x1b[%d;%dH" % (y + 1, x + 2) + _ASCII + last.encode())
    brush = _Brush(out)
    brush.use(run)
    out += b"\x1b[%d;%dH\x1b[2X" % (y + 1, x + 2)
    return bytes(out)


def _write_one(run: Run) -> bytes:
    """Writes one character or cluster with a pen that is plain before and after."""
    out = bytearray(_ASCII)
    brush = _Brush(out)
    brush.use(run)
    out += run.text.encode()
    brush.drop()
    return bytes(out)


class _Brush:
    """Knows what the terminal's pen is and writes only changes."""

    __slots__ = ("link", "out", "protected", "sgr")

    def __init__(self, out: bytearray) -> None:
        self.out = out
        self.sgr = self.link = b""
        self.protected = False

    def use(self, run: Run) -> None:
        """Changes the pen to what a run needs."""
        sgr = run.style + run.background
        if sgr != self.sgr:
            self.sgr = sgr
            self.out += b"\x1b[0" + sgr + b"m"
        if run.link != self.link:
            self.link = run.link
            self.out += b"\x1b]8;;" + _clean(run.link) + b"\x07"
        if run.protected is not self.protected:
            self.protected = run.protected
            self.out += b'\x1b[1"q' if run.protected else b'\x1b[0"q'

    def drop(self) -> None:
        """Gives the pen back plain."""
        if self.sgr:
            self.out += b"\x1b[0m"
        if self.link:
            self.out += b"\x1b]8;;\x07"
        if self.protected:
            self.out += b'\x1b[0"q'
        self.sgr = self.link = b""
        self.protected = False


def _paint(screen: ScreenState, erase: bytes, *, held: bool = False) -> bytes:
    """Erases the screen and writes its rows from the top, each once; what is above the screen scrolls there.

    With `held` there is nothing above: where a terminal is too low for all rows, they scroll below its first line (or
    its first wrapped lines), within margins, and from there nothing goes into its scroll-back (but tmux's).
    """
    out = bytearray(erase)
    out += b"\x1b[<16u\x1b[=%d;1u" % (screen.keyboard[0] if screen.keyboard else 0)
    for flags in screen.keyboard[1:]:
        out += b"\x1b[>%du" % flags
    brush = _Brush(out)
    before: Row | None = None
    rows = screen.rows
    first = next((y for y, row in enumerate(rows, 1) if not row.wrapped), 0) if held else 0
    for y, (row, after) in enumerate(zip(rows, [*rows[1:], None], strict=True)):
        if before is not None:
            _next_row(out, brush, before, row)
            if y == first:
                out += b"\x1b7\x1b[%dr\x1b8" % (y + 1)  # which else moves the cursor
        _paint_row(out, brush, row, after)
        # Scrolling fills the new line with the pen's background: it must be plain.
        brush.drop()
        before = row
    if held:
        out += b"\x1b[r"
    return bytes(out)


def _paint_row(out: bytearray, brush: _Brush, row: Row, after: Row | None) -> None:
    for run in row.runs[:-1]:
        brush.use(run)
        if run.text:
            out += run.text.encode()
        else:
            out += b"\x1b[%dX\x1b[%dC" % (run.width, run.width) if run.background else b"\x1b[%dC" % run.width
    if not row.runs:
        return
    last = row.runs[-1]
    if last.text:
        brush.use(last)
        out += last.text.encode()
    elif not row.wrapped or after is None:
        if last.background:
            brush.use(last)
            out += b"\x1b[K"
    elif _wraps_before_wide(row, after):
        if last.width > 1:
            brush.use(last)
            out += b"\x1b[%dX\x1b[%dC" % (last.width, last.width - 1)
    else:
        # The line goes on, but its end was erased: wrap on a space, then push that out (ICH keeps the wrap).
        if last.width > 1:
            out += b"\x1b[%dC" % (last.width - 1)
        brush.drop()
        out += b"  \x1b[A\x1b[%dG" % (sum(run.width for run in row.runs[:-1]) + 1)
        brush.use(last)
        out += b"\x1b[%d@\x1b[B\r" % last.width
        brush.drop()
        out += b"\x1b[X"


def _wraps_before_wide(row: Row, after: Row) -> bool:
    return row.spacer and bool(after.runs) and after.runs[0].cluster and after.runs[0].width == 2


def _next_row(out: bytearray, brush: _Brush, before: Row, row: Row) -> None:
    """Goes to the next row; within a soft-wrapped line by wrapping, so that the terminal knows it for one line.

    The new line, and the column that a wide character leaves empty, take the background that the pen has while it
    wraps. So where a background or a blank is wanted, the wrap is made by another character, which is erased again
    (with ECH, as tmux forgets the wrap after an EL from the first column) or, if it is wide, written over.
    """
    if not before.wrapped:
        out += b"\r\n"
        return
    first = row.runs[0] if row.runs else Run("", 1)
    last = before.runs[-1] if before.runs else Run("", 1)
    if last.text:
        if not first.text or first.background:
            out += b" \r\x1b[X"
    elif _wraps_before_wide(before, row) and (first.background or last.background):
        brush.use(last)
        out += first.text.encode()
        brush.drop()
        out += b"\x1b[K\r"
