"""`kill -9` while a process writes: at random moments, and at each single write, with controls that must lose bytes."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from sterna.journal import Journal
from sterna.journal.format import ARENA_MIN_BYTES, ENTRY_BYTES, entry_offset, first_data_page
from sterna.limits import PAGE_BYTES
from tests.journal_stream import check_right, stream

ARENA = 4 * ARENA_MIN_BYTES
NUMBER = 7
START = 2**32 - 100_000
RING = 300_000
_ACK = struct.Struct("!Q")


def open_journal(path: str) -> Journal:
    return Journal(path, quota_bytes=16 * ARENA, arena_bytes=ARENA)


def child(path: str, seed: int, acknowledge_first: bool) -> NoReturn:
    """Appends the stream for ever and says after each append how far it is; packs, releases, removes logs between."""
    rng = random.Random(seed)
    journal = open_journal(path)
    if NUMBER in journal:
        log = journal.open(NUMBER, ring_bytes=RING, spill_bytes=RING)
    else:
        log = journal.create(NUMBER, start=START, ring_bytes=RING, spill_bytes=RING)
    while True:
        size = rng.choice((1, 80, 1_000, 5_000, 30_000, 150_000))
        data = stream(NUMBER, log.end, size)
        if acknowledge_first:
            os.write(1, _ACK.pack(log.end + size))
        log.append(data)
        os.write(1, _ACK.pack(log.end))
        action = rng.randrange(8)
        if action == 0:
            log.pack()
        elif action == 1:
            log.release()
            log = journal.open(NUMBER, ring_bytes=RING, spill_bytes=RING)
        elif action == 2:
            log.keep_from(log.end - rng.randrange(2 * RING))
        elif action == 3:
            other = rng.randrange(100, 110)
            journal.remove(other)
            journal.create(other).append(stream(other, 0, rng.randrange(100_000)))


def run_and_kill(path: str, rng: random.Random, acknowledge_first: bool) -> int:
    """Starts the child, kills it at a random moment, and returns the last position it acknowledged."""
    command = [sys.executable, __file__, path, str(rng.randrange(2**32)), str(int(acknowledge_first))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    received = b""
    wanted = rng.randrange(1, 400) * _ACK.size
    while len(received) < wanted:
        data = os.read(process.stdout.fileno(), 65536)
        assert data, "the child died by itself"
        received += data
    # Between two acknowledgements too: some thousand turns of nothing are a few microseconds to a millisecond.
    for _ in range(rng.randrange(20_000)):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    while data := os.read(process.stdout.fileno(), 65536):
        received += data
    process.stdout.close()
    return int(_ACK.unpack_from(received, len(received) // _ACK.size * _ACK.size - _ACK.size)[0])


def test_killed_at_random_moments_it_has_all_it_acknowledged(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = str(tmp_path / "journal")
    beyond = 0
    for _ in range(30):
        acknowledged = run_and_kill(path, rng, acknowledge_first=False)
        journal = open_journal(path)
        log = journal.open(NUMBER, ring_bytes=RING, spill_bytes=RING)
        assert log.end >= acknowledged
        beyond += log.end > acknowledged
        assert (log.damaged, check_right(log, NUMBER)) == ([], [])
        assert log.end - log.tail >= min(RING, log.end - START)
        for other in journal.logs():
            if other != NUMBER:
                assert journal.open(other).damaged == check_right(journal.open(other), other) == []
        faults = journal.faults
        # An entry left over by a kill within `pack` is expected, anything else is not.
        assert faults.total() == faults.overlaps <= 20
        assert journal.used_bytes == sum(journal.open(number).stored_bytes for number in journal.logs())
        journal.close()
    print(f"{beyond} of 30 kills came between an append and its acknowledgement")


def test_control_acknowledging_before_appending_is_noticed(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = str(tmp_path / "journal")
    for _ in range(40):
        acknowledged = run_and_kill(path, rng, acknowledge_first=True)
        journal = open_journal(path)
        end = journal.open(NUMBER, ring_bytes=RING, spill_bytes=RING).end
        journal.close()
        if end < acknowledged:
            return
    pytest.fail("a child that acknowledged too early was never caught: the kills come at the wrong moments")


Pwrite = Callable[[int, bytes | memoryview, int], int]
_pwrite: Pwrite = os.pwrite


def is_entry(data: bytes | memoryview, offset: int) -> bool:
    return len(data) <= ENTRY_BYTES and entry_offset(0) <= offset < first_data_page(ARENA // PAGE_BYTES) * PAGE_BYTES


def dying(at: int, half: bool, entries_first: bool) -> Pwrite:
    """Returns a pwrite that kills the process at its `at`th call: before it, or (`half`) in the middle of large ones.

    With `entries_first` a write of data waits until the next entry is written, as in a journal with its order wrong.
    """
    calls = 0
    waiting: list[tuple[int, bytes, int]] = []

    def write(fd: int, data: bytes | memoryview, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            if half and len(data) > PAGE_BYTES:
                # A fatal signal ends a large write between two pages.
                _pwrite(fd, memoryview(data)[: len(data) // 2 // PAGE_BYTES * PAGE_BYTES], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        _pwrite(fd, data, offset)

    def pwrite(fd: int, data: bytes | memoryview, offset: int) -> int:
        if entries_first and not is_entry(data, offset):
            waiting.append((fd, bytes(data), offset))
            return len(data)
        write(fd, data, offset)
        while waiting:
            write(*waiting.pop(0))
        return len(data)

    return pwrite


def scenario(journal: Journal, acknowledge: Callable[[int, int], int]) -> None:
    """Does all that changes the disk: growing, large appends, packing, a turning ring, create and remove."""
    log = journal.create(NUMBER, start=START, ring_bytes=100_000)
    for size in (1, 10, 4_085, 1, 20_000, 70_000):
        log.append(stream(NUMBER, log.end, size))
        acknowledge(NUMBER, log.end)
    log.pack()
    log.append(stream(NUMBER, log.end, 10))
    acknowledge(NUMBER, log.end)
    log.pack()
    other = journal.create(8)
    other.append(stream(8, 0, 40_000))
    acknowledge(8, 40_000)
    log.append(stream(NUMBER, log.end, 150_000))
    acknowledge(NUMBER, log.end)
    acknowledge(8, 0)
    journal.remove(8)
    log.release()
    log = journal.open(NUMBER, ring_bytes=100_000)
    log.append(stream(NUMBER, log.end, 66_000))
    acknowledge(NUMBER, log.end)


def run_forked(path: str, pwrite: Pwrite, patch: pytest.MonkeyPatch) -> tuple[int, dict[int, int]]:
    """Runs the scenario in a forked process with this pwrite; returns its wait status and what it acknowledged."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            patch.setattr("os.pwrite", pwrite)
            patch.setattr("sterna.journal.log._pwrite", pwrite)
            scenario(open_journal(path), lambda number, end: os.write(writer, struct.pack("!QQ", number, end)))
            os._exit(0)
        finally:
            # Only reached by an exception, which must not go on in a copy of the test run.
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        received = file.read()
    _, status = os.waitpid(pid, 0)
    return status, dict(struct.iter_unpack("!QQ", received))


