"""The chunks of one log: how they are written, and how they are put together again from what a disk holds."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from typing import TypeAlias
from zlib import crc32 as entry_crc

from fastcrc.crc32 import iso_hdlc as data_crc

from sterna.journal.arena import Arena
from sterna.journal.format import (
    CLASS_PAGES,
    ENTRY_BYTES,
    HEAD_BYTES,
    entry_offset,
    pack_head,
    pack_tail,
    unpack_entry,
)
from sterna.journal.space import Space
from sterna.limits import PAGE_BYTES

VERIFY_BYTES = 4 * 1024 * 1024
"""How much of a log, newest first, is checked when it is opened; what a long spill holds beyond, when it is read."""

_PAGE_BITS = 32
_CLASS_BITS = 2

Refs: TypeAlias = "int | array[int]"
"""Where the chunks of a log that is not open are, one or several; small, as there may be 100,000 such logs."""


class Chunk:
    """A run of pages with the bytes `start` to `start + length` of one log."""

    __slots__ = ("arena", "checked", "crc", "generation", "length", "page", "size_class", "start")

    def __init__(self, arena: Arena, page: int, size_class: int, generation: int, start: int) -> None:
        """Takes the place of a chunk without data."""
        self.arena = arena
        self.page = page
        self.size_class = size_class
        self.generation = generation
        self.start = start
        self.length = 0
        self.crc = 0
        self.checked = True

    @property
    def end(self) -> int:
        """The position after the last byte."""
        return self.start + self.length

    @property
    def capacity(self) -> int:
        """How many bytes have room."""
        return CLASS_PAGES[self.size_class] * PAGE_BYTES

    def write_data(self, data: memoryview) -> None:
        """Writes the first bytes, uncommitted; raises OSError."""
        if os.pwrite(self.arena.fd, data, self.page * PAGE_BYTES) != len(data):
            raise OSError(5, "short write")
        self.length = len(data)
        self.crc = data_crc(data)

    def commit(self, number: int, birth: int) -> None:
        """Writes the whole entry, from when on the chunk exists; raises OSError."""
        head = pack_head(self.size_class, number, birth, self.generation, self.start)
        entry = head + pack_tail(entry_crc(head, self.page), self.length, self.crc)
        if os.pwrite(self.arena.fd, entry, entry_offset(self.page)) != ENTRY_BYTES:
            raise OSError(5, "short write")

    def verify(self) -> bool:
        """Tells if the committed bytes are the ones that were written (once; a chunk that passed is not read again)."""
        if not self.checked:
            try:
                data = os.pread(self.arena.fd, self.length, self.page * PAGE_BYTES)
            except OSError:
                return False
            self.checked = len(data) == self.length and data_crc(data) == self.crc
        return self.checked


def make_ref(arena: int, page: int, size_class: int) -> int:
    """Returns arena, page and size class as one number below 2**64."""
    return ((arena << _PAGE_BITS) | page) << _CLASS_BITS | size_class


def split_ref(ref: int) -> tuple[int, int, int]:
    """Returns arena, page and size class."""
    place = ref >> _CLASS_BITS
    return place >> _PAGE_BITS, place & ((1 << _PAGE_BITS) - 1), ref & ((1 << _CLASS_BITS) - 1)


def each_ref(refs: Refs) -> Iterable[int]:
    """Returns the references one by one."""
    return (refs,) if isinstance(refs, int) else refs


def add_ref(refs: Refs | None, ref: int) -> Refs:
    """Returns the references with one more."""
    if refs is None:
        return ref
    if isinstance(refs, int):
        return array("Q", (refs, ref))
    refs.append(ref)
    return refs


def make_refs(chunks: list[Chunk]) -> Refs:
    """Returns the references of a log's chunks."""
    all_ = [make_ref(chunk.arena.number, chunk.page, chunk.size_class) for chunk in chunks]
    return all_[0] if len(all_) == 1 else array("Q", all_)


def pages_of(refs: Refs) -> int:
    """Returns how many pages the chunks of a log that is not open take."""
    return sum(CLASS_PAGES[ref & ((1 << _CLASS_BITS) - 1)] for ref in each_ref(refs))


def give_chunk(space: Space, chunk: Chunk) -> None:
    """Forgets a chunk."""
    space.give(chunk.arena, chunk.page, chunk.size_class)


