"""One session's output as a chain of chunks in the arenas."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from errno import EIO
from zlib import crc32 as entry_crc

from fastcrc.crc32 import iso_hdlc as data_crc

from sterna.errors import LostBytesError, StorageError
from sterna.journal.chunks import Chunk, Loaded, entry_prefix, give_chunk, tail_offset
from sterna.journal.format import CLASS_PAGES, TAIL, TAIL_BYTES, TAIL_SUM
from sterna.journal.interface import JournalFullError, check_position, keep_floor
from sterna.journal.space import Share, Space
from sterna.limits import PAGE_BYTES, POSITION_MAX, SHARE_KEPT_BYTES

_SMALL_BYTES = 32 * 1024
"""A log that holds no more than this grows by 16 KiB, a larger one by 64 KiB."""
_RELEASED = -1
_KEPT_PAGES = SHARE_KEPT_BYTES // PAGE_BYTES

_pwrite = os.pwrite
_pread = os.pread
_sum_tail = TAIL_SUM.pack
_make_tail = TAIL.pack


class Log:
    """A log in the journal, made by `Journal.create` and `Journal.open`; not for use from several threads.

    The newest `ring_bytes` are kept, and up to `spill_bytes` more of what `keep_from` names as unread; whole chunks are
    dropped, and only when a new one is begun, so there may be up to two chunks (128 KiB) more. Where its owner has more
    than a fair share of the space, a log that grows drops twice as much of its oldest bytes, read or not, down to the
    newest SHARE_KEPT_BYTES.
    """

    __slots__ = (
        "_base", "_birth", "_chunks", "_counted", "_crc", "_fd", "_keep", "_on_release", "_prefix", "_room", "_share",
        "_space", "_start", "_tail_at", "damaged", "end", "number", "ring_bytes", "spill_bytes", "tail",
    )  # fmt: skip

    _fd: int
    _start: int
    _base: int
    _room: int
    _crc: int
    _prefix: int
    _tail_at: int

    def __init__(
        self,
        space: Space,
        number: int,
        loaded: Loaded,
        sizes: tuple[int, int],
        on_release: Callable[[Log], None],
        share: Share | None = None,
    ) -> None:
        """Takes what was loaded or made for it, ring and spill in bytes; `on_release` is told when it is given up.

        What it takes is counted for `share`, its owner's.
        """
        self.number = number
        self.ring_bytes, self.spill_bytes = sizes
        self._space = space
        self._birth = loaded.birth
        self._chunks = loaded.chunks
        self._keep: int | None = None
        self._on_release = on_release
        self.tail = loaded.chunks[0].start
        self.end = loaded.chunks[-1].end
        self.damaged = loaded.damaged(self.end - self.ring_bytes - self.spill_bytes)
        self._share = share
        self._counted = 0
        self._count(self._chunks)
        self._use_last()

    @property
    def chunks(self) -> list[Chunk]:
        """The chunks, oldest first; for the journal."""
        return self._chunks

    @property
    def stored_bytes(self) -> int:
        """The bytes that the log's chunks take on disk."""
        return sum(chunk.capacity for chunk in self._chunks)

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Adds bytes at `end`, so that they survive the death of the process when this returns.

        Raises JournalFullError if there is no room and StorageError if the disk fails; `end` has not moved then, and
        the log can be read as before (chunks that this append would have pushed out of the ring may be gone already).
        """
        position = self.end
        end = position + len(data)
        if end > self._room:
            self._append_chunks(data)
        elif end > position:
            crc = data_crc(data, self._crc)
            length = end - self._start
            tail = _make_tail(length, crc, entry_crc(_sum_tail(length, crc), self._prefix))
            try:
                # First the bytes, then the entry: a process killed in between leaves the old, whole state.
                if _pwrite(self._fd, data, self._base + position) != end - position:
                    raise OSError(EIO, "short write")
                if _pwrite(self._fd, tail, self._tail_at) != TAIL_BYTES:
                    raise OSError(EIO, "short write")
            except OSError as error:
                raise self._failed("written", error) from error
            self._crc = crc
            self.end = end

    def read(self, position: int, limit: int) -> bytes:
        """Returns 1 to `limit` bytes from `position`, as many as one chunk has; b"" at `end`.

        Raises LostBytesError where the bytes are gone (it names where reading goes on), PositionError beyond `end`, and
        StorageError if the disk fails.
        """
        if position >= self._start and self._room >= 0:
            size = self.end - position
            if size > limit:  # noqa: PLR1730 - min() costs a call on the hot path
                size = limit
            if size <= 0:
                check_position(position, self.tail, self.end)
                return b""
            return self._pread(self._fd, size, self._base + position)
        self._check_in_use()
        check_position(position, self.tail, self.end)
        index = bisect_right(self._chunks, position, key=_start_of) - 1
        chunk = self._chunks[index]
        if position >= chunk.end:
            raise _damaged(position, self._chunks[index + 1].start)
        if not chunk.verify():
            self._lose(index)
            raise _damaged(position, self._chunks[index].start)
        size = min(limit, chunk.end - position)
        return self._pread(chunk.arena.fd, size, chunk.page * PAGE_BYTES + position - chunk.start) if size > 0 else b""

    def keep_from(self, position: int | None) -> None:
        """Says that everything from `position` is still unread by somebody, so that up to ring and spill are kept."""
        self._check_in_use()
        self._keep = position
        self._trim(self.end)

    def pack(self) -> None:
        """Moves the bytes of the last chunk to the fewest pages that hold them; does nothing where that saves none.

        A full or failing disk leaves everything as it is.
        """
        self._check_in_use()
        last = self._chunks[-1]
        length = self.end - self._start
        classes = _fewest(length)
        if sum(CLASS_PAGES[c] for c in classes) >= CLASS_PAGES[last.size_class]:
            return
        self._seal()
        last.checked = False
        if not last.verify():
            # Damaged while we ran: leave it, so that the next start finds and reports it.
            last.checked = True
            self._space.faults.chunks += 1
            return
        fresh: list[Chunk] = []
        try:
            data = memoryview(_pread(self._fd, length, last.page * PAGE_BYTES))
            at = 0
            for size_class in classes:
                # The old one's generation: until it is erased the longer one is right, see load_chunks.
                chunk = self._new_chunk(size_class, last.generation, last.start + at)
                fresh.append(chunk)
                chunk.write_data(data[at : at + chunk.capacity])
                at += chunk.length
            for chunk in fresh:
                chunk.commit(self.number, self._birth)
        except JournalFullError:
            self._give_back(fresh)
            return
        except OSError:
            self._space.faults.io += 1
            self._give_back(fresh)
            return
        self._chunks[-1:] = fresh
        give_chunk(self._space, last)
        self._count(fresh)
        self._count([last], -1)
        self._use_last()

    def release(self) -> None:
        """Forgets the state in memory; the bytes stay in the journal and `Journal.open` finds them again."""
        if self._room != _RELEASED:
            self._seal()
            self._on_release(self)
            self.detach()

    def detach(self) -> None:
        """Makes the object unusable, whatever happened to its chunks; for the journal."""
        self._count(self._chunks, -1)
        self._chunks = []
        self._room = _RELEASED

    def _append_chunks(self, data: bytes | bytearray | memoryview) -> None:
        """Appends what does not fit into the last chunk."""
        self._check_in_use()
        end = self.end + len(data)
        if end > POSITION_MAX:
            raise StorageError(f"Log {self.number} cannot grow beyond position {POSITION_MAX}: close the session.")
        fits = self._room - self.end
        self._seal()
        last = self._chunks[-1]
        self._be_fair(len(data) - fits)
        try:
            fresh = self._take(len(data) - fits, end)
        except JournalFullError:
            if not self._trim(end):
                raise
            fresh = self._take(len(data) - fits, end)
        view = memoryview(data)
        old_length, old_crc = last.length, last.crc
        try:
            if fits:
                if _pwrite(self._fd, view[:fits], self._base + self.end) != fits:
                    raise OSError(EIO, "short write")
                last.crc = data_crc(view[:fits], old_crc)
                last.length += fits
            at = fits
            for chunk in fresh:
                chunk.write_data(view[at : at + chunk.capacity])
                at += chunk.length
            # In the order of their positions, so that a process killed in between leaves a shorter log without a gap.
            for chunk in [last, *fresh] if fits else fresh:
                chunk.commit(self.number, self._birth)
        except OSError as error:
            self._give_back(fresh)
            last.length, last.crc = old_length, old_crc
            self._recommit(last)
            raise self._failed("written", error) from error
        self._chunks += fresh
        self._count(fresh)
        self.end = end
        self._use_last()
        self._trim(end)

    def _take(self, size: int, end: int) -> list[Chunk]:
        """Returns empty chunks for `size` bytes that make the log reach to `end`; raises JournalFullError."""
        held = end - self.tail
        wanted = 0 if held <= PAGE_BYTES else 1 if held <= _SMALL_BYTES else 2
        fresh: list[Chunk] = []
        start = end - size
        try:
            while start < end:
                chunk = self._new_chunk(wanted, self._space.next_generation(), start)
                fresh.append(chunk)
                start += chunk.capacity
        except JournalFullError:
            self._give_back(fresh)
            raise
        return fresh

    def _new_chunk(self, size_class: int, generation: int, start: int) -> Chunk:
        """Returns a chunk of this class, or a smaller one where there is no such run; raises JournalFullError."""
        for smaller in range(size_class, -1, -1):
            place = self._space.take(smaller)
            if place:
                return Chunk(*place, smaller, generation, start)
        raise JournalFullError(self._space.full_reason)

    def _give_back(self, chunks: list[Chunk]) -> None:
        for chunk in reversed(chunks):
            give_chunk(self._space, chunk)

    def _recommit(self, chunk: Chunk) -> None:
        """Writes a chunk's entry once more, after a failed append that may have changed it."""
        try:
            chunk.commit(self.number, self._birth)
        except OSError:
            self._space.faults.io += 1

    def _seal(self) -> None:
        """Notes in the last chunk what was appended to it."""
        last = self._chunks[-1]
        last.length = self.end - self._start
        last.crc = self._crc

    def _use_last(self) -> None:
        """Keeps at hand what an append to the last chunk needs."""
        last = self._chunks[-1]
        self._fd = last.arena.fd
        self._start = last.start
        self._base = last.page * PAGE_BYTES - last.start
        self._room = min(last.start + last.capacity, POSITION_MAX)
        self._crc = last.crc
        self._prefix = entry_prefix(last, self.number, self._birth)
        self._tail_at = tail_offset(last)

    def _trim(self, end: int) -> bool:
        """Drops the chunks that a log reaching to `end` does not keep; tells if there were any."""
        floor = keep_floor(end, self.ring_bytes, self.spill_bytes, self._keep)
        chunks = self._chunks
        count = 0
        while count < len(chunks) - 1 and chunks[count].end <= floor:
            count += 1
        self._drop(count)
        return count > 0

    def _drop(self, count: int) -> None:
        """Drops the oldest chunks, of which one more must be there."""
        dropped = self._chunks[:count]
        for chunk in dropped:
            give_chunk(self._space, chunk)
        if dropped:
            del self._chunks[:count]
            self._count(dropped, -1)
            self._forget_before(self._chunks[0].start)

    def _be_fair(self, size: int) -> None:
        """Drops old chunks for `size` bytes more, where the owner has more than its share, as far as there are any."""
        share, chunks = self._share, self._chunks
        pages = max(CLASS_PAGES[self._chunks[-1].size_class], -(-size // PAGE_BYTES))
        if share is None or self._counted + pages <= _KEPT_PAGES or self._space.is_fair(share, pages):
            return
        # Twice as much, so that who has too much comes down to what is fair.
        left, dropped, count = self._counted, 0, 0
        while dropped < 2 * pages and count < len(chunks) - 1:
            oldest = CLASS_PAGES[chunks[count].size_class]
            if left - oldest < _KEPT_PAGES:
                break
            left, dropped, count = left - oldest, dropped + oldest, count + 1
        self._drop(count)

    def _count(self, chunks: list[Chunk], sign: int = 1) -> None:
        """Counts chunks for the owner, or with -1 no longer."""
        pages = sum(CLASS_PAGES[chunk.size_class] for chunk in chunks) * sign
        self._counted += pages
        if self._share is not None:
            self._share.pages += pages

    def _lose(self, index: int) -> None:
        """Drops a chunk, never the last one, whose bytes turned out to be damaged."""
        self._space.faults.chunks += 1
        chunk = self._chunks.pop(index)
        give_chunk(self._space, chunk)
        self._count([chunk], -1)
        self.damaged.append((chunk.start, chunk.end))
        self.damaged.sort()
        if index == 0:
            self.tail = self._chunks[0].start

    def _forget_before(self, tail: int) -> None:
        self.tail = tail
        if self.damaged:
            self.damaged = [(max(low, tail), high) for low, high in self.damaged if high > tail]

    def _pread(self, fd: int, size: int, offset: int) -> bytes:
        try:
            data = _pread(fd, size, offset)
        except OSError as error:
            raise self._failed("read", error) from error
        if len(data) != size:
            raise self._failed("read", OSError(EIO, "the file is cut short"))
        return data

    def _failed(self, what: str, error: OSError) -> StorageError:
        self._space.faults.io += 1
        said = f"The journal in {self._space.path} could not be {what} ({error.strerror})"
        return StorageError(f"{said}: check the disk.")

    def _check_in_use(self) -> None:
        if self._room == _RELEASED:
            raise StorageError(f"Log {self.number} is not open any more: open it again.")


def _start_of(chunk: Chunk) -> int:
    return chunk.start


def _damaged(position: int, end: int) -> LostBytesError:
    return LostBytesError(f"The bytes from {position} to {end} were damaged on disk: go on at {end}.", position, end)


def _fewest(length: int) -> list[int]:
    """Returns the size classes, largest first, of the fewest pages that hold so many bytes."""
    pages = max(1, -(-length // PAGE_BYTES))
    classes = []
    for size_class in range(len(CLASS_PAGES) - 1, -1, -1):
        count, pages = divmod(pages, CLASS_PAGES[size_class])
        classes += [size_class] * count
    return classes
