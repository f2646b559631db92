"""The user's terminal: raw mode, size, signals, careful writes, and undoing what the session may have left on.

Sources: termios(3), tty_ioctl(4), signal(7), xterm's ctlseqs, the kitty keyboard protocol.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import termios
import time
from typing import TYPE_CHECKING, Any

from sterna.errors import Code, SternaError, UsageError
from sterna.limits import SIZE_MAX_CELLS
from sterna.units import MILLISECOND

if TYPE_CHECKING:
    from types import FrameType, TracebackType

PIECE_MAX_BYTES = 16_384
BLOCKING_PIECE_MAX_BYTES = 512  # a descriptor that poll() calls writable takes this much without blocking for long
READ_MAX_BYTES = 65_536
RESTORE_MAX_MS = 500
SEQUENCE_CARRIED_MAX_BYTES = 4_096  # without what terminals skip in it; parameters beyond are cut off
DEFAULT_SIZE = (80, 24)

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

# C0 controls that terminals skip or carry out inside a sequence; DEL is skipped too.
_C0 = rb"[\x00-\x17\x19\x1c-\x1f\x7f]"
_PARAMETERS = rb"[\x00-\x17\x19\x1c-\x3f\x7f]*+"
_NUMBER = rb"[\x00-\x06\x08-\x17\x19\x1c-\x1f\x7f0-9]*+"
# The sequences that full screens are made of are left out early: that is several times as fast.
_UNCOMMON = rb"\x1b(?!\[[0-;]*+(?:m|[HKJABCDGLMPXd]))"
_MODES = (
    _UNCOMMON + rb"(?:"
    rb"\[\?(?P<private>[0-9;]*+)(?P<set>[hlsr])"
    rb"|\[(?P<ansi>[0-9;]+)(?P<on>[hl])"
    rb"|\[(?P<region>[0-9;]*)r"
    rb"|\[(?P<shape>[0-9]*) q"
    rb"|\[(?P<kitty>[<>=])(?P<flags>[0-9;]*)u"
    rb"|\[>(?P<resource>[0-9]+)(?P<modifier>;[0-9]*)?m"
    rb"|(?P<soft>\[!p)|(?P<full>c)|(?P<keypad>[=>])"
    rb"|(?P<slot>[()*+])(?P<charset>[0-~])"
    rb"|\]0*(?:(?P<colour>4|1[0-2]);(?!\?|\Z)|1(?P<default>04|1[0-2])(?=[;\x07\x1b])|(?P<link>8;))"
    rb"|(?P<save>7|\[s)|(?P<restore>8|\[u)"
    # Any of these with controls in it: the only match without a group.
    rb"|(?:(?=(?:\]?[0-9]*+|[\[()*+]?[\x20-\x3f]*+)" + _C0 + rb")" + _C0 + rb"*+"
    rb"(?:\[" + _PARAMETERS + rb"[hlmpqrsu]|\]" + _NUMBER + rb"(?=;)|[()*+]" + _C0 + rb"*+[0-~]|[c=>78]))"
    rb")"
)
_SHIFTS_AND_MODES = rb"(?P<shift>[\x0e\x0f])|" + _MODES
# What may become one of these; what a sequence in the middle of a string is introduced by ends the string.
_UNFINISHED = rb"\x1b" + _C0 + rb"*+(?:\[" + _PARAMETERS + rb"|\]" + _NUMBER + rb";?|[()*+]" + _C0 + rb"*+)?\Z"
# xterm, VTE and WezTerm obey UTF-8 encoded C1 controls. Like a control inside, a NUL marks what not all obey.
_C1 = rb"\xc2(?:[\x9b-\x9d]|\Z)"
_AS_C0 = ((b"\xc2\x9b", b"\x1b\0["), (b"\xc2\x9d", b"\x1b\0]"), (b"\xc2\x9c", b"\x1b\\"))
_CONTROLS = bytes((*range(0x20), 0x7F))
_SHIFT_OUT = 0x0E
_BUT_SHIFTS = bytes(byte for byte in range(0x100) if byte not in b"\x0e\x0f")
_NUMBER_MAX_BYTES = 5
_LEADING_ZEROS = rb"(?<![0-9])0+(?=[0-9])"

_CURSOR_KEYS, _REVERSE, _ORIGIN, _WRAP, _CURSOR, _MARGINS, _SYNCHRONIZED = 1, 5, 6, 7, 25, 69, 2026
_ANSI_NOT_VT52, _REPEAT = 2, 8
_MOUSE_AND_FOCUS = frozenset((9, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016))
_SCREENS = (47, 1047, 1049)
_SAVING = (1048, 1049)
_KEYS_AND_REPORTS = (66, 2004, 2031, 2048, 9001)
_OFF_AT_FIRST = frozenset(
    (_CURSOR_KEYS, _REVERSE, _ORIGIN, _MARGINS, *_MOUSE_AND_FOCUS, *_KEYS_AND_REPORTS, _SYNCHRONIZED, *_SCREENS)
)
_ON_AT_FIRST = frozenset((_ANSI_NOT_VT52, _REPEAT, _WRAP, _CURSOR))
_INSERT, _NEWLINE = 4, 20
# Undone whatever was seen, as it does no harm: mouse reports, a locked keyboard (KAM), local echo (SRM reset).
_ALWAYS_OFF = frozenset((1000, 1002, 1003, 1006))
_ALWAYS = b"\x1b[2l\x1b[12h"


class TerminalGoneError(SternaError):
    """The terminal that the program was attached to does not exist any more (closed window, lost login)."""

    code = Code.TIMEOUT


class ModeTracker:
    """Knows which modes the output so far may have left on, from one regex search per piece of output.

    Any split of the output gives the same result. A mode that may be on counts as on: what only some terminals obey
    (controls inside a sequence, C1 controls in UTF-8, XTRESTORE) turns modes on, but none off.
    """

    __slots__ = (
        "_ansi", "_carried", "_charsets", "_colours", "_keypad", "_kitty_depth", "_kitty_set", "_link", "_replay",
        "_resources", "_saved", "_seen", "_shape", "_shifted", "_stored", "_unsure", "changed", "region",
    )  # fmt: skip

    def __init__(self) -> None:
        self._carried = b""
        self._seen = False
        self._stored: dict[int, bool] = {}  # by XTSAVE: whether a private mode was not as at first
        self._reset()

    def _reset(self) -> None:
        self.changed: set[int] = set()  # private modes that are not as a terminal has them at first
        self.region = b""  # the scroll region's parameters; it is one for both screens
        self._ansi: set[int] = set()
        self._charsets: dict[bytes, bytes] = {}
        self._colours: set[bytes] = set()
        self._keypad = False
        self._kitty_depth = {False: 0, True: 0}
        self._kitty_set: set[bool] = set()
        self._link = False
        self._replay: bytes | None = None
        self._resources: set[bytes] = set()
        self._saved: dict[bool, tuple[bool, dict[bytes, bytes], bool]] = {}  # by "alternate screen?", as DECSC does
        self._shape = False
        self._shifted = False
        self._unsure = False

    @property
    def alternate(self) -> bool:
        """Whether the alternate screen is shown."""
        return not self.changed.isdisjoint(_SCREENS)

    @property
    def addressable(self) -> bool:
        """Whether any cell can be addressed and written: no origin mode, no left and right margins, nothing unsure."""
        return not self._unsure and _ORIGIN not in self.changed and _MARGINS not in self.changed

    @property
    def appends(self) -> bool:
        """Whether a printed character goes where the cursor is and the cursor behind it: no insert mode, autowrap."""
        return _INSERT not in self._ansi and _WRAP not in self.changed

    @property
    def plain(self) -> bytes:
        """What makes written text appear as it is: no insert mode, no line-drawing charset, no link."""
        parts = [b"\x1b(B"] if self._charsets.get(b"(") else []
        parts += [b"\x0f"] if self._shifted else []
        parts += [b"\x1b[4l"] if _INSERT in self._ansi else []
        parts += [b"\x1b]8;;\x07"] if self._link else []
        return b"".join(parts)

    @property
    def as_was(self) -> bytes:
        """What undoes `plain`, but for a link, which belongs to the style."""
        charset = self._charsets.get(b"(")
        parts = [b"\x1b(" + charset] if charset else []
        parts += [b"\x0e"] if self._shifted else []
        parts += [b"\x1b[4h"] if _INSERT in self._ansi else []
        return b"".join(parts)

    @property
    def replay(self) -> bytes:
        """What gives a terminal as it is at first the modes that matter to where output appears, but for the screen."""
        if self._replay is None:
            self._replay = self._make_replay()
        return self._replay

    def _make_replay(self) -> bytes:
        parts = [b"\x1b%b%b" % item for item in sorted(self._charsets.items()) if item[1]]
        parts += [b"\x0e"] if self._shifted else []
        parts += [b"\x1b[%dh" % number for number in sorted(self._ansi)]
        parts += [b"\x1b[?7l"] if _WRAP in self.changed else []
        # Where these may be on, nothing is drawn; they only have to be noticed. Both move the cursor.
        parts += [b"\x1b[?%dh" % number for number in (_ORIGIN, _MARGINS) if number in self.changed]
        parts += [b"\x1b7\x1b[%br\x1b8" % self.region] if self.region else []
        return b"".join(parts)

    def feed(self, data: bytes) -> None:
        """Takes output as it was written to the terminal."""
        if self._carried:
            data, self._carried = self._carried + data, b""
        if b"\xc2" in data and re.compile(_C1).search(data):
            if data.endswith(b"\xc2"):
                self._carried, data = b"\xc2", data[:-1]
            for encoded, meant in _AS_C0:
                data = data.replace(encoded, meant)
        shifts = self._shifted or b"\x0e" in data
        if not shifts and b"\x1b" not in data:
            return
        self._seen = True
        first = None if shifts else re.compile(_UNCOMMON).search(data)
        if not shifts and first is None:
            return
        pattern = re.compile(_SHIFTS_AND_MODES if shifts else _MODES)
        for found in pattern.finditer(data, first.start() if first else 0):
            if found.lastgroup is None:
                self._note_odd(found[0])
            else:
                self._note(found)
        start = data.rfind(b"\x1b")
        if start >= 0 and re.compile(_UNFINISHED).match(data, start):
            self._carried = _normal(data[start:])[:SEQUENCE_CARRIED_MAX_BYTES] + self._carried

    def _note_odd(self, sequence: bytes) -> None:
        """Notes a sequence with controls in it: the shifts are carried out, the others ignored."""
        for control in sequence.translate(None, _BUT_SHIFTS):
            self._shifted = control == _SHIFT_OUT
        # What follows the number of an OSC is a semicolon and not yet known.
        found = re.compile(_MODES).match(sequence[:1] + sequence.translate(None, _CONTROLS) + b";_")
        if found:
            self._note(found, sure=False)

    def _note(self, found: re.Match[bytes], *, sure: bool = True) -> None:
        self._replay = None
        if found.lastgroup == "shift":
            self._shifted = found["shift"] == b"\x0e"
        elif found["set"]:
            self._note_private(found["set"], _numbers(found["private"]), sure)
        elif found["ansi"]:
            self._note_ansi(found["on"] == b"h", _numbers(found["ansi"]), sure)
        elif found["region"] is not None:
            region = found["region"].strip(b";") and re.sub(_LEADING_ZEROS, b"", found["region"])
            self.region = region if sure else region or self.region
        elif found["shape"] is not None:
            self._shape = bool(found["shape"].strip(b"0")) or (self._shape and not sure)
        elif found["kitty"]:
            self._note_kitty(found["kitty"], found["flags"], sure)
        elif found["resource"]:
            resource = found["resource"].lstrip(b"0")[:_NUMBER_MAX_BYTES] or b"0"
            if (found["modifier"] or b"").strip(b";0"):
                self._resources.add(resource)
            elif sure:
                self._resources.discard(resource)
        elif found["slot"]:
            if sure or found["charset"] != b"B":
                self._charsets[found["slot"]] = b"" if found["charset"] == b"B" else found["charset"]
        elif found["colour"]:
            self._colours.add(found["colour"])
        elif found["keypad"]:
            self._keypad = found["keypad"] == b"=" or (self._keypad and not sure)
        elif found["link"]:
            self._link = True
        elif found["soft"]:
            # Terminals differ in what DECSTR resets, so what was on may be on.
            self._unsure |= bool(self.changed or self._ansi or any(self._charsets.values()) or self._shifted)
        elif found["save"]:
            self._save()
        elif found["restore"]:
            self._restore()
        elif sure and found["default"]:
            self._colours.discard(b"4" if found["default"] == b"04" else found["default"])
        elif sure and found["full"]:
            self._reset()

    def _save(self) -> None:
        self._saved[self.alternate] = (_ORIGIN in self.changed, dict(self._charsets), self._shifted)

    def _restore(self) -> None:
        origin, self._charsets, self._shifted = self._saved.get(self.alternate, (False, {}, False))
        self._charsets = dict(self._charsets)
        self._switch(_ORIGIN, origin)

    def _note_private(self, action: bytes, numbers: list[int], sure: bool) -> None:
        if action in b"hl":
            for number in numbers:
                self._switch(number, action == b"h", sure)
        elif action == b"s":
            for number in numbers or (_OFF_AT_FIRST | _ON_AT_FIRST):
                if number in _OFF_AT_FIRST or number in _ON_AT_FIRST:
                    self._stored[number] = number in self.changed or (not sure and self._stored.get(number, False))
        else:
            for number in numbers or sorted(self._stored):
                # What was never stored is off then, in xterm.
                if self._stored.get(number, number in _ON_AT_FIRST):
                    self._switch(number, number in _OFF_AT_FIRST, False)

    def _note_ansi(self, on: bool, numbers: list[int], sure: bool) -> None:
        named = {number for number in numbers if number in (_INSERT, _NEWLINE)}
        if on:
            self._ansi |= named
        elif sure:
            self._ansi -= named

    def _switch(self, number: int, on: bool, sure: bool = True) -> None:
        """Notes a private mode; unless `sure`, it may also be what it was."""
        if number in _SAVING and on:
            self._save()
        if number in _OFF_AT_FIRST if on else number in _ON_AT_FIRST:
            self.changed.add(number)
        elif sure:
            self.changed.discard(number)
        if number in _SAVING and not on:
            self._restore()

    def _note_kitty(self, kind: bytes, flags: bytes, sure: bool) -> None:
        screen = self.alternate
        first = next(iter(_numbers(flags)), 0)
        if kind == b">":
            self._kitty_depth[screen] += 1
        elif kind == b"<":
            self._kitty_depth[screen] = max(0, self._kitty_depth[screen] - max(1, first) * sure)
        elif first:
            self._kitty_set.add(screen)
        elif sure:
            self._kitty_set.discard(screen)

    @property
    def noisy(self) -> bool:
        """Whether the terminal may have sent reports (mouse, focus) that nobody reads any more."""
        return not self.changed.isdisjoint(_MOUSE_AND_FOCUS)

    def undo(self) -> bytes:
        """Returns what brings the terminal back to its first state; nothing when no sequence was seen."""
        if not self._seen:
            return b""
        # ST ends a string that the output may have been cut in; elsewhere it does nothing.
        parts = [b"\x1b\\"]
        parts += [b"\x1b<"] if _ANSI_NOT_VT52 in self.changed else []
        off = sorted(_ALWAYS_OFF | self.changed & (_OFF_AT_FIRST - {_ORIGIN, _MARGINS, *_SCREENS}))
        parts += [b"\x1b[?%dl" % number for number in off]
        parts += [b"\x1b[?%dh" % number for number in sorted(self.changed & _ON_AT_FIRST)]
        parts += [_ALWAYS, *(b"\x1b[%dl" % number for number in sorted(self._ansi))]
        parts += [b"\x1b[>%bm" % resource for resource in sorted(self._resources)]
        parts += [b"\x1b>"] if self._keypad else []
        parts += [b"\x1b%bB" % slot for slot, charset in sorted(self._charsets.items()) if charset]
        parts += [b"\x0f"] if self._shifted else []
        parts += [b"\x1b[ q"] if self._shape else []
        parts += [b"\x1b]8;;\x07"] if self._link else []
        parts += [b"\x1b]1%b\x1b\\" % (b"04" if colour == b"4" else colour) for colour in sorted(self._colours)]
        parts.append(b"\x1b[m")
        region = [b"\x1b[?%dl" % number for number in (_ORIGIN, _MARGINS) if number in self.changed]
        region += [b"\x1b[r"] if self.region else []
        parts += region
        if self.alternate:
            parts.append(self._undo_kitty(True))
            parts += [b"\x1b[?%dl" % number for number in _SCREENS if number in self.changed]
        elif region:
            # That has moved the cursor to the top; a prompt belongs to the bottom.
            parts.append(b"\x1b[%d;1H" % SIZE_MAX_CELLS)
        parts.append(self._undo_kitty(False))
        return b"".join(parts)

    def _undo_kitty(self, screen: bool) -> bytes:
        popped = b"\x1b[<%du" % self._kitty_depth[screen] if self._kitty_depth[screen] else b""
        return popped + (b"\x1b[=0u" if screen in self._kitty_set else b"")


def _numbers(parameters: bytes) -> list[int]:
    parts = (part.lstrip(b"0") or part[:1] for part in parameters.split(b";"))
    return [int(part) for part in parts if 0 < len(part) <= _NUMBER_MAX_BYTES]


def _normal(sequence: bytes) -> bytes:
    """Returns an unfinished sequence without leading zeros and with one NUL, behind ESC, for all controls in it."""
    rest = sequence[1:].translate(None, _CONTROLS)
    return b"\x1b" + b"\0" * (len(rest) + 1 < len(sequence)) + re.sub(_LEADING_ZEROS, b"", rest)


class Terminal:
    """A terminal in raw mode, as a context manager; leaving restores it, also after SIGTERM, SIGHUP and exceptions.

    `in_fd` must be a terminal (`UsageError` otherwise); `out_fd` may be anything. SIGTERM and SIGHUP raise
    `SystemExit` (128 + signal) in the main thread, unless they are ignored; SIGCONT sets raw mode again. The files
    that the descriptors share with other processes keep their flags: output goes through a descriptor of our own.
    Use it in the main thread only.
    """

    __slots__ = (
        "_blocking",
        "_ending",
        "_guarded",
        "_handlers",
        "_in",
        "_out",
        "_own_out",
        "_saved",
        "_wake",
        "_wake_before",
        "modes",
        "parting",
    )

    def __init__(self, in_fd: int = 0, out_fd: int = 1) -> None:
        if not os.isatty(in_fd):
            raise UsageError("Standard input is not a terminal; use `sterna pipe` to connect pipes and files.")
        self._in = in_fd
        self._out = out_fd
        self._own_out = -1
        self._blocking = True
        self._guarded = False
        self._ending = 0
        self._saved: list[Any] = []
        self._handlers: dict[int, Any] = {}
        self._wake = (-1, -1)
        self._wake_before = -1
        self.modes = ModeTracker()
        self.parting = b""  # what is written last, after the modes are undone

    def __enter__(self) -> Terminal:
        self._saved = termios.tcgetattr(self._in)
        try:
            self._open_output()
            self._catch_signals()
            self._set_raw()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._leave()
        except SystemExit:  # a signal came before they were ignored
            self._leave()
            raise

    @property
    def in_fd(self) -> int:
        """The descriptor to poll for what is typed."""
        return self._in

    @property
    def out_fd(self) -> int:
        """The descriptor to poll for room when `write` took less than it was given."""
        return self._own_out if self._own_out >= 0 else self._out

    @property
    def wake_fd(self) -> int:
        """The descriptor that gets readable when a signal came; see `woken`."""
        return self._wake[0]

    def woken(self) -> bool:
        """Empties the wakeup descriptor; returns whether the size may have changed (SIGWINCH, SIGCONT)."""
        try:
            numbers = os.read(self._wake[0], 4096)
        except BlockingIOError:
            return False
        return signal.SIGWINCH in numbers or signal.SIGCONT in numbers

    def size(self) -> tuple[int, int]:
        """Returns columns and rows, each between 1 and SIZE_MAX_CELLS; DEFAULT_SIZE where nobody knows."""
        for descriptor in (self.out_fd, self._in):
            try:
                cols, rows = os.get_terminal_size(descriptor)
            except OSError:
                continue
            if cols > 0 and rows > 0:
                return min(cols, SIZE_MAX_CELLS), min(rows, SIZE_MAX_CELLS)
        return DEFAULT_SIZE

    def read(self) -> bytes | None:
        """Returns what was typed, at most READ_MAX_BYTES; nothing at the end (hangup); None when nothing is there."""
        try:
            return os.read(self._in, READ_MAX_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def write(self, data: bytes, start: int = 0) -> int:
        """Writes what the terminal takes of `data` from `start` on, without blocking; returns how many bytes that were.

        Raises `TerminalGoneError` when it is gone.
        """
        # What was written must be known before a signal may end the program, else it would not be undone.
        self._guarded = not self._blocking
        try:
            written = self._write(data, start)
            self.modes.feed(data if written == len(data) else data[start : start + written])
        finally:
            self._guarded = False
        if self._ending:
            raise SystemExit(128 + self._ending)
        return written

    def write_all(self, data: bytes, timeout_ms: int) -> bool:
        """Writes all of `data`, waiting at most `timeout_ms` milliseconds in total; returns whether all went out."""
        deadline = time.monotonic_ns() + timeout_ms * MILLISECOND
        poller = select.poll()
        poller.register(self.out_fd, select.POLLOUT)
        sent = 0
        while True:
            sent += self.write(data, sent)
            left_ms = (deadline - time.monotonic_ns()) // MILLISECOND
            if sent == len(data) or left_ms <= 0:
                return sent == len(data)
            poller.poll(left_ms)

    def _write(self, data: bytes, start: int) -> int:
        view = memoryview(data)[start:]
        written = 0
        piece = BLOCKING_PIECE_MAX_BYTES if self._blocking else PIECE_MAX_BYTES
        while written < len(view):
            if self._blocking and not _writable(self._out):
                break
            try:
                count = os.write(self.out_fd, view[written : written + piece])
            except BlockingIOError:
                break
            except OSError as error:
                raise TerminalGoneError("The terminal is gone; the session goes on, attach again to return.") from error
            written += count
            if count < piece:
                break
        return written

    def _open_output(self) -> None:
        """Opens the terminal once more: O_NONBLOCK on the shared open file would break the shell that started us."""
        with contextlib.suppress(OSError):
            path = os.ttyname(self._out)
            own = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            if os.fstat(own).st_rdev == os.fstat(self._out).st_rdev:
                self._own_out = own
                self._blocking = False
            else:
                os.close(own)

    def _set_raw(self) -> None:
        """Sets what cfmakeraw(3) sets, at once: waiting for output to drain could wait for ever."""
        mode = [*self._saved[:6], list(self._saved[6])]
        mode[0] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        mode[1] &= ~termios.OPOST
        mode[2] = (mode[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        mode[6][termios.VMIN] = 1
        mode[6][termios.VTIME] = 0
        termios.tcsetattr(self._in, termios.TCSANOW, mode)

    def _catch_signals(self) -> None:
        self._wake = os.pipe()
        for descriptor in self._wake:
            os.set_blocking(descriptor, False)
        self._wake_before = signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        for number in (signal.SIGWINCH, signal.SIGCONT, *_ENDING_SIGNALS):
            before = signal.getsignal(number)
            if number in _ENDING_SIGNALS and before == signal.SIG_IGN:
                continue
            self._handlers[number] = signal.SIG_DFL if before is None else before
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in _ENDING_SIGNALS:
            self._ending = number
            if not self._guarded:
                raise SystemExit(128 + number)
        if number == signal.SIGCONT:
            # Whoever had the terminal meanwhile (a shell's `fg`) has set its own mode.
            with contextlib.suppress(termios.error):
                self._set_raw()

    def _leave(self) -> None:
        for number in self._handlers:
            if number in _ENDING_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        self._ending = 0
        noisy = self.modes.noisy
        with contextlib.suppress(TerminalGoneError):
            self.write_all(self.modes.undo() + self.parting, RESTORE_MAX_MS)
        with contextlib.suppress(termios.error):
            if noisy:
                termios.tcflush(self._in, termios.TCIFLUSH)
            termios.tcsetattr(self._in, termios.TCSANOW, self._saved)
        if self._wake[0] >= 0:
            signal.set_wakeup_fd(self._wake_before)
            for descriptor in self._wake:
                os.close(descriptor)
            self._wake = (-1, -1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        if self._own_out >= 0:
            os.close(self._own_out)
            self._own_out = -1


def _writable(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    return bool(poller.poll(0))
