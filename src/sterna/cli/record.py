"""`sterna record` and `sterna play`: sessions as asciicast v3."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import click

from sterna.cli.options import node_options
from sterna.errors import RefusedError, StorageError, UsageError
from sterna.units import MILLISECOND, SECOND

if TYPE_CHECKING:
    from sterna.client.calls import Caller
    from sterna.client.cast import CastReader, CastWriter
    from sterna.client.endpoint import Endpoint
    from sterna.client.session import Wish
    from sterna.client.terminal import Terminal
    from sterna.protocol.client import Event

_SIZE_EVERY_SECONDS = 0.5
_WRITE_MS = 10_000
_QUIT = b"q\x03\x04Q"
_SPACE = 0x20
_DEFAULT_SIZE = (80, 24)
_TERM = "xterm-256color"


@click.command()
@click.argument("name", metavar="SESSION")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@node_options
def record(name: str, file: str, overwrite: bool, state: str | None, host: str | None, port: int | None) -> int:
    """Record SESSION into FILE as asciicast v3, until it ends or Ctrl-C.

    It looks on without typing, through any loss of the network; what it missed is marked. What others type is not
    recorded, only what the program shows. Play it with `sterna play FILE`, or with asciinema.
    """
    from sterna.cli.target import named_session

    exists = UsageError(f"{file} exists: choose another name, or --overwrite.")
    if not overwrite and os.path.lexists(file):
        raise exists
    endpoint, wish, about = named_session(name, state=state, host=host, port=port)
    try:
        fd = _make(file, overwrite)
    except FileExistsError:
        raise exists from None
    except OSError as error:
        raise StorageError(f"The recording {file} cannot be made: {error.strerror}.") from None
    try:
        return _Recorder(endpoint, wish, about, state, fd, file).run()
    finally:
        os.close(fd)


def _make(file: str, overwrite: bool) -> int:
    """Returns a descriptor of the new, empty `file`, which only its owner may read, whatever was there before.

    Raises UsageError if what is to be overwritten is no regular file of our own, FileExistsError, OSError.
    """
    if overwrite:
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{file} is no regular file, so it is not overwritten: choose another name.")
            if status.st_uid != os.geteuid():
                raise UsageError(
                    f"{file} belongs to user {status.st_uid}, so it is not overwritten: choose another name."
                )
            # Who has the old file open, or another name for it, shall not get the new one.
            os.unlink(file)
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # the umask may have taken bits of the owner
    return fd


class _Sizes(threading.Thread):
    """Asks the node, on a connection of its own, how large the session's terminal is; `size` is its last answer.

    Each change makes the descriptor `changed` readable, until `close`.
    """

    def __init__(self, endpoint: Endpoint, uid: str, state: str | None, size: tuple[int, int]) -> None:
        super().__init__(daemon=True)
        self._endpoint = endpoint
        self._uid = uid
        self._state = state
        self._wanted = threading.Event()
        self._stopped = threading.Event()
        self._asked = 0.0
        self.changed, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.size = size

    def ask(self) -> None:
        """Has the node asked once more, soon: the size may be another one."""
        self._wanted.set()

    def run(self) -> None:
        """Asks when it is told to; while the node cannot be reached the size stays as it was."""
        from sterna.client.calls import Caller
        from sterna.errors import SternaError

        while self._next():
            try:
                with Caller(self._endpoint, state=self._state) as caller:
                    self._answered(caller)
                    while self._next():
                        self._answered(caller)
            except SternaError:
                self.ask()
        os.close(self._write)

    def _next(self) -> bool:
        """Waits until the node is to be asked, not too often; False once it is not any more."""
        self._wanted.wait()
        self._stopped.wait(self._asked + _SIZE_EVERY_SECONDS - time.monotonic())
        self._wanted.clear()
        self._asked = time.monotonic()
        return not self._stopped.is_set()

    def _answered(self, caller: Caller) -> None:
        known, self.size = self.size, _size_of(caller.call("info", session=self._uid), self.size)
        if self.size != known:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._write, b".")

    def close(self) -> None:
        """Asks no more."""
        self._stopped.set()
        self._wanted.set()
        os.close(self.changed)


def _size_of(about: dict[str, Any], known: tuple[int, int]) -> tuple[int, int]:
    """Returns the size of a session's terminal: the node's word, else that of the first terminal that drives it."""
    candidates = [about, *(each for each in about.get("attachments", []) if each["mode"] == "drive")]
    for each in candidates:
        cols, rows = each.get("cols", 0), each.get("rows", 0)
        if cols and rows:
            return int(cols), int(rows)
    return known


class _Recorder:
    """A watching attachment whose output goes into a file."""

    def __init__(
        self, endpoint: Endpoint, wish: Wish, about: dict[str, Any], state: str | None, fd: int, path: str
    ) -> None:
        from sterna.client.cast import CastWriter
        from sterna.client.driver import PollDriver
        from sterna.client.session import make_machine

        size = _size_of(about, _DEFAULT_SIZE)
        self._name = str(about["name"])
        self._path = path
        self._writer: CastWriter = CastWriter(
            fd, path, *size, now=time.monotonic_ns(), wall_s=int(time.time()), title=self._name, term=_TERM
        )
        # As a terminal with a size of its own it gets a picture of the screen whenever the session has another one.
        self._machine = make_machine(endpoint, wish, state=state, size=size, term=_TERM, mode="watch")
        self._driver = PollDriver(self._machine, endpoint, self._event)
        self._sizes = _Sizes(endpoint, about["uid"], state, size)
        self._over = False
        self._error: RefusedError | None = None
        self._stopping = False

    def run(self) -> int:
        """Records until the session ends or the user stops it; returns the exit status, 0 if the recording is whole."""
        # Not an exception at any place: a line that was begun is written to its end.
        wake = os.pipe()
        for descriptor in wake:
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake[1])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._driver.watch(wake[0], select.POLLIN, lambda _events: self._stop(wake[0]))
        self._driver.watch(self._sizes.changed, select.POLLIN, lambda _events: self._resized())
        self._sizes.start()
        try:
            while not self._over:
                self._driver.turn()
        finally:
            self._driver.close()
            self._sizes.close()
            signal.set_wakeup_fd(-1)
            for descriptor in wake:
                os.close(descriptor)
        if self._error is not None:
            raise self._error
        return 0

    def _stop(self, fd: int) -> None:
        """Leaves politely on the first signal, at once on the second."""
        os.read(fd, 4096)
        if self._stopping:
            self._over = True
            return
        self._stopping = True
        now = time.monotonic_ns()
        self._writer.flush(now)
        self._machine.suspend(now)

    def _resized(self) -> None:
        os.read(self._sizes.changed, 4096)
        if not (self._stopping or self._over):
            self._writer.resize(*self._sizes.size, time.monotonic_ns())
            self._machine.resize(*self._sizes.size)

    def _event(self, event: Event) -> None:
        from sterna.protocol import client as machine

        # Who joins, leaves or types may bring another size; a picture and a program's output may come of one.
        self._sizes.ask()
        now = time.monotonic_ns()
        if isinstance(event, machine.Output):
            self._output(event.data, event.end, now)
        elif isinstance(event, machine.Opened):
            sys.stderr.write(f"Recording {self._name} into {self._path}; Ctrl-C ends it.\n")
        elif isinstance(event, machine.Screen):
            data = event.data
            if event.zstd:
                from sterna.protocol.compress import decompress

                data = decompress(data)
            self._output(data, event.position, now)
        elif isinstance(event, machine.Gap):
            self._writer.flush(now)
            self._writer.marker(f"{event.end - event.start} bytes of output are missing here", now)
        elif isinstance(event, machine.Ended):
            close = event.close
            if close.status is not None or close.signal is not None:
                self._writer.exit(close.status if close.status is not None else 128 + (close.signal or 0), now)
            else:
                self._writer.flush(now)
            self._over = True
        elif isinstance(event, machine.Suspended):
            self._over = True
        elif isinstance(event, machine.Failed):
            self._writer.flush(now)
            self._error = event.error
            self._over = True

    def _output(self, data: bytes, position: int, now: int) -> None:
        if not self._stopping:
            # A size that came with this output must stand before it.
            self._writer.resize(*self._sizes.size, now)
            self._writer.output(data, now)
        self._machine.handled(position, now)


# ---- play -------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "--speed", type=click.FloatRange(0.01, 1000), default=1.0, show_default=True, help="So many times as fast."
)
@click.option("--idle-limit", type=click.FloatRange(0), help="Wait at most so many seconds for the next event.")
def play(file: str, speed: float, idle_limit: float | None) -> None:
    """Play the recording FILE (asciicast v3) on this terminal: space pauses, `q` quits.

    What you see is what the recorded program wrote, escape sequences and all: questions to the terminal and the
    clipboard are filtered out, but play only recordings whose maker you trust.
    """
    from sterna.client.cast import CastReader
    from sterna.client.terminal import Terminal

    try:
        stream = open(file, "rb")  # noqa: SIM115 -- closed below, after the header was looked at
    except OSError as error:
        raise StorageError(f"The recording {file} cannot be read: {error.strerror}.") from None
    with stream:
        reader = CastReader(stream, file)
        if not sys.stdin.isatty() or not sys.stdout.isatty():
            raise UsageError("Playing needs a terminal: standard input or output is none.")
        idle = idle_limit if idle_limit is not None else reader.header.idle
        with Terminal() as terminal:
            _Player(terminal, reader, speed, idle).run()


class _Player:
    """Plays one recording."""

    def __init__(self, terminal: Terminal, reader: CastReader, speed: float, idle: float | None) -> None:
        from sterna.client.queries import REPLAY, QueryFilter

        self._terminal = terminal
        self._reader = reader
        self._speed = speed
        self._idle = idle
        self._filter = QueryFilter(REPLAY)
        self._poll = select.poll()
        self._poll.register(terminal.in_fd, select.POLLIN)
        self._poll.register(terminal.wake_fd, select.POLLIN)

    def run(self) -> None:
        """Plays to the end, or until the user quits."""
        from sterna.client import cast

        cols, rows = self._terminal.size()
        header = self._reader.header
        if header.cols > cols or header.rows > rows:
            size = f"{header.cols} x {header.rows}"
            self._show(f"sterna: The recording is {size} cells large, this terminal {cols} x {rows}.\r\n".encode())
        due = time.monotonic_ns()
        for interval, code, data in self._reader.events():
            pause = interval if self._idle is None else min(interval, self._idle)
            due += int(pause / self._speed * SECOND)
            due = self._wait(due)
            if due < 0:
                return
            if code == cast.OUTPUT:
                self._show(self._filter.feed(data.encode("utf-8", "replace")))
            elif code == cast.EXIT:
                break
        self._show(self._filter.flush())

    def _show(self, data: bytes) -> None:
        from sterna.client.terminal import TerminalGoneError

        if data and not self._terminal.write_all(data, _WRITE_MS):
            raise TerminalGoneError("The terminal takes nothing: playing stops.")

    def _wait(self, due: int) -> int:
        """Waits until `due` and returns it, later by all pauses of the user; -1 when the user quits."""
        paused_since = 0
        while True:
            now = time.monotonic_ns()
            if now >= due and not paused_since:
                return due
            ready = self._poll.poll(None if paused_since else (due - now) // MILLISECOND + 1)
            for fd, _events in ready:
                if fd == self._terminal.wake_fd:
                    self._terminal.woken()
                    continue
                for key in self._terminal.read() or _QUIT[:1]:
                    if key in _QUIT:
                        return -1
                    if key == _SPACE and paused_since:
                        due += time.monotonic_ns() - paused_since
                        paused_since = 0
                    elif key == _SPACE:
                        paused_since = time.monotonic_ns()
