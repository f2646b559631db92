"""A TCP proxy that cuts, freezes, delays and refuses: the network between a client and the node, at its worst."""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

_CHUNK = 64 * 1024
_QUEUE_MAX = 1024 * 1024
_RESET = struct.pack("ii", 1, 0)


class _Half:
    """One direction of a connection: what was read from `source` and waits, each with its due time, for `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        self.source, self.sink, self.up = source, sink, up
        self.queue: deque[tuple[float, bytes]] = deque()
        self.size = 0
        self.ended = False  # the source will say no more
        self.passed_end = False


class _Pair:
    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.halves = (_Half(near, far, True), _Half(far, near, False))
        self.frozen = False


class CutProxy:
    """Listens on `port` (127.0.0.1) and passes on to `target`, in one thread; any thread may call any method.

    Counted: `connections` accepted, `cuts` (connections cut), `bytes_up` and `bytes_down` passed on, `in_flight` read
    but not passed on yet, `bytes_lost` thrown away by cuts. `delay` (seconds, each way) may be set at any time.
    """

    def __init__(self, target: int, host: str = "127.0.0.1") -> None:
        self.target = target
        self.host = host
        self.delay = 0.0
        self.connections = self.cuts = self.bytes_up = self.bytes_down = self.bytes_lost = 0
        self._selector = selectors.DefaultSelector()
        self._pairs: set[_Pair] = set()
        self._commands: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_number = 0
        self._frozen = False
        self._chaos = 0
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        self._listener: socket.socket | None = None
        self.port = 0
        self._listen()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="cut-proxy", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        """Bytes read and not passed on."""
        return sum(half.size for pair in list(self._pairs) for half in pair.halves)

    # ---- what a test does --------------------------------------------------------------------------------------

    def cut(self, *, reset: bool = True) -> None:
        """Ends all connections now; what is in flight is lost. `reset` sends RST, else FIN."""
        self._do(lambda: self._cut_all(reset))

    def freeze(self, *, existing_only: bool = False) -> None:
        """Passes nothing on and says nothing, until `thaw`; with `existing_only` new connections work."""

        def do() -> None:
            self._frozen = self._frozen or not existing_only
            for pair in self._pairs:
                pair.frozen = True

        self._do(do)

    def thaw(self) -> None:
        """Passes on again."""

        def do() -> None:
            self._frozen = False
            for pair in self._pairs:
                pair.frozen = False

        self._do(do)

    def refuse(self) -> None:
        """Listens no more: new connections are refused; those that are there stay."""
        self._do(self._unlisten)

    def accept(self) -> None:
        """Listens again on the same port."""
        self._do(self._listen)

    def chaos(
        self,
        seed: int,
        *,
        every: tuple[float, float] = (0.05, 0.5),
        actions: Sequence[str] = ("reset", "close", "freeze", "stall"),
    ) -> None:
        """Does something bad after random times within `every` (seconds), until `calm`; `seed` decides all.

        "reset" and "close" cut all connections, "freeze" makes those that are there silent for ever, "stall" stops
        everything for up to half a second, "delay" changes the delay, "refuse" refuses for up to half a second. The
        next thing comes after that is over: in between the network works.
        """
        rng = random.Random(seed)
        self._chaos += 1
        turn = self._chaos

        def act() -> None:
            if turn != self._chaos:
                return
            what = rng.choice(list(actions))
            pause = rng.uniform(0.05, 0.5)
            busy = 0.0
            if what in ("reset", "close"):
                self._cut_all(what == "reset")
            elif what == "freeze":
                for pair in self._pairs:
                    pair.frozen = True
            elif what == "delay":
                self.delay = pause / 10
            elif what == "stall":
                busy = pause
                self._frozen = True
                self._later(busy, self._unstall)
            elif what == "refuse":
                busy = pause
                self._unlisten()
                self._later(busy, self._listen)
            else:
                raise AssertionError(f"the proxy knows nothing about {what!r}")
            self._later(busy + rng.uniform(*every), act)

        self._do(lambda: self._later(rng.uniform(*every), act))

    def calm(self) -> None:
        """Ends the chaos; connections that are frozen stay so, everything else works."""

        def do() -> None:
            self._chaos += 1
            self._unstall()
            self.delay = 0.0
            self._listen()

        self._do(do)

    def close(self) -> None:
        """Stops the proxy."""
        if self._stopping:
            return
        self._stopping = True
        self._wake()
        self._thread.join(5)
        assert not self._thread.is_alive(), "the proxy does not stop"
        # Not by the thread: it may see that it has to stop before it is woken.
        os.close(self._wake_in)
        os.close(self._wake_out)

    # ---- its thread --------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_out, b"x")

    def _do(self, command: Callable[[], None]) -> None:
        """Has the thread run a command, and waits until it did."""
        done = threading.Event()

        def run() -> None:
            command()
            done.set()

        self._commands.append(run)
        self._wake()
        assert done.wait(10), "the proxy's thread does not answer"

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer_number, what))

    def _unstall(self) -> None:
        self._frozen = False

    def _listen(self) -> None:
        if self._listener is None:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
            listener.listen(64)
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            self._listener = listener
            self._selector.register(listener, selectors.EVENT_READ, None)

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _cut_all(self, reset: bool) -> None:
        for pair in list(self._pairs):
            self.cuts += 1
            self._end(pair, reset)

    def _end(self, pair: _Pair, reset: bool) -> None:
        self._pairs.discard(pair)
        for half in pair.halves:
            self.bytes_lost += half.size
        for sock in (pair.near, pair.far):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(sock)
            if reset:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()

    def _run(self) -> None:
        while not self._stopping:
            self._arm()
            for key, _events in self._selector.select(self._patience()):
                if key.fileobj == self._wake_in:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_in, 4096)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.data in self._pairs:
                    self._read(key.data)
            while self._commands:
                self._commands.popleft()()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            for pair in list(self._pairs):
                self._write(pair)
        self._unlisten()
        for pair in list(self._pairs):
            self._end(pair, True)
        self._selector.close()

    def _patience(self) -> float | None:
        """How long the thread may wait: until the next timer, or the next chunk that is due."""
        times = [self._timers[0][0]] if self._timers else []
        for pair in self._pairs:
            if not self._silent(pair):
                times += [half.queue[0][0] for half in pair.halves if half.queue]
        if not times:
            return None
        # A sink that is full is asked again soon: simpler than a second set of events, and this is no benchmark.
        return max(min(times) - time.monotonic(), 0.001)

    def _silent(self, pair: _Pair) -> bool:
        return self._frozen or pair.frozen

    def _arm(self) -> None:
        """Watches the sockets that may be read now."""
        for pair in self._pairs:
            for half in pair.halves:
                want = not (self._silent(pair) or half.ended or half.size > _QUEUE_MAX)
                watched = half.source in self._selector.get_map()
                if want and not watched:
                    self._selector.register(half.source, selectors.EVENT_READ, pair)
                elif watched and not want:
                    self._selector.unregister(half.source)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        far = socket.socket()
        try:
            far.connect((self.host, self.target))
        except OSError:
            far.close()
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            near.close()
            return
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections += 1
        self._pairs.add(_Pair(near, far))

    def _read(self, pair: _Pair) -> None:
        for half in pair.halves:
            if half.ended or self._silent(pair) or half.size > _QUEUE_MAX:
                continue
            try:
                data = half.source.recv(_CHUNK)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:
                self._end(pair, True)
                return
            if data:
                half.queue.append((time.monotonic() + self.delay, data))
                half.size += len(data)
            else:
                half.ended = True

    def _write(self, pair: _Pair) -> None:
        if self._silent(pair):
            return
        try:
            for half in pair.halves:
                self._pass_on(half, time.monotonic())
        except OSError:
            self._end(pair, True)
            return
        if all(half.passed_end for half in pair.halves):
            self._end(pair, False)

    def _pass_on(self, half: _Half, now: float) -> None:
        """Gives the sink what is due, as much as it takes."""
        while half.queue and half.queue[0][0] <= now:
            due, data = half.queue[0]
            try:
                sent = half.sink.send(data)
            except (BlockingIOError, InterruptedError):
                return
            half.size -= sent
            if half.up:
                self.bytes_up += sent
            else:
                self.bytes_down += sent
            if sent < len(data):
                half.queue[0] = (due, data[sent:])
                return
            half.queue.popleft()
        if half.ended and not half.queue and not half.passed_end:
            half.passed_end = True
            half.sink.shutdown(socket.SHUT_WR)
