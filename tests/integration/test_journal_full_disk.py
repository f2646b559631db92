"""A disk without room: a small tmpfs that is really full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.clock import Clock
from sterna.journal import Journal, JournalFullError, MemoryLog
from sterna.journal.format import ARENA_MIN_BYTES
from sterna.units import SECOND
from tests.journal_stream import check_right, fill_up, stream

ARENA = 2 * ARENA_MIN_BYTES


class StoppedClock(Clock):
    """A clock that only moves when told to."""

    now = 5 * SECOND

    def monotonic(self) -> int:
        return self.now


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1,200 KiB, of which 300 KiB are taken."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount refused a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        (path / "taken").write_bytes(bytes(300 * 1024))
        yield path
    finally:
        # Lazily, so that a failed test with open files leaves no mount either.
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_refuses_new_output_and_keeps_the_old(small_disk: Path) -> None:
    clock = StoppedClock()
    path = str(small_disk / "journal")
    journal = Journal(path, arena_bytes=ARENA, clock=clock)
    log = journal.create(1)
    with pytest.raises(JournalFullError, match="The disk has no 262144 bytes"):
        fill_up(log, 10_000)
    end = log.end
    assert end > 2 * ARENA
    assert check_right(log, 1) == []
    assert journal.arenas == 3
    assert journal.faults.total() == 0

    # The disk is filled to its last byte by somebody else: what was reserved stays usable, a new start works too.
    with (small_disk / "other").open("wb", buffering=0) as file:
        assert file.write(bytes(4 * ARENA)) < 4 * ARENA
        with pytest.raises(OSError, match="No space left"):
            file.write(bytes(4096))
    with pytest.raises(JournalFullError):
        fill_up(log, 1)
    journal.close()
    journal = Journal(path, arena_bytes=ARENA, clock=clock)
    again = journal.open(1)
    assert (again.end, check_right(again, 1)) == (log.end, [])

    # The session goes on in memory from the same position, and on disk when there is room again.
    memory = MemoryLog(1, start=again.end)
    memory.append(stream(1, memory.end, 50_000))
    assert check_right(memory, 1) == []
    (small_disk / "other").unlink()
    (small_disk / "taken").unlink()
    clock.now += 2 * SECOND
    again.append(memory.read(again.end, 50_000))
    assert (again.end, check_right(again, 1)) == (memory.end, [])
    journal.close()


def test_a_start_on_a_full_disk_says_so_and_leaves_nothing(small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(700_000))
    with pytest.raises(JournalFullError, match="free some space"):
        Journal(str(small_disk / "journal"), arena_bytes=ARENA)
    assert os.listdir(small_disk / "journal") == ["lock"]
    (small_disk / "other").unlink()
    Journal(str(small_disk / "journal"), arena_bytes=ARENA).close()
