"""Threads for what may block: files, git. One more is started whenever none is idle, up to a bound."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from sterna.limits import REMOTE_WORKERS_MAX

_STACK_BYTES = 512 * 1024


class Workers:
    """Runs calls in `most` threads at the most; what they leave to be done afterwards is handed to `post`."""

    def __init__(self, post: Callable[[Callable[[], None]], None], most: int = REMOTE_WORKERS_MAX) -> None:
        self._post, self._most = post, most
        self._jobs: SimpleQueue[Callable[[], Callable[[], None]]] = SimpleQueue()
        self._started = 0
        self._busy = 0

    def submit(self, job: Callable[[], Callable[[], None]]) -> None:
        """Runs `job` in a thread, then what it returned in the loop. `job` must not raise."""
        self._busy += 1
        if self._busy > self._started < self._most:
            threading.stack_size(_STACK_BYTES)
            try:
                threading.Thread(target=self._work, daemon=True).start()
                self._started += 1
            except RuntimeError:  # the system gives no more
                if self._started == 0:
                    self._busy -= 1
                    raise
        self._jobs.put(job)

    def alike(self) -> Workers:
        """Returns others of the same kind."""
        return Workers(self._post, self._most)

    @property
    def all_busy(self) -> bool:
        """Whether another job would have to wait."""
        return self._busy >= self._most

    def _work(self) -> None:
        while True:
            after = self._jobs.get()()
            self._post(lambda after=after: self._done(after))  # type: ignore[misc] # bound now, not when it is called

    def _done(self, after: Callable[[], None]) -> None:
        self._busy -= 1
        after()