class Loaded:
    """What was put together from the disk: chunks in order of position, and the range that anything was found for."""

    __slots__ = ("birth", "chunks", "high", "low")

    def __init__(self, birth: int, chunks: list[Chunk], low: int, high: int) -> None:
        """Takes the log's birth, chunks that do not overlap, and the lowest and highest position an entry named."""
        self.birth = birth
        self.chunks = chunks
        self.low = low
        self.high = high

    def damaged(self, floor: int) -> list[tuple[int, int]]:
        """Returns the ranges that entries speak of, or that lie between them, and no chunk holds.

        What lies before all chunks counts only from `floor` on: it would have been overwritten by now.
        """
        found = []
        at = max(self.low, min(floor, self.chunks[0].start))
        for chunk in self.chunks:
            if chunk.start > at:
                found.append((at, chunk.start))
            at = max(at, chunk.end)
        if self.high > at:
            found.append((at, self.high))
        return found


def load_chunks(space: Space, number: int, refs: Refs) -> Loaded | None:
    """Puts a log together: chunks with wrong bytes and older doubles are erased and counted; None if nothing is there.

    Where chunks overlap (after a power cut, or a kill while a log was packed) the highest generation is right, of the
    same one the longest. A log whose chunks are all damaged keeps one, made empty, so that it still exists.
    """
    birth, candidates = _read_entries(space, number, refs)
    if not candidates:
        return None
    low = min(chunk.start for chunk in candidates)
    high = max(chunk.end for chunk in candidates)
    chunks: list[Chunk] = []
    dropped: list[Chunk] = []
    budget = VERIFY_BYTES
    for chunk in sorted(candidates, key=lambda c: (-c.generation, -c.length)):
        at = bisect_right(chunks, chunk.start, key=lambda c: c.start)
        left = chunks[at - 1] if at else None
        hit = left is not None and (left.end > chunk.start or left.start == chunk.start)
        if hit or (at < len(chunks) and chunks[at].start < chunk.end):
            space.faults.overlaps += 1
        elif budget <= 0 or chunk.verify():
            budget -= chunk.length
            chunks.insert(at, chunk)
            continue
        else:
            space.faults.chunks += 1
        dropped.append(chunk)
    while chunks and not chunks[-1].verify():
        space.faults.chunks += 1
        dropped.append(chunks.pop())
    if not chunks:
        chunks.append(_emptied(space, number, birth, dropped.pop(), low))
    for chunk in dropped:
        give_chunk(space, chunk)
    return Loaded(birth, chunks, low, high)


def _emptied(space: Space, number: int, birth: int, spare: Chunk, start: int) -> Chunk:
    chunk = Chunk(spare.arena, spare.page, spare.size_class, space.next_generation(), start)
    try:
        chunk.commit(number, birth)
    except OSError:
        space.faults.io += 1
    return chunk


def _read_entries(space: Space, number: int, refs: Refs) -> tuple[int, list[Chunk]]:
    """Returns the newest birth and the chunks of that birth whose entries can be read; forgets all others."""
    found: list[tuple[int, Chunk]] = []
    for ref in each_ref(refs):
        arena_number, page, size_class = split_ref(ref)
        arena = space.arenas[arena_number]
        try:
            raw = os.pread(arena.fd, ENTRY_BYTES, entry_offset(page))
        except OSError:
            space.faults.io += 1
            raw = b""
        entry = unpack_entry(raw, 0, page) if len(raw) == ENTRY_BYTES else None
        if entry is None or entry[0] != size_class or entry[1] != number:
            space.faults.entries += 1
            space.give(arena, page, size_class)
            continue
        chunk = Chunk(arena, page, size_class, entry[3], entry[4])
        chunk.length, chunk.crc, chunk.checked = entry[5], entry[6], False
        found.append((entry[2], chunk))
    birth = max((born for born, _ in found), default=0)
    for born, chunk in found:
        if born != birth:
            space.faults.overlaps += 1
            give_chunk(space, chunk)
    return birth, [chunk for born, chunk in found if born == birth]


def entry_prefix(chunk: Chunk, number: int, birth: int) -> int:
    """Returns the CRC of the unchanging part of a chunk's entry, with which each commit's CRC begins."""
    return entry_crc(pack_head(chunk.size_class, number, birth, chunk.generation, chunk.start), chunk.page)


def tail_offset(chunk: Chunk) -> int:
    """Returns where in the file the changing part of a chunk's entry stands."""
    return entry_offset(chunk.page) + HEAD_BYTES
