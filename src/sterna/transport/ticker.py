"""Coarse timers for many machines: one timer for all of them, none while nothing is due."""

from __future__ import annotations

import asyncio
from typing import Protocol

from sterna.clock import SYSTEM_CLOCK, Clock
from sterna.transport.pump import Reactor

_TICK_SECONDS = 0.05


class Timed(Protocol):
    """A machine with time limits; times are monotonic nanoseconds."""

    def next_timeout(self) -> int | None:
        """Returns when it wants to be called, or None."""

    def handle_timeout(self, now: int) -> None:
        """Does what is due."""


class Ticker:
    """Calls machines when they are due, up to 50 ms late; a machine that has nothing due is forgotten."""

    __slots__ = ("_clock", "_handle", "_reactor", "_watched")

    def __init__(self, reactor: Reactor, clock: Clock = SYSTEM_CLOCK) -> None:
        self._reactor = reactor
        self._clock = clock
        self._watched: set[Timed] = set()
        self._handle: asyncio.TimerHandle | None = None

    def watch(self, machine: Timed) -> None:
        """Looks after a machine until it has nothing due; to be called whenever it may have."""
        self._watched.add(machine)
        if self._handle is None:
            self._handle = self._reactor.loop.call_later(_TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._reactor.run(self._due)
        self._handle = self._reactor.loop.call_later(_TICK_SECONDS, self._tick) if self._watched else None

    def _due(self) -> None:
        now = self._clock.monotonic()
        for machine in list(self._watched):
            due = machine.next_timeout()
            if due is None:
                self._watched.discard(machine)
            elif due <= now:
                machine.handle_timeout(now)

    def close(self) -> None:
        """Stops."""
        self._watched.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
