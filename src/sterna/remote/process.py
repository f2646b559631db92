"""One process of a client: its frames, its one subscriber, its input queue, its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from sterna.limits import (
    REMOTE_DRAIN_SECONDS,
    REMOTE_FRAME_BYTES,
    REMOTE_PIPE_BYTES,
    REMOTE_STDIN_QUEUE_BYTES,
)
from sterna.remote.child import STDERR, STDOUT
from sterna.remote.loop import READ, WRITE
from sterna.remote.replay import EXIT, Replay
from sterna.remote.spawn import trim_memory
from sterna.remote.watching import Watcher, show

if TYPE_CHECKING:
    from sterna.remote.child import Child
    from sterna.remote.connection import Connection
    from sterna.remote.durable import DurableChild
    from sterna.remote.loop import Loop, Timer
    from sterna.remote.metrics import Metrics

_FLOOD_READS: Final = 8  # so many full reads in a row make a flood
_TRIM_BYTES: Final = 4 * 1024 * 1024  # of replay, from where on freed memory is worth giving back
_CUT_READS: Final = 2 * REMOTE_PIPE_BYTES // REMOTE_FRAME_BYTES  # the most that a pipe can hold

# msgspec's base64 is twice as fast as binascii's; it comes with the quotes around it.
_encode_into: Final = msgspec.json.Encoder().encode_into
_scratch: Final = bytearray()


class Process:
    """Moves output of a child to whoever subscribed, and input to the child.

    Parameters: `ended(process)`, called once, right after the exit frame. Times are in seconds.
    """

    __slots__ = (
        "_drain", "_ended", "_full_reads", "_loop", "_metrics", "_open", "_paused", "_stdin_blocked", "_stdin_bytes",
        "_stdin_dead", "_stdin_queue", "_watched_stdin", "applied", "child", "command", "ended_at", "exit_waiters",
        "id", "replay", "running", "started_at", "stdin_closed", "subscriber", "watchers",
    )  # fmt: skip

    def __init__(
        self,
        loop: Loop,
        metrics: Metrics,
        process_id: str,
        child: Child,
        ended: Callable[[Process], None],
        command: str = "",
    ) -> None:
        self._loop, self._metrics, self.id, self.child, self._ended = loop, metrics, process_id, child, ended
        self.started_at, self.ended_at = child.started_at, 0.0
        self.replay = Replay(process_id)
        self.subscriber: Connection | None = None
        self.watchers: dict[Connection, Watcher] = {}
        self.command = command
        self.running = True
        self.applied = 0
        self.exit_waiters: dict[Callable[[], None], None] = {}  # in their order; each counts once
        self._open = {stream for stream in (STDOUT, STDERR) if child.output(stream) >= 0}
        self._paused = False
        self._full_reads = [0, 0]
        self._drain: Timer | None = None
        self._stdin_queue: deque[bytes | memoryview] = deque()
        self._stdin_bytes = 0
        self._stdin_blocked: dict[Callable[[], None], None] = {}
        self._stdin_dead = self._watched_stdin = self.stdin_closed = False

    def begin(self) -> None:
        """Starts to watch the child."""
        self._loop.watch(self.child.pidfd, READ, self._exited)
        for stream in sorted(self._open):
            self._watch_output(stream)

    def take_up(self, child: DurableChild) -> None:
        """Goes on, instead of `begin`, where another daemon left off with the child."""
        child.recover(self.replay)
        self.applied, self.stdin_closed = child.applied, child.stdin_sealed
        if child.exit_code is not None:
            self.running, self.ended_at, self._stdin_dead = False, child.ended_at, True
            for stream in self._open:
                child.close_output(stream)
            self._open.clear()
            child.close_stdin()
            child.reap()
            return
        self.begin()
        if child.waiting and child.stdin >= 0:
            self._stdin_bytes = child.waiting
            self._stdin_queue.append(bytes(child.waiting))  # only its length counts
            self._write_stdin(0)
        elif self.stdin_closed:
            child.close_stdin()

    # --------------------------------------------------------------------------------------------------------- output

    def _watch_output(self, stream: int) -> None:
        read = self._read_stdout if stream == STDOUT else self._read_stderr
        self._loop.watch_bulk(self.child.output(stream), read)

    def _read_stdout(self, reads: int) -> None:
        self._read(STDOUT, reads)

    def _read_stderr(self, reads: int) -> None:
        self._read(STDERR, reads)

    def _read(self, stream: int, reads: int) -> None:
        for _ in range(reads):
            chunk = self.child.read(stream)
            if chunk is None:
                return
            if not chunk:
                self._end_of(stream)
                return
            self._frame(stream, chunk)
            if self.subscriber is not None and self.subscriber.full:
                self._pause()
                return
            if len(chunk) < REMOTE_FRAME_BYTES:
                self._full_reads[stream] = 0
                return
            self._full_reads[stream] += 1
            if self._full_reads[stream] == _FLOOD_READS:
                self.child.widen(stream)

    def _frame(self, stream: int, chunk: bytes) -> None:
        self._metrics.stream_bytes += len(chunk)
        seq = self.replay.add(stream, chunk)
        if self.subscriber is not None:
            _encode_into(chunk, _scratch)
            self.subscriber.write_pieces((self.replay.start(stream, seq), _scratch, b"}\n"))
        if self.watchers:
            show(self.watchers, self.replay, stream, seq, chunk)

    def _pause(self) -> None:
        """Stops reading until the subscriber has caught up: the child feels it, nobody else does."""
        if self.subscriber is None:
            return
        self.subscriber.paused.add(self)
        if not self._paused:
            self._paused = True
            for stream in self._open:
                self._loop.forget(self.child.output(stream))

    def resume(self) -> None:
        """Reads on after the subscriber caught up, went away or was replaced."""
        if not self._paused:
            return
        if self.subscriber is not None and self.subscriber.full:
            self.subscriber.paused.add(self)
            return
        self._paused = False
        for stream in self._open:
            self._watch_output(stream)

    def _end_of(self, stream: int) -> None:
        if stream in self._open:
            self._open.discard(stream)
            self._loop.forget(self.child.output(stream))
            self.child.close_output(stream)
        if not self._open and self.child.exit_code is not None:
            self._finish()

    # ----------------------------------------------------------------------------------------------------- subscriber

    def attach(self, connection: Connection, seq: int) -> None:
        """Makes `connection` the only subscriber and sends it all frames above `seq`."""
        self.subscribe(connection)
        connection.write_lazy(self.replay.after(seq), self.replay.bytes_after(seq))
        if connection.full:
            self._pause()
        else:
            self.resume()

    def subscribe(self, connection: Connection) -> None:
        """Makes `connection` the only subscriber."""
        self.unsubscribe()
        self.unwatch(connection)
        if not connection.closed:
            self.subscriber = connection
            connection.processes.add(self)

    def unsubscribe(self) -> None:
        """Sends frames to nobody any more."""
        if self.subscriber is not None:
            self.subscriber.processes.discard(self)
            self.subscriber.paused.discard(self)
            self.subscriber = None

    def detach(self, connection: Connection) -> None:
        """The connection is gone."""
        connection.processes.discard(self)
        if self.subscriber is connection:
            self.subscriber = None
            self.resume()

    def watch(self, connection: Connection, seq: int) -> None:
        """Sends frames above `seq` to `connection` too, as far as it keeps up with them."""
        self.unwatch(connection)
        if not connection.closed:
            Watcher(self._loop, self.watchers, self.replay, connection, seq).pump()

    def unwatch(self, connection: Connection) -> None:
        """Ends the watch of a connection, if it has one."""
        watcher = self.watchers.get(connection)
        if watcher is not None:
            watcher.detach(connection)

    def unwatch_all(self) -> None:
        """Ends all watches and says so."""
        for watcher in list(self.watchers.values()):
            watcher.end()

    # ---------------------------------------------------------------------------------------------------------- input

    def takes(self, size: int) -> bool:
        """Returns whether the input queue has room; one chunk of any size is taken when it is empty."""
        return not self._stdin_queue or self._stdin_bytes + size <= REMOTE_STDIN_QUEUE_BYTES

    def when_taking(self, callback: Callable[[], None]) -> None:
        """Calls back once, when the queue has shrunk or the process has ended."""
        self._stdin_blocked[callback] = None

    def stop_waiting(self, callback: Callable[[], None]) -> None:
        """Forgets what `when_taking` was given."""
        self._stdin_blocked.pop(callback, None)

    def feed(self, data: bytes) -> None:
        """Queues input; what comes after the child closed its input is dropped."""
        self.child.keep(data)
        self.applied += len(data)
        self._metrics.stdin_bytes += len(data)
        if not data or self._stdin_dead:
            return
        self._stdin_queue.append(data)
        self._stdin_bytes += len(data)
        if not self._watched_stdin:
            self._write_stdin(0)

    def _write_stdin(self, _events: int) -> None:
        queue = self._stdin_queue
        try:
            while queue:
                sent = self.child.write(queue[0])
                self._stdin_bytes -= sent
                if sent < len(queue[0]):
                    queue[0] = memoryview(queue[0])[sent:]
                    break
                queue.popleft()
        except OSError:
            self._end_stdin()
        if bool(queue) != self._watched_stdin:
            self._watched_stdin = bool(queue)
            if queue:
                self._loop.watch(self.child.stdin, WRITE, self._write_stdin)
            else:
                self._loop.forget(self.child.stdin)
        if self.stdin_closed and not queue:
            self.child.close_stdin()
        self._unblock_stdin()

    def close_stdin(self) -> None:
        """Closes the child's input as soon as it has taken everything that is queued."""
        self.stdin_closed = True
        self.child.seal_stdin()
        if not self._stdin_queue:
            self.child.close_stdin()

    def _end_stdin(self) -> None:
        self._stdin_dead = True
        self._stdin_queue.clear()
        self._stdin_bytes = 0

    def _unblock_stdin(self) -> None:
        blocked, self._stdin_blocked = self._stdin_blocked, {}
        for callback in blocked:
            callback()

    # ------------------------------------------------------------------------------------------------------------ end

    def _exited(self, _events: int) -> None:
        if not self.child.look():
            return
        self._loop.forget(self.child.pidfd)
        if not self._open:
            self._finish()
            return
        self._drain = self._loop.later(REMOTE_DRAIN_SECONDS, self._cut)
        if self._paused:  # there is nobody left to hold up, and no more than the pipes hold
            self._take_rest()

    def _take_rest(self) -> None:
        """Takes what is in the pipes now, whether the subscriber keeps up or not."""
        for stream in sorted(self._open):
            for _ in range(_CUT_READS):
                chunk = self.child.read(stream)
                if chunk is None:
                    break
                if not chunk:
                    self._end_of(stream)
                    break
                self._frame(stream, chunk)

    def _cut(self) -> None:
        """Others still hold the outputs open: what is in the pipes now is taken, then they are closed."""
        self._take_rest()
        for stream in sorted(self._open):
            self._end_of(stream)

    def _finish(self) -> None:
        if not self.running:
            return
        if self._drain is not None:
            self._drain.cancel()
        self.running = False
        self.ended_at = time.monotonic()
        self.child.finish()
        code = str(self.child.exit_code).encode()
        seq = self.replay.add(EXIT, code)
        if self.subscriber is not None:
            self.subscriber.write(self.replay.line(EXIT, seq, code))
        if self.watchers:
            show(self.watchers, self.replay, EXIT, seq, code)
        self._ended(self)
        waiters, self.exit_waiters = self.exit_waiters, {}
        for waiter in waiters:
            waiter()
        if self._watched_stdin:
            self._loop.forget(self.child.stdin)
        self._end_stdin()
        self._unblock_stdin()
        self.child.close_stdin()
        self.child.reap()
        if self.replay.size > _TRIM_BYTES:
            trim_memory()
