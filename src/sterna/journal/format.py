"""The bytes of an arena file: header page, directory of entries, data pages (docs/protocol.md, section 3).

Page `n` of the file has entry `n` of the directory, which begins at page 1; only the entry of a chunk's first page is
used, all others are zero. All numbers are little-endian: the files never leave their machine's directory.

Header:  magic (8), version u32, page bytes u32, pages u64, CRC-32 u32 of what stands before it.
Entry:   magic (4), size class u8, zero (3), log number u64, birth u64, generation u64, start u64, zero (12),
         length u32, CRC-32 u32 of the data, CRC-32 u32 of the entry (60 bytes, begun with the page number).

An entry is 64 bytes at a multiple of 64, so it lies within one disk sector and cannot tear; the last 12 bytes are the
only ones that change while a chunk is filled, so a commit is one write of 12 bytes.
"""

from __future__ import annotations

import struct
from zlib import crc32

from sterna.limits import ARENA_BYTES, CHUNK_MAX_BYTES, PAGE_BYTES, POSITION_MAX

VERSION = 1
HEADER_MAGIC = b"STRNJRNL"
ENTRY_MAGIC = b"SJch"
ENTRY_BYTES = 64
HEAD_BYTES = 52
TAIL_BYTES = 12
CLASS_PAGES = (1, 4, 16)
GROUP_PAGES = 16
ARENA_MIN_BYTES = 128 * 1024
ARENA_MAX_BYTES = 1024 * 1024 * 1024
ARENAS_MAX = 1 << 16
NUMBER_MAX = (1 << 64) - 1
GENERATION_MAX = (1 << 63) - 1

_HEADER = struct.Struct("<8sIIQ")
_ENTRY = struct.Struct("<4sB3xQQQQ12xIII")
_HEAD = struct.Struct("<4sB3xQQQQ12x")
_U32 = struct.Struct("<I")
TAIL_SUM = struct.Struct("<II")
TAIL = struct.Struct("<III")
MARKS = struct.Struct("<Q56x")
"""The first eight bytes of each entry: zero where there is none."""
NO_ENTRY = bytes(ENTRY_BYTES)

Entry = tuple[int, int, int, int, int, int, int]
"""Size class, log number, birth, generation, start, length, CRC of the data."""

assert _ENTRY.size == ENTRY_BYTES == MARKS.size
assert _HEAD.size == HEAD_BYTES == ENTRY_BYTES - TAIL_BYTES
assert PAGE_BYTES % ENTRY_BYTES == 0
assert CLASS_PAGES[-1] * PAGE_BYTES == CHUNK_MAX_BYTES
assert CLASS_PAGES[-1] == GROUP_PAGES
assert ARENA_MIN_BYTES <= ARENA_BYTES <= ARENA_MAX_BYTES


def pack_header(pages: int) -> bytes:
    """Returns the header of an arena of so many pages."""
    fields = _HEADER.pack(HEADER_MAGIC, VERSION, PAGE_BYTES, pages)
    return fields + _U32.pack(crc32(fields))


def unpack_header(raw: bytes) -> tuple[int, int, int] | None:
    """Returns version, page bytes and pages from an arena's first page; None if that is damaged."""
    size = _HEADER.size
    if len(raw) < size + 4 or crc32(raw[:size]) != _U32.unpack_from(raw, size)[0]:
        return None
    magic, version, page_bytes, pages = _HEADER.unpack_from(raw)
    return (version, page_bytes, pages) if magic == HEADER_MAGIC else None


def first_data_page(pages: int) -> int:
    """Returns the first data page of an arena of so many pages: those before it are header and directory."""
    return 1 + -(-pages * ENTRY_BYTES // PAGE_BYTES)


def entry_offset(page: int) -> int:
    """Returns where in the file the entry of a page stands."""
    return PAGE_BYTES + page * ENTRY_BYTES


def pack_head(size_class: int, number: int, birth: int, generation: int, start: int) -> bytes:
    """Returns the part of an entry that stays the same as long as the chunk lives."""
    return _HEAD.pack(ENTRY_MAGIC, size_class, number, birth, generation, start)


def pack_tail(prefix: int, length: int, crc: int) -> bytes:
    """Returns the part of an entry that commits `length` bytes; `prefix`: CRC of the head, begun with the page."""
    return TAIL.pack(length, crc, crc32(TAIL_SUM.pack(length, crc), prefix))


def unpack_entry(directory: bytes, offset: int, page: int) -> Entry | None:
    """Returns what the entry of `page` says, from bytes in which it stands at `offset`; None if it cannot be right."""
    magic, size_class, number, birth, generation, start, length, crc, check = _ENTRY.unpack_from(directory, offset)
    if magic != ENTRY_MAGIC or crc32(directory[offset : offset + ENTRY_BYTES - 4], page) != check:
        return None
    if size_class >= len(CLASS_PAGES) or length > CLASS_PAGES[size_class] * PAGE_BYTES:
        return None
    if start + length > POSITION_MAX or max(birth, generation) > GENERATION_MAX:
        return None
    return size_class, number, birth, generation, start, length, crc
