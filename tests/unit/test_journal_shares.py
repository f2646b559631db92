"""Owners of logs share the space: nobody can take it all, and what each has is counted right whatever happens."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from sterna.journal import Journal, JournalFullError, Log, MemoryLog, chunks
from sterna.journal.memory import MemoryShares
from sterna.limits import MEMORY_LOGS_KEPT_BYTES, PAGE_BYTES, SHARE_KEPT_BYTES, SHARE_TIMES_FREE
from tests.journal_stream import check_right, read_all, stream

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024
QUOTA = 16 * MIB


def opened(path: Path, quota: int = QUOTA) -> Journal:
    return Journal(str(path / "journal"), quota_bytes=quota, arena_bytes=4 * MIB)


def fill(journal: Journal, owner: str, first: int, count: int, size: int) -> list[Log]:
    """Makes logs that an owner writes as much to as a ring holds, and more; as many as it may have."""
    logs: list[Log] = []
    for number in range(first, first + count):
        try:
            logs.append(journal.create(number, owner=owner))
        except JournalFullError:
            break
        write(logs[-1:], size)
    return logs


def write(logs: list[Log], size: int, step: int = 30_000) -> None:
    for log in logs:
        end = log.end + size
        while log.end < end:
            log.append(stream(log.number, log.end, min(step, end - log.end)))


def taken(logs: list[Log]) -> int:
    return sum(log.stored_bytes for log in logs)


def test_one_owner_leaves_room_for_others(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    greedy = fill(journal, "greedy", 1, 200, 2 * MIB)
    most = QUOTA * SHARE_TIMES_FREE // (SHARE_TIMES_FREE + 1)
    assert most - 2 * MIB <= taken(greedy) <= most + len(greedy) * 2 * SHARE_KEPT_BYTES
    with pytest.raises(JournalFullError, match="close some"):
        journal.create(500, owner="greedy")
    for log in greedy:
        assert log.end - log.tail >= SHARE_KEPT_BYTES
        assert check_right(log, log.number) == []
    free = QUOTA - journal.used_bytes
    assert taken(fill(journal, "modest", 1000, 1, free // 2)) >= free // 2
    journal.close()


def test_control_without_owners_the_first_one_takes_it_all(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    logs = [journal.create(number) for number in range(1, 200)]
    with pytest.raises(JournalFullError):
        write(logs, 2 * MIB)
    with pytest.raises(JournalFullError):
        write([journal.create(1000)], MIB)
    journal.close()


def test_who_has_too_much_comes_down_while_it_goes_on_writing(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    greedy = fill(journal, "greedy", 1, 14, 2 * MIB)
    modest = fill(journal, "modest", 1000, 10, SHARE_KEPT_BYTES)
    assert taken(greedy) > 4 * taken(modest)
    for _ in range(100):
        write(greedy, 50_000)
        write(modest, 50_000)
    assert 0.5 <= taken(greedy) / taken(modest) <= 2
    for log in (*greedy, *modest):
        assert log.end - log.tail >= SHARE_KEPT_BYTES
        assert check_right(log, log.number) == []
    journal.close()


def test_unread_output_goes_too_and_is_named(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    fill(journal, "greedy", 1, 200, 2 * MIB)
    log = journal.open(1)
    tail = log.tail
    log.keep_from(tail)
    write([log], MIB)
    assert log.tail > tail
    journal.close()


@pytest.mark.parametrize("verified", [chunks.VERIFY_BYTES, 0], ids=["when opened", "when read"])
def test_what_owners_have_is_counted_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verified: int) -> None:
    monkeypatch.setattr(chunks, "VERIFY_BYTES", verified)
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    rng = random.Random(seed)
    journal = opened(tmp_path)
    owners: dict[int, str] = {}

    def check() -> None:
        for owner, share in journal._shares.items():
            numbers = [number for number in owners if owners[number] == owner]
            stored = sum(journal.open(number).stored_bytes for number in numbers)  # opening drops what is damaged
            assert share.pages * PAGE_BYTES == stored
        assert journal.used_bytes == sum(share.pages for share in journal._shares.values()) * PAGE_BYTES

    for step in range(600):
        number = rng.randrange(1, 40)
        action = rng.choice(("append", "append", "append", "pack", "release", "remove", "damage", "restart"))
        if number not in owners:
            owner = rng.choice("abc")
            try:
                journal.create(number, owner=owner, ring_bytes=rng.choice((PAGE_BYTES, MIB)))
            except JournalFullError:
                continue
            owners[number] = owner
        log = journal.open(number)
        if action == "append":
            log.append(stream(number, log.end, rng.randrange(1, 200_000)))
        elif action == "pack":
            log.pack()
        elif action == "release":
            log.pack()
            log.release()
        elif action == "remove":
            if rng.random() < 0.5:
                log.release()
            journal.remove(number)
            del owners[number]
        elif action == "damage" and len(log.chunks) > 1:
            chunk = log.chunks[0]
            os.pwrite(chunk.arena.fd, b"\xff" * 64, chunk.page * PAGE_BYTES)
            log.release()
            read_all(journal.open(number))
        elif action == "restart" and rng.random() < 0.1:
            journal.close()
            journal = opened(tmp_path)
            for each, owner in owners.items():
                journal.assign(each, owner)
        if step % 20 == 0:
            check()
    check()
    journal.close()


# ---- in memory -----------------------------------------------------------------------------------------------------


def test_logs_in_memory_have_shares_too() -> None:
    shares = MemoryShares(8 * MIB)
    greedy = [MemoryLog(number, shares=shares, owner="greedy") for number in range(20)]
    for log in greedy * 3:
        for _ in range(20):
            log.append(stream(log.number, log.end, 50_000))
        assert shares.total <= 8 * MIB
    held = shares.held["greedy"]
    assert held == shares.total > 4 * MIB
    for log in greedy:
        assert log.end - log.tail >= MEMORY_LOGS_KEPT_BYTES
        assert check_right(log, log.number) == []
    modest = MemoryLog(100, shares=shares, owner="modest")
    modest.append(stream(100, 0, 300_000))
    assert modest.tail == 0, "there is room left for others"
    for log in (*greedy, modest):
        log.release()
    assert (shares.total, shares.held) == (0, {})


def test_many_logs_in_memory_keep_a_little_each() -> None:
    shares = MemoryShares(MIB)
    logs = [MemoryLog(number, shares=shares, owner="one") for number in range(200)]
    for log in logs * 2:
        log.append(stream(log.number, log.end, 40_000))
    assert shares.total <= MIB + len(logs) * MEMORY_LOGS_KEPT_BYTES
    assert all(log.end - log.tail >= MEMORY_LOGS_KEPT_BYTES for log in logs)
