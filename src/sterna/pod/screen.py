"""The screen of a session: what its terminal shows, kept cheaply until somebody wants it (docs/protocol.md, section 4).

`open_terminal` gives an engine, libghostty-vt or, where that is missing, pyte. `LazyScreen` is what a session owns: it
only collects bytes while its program prints, feeds an engine when the program rests, and packs the engine away.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Final, Protocol

from sterna import limits
from sterna.pod.plain import PlainTail, plain_from
from sterna.protocol.compress import compress, decompress

if TYPE_CHECKING:
    from sterna.pod.snapshot import Row

PENDING_MAX_BYTES: Final = 128 * 1024
PLAIN_MAX_BYTES: Final = 512 * 1024
KEEP_BYTES: Final = 16 * 1024
_PACKED_MAX_BYTES: Final = 256 * 1024 * 1024


class Terminal(Protocol):
    """A terminal engine: bytes in, answers, cells and a snapshot out. Columns and rows count from 0."""

    cols: int
    rows: int
    scrollback_lines: int
    bells: int

    def feed(self, data: bytes) -> bytes:
        """Takes what the program has written; returns the terminal's answers to the queries in it."""

    def resize(self, cols: int, rows: int) -> None:
        """Changes the size in cells."""

    def at_ground(self) -> bool:
        """Says whether the parser is between sequences and characters."""

    def scrolls(self) -> bool:
        """Says whether lines move through the whole screen: there are no margins."""

    def snapshot(self, *, scrollback: bool = True, final: bool = False) -> bytes:
        """Returns what repaints this terminal on any other of the same size; see `sterna.pod.snapshot`."""

    def pack(self) -> bytes | None:
        """Returns everything about this terminal for `open_terminal`, None if the engine cannot do that."""

    def title(self) -> str:
        """Returns the window title that the program has set, as it set it: clean it before it is shown."""

    def cursor(self) -> tuple[int, int]:
        """Returns the cursor's column and row."""

    def mode(self, number: int, *, ansi: bool = False) -> bool:
        """Says whether a DEC private mode, or an ANSI mode, is set."""

    def text(self, *, scrollback: bool = False) -> str:
        """Returns the screen's lines, with those above it if asked, without trailing blanks."""

    def cells(self, *, scrollback: bool = False) -> list[Row]:
        """Returns the rows of the screen, with those above it if asked."""

    def close(self) -> None:
        """Frees the engine's memory; the object must not be used again."""


@functools.cache
def engine_name() -> str:
    """Returns which engine this machine has: `ghostty` or `pyte`."""
    from sterna.pod import libghostty

    try:
        libghostty.load()
    except libghostty.EngineMissingError:
        return "pyte"
    return "ghostty"


def open_terminal(
    cols: int, rows: int, scrollback_lines: int = limits.SCROLLBACK_LINES, *, packed: bytes | None = None
) -> Terminal:
    """Returns a new terminal of `cols` x `rows` cells, or the one that `pack` of the same engine has packed."""
    if engine_name() == "ghostty":
        from sterna.pod.screen_ghostty import GhosttyTerminal

        return GhosttyTerminal(cols, rows, scrollback_lines, packed=packed)
    from sterna.pod.screen_pyte import PyteTerminal

    return PyteTerminal(cols, rows, scrollback_lines)


