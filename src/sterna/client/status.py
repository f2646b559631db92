"""The quiet status line of `sterna attach`: says after a second that the connection is gone, and leaves no trace.

It is drawn over the screen that the session painted, so the screen has to be known: only when there is trouble, a
screen model is built from the last output. Sources: ECMA-48, xterm's ctlseqs (XTWINOPS 22 and 23), no-color.org.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Protocol

from sterna.client.terminal import ModeTracker
from sterna.errors import SternaError
from sterna.limits import CLIENT_TAIL_BYTES, LABEL_MAX_CHARS
from sterna.units import MILLISECOND

if TYPE_CHECKING:
    from collections.abc import Callable

STATUS_DELAY_MS = 1_000
STATUS_EVERY_MS = 1_000
UNFINISHED_MAX_BYTES = 4_096

_SECOND_NS = STATUS_EVERY_MS * MILLISECOND
_UNKNOWN_CELL = "\uf8ff"  # private use: no program draws with it
# Compiled where they are used, once (re keeps them): most runs never need them, and all would wait for them.
_UNSTYLED_BLANKS = rb"(?:\x1b\[0?m|\x1b\[[0-9]*C| )*"
_UNFINISHED = rb"\x1b(?:[ -/]*|\[[\x00-\x17\x19\x1c-\x3f\x7f]*|\][^\x07\x18\x1a]*|[PX^_][^\x18\x1a]*)\Z"
_SEQUENCE = (
    rb"\x1b(?:\[[\x00-\x17\x19\x1c-\x3f\x7f]*[@-~]|\][^\x07\x18\x1a]*[\x07\x18\x1a]|[PX^_][^\x18\x1a]*[\x18\x1a]"
    rb"|[ -/]*[0-OQ-WYZ\\`-~])"
)
# What places the cursor, with a clearing of the whole screen just before it.
_PLACED = rb"(?:\x1b\[2J(?:\x1b\[[0-9;]*m)*)?\x1b(?:\[[0-9;]*[Hf]|c)"
_SAVED = rb"\x1b(?:(?P<save>7|\[s|\[\?[0-9;]*104[89][0-9;]*h)|8|\[u|\[\?[0-9;]*104[89][0-9;]*l)"
# What may change the style: SGR, a restored cursor, a reset, or a sequence that is cut.
_STYLES = rb"\x1b(?:\[[0-9;:]*m|8|c|\[!p|\[u|\[\?[0-9;]*l|\Z|\[[0-?]*\Z)"
_PLAIN_STYLES = (b"\x1b[m", b"\x1b[0m")
_MODEL_ERRORS = (ImportError, OSError, RuntimeError, ValueError, SternaError)


class ScreenModel(Protocol):
    """What is asked of a terminal emulator; rows and columns count from 0."""

    def feed(self, data: bytes) -> None:
        """Takes output of the session."""

    def cursor(self) -> tuple[int, int, bool]:
        """Returns row, column, and whether the next character wraps (a character was written in the last column)."""

    def pen_vt(self) -> bytes:
        """Returns the bytes that select the current style, beginning with a reset (CSI m)."""

    def row_text(self, row: int) -> str:
        """Returns the text of a row; trailing blanks may be missing."""

    def row_joined(self, row: int) -> bool:
        """Returns whether a row goes on softly in the next one, or is what the one above it goes on in."""

    def row_vt(self, row: int) -> bytes:
        """Returns what paints a cleared row from its first column on: styles, beginning with a reset, and characters.

        Trailing unstyled blanks may be missing, unless the last character was written in the last column.
        """


class OutputTail:
    """The last of the session's output that was written to the terminal, kept cheaply."""

    __slots__ = ("_limit_bytes", "_pieces", "_size", "styled")

    def __init__(self, limit_bytes: int = CLIENT_TAIL_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: deque[tuple[bytes, bytes]] = deque()  # each with the modes before it
        self._size = 0
        self.styled = False  # whether a style other than the default may have been selected where the tail begins

    @property
    def before(self) -> bytes:
        """What sets the modes that are on where the tail begins."""
        return self._pieces[0][1] if self._pieces else b""

    def append(self, data: bytes, before: bytes) -> None:
        """Takes what was written, and `ModeTracker.replay` as it was before that.

        Keeps at least the last `limit_bytes` and less than one piece more.
        """
        self._pieces.append((data, before))
        self._size += len(data)
        while self._pieces and self._size - len(self._pieces[0][0]) >= self._limit_bytes:
            self._drop(self._pieces.popleft()[0])

    def resized(self, modes: bytes) -> None:
        """Forgets what was written for another terminal size, except for a sequence that is not finished.

        `modes` is `ModeTracker.replay` as it is now.
        """
        data = self.data()
        rest = unfinished(data)
        kept = data[-UNFINISHED_MAX_BYTES - 1 :] if rest is None else rest
        while self._pieces:
            self._drop(self._pieces.popleft()[0])
        self.append(kept, modes)

    def data(self) -> bytes:
        """Returns the tail in one piece."""
        return b"".join([piece for piece, _ in self._pieces])

    def _drop(self, piece: bytes) -> None:
        self._size -= len(piece)
        self.styled = may_be_styled(piece, self.styled)


def may_be_styled(data: bytes, before: bool) -> bool:
    """Returns whether a style other than the default may be selected after `data`, if one may have been `before`."""
    last = data.rfind(b"\x1b")
    if last < 0:
        return before
    styles = re.compile(_STYLES)
    if found := styles.match(data, last):
        return found[0] not in _PLAIN_STYLES  # in most output the last sequence says it
    reset = max(data.rfind(b"\x1b[m"), data.rfind(b"\x1b[0m"))
    return bool(styles.search(data, reset + 3 if reset >= 0 else 0)) or (before and reset < 0)


def unfinished(data: bytes) -> bytes | None:
    """Returns the control sequence that output ends in the middle of, which is repeated after something else was drawn.

    None when nothing may be drawn: in the middle of a UTF-8 character, or of a sequence over UNFINISHED_MAX_BYTES.
    """
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xC0:
            if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4):
                return None
            break
        if byte < 0x80:
            break
    start = data.rfind(b"\x1b")
    if start < 0 or not re.compile(_UNFINISHED).match(data, start):
        return b""
    return data[start:] if len(data) - start <= UNFINISHED_MAX_BYTES else None


