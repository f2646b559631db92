"""`sterna pipe`: standard input to a session, its output to standard output, exactly, whatever the network does."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from sterna import limits
from sterna.client.driver import PollDriver
from sterna.client.endpoint import Endpoint
from sterna.client.session import Wish, make_machine
from sterna.client.transfer import Transfer, open_source, open_target
from sterna.errors import Code, SternaError, StorageError
from sterna.protocol import client as machine_events
from sterna.protocol.client import ClientMachine, Event
from sterna.protocol.messages import Accept, Close, Resumed
from sterna.units import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_IN, _OUT = select.POLLIN, select.POLLOUT
_PIECE_BYTES = 65_536
_ROOM_BYTES = limits.CHUNK_BYTES  # less room than this is not worth a read
_BOUNDED_BYTES = 4_096  # PIPE_BUF: what poll(2) calls writable takes this much without blocking (pipe(7))
_PARTS_MAX = 64
_GRACE = 1 * SECOND
_NOTE_EVERY_BYTES = 16 * 1024 * 1024
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class PipeOptions:
    """What the user chose for `pipe`: files instead of the standard streams, and from which output position on.

    `asked` are the words for the session, by which a transfer between files is known again.
    """

    __slots__ = ("asked", "output", "source", "state", "target")

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.state: str | None = None
        self.source: str | None = None
        self.target: str | None = None
        self.output: int | None = None


class Sink:
    """Where the output goes: takes what fits without blocking, and never changes a descriptor that others share.

    A pipe or terminal is opened anew through /proc/self/fd, so that O_NONBLOCK is ours alone; where that cannot be done
    writes stay so small that they do not block after poll(2). Regular files and the like never block for long.
    """

    __slots__ = ("_bounded", "_own", "_socket", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._own = -1
        self._bounded = False
        self._socket: socket.socket | None = None
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode) or os.isatty(fd):
            self._own = _reopen(fd, os.O_WRONLY)
            self._bounded = self._own < 0
            self.fd = self._own if self._own >= 0 else fd

    def write(self, parts: list[bytes | memoryview]) -> int:
        """Writes as much as fits and returns how many bytes; OSError when the other end is gone or the disk is full."""
        try:
            if self._socket is not None:
                return self._socket.send(parts[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            if self._bounded:
                return os.write(self.fd, memoryview(parts[0])[:_BOUNDED_BYTES]) if _writable(self.fd) else 0
            return os.writev(self.fd, parts)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Closes what was opened here."""
        if self._own >= 0:
            os.close(self._own)
        if self._socket is not None:
            self._socket.close()


