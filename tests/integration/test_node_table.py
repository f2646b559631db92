"""The node's table of sessions over real files: whose output is whose, and what the disk does not hold."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from sterna import limits
from sterna.errors import Code, StorageError
from sterna.ids import DeviceId, SessionUid
from sterna.journal import Journal, JournalFullError, MemoryLog
from sterna.node.store import Store
from sterna.node.table import SessionTable
from sterna.protocol.attachment import Ended
from sterna.protocol.messages import Snapshot
from sterna.protocol.session import Session
from sterna.protocol.states import Cause, State
from sterna.units import SECOND

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOW = 1_700_000_000 * SECOND
MINE = DeviceId(b"m" * 32)


@contextmanager
def opened(directory: Path, **more: Any) -> Iterator[SessionTable]:
    """A table of sessions as a node's start makes it."""
    journal, store = Journal(str(directory / "journal"), **more), Store(str(directory))
    table = SessionTable(store, journal, boot="boot")
    table.claim_logs()
    yield table
    store.close()
    journal.close()


def begin(table: SessionTable, tenant: str = "ada", name: str | None = None) -> Session:
    row = table.store.create_session(
        uid=SessionUid(os.urandom(16)), log_id=1, tenant=tenant, agent="bash", name=name, kind="pty", owner=MINE,
        now=NOW,
    )  # fmt: skip
    session = table.load(row.number)
    assert session is not None
    return session


def test_no_session_finds_the_output_of_one_that_a_damaged_database_forgot(tmp_path: Path) -> None:
    with opened(tmp_path) as table:
        first, closed = begin(table), begin(table)
        first.log.append(b"secret")
        table.store.close_session(closed.id, NOW)
    with opened(tmp_path) as table:
        assert list(table.journal.logs()) == [first.id], "the log of a closed session goes, if a kill left it"
        again = table.load(first.id)
        assert again is not None
        assert again.log.read(0, 100) == b"secret"
    (tmp_path / "node.db").write_bytes(b"\xff" * 10_000)
    with opened(tmp_path) as table:
        assert table.store.damaged is not None
        other = begin(table, "bob")
        assert (other.id, other.log.end) == (first.id, 0)


# ---- what one tenant leaves to the others --------------------------------------------------------------------------


def fill(table: SessionTable, tenant: str) -> NoReturn:
    while True:
        log = begin(table, tenant).log
        for _ in range(64):
            log.append(bytes(32 * 1024))


def test_a_tenant_that_fills_the_journal_keeps_nobody_else_out(tmp_path: Path) -> None:
    quota = {"quota_bytes": 8 * 1024 * 1024, "arena_bytes": 1024 * 1024}
    with opened(tmp_path, **quota) as table:
        with pytest.raises(JournalFullError, match="close some"):
            fill(table, "greedy")
        begin(table, "modest").log.append(bytes(32 * 1024))
    with opened(tmp_path, **quota) as table:
        with pytest.raises(JournalFullError):
            begin(table, "greedy")
        begin(table, "late").log.append(bytes(32 * 1024))


def test_logs_in_memory_are_counted_for_their_tenants_and_forgotten_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as table:
        table._memory.most = 1024 * 1024
        logs: list[MemoryLog] = []
        sessions = [begin(table, "greedy") for _ in range(8)]
        for session in sessions:
            assert session.spare is not None
            session.log.append(bytes(100_000))
            session.log = session.spare(session.log)
            assert isinstance(session.log, MemoryLog)
            logs.append(session.log)
        for log in logs:
            for _ in range(20):
                log.append(bytes(32 * 1024))
        assert table._memory.held["greedy"] == table._memory.total <= 1024 * 1024
        other = begin(table, "modest")
        monkeypatch.setattr(table.journal, "create", lambda *_, **__: (_ for _ in ()).throw(StorageError("full")))
        table._new_log(other, 0)
        other.log.append(bytes(50_000))
        assert table._memory.held["modest"] == 50_000
        for session in sessions:
            session.close(Cause.CLOSE, NOW)
            table.settle(session)
        table.discard(other.id)
        assert table._memory.total == 0


def part(session: Session, data: bytes, number: int = 0) -> None:
    """What a pod sends of a last screen."""
    session.pod_snapshot(Snapshot(0, number, False, False, data), 0)


def end(table: SessionTable, session: Session) -> None:
    session.state = State.SUSPENDED
    session.finish(Ended(Code.ENDED, "The program ended.", 0), Cause.EXIT, 0)
    table.settle(session)


def test_last_screens_in_memory_are_bounded_for_each_tenant_and_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FINALS_LOADED_PER_TENANT_MAX_BYTES", 1_000)
    with opened(tmp_path) as table:
        victim = begin(table, "modest")
        part(victim, b"v" * 900)
        table.collected(victim)
        sessions = [begin(table, "greedy") for _ in range(20)]
        for session in sessions:
            part(session, b"s" * 300)
            table.collected(session)
            assert sum(len(each.final) for each in sessions) <= 1_000
        assert [len(session.final) for session in sessions[-3:]] == [300] * 3
        for session in sessions[:4]:
            part(session, b"e" * 300)
            end(table, session)
            assert sum(len(each.final) for each in sessions) <= 1_000
        assert sessions[0].final == b""
        for session in sessions[:4]:
            again = table.load(session.id)
            assert again is session
            assert again.final == b"e" * 300, "it was stored"
            assert sum(len(each.final) for each in sessions) <= 1_000
        assert victim.final == b"v" * 900
        for session in sessions:
            table._drop(session)
        assert set(table._finals._held) == {"modest"}


def test_a_pod_that_never_ends_last_screens_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FINALS_LOADED_PER_TENANT_MAX_BYTES", 1_000)
    with opened(tmp_path) as table:
        session = begin(table)
        for number in range(5):
            part(session, b"s" * 300, number)
            table.collected(session)
        assert len(session.final) == 0, "one that is too large is let go as a whole"
