"""The journal's directory: who may use it, what of it is found again, and how its space is handed out."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from zlib import crc32

import pytest

from sterna.clock import Clock
from sterna.errors import StorageError, UsageError
from sterna.journal import Journal, JournalFullError
from sterna.journal.arena import Arena, arena_name
from sterna.journal.format import ARENA_MAX_BYTES, ARENA_MIN_BYTES, CLASS_PAGES, pack_header, unpack_header
from sterna.journal.space import Space
from sterna.limits import PAGE_BYTES
from sterna.units import SECOND
from tests.journal_stream import check_right, stream

ARENA = ARENA_MIN_BYTES


class StoppedClock(Clock):
    """A clock that only moves when told to."""

    now = 5 * SECOND

    def monotonic(self) -> int:
        return self.now


def open_journal(path: Path, quota: int = 64 * ARENA) -> Journal:
    return Journal(str(path), quota_bytes=quota, arena_bytes=ARENA)


def journal_path(tmp_path: Path) -> str:
    return str(tmp_path / "journal")


def arena_files(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if name.startswith("arena-"))


def test_all_logs_are_found_again(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "a" / "journal")
    sizes = {2**40 + n: n * 997 for n in range(50)} | {0: 0, 2**64 - 1: 1}
    for number, size in sizes.items():
        log = journal.create(number, start=number % 2**33)
        log.append(stream(number, log.end, size))
    with pytest.raises(StorageError, match="already"):
        journal.create(0)
    used = journal.used_bytes
    journal.close()
    journal.close()
    with pytest.raises(StorageError, match="closed"):
        journal.create(77)
    again = open_journal(tmp_path / "a" / "journal")
    assert sorted(again.logs()) == sorted(sizes)
    assert len(again) == len(sizes)
    assert again.used_bytes == used
    for number, size in sizes.items():
        log = again.open(number)
        assert again.open(number, ring_bytes=5) is log
        assert log.ring_bytes == 5
        assert (log.tail, log.end, log.damaged) == (number % 2**33, number % 2**33 + size, [])
        assert check_right(log, number) == []
    assert again.faults.total() == 0
    newest = max(chunk.generation for number in sizes for chunk in again.open(number).chunks)
    assert again.create(3).chunks[0].generation > newest
    again.remove(3)
    assert again.reserved_bytes == len(arena_files(tmp_path / "a" / "journal")) * ARENA == again.arenas * ARENA
    with pytest.raises(StorageError, match="no log 3"):
        again.open(3)
    for number in sizes:
        again.remove(number)
        again.remove(number)
    assert (again.used_bytes, again.arenas, list(again.logs())) == (0, 1, [])
    assert len(arena_files(tmp_path / "a" / "journal")) == 1
    again.close()


def test_a_log_that_is_not_open_takes_little_memory(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "journal", 2_000 * ARENA)
    for number in range(5_000):
        log = journal.create(2**40 + number)
        log.append(b"output")
        log.release()
    journal.close()
    tracemalloc.start()
    try:
        journal = open_journal(tmp_path / "journal", 2_000 * ARENA)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"{taken / 5_000:.0f} bytes for each log")
    assert len(journal) == 5_000
    # The arenas of this test are small, so there are many of them: that is half of it.
    assert taken < 400 * 5_000
    journal.close()


def test_arenas_may_have_other_sizes_than_they_were_made_with(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    journal = Journal(path, quota_bytes=8 * ARENA, arena_bytes=ARENA)
    journal.create(1).append(stream(1, 0, 100_000))
    journal.close()
    journal = Journal(path, quota_bytes=4 * ARENA + 3 * PAGE_BYTES, arena_bytes=2 * ARENA)
    with pytest.raises(JournalFullError):
        journal.create(2).append(bytes(4 * ARENA))
    journal.open(1).append(stream(1, 100_000, 100_000))
    assert journal.reserved_bytes <= journal.quota_bytes
    journal.close()
    journal = Journal(path, quota_bytes=ARENA, arena_bytes=ARENA)
    assert check_right(journal.open(1), 1) == []
    journal.close()
    for arena, quota in ((ARENA - PAGE_BYTES, ARENA), (ARENA + 1, 2 * ARENA), (2 * ARENA_MAX_BYTES, 2**40), (ARENA, 1)):
        with pytest.raises(UsageError):
            Journal(path, arena_bytes=arena, quota_bytes=quota)


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        journal = open_journal(tmp_path / "journal")
    finally:
        os.umask(old)
    names = (".", *os.listdir(tmp_path / "journal"))
    modes = {name: (tmp_path / "journal" / name).stat().st_mode & 0o777 for name in names}
    assert modes == {".": 0o700, "lock": 0o600, "arena-000000": 0o600}
    journal.close()


def test_descriptors_are_closed_and_not_inherited(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    journal = open_journal(tmp_path / "journal")
    fds = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    ours = [fd for fd in fds if os.readlink(f"/proc/self/fd/{fd}").startswith(journal_path(tmp_path))]
    assert len(ours) == 3
    assert not any(os.get_inheritable(fd) for fd in ours)
    with pytest.raises(StorageError):
        open_journal(tmp_path / "journal")
    journal.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    program = "import sys; from sterna.journal import Journal; j = Journal(sys.argv[1]); print(1, flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", program, journal_path(tmp_path)]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(StorageError, match=f"in use by process {child.pid}:"):
        Journal(journal_path(tmp_path))
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    Journal(journal_path(tmp_path)).close()


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    for mode in (0o770, 0o702):
        shared = tmp_path / f"mode{mode}"
        shared.mkdir()
        shared.chmod(mode)
        with pytest.raises(StorageError, match="chmod 700"):
            open_journal(shared)
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(StorageError, match="no link"):
        open_journal(tmp_path / "link")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="directory"):
        open_journal(tmp_path / "file")
    assert os.listdir(tmp_path / "real") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_foreign_owners_are_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir(0o700)
    os.chown(tmp_path / "foreign", 4321, 4321)
    with pytest.raises(StorageError, match="belongs to user 4321"):
        open_journal(tmp_path / "foreign")
    open_journal(tmp_path / "journal").close()
    os.chown(tmp_path / "journal" / "arena-000000", 4321, 4321)
    with pytest.raises(StorageError, match="belongs to user 4321"):
        open_journal(tmp_path / "journal")


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "directory", "open to others", "lock link", "lock fifo"])
def test_strange_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "journal"
    open_journal(path).close()
    arena = path / "arena-000000"
    (path / "lock").unlink()
    if kind == "link":
        arena.rename(tmp_path / "elsewhere")
        arena.symlink_to(tmp_path / "elsewhere")
    elif kind == "hard link":
        os.link(arena, tmp_path / "elsewhere")
    elif kind == "open to others":
        arena.chmod(0o640)
    elif kind == "lock link":
        (path / "lock").symlink_to(tmp_path / "made by us")
    elif kind == "lock fifo":
        os.mkfifo(path / "lock")
    else:
        arena.unlink()
        os.mkfifo(arena, 0o600) if kind == "fifo" else arena.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError):
        open_journal(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "made by us").exists()


def test_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    open_journal(tmp_path / "journal").close()
    arena = tmp_path / "journal" / "arena-000000"
    image = bytearray(arena.read_bytes())
    header = pack_header(ARENA // PAGE_BYTES)
    assert image.startswith(header)
    assert unpack_header(header) == (1, PAGE_BYTES, ARENA // PAGE_BYTES)
    newer = header[:8] + struct.pack("<I", 2) + header[12:-4]
    image[: len(header)] = newer + struct.pack("<I", crc32(newer))
    arena.write_bytes(image)
    with pytest.raises(StorageError, match="another version"):
        open_journal(tmp_path / "journal")
    assert arena.read_bytes() == image


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    open_journal(path).close()
    for name in ("arena-1", "arena-0000001", "arena-00000x", "notes"):
        (path / name).write_bytes(b"not ours")
    open_journal(path).close()
    for name in ("arena-1", "arena-0000001", "arena-00000x", "notes"):
        assert (path / name).read_bytes() == b"not ours"


def test_a_full_disk_is_asked_again_only_after_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StoppedClock()
    journal = Journal(journal_path(tmp_path), quota_bytes=4 * ARENA, arena_bytes=ARENA, clock=clock)
    log = journal.create(1)
    asked = 0

    def refuse(fd: int, offset: int, size: int) -> None:
        nonlocal asked
        asked += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", refuse)
        for _ in range(5):
            with pytest.raises(JournalFullError, match="No space left"):
                log.append(bytes(ARENA))
        assert asked == 1
        clock.now += SECOND
        with pytest.raises(JournalFullError):
            log.append(bytes(ARENA))
        assert asked == 2
    assert arena_files(tmp_path / "journal") == ["arena-000000"]
    clock.now += SECOND
    log.append(stream(1, 0, ARENA))
    assert check_right(log, 1) == []
    journal.close()


@pytest.mark.parametrize("pages", [32, 47, 48, 100])
def test_space_hands_out_every_page_once_and_joins_what_is_free(tmp_path: Path, pages: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    space = Space(directory, str(tmp_path), 5 * pages * PAGE_BYTES, pages * PAGE_BYTES, Clock())
    held: dict[tuple[int, int], tuple[Arena, int, int]] = {}
    pages_of: dict[tuple[int, int], tuple[int, int]] = {}
    for _ in range(3000):
        if held and rng.random() < 0.48:
            key = rng.choice(list(held))
            arena, page, size_class = held.pop(key)
            for used in range(page, page + CLASS_PAGES[size_class]):
                del pages_of[arena.number, used]
            space.give(arena, page, size_class)
        else:
            size_class = rng.choice((0, 0, 1, 2))
            place = space.take(size_class)
            if place is None:
                continue
            arena, page = place
            assert arena.aligned(page, size_class)
            for used in range(page, page + CLASS_PAGES[size_class]):
                assert (arena.number, used) not in pages_of
                pages_of[arena.number, used] = (page, size_class)
            held[arena.number, page] = (arena, page, size_class)
        assert space.used_bytes == len(pages_of) * PAGE_BYTES
        assert sum(not arena.used for arena in space.arenas.values()) <= 1
    for arena, page, size_class in held.values():
        space.give(arena, page, size_class)
    assert [arena.used for arena in space.arenas.values()] == [0]
    (left,) = space.arenas.values()
    count = 0
    while space.take(2):
        count += 1
    assert count == 5 * ((left.pages - left.first) // CLASS_PAGES[2])
    space.close()
    os.close(directory)
    assert set(os.listdir(tmp_path)) == {arena_name(number) for number in range(5)}
