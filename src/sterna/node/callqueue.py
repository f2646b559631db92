"""CALLs wait in line: one is answered in each turn of the loop, so that no number of them holds up anybody's keys."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sterna.transport.pump import Reactor


class CallQueue:
    """The CALLs of all connections of a node, answered in the order in which they came."""

    __slots__ = ("_reactor", "_waiting")

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._waiting: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, answer: Callable[[], None]) -> None:
        """Has one answered later; the caller bounds how many of its own wait."""
        self._waiting.append(answer)
        if len(self._waiting) == 1:
            self._reactor.loop.call_soon(self._next)

    def _next(self) -> None:
        answer = self._waiting[0]
        try:
            self._reactor.run(answer)
        finally:
            self._waiting.popleft()
            if self._waiting:
                self._reactor.loop.call_soon(self._next)
