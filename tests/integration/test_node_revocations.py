"""Revocations on real files: what they outlive, and that none is half done."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from typing import TYPE_CHECKING, Any

import pytest

from sterna import limits, paths
from sterna.errors import Code, RefusedError, StorageError, TrustError
from sterna.ids import DeviceId
from sterna.node.database import PAGE_BYTES
from sterna.node.revocations import FILE
from sterna.node.store import Store
from sterna.units import SECOND

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_700_000_000 * SECOND
KEY = b"\x01" + bytes(32)
LOST, KEPT = DeviceId(b"l" * 32), DeviceId(b"k" * 32)
TOKEN = "0123456789abcdef" * 2


@pytest.fixture(name="state")
def _state(tmp_path: Path) -> str:
    """A node's state in which a token and a device of `ada` are revoked, and another device is not."""
    directory = str(tmp_path / "state")
    db = Store(directory)
    for device in (LOST, KEPT):
        db.put_device(device, KEY, "ada", "laptop", NOW)
    db.revoke_token(TOKEN)
    assert db.revoke_device("ada", LOST)
    db.close()
    return directory


def code(action: Any) -> Code:
    with pytest.raises(RefusedError) as caught:
        action()
    return caught.value.code


def still_refused(state: str) -> Store:
    """Opens the store, which refuses what was revoked, and nothing else; for the caller to close."""
    db = Store(state)
    assert db.revoked_tokens() == {TOKEN}
    assert code(lambda: db.put_device(LOST, KEY, "ada", "laptop", NOW)) is Code.REVOKED
    db.put_device(LOST, KEY, "bob", "laptop", NOW)
    db.put_device(KEPT, KEY, "ada", "laptop", NOW)
    found = db.device(LOST, "ada")
    assert found is not None
    assert found.revoked
    return db


def damage(state: str, table: str = "") -> None:
    """Overwrites the database, or only the first page of one of its tables."""
    path = os.path.join(state, "node.db")
    start, size = 0, os.path.getsize(path)
    if table:
        connection = sqlite3.connect(path)
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        connection.close()
        start, size = (page - 1) * PAGE_BYTES, PAGE_BYTES
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * size)


@pytest.mark.parametrize("table", ["", "devices", "revoked_tokens"])
def test_they_outlive_a_damaged_database(state: str, table: str) -> None:
    damage(state, table)
    db = still_refused(state)
    assert db.damaged is not None
    assert db.revoke_device("ada", LOST), "it is known"
    db.close()
    os.unlink(os.path.join(state, FILE))
    damage(state, table)
    db = Store(state)
    assert db.revoked_tokens() == frozenset(), "control: without the file they would be forgotten"
    db.close()


def test_they_outlive_commits_that_a_power_failure_took(state: str) -> None:
    connection = sqlite3.connect(os.path.join(state, "node.db"))
    connection.execute("DELETE FROM revoked_tokens")
    connection.execute("UPDATE devices SET revoked = 0")
    connection.commit()
    connection.close()
    db = still_refused(state)
    assert (db.damaged, len(db.devices("ada"))) == (None, 2)
    db.close()


def test_what_only_the_database_knows_comes_into_the_file(state: str) -> None:
    os.unlink(os.path.join(state, FILE))
    still_refused(state).close()
    damage(state)
    still_refused(state).close()


