"""The space of all arenas together: taking and giving chunks, under a quota."""

from __future__ import annotations

import errno
import os
from bisect import bisect_left, insort

from sterna.clock import Clock
from sterna.journal.arena import Arena, arena_name
from sterna.journal.format import ARENA_MIN_BYTES, ARENAS_MAX, CLASS_PAGES
from sterna.limits import PAGE_BYTES, SHARE_TIMES_FREE
from sterna.units import MILLISECOND

GROW_RETRY_MS = 1_000
"""After the disk was found full: how long no new arena is tried, so that a full disk costs nothing per append."""


class Faults:
    """Counters of what was found damaged or failed, for metrics."""

    __slots__ = ("chunks", "entries", "files", "headers", "io", "overlaps")

    def __init__(self) -> None:
        """Begins with zeros."""
        self.headers = 0
        """Arena headers that were damaged and written anew."""
        self.files = 0
        """Arena files that were too short or unreadable and were left out."""
        self.entries = 0
        """Directory entries that were garbled and ignored."""
        self.overlaps = 0
        """Chunks that an entry named, but whose pages or positions a newer chunk has."""
        self.chunks = 0
        """Chunks whose bytes did not match their CRC."""
        self.io = 0
        """Reads and writes that the system refused."""

    def total(self) -> int:
        """Returns the sum of all counters."""
        return self.headers + self.files + self.entries + self.overlaps + self.chunks + self.io


class Share:
    """What the logs of one owner take of a space, in pages."""

    __slots__ = ("pages",)

    def __init__(self) -> None:
        """Begins with nothing."""
        self.pages = 0


class Space:
    """All arenas of one directory; a chunk is (arena, first page, size class)."""

    def __init__(self, directory: int, path: str, quota_bytes: int, arena_bytes: int, clock: Clock) -> None:
        """Takes an open directory's descriptor, its path for messages, and the bounds in bytes."""
        self.directory = directory
        self.path = path
        self.quota_bytes = quota_bytes
        self.arena_bytes = arena_bytes
        self.arenas: dict[int, Arena] = {}
        self.faults = Faults()
        self.reserved_bytes = 0
        self.full_reason = ""
        self._clock = clock
        self._retry_at = 0
        self._used = 0
        self._generation = 0
        # For each size class the arenas, in order, with a group in that bin: low arenas fill first, high ones empty.
        self._open: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._empty: set[int] = set()

    @property
    def used_bytes(self) -> int:
        """The bytes of all pages that belong to logs."""
        return self._used * PAGE_BYTES

    def is_fair(self, share: Share, pages: int) -> bool:
        """Tells if an owner may take so many pages more: all it has then is at most SHARE_TIMES_FREE what is left free.

        So there is always room for one more owner, and nobody has to know how many there are (Choudhury and Hahne,
        "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998).
        """
        full = self._clock.monotonic() < self._retry_at  # of the disk: what is not reserved is not to be had
        free = ((self.reserved_bytes if full else self.quota_bytes) - self.used_bytes) // PAGE_BYTES
        return share.pages + pages <= SHARE_TIMES_FREE * (free - pages)

    def next_generation(self) -> int:
        """Returns a number that is higher than that of any chunk made before."""
        self._generation += 1
        return self._generation

    def seen_generation(self, generation: int) -> None:
        """Notes a generation that was found on disk."""
        self._generation = max(self._generation, generation)

    def add(self, arena: Arena) -> None:
        """Takes an arena into use whose free pages are known."""
        self.arenas[arena.number] = arena
        self.reserved_bytes += arena.file_bytes
        self._used += arena.used
        self._note(arena)

    def take(self, size_class: int) -> tuple[Arena, int] | None:
        """Returns arena and first page of a free chunk; None if there is none and no arena can be added."""
        for bin_ in range(size_class, len(CLASS_PAGES)):
            numbers = self._open[bin_]
            if numbers:
                arena = self.arenas[numbers[0]]
                page = arena.take(size_class, bin_)
                self._used += CLASS_PAGES[size_class]
                self._note(arena)
                return arena, page
        return self.take(size_class) if self.grow() else None

    def give(self, arena: Arena, page: int, size_class: int) -> None:
        """Erases a chunk's entry and makes its pages free; removes an arena that nobody needs any more."""
        try:
            arena.erase(page)
        except OSError:
            # The entry stays; what comes to lie on its pages has a higher generation, which decides at the next start.
            self.faults.io += 1
        arena.give(page, size_class)
        self._used -= CLASS_PAGES[size_class]
        self._note(arena)
        if not arena.used and len(self._empty) > 1:
            self._remove(max(self._empty))

    def grow(self) -> bool:
        """Adds an arena if quota and disk have room; else notes the reason and returns False."""
        size = min(self.arena_bytes, self.quota_bytes - self.reserved_bytes) // PAGE_BYTES * PAGE_BYTES
        number = next((n for n in range(ARENAS_MAX) if n not in self.arenas), ARENAS_MAX)
        if size < ARENA_MIN_BYTES or number == ARENAS_MAX:
            said = f"The journal in {self.path} has used up its quota of {self.quota_bytes} bytes"
            self.full_reason = f"{said}: close sessions or raise the quota."
            return False
        now = self._clock.monotonic()
        if now < self._retry_at:
            return False
        try:
            arena = Arena.create(self.directory, number, size)
        except OSError as error:
            self._retry_at = now + GROW_RETRY_MS * MILLISECOND
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.faults.io += 1
            said = f"The disk has no {size} bytes for the journal in {self.path} ({error.strerror})"
            self.full_reason = f"{said}: free some space there."
            return False
        self.add(arena)
        return True

    def prune(self) -> None:
        """Removes all empty arenas except one; for the end of the scan."""
        while len(self._empty) > 1:
            self._remove(max(self._empty))

    def close(self) -> None:
        """Closes all files."""
        for arena in self.arenas.values():
            os.close(arena.fd)
        self.arenas.clear()
        self._used = 0
        self._empty.clear()
        for numbers in self._open:
            numbers.clear()

    def _note(self, arena: Arena) -> None:
        """Brings the lists of open and empty arenas up to date with one that has changed."""
        number = arena.number
        for numbers, bin_ in zip(self._open, arena.bins, strict=True):
            at = bisect_left(numbers, number)
            listed = at < len(numbers) and numbers[at] == number
            if bin_ and not listed:
                insort(numbers, number)
            elif listed and not bin_:
                del numbers[at]
        if arena.used:
            self._empty.discard(number)
        else:
            self._empty.add(number)

    def _remove(self, number: int) -> None:
        arena = self.arenas.pop(number)
        self._empty.discard(number)
        for numbers in self._open:
            if number in numbers:
                numbers.remove(number)
        self.reserved_bytes -= arena.file_bytes
        os.close(arena.fd)
        try:
            os.unlink(arena_name(number), dir_fd=self.directory)
        except OSError:
            self.faults.io += 1
