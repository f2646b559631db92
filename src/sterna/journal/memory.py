"""Logs in memory, for a node whose disk is full and for simulations: the same behaviour, gone with the process."""

from __future__ import annotations

from collections.abc import Iterator

from sterna.errors import StorageError, UsageError
from sterna.journal.interface import JournalFullError, check_position, keep_floor
from sterna.limits import (
    CHUNK_MAX_BYTES,
    JOURNAL_QUOTA_BYTES,
    MEMORY_LOGS_KEPT_BYTES,
    MEMORY_LOGS_MAX_BYTES,
    POSITION_MAX,
    RING_BYTES,
    SHARE_TIMES_FREE,
    SPILL_BYTES,
)


class MemoryShares:
    """What the logs of each owner hold in memory, and all of them together."""

    __slots__ = ("held", "most", "total")

    def __init__(self, most: int = MEMORY_LOGS_MAX_BYTES) -> None:
        """Begins with nothing; `most` is for all together, in bytes."""
        self.held: dict[str, int] = {}
        self.total = 0
        self.most = most

    def add(self, owner: str, size: int) -> None:
        """Counts `size` bytes more, or fewer."""
        self.total += size
        self.held[owner] = self.held.get(owner, 0) + size
        if not self.held[owner]:
            del self.held[owner]

    def surplus(self, owner: str) -> int:
        """Returns how many bytes an owner has beyond SHARE_TIMES_FREE times what is left, as in the journal."""
        return self.held.get(owner, 0) - SHARE_TIMES_FREE * max(0, self.most - self.total)


class MemoryLog:
    """A log that is held in memory only; keeps up to 64 KiB more than its ring, as one on disk does.

    One whose owner has more than a fair share of the memory keeps less: down to its newest MEMORY_LOGS_KEPT_BYTES.
    """

    __slots__ = (
        "_data",
        "_journal",
        "_keep",
        "_owner",
        "_shares",
        "damaged",
        "end",
        "number",
        "ring_bytes",
        "spill_bytes",
        "tail",
    )

    def __init__(
        self,
        number: int,
        *,
        ring_bytes: int = RING_BYTES,
        spill_bytes: int = SPILL_BYTES,
        start: int = 0,
        journal: MemoryJournal | None = None,
        shares: MemoryShares | None = None,
        owner: str = "",
    ) -> None:
        """Makes an empty log that begins at position `start`.

        `journal` bounds what all of its logs hold; with `shares` it is counted for its owner until it is released.
        """
        if ring_bytes < 1 or spill_bytes < 0 or not 0 <= start <= POSITION_MAX:
            raise UsageError(f"A log cannot start at {start} with a ring of {ring_bytes} and a spill of {spill_bytes}.")
        self.number = number
        self.ring_bytes = ring_bytes
        self.spill_bytes = spill_bytes
        self.tail = start
        self.end = start
        self.damaged: list[tuple[int, int]] = []
        self._data = bytearray()
        self._journal = journal
        self._shares = shares
        self._owner = owner
        self._keep: int | None = None

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Adds bytes at `end`; raises JournalFullError without having moved `end` if the journal's quota is used up."""
        size = len(data)
        if self.end + size > POSITION_MAX:
            raise StorageError(f"Log {self.number} cannot grow beyond position {POSITION_MAX}: close the session.")
        journal = self._journal
        if journal is not None and journal.used_bytes + size > journal.quota_bytes:
            self._trim(self.end + size, 0)
            journal.check(size)
        self._data += data
        self.end += size
        self._count(size)
        self._trim(self.end, CHUNK_MAX_BYTES)
        if self._shares is not None:
            surplus = min(self._shares.surplus(self._owner), len(self._data) - MEMORY_LOGS_KEPT_BYTES)
            if surplus > 0:
                self._cut(surplus)

    def read(self, position: int, limit: int) -> bytes:
        """Returns 1 to `limit` bytes from `position`, b"" at `end`; raises LostBytesError or PositionError."""
        check_position(position, self.tail, self.end)
        at = position - self.tail
        with memoryview(self._data) as view:
            return bytes(view[at : at + max(0, limit)])

    def keep_from(self, position: int | None) -> None:
        """Says that everything from `position` is still unread by somebody, so that up to ring and spill are kept."""
        self._keep = position
        self._trim(self.end, CHUNK_MAX_BYTES)

    def pack(self) -> None:
        """Cuts the log to exactly what it must keep."""
        self._trim(self.end, 0)

    def release(self) -> None:
        """Forgets the bytes if they are counted for an owner; else does nothing, as they are nowhere else."""
        if self._shares is not None:
            self._cut(len(self._data))

    def _trim(self, end: int, slack: int) -> None:
        floor = min(keep_floor(end, self.ring_bytes, self.spill_bytes, self._keep), self.end)
        surplus = floor - self.tail
        if surplus > slack:
            self._cut(surplus)

    def _cut(self, size: int) -> None:
        del self._data[:size]
        self.tail += size
        self._count(-size)

    def _count(self, size: int) -> None:
        if self._journal is not None:
            self._journal.used_bytes += size
        if self._shares is not None:
            self._shares.add(self._owner, size)


class MemoryJournal:
    """Logs in memory under one quota, with the methods of Journal."""

    def __init__(self, *, quota_bytes: int = JOURNAL_QUOTA_BYTES) -> None:
        """Makes an empty one that holds up to `quota_bytes` of output."""
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self._logs: dict[int, MemoryLog] = {}

    def logs(self) -> Iterator[int]:
        """Returns the numbers of all logs."""
        return iter(list(self._logs))

    def create(
        self, number: int, *, ring_bytes: int = RING_BYTES, spill_bytes: int = SPILL_BYTES, start: int = 0
    ) -> MemoryLog:
        """Makes an empty log; raises StorageError if the number is in use."""
        if number in self._logs:
            raise StorageError(f"The journal has a log {number} already: open or remove it.")
        log = MemoryLog(number, ring_bytes=ring_bytes, spill_bytes=spill_bytes, start=start, journal=self)
        self._logs[number] = log
        return log

    def open(self, number: int, *, ring_bytes: int = RING_BYTES, spill_bytes: int = SPILL_BYTES) -> MemoryLog:
        """Returns a log that exists, with new sizes; raises StorageError if there is none."""
        log = self._logs.get(number)
        if log is None:
            raise StorageError(f"The journal has no log {number}: it was removed.")
        log.ring_bytes, log.spill_bytes = ring_bytes, spill_bytes
        return log

    def remove(self, number: int) -> None:
        """Forgets a log; does nothing if there is none."""
        log = self._logs.pop(number, None)
        if log is not None:
            self.used_bytes -= log.end - log.tail

    def close(self) -> None:
        """Forgets all logs."""
        self._logs.clear()
        self.used_bytes = 0

    def check(self, size: int) -> None:
        """Returns if `size` more bytes fit; else JournalFullError."""
        if self.used_bytes + size > self.quota_bytes:
            raise JournalFullError(f"The {self.quota_bytes} bytes for output in memory are used up: close sessions.")
