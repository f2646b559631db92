"""Fuzzes the journal's start and replay with arena files: `python tests/fuzz/fuzz_journal.py -runs=N`.

The first byte says what the rest is: the whole file, patches over a good one, or entries whose CRCs are made right, so
that everything behind the CRCs is reached too. Allowed are the exceptions in ALLOWED and no others; a log may only give
bytes that are committed somewhere, from tail to end, and the journal must stay usable.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tempfile
from zlib import crc32

try:
    import atheris
except ImportError:
    sys.exit("Fuzzing needs atheris: install the package's extra `fuzz`.")

if __package__ in (None, ""):
    ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path[:0] = [os.path.join(ROOT, "src"), ROOT]

with atheris.instrument_imports(include=["sterna.journal"]):
    from sterna.errors import StorageError
    from sterna.journal import Journal, LostBytesError
    from sterna.journal.format import ARENA_MIN_BYTES, entry_offset, pack_head, pack_header, pack_tail

ALLOWED = (StorageError,)
"""A file of another version, a log that is not there, positions that are lost; nothing else may be raised."""

QUOTA = 8 * ARENA_MIN_BYTES
_FIELDS = struct.Struct("<BBBBBHI")
_POSITIONS = (0, 1, 4096, 2**31 - 1, 2**32 - 1, 2**32, 2**63 - 4096, 2**63 - 1, 2**64 - 1)
# 2**63 - 1 is left out: it is valid, but none can follow it. Damage cannot make it, as the entry's CRC would not match.
_GENERATIONS = (0, 1, 2, 3, 5, 8, 2**62, 2**64 - 1)


def good_image() -> bytes:
    """Returns an arena file with three logs."""
    path = tempfile.mkdtemp(prefix="fuzz-journal-")
    journal = Journal(path, quota_bytes=QUOTA, arena_bytes=ARENA_MIN_BYTES)
    for number, size in ((1, 0), (2, 3_000), (3, 50_000)):
        journal.create(number, start=2**32 - 1_000).append(bytes([number]) * size)
    journal.close()
    with open(os.path.join(path, "arena-000000"), "rb") as file:
        image = file.read()
    shutil.rmtree(path)
    return image


GOOD = good_image()


def patched(data: bytes) -> bytes:
    """Returns the good file with patches: offset (3 bytes), length (1), bytes."""
    image = bytearray(GOOD)
    at = 0
    while at + 4 <= len(data):
        offset = int.from_bytes(data[at : at + 3], "little") % len(image)
        patch = data[at + 4 : at + 4 + data[at + 3]]
        image[offset : offset + len(patch)] = patch
        at += 4 + data[at + 3]
    return bytes(image[: len(GOOD)])


def forged(data: bytes) -> bytes:
    """Returns a file whose entries are right by their CRC, and say anything."""
    image = bytearray(ARENA_MIN_BYTES)
    header = pack_header(ARENA_MIN_BYTES // 4096)
    image[: len(header)] = header
    for at in range(0, len(data) - _FIELDS.size + 1, _FIELDS.size):
        page, size_class, number, start, generation, length, crc = _FIELDS.unpack_from(data, at)
        page %= ARENA_MIN_BYTES // 4096
        position = _POSITIONS[start % len(_POSITIONS)]
        head = pack_head(size_class % 4, number % 3, generation % 2, _GENERATIONS[generation % 8], position)
        size = length % 5_000 if crc % 2 else length
        stored = image[page * 4096 : page * 4096 + size]
        tail = pack_tail(crc32(head, page), size, crc32(stored) if crc % 4 else crc)
        image[entry_offset(page) : entry_offset(page) + 64] = head + tail
    return bytes(image)


def use(journal: Journal) -> None:
    """Does everything a node does with the logs it finds."""
    for number in list(journal.logs()):
        try:
            log = journal.open(number)
        except ALLOWED:
            continue
        position = log.tail
        while position < log.end:
            try:
                data = log.read(position, 65536)
            except LostBytesError as error:
                before, position = position, error.end
                assert before < position <= log.end
                continue
            assert data
            position += len(data)
        end = log.end
        try:
            log.append(b"more")
            log.append(bytes(9_000))
            assert log.end == end + 9_004
        except ALLOWED:
            pass
        log.pack()
        log.release()
        assert journal.open(number).end >= end
    used = journal.used_bytes
    assert used == sum(journal.open(number).stored_bytes for number in journal.logs())


def run_one(data: bytes) -> None:
    """Runs one input."""
    kind, rest = data[:1], data[1:]
    image = forged(rest) if kind < b"\x60" else patched(rest) if kind < b"\xd0" else rest
    path = tempfile.mkdtemp(prefix="fuzz-journal-", dir=WHERE)
    try:
        with open(os.path.join(path, "arena-000000"), "wb", opener=private) as file:
            file.write(image)
        try:
            journal = Journal(path, quota_bytes=QUOTA, arena_bytes=ARENA_MIN_BYTES)
        except ALLOWED:
            return
        use(journal)
        numbers = list(journal.logs())
        journal.close()
        journal = Journal(path, quota_bytes=QUOTA, arena_bytes=ARENA_MIN_BYTES)
        assert sorted(journal.logs()) == sorted(numbers)
        use(journal)
        for number in numbers:
            journal.remove(number)
        assert (journal.used_bytes, journal.arenas) == (0, 1)
        journal.close()
    finally:
        shutil.rmtree(path)


def private(path: str, flags: int) -> int:
    """Opens a file for its owner only."""
    return os.open(path, flags, 0o600)


WHERE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

if __name__ == "__main__":
    atheris.Setup(sys.argv, run_one)
    atheris.Fuzz()
