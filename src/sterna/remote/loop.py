"""The daemon's event loop: epoll, timers, calls from other threads. Importing asyncio costs more than all of this."""

from __future__ import annotations

import heapq
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from typing import Final

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT

_RINGS = 65_536
_TURN_EVENTS = 64  # whoever is left out is among the first of the next turn
_TURN_READS = 4  # of all pipes together in one turn, so that requests never wait for long


class Timer:
    """A call at a time; `cancel` may be called at any time, also after it ran."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None] | None) -> None:
        self.callback = callback

    def cancel(self) -> None:
        """Makes the timer do nothing."""
        self.callback = None


class Loop:
    """Calls back when descriptors are ready. Only `post` may be called by other threads and signal handlers.

    Descriptors are of two kinds: `watch` for those that are served first, `watch_bulk` for pipes with output of
    processes, which share what is left of a turn: their callback is given how many reads it may do.

    Parameters: `failed(error)`, told of what a callback raised; the descriptor it was for is not watched any more.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._epoll = select.epoll()
        self._served: dict[int, Callable[[int], None]] = {}
        self._bulk: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._posted: deque[Callable[[], None]] = deque()
        self._bell, self._button = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._running = True
        self.watch(self._bell, READ, self._rung)

    def watch(self, descriptor: int, mask: int, callback: Callable[[int], None]) -> None:
        """Calls `callback(events)` whenever the descriptor is ready for what `mask` says."""
        self._served[descriptor] = callback
        self._epoll.register(descriptor, mask)

    def change(self, descriptor: int, mask: int) -> None:
        """Changes what a watched descriptor is watched for; hang-ups are always reported."""
        self._epoll.modify(descriptor, mask)

    def watch_bulk(self, descriptor: int, callback: Callable[[int], None]) -> None:
        """Calls `callback(reads)` whenever there is something to read."""
        self._bulk[descriptor] = callback
        self._epoll.register(descriptor, READ)

    def forget(self, descriptor: int) -> None:
        """Stops watching a descriptor, which must still be open; one that is not watched is ignored."""
        if self._served.pop(descriptor, None) is not None or self._bulk.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Calls `callback` in so many seconds, unless the returned timer is cancelled before."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def post(self, callback: Callable[[], None]) -> None:
        """Calls `callback` in the loop's own thread, soon."""
        self._posted.append(callback)
        try:
            os.write(self._button, b"\0")
        except BlockingIOError:
            pass  # it rings already

    def when_signalled(self, numbers: Iterable[int], callback: Callable[[], None]) -> None:
        """Calls `callback` in the loop for each of these signals. Only for the main thread."""
        signal.set_wakeup_fd(self._button, warn_on_full_buffer=False)  # one may come right before `poll` begins to wait
        for number in numbers:
            signal.signal(number, lambda *_: self.post(callback))

    def stop(self) -> None:
        """Ends `run` after what it does at the moment."""
        self._running = False

    def run(self) -> None:
        """Serves until `stop`."""
        poll, served, bulk = self._epoll.poll, self._served, self._bulk
        descriptor = -1
        while self._running:
            events = poll(self._wait(), _TURN_EVENTS)
            pipes = []
            try:
                for descriptor, mask in events:
                    callback = served.get(descriptor)
                    if callback is not None:
                        callback(mask)
                    elif descriptor in bulk:
                        pipes.append(descriptor)
                for descriptor in pipes:
                    callback = bulk.get(descriptor)
                    if callback is not None:
                        callback(max(1, _TURN_READS // len(pipes)))
                descriptor = self._bell
                if self._timers:
                    self._ring_timers()
            except Exception as error:  # noqa: BLE001 # one client's or process's trouble is not that of all
                self._failed(error)
                if descriptor != self._bell:
                    self.forget(descriptor)

    def _wait(self) -> float | None:
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        return max(0.0, timers[0][0] - time.monotonic()) if timers else None

    def _ring_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                callback()

    def _rung(self, _events: int) -> None:
        try:
            os.read(self._bell, _RINGS)
        except BlockingIOError:
            pass
        for _ in range(len(self._posted)):
            self._posted.popleft()()
