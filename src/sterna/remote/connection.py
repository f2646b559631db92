"""One client: lines in, whole lines out, no matter how slowly it reads."""

from __future__ import annotations

import select
import socket
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from sterna.limits import (
    REMOTE_BACKLOG_BYTES,
    REMOTE_LINE_MAX_BYTES,
    REMOTE_OUTGOING_TOTAL_MAX_BYTES,
    REMOTE_PARTIAL_TOTAL_MAX_BYTES,
    REMOTE_PENDING_MAX_BYTES,
    REMOTE_REFUSALS_TOTAL_MAX_BYTES,
    REMOTE_REPLIES_MAX_BYTES,
    REMOTE_REQUESTS_PENDING_MAX,
)
from sterna.remote.gotext import errno_text
from sterna.remote.loop import READ, WRITE

if TYPE_CHECKING:
    from sterna.remote.loop import Loop

    class Resumable(Protocol):
        """What makes frames for clients: a process for its subscriber, a watcher."""

        def resume(self) -> None:
            """The client has caught up."""

        def detach(self, connection: Connection) -> None:
            """The client is gone."""

    class Job(Protocol):
        """A call in a worker, which may have to wait until the client has taken replies."""

        wanted: int
        """Bytes of its reply, as far as it is known."""

        def start(self) -> None:
            """There is room for the reply now."""

        def drop(self) -> None:
            """The client is gone."""


_READ_BYTES: Final = 64 * 1024
_PIECES_MAX = 64  # of one sendmsg
_TURN_SECONDS: Final = 0.002  # of lines of one client, then others have their turn
_ENDED: Final = select.EPOLLHUP | select.EPOLLERR


class Budget:
    """Bytes that all clients together have here: `used` by lines that have begun and not ended, `out` by what waits to
    be read, `refusals` by the same of clients that never showed the token, `running` by replies that are being made.
    """

    __slots__ = ("begun", "connections", "lock", "out", "refusals", "running", "used")

    def __init__(self) -> None:
        self.used = self.out = self.refusals = self.running = 0
        self.begun = 0  # so many lines
        self.connections: dict[Connection, None] = {}
        self.lock = allocate_lock()

    def relieve_lines(self) -> None:
        """Ends connections until there is room: the oldest of the bigger unfinished lines, strangers' before others'.

        Who sends a line now is younger than those who hold theirs back to fill the memory.
        """
        while self.used > REMOTE_PARTIAL_TOTAL_MAX_BYTES:
            held = [connection for connection in self.connections if connection.unfinished]
            held = [connection for connection in held if not connection.trusted] or held
            if not held:
                return
            least = sum(connection.unfinished for connection in held) // (2 * len(held))
            oldest = min((one for one in held if one.unfinished >= least), key=lambda one: one.begun)
            oldest.close("unfinished lines of all clients take too much memory")

    def relieve_refusals(self) -> None:
        """Ends connections of strangers that do not read their refusals until there is room."""
        while self.refusals > REMOTE_REFUSALS_TOTAL_MAX_BYTES:
            strangers = [connection for connection in self.connections if not connection.trusted]
            max(strangers, key=lambda connection: connection.unread).close("unread refusals take too much memory")


class Lazy:
    """Lines that are made when the client has read those before them."""

    __slots__ = ("left", "lines")

    def __init__(self, lines: Iterator[bytes], size: int) -> None:
        self.lines, self.left = lines, size


