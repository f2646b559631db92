"""One client: lines in, whole lines out, no matter how slowly it reads."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from sterna.limits import (
    REMOTE_BACKLOG_BYTES,
    REMOTE_LINE_MAX_BYTES,
    REMOTE_PARTIAL_TOTAL_MAX_BYTES,
    REMOTE_PENDING_MAX_BYTES,
    REMOTE_REPLIES_MAX_BYTES,
    REMOTE_REQUESTS_PENDING_MAX,
)
from sterna.remote.loop import READ, WRITE

if TYPE_CHECKING:
    from sterna.remote.loop import Loop

    class Resumable(Protocol):
        """What makes frames for clients: a process for its subscriber, a watcher."""

        def resume(self) -> None:
            """The client has caught up."""

        def detach(self, connection: Connection) -> None:
            """The client is gone."""


_READ_BYTES: Final = 64 * 1024
_PIECES_MAX = 64  # of one sendmsg


class Budget:
    """Bytes of lines that have begun and not ended, of all clients together."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = 0


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
        "_budget", "_corked", "_deciding", "_gone", "_handle", "_held", "_loop", "_mask", "_out", "_partial", "_socket",
        "backlog", "closed", "paused", "pending", "pending_bytes", "processes", "stdin",
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
        self._corked = self.closed = False
        self._deciding = 0  # bytes of a line that is read elsewhere
        self.backlog = 0  # bytes that wait in _out
        self.pending = self.pending_bytes = 0  # of requests without a reply yet
        self.processes: set[Resumable] = set()  # those whose frames come here
        self.paused: set[Resumable] = set()  # those that wait for the backlog to shrink
        self.stdin: deque[Callable[[], bool]] = deque()  # stdin requests in their order, the first one is blocked
        self._mask = READ
        loop.watch(sock.fileno(), READ, self._ready)

    # -------------------------------------------------------------------------------------------------------- reading

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self.flush()
            if events & ~WRITE and not self.closed:
                self._receive()
        except Exception:
            self.close("internal error")
            raise

    def _receive(self) -> None:
        if not self._mask & READ:  # a hang-up is reported although nobody asked
            self.close()
            return
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
        self._corked = False
        if self._out and not self.closed:
            self.flush()

    def _split(self, data: bytes) -> None:
        lines: list[bytes | bytearray] = [*data.split(b"\n")]
        rest = lines.pop()
        partial = len(self._partial)
        if partial:
            if lines:
                lines[0] = self._partial + lines[0]
            else:
                rest = self._extended(rest)
        self._budget.used += len(rest) - partial
        self._partial = rest
        if not self._serve(lines):
            return
        if len(rest) > REMOTE_LINE_MAX_BYTES:
            self._too_long()
        elif self._budget.used > REMOTE_PARTIAL_TOTAL_MAX_BYTES:
            self.close("unfinished lines of all clients take too much memory")

    def _serve(self, lines: list[bytes | bytearray]) -> bool:
        """Hands lines on; returns whether the connection goes on. What it must not ask for yet is held back."""
        for number, line in enumerate(lines):
            if len(line) > REMOTE_LINE_MAX_BYTES:
                self._too_long()
                return False
            if self._busy:
                self._held = lines[number:]
                break
            if line.endswith(b"\r"):
                line = line[:-1]  # noqa: PLW2901 # the line without its ending is the line
            if line:
                self._handle(self, bytes(line))
                if self.closed:
                    return False
        if self._busy:
            self._set_mask()
        return True

    def _go_on(self) -> None:
        """Serves lines that were held back, then reads on."""
        held, self._held = self._held, []
        if not self.closed and self._serve(held):
            self._set_mask()

    @property
    def _busy(self) -> bool:
        """Whether the client is to be read no further until it has taken replies or its requests are done."""
        return (
            self._deciding > 0
            or self.backlog > REMOTE_REPLIES_MAX_BYTES
            or self.pending > REMOTE_REQUESTS_PENDING_MAX
            or self.pending_bytes > REMOTE_PENDING_MAX_BYTES
        )

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
        if self.closed:
            return
        self._out.append(data)
        self.backlog += len(data)
        if not self._corked and len(self._out) == 1:
            self.flush()

    def write_pieces(self, pieces: tuple[bytes | bytearray, ...]) -> None:
        """Sends one line given in pieces; what cannot be sent now is copied."""
        if self.closed:
            return
        if self._out:
            self.write(b"".join(pieces))
            return
        try:
            sent = self._socket.sendmsg(pieces)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        size = sum(map(len, pieces))
        if sent < size:
            self._out.append(memoryview(b"".join(pieces))[sent:])
            self.backlog = size - sent
            self._set_mask()

    def write_lazy(self, lines: Iterator[bytes], size: int) -> None:
        """Sends lines that are made while they are sent; `size` is a bound of their bytes."""
        if size and not self.closed:
            self._out.append(Lazy(lines, size))
            self.backlog += size
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
            except OSError:
                self.close()
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
                lazy.left = 0
            taken = min(lazy.left, size)
            lazy.left -= taken
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
        if self.closed:
            return
        mask = 0 if self._busy or self._held else READ
        if self._held and not self._busy:
            self._loop.post(self._go_on)
        if self._out:
            mask |= WRITE
        if mask != self._mask:
            self._mask = mask
            self._loop.change(self._socket.fileno(), mask)

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
        self._budget.used -= len(self._partial) + self._deciding
        self._partial = b""
        self._held.clear()
        self.stdin.clear()
        paused, self.paused = self.paused, set()
        for process in list(self.processes):
            process.detach(self)
        for process in paused:
            process.resume()
        self._gone(self, reason)
