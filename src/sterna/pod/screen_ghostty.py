"""The terminal engine on libghostty-vt: fast, exact, and able to pack itself into a few hundred bytes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import struct
import threading
import weakref
from typing import TYPE_CHECKING, Final

from sterna import limits
from sterna.pod import libghostty as vt
from sterna.pod.snapshot import (
    ALT_SCREEN_MODES,
    MODES,
    Cursor,
    Pen,
    Row,
    Run,
    ScreenState,
    TerminalState,
    write_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

SCROLLBACK_MAX_BYTES: Final = 32 * 1024 * 1024
CONTINUATION_MAX_BYTES: Final = 64 * 1024
_UNLIMITED_LINES: Final = 1 << 40
_CELL_BYTES: Final = 10
_PAGE_BYTES: Final = 512 * 1024
# A page with some 2,000 colours or more: how long it is when it is packed, and how large when it is not.
_COLORFUL_BYTES: Final = 56 * 1024
_COLORFUL_PAGE_BYTES: Final = 2560 * 1024
_SLACK_BYTES: Final = 4 * 1024 * 1024  # pages are dropped as a whole
_UNLIMITED_BYTES: Final = 1 << 40
_PIECES_MAX: Final = 512
APC_MAX_BYTES: Final = 64 * 1024
_NAME: Final = b"sterna"
_HOLLOW: Final = 3  # a cursor shape that no program can ask for: it marks "the terminal's own default"
_KITTY_STACK: Final = 8

# Where the fields of a cell are (libghostty._CELL_BITS).
_CONTENT = (1 << 24) - 1
_CODEPOINT = (1 << 21) - 1
_STYLE = ((1 << 16) - 1) << 26
_PROTECTED = 1 << 44
_HYPERLINK = 1 << 45


class _Replies(threading.local):
    """What the callbacks of the terminal that this thread is feeding have reported; feeding is never nested."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.bells = 0


_replies = _Replies()


def _take_reply(_terminal: int, _user: int, data: int, size: int) -> None:
    _replies.data += ctypes.string_at(data, size)


def _take_bell(_terminal: int, _user: int) -> None:
    _replies.bells += 1


def _tell_size(terminal: int, _user: int, out: ctypes._Pointer[vt.SizeReport]) -> bool:
    lib = vt.load()
    value = ctypes.c_uint16()
    lib.terminal_get(terminal, vt.DATA_COLS, ctypes.byref(value))
    out[0].columns = value.value
    lib.terminal_get(terminal, vt.DATA_ROWS, ctypes.byref(value))
    out[0].rows = value.value
    # A cell's size is a guess: nobody looks on, and programs only need the ratio.
    out[0].cell_width, out[0].cell_height = 8, 16
    return True


_on_reply = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_take_reply)
_on_bell = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(_take_bell)
_on_size = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(vt.SizeReport))(_tell_size)


class _TooMuchError(Exception):
    """There is more to draw than a snapshot may hold."""


