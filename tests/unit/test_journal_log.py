"""One log: positions, ring and spill, growing chunks, packing, and what a full or failing disk does to it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from sterna.errors import StorageError, UsageError
from sterna.journal import Journal, JournalFullError, Log, LostBytesError, MemoryJournal, MemoryLog, PositionError
from sterna.limits import CHUNK_MAX_BYTES, PAGE_BYTES, POSITION_MAX
from tests.journal_stream import check_right, read_all, stream, whole

ARENA = 512 * 1024
STARTS = (0, 2**31 - 3, 2**32 - 3, 2**32 + 5)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(str(tmp_path / "journal"), quota_bytes=8 * ARENA, arena_bytes=ARENA)
    yield opened
    opened.close()


def fill(log: Log | MemoryLog, size: int, step: int = 5_000) -> None:
    """Appends so many bytes of the log's own stream."""
    while size:
        part = min(step, size)
        log.append(stream(log.number, log.end, part))
        size -= part


def create_many(journal: Journal, number: int) -> NoReturn:
    """Creates logs until an error ends it."""
    while True:
        journal.create(number)
        number += 1


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_what_is_appended_is_read_at_its_position(journal: Journal, kind: str, start: int) -> None:
    log = journal.create(7, start=start) if kind == "disk" else MemoryLog(7, start=start)
    log.append(b"")
    assert (log.tail, log.end, log.read(start, 10)) == (start, start, b"")
    for data in (b"a", bytearray(b"bc"), memoryview(b"def"), b""):
        log.append(data)
    assert (log.tail, log.end) == (start, start + 6)
    assert log.read(start, 100) == b"abcdef"
    assert log.read(start + 2, 3) == b"cde"
    assert log.read(start + 2, 0) == log.read(start + 2, -1) == log.read(start + 6, 5) == b""
    for size in (1, PAGE_BYTES - 7, PAGE_BYTES, 100_000, 300_000):
        before = log.end
        data = stream(7, before, size)
        log.append(data)
        assert log.end == before + size
        runs, lost = read_all(log)
        assert lost == []
        assert b"".join(part for _, part in runs)[before - start :] == data


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_positions_outside_the_log_are_named(journal: Journal, kind: str) -> None:
    log = journal.create(1, ring_bytes=PAGE_BYTES) if kind == "disk" else MemoryLog(1, ring_bytes=PAGE_BYTES)
    fill(log, 300_000)
    assert 0 < log.tail <= log.end - PAGE_BYTES
    with pytest.raises(LostBytesError) as lost:
        log.read(log.tail - 1, 1)
    assert (lost.value.start, lost.value.end) == (log.tail - 1, log.tail)
    for position in (log.end + 1, -1, 2**70):
        with pytest.raises(PositionError) as beyond:
            log.read(position, 1)
        assert not isinstance(beyond.value, LostBytesError)
        assert isinstance(beyond.value, ValueError)
        assert (beyond.value.start, beyond.value.end) == (log.end, log.end)


