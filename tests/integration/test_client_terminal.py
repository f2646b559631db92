"""The terminal, on real PTYs: raw mode and its end, size, signals, writes that never block, and what is undone.

The program under test runs in a process of its own, with the PTY as its controlling terminal.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sterna.client.queries import REPLAY, QueryFilter
from sterna.client.terminal import (
    PIECE_MAX_BYTES,
    RESTORE_MAX_MS,
    ModeTracker,
    Terminal,
    TerminalGoneError,
)
from sterna.errors import UsageError
from sterna.limits import SIZE_MAX_CELLS
from sterna.pod.screen_ghostty import GhosttyTerminal
from tests.unit.test_client_status import COLS, ROWS, SCREENS, Session

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).parents[2] / "src"
WAIT_SECONDS = 20

PROGRAM = """
import fcntl, os, select, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests may ignore it (nohup)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from sterna.client.terminal import Terminal
with Terminal() as terminal:
    terminal.write(os.environ.get("OUTPUT", "").encode("latin-1") + b"ready %dx%d|" % terminal.size())
    if os.environ.get("FAIL"):
        raise RuntimeError("on purpose")
    poller = select.poll()
    poller.register(terminal.in_fd, select.POLLIN)
    poller.register(terminal.wake_fd, select.POLLIN)
    going = True
    while going:
        for fd, _ in poller.poll():
            if fd == terminal.wake_fd:
                if terminal.woken():
                    terminal.write(b"size %dx%d|" % terminal.size())
                continue
            typed = terminal.read()
            if not typed or b"q" in typed:
                going = False
            elif typed:
                terminal.write(b"typed %s|" % typed.hex().encode())
