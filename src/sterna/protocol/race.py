"""When to suspect a connection, and when to dial: the two clocks of the client (docs/protocol.md, section 4)."""

from __future__ import annotations

from collections.abc import Callable

from sterna import limits
from sterna.units import MILLISECOND, SECOND

_SILENCE = limits.SILENCE_MS * MILLISECOND
_BUSY = limits.BUSY_SECONDS * SECOND
_KEEPALIVE = limits.KEEPALIVE_SECONDS * SECOND
_SUSPECT_MIN = limits.SUSPECT_MIN_MS * MILLISECOND
_FAST, _SLOW, _SLOWEST = limits.RACE_EVERY_MS * MILLISECOND, 250 * MILLISECOND, SECOND
_FAST_UNTIL, _SLOW_UNTIL = 10 * SECOND, 60 * SECOND
_BACKOFF_MAX = 2 * SECOND
_REST_MAX = 8 * SECOND


class Vitals:
    """How alive the active connection looks; all times are monotonic nanoseconds.

    After traffic, a second of silence is looked into; an idle connection is asked now and then. `srtt` is the smoothed
    round trip of PINGs.
    """

    __slots__ = ("_heard", "_ping", "_traffic", "srtt")

    def __init__(self, now: int) -> None:
        self._heard = self._traffic = now
        self._ping = -1
        self.srtt = 50 * MILLISECOND

    def renewed(self, now: int) -> None:
        """Begins anew with another connection."""
        self._heard = self._traffic = now
        self._ping = -1

    def received(self, now: int) -> None:
        """Notes that the peer is there."""
        self._heard = now
        self._ping = -1

    def traffic(self, now: int) -> None:
        """Notes that session bytes came or went."""
        self._traffic = now

    def asked(self, now: int) -> None:
        """Notes that a PING goes out."""
        self._ping = now

    def answered(self, stamp: int, now: int) -> None:
        """Notes the PONG for the PING of time `stamp`."""
        if 0 <= now - stamp < 60 * SECOND:
            self.srtt += (now - stamp - self.srtt) // 8

    def due(self, owed: bool) -> int:
        """Returns when `check` is to be called; `owed` says that input is not acknowledged."""
        if self._ping >= 0:
            return self._ping + max(_SUSPECT_MIN, 4 * self.srtt)
        soon = self._heard + _SILENCE
        return soon if owed or soon - self._traffic < _BUSY else self._heard + _KEEPALIVE

    def check(self, now: int, owed: bool) -> str:
        """Returns "ping" when the peer is to be asked, "no answer" when it is to be suspected, or ""."""
        if now < self.due(owed):
            return ""
        if self._ping >= 0:
            self._ping = -1
            self._heard = now
            return "no answer"
        self._ping = now
        return "ping"


class Race:
    """When to open the next connection: every 50 ms at first, rarer later, with back-off where nobody listens."""

    __slots__ = ("_next", "_random", "_refusals", "_rest", "_rested", "_since", "running")

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._random = random
        self.running = False
        self._since = self._next = 0
        self._refusals = self._rest = self._rested = 0

    def begin(self, now: int) -> None:
        """Starts a race: the first attempt is due at once."""
        self.running = True
        self._since = self._next = now
        self._refusals = self._rest = self._rested = 0

    def end(self) -> None:
        """Ends the race."""
        self.running = False

    def hurry(self, now: int) -> None:
        """Tries at once: something changed."""
        self._since = now
        self._next = min(self._next, now)
        self._refusals = 0

    def due(self) -> int | None:
        """Returns when the next attempt is due, or None."""
        return self._next if self.running else None

    def take(self, now: int) -> bool:
        """Returns whether an attempt is to begin now, and counts it."""
        if not self.running or now < self._next:
            return False
        age = now - self._since
        self._next = now + (_FAST if age < _FAST_UNTIL else _SLOW if age < _SLOW_UNTIL else _SLOWEST)
        return True

    def connected(self, now: int) -> None:
        """Rests once the node's machine took a connection: the network works, and a busy node gets no faster by more.

        Each further one in the same race doubles the rest, from 1 s to 8 s.
        """
        if now >= self._rested:
            self._rest = min(self._rest * 2 or SECOND, _REST_MAX)
            self._rested = now + self._rest
        self._next = max(self._next, self._rested)

    def established(self, now: int) -> None:
        """Rests after a connection was established: now it is up to the answer."""
        self._refusals = 0
        self._next = max(self._next, now + SECOND)

    def failed(self, now: int, refused: bool) -> None:
        """Backs off with full jitter where nobody listens; a silent network costs nothing to be asked again."""
        if refused:
            self._refusals = min(self._refusals + 1, 16)
            top = min(_FAST << self._refusals, _BACKOFF_MAX)
            self._next = now + int.from_bytes(self._random(4), "big") * top // 0xFFFF_FFFF

    def wait(self, now: int, seconds: float) -> None:
        """Waits as long as the node asked for, at most 10 s (what is no number counts as no wait)."""
        self._next = max(self._next, now + int(min(max(0.05, seconds), 10.0) * SECOND))
