"""The node's SQLite file: opened or begun afresh, written in short transactions, checkpointed beside the loop.

Nothing on the main connection waits for the disk. In WAL mode a commit is a write to the page cache, which a killed
process does not take with it (sqlite.org/wal.html); only checkpoints sync, and those run on a connection of their own
in a worker thread. `synchronous=NORMAL` would add one sync on the main connection: that of the log's header, whenever
it begins the log anew over old frames. `checkpoint` makes that needless: it alone begins the log anew, by cutting it to
nothing, so that old frames and a new header never meet after a power failure.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from sterna import paths
from sterna.errors import RefusedError, StorageError, UsageError
from sterna.node import schema

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

FILE = "node.db"
LOCK = "node.db.lock"
# Each page that a commit touches is written whole to the log: half of SQLite's usual 4 KiB makes writes a third faster.
PAGE_BYTES = 2048
CACHE_KIB = 8 * 1024
STATEMENTS_MAX = 256
# Only a foreign program (an operator's sqlite3 shell) can make us wait, and then the loop waits with us.
BUSY_MS = 100
# Rounds of one checkpoint, each shorter than the one before, until nothing was written meanwhile.
ROUNDS_MAX = 8
# A log this long is cut; that takes a file system milliseconds, which whoever wants to write just then has to wait.
CUT_BYTES = 16 * 1024 * 1024
# Beyond this a checkpoint holds writers up rather than let the log grow without end.
WAL_MAX_BYTES = 64 * 1024 * 1024

_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_CLOSED_TO_US = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)


class DamagedError(StorageError):
    """The database file is no database, or parts of it are unreadable."""


class Transaction:
    """Makes what happens within a `with` block one commit; blocks may be nested, the outermost one commits.

    An exception that leaves the outermost block takes everything back. One that left an inner block and was caught
    outside does so too, unless it was a RefusedError (those are raised before anything is written).
    """

    __slots__ = ("_database",)

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.begin()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.end(value)


class Database:
    """One SQLite file in a private directory, for one process at a time.

    `damaged` is where an unreadable file was moved to, or None; `on_rollback` is called when a transaction was taken
    back. Raises StorageError if another process has it, a newer version made it, or the disk fails.
    """

    def __init__(self, directory: str) -> None:
        self.directory = paths.private_dir(directory)
        self.path = os.path.join(self.directory, FILE)
        self.damaged: str | None = None
        self.on_rollback: Callable[[], None] = lambda: None
        self.transaction = Transaction(self)
        self._lock = paths.locked(os.path.join(self.directory, LOCK), wait_ms=0)
        self._gate = threading.Lock()
        self._checkpointing = threading.Lock()
        self._commits = 0
        self._copied = 0
        self._depth = 0
        self._doomed = False
        self._closed = False
        self._connections: list[sqlite3.Connection] = []
        self._lock.__enter__()
        try:
            try:
                self._open()
            except DamagedError:
                self._disconnect()
                self.damaged = self._move_aside()
                self._open()
        except BaseException:
            self._disconnect()
            self._lock.__exit__(None, None, None)
            raise

    # ---- opening and closing -----------------------------------------------------------------------------------

    def _open(self) -> None:
        suspect = os.path.exists(self._suspect)
        self._prepare_file()
        try:
            # Opened first and closed last: SQLite's own checkpoint at the last close must be one that syncs.
            self._keeper = self._connect("NORMAL", 256, 0)
            if suspect:
                self._examine(self._keeper)
            self._create(self._keeper)
            self._main = self._connect("OFF", CACHE_KIB, BUSY_MS)
            self._guard = self._connect("OFF", 256, 0)
            self._cut()
        except sqlite3.Error as error:
            self._fail(error)

    def _prepare_file(self) -> None:
        """Makes the file private before SQLite sees it; its companions (-wal, -shm) get the same mode from SQLite."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self.path, flags, 0o600)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                    raise StorageError(f"{self.path} is not a file of this user: move it away.")
                os.fchmod(descriptor, 0o600)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"The database {self.path} cannot be opened: {error.strerror}.") from error

    def _connect(self, synchronous: str, cache_kib: int, busy_ms: int) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=busy_ms / 1000,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=STATEMENTS_MAX,
        )
        self._connections.append(connection)
        # Only heard where the file is new.
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise StorageError(f"The file system of {self.path} does not allow shared memory: choose a local disk.")
        for pragma in (
            f"synchronous={synchronous}", f"cache_size=-{cache_kib}", "wal_autocheckpoint=0", "temp_store=MEMORY",
            "trusted_schema=OFF", "cell_size_check=ON",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        """Makes the tables in a new file; refuses files of newer versions and of other programs."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application == schema.APPLICATION_ID:
            if version != schema.VERSION:
                raise StorageError(
                    f"{self.path} has format {version}, not {schema.VERSION}: use the version of Sterna that made it."
                )
            for statement in schema.ADDED:
                connection.execute(statement)
            return
        if tables or application:
            raise StorageError(f"{self.path} is another program's database: move it away, or choose another directory.")
        connection.execute("BEGIN IMMEDIATE")
        for statement in schema.TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id={schema.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={schema.VERSION}")
        connection.execute("COMMIT")

    @property
    def _suspect(self) -> str:
        return self.path + ".suspect"

    def _examine(self, connection: sqlite3.Connection) -> None:
        """Reads all of a database that was found damaged in an earlier run; raises DamagedError if it is."""
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != ("ok",):
            raise DamagedError(f"The database {self.path} is damaged: {found[0] if found else 'unreadable'}.")
        os.unlink(self._suspect)

    def _move_aside(self) -> str:
        """Renames an unreadable database and what belongs to it; returns its new name."""
        stem = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        name, more = stem, 1
        while os.path.lexists(name):
            more += 1
            name = f"{stem}-{more}"
        try:
            os.rename(self.path, name)
            for tail in ("-wal", "-shm"):
                if os.path.lexists(self.path + tail):
                    os.rename(self.path + tail, name + tail)
            if os.path.lexists(self._suspect):
                os.unlink(self._suspect)
        except OSError as error:
            raise StorageError(f"The damaged database {self.path} cannot be moved aside: {error.strerror}.") from error
        return name

    def _disconnect(self) -> None:
        for connection in reversed(self._connections):
            try:
                connection.close()
            except sqlite3.Error:
                # What cannot be closed cannot be saved either; the file is judged when it is opened next.
                pass
        self._connections.clear()

    def close(self) -> None:
        """Copies the log into the database, syncs and lets go of it; may be called twice."""
        with self._checkpointing, self._gate:
            if self._closed:
                return
            self._closed = True
            self._disconnect()
            self._lock.__exit__(None, None, None)

    def __del__(self) -> None:
        # Collected unclosed, the connections would go in any order, and the last one's checkpoint might not sync.
        if not getattr(self, "_closed", True):
            self._disconnect()

    # ---- reading and writing -----------------------------------------------------------------------------------

    def one(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        """Returns the first row, or None."""
        try:
            return self._main.execute(sql, values).fetchone()
        except (sqlite3.Error, OverflowError, UnicodeError) as error:
            self._fail(error)

    def all(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """Returns all rows."""
        try:
            return self._main.execute(sql, values).fetchall()
        except (sqlite3.Error, OverflowError, UnicodeError) as error:
            self._fail(error)

    def write(self, sql: str, values: tuple[Any, ...] = ()) -> int:
        """Does one statement, outside a transaction with a commit of its own; returns how many rows it touched."""
        if self._depth:
            return self._execute(sql, values).rowcount
        with self._gate:
            count = self._execute(sql, values).rowcount
            self._commits += 1
        return count

    def insert(self, sql: str, values: tuple[Any, ...]) -> int:
        """Does one INSERT as `write` does; returns the new row's number."""
        if self._depth:
            return self._execute(sql, values).lastrowid or 0
        with self._gate:
            number = self._execute(sql, values).lastrowid or 0
            self._commits += 1
        return number

    def _execute(self, sql: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        if self._doomed:
            raise StorageError(f"An earlier write to {self.path} failed: nothing of this transaction is kept.")
        try:
            return self._main.execute(sql, values)
        except (sqlite3.Error, OverflowError, UnicodeError) as error:
            # SQLite may have taken the transaction back already; what followed would be commits of their own.
            self._doomed = self._depth > 0
            self._fail(error)

    def begin(self) -> None:
        """Begins a transaction, or goes one level deeper in the one that is open."""
        if self._depth == 0:
            self._gate.acquire()
            try:
                self._execute("BEGIN IMMEDIATE", ())
            except BaseException:
                self._gate.release()
                raise
        self._depth += 1

    def end(self, error: BaseException | None) -> None:
        """Goes one level up; at the top commits, or takes everything back if `error` or an earlier one says so."""
        if error is not None and not isinstance(error, RefusedError):
            self._doomed = True
        if self._depth > 1:
            self._depth -= 1
            return
        try:
            if error is None:
                self._execute("COMMIT", ())
                self._commits += 1
        except BaseException:
            self._rollback()
            raise
        else:
            if error is not None:
                self._rollback()
        finally:
            self._depth = 0
            self._doomed = False
            self._gate.release()

    def _rollback(self) -> None:
        try:
            # SQLite has done so itself after some errors (sqlite.org/lang_transaction.html, section 2.3).
            if self._main.in_transaction:
                self._main.execute("ROLLBACK")
        except sqlite3.Error as error:
            self._fail(error)
        finally:
            self.on_rollback()

    def _fail(self, error: Exception) -> NoReturn:
        fault = self._fault(error)
        if fault is error:
            raise error
        raise fault from error

    def _fault(self, error: Exception) -> Exception:
        """Returns what to raise for an error of sqlite3: a StorageError or UsageError of one sentence."""
        if isinstance(error, OverflowError | UnicodeError):
            return UsageError("A number or text does not fit into the database: use whole characters and 63 bits.")
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:
            return StorageError(f"The database {self.path} is closed.") if self._closed else error
        plain = code & 0xFF
        if code in _FULL or plain in _FULL:
            return StorageError(f"The disk with {self.path} is full: free some space; what was to be stored was not.")
        if plain in _BUSY:
            return StorageError(f"Another program holds {self.path}: end it and try again.")
        if plain in _DAMAGED:
            self._mark_suspect()
            return DamagedError(f"The database {self.path} is damaged: restart the node, which moves it aside.")
        if plain in _CLOSED_TO_US:
            return StorageError(f"The database {self.path} cannot be written: check owner and mode of its directory.")
        if plain == sqlite3.SQLITE_IOERR:
            return StorageError(f"The disk with {self.path} failed ({error}): check it.")
        return error

    def _mark_suspect(self) -> None:
        """Leaves a note for the next start to read all of the database, which is too slow to do every time."""
        try:
            os.close(os.open(self._suspect, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError:
            # The disk is in a bad way; what is damaged shows again.
            pass

    # ---- the log -----------------------------------------------------------------------------------------------

    def wal_bytes(self) -> int:
        """Returns how long the write-ahead log is, in bytes; the more, the longer the next start takes."""
        try:
            return os.stat(self.path + "-wal").st_size
        except OSError:
            return 0

    def checkpoint(self) -> bool:
        """Copies the log into the database, syncs both, and cuts the log if it is long; for a worker thread: it waits.

        Returns False if what was written meanwhile is not copied yet. Raises StorageError.
        """
        with self._checkpointing:
            if self._closed:
                return False
            try:
                for _ in range(ROUNDS_MAX):
                    if self._round():
                        return True
                if self.wal_bytes() > WAL_MAX_BYTES:
                    with self._gate:
                        return self._cut()
            except sqlite3.Error as error:
                self._fail(error)
            return False

    def _round(self) -> bool:
        """Copies what the log holds now; True if nothing was written meanwhile.

        The main connection must not begin a fully copied log anew: a reader at its end (the guard) prevents that while
        this lasts, and afterwards a frame that is not copied.
        """
        try:
            with self._gate:
                if self._commits == self._copied:
                    return True
                self._guard.execute("BEGIN")
                self._guard.execute("SELECT count(*) FROM meta WHERE key = ''").fetchone()
                commits = self._commits
            _busy, frames, copied = self._keeper.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            with self._gate:
                if commits != self._commits or copied < frames:
                    return False
                self._copied = commits
                if self.wal_bytes() < CUT_BYTES:
                    self._leave_frame()
                    return True
                self._guard.execute("COMMIT")
                return self._cut()
        finally:
            if self._guard.in_transaction:
                self._guard.execute("ROLLBACK")

    def _cut(self) -> bool:
        """Copies what is left of the log and cuts it; the caller holds writers off."""
        (busy, _frames, _copied) = self._keeper.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            # A foreign reader is in the way.
            self._leave_frame()
        return not busy

    def _leave_frame(self) -> None:
        """Writes something of no meaning, so that the log holds a frame that is not copied."""
        self._keeper.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('frame', ?)", (str(time.time_ns()),))
