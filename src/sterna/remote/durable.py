"""A child that its holder owns: its output and input move by the kernel alone, and their record outlives the daemon.

A daemon may die between any two calls. So output is spliced from its pipe to a memory file whose position, which the
kernel advances together with the move, all daemons share; what is in the file behind the last frame of the index is the
next frame. Input is accepted when it stands in a memory file, and spliced from there to its pipe likewise. A terminal
is no pipe, and one side of a splice has to be one: there is a pipe between, whose content the next daemon finds.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import time
from typing import TYPE_CHECKING, Final

import msgspec

from sterna.limits import (
    REMOTE_FRAME_BYTES,
    REMOTE_INDEX_FRAMES,
    REMOTE_PUNCH_BYTES,
    REMOTE_RECORD_BYTES,
    REMOTE_REPLAY_BYTES,
)
from sterna.remote import holding
from sterna.remote.child import STDERR, STDOUT, Child
from sterna.remote.replay import EXIT
from sterna.remote.terminal import queued

if TYPE_CHECKING:
    from sterna.remote.keeper import Session
    from sterna.remote.replay import Replay

_FRAME: Final = struct.Struct("<QQqII")  # ends of both outputs; of an exit when (ns); kind; length, of an exit code + 1
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # <linux/falloc.h>
_PIPE_MAX_BYTES: Final = 1024 * 1024  # of input that may still be pages of the file
_PAGE_BYTES: Final = 4096

_libc: Final = ctypes.CDLL(None)


class About(msgspec.Struct, array_like=True):
    """What the holder remembers of a process for the next daemon; new members go to the end, with a default."""

    id: str
    command: str
    started_at: float
    terminal: bool = False


class Trail:
    """A memory file that only grows, and whose beginning is given back to the system in large pieces."""

    __slots__ = ("_kept", "_punched", "descriptor")

    def __init__(self, descriptor: int, kept: int) -> None:
        self.descriptor, self._kept = descriptor, kept
        self._punched = 0

    def trim(self, end: int) -> None:
        """Keeps the last bytes before `end`, as many as this trail keeps, and little more."""
        last = (end - self._kept) // _PAGE_BYTES * _PAGE_BYTES
        if last >= self._punched + REMOTE_PUNCH_BYTES:
            mode = _KEEP_SIZE | _PUNCH_HOLE
            _libc.fallocate(self.descriptor, mode, ctypes.c_int64(self._punched), ctypes.c_int64(last - self._punched))
            self._punched = last

    def position(self) -> int:
        """Returns the position that all daemons share."""
        return os.lseek(self.descriptor, 0, os.SEEK_CUR)

    def size(self) -> int:
        """Returns the size of the file."""
        return os.fstat(self.descriptor).st_size


class DurableChild(Child):
    """A child with descriptors that a holder lent; `Child` says what its methods do.

    Parameters: `session`, of the holder; `handle`, its number there; `about`, what the holder remembers of it;
    `descriptors`, in the order of `holding`, −1 for those that are closed.
    """

    __slots__ = (
        "_dead_stdin", "_ends", "_forgotten", "_frames", "_handle", "_index", "_input", "_kept", "_records", "_reaped",
        "_session", "_sources", "about", "ended_at",
    )  # fmt: skip

    def __init__(self, session: Session, handle: int, pid: int, about: About, descriptors: list[int]) -> None:
        pidfd, stdin, stdout, stderr = descriptors[: holding.OUT_READ]
        record_out, record_err, index, feed = descriptors[holding.PIPES :]
        super().__init__(pid, pidfd, stdin, stdout, stderr)
        self._session, self._handle, self.about = session, handle, about
        self.started_at = about.started_at
        self._sources = self._outputs  # where what is printed comes out of
        self._records = record_out, record_err
        self._index = Trail(index, REMOTE_INDEX_FRAMES * _FRAME.size)
        self._input = Trail(feed, _PIPE_MAX_BYTES)
        self._ends = [0, 0]
        self._frames = 0
        self._kept = self._input.size()
        self._dead_stdin = self._forgotten = False
        self._reaped = pidfd < 0
        self.ended_at = 0.0

    # --------------------------------------------------------------------------------------------------------- output

    def read(self, stream: int) -> bytes | None:
        """Returns one frame, which is on record by then under the next number; empty at the end, None for nothing."""
        room = REMOTE_RECORD_BYTES - self._ends[stream] % REMOTE_RECORD_BYTES
        size = room if room < REMOTE_FRAME_BYTES else REMOTE_FRAME_BYTES
        try:
            size = os.splice(self._sources[stream], self._records[stream], size, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        return self._commit(stream, size) if size else b""

    def _commit(self, stream: int, size: int) -> bytes:
        """Makes a frame of the next bytes of a record. Nobody may see it before its boundaries are in the index."""
        self._ends[stream] += size
        self._enter(stream, size, 0)
        if self._ends[stream] % REMOTE_RECORD_BYTES == 0:
            os.lseek(self._records[stream], 0, os.SEEK_SET)
        return self._recorded(stream, self._ends[stream], size)

    def _recorded(self, stream: int, end: int, size: int) -> bytes:
        """Returns bytes out of the ring that a record is; a frame never goes around its end."""
        return os.pread(self._records[stream], size, (end - size) % REMOTE_RECORD_BYTES)

    def _enter(self, kind: int, size: int, value: int) -> None:
        os.pwrite(self._index.descriptor, _FRAME.pack(*self._ends, value, kind, size), self._frames * _FRAME.size)
        self._frames += 1
        self._index.trim(self._frames * _FRAME.size)

    def close_output(self, stream: int) -> None:
        """Closes an output here and at the holder."""
        if self._outputs[stream] >= 0:
            self._session.tell(holding.CLOSE, self._handle, holding.STDOUT + stream)
        super().close_output(stream)

    # ---------------------------------------------------------------------------------------------------------- input

    def keep(self, data: bytes | memoryview) -> None:
        """Puts accepted input on record. Raises `OSError` when there is no memory for it, and keeps nothing then."""
        size = self._kept + len(data)
        try:
            if self._dead_stdin:
                self._skip_input(size)
            view, at = memoryview(data), self._kept
            while at < size and not self._dead_stdin:
                written = os.pwrite(self._input.descriptor, view, at)
                at, view = at + written, view[written:]
        except OSError:
            os.ftruncate(self._input.descriptor, self._kept)
            raise
        self._kept = size

    def _skip_input(self, size: int) -> None:
        """Counts input that nobody will read."""
        os.ftruncate(self._input.descriptor, size)
        os.lseek(self._input.descriptor, size, os.SEEK_SET)

    def write(self, data: bytes | memoryview) -> int:
        """Moves the next input on record to the child; of `data`, which is the same, only the length counts."""
        try:
            sent = os.splice(self._input.descriptor, self.stdin, len(data), flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return 0
        except OSError:
            self._lose_input()
            raise
        self._input.trim(self._input.position())
        return sent

    def _lose_input(self) -> None:
        """The child has closed its input."""
        self._dead_stdin = True
        self._skip_input(self._kept)

    def seal_stdin(self) -> None:
        """Puts on record that the input ends."""
        fcntl.fcntl(self._input.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)

    def close_stdin(self) -> None:
        """Closes the child's input here and at the holder."""
        if self.stdin >= 0:
            self._session.tell(holding.CLOSE, self._handle, holding.STDIN)
        super().close_stdin()

    # ------------------------------------------------------------------------------------------------------------ end

    def look(self) -> bool:
        """Asks the holder once the child has exited. Without one its status is unknown and counts as −1."""
        if self.exit_code is None:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if not poll.poll(0):
                return False
            self.exit_code = self._session.status(self._handle)
        return self.exit_code is not None

    def finish(self) -> None:
        """Puts the exit frame on record."""
        assert self.exit_code is not None
        self.ended_at = time.monotonic()
        self._enter(EXIT, self.exit_code + 1, int(self.ended_at * 1e9))

    def reap(self) -> None:
        """Has the holder reap the child; its record stays there."""
        if not self._reaped:
            os.close(self.pidfd)
        self._reaped = True
        self._session.tell(holding.REAP, self._handle)
        if self._forgotten:
            self._drop()

    def forget(self) -> None:
        """Drops the record, now or when the child has been reaped."""
        self._forgotten = True
        if self._reaped:
            self._drop()

    def _drop(self) -> None:
        self._session.tell(holding.DROP, self._handle)
        for descriptor in (*self._records, self._index.descriptor, self._input.descriptor):
            os.close(descriptor)

    def kill(self, number: int) -> None:
        """Sends a signal to the child alone."""
        if self._there():
            super().kill(number)

    def kill_group(self) -> None:
        """Sends SIGKILL to everything in the child's process group."""
        if self._there():
            super().kill_group()

    def _there(self) -> bool:
        """Returns whether the process id is still the child's, which it is not after the holder and the child ended."""
        if self._reaped:
            return False
        try:
            signal.pidfd_send_signal(self.pidfd, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it has become another user's
        return True

    # ------------------------------------------------------------------------------------------------------- recovery

    def recover(self, replay: Replay) -> None:
        """Fills an empty replay with what is on record, under the numbers that it had."""
        written = self._index.size() // _FRAME.size
        first = max(0, written - REMOTE_INDEX_FRAMES)
        data = os.pread(self._index.descriptor, (written - first) * _FRAME.size, first * _FRAME.size)
        entries = list(_FRAME.iter_unpack(data))
        start, size = len(entries), 0
        while start and size <= REMOTE_REPLAY_BYTES:
            start -= 1
            size += entries[start][4] * 4 // 3
        replay.last = first + start
        replay.first = replay.last + 1 if entries else 0
        for *ends, value, kind, length in entries[start:]:
            self._ends = ends
            if kind == EXIT:
                self.exit_code, self.ended_at = length - 1, value / 1e9
                replay.add(EXIT, str(self.exit_code).encode())
            else:
                replay.add(kind, self._recorded(kind, ends[kind], length))
        self._frames = written
        for stream in (STDOUT, STDERR):
            moved = os.lseek(self._records[stream], 0, os.SEEK_CUR)
            rest = (moved - self._ends[stream]) % REMOTE_RECORD_BYTES
            if rest:
                replay.add(stream, self._commit(stream, rest))
            os.lseek(self._records[stream], self._ends[stream] % REMOTE_RECORD_BYTES, os.SEEK_SET)

    @property
    def applied(self) -> int:
        """How much input was accepted."""
        return self._kept

    @property
    def waiting(self) -> int:
        """How much of it the child's pipe has not taken yet."""
        return self._kept - self._input.position()

    @property
    def stdin_sealed(self) -> bool:
        """Whether the input is closed, or to be closed after what waits."""
        return self.stdin < 0 or bool(fcntl.fcntl(self._input.descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_GROW)


class DurablePtyChild(DurableChild):
    """The same with a terminal: all it prints comes as STDOUT, and there is no STDERR."""

    __slots__ = ("_between", "_in_read", "_in_write", "_out_write")
    has_terminal = True

    def __init__(self, session: Session, handle: int, pid: int, about: About, descriptors: list[int]) -> None:
        super().__init__(session, handle, pid, about, descriptors)
        self._between = descriptors[holding.OUT_READ : holding.PIPES]
        out_read, self._out_write, self._in_read, self._in_write = self._between
        self._sources = [out_read, -1]

    def read(self, stream: int) -> bytes | None:
        """Returns one frame, as the terminal gives it: empty when nobody holds that open any more and all is taken."""
        if stream == STDERR:
            return b""
        room = REMOTE_RECORD_BYTES - self._ends[stream] % REMOTE_RECORD_BYTES
        ended = self._fetch(min(room, REMOTE_FRAME_BYTES))
        chunk = super().read(stream)
        return b"" if ended and chunk is None else chunk

    def _fetch(self, size: int) -> bool:
        """Moves output to the pipe between, a page or less at a time. Returns whether this is the end of it."""
        source, target = self._outputs[STDOUT], self._out_write
        try:
            while size and (moved := os.splice(source, target, size, flags=os.SPLICE_F_NONBLOCK)):
                size -= moved
        except BlockingIOError:
            return False
        except OSError:
            return True
        return size > 0

    def write(self, data: bytes | memoryview) -> int:
        """Types the next input on record; of `data`, which is the same, only the length counts."""
        held = queued(self._in_read)
        try:
            if not held:
                held = os.splice(self._input.descriptor, self._in_write, len(data), flags=os.SPLICE_F_NONBLOCK)
            sent = os.splice(self._in_read, self.stdin, held, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return 0
        except OSError:
            self._lose_input()
            os.read(self._in_read, held)
            raise
        self._input.trim(self._input.position())
        return sent

    def reap(self) -> None:
        """Has the holder reap the child, and closes what belonged to the terminal."""
        super().reap()
        for descriptor in self._between:
            if descriptor >= 0:
                os.close(descriptor)

    def recover(self, replay: Replay) -> None:
        """Fills an empty replay with what is on record, and with what was between the terminal and the record."""
        super().recover(replay)
        while self.exit_code is None and (chunk := super().read(STDOUT)):
            replay.add(STDOUT, chunk)

    @property
    def waiting(self) -> int:
        """How much accepted input the terminal has not taken yet."""
        return super().waiting + queued(self._in_read)
