"""The node's store against what happens to files: kill -9, a full disk, damage, other programs, checkpoints."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from sterna.errors import StorageError
from sterna.ids import AttachmentId, DeviceId, SessionUid
from sterna.node import database
from sterna.node.store import SessionRow, Store
from sterna.units import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOW = 1_700_000_000 * SECOND
MINE = DeviceId(b"m" * 32)
KEY = b"\x01" + bytes(32)
ATTACHMENT = AttachmentId(b"a" * 16)
DISK_BYTES = 4 * 1024 * 1024

# Writes rows as fast as it can and says which after each commit; checkpoints run beside it, as in the node.
WRITER = """
import os, sys, threading
from sterna.node import database
from sterna.node.store import Store

database.CUT_BYTES = 64 * 1024
store = Store(sys.argv[1])
start = int(sys.argv[2])

def checkpoints():
    while True:
        store.checkpoint()

threading.Thread(target=checkpoints, daemon=True).start()
for i in range(start, start + 1_000_000):
    with store.transaction():
        row = store.create_session(
            uid=i.to_bytes(16, "big"), log_id=i, tenant="t%d" % i, agent="bash", name=None, kind="pty", owner=b"m" * 32,
            now=i,
        )
        store.set_meta("created", str(i))
    store.spend_counter(b"a" * 16, i, b"r" * 16)
    if i % 3 == 0:
        store.set_end(row.number, 34, "over", i % 200, None, b"lanes", i)
    os.write(1, b"%d\\n" % i)
