"""Time as the program sees it: integer nanoseconds, passed in wherever a decision depends on them."""

from __future__ import annotations

import time


class Clock:
    """The system's clocks; tests pass an object with the same methods."""

    __slots__ = ()

    def monotonic(self) -> int:
        """Returns nanoseconds that never go back and stand still while the machine sleeps (CLOCK_MONOTONIC)."""
        return time.monotonic_ns()

    def boottime(self) -> int:
        """Returns nanoseconds that also count the machine's sleep (CLOCK_BOOTTIME), to notice that it slept."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall(self) -> int:
        """Returns nanoseconds since 1970 (Unix time); only for expiry dates, counters and display."""
        return time.time_ns()


SYSTEM_CLOCK = Clock()