class LazyScreen:
    """A session's screen: bytes wait here until the engine is wanted or the program rests.

    `cols` and `rows` are in cells, `scrollback_lines` is how many lines are kept above the screen. The owner looks at
    `due` after `feed` and has another thread `catch_up` when it is set: the engine works outside the
    interpreter's lock, so that neither keys nor signals wait for it. All methods may be called from any thread.
    """

    __slots__ = (
        "_answers",
        "_checked",
        "_engine",
        "_fed",
        "_lock",
        "_packed",
        "_pending",
        "_silent",
        "_tail",
        "_unfinished",
        "_written",
        "cols",
        "rows",
        "scrollback_lines",
    )

    def __init__(self, cols: int, rows: int, scrollback_lines: int = limits.SCROLLBACK_LINES) -> None:
        self.cols = min(max(cols, 1), limits.SIZE_MAX_CELLS)
        self.rows = min(max(rows, 1), limits.SIZE_MAX_CELLS)
        self.scrollback_lines = scrollback_lines
        self._engine: Terminal | None = None
        self._packed: bytes | None = None
        self._pending = bytearray()
        self._tail = PlainTail()
        self._answers = b""
        self._checked = 0
        # Counts of bytes: all that were written, how many of them the engine has got, and up to where nobody answers.
        self._written = self._fed = self._silent = 0
        self._unfinished = False
        self._lock = threading.RLock()

    def feed(self, data: bytes) -> None:
        """Takes what the program has written."""
        self._pending += data
        self._written += len(data)

    @property
    def backlog(self) -> int:
        """How many bytes the engine has not got yet."""
        return len(self._pending)

    @property
    def due(self) -> bool:
        """Whether so much waits that `catch_up` should be called; it costs little in the midst of plain text."""
        return len(self._pending) >= (PLAIN_MAX_BYTES if self._tail else PENDING_MAX_BYTES)

    @property
    def resting(self) -> bool:
        """Whether `idle` would find nothing to do."""
        return self._engine is None and len(self._pending) <= KEEP_BYTES

    def catch_up(self) -> None:
        """Feeds the engine with what is waiting, but for the end of plain text: more may come, and make it needless."""
        with self._lock:
            engine = self._unpacked()
            pending = self._take()
            start = plain_from(pending)
            if start:
                self._give(engine, pending[:start])
            if start == len(pending):
                return
            if self._tail or (engine.at_ground() and engine.scrolls()):
                self._fed += len(pending) - start
                self._tail.add(pending[start:], self.scrollback_lines + 2 * self.rows)
                if self._tail.full:
                    engine.feed(self._tail.take())
            else:
                self._give(engine, pending[start:])

    def idle(self) -> None:
        """Works off what is waiting, if it is much, and packs the engine away: call it when the program rests."""
        with self._lock:
            if self.resting:
                return
            engine = self._settle()
            packed = engine.pack()
            if packed is not None:
                self._packed = compress(packed)
                self._unfinished = not engine.at_ground()
                self._engine = None
                engine.close()

    def resize(self, cols: int, rows: int) -> None:
        """Changes the size in cells, after all that was written before."""
        cols = min(max(cols, 1), limits.SIZE_MAX_CELLS)
        rows = min(max(rows, 1), limits.SIZE_MAX_CELLS)
        with self._lock:
            if (cols, rows) == (self.cols, self.rows):
                return
            if self._pending or self._packed is not None or self._engine is not None:
                self._settle().resize(cols, rows)
            self.cols, self.rows = cols, rows

    def replies(self) -> bytes:
        """Returns the terminal's answers to queries since the last call, and forgets them.

        Call it after each `feed` while nobody is attached and write the answer to the program.
        """
        with self._lock:
            pending = self._pending
            if (
                self._unfinished
                or pending.find(b"\x1b", self._checked) >= 0
                or pending.find(b"\x05", self._checked) >= 0
            ):
                self._settle()
            self._checked = len(self._pending)
            answers, self._answers = self._answers, b""
            return b"" if self._silent >= self._fed else answers

    def forget_replies(self) -> None:
        """Leaves all queries so far unanswered, as the terminal of who is attached answers them; waits for nothing.

        Call it from where `feed` is called.
        """
        self._silent = self._written

    def answer_queries(self, data: bytes) -> bytes:
        """Takes what the program has written and returns the answers to the queries in it, to no others."""
        self.forget_replies()
        self.feed(data)
        return self.replies()

    def at_ground(self) -> bool:
        """Says whether the output so far ends between sequences and characters."""
        with self._lock:
            return self._settle().at_ground()

    def snapshot(self, scrollback: bool = True, *, final: bool = False) -> bytes:
        """Returns what repaints the screen as it is after all output so far, on any terminal of the same size.

        With `scrollback` the lines above the screen too. If the whole would be larger than a snapshot may be, it is
        without them. Output that follows may be written after it, even if a sequence or character is unfinished.
        """
        with self._lock:
            engine = self._settle()
            data = engine.snapshot(scrollback=scrollback, final=final)
            if scrollback and len(data) > limits.SNAPSHOT_MAX_BYTES:
                return engine.snapshot(scrollback=False, final=final)
            return data

    def copy(self) -> ScreenCopy | None:
        """Returns the screen as it is after all output so far, to be drawn while this one goes on.

        That takes some milliseconds, however much there is to draw. None if the engine cannot be packed.
        """
        with self._lock:
            packed = self._settle().pack()
            return None if packed is None else ScreenCopy(self.cols, self.rows, self.scrollback_lines, packed)

    def text(self, *, scrollback: bool = False) -> str:
        """Returns the screen's lines, with those above it if asked, without trailing blanks."""
        with self._lock:
            return self._settle().text(scrollback=scrollback)

    def title(self) -> str:
        """Returns the window title as the program has set it: clean it before it is shown."""
        with self._lock:
            return self._settle().title()

    def bells(self) -> int:
        """Returns how often the program rang since the engine was last unpacked."""
        with self._lock:
            return self._settle().bells

    def _settle(self) -> Terminal:
        """Returns the engine, fed with everything."""
        engine = self._unpacked()
        pending = self._take()
        if pending or self._tail:
            self._give(engine, pending)
        return engine

    def _unpacked(self) -> Terminal:
        engine = self._engine
        if engine is None:
            packed = None if self._packed is None else decompress(self._packed, _PACKED_MAX_BYTES)
            engine = self._engine = open_terminal(self.cols, self.rows, self.scrollback_lines, packed=packed)
            self._packed = None
        return engine

    def _take(self) -> bytes:
        """Returns what waits, in one step: `feed` goes on beside us."""
        pending, self._pending = self._pending, bytearray()
        self._checked = 0
        return bytes(pending)

    def _give(self, engine: Terminal, data: bytes) -> None:
        if self._tail:
            engine.feed(self._tail.take())
        silent = self._silent - self._fed
        if silent >= 0:
            # What an unfinished query asks is answered by who is there when it ends.
            engine.feed(data[:silent])
            self._answers = b""
        answers = engine.feed(data[max(silent, 0) :])
        self._fed += len(data)
        # What a program asks in vain must not pile up: the newest answers are worth most.
        self._answers = (self._answers + answers)[-limits.CONTROL_MAX_BYTES :]
        self._unfinished = not engine.at_ground()


class ScreenCopy:
    """A session's screen as it was at one moment; one thread draws it."""

    __slots__ = ("_engine", "_packed", "_size")

    def __init__(self, cols: int, rows: int, scrollback_lines: int, packed: bytes) -> None:
        self._size = cols, rows, scrollback_lines
        self._packed = packed
        self._engine: Terminal | None = None

    def snapshot(self, scrollback: bool = True, *, final: bool = False) -> bytes:
        """Returns what `LazyScreen.snapshot` would have returned at that moment."""
        if self._engine is None:
            self._engine, self._packed = open_terminal(*self._size, packed=self._packed), b""
        return self._engine.snapshot(scrollback=scrollback, final=final)

    def close(self) -> None:
        """Frees the memory; the object must not be used again."""
        if self._engine is not None:
            self._engine.close()
