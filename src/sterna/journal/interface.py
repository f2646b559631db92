"""What a log of output is to its users, on disk or in memory, and the errors that are specific to it."""

from __future__ import annotations

from typing import Protocol

from sterna.errors import LostBytesError, PositionError, StorageError


class JournalFullError(StorageError):
    """There is no room for more output: the disk is full or the journal's quota is used up."""


class OutputLog(Protocol):
    """Describes one session's output: an append-only run of bytes of which the oldest are dropped.

    `tail` is the oldest readable position, `end` the next one to be written (byte counts); `damaged` names the ranges
    [from, to) that were once held and are lost (docs/protocol.md, section 3).
    """

    number: int
    tail: int
    end: int
    damaged: list[tuple[int, int]]

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Adds bytes at `end`; raises JournalFullError or StorageError without having moved `end`."""
        ...

    def read(self, position: int, limit: int) -> bytes:
        """Returns 1 to `limit` bytes from `position`, b"" at `end`; raises LostBytesError or PositionError."""
        ...

    def keep_from(self, position: int | None) -> None:
        """Says that everything from `position` is still unread by somebody; None: by nobody."""
        ...

    def pack(self) -> None:
        """Makes the log as small as it can be, for a time without output."""
        ...

    def release(self) -> None:
        """Gives the memory back; the object is of no more use, the bytes stay where they are durable."""
        ...


def check_position(position: int, tail: int, end: int) -> None:
    """Returns if a log that holds `tail` to `end` can be read at `position`; else LostBytesError or PositionError."""
    if position > end or position < 0:
        raise PositionError(f"Position {position} is not in the log, which ends at {end}.", end, end)
    if position < tail:
        message = f"The bytes from {position} to {tail} are no longer in the log: newer output took their place."
        raise LostBytesError(message, position, tail)


def keep_floor(end: int, ring_bytes: int, spill_bytes: int, keep: int | None) -> int:
    """Returns the position before which a log that reaches to `end` may be forgotten.

    The newest `ring_bytes` stay in any case; what somebody has not read (from `keep`) stays up to `spill_bytes` more.
    """
    floor = end - ring_bytes
    if keep is not None and keep < floor:
        return max(keep, floor - spill_bytes)
    return floor