class GhosttyTerminal:
    """A terminal of `cols` x `rows` cells that keeps at most `scrollback_lines` lines above its screen.

    Raises libghostty.EngineMissingError if the library is not there.
    """

    __slots__ = (
        "__weakref__", "_free", "_handle", "_lib", "_packed_line_bytes", "_pieces", "bells", "cols",
        "rows", "scrollback_lines",
    )  # fmt: skip

    def __init__(
        self, cols: int, rows: int, scrollback_lines: int = limits.SCROLLBACK_LINES, *, packed: bytes | None = None
    ) -> None:
        self._lib = vt.load()
        self.cols = cols
        self.rows = rows
        self.scrollback_lines = scrollback_lines
        self.bells = 0
        # How many lines each piece of what is above the screen had when it was packed, the oldest first.
        self._pieces: list[int] = []
        if packed is not None:
            packed, self._pieces = _take_pieces(packed)
        self._packed_line_bytes = len(packed or b"") // max(sum(self._pieces), 1)
        self._handle: int = self._new() if packed is None else self._decode(packed)
        self._free = weakref.finalize(self, self._lib.terminal_free, self._handle)
        self._set_options()
        if packed is None:
            # The new default for the cursor's shape counts from the next time that a program asks for it.
            self._write(b"\x1b[0 q")

    def _new(self) -> int:
        handle = ctypes.c_void_p()
        if self._lib.terminal_new(None, ctypes.byref(handle), self.cols, self.rows) or not handle.value:
            raise MemoryError("no memory for a terminal")
        return handle.value

    def _decode(self, packed: bytes) -> int:
        decoder, handle = ctypes.c_void_p(), ctypes.c_void_p()
        if self._lib.snapshot_decoder_new_buf(None, ctypes.byref(decoder), packed, len(packed)):
            raise MemoryError("no memory for a terminal")
        try:
            bound, retain = ctypes.c_size_t(CONTINUATION_MAX_BYTES), ctypes.c_bool(True)
            self._lib.snapshot_decoder_set(decoder, 0, ctypes.byref(bound))
            self._lib.snapshot_decoder_set(decoder, 1, ctypes.byref(retain))
            if self._lib.snapshot_decoder_decode(decoder, ctypes.byref(handle)) or not handle.value:
                raise ValueError("these bytes are no packed terminal")
            return handle.value
        finally:
            self._lib.snapshot_decoder_free(decoder)

    def _set_options(self) -> None:
        for option, value in (
            # A limit in lines makes the engine allocate and free a page for every few lines: 4 MB/s where a limit in
            # bytes, which reuses the oldest page, gives 55 (measured with lines of one character).
            (vt.OPT_SCROLLBACK_MAX_LINES, ctypes.c_size_t(_UNLIMITED_LINES)),
            (vt.OPT_SCROLLBACK_MAX_BYTES, ctypes.c_size_t(self._scrollback_bytes())),
            (vt.OPT_CONTINUATION_MAX_BYTES, ctypes.c_size_t(CONTINUATION_MAX_BYTES)),
            (vt.OPT_APC_MAX_BYTES, ctypes.c_size_t(APC_MAX_BYTES)),
            (vt.OPT_KITTY_IMAGE_STORAGE_LIMIT, ctypes.c_uint64(0)),
            (vt.OPT_DEFAULT_CURSOR_STYLE, ctypes.c_int(_HOLLOW)),
        ):
            if self._lib.terminal_set(self._handle, option, ctypes.byref(value)):
                raise ValueError(f"libghostty-vt refused option {option}")
        for option, function in ((vt.OPT_WRITE_PTY, _on_reply), (vt.OPT_BELL, _on_bell), (vt.OPT_SIZE, _on_size)):
            self._lib.terminal_set(self._handle, option, ctypes.cast(function, ctypes.c_void_p))

    def _scrollback_bytes(self) -> int:
        """Returns about how many bytes `scrollback_lines` lines of this width take, and what is wasted beside them.

        Packing makes a piece of its own of what has scrolled out since the last time, and unpacking gives each piece
        whole pages: without that allowance 16 pieces would be all that is kept, be they of one line each.
        """
        size = min(max(self.scrollback_lines * self.cols * _CELL_BYTES, _PAGE_BYTES), SCROLLBACK_MAX_BYTES)
        if self._pieces:
            size += _SLACK_BYTES + sum(map(self._waste_bytes, self._pieces))
        return size

    def _waste_bytes(self, lines: int) -> int:
        """Returns how much a piece takes beside its lines; most of that is never touched. The figures are measured."""
        packed = lines * self._packed_line_bytes
        page = _PAGE_BYTES if packed < _COLORFUL_BYTES else _COLORFUL_PAGE_BYTES
        return max(page - lines * self.cols * 8 - 2 * packed, 0)

    def _limit_scrollback(self, size: int) -> None:
        value = ctypes.c_size_t(size)
        self._lib.terminal_set(self._handle, vt.OPT_SCROLLBACK_MAX_BYTES, ctypes.byref(value))

    def _trim_pieces(self) -> None:
        """Takes back the allowance for pieces that are older than `scrollback_lines` lines."""
        surplus = self._number(vt.DATA_SCROLLBACK_ROWS, ctypes.c_size_t) - self.scrollback_lines
        if surplus <= 0:
            return
        while self._pieces and self._pieces[0] <= surplus:
            surplus -= self._pieces.pop(0)
        self._limit_scrollback(self._scrollback_bytes())

    def _count_pieces(self) -> list[int]:
        """Returns the pieces that packing makes now; on the alternate screen the lines of the last are not known."""
        pieces = self._pieces[:]
        if self._number(vt.DATA_ACTIVE_SCREEN, ctypes.c_int) == 1:
            pieces.append(0)
        else:
            gone = sum(pieces) - self._number(vt.DATA_SCROLLBACK_ROWS, ctypes.c_size_t)
            while pieces and gone >= pieces[0]:
                gone -= pieces.pop(0)
            if gone < 0:
                pieces.append(-gone)
            elif pieces:
                pieces[0] -= gone
        if len(pieces) > _PIECES_MAX:
            pieces[:2] = [pieces[0] + pieces[1]]
        return pieces

    def _write(self, data: bytes) -> None:
        self._lib.terminal_vt_write(self._handle, data, len(data))

    def feed(self, data: bytes) -> bytes:
        """Takes what the program has written; returns the terminal's answers to the queries in it."""
        self._lib.terminal_vt_write(self._handle, data, len(data))
        if self._pieces:
            self._trim_pieces()
        if _replies.bells:
            self.bells += _replies.bells
            _replies.bells = 0
        if _replies.data:
            answers = bytes(_replies.data)
            _replies.data.clear()
            return answers
        return b""

    def resize(self, cols: int, rows: int) -> None:
        """Changes the size in cells; the main screen's lines are wrapped anew, as Ghostty does."""
        if (cols, rows) == (self.cols, self.rows):
            return
        # In one step with fewer columns, new rows would come empty from below, and not from what has scrolled out.
        steps = [(self.cols, rows), (cols, rows)] if rows > self.rows and cols < self.cols else [(cols, rows)]
        for size in steps:
            if self._lib.terminal_resize(self._handle, *size, 8, 16):
                raise MemoryError("no memory for a terminal of another size")
        if cols != self.cols:
            self._pieces = []  # the lines were wrapped anew, into new pages
        self.cols, self.rows = cols, rows
        _replies.data.clear()

    def at_ground(self) -> bool:
        """Says whether the parser is between sequences and characters."""
        return self._flag(vt.DATA_VT_GROUND)

    def scrolls(self) -> bool:
        """Says whether lines move through the whole screen: there are no margins."""
        return not self._extra("scrolling_region")

    def pack(self) -> bytes:
        """Returns everything about this terminal, an unfinished sequence included, for `packed` of a new one."""
        size = ctypes.c_size_t()
        # The limit is packed as well, and whoever unpacks this would drop lines before it can be raised.
        self._limit_scrollback(_UNLIMITED_BYTES)
        try:
            self._lib.snapshot_encode_buf(self._handle, None, 0, ctypes.byref(size))
            buffer = ctypes.create_string_buffer(size.value)
            if self._lib.snapshot_encode_buf(self._handle, buffer, size.value, ctypes.byref(size)):
                raise MemoryError("a terminal could not be packed")
        finally:
            self._limit_scrollback(self._scrollback_bytes() + (0 if self._pieces else _SLACK_BYTES))
        pieces = self._count_pieces()
        return b"".join((buffer.raw[: size.value], struct.pack(f"<{len(pieces)}IH", *pieces, len(pieces))))

    def title(self) -> str:
        """Returns the window title that the program has set, as it set it."""
        return self._string(vt.DATA_TITLE).decode("utf-8", "replace")

    def cursor(self) -> tuple[int, int]:
        """Returns the cursor's column and row, from 0."""
        return self._number(vt.DATA_CURSOR_X), self._number(vt.DATA_CURSOR_Y)

    def mode(self, number: int, *, ansi: bool = False) -> bool:
        """Says whether a DEC private mode, or an ANSI mode, is set."""
        config = vt.ModeConfig(mode=number | (0x8000 if ansi else 0))
        return not self._lib.terminal_get(self._handle, vt.DATA_MODE, ctypes.byref(config)) and bool(config.value)

    def text(self, *, scrollback: bool = False) -> str:
        """Returns the screen's lines, with those above it if asked, without trailing blanks."""
        return "\n".join(row.text().rstrip() for row in self.cells(scrollback=scrollback))

    def cells(self, *, scrollback: bool = False) -> list[Row]:
        """Returns the rows of the screen, with those above it if asked."""
        return list(self._rows(self._above() if scrollback else 0))

    def _above(self) -> int:
        # The library keeps lines in pages and may hold one more than it was told.
        return min(self._number(vt.DATA_SCROLLBACK_ROWS, ctypes.c_size_t), self.scrollback_lines)

    def _drawable(self, *, scrollback: bool) -> list[Row]:
        """Returns `cells`; _TooMuchError once the rows are more than a snapshot may be, before they are drawn."""
        if not scrollback:
            return self.cells()
        rows: list[Row] = []
        room = limits.SNAPSHOT_MAX_BYTES
        with contextlib.closing(self._rows(self._above())) as source:
            for row in source:
                rows.append(row)
                room -= _drawn_bytes(row)
                if room < 0:
                    raise _TooMuchError
        return rows

    def snapshot(self, *, scrollback: bool = True, final: bool = False) -> bytes:
        """Returns what repaints this terminal on any other of the same size; see `sterna.pod.snapshot`.

        `final` says that nothing is written after it: then it is for other sizes as well.
        An unfinished sequence or character comes last, so that what follows in the output goes on with it. What would
        be larger than a snapshot may be is given up as soon as that is clear, and the screen drawn alone.
        """
        rest = b"" if final else self._continuation()
        if scrollback:
            try:
                data = write_snapshot(self.state(final=final)) + rest
            except _TooMuchError:
                data = b""
            if 0 < len(data) <= limits.SNAPSHOT_MAX_BYTES:
                return data
        return write_snapshot(self.state(scrollback=False, final=final)) + rest

    def _continuation(self) -> bytes:
        if self.at_ground():
            return b""
        size = ctypes.c_size_t()
        self._lib.terminal_continuation_buf(self._handle, None, 0, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value or 1)
        self._lib.terminal_continuation_buf(self._handle, buffer, size.value, ctypes.byref(size))
        return buffer.raw[: size.value]

    def state(self, *, scrollback: bool = True, final: bool = False) -> TerminalState:
        """Returns everything that a snapshot tells; hidden parts are tried out on a copy.

        Raises _TooMuchError if that is more than a snapshot may be, with scroll-back.
        """
        probe = GhosttyTerminal(self.cols, self.rows, self.scrollback_lines, packed=self.pack())
        # Ends an unfinished sequence; an unfinished character shows as U+FFFD then, but only on the copy.
        probe._write(b"\x18")
        alternate = self._number(vt.DATA_ACTIVE_SCREEN, ctypes.c_int) == 1
        active = self._screen_state(probe, scrollback=scrollback and not alternate)
        if alternate:
            probe._write(b"\x1b[?1049l")
            state = TerminalState(self.cols, self.rows, probe._screen_state(probe, scrollback=scrollback))
            state.alternate = active
            state.entered = next((m for m in ALT_SCREEN_MODES if self.mode(m)), 47)
        else:
            state = TerminalState(self.cols, self.rows, active)
        state.scrollback, state.final = scrollback, final
        state.modes = {number: self.mode(number) for number in MODES}
        state.ansi_modes = {number: self.mode(number, ansi=True) for number in (4, 20)}
        state.title = self._string(vt.DATA_TITLE)
        state.pwd = self._string(vt.DATA_PWD).rstrip(b"\0")
        state.margins = self._extra("scrolling_region")
        state.margin_top, state.margin_left = _margin_start(state.margins)
        state.tab_stops = self._extra("tabstops").removesuffix(b"\x1b[H")
        state.modify_keys = self._extra("keyboard")
        state.colors = self._colors()
        state.saved_modes = probe._saved_modes()
        if self._continuation()[:1] < b"\x80":
            state.written_last = probe._written_last()
        probe.close()
        return state

    def close(self) -> None:
        """Frees the library's memory now; the object must not be used again."""
        self._free()

    def _screen_state(self, probe: GhosttyTerminal, *, scrollback: bool) -> ScreenState:
        """Reads the active screen, and tries out on the copy `probe` what is saved there."""
        rows, cursor, shape = self._drawable(scrollback=scrollback), self._cursor(), self._shape()
        probe._write(b"\x1b8")
        saved = probe._cursor()
        flags = []
        for _ in range(_KITTY_STACK):
            flags.append(probe._number(vt.DATA_KITTY_KEYBOARD_FLAGS, ctypes.c_uint8))
            probe._write(b"\x1b[<u")
        while flags and not flags[-1]:
            flags.pop()
        return ScreenState(rows, cursor, saved, flags[::-1], shape)

    def _cursor(self) -> Cursor:
        x, y = self.cursor()
        pen = Pen(
            self._extra("style", screen=True),
            self._extra("hyperlink", screen=True),
            self._extra("protection", screen=True),
            # Explicitly designated ASCII and the library's default UTF-8 behave alike.
            _ASCII_SETS.sub(b"", self._extra("charsets", screen=True)),
        )
        return Cursor(x, y, self._flag(vt.DATA_CURSOR_PENDING_WRAP), self.mode(6), pen)

    def _saved_modes(self) -> dict[int, bool]:
        """Returns what XTRESTORE gives for each mode."""
        numbers = [n for n in MODES if n != 2048]
        self._write(b"".join(b"\x1b[?%dr" % n for n in numbers))
        _replies.data.clear()
        return {n: self.mode(n) for n in numbers}

    def _written_last(self) -> str:
        """Returns the character that REP repeats, tried out on an erased row."""
        self._write(b"\x1b[?69l\x1b[r\x1b[?6l\x1b[4l\x1b(B\x1b)B\x0f\x1b[H\x1b[2K\x1b[b")
        run = self.cells()[0].runs[0]
        return run.text

    def _shape(self) -> int:
        """Returns the parameter of DECSCUSR that gives the cursor's shape."""
        with _RenderState(self, 0) as render:
            cursor = vt.CursorState(size=ctypes.sizeof(vt.CursorState))
            self._lib.render_state_get(render.handle, vt.RENDER_CURSOR, ctypes.byref(cursor))
        if cursor.shape == _HOLLOW:
            return 0
        base = {1: 1, 2: 3, 0: 5}[cursor.shape]
        return base if cursor.blinking else base + 1

    def _colors(self) -> bytes:
        """Returns the OSC sequences for colours that the program has changed."""
        now, default = ctypes.create_string_buffer(768), ctypes.create_string_buffer(768)
        self._lib.terminal_get(self._handle, vt.DATA_COLOR_PALETTE, now)
        self._lib.terminal_get(self._handle, vt.DATA_COLOR_PALETTE_DEFAULT, default)
        out = bytearray()
        if now.raw != default.raw:
            for index in range(256):
                color = now.raw[index * 3 : index * 3 + 3]
                if color != default.raw[index * 3 : index * 3 + 3]:
                    out += b"\x1b]4;%d;rgb:%02x/%02x/%02x\x1b\\" % (index, *color)
        rgb = ctypes.create_string_buffer(3)
        for number, key in ((10, vt.DATA_COLOR_FOREGROUND), (11, vt.DATA_COLOR_BACKGROUND), (12, vt.DATA_COLOR_CURSOR)):
            if not self._lib.terminal_get(self._handle, key, rgb):
                out += b"\x1b]%d;rgb:%02x/%02x/%02x\x1b\\" % (number, *rgb.raw)
        return bytes(out)

    def _rows(self, above: int) -> Generator[Row]:
        with _RenderState(self, above) as render:
            yield from render.rows()

    def hyperlink(self, x: int, y: int) -> bytes:
        """Returns the URI of the link at a cell; `y` counts from the oldest line kept."""
        ref = vt.GridRef(size=ctypes.sizeof(vt.GridRef))
        if self._lib.terminal_grid_ref(self._handle, vt.Point(tag=vt.POINT_SCREEN, x=x, y=y), ctypes.byref(ref)):
            return b""
        size = ctypes.c_size_t()
        buffer = ctypes.create_string_buffer(limits.CONTROL_MAX_BYTES)
        if self._lib.grid_ref_hyperlink_uri(ctypes.byref(ref), buffer, len(buffer), ctypes.byref(size)):
            return b""
        return buffer.raw[: size.value]

    def _number(self, key: int, kind: type[ctypes._SimpleCData[int]] = ctypes.c_uint16) -> int:
        value = kind()
        self._lib.terminal_get(self._handle, key, ctypes.byref(value))
        return int(value.value)

    def _flag(self, key: int) -> bool:
        value = ctypes.c_bool()
        self._lib.terminal_get(self._handle, key, ctypes.byref(value))
        return value.value

    def _string(self, key: int) -> bytes:
        value = vt.String()
        self._lib.terminal_get(self._handle, key, ctypes.byref(value))
        return value.value()

    def _extra(self, name: str, *, screen: bool = False) -> bytes:
        """Returns the sequences by which the library's formatter restores one part of the state.

        The formatter writes them before or after the content, here the first cell only, which is known.
        """
        plain = self._format("")
        whole = self._format(name, screen=screen)
        return whole.removeprefix(plain) if whole.startswith(plain) else whole.removesuffix(plain)

    def _format(self, name: str, *, screen: bool = False) -> bytes:
        first = vt.GridRef(size=ctypes.sizeof(vt.GridRef))
        self._lib.terminal_grid_ref(self._handle, vt.Point(tag=0, x=0, y=0), ctypes.byref(first))
        selection = vt.Selection(size=ctypes.sizeof(vt.Selection), start=first, end=first)
        extra = vt.TerminalExtra(
            size=ctypes.sizeof(vt.TerminalExtra), screen=vt.ScreenExtra(size=ctypes.sizeof(vt.ScreenExtra))
        )
        if name:
            setattr(extra.screen if screen else extra, name, True)
        options = vt.FormatterOptions(
            size=ctypes.sizeof(vt.FormatterOptions), emit=vt.FORMAT_VT, extra=extra, selection=ctypes.pointer(selection)
        )
        formatter = ctypes.c_void_p()
        if self._lib.formatter_terminal_new(None, ctypes.byref(formatter), self._handle, options):
            raise MemoryError("no memory for a formatter")
        try:
            size = ctypes.c_size_t()
            self._lib.formatter_format_buf(formatter, None, 0, ctypes.byref(size))
            buffer = ctypes.create_string_buffer(size.value or 1)
            self._lib.formatter_format_buf(formatter, buffer, size.value, ctypes.byref(size))
            return buffer.raw[: size.value]
        finally:
            self._lib.formatter_free(formatter)