"""

# Sent whatever was seen: terminals take more forms of what turns the mouse on than we look for.
ALWAYS = b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l"


class Child:
    """PROGRAM on a PTY, which this process keeps open on both ends."""

    def __init__(self, **environ: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(80, 24)
        self.before = self.mode()
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=self.slave,
            stdout=self.slave,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": str(SOURCE), "PATH": os.defpath, **environ},
            start_new_session=True,
        )

    def resize(self, cols: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))

    def mode(self) -> list[Any]:
        return termios.tcgetattr(self.slave)

    def until(self, expected: bytes) -> bytes:
        deadline = time.monotonic() + WAIT_SECONDS
        while expected not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{expected!r} did not come, but {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65_536)
        before, _, self.seen = self.seen.partition(expected)
        return before

    def ended(self) -> int:
        return self.process.wait(WAIT_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        child.close()


def started(children: list[Child], **environ: str) -> Child:
    children.append(Child(**environ))
    return children[-1]


def test_raw_mode_passes_every_byte_and_ends(children: list[Child]) -> None:
    child = started(children)
    child.until(b"ready 80x24|")
    mode = child.mode()
    assert not mode[3] & (termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
    assert not mode[0] & (termios.ICRNL | termios.IXON | termios.ISTRIP)
    assert not mode[1] & termios.OPOST
    controls = bytes(byte for byte in range(256) if byte != ord("q"))
    os.write(child.master, controls)
    typed = b""
    while len(typed) < len(controls):
        child.until(b"typed ")
        typed += bytes.fromhex(child.until(b"|").decode())
    assert typed == controls
    os.write(child.master, b"q")
    assert child.ended() == 0
    assert child.mode() == child.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_signals_that_end_it_restore_the_terminal(children: list[Child], number: signal.Signals) -> None:
    child = started(children, OUTPUT="\x1b[?1049h\x1b[?2004h\x1b[?1006h")
    child.until(b"ready 80x24|")
    assert child.mode() != child.before
    child.process.send_signal(number)
    assert child.ended() == 128 + number
    assert child.mode() == child.before
    undone = child.until(b"\x1b[?1049l")
    assert b"\x1b[?1006l" in undone
    assert b"\x1b[?2004l" in undone


def test_the_control_a_killed_one_does_not(children: list[Child]) -> None:
    child = started(children)
    child.until(b"ready 80x24|")
    child.process.kill()
    assert child.ended() == -signal.SIGKILL
    assert child.mode() != child.before


def test_an_exception_restores_the_terminal(children: list[Child]) -> None:
    child = started(children, FAIL="1", OUTPUT="\x1b[?25l")
    assert child.ended() == 1
    assert child.mode() == child.before
    child.until(b"|\x1b\\" + ALWAYS + b"\x1b[?25h\x1b[2l\x1b[12h\x1b[m")


def test_resizes_wake_it(children: list[Child]) -> None:
    child = started(children)
    child.until(b"ready 80x24|")
    for cols, rows in ((100, 30), (1, 1), (80, 24)):
        child.resize(cols, rows)
        child.until(b"size %dx%d|" % (cols, rows))
    child.resize(5000, 6000)
    child.until(b"size %dx%d|" % (SIZE_MAX_CELLS, SIZE_MAX_CELLS))
    child.resize(0, 0)
    child.until(b"size 80x24|")


def test_after_sigcont_it_is_raw_again(children: list[Child]) -> None:
    child = started(children)
    child.until(b"ready 80x24|")
    raw = child.mode()
    child.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED | os.WNOWAIT)
    termios.tcsetattr(child.slave, termios.TCSANOW, child.before)
    child.process.send_signal(signal.SIGCONT)
    child.until(b"size 80x24|")
    assert child.mode() == raw


def test_it_ends_even_if_nobody_reads_the_terminal(children: list[Child]) -> None:
    child = started(children, OUTPUT="\x1b[?25l" + "x" * 100_000)
    select.select([child.master], [], [], WAIT_SECONDS)  # it has begun to write, and nothing is ever read
    began = time.monotonic()
    child.process.send_signal(signal.SIGTERM)
    child.process.wait(WAIT_SECONDS)
    assert time.monotonic() - began < RESTORE_MAX_MS / 1000 + 5
    assert child.mode() == child.before


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    for descriptor in (master, slave):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_writes_never_block_and_leave_shared_files_alone(pair: tuple[int, int]) -> None:
    master, slave = pair
    data = bytes(range(32, 127)) * 5_000
    with Terminal(slave, slave) as terminal:
        assert terminal.out_fd != slave
        assert os.get_blocking(slave)
        sent = 0
        while written := terminal.write(data[sent:]):
            sent += written
        assert 0 < sent < len(data)
        received = b""
        while sent < len(data):
            received += os.read(master, 65_536)
            sent += terminal.write(data[sent : sent + 3 * PIECE_MAX_BYTES])
        while len(received) < len(data):
            received += os.read(master, 65_536)
        assert received == data
    assert os.get_blocking(slave)


def test_output_that_is_no_terminal(pair: tuple[int, int]) -> None:
    reading, writing = os.pipe()
    try:
        with Terminal(pair[1], writing) as terminal:
            assert terminal.out_fd == writing
            data = b"x" * 200_000
            sent = terminal.write(data)
            assert 0 < sent < len(data)
            assert terminal.write(data) == 0
            assert not terminal.write_all(data, 20)
            assert len(os.read(reading, 1_000_000)) >= sent
            assert terminal.write_all(b"y" * 1000, 1000)
            assert terminal.size() == (80, 24)
        assert os.get_blocking(writing)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_terminal_that_is_gone(pair: tuple[int, int]) -> None:
    with Terminal(pair[1], pair[1]) as terminal:
        os.close(pair[0])
        assert terminal.read() == b""
        with pytest.raises(TerminalGoneError):
            terminal.write(b"x")


def test_input_that_is_no_terminal_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(UsageError):
            Terminal(reading, writing)
    finally:
        os.close(reading)
        os.close(writing)


def test_signal_handlers_come_back(pair: tuple[int, int]) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Terminal(pair[1], pair[1]):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before[0]
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


LEFT_ON = {
    "vim": b"\x1b[?1049h\x1b[22;0;0t\x1b[>4;2m\x1b[?1h\x1b=\x1b[?2004h"
    b"\x1b[?1004h\x1b[1;24r\x1b[?12h\x1b[?25l\x1b[?1006;1002h",
    "kitty keyboard": b"\x1b[>1u\x1b[?1049h\x1b[>5u\x1b[>7u",
    "line drawing": b"\x1b(0lqk\x1b)0\x0e",
    "scroll region": b"\x1b[3;10r\x1b[?6h",
    "style": b"\x1b[1;31;44mtext",
    "insert, no wrap": b"\x1b[4h\x1b[?7l\x1b[20h",
    "colours": b"\x1b]11;rgb:ff/00/00\x07\x1b]12;red\x1b\\\x1b]4;1;blue\x07",
    "cursor shape": b"\x1b[5 q",
    "link": b"\x1b]8;;http://example.org\x1b\\link",
    "reverse video": b"\x1b[?5h",
    "cut in a title": b"\x1b[?25l\x1b]0;titl",
}


@pytest.mark.parametrize("output", LEFT_ON.values(), ids=LEFT_ON)
def test_undo_brings_the_engine_back(output: bytes) -> None:
    terminal, fresh, modes = GhosttyTerminal(80, 24), GhosttyTerminal(80, 24), ModeTracker()
    modes.feed(output)
    terminal.feed(output + modes.undo())
    for known in (terminal, fresh):
        known.feed(b"\x1b[H\x1b[2J\x1b7x\x1b]0;title\x07")
    assert terminal.snapshot(scrollback=False) == fresh.snapshot(scrollback=False)
    # The control: without it something stays.
    terminal.feed(output)
    terminal.feed(b"\x1b[H\x1b[2J\x1b7x\x1b]0;title\x07")
    assert terminal.snapshot(scrollback=False) != fresh.snapshot(scrollback=False)


def test_nothing_is_undone_that_was_not_seen() -> None:
    modes = ModeTracker()
    modes.feed(b"plain text\r\n")
    assert modes.undo() == b""
    modes.feed(b"\x1b[1mbold\x1b[m\x1b[?25l\x1b[?25h")
    assert modes.undo() == b"\x1b\\" + ALWAYS + b"\x1b[2l\x1b[12h\x1b[m"


@pytest.fixture
def tmux() -> Iterator[list[str]]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    name = f"sterna-{secrets.token_hex(6)}"
    server = ["tmux", "-f", "/dev/null", "-L", name]
    yield server
    subprocess.run([*server, "kill-server"], check=False, timeout=WAIT_SECONDS, capture_output=True)
    # tmux leaves its socket behind.
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(os.environ.get("TMUX_TMPDIR", "/tmp"), f"tmux-{os.getuid()}", name))


def asked(tmux: list[str], *words: str) -> str:
    return subprocess.run([*tmux, *words], check=True, timeout=WAIT_SECONDS, capture_output=True, text=True).stdout


def shown_by(tmux: list[str], name: str, path: Path, output: bytes) -> tuple[str, str]:
    """Returns what a tmux pane shows after `output`, with styles, and where its cursor is."""
    path.write_bytes(output + b"\x1b]2;all shown\x07")
    size = ["-x", str(COLS), "-y", str(ROWS)]
    asked(tmux, "new-session", "-d", "-s", name, *size, f"stty raw -echo; cat '{path}'; exec sleep 600")
    asked(tmux, "set-option", "-t", name, "status", "off")
    asked(tmux, "resize-window", "-t", name, *size)
    deadline = time.monotonic() + WAIT_SECONDS
    while "all shown" not in asked(tmux, "display-message", "-p", "-t", name, "#{pane_title}"):
        assert time.monotonic() < deadline
    cursor = asked(tmux, "display-message", "-p", "-t", name, "#{cursor_x},#{cursor_y},#{insert_flag},#{wrap_flag}")
    return asked(tmux, "capture-pane", "-p", "-e", "-t", name), cursor


@pytest.mark.parametrize(
    "screen",
    [
        "a prompt",
        "all rows used",
        "waiting to wrap",
        "line drawing",
        "insert mode",
        "wide characters",
        "cut before REP",
    ],
)
def test_tmux_shows_no_trace_of_the_status_line(tmux: list[str], tmp_path: Path, screen: str) -> None:
    session = Session()
    session.output(SCREENS[screen])
    written = session.trouble(3)
    erased = session.over()
    more = b"bX\x1b[1mY\x1b8Z"
    untouched = shown_by(tmux, "untouched", tmp_path / "untouched", SCREENS[screen] + more)
    assert shown_by(tmux, "erased", tmp_path / "erased", SCREENS[screen] + written + erased + more) == untouched
    # The control: it was there.
    drawn, _ = shown_by(tmux, "drawn", tmp_path / "drawn", SCREENS[screen] + written)
    assert "sterna: reconnecting to host … 3 s" in drawn


def test_tmux_answers_live_queries_but_sees_no_replayed_ones(tmux: list[str]) -> None:
    """The control for the query filter: a real terminal does answer what passes live, and not what passes replayed."""
    queries = b"\x1b[c\x1b[6n\x1b[>c\x1b[5n\x1b[>q"
    printing = (
        "import os,select,sys,termios,tty;tty.setraw(0);data=bytes.fromhex(sys.argv[1]);answer=b'';"
        "os.write(1,data+b'\\x1b[6n');"
        'exec(\'while answer.count(b"R")<1+data.count(b"[6n"): answer+=os.read(0,4096)\');'
        "os.write(1,b'\\r\\nanswers='+str(len(answer.split(b'\\x1b'))-1).encode()+b'.');select.select([],[],[])"
    )
    # XTVERSION's answer ends in ESC \\, so five answers and the one to the last CPR hold seven ESC.
    filter_ = QueryFilter(REPLAY)
    replayed = filter_.feed(queries) + filter_.flush()
    for name, data, answers in (("live", queries, 7), ("replay", replayed, 1)):
        command = [sys.executable, "-c", printing, data.hex() or "20"]
        asked(tmux, "new-session", "-d", "-s", name, "-x", "80", "-y", "24", *command)
        deadline = time.monotonic() + WAIT_SECONDS
        shown = ""
        while "answers=" not in shown and time.monotonic() < deadline:
            shown = asked(tmux, "capture-pane", "-p", "-t", name)
        assert f"answers={answers}." in shown