def test_each_one_is_synced_before_it_returns(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.path.join(state, FILE)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    db, synced = Store(state), list[int]()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    assert db.revoke_device("ada", KEPT)
    db.revoke_token("f" * 32)
    assert synced[-1] == os.path.getsize(path)
    assert len(synced) == 2
    db.revoke_token("f" * 32)
    assert len(synced) == 2, "what is revoked already costs nothing"
    db.close()


def test_a_new_files_name_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, synced = str(tmp_path / "state"), list[str]()
    db, real = Store(state), os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    for token in (TOKEN, "f" * 32):
        db.revoke_token(token)
    db.close()
    path = os.path.join(state, FILE)
    assert synced == [path, state, path]
    os.unlink(path)
    Store(state).close()
    assert synced[3].startswith(os.path.join(state, f".{FILE}."))
    assert synced[4:] == [state], "written anew, it is as sure"


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(state: str, cut: int) -> None:
    path = os.path.join(state, FILE)
    db = Store(state)
    whole = os.path.getsize(path)
    db.revoke_token("e" * 32)
    db.close()
    os.truncate(path, os.path.getsize(path) - cut)
    damage(state)
    db = still_refused(state)
    assert os.path.getsize(path) == whole, "what was torn is gone"
    db.revoke_token("d" * 32)
    db.close()
    damage(state)
    db = Store(state)
    assert db.revoked_tokens() == {TOKEN, "d" * 32}
    db.close()


def test_damaged_lines_are_named_and_the_others_hold(state: str, caplog: pytest.LogCaptureFixture) -> None:
    path = os.path.join(state, FILE)
    with open(path, "r+b") as file:
        lines = file.read().splitlines(keepends=True)
        file.seek(0)
        file.write(b"\0" * 30 + b"\n" + b"".join(line.replace(b"token 0", b"token 1") + b"\n" for line in lines))
    damage(state)
    with caplog.at_level(logging.ERROR):
        db = Store(state)
    assert [record.__dict__["lines"] for record in caplog.records if "damaged" in record.message] == [2]
    assert code(lambda: db.put_device(LOST, KEY, "ada", "laptop", NOW)) is Code.REVOKED
    assert db.revoked_tokens() == frozenset()
    db.close()


@pytest.mark.parametrize("written", [0, 20], ids=["nothing fits", "a part fits"])
def test_one_that_does_not_fit_is_refused_and_not_half_done(
    state: str, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    db, path = Store(state), os.path.join(state, FILE)
    before = os.path.getsize(path)
    real = os.write

    def full(descriptor: int, data: Any) -> int:
        if written and len(data) > 40:
            return real(descriptor, bytes(data[:written]))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        for action in (lambda: db.revoke_device("ada", KEPT), lambda: db.revoke_token("c" * 32)):
            with pytest.raises(StorageError, match="cannot be revoked"):
                action()
    assert os.path.getsize(path) == before
    db.put_device(KEPT, KEY, "ada", "laptop", NOW)
    db.close()
    db = still_refused(state)
    assert db.revoke_device("ada", KEPT), "there is room again"
    assert code(lambda: db.put_device(KEPT, KEY, "ada", "laptop", NOW)) is Code.REVOKED
    db.close()


def broken_off(descriptor: int, data: Any) -> int:
    """Writes a part, and then no more."""
    if len(data) <= 40:
        raise OSError(28, "No space left on device")
    return os.pwrite(descriptor, bytes(data[:20]), 0)  # which appends, as the file was opened for that


def fails(*_args: object, **_more: object) -> None:
    raise StorageError("full")


@pytest.mark.parametrize("torn", ["by a failure that is read", "by a write"])
@pytest.mark.parametrize("taken_back", [False, True])
def test_what_follows_a_torn_line_that_stays_is_whole(
    state: str, monkeypatch: pytest.MonkeyPatch, torn: str, taken_back: bool
) -> None:
    """Where the disk takes neither the file anew nor its old end."""
    path = os.path.join(state, FILE)
    if torn == "by a write":
        db = Store(state)
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", broken_off)
            patched.setattr(os, "ftruncate", lambda *_: broken_off(0, b""))
            with pytest.raises(StorageError, match="cannot be revoked"):
                db.revoke_token("e" * 32)
    else:
        with open(path, "ab") as file:
            file.write(b"01234567 token eee")
        with monkeypatch.context() as patched:
            patched.setattr(paths, "atomic_write", fails)
            db = Store(state)
    with open(path, "rb") as file:
        assert file.read()[-1:] != b"\n", "control: it is torn"
    if taken_back:
        with monkeypatch.context() as patched:
            patched.setattr(db._db, "write", fails)
            with pytest.raises(StorageError, match="full"):
                db.revoke_token("d" * 32)
    for letter in "cb":
        db.revoke_token(letter * 32)
    db.close()
    with open(path, "rb") as file:
        assert b"\n\n" not in file.read()
    damage(state)
    db = Store(state)
    assert db.revoked_tokens() == {TOKEN, "c" * 32, "b" * 32}
    db.close()


def test_one_that_the_database_cannot_store_is_taken_back(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    db, path = Store(state), os.path.join(state, FILE)
    before = os.path.getsize(path)
    with monkeypatch.context() as patched:
        patched.setattr(db._db, "write", lambda *_: (_ for _ in ()).throw(StorageError("full")))
        for action in (lambda: db.revoke_device("ada", KEPT), lambda: db.revoke_token("c" * 32)):
            with pytest.raises(StorageError, match="full"):
                action()
    assert os.path.getsize(path) == before
    db.close()
    damage(state)
    still_refused(state).close()


def test_a_file_open_to_others_or_unreadable_stops_the_node(state: str) -> None:
    path = os.path.join(state, FILE)
    os.chmod(path, 0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        Store(state)
    os.chmod(path, 0o600)
    still_refused(state).close()


def test_there_are_bounds(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    db = Store(state)
    monkeypatch.setattr(limits, "REVOKED_DEVICES_PER_TENANT_MAX", 1)
    assert code(lambda: db.revoke_device("ada", KEPT)) is Code.LIMIT
    db.put_device(LOST, KEY, "bob", "laptop", NOW)
    assert db.revoke_device("bob", LOST), "another tenant's are not counted"
    monkeypatch.setattr(limits, "REVOCATIONS_MAX", 3)
    assert code(lambda: db.revoke_token("c" * 32)) is Code.LIMIT
    db.close()