class _RenderState:
    """The library's view of the screen and `above` rows over it, for as long as the with-block lasts."""

    def __init__(self, terminal: GhosttyTerminal, above: int) -> None:
        self.terminal = terminal
        self.above = above
        self.lib = terminal._lib
        self.handle = ctypes.c_void_p()
        self.iterator = ctypes.c_void_p()
        self.row_cells = ctypes.c_void_p()

    def __enter__(self) -> _RenderState:
        lib = self.lib
        failed = lib.render_state_new(None, ctypes.byref(self.handle))
        failed |= lib.render_state_row_iterator_new(None, ctypes.byref(self.iterator))
        failed |= lib.render_state_row_cells_new(None, ctypes.byref(self.row_cells))
        if failed:
            raise MemoryError("no memory to read a terminal")
        overscan = vt.Overscan(above=min(self.above, 65_535))
        lib.render_state_set(self.handle, vt.RENDER_OPTION_OVERSCAN, ctypes.byref(overscan))
        lib.render_state_update(self.handle, self.terminal._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.render_state_row_cells_free(self.row_cells)
        self.lib.render_state_row_iterator_free(self.iterator)
        self.lib.render_state_free(self.handle)

    def rows(self) -> Iterator[Row]:
        """Yields the rows from the top."""
        lib = self.lib
        lib.render_state_get(self.handle, vt.RENDER_ROW_ITERATOR, ctypes.byref(self.iterator))
        view, raw, flag = vt.CellsView(), ctypes.c_uint64(), ctypes.c_bool()
        history = self.terminal._number(vt.DATA_SCROLLBACK_ROWS, ctypes.c_size_t)
        y = history - self.above
        while lib.render_state_row_iterator_next(self.iterator):
            lib.render_state_row_get(self.iterator, vt.ROW_CELLS_RAW, ctypes.byref(view))
            lib.render_state_row_get(self.iterator, vt.ROW_RAW, ctypes.byref(raw))
            lib.row_get(raw.value, vt.ROW_DATA_WRAP, ctypes.byref(flag))
            yield self._row(ctypes.string_at(view.ptr, view.len * 8), y, wrapped=flag.value)
            y += 1

    def _row(self, raw: bytes, y: int, *, wrapped: bool) -> Row:
        count = len(raw) // 8
        plain, simple, look, codepoints = _masks(count)
        whole = int.from_bytes(raw, "little")
        if not whole & simple:
            lanes = memoryview((whole >> 2 & codepoints).to_bytes(len(raw), "little")).cast("I")[::2]
            text = lanes.tobytes().decode("utf-32-le", "replace")
            if not whole & plain:
                return Row.plain(text, wrapped=wrapped)
            return self._styled(raw, text, whole & look, wrapped=wrapped)
        self.lib.render_state_row_get(self.iterator, vt.ROW_CELLS, ctypes.byref(self.row_cells))
        cells = memoryview(raw).cast("Q").tolist()
        runs: list[Run] = []
        last_key, narrow = -1, False
        run = Run("", 0)
        for x, cell in enumerate(cells):
            tag, wide = cell & 3, cell >> 42 & 3
            if wide == 2:
                continue
            key = cell & _LOOK
            if tag > 1:
                key |= cell & (_CONTENT << 2 | 3)
            character = chr(cell >> 2 & _CODEPOINT) if tag < 2 and cell >> 2 & _CODEPOINT else ""
            if tag == 1:
                character = self._grapheme(x)
            simple = tag != 1 and wide != 1
            if key == last_key and simple and narrow and bool(character) is bool(run.text) and not cell & _HYPERLINK:
                run.text += character
                run.width += 1
                continue
            run = self._run(x, y, cell, character)
            runs.append(run)
            last_key, narrow = key, simple
        return Row(_joined(runs), wrapped=wrapped, spacer=cells[-1] >> 42 & 3 == 3)

    def _styled(self, raw: bytes, text: str, looks: int, *, wrapped: bool) -> Row:
        """Makes a row of narrow characters: a run ends where a cell's look differs from its neighbour's."""
        self.lib.render_state_row_get(self.iterator, vt.ROW_CELLS, ctypes.byref(self.row_cells))
        cells = memoryview(raw).cast("Q")
        changes = memoryview((looks ^ looks >> 64).to_bytes(len(raw), "little")).cast("Q").tolist()
        ends = [x for x, change in enumerate(changes, 1) if change]
        if not ends or ends[-1] != len(cells):
            ends.append(len(cells))
        runs: list[Run] = []
        start = 0
        for end in ends:
            cell = cells[start]
            style, background = self._style(start) if cell & _STYLE else (b"", b"")
            for part in _GAPS.split(text[start:end]):
                if not part:
                    continue
                if part[0] == "\0":
                    runs.append(Run("", len(part), b"", background))
                else:
                    runs.append(Run(part, len(part), style, background, protected=bool(cell & _PROTECTED)))
            start = end
        return Row(_joined(runs), wrapped=wrapped)

    def _run(self, x: int, y: int, cell: int, character: str) -> Run:
        style = background = b""
        if cell & _STYLE:
            style, background = self._style(x)
        if cell & 3 == 2:
            background = _palette(cell >> 2 & 0xFF, 48)
        elif cell & 3 == 3:
            background = b";48;2;%d;%d;%d" % (cell >> 2 & 0xFF, cell >> 10 & 0xFF, cell >> 18 & 0xFF)
        if not character:
            # Of a blank only the background is seen.
            return Run("", 1, b"", background)
        link = self.terminal.hyperlink(x, y) if cell & _HYPERLINK else b""
        width = 2 if cell >> 42 & 3 == 1 else 1
        cluster = width == 2 or cell & 3 == 1
        return Run(character, width, style, background, link, protected=bool(cell & _PROTECTED), cluster=cluster)

    def _grapheme(self, x: int) -> str:
        """Returns the characters that share one cell."""
        self.lib.render_state_row_cells_select(self.row_cells, x)
        data = ctypes.create_string_buffer(1024)
        buffer = vt.Buffer(ptr=ctypes.cast(data, ctypes.c_void_p), cap=len(data))
        self.lib.render_state_row_cells_get(self.row_cells, vt.CELLS_GRAPHEMES_UTF8, ctypes.byref(buffer))
        return data.raw[: buffer.len].decode("utf-8", "replace")

    def _style(self, x: int) -> tuple[bytes, bytes]:
        """Returns the SGR parameters of a cell, each with a semicolon before it, and those of its background."""
        self.lib.render_state_row_cells_select(self.row_cells, x)
        style = vt.Style(size=ctypes.sizeof(vt.Style))
        self.lib.render_state_row_cells_get(self.row_cells, vt.CELLS_STYLE, ctypes.byref(style))
        out = bytearray()
        for index, parameter in enumerate(_FLAG_PARAMETERS):
            if style.flags[index]:
                out += parameter
        if style.underline:
            out += b";4" if style.underline == 1 else b";4:%d" % style.underline
        out += _color(style.fg, 38) + _color(style.underline_color, 58)
        return bytes(out), _color(style.bg, 48)


# In the order of GhosttyStyle: bold, italic, faint, blink, inverse, invisible, strikethrough, overline.
_FLAG_PARAMETERS: Final = (b";1", b";3", b";2", b";5", b";7", b";8", b";9", b";53")
_LOOK: Final = _STYLE | _PROTECTED | _HYPERLINK


_GAPS: Final = re.compile("(\0+)")
_ASCII_SETS: Final = re.compile(rb"\x1b[()*+]B")


@functools.cache
def _masks(count: int) -> tuple[int, int, int, int]:
    """Returns the bits of a row of `count` cells that a plain one and a simple one have not set, and others.

    A plain row is unstyled, a simple one has only narrow single characters without links. The others are the bits
    of a cell's look and of its character.
    """
    lane = sum(1 << 64 * i for i in range(count))
    special = 3 | _HYPERLINK | 3 << 42
    return lane * (special | _LOOK), lane * special, lane * _LOOK, lane * _CODEPOINT


def _color(color: vt.StyleColor, base: int) -> bytes:
    if color.tag == 1:
        return _palette(color.value[0], base)
    if color.tag == 2:
        red, green, blue = color.value[:3]
        return b";58:2::%d:%d:%d" % (red, green, blue) if base == 58 else b";%d;2;%d;%d;%d" % (base, red, green, blue)
    return b""


def _palette(index: int, base: int) -> bytes:
    if base == 58:
        # Colons keep an unknown underline colour from being read as attributes of their own.
        return b";58:5:%d" % index
    if index > 15:
        return b";%d;5;%d" % (base, index)
    return b";%d" % (base - 8 + index if index < 8 else base + 44 + index)


def _joined(runs: list[Run]) -> list[Run]:
    """Joins neighbours that look alike though the library keeps them apart; clusters stay alone."""
    out: list[Run] = []
    for run in runs:
        if (
            out
            and bool(out[-1].text) is bool(run.text)
            and not (run.cluster or out[-1].cluster)
            and out[-1].look() == run.look()
        ):
            out[-1].text += run.text
            out[-1].width += run.width
        else:
            out.append(run)
    return out


def _take_pieces(packed: bytes) -> tuple[bytes, list[int]]:
    """Returns what the library packed, and the pieces that `pack` wrote behind that."""
    count = int.from_bytes(packed[-2:], "little")
    at = len(packed) - 2 - 4 * count
    if at < 0:
        raise ValueError("these bytes are no packed terminal")
    return packed[:at], list(struct.unpack_from(f"<{count}I", packed, at))


def _drawn_bytes(row: Row) -> int:
    """Returns how many bytes a row takes at least when it is drawn: its text and the changes of its look."""
    runs = row.runs
    if runs and not runs[-1].text:
        runs = runs[:-1]
    size, look = 0, b""
    for run in runs:
        size += len(run.text)
        sgr = run.style + run.background
        if sgr != look:
            size += 4 + len(sgr)
            look = sgr
    return size


def _margin_start(margins: bytes) -> tuple[int, int]:
    """Returns the top and left margins, from 0, out of the sequences that set them."""
    top = re.search(rb"\x1b\[(\d+);\d+r", margins)
    left = re.search(rb"\x1b\[(\d+);\d+s", margins)
    return int(top[1]) - 1 if top else 0, int(left[1]) - 1 if left else 0