class Source:
    """Where the input comes from; reads what is there without blocking."""

    __slots__ = ("_own", "fd")

    def __init__(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self._own = _reopen(fd, os.O_RDONLY) if stat.S_ISFIFO(mode) or os.isatty(fd) else -1
        self.fd = self._own if self._own >= 0 else fd

    def read(self, size: int) -> bytes | None:
        """Returns what is there, b"" at the end, None when nothing is there yet; StorageError if it cannot be read."""
        try:
            return os.read(self.fd, size)
        except BlockingIOError:
            return None
        except OSError as error:
            if not stat.S_ISREG(os.fstat(self.fd).st_mode) and not stat.S_ISDIR(os.fstat(self.fd).st_mode):
                return b""  # EIO, ECONNRESET: a terminal or peer that is gone has no more input
            raise StorageError(f"The input cannot be read: {error.strerror}.") from None

    def close(self) -> None:
        """Closes what was opened here."""
        if self._own >= 0:
            os.close(self._own)


def _reopen(fd: int, flags: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return -1


def _writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, _OUT)
    return bool(poll.poll(0))


class Pipe:
    """One run of `sterna pipe`; `run` returns the exit status, `report` what is to be said on standard error."""

    def __init__(
        self, endpoint: Endpoint, wish: Wish, options: PipeOptions, source: int, target: int, transfer: Transfer | None
    ) -> None:
        self._transfer = transfer
        self._asked_output = options.output
        self._machine: ClientMachine = make_machine(
            endpoint, wish, state=options.state, exact=True, output=options.output,
            saved=transfer.saved() if transfer is not None else None,
        )  # fmt: skip
        self._driver = PollDriver(self._machine, endpoint, self._event)
        self._source, self._sink = Source(source), Sink(target)
        self._queue: deque[tuple[bytes | memoryview, int]] = deque()  # what is not written, and the position after it
        self._next = 0  # the output position that follows what was received
        self._ready = False  # input may be sent
        self._reading = self._writing = False
        self._input_end: int | None = None  # the position of the end mark, once the end of the input was read
        self._marked = False
        self._noted = 0
        self._close: Close | None = None
        self._error: SternaError | None = None
        self._leaving: int | None = None  # the exit status of a leave that was asked for
        self._leave_by = 0
        self._left = False
        self._uncertain: tuple[int, int] | None = None
        self._lines: list[str] = []
        self._faulty = False
        self._wake = -1

    # ---- the run -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Stays until the session ends, a signal or a broken pipe comes, or it cannot go on; returns the status."""
        driver = self._driver
        wake_in, wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wake = wake_in
        before = signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
        handlers = [(number, signal.signal(number, _noted)) for number in _SIGNALS]
        driver.watch(wake_in, _IN, self._signalled)
        try:
            while not self._finished():
                driver.turn(self._leave_by or None)
                self._flush()
                self._feed()
                self._go()
            if self._close is not None and self._error is None:
                self._confirm()
            elif self._leaving is not None and self._transfer is None:
                self._say_where()
        finally:
            driver.close()
            for number, handler in handlers:
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            os.close(wake_in)
            os.close(wake_out)
            self._source.close()
            self._sink.close()
        if self._error is not None:
            self._forget_refused()
            raise self._error
        return self._status()

    def _finished(self) -> bool:
        return self._left or self._error is not None or (self._close is not None and not self._queue)

    def _confirm(self) -> None:
        """Everything is written: the node may forget the session, then so may we."""
        close = self._close
        assert close is not None
        if close.output is not None and close.output > self._next:
            self._gap(self._next, close.output)
        if close.code == Code.AGENT_LOST:
            self._name_uncertain()
        transfer = self._transfer
        if transfer is not None:
            transfer.record.status = self._status()
            transfer.store()
        self._machine.confirm_end(time.monotonic_ns())
        if transfer is not None:
            self._driver.settle()
            transfer.forget()

    def _status(self) -> int:
        close = self._close
        if close is None:
            return 1 if self._leaving is None else self._leaving
        if close.status is None and close.signal is None:
            self._say(f"The session ended: {close.reason}" if close.reason else "The session was closed.")
            return 1
        if self._faulty:
            return 1
        return close.status if close.status is not None else 128 + (close.signal or 0)

    def _forget_refused(self) -> None:
        """A CONNECT that was refused has begun nothing; one without an answer may have."""
        transfer, error = self._transfer, self._error
        if transfer is not None and not transfer.record.uid and error is not None and error.code != Code.TIMEOUT:
            transfer.forget()

    # ---- leaving -----------------------------------------------------------------------------------------------

    def _signalled(self, _events: int) -> None:
        for number in os.read(self._wake, 64):
            if number in _SIGNALS:
                self._leave(128 + number)

    def _leave(self, status: int) -> None:
        """Begins to leave: what was sent gets a moment to be acknowledged; asked twice, it goes at once."""
        if self._leaving is not None:
            self._left = True
            return
        self._leaving = status
        self._leave_by = time.monotonic_ns() + (_GRACE if self._transfer is None else 0)

    def _go(self) -> None:
        """Suspends once nothing is owed, or the moment is over."""
        if self._leaving is None or self._left or not self._leave_by:
            return
        machine, now = self._machine, time.monotonic_ns()
        owed = machine.input.end > machine.input.base
        if not owed or machine.active is None or now >= self._leave_by:
            self._leave_by = 0
            machine.suspend(now)

    # ---- input -------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Reads on while the window has room; sends the end mark after the last byte."""
        machine = self._machine
        if self._input_end is not None and not self._marked:
            self._marked = machine.eof(time.monotonic_ns())
        want = self._ready and self._input_end is None and self._leaving is None and self._close is None
        want = want and machine.input.room >= _ROOM_BYTES
        if want and not self._reading:
            self._driver.watch(self._source.fd, _IN, self._readable)
        elif self._reading and not want:
            self._driver.unwatch(self._source.fd)
        self._reading = want

    def _readable(self, _events: int) -> None:
        machine = self._machine
        room = min(machine.input.room, _PIECE_BYTES)
        if room <= 0 or self._input_end is not None:
            return
        data = self._source.read(room)
        if data:
            machine.write(data, time.monotonic_ns())
            self._note()
        elif data is not None:
            self._end_input()

    def _end_input(self) -> None:
        self._input_end = self._machine.input.end
        if self._transfer is not None:
            self._transfer.record.eof = self._input_end
            self._transfer.store()

    def _note(self) -> None:
        """Keeps now and then how far the input is handled, for the report should the agent be lost together with us."""
        transfer, base = self._transfer, self._machine.input.base
        if transfer is not None and base - self._noted >= _NOTE_EVERY_BYTES:
            self._noted = transfer.record.input = base
            transfer.store()

    # ---- output ------------------------------------------------------------------------------------------------

    def _flush(self, _events: int = 0) -> None:
        """Writes what the sink takes; what it took is handled."""
        queue, handled = self._queue, -1
        blocked = False
        while queue and not blocked:
            parts = [data for data, _ in list(queue)[:_PARTS_MAX]]
            try:
                written = self._sink.write(parts)
            except OSError as error:
                self._broken(error)
                return
            blocked = written < sum(map(len, parts))
            while written:
                data, end = queue[0]
                if written < len(data):
                    queue[0] = (memoryview(data)[written:], end)
                    handled, written = end - len(data) + written, 0
                else:
                    queue.popleft()
                    handled = end
                    written -= len(data)
        if handled >= 0:
            self._machine.handled(handled, time.monotonic_ns())
        if blocked != self._writing:
            self._writing = blocked
            if blocked:
                self._driver.watch(self._sink.fd, _OUT, self._flush)
            else:
                self._driver.unwatch(self._sink.fd)

    def _broken(self, error: OSError) -> None:
        """Nobody takes the output any more: leave politely, the session stays."""
        self._queue.clear()
        if self._writing:
            self._writing = False
            self._driver.unwatch(self._sink.fd)
        if not isinstance(error, BrokenPipeError):
            self._say(f"The output cannot be written: {error.strerror}.")
        if self._leaving is None:
            self._leave(1)

    # ---- events ------------------------------------------------------------------------------------------------

    def _event(self, event: Event) -> None:
        if isinstance(event, machine_events.Output):
            self._output(event)
        elif isinstance(event, machine_events.Opened):
            self._opened(event.accept)
        elif isinstance(event, machine_events.Rejoined):
            self._rejoined(event.resumed)
        elif isinstance(event, machine_events.Gap):
            self._gap(event.start, event.end)
        elif isinstance(event, machine_events.Uncertain):
            self._uncertain = event.start, event.end
        elif isinstance(event, machine_events.Ended):
            self._close = event.close
        elif isinstance(event, machine_events.Suspended):
            self._left = True
        elif isinstance(event, machine_events.Failed):
            self._error = event.error
        elif isinstance(event, machine_events.Trouble) and event.since is None:
            self._epoch()

    def _opened(self, accept: Accept) -> None:
        """Notes which session it is before the first byte goes either way."""
        asked = self._asked_output
        self._next = accept.output
        if asked is not None and accept.output < asked:
            self._error = StorageError(f"The session's output ends at {accept.output}, before position {asked}.")
            return
        if asked is not None and accept.output > asked:
            self._gap(asked, accept.output)
        transfer = self._transfer
        if transfer is not None:
            record = transfer.record
            record.uid, record.log, record.epoch, record.base = accept.uid, accept.log, accept.epoch, accept.output
            transfer.store()
        self._ready = True

    def _rejoined(self, resumed: Resumed) -> None:
        """Goes on for an earlier process: its files say what was written, the node what was read."""
        transfer = self._transfer
        assert transfer is not None
        record = transfer.record
        self._next = record.base + transfer.size
        position = resumed.input
        if resumed.forgotten:
            self._error = StorageError(f"The node has forgotten how far {record.source} was read: begin anew.")
            return
        if position is None:
            self._ready = False
            return
        self._noted = position
        if record.eof is not None and position > record.eof:
            self._input_end, self._marked = record.eof, True
            return
        if position > os.fstat(transfer.source).st_size:
            self._error = StorageError(f"{record.source} is shorter than what was sent of it ({position} bytes).")
            return
        os.lseek(transfer.source, position, os.SEEK_SET)
        self._ready = True

    def _epoch(self) -> None:
        """Keeps a new log or epoch of the session, which the next process has to name."""
        transfer, machine = self._transfer, self._machine
        if transfer is not None and transfer.record.uid:
            record = transfer.record
            if (record.log, record.epoch) != (machine.log, machine.epoch):
                record.log, record.epoch = machine.log, machine.epoch
                transfer.store()

    def _output(self, event: machine_events.Output) -> None:
        start = event.end - len(event.data)
        if start != self._next and self._transfer is not None:
            # After a gap, already named: first what came before it is written, then positions and offsets differ more.
            self._flush()
            self._transfer.record.base += start - self._next
            self._transfer.store()
        self._next = event.end
        self._queue.append((event.data, event.end))

    # ---- what is reported --------------------------------------------------------------------------------------

    def _say_where(self) -> None:
        """Tells where another pipe has to go on; input that was not acknowledged in time is named apart."""
        taken, written = self._machine.input.base, self._machine.intake.handled
        if self._leaving != 1 and self._ready:
            self._say(f"The session goes on: {taken} bytes of input were taken, --from-output {written} goes on.")
        self._name_uncertain()

    def _say(self, line: str) -> None:
        if line not in self._lines:
            self._lines.append(line)

    def _gap(self, start: int, end: int) -> None:
        if end > start:
            self._faulty = True
            self._say(f"Output bytes {start} to {end - 1} were overwritten before they could be read.")

    def _name_uncertain(self) -> None:
        """Names the input that was sent but that nobody confirmed to have reached the program."""
        stream = self._machine.input
        start, end = stream.base, stream.end
        if self._uncertain is not None:
            start, end = max(start, self._uncertain[0]), max(end, self._uncertain[1])
        limit = self._input_end
        last = end if limit is None else min(end, limit)
        if last > start:
            self._faulty = True
            self._say(f"Input bytes {start} to {last - 1} may not have reached the program.")
        elif end > start:
            self._faulty = True
            self._say("The end of the input may not have reached the program.")

    def report(self) -> str:
        """Returns the sentences for standard error, "" if all is well."""
        return "".join(f"sterna: {line}\n" for line in self._lines)


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Lets the signal be read from the wake-up descriptor."""


def pipe(options: PipeOptions, begin: Callable[[], tuple[Endpoint, Wish]], again: Callable[[], Endpoint]) -> int:
    """Connects two descriptors to a session; returns the program's exit status, 1 after a gap, 128 + a signal's number.

    `begin` says which node and session is meant; with regular files on both sides a killed process's transfer goes on,
    at the node that `again` returns. Raises SternaError when it cannot begin or go on.
    """
    if options.source is not None and options.target is not None and _regular(options.source, options.target):
        transfer = Transfer(options.source, options.target, options.asked)
        record = transfer.record
        if record.status is not None:
            transfer.forget()
            return record.status
        endpoint, wish = (again(), Wish("join")) if record.uid else begin()
        transfer.bind(endpoint.node_id)
        run = Pipe(endpoint, wish, options, transfer.source, transfer.target, transfer)
    else:
        endpoint, wish = begin()
        source = open_source(options.source) if options.source is not None else 0
        target = open_target(options.target) if options.target is not None else 1
        run = Pipe(endpoint, wish, options, source, target, None)
    try:
        return run.run()
    finally:
        sys.stderr.write(run.report())


def _regular(source: str, target: str) -> bool:
    """Tells whether both are regular files, or may become ones."""
    return all(not os.path.exists(path) or os.path.isfile(path) for path in (source, target))