class Connection:
    """A client's socket.

    Parameters: `handle(connection, line)`, called for every line; `gone(connection, reason)`, called once, with an
    empty reason unless the client broke the framing; `budget`, of the unfinished lines of all clients.
    """

    __slots__ = (
        "_away", "_budget", "_corked", "_deciding", "_gone", "_handle", "_held", "_loop", "_mask", "_out",
        "_partial", "_posted", "_queued", "_running", "_socket", "_unmade", "backlog", "begun", "closed", "jobs",
        "paused", "pending", "pending_bytes", "problem", "processes", "stdin", "trusted", "unread",
    )  # fmt: skip

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        handle: Callable[[Connection, bytes], None],
        gone: Callable[[Connection, str], None],
        budget: Budget,
    ) -> None:
        self._loop, self._socket, self._handle, self._gone = loop, sock, handle, gone
        self._budget = budget
        self._partial: bytes | bytearray = b""
        self._held: list[bytes | bytearray] = []  # whole lines that were read when the client had enough pending
        self._out: deque[bytes | memoryview | Lazy] = deque()
        self._corked = self.closed = self._posted = False
        self._away = False  # the client is gone, and what it asked for before is still to be done
        self._deciding = 0  # bytes of a line that is read elsewhere
        self.begun = 0  # when the unfinished line began, counted in lines
        self.problem = ""  # why frames of processes could not be sent
        self.trusted = False  # whether a request had the token
        self.backlog = 0  # bytes that wait in _out
        self._unmade = 0  # those of them that are still to be made
        self.unread = 0  # bytes of the budget that are this client's
        self._running = 0  # bytes of replies that are being made
        self._queued: deque[Job] = deque()  # jobs that wait for the backlog to shrink
        self.jobs: set[Job] = set()  # all that are not done
        self.pending = self.pending_bytes = 0  # of requests without a reply yet
        self.processes: set[Resumable] = set()  # those whose frames come here
        self.paused: set[Resumable] = set()  # those that wait for the backlog to shrink
        self.stdin: deque[Callable[[], bool]] = deque()  # stdin requests in their order, the first one is blocked
        self._mask = READ
        budget.connections[self] = None
        loop.watch(sock.fileno(), READ, self._ready)

    # -------------------------------------------------------------------------------------------------------- reading

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self.flush()
            if events & ~WRITE and not self.closed and not self._away:
                if self._mask & READ:
                    self._receive()
                elif events & _ENDED:  # which is reported although nobody asked
                    self._lost()
        except Exception:
            self.close("internal error")
            raise

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self._corked = True
        if data:
            self._split(data)
        else:
            self._end()
        self._uncork()

    def _uncork(self) -> None:
        self._corked = False
        if self._out and not self.closed:
            self.flush()

    def _lost(self) -> None:
        """The client is gone. What it asked for is done first, as if there had been no wait in between."""
        if not (self._held or self._deciding) or self._filled:
            self.close()
            return
        self._away = True
        self._loop.forget(self._socket.fileno())
        self._out.clear()
        self.backlog = self._unmade = 0
        self._account()
        self._set_mask()

    def _split(self, data: bytes) -> None:
        lines: list[bytes | bytearray] = [*data.split(b"\n")]
        rest = lines.pop()
        partial = len(self._partial)
        if partial:
            if lines:
                lines[0] = self._partial + lines[0]
            else:
                rest = self._extended(rest)
        budget = self._budget
        if rest and (lines or not partial):
            self.begun = budget.begun = budget.begun + 1
        budget.used += len(rest) - partial
        self._partial = rest
        if not self._serve(lines):
            return
        if len(rest) > REMOTE_LINE_MAX_BYTES:
            self._too_long()
        elif budget.used > REMOTE_PARTIAL_TOTAL_MAX_BYTES:
            budget.relieve_lines()

    def _serve(self, lines: list[bytes | bytearray]) -> bool:
        """Hands lines on; returns whether the connection goes on. What it must not ask for yet is held back."""
        until = monotonic() + _TURN_SECONDS
        for number, line in enumerate(lines):
            if len(line) > REMOTE_LINE_MAX_BYTES:
                self._too_long()
                return False
            if self._busy or (number & 3 == 3 and monotonic() > until):
                self._held = lines[number:]
                break
            if line.endswith(b"\r"):
                line = line[:-1]  # noqa: PLW2901 # the line without its ending is the line
            if line:
                self._handle(self, bytes(line))
                if self.closed:
                    return False
        if self._held or self._busy:
            self._set_mask()
        return True

    def _go_on(self) -> None:
        """Serves lines that were held back, then reads on."""
        self._posted = False
        held, self._held = self._held, []
        if self.closed:
            return
        self._corked = True
        try:
            alive = self._serve(held)
        except Exception:
            self.close("internal error")
            raise
        self._uncork()
        if alive:
            self._set_mask()

    @property
    def _busy(self) -> bool:
        """Whether the client is to be read no further until it has taken replies or its requests are done."""
        return (  # as `_filled`, which would be another call for every line
            self._deciding > 0
            or self.backlog > REMOTE_REPLIES_MAX_BYTES
            or self.pending > REMOTE_REQUESTS_PENDING_MAX
            or self.pending_bytes > REMOTE_PENDING_MAX_BYTES
        )

    @property
    def _filled(self) -> bool:
        return (
            self.backlog > REMOTE_REPLIES_MAX_BYTES
            or self.pending > REMOTE_REQUESTS_PENDING_MAX
            or self.pending_bytes > REMOTE_PENDING_MAX_BYTES
        )

    @property
    def unfinished(self) -> int:
        """How many bytes of the budget of unfinished lines are this client's."""
        return len(self._partial) + self._deciding

    def _extended(self, rest: bytes | bytearray) -> bytearray:
        """Returns the partial line with `rest` at its end, copying it once and not with every read."""
        partial = self._partial if isinstance(self._partial, bytearray) else bytearray(self._partial)
        partial += rest
        return partial

    def _end(self) -> None:
        """The client sends no more: an unfinished line counts as one, then the connection ends."""
        line = bytes(self._partial).removesuffix(b"\r")
        if line:
            self._handle(self, line)
        if not self.closed:
            self.flush()
            self.close()

    def _too_long(self) -> None:
        self.flush()
        self.close("bufio.Scanner: token too long")

    # -------------------------------------------------------------------------------------------------------- writing

    def write(self, data: bytes) -> None:
        """Sends whole lines after everything that was written before."""
        if self.closed or self._away:
            return
        self._out.append(data)
        self.backlog += len(data)
        if not self._corked and len(self._out) == 1:
            self.flush()
        elif self.backlog > REMOTE_BACKLOG_BYTES:
            self._account()

    def write_all(self, pieces: tuple[bytes, ...]) -> None:
        """Sends one line given in pieces, which are not put together."""
        if self.closed or self._away:
            return
        self._out += pieces
        self.backlog += sum(map(len, pieces))
        if not self._corked and len(self._out) == len(pieces):
            self.flush()
        elif self.backlog > REMOTE_BACKLOG_BYTES:
            self._account()

    def write_pieces(self, pieces: tuple[bytes | bytearray, ...]) -> None:
        """Sends one line given in pieces; what cannot be sent now is copied."""
        if self.closed or self._away:
            return
        if self._out:
            self.write(b"".join(pieces))
            return
        try:
            sent = self._socket.sendmsg(pieces)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._cannot_write(error)
            return
        size = sum(map(len, pieces))
        if sent < size:
            self._out.append(memoryview(b"".join(pieces))[sent:])
            self.backlog = size - sent
            self._set_mask()

    def _cannot_write(self, error: OSError) -> None:
        if self.processes:
            self.problem = f"write: {errno_text(error.errno or 0)}"
        self._lost()

    def write_lazy(self, lines: Iterator[bytes], size: int) -> None:
        """Sends lines that are made while they are sent; `size` is a bound of their bytes."""
        if size and not self.closed and not self._away:
            self._out.append(Lazy(lines, size))
            self.backlog += size
            self._unmade += size
            if not self._corked:
                self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the client takes it."""
        out = self._out
        while out and not self.closed:
            pieces = self._pieces()
            if not pieces:
                break
            try:
                sent = self._socket.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._cannot_write(error)
                return
            self.backlog -= sent
            while sent:
                piece = out[0]
                assert not isinstance(piece, Lazy)
                if sent < len(piece):
                    out[0] = memoryview(piece)[sent:]
                    break
                sent -= len(piece)
                out.popleft()
        self._set_mask()
        if self.backlog <= REMOTE_BACKLOG_BYTES // 2 and self.paused and not self.closed:
            waiting, self.paused = self.paused, set()
            for process in waiting:
                process.resume()
        if self._queued:
            self._start_queued()

    def _pieces(self) -> list[bytes | memoryview]:
        """Returns the next pieces to send; lazy lines at the front are made, up to the backlog's bound."""
        out = self._out
        while out and isinstance(lazy := out[0], Lazy):
            made, size = [], 0
            for line in lazy.lines:
                made.append(line)
                size += len(line)
                if size >= REMOTE_BACKLOG_BYTES:
                    break
            else:
                out.popleft()
                self.backlog -= lazy.left
                self._unmade -= lazy.left
                lazy.left = 0
            taken = min(lazy.left, size)
            lazy.left -= taken
            self._unmade -= taken
            self.backlog += size - taken
            out.extendleft(reversed(made))
        pieces: list[bytes | memoryview] = []
        for piece in out:
            if isinstance(piece, Lazy) or len(pieces) == _PIECES_MAX:
                break
            pieces.append(piece)
        return pieces

    def hold(self, size: int) -> None:
        """Keeps what comes after a line of `size` bytes waiting, as that one is read elsewhere."""
        self._deciding = size
        self._budget.used += size
        self.begun = self._budget.begun = self._budget.begun + 1

    def release(self) -> None:
        """The line is read: what waits comes next, after its reply."""
        if not self.closed:
            self._budget.used -= self._deciding
            self._deciding = 0
            self._loop.post(self.settle)

    def settle(self) -> None:
        """Called when a request has its reply: the client may send more."""
        if not self._mask & READ:
            self._set_mask()

    def _set_mask(self) -> None:
        if not self.closed and (self.unread or self.backlog > REMOTE_BACKLOG_BYTES):
            self._account()
        if self.closed:
            return
        busy = self._busy
        if self._held and not busy and not self._posted:
            self._posted = True
            self._loop.post(self._go_on)
        if self._away:
            if not self._held and not self._deciding:  # what is still in the socket, up to its end
                self._away = False
                self._mask = READ
                self._loop.watch(self._socket.fileno(), READ, self._ready)
            return
        mask = 0 if busy or self._held else READ
        if self._out:
            mask |= WRITE
        if mask != self._mask:
            self._mask = mask
            self._loop.change(self._socket.fileno(), mask)

    # --------------------------------------------------------------------------------------------------------- memory

    def trust(self) -> None:
        """Called when a request had the token."""
        self.trusted = True
        self._budget.refusals -= self.unread
        self._budget.out += self.unread

    def _account(self) -> None:
        """Brings the budget up to date with what waits to be read."""
        size = self.backlog - self._unmade
        grown, self.unread = size - self.unread, size
        if self.trusted:
            self._budget.out += grown
        else:
            self._budget.refusals += grown
            self._budget.relieve_refusals()

    def take(self, size: int) -> bool:
        """Returns whether there is room for a reply of `size` bytes, which then is taken. For any thread.

        A client that has nothing to read always has room for one.
        """
        budget = self._budget
        with budget.lock:
            if (self._running or self.backlog > REMOTE_BACKLOG_BYTES) and (
                self.backlog + self._running + size > REMOTE_REPLIES_MAX_BYTES
                or budget.out + budget.running + size > REMOTE_OUTGOING_TOTAL_MAX_BYTES
            ):
                return False
            self._running += size
            budget.running += size
        return True

    def give_back(self, size: int) -> None:
        """Ends what `take` began; the reply is written by now, if there is one."""
        if size:
            with self._budget.lock:
                self._running -= size
                self._budget.running -= size
        if self._queued:
            self._start_queued()

    def queue(self, job: Job) -> None:
        """Starts a job as soon as there is room for its reply."""
        if not self.closed:
            self._queued.append(job)
            self._start_queued()

    def _start_queued(self) -> None:
        queued = self._queued
        while queued and self.take(queued[0].wanted):
            queued.popleft().start()

    @property
    def full(self) -> bool:
        """Whether processes shall wait before they give this client more."""
        return self.backlog > REMOTE_BACKLOG_BYTES

    def close(self, reason: str = "") -> None:
        """Ends the connection; what waits is dropped, processes go on without it."""
        if self.closed:
            return
        self.closed = True
        self._loop.forget(self._socket.fileno())
        self._socket.close()
        self._out.clear()
        del self._budget.connections[self]
        if self.trusted:
            self._budget.out -= self.unread
        else:
            self._budget.refusals -= self.unread
        self.backlog = self._unmade = self.unread = 0
        self._budget.used -= len(self._partial) + self._deciding
        self._partial = b""
        self._queued.clear()
        for job in self.jobs:
            job.drop()
        self.jobs.clear()
        self._held.clear()
        self.stdin.clear()
        paused, self.paused = self.paused, set()
        for process in list(self.processes):
            process.detach(self)
        for process in paused:
            process.resume()
        self._gone(self, reason)