def check_after_kill(path: str, acknowledged: dict[int, int]) -> list[str]:
    """Returns what is wrong with a journal after a kill, and leaves it closed."""
    journal = open_journal(path)
    wrong = []
    for number, end in acknowledged.items():
        if number not in journal:
            wrong += [f"log {number} is missing"] if end else []
            continue
        log = journal.open(number, ring_bytes=100_000)
        try:
            lost = check_right(log, number)
        except AssertionError as error:
            wrong.append(str(error))
            continue
        if log.damaged or lost or (end and log.end < end):
            wrong.append(f"log {number} ends at {log.end}, acknowledged were {end}, damaged {log.damaged}, lost {lost}")
        log.append(stream(number, log.end, 5_000))
        check_right(log, number)
    for number in list(journal.logs()):
        journal.remove(number)
    if journal.used_bytes:
        wrong.append(f"{journal.used_bytes} bytes are never free again")
    journal.close()
    return wrong


@pytest.mark.parametrize("half", [False, True])
def test_killed_at_each_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    for at in range(1, 500):
        path = str(tmp_path / f"journal{at}")
        status, acknowledged = run_forked(path, dying(at, half, entries_first=False), monkeypatch)
        assert check_after_kill(path, acknowledged) == [], f"killed at write {at}"
        if status == 0:
            break
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        pytest.fail("the scenario never came to its end")
    print(f"killed at each of {at - 1} writes")
    assert at > 50


def test_control_entries_written_before_their_data_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught = 0
    for at in range(1, 500):
        path = str(tmp_path / f"journal{at}")
        status, acknowledged = run_forked(path, dying(at, half=False, entries_first=True), monkeypatch)
        if status == 0:
            break
        caught += bool(check_after_kill(path, acknowledged))
    print(f"the wrong order was caught at {caught} of {at - 1} writes")
    assert caught > 5


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