def _last_printed(data: bytes) -> str:
    """Returns the spacing character that `data` ends in; nothing when it ends in anything else."""
    start = data.rfind(b"\x1b")
    sequence = re.compile(_SEQUENCE).match(data, start) if start >= 0 else None
    if start >= 0 and not sequence:
        return ""
    text = data[sequence.end() if sequence else 0 :]
    last = text[-4:].decode("utf-8", "replace")[-1:]
    return last if last.isprintable() and last != "\ufffd" and cells(last) else ""


def cells(text: str) -> int:
    """Returns how many columns `text` takes on a terminal."""
    from unicodedata import category, east_asian_width

    if text.isascii():
        return len(text)
    zero = ("Mn", "Me", "Cf")
    return sum(0 if category(char) in zero else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def cut(text: str, width: int) -> str:
    """Returns as much of `text` as fits into `width` columns."""
    if cells(text) <= width:
        return text
    end, used = 0, 0
    for char in text:
        used += cells(char)
        if used > width:
            break
        end += 1
    return text[:end]


class StatusLine:
    """Shows how long the connection has been gone. It does no input or output: bytes out, time in (nanoseconds).

    `tail` and `modes` know what the terminal was sent by the session; the bytes returned here go, whole, through the
    same `Terminal.write` (so `modes` sees them) but not into `tail`. `make_screen(cols, rows)` gives a fresh screen
    model; None, or one that fails, means that the window title is used. `hint` says how to give up. `color` False
    (NO_COLOR) draws without any style, `unicode` False in ASCII.
    `absent`, while it is set, says that no node is there, and what to do about that.
    """

    __slots__ = (
        "_color", "_hint", "_host", "_last", "_make_screen", "_model", "_modes", "_next_ns", "_row", "_shown",
        "_since_ns", "_size", "_tail", "_title", "_unicode", "_unfinished", "_why", "absent",
    )  # fmt: skip

    def __init__(
        self,
        host: str,
        tail: OutputTail,
        modes: ModeTracker,
        make_screen: Callable[[int, int], ScreenModel] | None,
        *,
        hint: str = "~. to give up",
        color: bool = True,
        unicode: bool = True,
    ) -> None:
        self._host = "".join(char for char in host if char.isprintable())[:LABEL_MAX_CHARS]
        self.absent = ""
        self._tail = tail
        self._modes = modes
        self._make_screen = make_screen
        self._hint = hint
        self._color = color
        self._unicode = unicode
        self._since_ns: int | None = None
        self._why = ""
        self._next_ns = 0
        self._size = (0, 0)
        self._model: ScreenModel | None = None
        self._unfinished = b""
        self._last = ""  # the character that the cursor stands behind, if that was the last that was printed
        self._row = -1  # where the line is drawn
        self._title = False  # or the title was set
        self._shown = 0  # columns of what is drawn

    @property
    def visible(self) -> bool:
        """Whether the terminal shows it; `end` has to be called before anything else is written."""
        return self._row >= 0 or self._title

    def begin(self, now_ns: int, why: str = "") -> None:
        """Notes that trouble began, unless it already has; nothing is shown for STATUS_DELAY_MS.

        `why`, with a comma at its end, stands before what is shown.
        """
        if self._since_ns is None:
            self._since_ns = now_ns
            self._why = why
            self._next_ns = now_ns + STATUS_DELAY_MS * MILLISECOND

    def next_timeout(self) -> int | None:
        """Returns when `handle_timeout` is to be called."""
        return None if self._since_ns is None else self._next_ns

    def handle_timeout(self, now_ns: int, cols: int, rows: int) -> bytes:
        """Returns what shows or updates the line on a terminal of that size; nothing before its time."""
        if self._since_ns is None or now_ns < self._next_ns:
            return b""
        elapsed = (now_ns - self._since_ns) // _SECOND_NS
        self._next_ns = self._since_ns + (elapsed + 1) * _SECOND_NS
        erased = b""
        if self.visible and (cols, rows) != self._size:
            erased = self._erase_after_resize(cols, rows)
        if not self.visible and not self._choose(cols, rows):
            return erased
        return erased + (self._draw_title(elapsed) if self._title else self._draw(elapsed))

    def end(self) -> bytes:
        """Returns what removes the line, because the trouble is over or the program ends."""
        self._since_ns = None
        erased = self._erase() if self.visible else b""
        self._forget()
        return erased

    def _forget(self) -> None:
        self._model = None
        self._row = -1
        self._title = False
        self._shown = 0

    def _choose(self, cols: int, rows: int) -> bool:
        """Decides where to draw, once for each time of trouble; returns False when nothing may be written at all."""
        data = self._tail.data()
        rest = unfinished(data)
        if rest is None:
            return False
        self._unfinished = rest
        self._last = _last_printed(data[: len(data) - len(rest)]) if self._modes.appends else ""
        self._size = (cols, rows)
        row = None
        if self._make_screen is not None and rows >= 2 and cols >= 2 and self._modes.addressable:
            try:
                row = self._build(data, cols, rows)
            except _MODEL_ERRORS:
                self._forget()
        self._row = -1 if row is None else row
        self._title = row is None
        return True

    def _build(self, data: bytes, cols: int, rows: int) -> int | None:
        """Builds the model and returns the row to draw on, None when the screen is not known well enough.

        Cells count only from where the cursor's place is certain. Two models that begin there with another style and
        another saved cursor show what depends on what was before.
        """
        assert self._make_screen is not None
        start = self._certain_from(data, cols, rows)
        if start is None:
            return None
        place, position = start
        modes = ModeTracker()
        modes.feed(self._tail.before + data[:position])
        if not modes.addressable:
            return None
        styled = b"\x1b[1;2;3;4;5;7;8;9;33;44;53m" if may_be_styled(data[:position], self._tail.styled) else b""
        models = []
        for saved in (b"\x1b[%d;%dH\x1b7" % (rows, cols), b"\x1b[H%b\x1b7" % styled):
            models.append(self._make_screen(cols, rows))
            unknown = _unknown_screen(cols, rows, saved, alternate=modes.alternate)
            models[-1].feed(unknown + place + modes.replay + data[position:])
        model, other = models
        cursor_row, _, wraps = model.cursor()
        if model.cursor() != other.cursor() or model.pen_vt() != other.pen_vt():
            return None
        known = [row for row in range(rows) if _is_known(row, model, other)]
        if wraps and cursor_row not in known:
            return None
        self._model = model
        # What is painted over a part of a soft-wrapped line makes it two lines, for who selects it or changes the size.
        whole = [row for row in known if not model.row_joined(row)]
        free = [row for row in whole if row != cursor_row]
        # A blank row needs no repainting; the cursor's own is the last of them, because the line hides where it is.
        blank = [row for row in whole if not model.row_text(row).strip() and not self._painted(row)]
        blank.sort(key=lambda row: (row == cursor_row, -row))
        row = next(iter(blank or free), None)
        return row if row is not None and self._leaves_no_trace(row, model, other, known) else None

    def _leaves_no_trace(self, row: int, model: ScreenModel, other: ScreenModel, known: list[int]) -> bool:
        """Tries the line out on the other model."""
        self._row = row
        other.feed(self._draw(0) + self._erase())
        self._row = -1
        self._shown = 0
        same = model.cursor() == other.cursor() and model.pen_vt() == other.pen_vt()
        return same and all(model.row_vt(row) == other.row_vt(row) for row in known)

    def _certain_from(self, data: bytes, cols: int, rows: int) -> tuple[bytes, int] | None:
        """Returns what places the cursor, and the position in `data` from which its place is certain.

        That is the first absolute placement, or, in output that only scrolls, any point at which cursors that began
        in opposite corners have met.
        """
        found = re.compile(_PLACED).search(data)
        while found:
            restored = _restored(data, found.start())
            if not restored:
                return b"", found.start()
            found = re.compile(_PLACED).search(data, restored)
        middle = data.rfind(b"\n", 0, len(data) // 2) + 1
        if not middle or _restored(data, middle):
            return None
        assert self._make_screen is not None
        cursors = []
        for corner in (b"\x1b[H", b"\x1b[%d;%dH" % (rows, cols)):
            model = self._make_screen(cols, rows)
            model.feed(corner + self._tail.before + data[:middle])
            cursors.append(model.cursor())
        row, column, wraps = cursors[0]
        if cursors[0] != cursors[1] or wraps:
            return None
        return b"\x1b[%d;%dH" % (row + 1, column + 1), middle

    def _text(self, elapsed: int) -> str:
        dots = "…" if self._unicode else "..."
        what = f"no node answers on {self._host}" if self.absent else f"{self._why}reconnecting to {self._host}"
        text = f"sterna: {what} {dots} {elapsed} s"
        if hint := self.absent or self._hint:
            text += f"  ({hint})"
        return text if self._unicode else text.encode("ascii", "replace").decode()

    def _draw(self, elapsed: int) -> bytes:
        # The last column stays free: writing there would leave the cursor waiting to wrap.
        text = cut(self._text(elapsed), self._size[0] - 1)
        width = cells(text)
        cleared = self._paint_row() if width < self._shown else b""
        self._shown = width
        style = b"\x1b[0;2;7m" if self._color else b"\x1b[m"
        line = b"\x1b[%d;1H%b%b\x1b[m" % (self._row + 1, style, text.encode())
        return self._framed(cleared + line)

    def _erase(self) -> bytes:
        if self._title:
            return self._framed_title(b"\x1b[23;0t")
        return self._framed(self._paint_row())

    def _painted(self, row: int) -> bytes:
        """Returns what paints the cleared row as the session left it; nothing when that is blank."""
        assert self._model is not None
        painted = self._model.row_vt(row)
        return b"" if re.compile(_UNSTYLED_BLANKS).fullmatch(painted) else painted

    def _paint_row(self) -> bytes:
        return b"\x1b[%d;1H\x1b[m\x1b[2K%b" % (self._row + 1, self._painted(self._row))

    def _framed(self, drawn: bytes) -> bytes:
        """Returns `drawn` between what makes it safe and what puts charset, style, cursor and parser back.

        Not with ESC 7 and 8: that slot belongs to the program.
        """
        assert self._model is not None
        row, column, wraps = self._model.cursor()
        plain, style = self._modes.plain, self._modes.as_was + self._model.pen_vt()
        place = b"\x1b[%d;%dH"
        start = column + wraps - cells(self._last)
        if self._last and start >= 0:
            # Printing the last character again also makes the cursor wait to wrap, and gives REP what it repeats.
            back = style + place % (row + 1, start + 1) + self._last.encode()
        elif wraps:
            # Only writing the last column again makes the cursor wait there; the row is as it was.
            back = place % (row + 1, 1) + self._model.row_vt(row) + style
        else:
            back = place % (row + 1, column + 1) + style
        # A sequence that is cut is ended first.
        begin = b"\x1b\\" if self._unfinished else b""
        return b"".join((begin, plain, drawn, back, self._unfinished))

    def _draw_title(self, elapsed: int) -> bytes:
        saved = b"" if self._shown else b"\x1b[22;0t"
        self._shown = 1
        return self._framed_title(saved + b"\x1b]0;" + self._text(elapsed).encode() + b"\x07")

    def _framed_title(self, written: bytes) -> bytes:
        begin = b"\x1b\\" if self._unfinished else b""
        return begin + written + self._unfinished

    def _erase_after_resize(self, cols: int, rows: int) -> bytes:
        """Leaves the row for the window title, because the terminal may have moved its rows.

        The line is cleared where it cannot have moved; elsewhere it goes when the program repaints for the new size.
        """
        erased = b""
        if self._row >= 0:
            if self._row < rows and (self._modes.alternate or rows == self._size[1]):
                # With ESC 7 and 8, because only the terminal knows where its cursor went.
                erased = b"\x1b\\\x1b7\x1b[%d;1H\x1b[m\x1b[2K\x1b8%b" % (self._row + 1, self._unfinished)
            self._forget()
            self._title = True
        self._size = (cols, rows)
        return erased


def _unknown_screen(cols: int, rows: int, saved: bytes, *, alternate: bool) -> bytes:
    """Returns what fills both screens with cells that count as unknown until the output overwrites or clears them.

    `saved` saves a cursor on each.
    """
    line = (_UNKNOWN_CELL * cols).encode()
    filled = b"\x1b[m" + b"".join(b"\x1b[%d;1H%b" % (row + 1, line) for row in range(rows)) + saved
    return b"\x1b[?47h" + filled + b"\x1b[?47l" + filled + (b"\x1b[?47h" if alternate else b"")


def _restored(data: bytes, position: int) -> int:
    """Returns where, after `position`, a cursor has been restored that was saved before it; 0 when none has."""
    found = re.compile(_SAVED).search(data, position)
    return found.end() if found and not found["save"] else 0


def _is_known(row: int, model: ScreenModel, other: ScreenModel) -> bool:
    return _UNKNOWN_CELL not in model.row_text(row) and model.row_vt(row) == other.row_vt(row)
