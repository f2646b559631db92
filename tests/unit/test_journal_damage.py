"""Damaged files: never a wrong byte, never an exception that stops the node, and the loss has a name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from zlib import crc32

import pytest

from sterna.errors import StorageError
from sterna.journal import Journal, LostBytesError
from sterna.journal.chunks import VERIFY_BYTES
from sterna.journal.format import (
    ARENA_MIN_BYTES,
    ENTRY_BYTES,
    entry_offset,
    first_data_page,
    pack_head,
    pack_tail,
    unpack_entry,
)
from sterna.limits import CHUNK_MAX_BYTES, PAGE_BYTES
from tests.journal_stream import check_right, stream

ARENA = 2 * ARENA_MIN_BYTES
START = 2**32 - 10_000


def open_journal(path: Path) -> Journal:
    return Journal(str(path), quota_bytes=64 * ARENA, arena_bytes=ARENA)


def flip(path: Path, offset: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def make(path: Path, size: int, number: int = 5) -> list[tuple[Path, int, int, int]]:
    """Makes a journal with one log and returns for each chunk: file, page, start, end."""
    journal = open_journal(path)
    log = journal.create(number, start=START)
    while size:
        part = min(size, 3_000)
        log.append(stream(number, log.end, part))
        size -= part
    log.release()
    log = journal.open(number)
    places = [(path / f"arena-{c.arena.number:06d}", c.page, c.start, c.end) for c in log.chunks]
    journal.close()
    return places


@pytest.mark.parametrize(
    ("size", "which"), [(3_000, 0), (30_000, 0), (30_000, -1), (400_000, 0), (400_000, 1), (400_000, -1)]
)
def test_a_damaged_chunk_is_lost_and_named(tmp_path: Path, size: int, which: int) -> None:
    places = make(tmp_path / "journal", size)
    file, page, start, end = places[which]
    flip(file, page * PAGE_BYTES + (end - start) // 2, 0x10)
    journal = open_journal(tmp_path / "journal")
    assert journal.faults.total() == 0
    log = journal.open(5)
    assert journal.faults.chunks == 1
    assert log.damaged == [(start, end)]
    last = which in (-1, len(places) - 1)
    assert log.end == (start if last else places[-1][3])
    assert log.tail == (places[1][2] if which == 0 and len(places) > 1 else START)
    middle = which == 1 and not last
    assert check_right(log, 5) == ([(start, end)] if middle else [])
    if middle:
        with pytest.raises(LostBytesError) as lost:
            log.read(end - 1, 10)
        assert (lost.value.start, lost.value.end) == (end - 1, end)
    log.append(stream(5, log.end, 50_000))
    assert check_right(log, 5) == ([(start, end)] if middle else [])
    end = log.end
    journal.close()
    journal = open_journal(tmp_path / "journal")
    assert journal.open(5).end == end
    assert journal.faults.total() == 0
    journal.close()


def test_a_garbled_entry_costs_its_chunk(tmp_path: Path) -> None:
    places = make(tmp_path / "journal", 400_000)
    for index in (2, len(places) - 1):
        flip(places[index][0], entry_offset(places[index][1]) + 30)
    journal = open_journal(tmp_path / "journal")
    assert journal.faults.entries == 2
    log = journal.open(5)
    assert log.damaged == [places[2][2:]] == check_right(log, 5)
    # What nothing speaks of any more cannot be named: the end is just earlier.
    assert log.end == places[-1][2]
    log.append(stream(5, log.end, 100))
    journal.remove(5)
    assert journal.used_bytes == 0
    journal.close()


def test_a_log_whose_only_chunk_is_damaged_stays_a_log(tmp_path: Path) -> None:
    ((file, page, start, end),) = make(tmp_path / "journal", 3_000)
    flip(file, page * PAGE_BYTES)
    for expected in ([(start, end)], []):
        journal = open_journal(tmp_path / "journal")
        log = journal.open(5)
        assert (log.tail, log.end, log.damaged) == (START, START, expected)
        journal.close()
    flip(file, entry_offset(page) + 9)
    journal = open_journal(tmp_path / "journal")
    assert list(journal.logs()) == []
    with pytest.raises(StorageError, match="no log 5"):
        journal.open(5)
    journal.close()


def test_a_damaged_header_is_written_anew(tmp_path: Path) -> None:
    make(tmp_path / "journal", 30_000)
    for offset in (0, 8, 12, 16, 24):
        flip(tmp_path / "journal" / "arena-000000", offset, 0x40)
        journal = open_journal(tmp_path / "journal")
        assert journal.faults.headers == 1
        log = journal.open(5)
        assert (log.damaged, check_right(log, 5), log.end) == ([], [], START + 30_000)
        journal.close()
    journal = open_journal(tmp_path / "journal")
    assert journal.faults.total() == 0
    journal.close()


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES + 5, ARENA // 2, ARENA - 1])
def test_a_file_that_was_cut_short(tmp_path: Path, size: int) -> None:
    make(tmp_path / "journal", 400_000)
    with (tmp_path / "journal" / "arena-000000").open("r+b") as file:
        file.truncate(size)
    journal = open_journal(tmp_path / "journal")
    assert journal.faults.entries + journal.faults.files > 0 or size > ARENA // 2
    log = journal.open(5)
    assert log.end == START + 400_000
    check_right(log, 5)
    journal.create(6).append(stream(6, 0, 200_000))
    assert check_right(journal.open(6), 6) == []
    journal.close()


def test_pages_cut_off_while_running_are_an_error_not_a_wrong_byte(tmp_path: Path) -> None:
    make(tmp_path / "journal", 3_000)
    journal = open_journal(tmp_path / "journal")
    log = journal.open(5)
    with (tmp_path / "journal" / "arena-000000").open("r+b") as file:
        file.truncate(PAGE_BYTES)
    with pytest.raises(StorageError, match="cut short"):
        log.read(START, 10)
    log.pack()
    log.release()
    with pytest.raises(StorageError, match="no log 5"):
        journal.open(5)
    assert journal.used_bytes == 0
    journal.close()


def test_a_copy_of_an_entry_elsewhere_is_not_believed(tmp_path: Path) -> None:
    ((file, page, _, _),) = make(tmp_path / "journal", 3_000)
    image = bytearray(file.read_bytes())
    entry = image[entry_offset(page) : entry_offset(page) + ENTRY_BYTES]
    other = first_data_page(ARENA // PAGE_BYTES) + 20
    image[entry_offset(other) : entry_offset(other) + ENTRY_BYTES] = entry
    file.write_bytes(image)
    journal = open_journal(tmp_path / "journal")
    assert journal.faults.entries == 1
    assert journal.open(5).end == START + 3_000
    journal.close()


def test_an_old_page_that_comes_back_does_not_win(tmp_path: Path) -> None:
    """A power cut may bring back erased entries, beside newer ones: of one position, and of one page."""
    path = tmp_path / "journal"
    journal = open_journal(path)
    log = journal.create(5)
    log.append(stream(5, 0, 4096 + 10_000))
    journal.close()
    old = (path / "arena-000000").read_bytes()
    journal = open_journal(path)
    journal.remove(5)
    other = journal.create(6)
    other.append(stream(6, 0, 100_000))
    log = journal.create(5)
    log.append(stream(8, 0, 3_000))
    journal.close()
    new = bytearray((path / "arena-000000").read_bytes())
    size = first_data_page(ARENA // PAGE_BYTES) * PAGE_BYTES
    for offset in range(PAGE_BYTES, size, ENTRY_BYTES):
        if not any(new[offset : offset + ENTRY_BYTES]):
            new[offset : offset + ENTRY_BYTES] = old[offset : offset + ENTRY_BYTES]
    (path / "arena-000000").write_bytes(new)
    journal = open_journal(path)
    log = journal.open(5)
    assert (log.tail, log.end, check_right(log, 8)) == (0, 3_000, [])
    assert check_right(journal.open(6), 6) == []
    assert journal.open(6).damaged == []
    assert journal.faults.overlaps > 0
    journal.remove(5)
    journal.remove(6)
    assert journal.used_bytes == 0
    journal.close()


def write_chunk(path: Path, page: int, size_class: int, number: int, generation: int, data: bytes) -> None:
    """Puts a chunk into an arena file, whatever is there."""
    head = pack_head(size_class, number, generation, generation, 0)
    with path.open("r+b") as file:
        file.seek(page * PAGE_BYTES)
        file.write(data)
        file.seek(entry_offset(page))
        file.write(head + pack_tail(crc32(head, page), len(data), crc32(data)))


@pytest.mark.parametrize(("size_class", "pages"), [(1, 4), (2, 16)])
@pytest.mark.parametrize("inner_is_newer", [True, False])
def test_of_two_chunks_on_one_page_the_newer_is_right(
    tmp_path: Path, size_class: int, pages: int, inner_is_newer: bool
) -> None:
    path = tmp_path / "journal"
    open_journal(path).close()
    first = first_data_page(ARENA // PAGE_BYTES)
    file = path / "arena-000000"
    write_chunk(file, first, size_class, 1, 5, stream(1, 0, 2 * PAGE_BYTES))
    # Beyond the outer one's committed bytes, so that only the generation can tell.
    inner = 6 if inner_is_newer else 4
    write_chunk(file, first + pages - 2, 0, 2, inner, stream(2, 0, 10))
    write_chunk(file, first + pages - 1, 0, 3, inner, stream(3, 0, 10))
    journal = open_journal(path)
    right = [2, 3] if inner_is_newer else [1]
    assert sorted(journal.logs()) == right
    assert journal.faults.overlaps == (1 if inner_is_newer else 2)
    assert journal.used_bytes == (2 if inner_is_newer else pages) * PAGE_BYTES
    for number in right:
        assert journal.open(number).end == (2 * PAGE_BYTES if number == 1 else 10)
        assert check_right(journal.open(number), number) == []
    journal.create(9).append(stream(9, 0, 100_000))
    journal.close()
    journal = open_journal(path)
    assert sorted(journal.logs()) == [*right, 9]
    assert journal.faults.total() == 0
    assert [check_right(journal.open(number), number) for number in (*right, 9)] == [[]] * (len(right) + 1)
    journal.close()


@pytest.mark.parametrize(("whole", "part"), [(4, 0), (4, 8), (0, 4)])
def test_of_a_log_killed_while_it_was_packed_the_whole_chunk_is_right(tmp_path: Path, whole: int, part: int) -> None:
    """The first of the smaller chunks was committed, the second not: all have the generation of the large one."""
    path = tmp_path / "journal"
    open_journal(path).close()
    first = first_data_page(ARENA // PAGE_BYTES)
    file = path / "arena-000000"
    write_chunk(file, first + whole, 1, 1, 5, stream(1, 0, PAGE_BYTES + 1000))
    write_chunk(file, first + part, 0, 1, 5, stream(1, 0, PAGE_BYTES))
    for overlaps in (1, 0):
        journal = open_journal(path)
        log = journal.open(1)
        assert (log.end, log.damaged, check_right(log, 1)) == (PAGE_BYTES + 1000, [], [])
        assert journal.faults.overlaps == overlaps
        journal.close()


def test_entries_that_cannot_be_right_are_ignored_whatever_their_crc(tmp_path: Path) -> None:
    page = first_data_page(ARENA // PAGE_BYTES)
    cases = (
        (pack_head(3, 1, 1, 1, 0), 0),
        (pack_head(0, 1, 1, 1, 0), PAGE_BYTES + 1),
        (pack_head(0, 1, 1, 1, 2**63 - 5), 6),
        (pack_head(0, 1, 1, 2**63, 0), 0),
        (pack_head(0, 1, 2**63, 1, 0), 0),
        (b"SJxx" + pack_head(0, 1, 1, 1, 0)[4:], 0),
    )
    for head, length in cases:
        assert unpack_entry(head + pack_tail(crc32(head, page), length, 0), 0, page) is None
    head = pack_head(0, 1, 2, 3, 4)
    good = head + pack_tail(crc32(head, page), 5, 6)
    assert unpack_entry(good, 0, page) == (0, 1, 2, 3, 4, 5, 6)
    assert unpack_entry(good, 0, page + 1) is None
    path = tmp_path / "journal"
    open_journal(path).close()
    for wrong, size_class in ((page - 1, 0), (page + 1, 1), (page + 4, 2), (ARENA // PAGE_BYTES - 1, 2)):
        write_chunk(path / "arena-000000", wrong, size_class, 1, 1, b"")
    journal = open_journal(path)
    assert journal.faults.entries == 4
    assert list(journal.logs()) == []
    journal.close()


def test_a_copied_arena_gives_no_doubled_bytes(tmp_path: Path) -> None:
    make(tmp_path / "journal", 100_000)
    shutil.copy(tmp_path / "journal" / "arena-000000", tmp_path / "journal" / "arena-000003")
    journal = open_journal(tmp_path / "journal")
    log = journal.open(5)
    assert (log.tail, log.end, log.damaged, check_right(log, 5)) == (START, START + 100_000, [], [])
    journal.remove(5)
    assert (journal.used_bytes, journal.arenas) == (0, 1)
    journal.close()


def test_a_long_spill_is_checked_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    size = VERIFY_BYTES + 20 * CHUNK_MAX_BYTES
    journal = Journal(str(path), arena_bytes=16 * ARENA)
    log = journal.create(5, spill_bytes=4 * VERIFY_BYTES)
    log.keep_from(0)
    while log.end < size:
        log.append(stream(5, log.end, CHUNK_MAX_BYTES))
    places = [(path / f"arena-{c.arena.number:06d}", c.page, c.start, c.start + c.capacity) for c in log.chunks]
    journal.close()
    for index in (0, 5, len(places) - 3):
        flip(places[index][0], places[index][1] * PAGE_BYTES + 77)
    journal = Journal(str(path), arena_bytes=16 * ARENA)
    log = journal.open(5, spill_bytes=4 * VERIFY_BYTES)
    assert log.damaged == [places[-3][2:]]
    with pytest.raises(LostBytesError):
        log.read(0, 1)
    assert log.tail == places[0][3]
    assert check_right(log, 5) == [places[5][2:], places[-3][2:]]
    assert log.damaged == [places[0][2:], places[5][2:], places[-3][2:]]
    used = journal.used_bytes
    log.keep_from(None)
    assert log.damaged == check_right(log, 5) == [places[-3][2:]]
    assert journal.used_bytes < used
    journal.close()


def test_the_end_is_always_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = make(tmp_path / "journal", 400_000)
    for file, page, _, _ in places[-2:]:
        flip(file, page * PAGE_BYTES)
    monkeypatch.setattr("sterna.journal.chunks.VERIFY_BYTES", 0)
    journal = open_journal(tmp_path / "journal")
    log = journal.open(5)
    assert (log.end, journal.faults.chunks) == (places[-3][3], 2)
    assert log.damaged == [(places[-2][2], places[-1][3])]
    assert check_right(log, 5) == []
    journal.close()


def test_bytes_damaged_while_running_are_not_packed_as_if_right(tmp_path: Path) -> None:
    places = make(tmp_path / "journal", 400_000)
    journal = open_journal(tmp_path / "journal")
    log = journal.open(5)
    log.append(stream(5, log.end, CHUNK_MAX_BYTES))
    last = log.chunks[-1]
    flip(tmp_path / "journal" / f"arena-{last.arena.number:06d}", last.page * PAGE_BYTES)
    stored = log.stored_bytes
    log.pack()
    assert log.stored_bytes == stored
    log.release()
    log = journal.open(5)
    assert log.damaged == [(last.start, START + 400_000 + CHUNK_MAX_BYTES)]
    assert (log.end, check_right(log, 5)) == (last.start, [])
    assert places
    journal.close()


def model_logs(path: Path, rng: random.Random) -> dict[int, tuple[int, int]]:
    """Makes a journal with some logs of all sizes and returns (tail, end) of each."""
    journal = open_journal(path)
    found = {}
    for number in range(1, 20):
        log = journal.create(number, start=rng.choice((0, 2**31 - 500, 2**32 - 500)), ring_bytes=200_000)
        for _ in range(rng.randrange(8)):
            log.append(stream(number, log.end, rng.choice((1, 100, 5_000, 40_000, 90_000))))
            if rng.random() < 0.3:
                log.pack()
        found[number] = (log.tail, log.end)
    journal.close()
    return found


def test_random_damage_anywhere(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    found = model_logs(tmp_path / "good", rng)
    directory_end = first_data_page(ARENA // PAGE_BYTES) * PAGE_BYTES
    noticed = 0
    for _ in range(60):
        path = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", path)
        for _ in range(rng.randrange(1, 30)):
            file = rng.choice(sorted(path.glob("arena-*")))
            end = rng.choice((PAGE_BYTES, directory_end, directory_end, ARENA))
            flip(file, rng.randrange(end), rng.randrange(1, 256))
        journal = open_journal(path)
        noticed += journal.faults.total() > 0
        for number, (tail, end) in found.items():
            if number not in journal:
                assert journal.faults.entries > 0
                continue
            log = journal.open(number)
            assert tail <= log.tail <= log.end <= end
            lost = check_right(log, number, rng.choice((100, 5_000, 65_536)))
            assert set(lost) <= set(log.damaged)
            log.append(stream(number, log.end, 1_000))
            assert set(check_right(log, number)) <= set(lost)
        used = journal.used_bytes
        ends = {number: journal.open(number).end for number in journal.logs()}
        journal.close()
        journal = open_journal(path)
        assert journal.faults.total() == 0
        assert journal.used_bytes == used
        assert {number: journal.open(number).end for number in journal.logs()} == ends
        for number in list(journal.logs()):
            journal.remove(number)
        assert journal.used_bytes == 0
        journal.close()
        shutil.rmtree(path)
    assert noticed > 10
