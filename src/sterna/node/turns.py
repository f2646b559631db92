"""Whose frames wait: connections that sent more small frames than one turn is for go on one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sterna.transport.pump import Reactor


class Turns:
    """In each turn of the loop one of those that wait goes on, so that no number of frames holds up anybody's keys."""

    __slots__ = ("_reactor", "_waiting")

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._waiting: deque[Callable[[], None]] = deque()

    def wait(self, go_on: Callable[[], None]) -> None:
        """Calls back in a later turn, after those that wait already."""
        self._waiting.append(go_on)
        if len(self._waiting) == 1:
            self._reactor.loop.call_soon(self._next)

    def _next(self) -> None:
        go_on = self._waiting[0]
        try:
            self._reactor.run(go_on)
        finally:
            self._waiting.popleft()
            if self._waiting:
                self._reactor.loop.call_soon(self._next)