@pytest.mark.parametrize("start", STARTS)
def test_one_byte_at_a_time_grows_from_4_to_16_to_64_kib(journal: Journal, start: int) -> None:
    log = journal.create(3, start=start)
    for _ in range(90_000):
        log.append(stream(3, log.end, 1))
    assert [chunk.capacity // 1024 for chunk in log.chunks] == [4, 16, 16, 64]
    assert check_right(log, 3) == []
    log.release()
    again = journal.open(3)
    assert (again.tail, again.end, again.damaged) == (start, start + 90_000, [])
    assert check_right(again, 3) == []


def test_a_large_append_takes_large_chunks_at_once(journal: Journal) -> None:
    log = journal.create(3)
    log.append(stream(3, 0, 70_000))
    assert [chunk.capacity for chunk in log.chunks] == [PAGE_BYTES, CHUNK_MAX_BYTES, CHUNK_MAX_BYTES]
    assert check_right(log, 3) == []


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_the_ring_keeps_its_newest_bytes_and_little_more(journal: Journal, kind: str) -> None:
    ring = 100_000
    log = journal.create(1, ring_bytes=ring) if kind == "disk" else MemoryLog(1, ring_bytes=ring)
    for _ in range(200):
        fill(log, 3_333)
        held = log.end - log.tail
        assert min(log.end, ring) <= held <= ring + 2 * CHUNK_MAX_BYTES
    assert check_right(log, 1) == []
    assert journal.used_bytes <= ring + 2 * CHUNK_MAX_BYTES + PAGE_BYTES


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_unread_output_is_kept_up_to_the_spill(journal: Journal, kind: str) -> None:
    ring, spill = 50_000, 400_000
    log: Log | MemoryLog
    if kind == "disk":
        log = journal.create(1, ring_bytes=ring, spill_bytes=spill)
    else:
        log = MemoryLog(1, ring_bytes=ring, spill_bytes=spill)
    log.keep_from(10)
    fill(log, 440_000)
    assert log.tail == 0
    fill(log, 300_000)
    assert ring + spill <= log.end - log.tail <= ring + spill + 2 * CHUNK_MAX_BYTES
    log.keep_from(log.end - 200_000)
    assert 200_000 <= log.end - log.tail <= 200_000 + CHUNK_MAX_BYTES
    log.keep_from(log.end)
    assert ring <= log.end - log.tail <= ring + CHUNK_MAX_BYTES
    log.keep_from(log.tail)
    fill(log, 100_000)
    log.keep_from(None)
    assert ring <= log.end - log.tail <= ring + CHUNK_MAX_BYTES
    assert check_right(log, 1) == []


@pytest.mark.parametrize(
    ("size", "pages"), [(0, 1), (1, 1), (4_096, 1), (4_097, 2), (9_000, 3), (20_000, 5), (40_000, 10), (65_536, 16)]
)
def test_packing_takes_the_fewest_pages(journal: Journal, size: int, pages: int) -> None:
    log = journal.create(1)
    # Beyond the small chunks first, and up to a chunk's end, so that the next one is a large one.
    fill(log, PAGE_BYTES + 3 * CHUNK_MAX_BYTES, PAGE_BYTES + 3 * CHUNK_MAX_BYTES)
    assert log.end == log.chunks[-1].start + log.chunks[-1].capacity
    before, last = log.stored_bytes, log.end
    log.append(stream(1, log.end, size))
    log.pack()
    assert log.stored_bytes - before == (pages * PAGE_BYTES if size else 0)
    assert check_right(log, 1) == []
    log.append(stream(1, log.end, 5_000))
    log.release()
    log = journal.open(1)
    assert (log.end, log.damaged, check_right(log, 1)) == (last + size + 5_000, [], [])
    assert journal.faults.total() == 0


def test_packing_again_and_again_keeps_bytes_and_leaks_no_pages(journal: Journal) -> None:
    for _ in range(300):
        log = journal.open(1) if 1 in journal else journal.create(1)
        log.append(stream(1, log.end, 777))
        log.pack()
        log.release()
    log = journal.open(1)
    assert (log.end, check_right(log, 1)) == (777 * 300, [])
    assert journal.used_bytes == log.stored_bytes <= 777 * 300 + 2 * PAGE_BYTES
    journal.remove(1)
    assert journal.used_bytes == 0


def test_a_log_that_was_given_up_refuses_everything(journal: Journal) -> None:
    log = journal.create(1)
    log.append(b"abc")
    log.release()
    log.release()
    for call in (
        lambda: log.append(b"x"), lambda: log.append(b""), lambda: log.read(0, 1), lambda: log.read(3, 1), log.pack,
        lambda: log.keep_from(0),
    ):  # fmt: skip
        with pytest.raises(StorageError, match="open it again"):
            call()
    other = journal.open(1)
    journal.remove(1)
    with pytest.raises(StorageError, match="open it again"):
        other.append(b"x")
    other.release()
    assert 1 not in journal


def test_a_full_journal_refuses_without_changing_anything_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with_quota = Journal(str(tmp_path / "journal"), quota_bytes=ARENA, arena_bytes=ARENA)
    one, two = with_quota.create(1), with_quota.create(2)
    with pytest.raises(JournalFullError, match="quota"):
        fill(one, 2 * ARENA)
    end = one.end
    assert end > ARENA * 3 // 4
    with pytest.raises(JournalFullError):
        one.append(bytes(100_000))
    assert (one.end, one.tail, check_right(one, 1)) == (end, 0, [])
    with pytest.raises(JournalFullError):
        create_many(with_quota, 3)
    fill(two, PAGE_BYTES)
    with pytest.raises(JournalFullError):
        two.append(b"x")
    assert two.end == PAGE_BYTES
    with_quota.remove(1)
    fill(two, 50_000)
    assert check_right(two, 2) == []
    with_quota.close()


def test_a_ring_that_turns_needs_no_new_room(tmp_path: Path) -> None:
    full = Journal(str(tmp_path / "journal"), quota_bytes=ARENA, arena_bytes=ARENA)
    log = full.create(1, ring_bytes=100_000)
    fill(log, 200_000)
    with pytest.raises(JournalFullError):
        create_many(full, 2)
    fill(log, 500_000)
    assert log.end == 700_000
    assert log.end - log.tail >= 100_000 - CHUNK_MAX_BYTES
    assert check_right(log, 1) == []
    full.close()


@pytest.mark.parametrize("size", [10, 30_000, 200_000])
def test_a_disk_that_fails_moves_nothing(journal: Journal, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    log = journal.create(1)
    fill(log, 3_000)
    real = os.pwrite
    for failing in range(1, 30):
        calls = 0

        def pwrite(fd: int, data: bytes, offset: int, failing: int = failing) -> int:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, data, offset)

        end, used = log.end, journal.used_bytes
        with monkeypatch.context() as patch:
            patch.setattr("os.pwrite", pwrite)
            patch.setattr("sterna.journal.log._pwrite", pwrite)
            try:
                log.append(stream(1, end, size))
            except StorageError:
                assert (log.end, journal.used_bytes) == (end, used)
        assert check_right(log, 1) == []
        log.release()
        log = journal.open(1)
        assert (log.end, log.damaged) in ((end, []), (end + size, []))
        if log.end == end + size:
            break
    else:
        pytest.fail("an append never got through")
    assert failing >= 3
    assert journal.faults.chunks == journal.faults.entries == 0


def test_a_short_read_or_write_is_an_error(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    log = journal.create(1)
    log.append(b"abc")
    with monkeypatch.context() as patch:
        patch.setattr("sterna.journal.log._pwrite", lambda fd, data, offset: 0)
        with pytest.raises(StorageError, match="short write"):
            log.append(b"d")
        patch.setattr("sterna.journal.log._pread", lambda fd, size, offset: b"")
        with pytest.raises(StorageError, match="cut short"):
            log.read(0, 3)
    log.append(b"d")
    assert whole(log) == b"abcd"


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_the_last_position_is_the_end(journal: Journal, kind: str) -> None:
    start = POSITION_MAX - 3
    log = journal.create(1, start=start) if kind == "disk" else MemoryLog(1, start=start)
    with pytest.raises(StorageError, match="position"):
        log.append(b"abcd")
    log.append(b"abc")
    log.append(b"")
    with pytest.raises(StorageError, match="position"):
        log.append(b"d")
    assert whole(log) == b"abc"


def test_impossible_arguments_are_refused(journal: Journal) -> None:
    wrong = {"number": (-1, 2**64), "start": (-1, 2**63), "ring_bytes": (0, -1), "spill_bytes": (-1, -5)}
    for name, bad in ((name, value) for name, values in wrong.items() for value in values):
        with pytest.raises(UsageError):
            journal.create(**{"number": 1, name: bad})  # type: ignore[arg-type]  # all of them are integers
    with pytest.raises(UsageError):
        MemoryLog(1, ring_bytes=0)
    journal.create(2**64 - 1).append(b"x")
    assert list(journal.logs()) == [2**64 - 1]


def test_memory_journal_is_used_like_the_one_on_disk() -> None:
    memory = MemoryJournal(quota_bytes=200_000)
    log = memory.create(1, ring_bytes=50_000)
    fill(log, 300_000)
    assert check_right(log, 1) == []
    with pytest.raises(StorageError, match="already"):
        memory.create(1)
    with pytest.raises(StorageError, match="no log 2"):
        memory.open(2)
    assert memory.open(1, ring_bytes=40_000) is log
    log.pack()
    log.release()
    assert log.end - log.tail == 40_000 == memory.used_bytes
    other = memory.create(2)
    fill(other, 160_000)
    with pytest.raises(JournalFullError):
        other.append(b"x")
    assert other.end == 160_000
    log.append(b"makes room by dropping its own oldest byte")
    assert sorted(memory.logs()) == [1, 2]
    memory.remove(2)
    memory.remove(2)
    assert memory.used_bytes == log.end - log.tail
    memory.close()
    assert (memory.used_bytes, list(memory.logs())) == (0, [])