"""


@pytest.fixture(name="db")
def _db(tmp_path: Path) -> Iterator[Store]:
    opened = Store(str(tmp_path / "state"))
    yield opened
    opened.close()


def again(db: Store) -> Store:
    db.close()
    return Store(os.path.dirname(db.path))


def make(db: Store, **more: Any) -> SessionRow:
    values: dict[str, Any] = {"tenant": "ada", "agent": "bash", "name": None, "kind": "pty", "owner": MINE, "now": NOW}
    return db.create_session(uid=SessionUid(os.urandom(16)), log_id=1, **{**values, **more})


# ---- kill -9 -------------------------------------------------------------------------------------------------------


def written_until_killed(directory: str, start: int, after: int) -> int:
    """Runs the writer, kills it with SIGKILL once it told of `after` rows; returns the last number it told."""
    source = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(database.__file__))))
    command = [sys.executable, "-c", WRITER, directory, str(start)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": source})
    assert process.stdout is not None
    try:
        said = [process.stdout.readline() for _ in range(after)]
    finally:
        process.kill()
    # What it said between that and its death counts as well; a torn last line does not.
    rest = process.stdout.read()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return int((b"".join(said) + rest[: rest.rfind(b"\n") + 1]).split()[-1])


def test_what_was_acknowledged_before_kill_9_is_there(tmp_path: Path) -> None:
    directory = str(tmp_path / "state")
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    db = Store(directory)
    setup = make(db)
    db.put_device(MINE, KEY, "ada", "", NOW)
    db.add_attachment(ATTACHMENT, setup.number, MINE, "drive", False, NOW)
    db.close()
    start, first = 1, 1
    for _ in range(6):
        last = written_until_killed(directory, start, chance.randrange(1, 800))
        db = Store(directory)
        assert db.damaged is None
        for i in range(first, last + 1):
            row = db.session_by_uid(SessionUid(i.to_bytes(16, "big")))
            if row is None:
                # Numbers between two runs were never written.
                assert i not in range(start, last + 1), i
                continue
            assert (row.log_id, row.tenant) == (i, f"t{i}")
            if i % 3 == 0 and i in range(start, last + 1):
                assert (row.status, db.lanes(row.number)) == (i % 200, b"lanes")
        attachment = db.attachment(ATTACHMENT)
        assert attachment is not None
        assert attachment.counter >= last
        # A row and the note of it are one transaction: both or neither, for the one under way too.
        newest = int(db.meta("created") or 0)
        assert newest >= last
        assert db.session_by_uid(SessionUid(newest.to_bytes(16, "big"))) is not None
        assert db.session_by_uid(SessionUid((newest + 1).to_bytes(16, "big"))) is None
        with sqlite3.connect(db.path) as check:
            assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        check.close()
        assert db.count() == len(set(db_numbers(db)))
        db.close()
        start = newest + 1_000


def db_numbers(db: Store) -> Iterator[int]:
    after = 0
    while batch := db.sessions(None, None, after, 1_000):
        after = batch[-1].number
        yield from (row.number for row in batch)


# ---- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system to fill it")
    path = tmp_path / "disk"
    path.mkdir(mode=0o700)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode(errors='replace').strip()}")
    yield str(path)
    # Lazily: a failed test may have left its files open.
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def until_full(action: Callable[[int], Any]) -> list[Any]:
    """Does something until the disk is full; returns what it gave until then."""
    done: list[Any] = []
    try:
        while len(done) < 100_000:
            done.append(action(len(done)))
    except StorageError as error:
        assert "is full: free some space" in str(error)  # noqa: PT017 - the list is wanted as well as the error
        return done
    raise AssertionError("the disk never filled up")


def test_a_full_disk_is_a_clear_error_and_no_loss(small_disk: str) -> None:
    db = Store(os.path.join(small_disk, "state"))
    filler = os.path.join(small_disk, "filler")
    kept = [make(db, cwd="/x" * 500).number for _ in range(50)]
    with open(filler, "wb") as file:
        file.write(bytes(DISK_BYTES // 2))
    more = until_full(lambda _i: make(db, cwd="/x" * 500).number)
    assert len(more) > 10
    kept += more
    until_full(lambda i: db.touch(kept[0], NOW + i))
    until_full(lambda i: db.set_final(kept[0], bytes([i % 256]) * 500_000))

    def many() -> None:
        with db.transaction():
            until_full(lambda _i: make(db, cwd="/y" * 500))

    with pytest.raises(StorageError, match="nothing of this transaction"):
        many()
    assert [row.number for row in db.sessions(None, None, 0, 1_000)] == kept[:1_000], "reading goes on"
    assert db.count() == len(kept)
    os.unlink(filler)
    later = make(db).number
    db.checkpoint()
    db = again(db)
    assert (db.damaged, db.count()) == (None, len(kept) + 1)
    assert [row.number for row in db.sessions(None, None, 0, 1_000)] == [*kept, later][:1_000]
    db.close()


def test_a_disk_that_is_full_from_the_start_is_a_clear_error(small_disk: str) -> None:
    state = os.path.join(small_disk, "state")
    os.mkdir(state, 0o700)
    filler = os.path.join(small_disk, "filler")
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize)
    with pytest.raises(StorageError):
        Store(state)
    os.unlink(filler)
    db = Store(state)
    assert db.damaged is None
    make(db)
    db.close()


# ---- the file ------------------------------------------------------------------------------------------------------


def test_the_files_are_private_and_for_one_process(db: Store) -> None:
    make(db)
    directory = os.path.dirname(db.path)
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    names = os.listdir(directory)
    assert {"node.db", "node.db-wal", "node.db-shm"} <= set(names)
    assert {stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode) for name in names} == {0o600}
    with pytest.raises(StorageError, match="Another process"):
        Store(directory)
    db.close()
    db.close()
    with pytest.raises(StorageError, match="closed"):
        db.session(1)
    assert not db.checkpoint()


def test_a_database_of_another_program_or_version_is_refused_and_left_alone(db: Store) -> None:
    directory, path = os.path.dirname(db.path), db.path
    db.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StorageError, match="format 99"):
        Store(directory)
    os.unlink(path)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE things (name)")
    connection.close()
    with pytest.raises(StorageError, match="another program"):
        Store(directory)
    os.unlink(path)
    os.symlink("/dev/null", path)
    with pytest.raises(StorageError):
        Store(directory)
    assert not [name for name in os.listdir(directory) if "damaged" in name]


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 1000, b"SQLite format 3\0" + b"\xff" * 5000], ids=["text", "torn"]
)
def test_a_corrupt_file_is_moved_aside_and_a_fresh_one_begun(db: Store, content: bytes) -> None:
    make(db)
    directory = os.path.dirname(db.path)
    db.close()
    with open(db.path, "wb") as file:
        file.write(content)
    for _ in range(2):
        db = Store(directory)
        assert db.damaged is not None
        assert re.search(r"\.damaged-\d{8}T\d{6}Z(-\d+)?$", db.damaged)
        with open(db.damaged, "rb") as file:
            assert file.read() == content
        assert db.sessions() == []
        number = make(db).number
        db = again(db)
        assert db.damaged is None
        assert db.session(number) is not None
        db.close()
        with open(db.path, "wb") as file:
            file.write(content)
    assert len([name for name in os.listdir(directory) if "damaged" in name and name.startswith("node.db")]) == 2


def test_damage_found_while_running_is_named_and_leads_to_a_fresh_start(db: Store) -> None:
    for _ in range(2_000):
        make(db)
    directory = os.path.dirname(db.path)
    db.close()
    size = os.path.getsize(db.path)
    with open(db.path, "r+b") as file:
        # The first pages hold the schema, which would show at once.
        file.seek(size // 4)
        file.write(os.urandom(size // 2))
    db = Store(directory)
    assert db.damaged is None, "reading all of it at each start would take too long"
    with pytest.raises(StorageError, match="damaged: restart"):
        [db.session(number) for number in range(1, 2_000)]  # one page of noise may look like an empty one
    db = again(db)
    assert db.damaged is not None
    assert db.sessions() == []
    db = again(db)
    assert db.damaged is None
    db.close()


def test_a_suspicion_that_proves_wrong_costs_nothing(db: Store) -> None:
    number = make(db).number
    with open(db.path + ".suspect", "wb"):
        pass
    db = again(db)
    assert (db.damaged, os.path.exists(db.path + ".suspect")) == (None, False)
    assert db.session(number) is not None
    db.close()


def test_a_file_locked_by_another_program_is_a_clear_error_and_no_hang(db: Store) -> None:
    number = make(db).number
    connection = sqlite3.connect(db.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(StorageError, match="Another program holds"):
        db.touch(number, NOW)
    assert time.monotonic() - started < 5
    assert db.session(number) is not None, "reading goes on"
    connection.execute("ROLLBACK")
    connection.close()
    db.touch(number, NOW + 1)


def test_checkpoints_bring_everything_into_the_file_while_writing_goes_on(
    db: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CUT_BYTES", 256 * 1024)
    numbers = [make(db).number for _ in range(50)]
    done = threading.Event()
    results: list[bool] = []
    cut: list[int] = []

    def work() -> None:
        while not done.is_set():
            results.append(db.checkpoint())
            cut.append(db.wal_bytes())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for i in range(3_000):
            db.set_size(numbers[i % 50], i, i)
            if i % 100 == 0:
                # Nothing is written until a checkpoint has come to its end, however slow the disk is.
                seen = len(results)
                while thread.is_alive() and not any(results[seen:]):
                    time.sleep(0.001)
    finally:
        done.set()
        thread.join()
    assert any(results)
    assert 0 in cut, "a long log is cut"
    assert db.checkpoint()
    # immutable: SQLite looks at the database file alone, as if the log had been lost.
    alone = sqlite3.connect(f"file:{db.path}?immutable=1", uri=True)
    sizes = dict(alone.execute("SELECT number, cols FROM sessions").fetchall())
    assert alone.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    alone.close()
    assert sizes == {numbers[i % 50]: i for i in range(2_950, 3_000)}


def test_the_main_connection_never_begins_the_log_anew(db: Store) -> None:
    """Else a power failure could mix old frames with a header that was never synced (database.py)."""
    number = make(db).number
    for i in range(20):
        with open(db.path + "-wal", "rb") as file:
            header = file.read(32)
        db.touch(number, NOW + i)
        assert db.checkpoint()
        db.touch(number, NOW + i)
        with open(db.path + "-wal", "rb") as file:
            assert file.read(32) == header, "the salts in the header change when the log begins anew"


def test_a_foreign_reader_only_delays_the_cut(db: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "CUT_BYTES", 0)
    number = make(db).number
    reader = sqlite3.connect(db.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM sessions").fetchall()
    db.touch(number, NOW + 1)
    assert not db.checkpoint()
    with open(db.path + "-wal", "rb") as file:
        header = file.read(32)
    db.touch(number, NOW + 2)
    with open(db.path + "-wal", "rb") as file:
        assert file.read(32) == header
    reader.execute("COMMIT")
    reader.close()
    assert db.checkpoint()
    assert db.wal_bytes() == 0
