"""What the node remembers across its own death: sessions, devices, attachments, tickets (docs/protocol.md, section 4).

Every call is short and made on the event loop; once it returns, the change outlives `kill -9`. Session bytes are not
here but in the journal. Times are Unix nanoseconds, passed in. An unknown number or id changes nothing and is no error.
In the SQL, phase 2 is living, 1 exited, 0 closed (sterna.node.schema).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import msgspec

from sterna import limits
from sterna.errors import Code, RefusedError, StorageError
from sterna.ids import AttachmentId, DeviceId, LogId, SessionUid, check_name, clean_label
from sterna.node.database import DamagedError, Database, Transaction
from sterna.node.revocations import Revocations, device_line, token_line
from sterna.node.schema import (
    CLOSED_PHASE,
    LIVING_PHASE,
    PHASES,
    SELECT_ATTACHMENT,
    SELECT_DEVICE,
    SELECT_SESSION,
    AttachmentRow,
    DeviceRow,
    RequestRow,
    SessionRow,
    TicketRow,
    attachment_row,
    complete,
    device_row,
    session_row,
)
from sterna.node.tickets import BATCH_MAX, END_ISSUED, SWEEP_ROWS, Tickets
from sterna.protocol.states import State
from sterna.units import SECOND

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sterna.protocol.messages import Kind, Mode

__all__ = ["AttachmentRow", "DeviceRow", "RequestRow", "SessionRow", "Store", "TicketRow"]

TOMBSTONES_PER_TENANT_MAX = limits.SESSIONS_PER_TENANT_MAX
DEVICES_PER_TENANT_MAX = 4_096
REQUESTS_MAX = 100_000
REVOKED_TOKENS_MAX = 10_000
SEEN_EVERY_SECONDS = 60
NAME_MAX_CHARS = 63
REVOKED_TEXT = (
    "This device was revoked: remove its key (of a terminal the file client/device.key in its state directory; a "
    "browser's page offers to forget it), then ask for access anew."
)
# Room for "-" and the largest number a tenant can need.
_SUFFIX_CHARS = 1 + len(str(limits.SESSIONS_PER_TENANT_MAX * 2))
_REQUEST_MEMORY = limits.REQUEST_MEMORY_SECONDS * SECOND

_FINALS = " FROM sessions s JOIN ends e ON e.session = s.number "
_TENANTS = "SELECT number, tenant FROM sessions WHERE phase > 0"

_encode = msgspec.msgpack.Encoder().encode


class Store(Tickets):
    """The node's memory in the directory `directory` (made 0700), for one process at a time.

    `damaged` is where an unreadable database was moved to at the start, or None. All methods may raise StorageError.
    """

    def __init__(self, directory: str) -> None:
        self._counts: dict[str, list[int]] | None = None
        self._requests = -1
        self._finals: dict[str, int] = {}
        self._revoked: frozenset[str] | None = None
        try:
            self._open(directory)
        except DamagedError:
            self._open(directory)  # which examines all of it, and moves it aside

    def _open(self, directory: str) -> None:
        self._db = Database(directory)
        try:
            self._db.on_rollback = self._forget_counts
            complete(self._db)
            self._revocations = Revocations(self._db.directory)
            self._join_revocations()
        except BaseException:
            self._db.close()
            raise

    @property
    def path(self) -> str:
        """The database file."""
        return self._db.path

    @property
    def damaged(self) -> str | None:
        """Where an unreadable database was moved to when this store was opened, or None."""
        return self._db.damaged

    def close(self) -> None:
        """Syncs and closes the database; may be called twice."""
        self._db.close()

    def transaction(self) -> Transaction:
        """Returns a `with` block that makes all calls within it one commit, or none if an exception leaves it."""
        return self._db.transaction

    def wal_bytes(self) -> int:
        """Returns how much has been written since the last checkpoint, in bytes; at some 4 MiB one is due."""
        return self._db.wal_bytes()

    def checkpoint(self) -> bool:
        """Brings everything onto the disk; for a worker thread. False if writers were too busy to finish: try later."""
        return self._db.checkpoint()

    def sync(self) -> None:
        """Brings what was written onto the disk at once, for what no power failure may undo; it waits for that."""
        try:
            descriptor = os.open(self.path + "-wal", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(
                f"It is done, but the disk does not confirm it ({error.strerror}): after a power failure, look again."
            ) from error

    def _join_revocations(self) -> None:
        """Revokes anew what the database lacks, because it was damaged or its last commits were lost; and vice versa.

        A device that the database does not know any more gets a row without a key: nothing can be proved with it.
        """
        rows = self._db.all("SELECT tenant, device FROM devices WHERE revoked = 1")
        devices, tokens = {(tenant, bytes(device)) for tenant, device in rows}, self.revoked_tokens()
        lost_devices, lost_tokens = self._revocations.devices() - devices, self._revocations.tokens() - tokens
        if lost_devices or lost_tokens:
            with self._db.transaction:
                for token in lost_tokens:
                    self._db.write("INSERT INTO revoked_tokens (id) VALUES (?)", (token,))
                for entry in lost_devices:
                    self._db.write(
                        "INSERT INTO devices (tenant, device, public, label, created, seen, revoked) "
                        "VALUES (?, ?, x'', '', 0, 0, 1) ON CONFLICT (tenant, device) DO UPDATE SET revoked = 1",
                        entry,
                    )
                self._db.write(END_ISSUED)
            self._revoked = tokens | lost_tokens
        known = (device_line(*each) for each in sorted(devices))
        self._revocations.complete([*map(token_line, sorted(tokens)), *known])

    def _forget_counts(self) -> None:
        """Drops what is counted in memory, because the database went back."""
        self._counts = None
        self._requests = -1
        self._finals.clear()
        self._revoked = None

    # ---- finding sessions --------------------------------------------------------------------------------------

    def session(self, number: int) -> SessionRow | None:
        """Returns a session, closed ones included, or None."""
        row = self._db.one(SELECT_SESSION + "WHERE s.number = ?", (number,))
        return session_row(row) if row is not None else None

    def session_by_uid(self, uid: SessionUid) -> SessionRow | None:
        """Returns the session with this uid, closed ones included, or None."""
        row = self._db.one(SELECT_SESSION + "WHERE s.uid = ?", (uid,))
        return session_row(row) if row is not None else None

    def session_by_name(self, tenant: str, name: str) -> SessionRow | None:
        """Returns the tenant's session of this name that is not closed, or None."""
        row = self._db.one(SELECT_SESSION + "WHERE s.tenant = ? AND s.name = ? AND s.phase > 0", (tenant, name))
        return session_row(row) if row is not None else None

    def latest_session(self, tenant: str, agent: str, device: DeviceId) -> SessionRow | None:
        """Returns the device's last used session with an agent that goes on, else the tenant's newest, else None."""
        row = self._db.one(
            SELECT_SESSION + "JOIN attachments a ON a.session = s.number JOIN devices d ON d.row = a.device "
            "WHERE d.tenant = ? AND d.device = ? AND a.open = 1 AND a.agent = ? AND s.phase = 2 "
            "ORDER BY a.used DESC LIMIT 1",
            (tenant, device, agent),
        )
        if row is None:
            row = self._db.one(
                SELECT_SESSION + "WHERE s.tenant = ? AND s.agent = ? AND s.phase = 2 ORDER BY s.number DESC LIMIT 1",
                (tenant, agent),
            )
        return session_row(row) if row is not None else None

    def sessions(
        self, tenant: str | None = None, states: Iterable[State] | None = None, after: int = 0, limit: int = 200
    ) -> list[SessionRow]:
        """Returns up to `limit` (at most 1,000) sessions numbered above `after`, in order; None means all."""
        limit = min(limit, BATCH_MAX)
        if tenant is None and states is None:
            rows = self._db.all(SELECT_SESSION + "WHERE s.number > ? ORDER BY s.number LIMIT ?", (after, limit))
            return [session_row(row) for row in rows]
        sql = "SELECT number FROM sessions WHERE state = ? AND number > ? ORDER BY number LIMIT ?"
        values: tuple[str, ...] = ()
        if tenant is not None:
            sql, values = sql.replace("WHERE", "WHERE tenant = ? AND"), (tenant,)
        numbers: list[int] = []
        for state in set(State if states is None else states):
            numbers += [number for (number,) in self._db.all(sql, (*values, state.value, after, limit))]
        chosen = [self.session(number) for number in sorted(numbers)[:limit]]
        return [row for row in chosen if row is not None]

    def tenants(self) -> dict[int, str]:
        """Returns whose each session is that is not closed, by its number."""
        return {number: sys.intern(tenant) for number, tenant in self._db.all(_TENANTS)}

    def living(self, agent: tuple[str, str], after: int = 0, limit: int = 200) -> list[SessionRow]:
        """Returns sessions of a pod, (tenant, agent), that have not ended; batches as in `sessions`."""
        rows = self._db.all(
            SELECT_SESSION
            + "WHERE s.tenant = ? AND s.agent = ? AND s.phase = 2 AND s.number > ? ORDER BY s.number LIMIT ?",
            (*agent, after, min(limit, BATCH_MAX)),
        )
        return [session_row(row) for row in rows]

    def count(self, tenant: str | None = None) -> int:
        """Returns how many sessions a tenant, or the node, has that are not closed."""
        counts = self._counted()
        if tenant is None:
            return sum(open_ for open_, _closed in counts.values())
        return counts.get(tenant, (0, 0))[0]

    def _counted(self) -> dict[str, list[int]]:
        """Returns for each tenant how many sessions are open, and how many closed and still remembered."""
        counts = self._counts
        if counts is None:
            counts = self._counts = {}
            rows = self._db.all("SELECT tenant, state, count(*) FROM sessions GROUP BY tenant, state")
            for tenant, state, number in rows:
                counts.setdefault(tenant, [0, 0])[state == State.CLOSED.value] += number
        return counts

    def _count(self, tenant: str, open_: int, closed: int = 0) -> int:
        """Changes a tenant's counts; returns how many are closed."""
        counts = self._counted()
        entry = counts.setdefault(tenant, [0, 0])
        entry[0] += open_
        entry[1] += closed
        if entry == [0, 0]:
            del counts[tenant]
        return entry[1]

    # ---- changing sessions -------------------------------------------------------------------------------------

    def create_session(  # noqa: PLR0913 - a row has many columns, all given by name
        self,
        *,
        uid: SessionUid,
        log_id: int,
        tenant: str,
        agent: str,
        name: str | None,
        kind: Kind,
        owner: DeviceId,
        now: int,
        label: str = "",
        instance: bytes = b"",
        cols: int = 80,
        rows: int = 24,
        cwd: str | None = None,
        argv: list[str] | None = None,
        boot: str = "",
        epoch: int = 1,
    ) -> SessionRow:
        """Returns a new session in state `connecting`; without a name it gets the agent's, or that with a number.

        Raises RefusedError: `EXISTS` if an open session of the tenant has the name (or any the uid), `LIMIT` if the
        tenant has too many.
        """
        counts = self._counted()
        if counts.get(tenant, (0, 0))[0] >= limits.SESSIONS_PER_TENANT_MAX:
            raise RefusedError(
                Code.LIMIT, f"There are {limits.SESSIONS_PER_TENANT_MAX} sessions already: close some of them first."
            )
        if name is None:
            name = self._free_name(tenant, agent)
        elif self._taken(tenant, check_name(name)):
            raise RefusedError(Code.EXISTS, f"There is a session {name!r} already: join it, or choose another name.")
        if self._db.one("SELECT 1 FROM sessions WHERE uid = ?", (uid,)) is not None:
            raise RefusedError(Code.EXISTS, "There is a session with this uid already.")
        label = clean_label(label, limits.LABEL_MAX_CHARS)
        state, packed = State.CONNECTING, _encode(argv) if argv is not None else None
        number = self._db.insert(
            "INSERT INTO sessions (uid, log_id, tenant, agent, name, label, kind, state, epoch, created, changed, "
            "owner, instance, cols, rows, cwd, argv, boot, phase) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 2)",
            (
                uid, log_id, tenant, agent, name, label, kind, state.value, epoch, now, now, owner, instance,
                cols, rows, cwd, packed, boot,
            ),
        )  # fmt: skip
        if self._counts is not None:
            self._count(tenant, 1)
        return SessionRow(
            number, uid, log_id, tenant, agent, name, label, kind, state, epoch, now, now, owner, instance,
            None, None, None, None, cols, rows, cwd, boot, argv,
        )  # fmt: skip

    def _taken(self, tenant: str, name: str) -> bool:
        found = self._db.one("SELECT 1 FROM sessions WHERE tenant = ? AND name = ? AND phase > 0", (tenant, name))
        return found is not None

    def _free_name(self, tenant: str, agent: str) -> str:
        """Returns the agent's name, or a free `agent-N`: N doubles until one is free, then nears the last taken."""
        if not self._taken(tenant, agent):
            return agent
        stem = agent[: NAME_MAX_CHARS - _SUFFIX_CHARS]
        taken, free = 1, 2
        while self._taken(tenant, f"{stem}-{free}"):
            taken, free = free, free * 2
        while free - taken > 1:
            middle = (taken + free) // 2
            if self._taken(tenant, f"{stem}-{middle}"):
                taken = middle
            else:
                free = middle
        return f"{stem}-{free}"

    def set_state(self, number: int, state: State, now: int) -> None:
        """Stores a session's state; an ended one does not live again, a closed one stays as it is."""
        if state is State.CLOSED:
            self.close_session(number, now)
        elif PHASES[state] == LIVING_PHASE:
            self._db.write(
                "UPDATE sessions SET state = ?, changed = ? WHERE number = ? AND phase = 2",
                (state.value, now, number),
            )
        else:
            self._db.write(
                "UPDATE sessions SET state = ?, phase = 1, changed = ? WHERE number = ? AND phase > 0",
                (state.value, now, number),
            )

    def set_end(
        self, number: int, code: int, reason: str, status: int | None, signal: int | None, lanes: bytes, now: int
    ) -> None:
        """Stores how a session's program ended, and `exited`; `lanes` is what the pod had handled, packed."""
        with self._db.transaction:
            changed = self._db.write(
                "UPDATE sessions SET state = ?, phase = 1, end_code = ?, end_reason = ?, status = ?, signal = ?, "
                "changed = ? WHERE number = ? AND phase > 0",
                (State.EXITED.value, code, reason, status, signal, now, number),
            )
            if changed:
                self._db.write(
                    "INSERT INTO ends (session, lanes, final) VALUES (?, ?, x'') "
                    "ON CONFLICT (session) DO UPDATE SET lanes = excluded.lanes",
                    (number, lanes),
                )

    def set_final(self, number: int, blob: bytes) -> None:
        """Stores what repaints an ended session's last screen; RefusedError (`TOO_LARGE`) beyond 1 MiB.

        Of a tenant's last screens the oldest go when they are more than FINALS_PER_TENANT_MAX_BYTES together.
        """
        if len(blob) > limits.FINAL_MAX_BYTES:
            raise RefusedError(Code.TOO_LARGE, f"A final screen has at most {limits.FINAL_MAX_BYTES} bytes.")
        row = self._db.one("SELECT tenant FROM sessions WHERE number = ? AND phase > 0", (number,))
        if row is None:
            return
        with self._db.transaction:
            self._room_for_final(row[0], number, len(blob))
            self._db.write(
                "INSERT INTO ends (session, lanes, final) VALUES (?, x'', ?) "
                "ON CONFLICT (session) DO UPDATE SET final = excluded.final",
                (number, blob),
            )

    def _room_for_final(self, tenant: str, number: int, size: int) -> None:
        """Counts a last screen, and drops the tenant's oldest ones where there are too many."""
        if tenant not in self._finals:
            (held,) = self._db.one("SELECT total(length(e.final))" + _FINALS + "WHERE s.tenant = ?", (tenant,))
            self._finals[tenant] = int(held)
        self._finals[tenant] += size - len(self.final(number))
        if self._finals[tenant] <= limits.FINALS_PER_TENANT_MAX_BYTES:
            return
        # Some more than needed, as finding them takes its time.
        target = limits.FINALS_PER_TENANT_MAX_BYTES // 8 * 7
        sql = "SELECT e.session, length(e.final)" + _FINALS + "WHERE s.tenant = ? AND s.number != ? ORDER BY s.number"
        for other, length in self._db.all(sql, (tenant, number)):
            if self._finals[tenant] <= target:
                break
            self._db.write("UPDATE ends SET final = x'' WHERE session = ?", (other,))
            self._finals[tenant] -= length

    def final(self, number: int) -> bytes:
        """Returns what repaints an ended session's last screen, or nothing."""
        row = self._db.one("SELECT final FROM ends WHERE session = ?", (number,))
        return row[0] if row is not None else b""

    def lanes(self, number: int) -> bytes:
        """Returns what `set_end` was given as lanes, or nothing."""
        row = self._db.one("SELECT lanes FROM ends WHERE session = ?", (number,))
        return row[0] if row is not None else b""

    def rename(self, number: int, name: str) -> None:
        """Gives an open session another name; RefusedError (`EXISTS`) if another open session of its tenant has it."""
        check_name(name)
        other = self._db.one(
            "SELECT o.number FROM sessions s JOIN sessions o ON o.tenant = s.tenant AND o.name = ? AND o.phase > 0 "
            "WHERE s.number = ?",
            (name, number),
        )
        if other is not None and other[0] != number:
            raise RefusedError(Code.EXISTS, f"There is a session {name!r} already: choose another name.")
        self._db.write("UPDATE sessions SET name = ? WHERE number = ? AND phase > 0", (name, number))

    def set_label(self, number: int, label: str) -> None:
        """Stores a session's label, cleaned of control characters and cut to its bound."""
        clean = clean_label(label, limits.LABEL_MAX_CHARS)
        self._db.write("UPDATE sessions SET label = ? WHERE number = ?", (clean, number))

    def set_size(self, number: int, cols: int, rows: int) -> None:
        """Stores the terminal's size in cells."""
        self._db.write("UPDATE sessions SET cols = ?, rows = ? WHERE number = ?", (cols, rows, number))

    def set_log(self, number: int, log_id: int) -> None:
        """Stores the id of the session's new log."""
        self._db.write("UPDATE sessions SET log_id = ? WHERE number = ?", (log_id, number))

    def set_instance(self, number: int, instance: bytes) -> None:
        """Stores which run of the pod a session lives in (16 bytes)."""
        self._db.write("UPDATE sessions SET instance = ? WHERE number = ?", (instance, number))

    def touch(self, number: int, now: int) -> None:
        """Notes that something happened in a session; an ended one is kept for the retention time from then on."""
        self._db.write("UPDATE sessions SET changed = ? WHERE number = ?", (now, number))

    def close_session(self, number: int, now: int) -> bool:
        """Closes a session for good; False if it was closed or is unknown.

        Its screen, lanes, command and directory go, its tickets end, its name is free. Uid, end and attachments stay
        until `purge`, so that whoever comes back learns how it ended; of a tenant's closed ones the newest 20,000 stay.
        """
        row = self._db.one("SELECT tenant, phase FROM sessions WHERE number = ?", (number,))
        if row is None or row[1] == CLOSED_PHASE:
            return False
        # Counted before the change: what is counted after it would hold it already.
        self._counted()
        with self._db.transaction:
            self._db.write(
                "UPDATE sessions SET state = ?, phase = 0, changed = ?, label = '', cwd = NULL, argv = NULL "
                "WHERE number = ?",
                (State.CLOSED.value, now, number),
            )
            self._drop_end(number, row[0])
            self._db.write("DELETE FROM tickets WHERE session = ?", (number,))
            self._db.write("UPDATE attachments SET open = 0 WHERE session = ?", (number,))
            if self._count(row[0], -1, 1) > TOMBSTONES_PER_TENANT_MAX:
                oldest = self._db.one(
                    "SELECT number FROM sessions WHERE tenant = ? AND state = ? ORDER BY number LIMIT 1",
                    (row[0], State.CLOSED.value),
                )
                self._remove(oldest[0], row[0])
                self._count(row[0], 0, -1)
        return True

    def purge(self, before: int, limit: int = 100) -> list[int]:
        """Forgets at most `limit` sessions that ended before `before`, the oldest first; returns their numbers.

        The caller drops their logs, and calls again while it gets `limit` of them.
        """
        self._counted()
        with self._db.transaction:
            rows = self._db.all(
                "SELECT number, tenant, phase FROM sessions WHERE phase < 2 AND changed < ? ORDER BY changed LIMIT ?",
                (before, limit),
            )
            for number, tenant, phase in rows:
                self._remove(number, tenant)
                closed = phase == CLOSED_PHASE
                self._count(tenant, -(not closed), -closed)
        return [number for number, _tenant, _phase in rows]

    def _drop_end(self, number: int, tenant: str) -> None:
        if tenant in self._finals:
            self._finals[tenant] -= len(self.final(number))
        self._db.write("DELETE FROM ends WHERE session = ?", (number,))

    def _remove(self, number: int, tenant: str) -> None:
        self._drop_end(number, tenant)
        for sql in (
            "DELETE FROM sessions WHERE number = ?",
            "DELETE FROM tickets WHERE session = ?",
            "DELETE FROM attachments WHERE session = ?",
        ):
            self._db.write(sql, (number,))

    def next_log_id(self) -> LogId:
        """Returns a new log's id: 63 random bits, never 0."""
        return LogId(int.from_bytes(os.urandom(8), "big") >> 1 or 1)

    # ---- attachments -------------------------------------------------------------------------------------------

    def add_attachment(
        self,
        attachment_id: AttachmentId,
        session: int,
        device: DeviceId,
        mode: Mode,
        exact: bool,
        now: int,
        connected: Collection[bytes] = (),
        ticket: bytes = b"",
    ) -> None:
        """Remembers an attachment of a session and a device of its tenant; one that is known moves to this session.

        `ticket` is the hash of the share ticket by which the device came, if it did.
        A session keeps ATTACHMENTS_MAX drivers and WATCHERS_MAX watchers: of the same mode, the one longest unused
        goes (of a device that has more than a quarter of them, its own), but none of `connected`. A counter that was
        spent stays spent. Raises RefusedError: `NOT_FOUND` if session or device is unknown, `EXISTS` if the id is
        another device's.
        """
        row = self._db.one(
            "SELECT d.row, s.agent, s.phase FROM sessions s JOIN devices d ON d.tenant = s.tenant AND d.device = ? "
            "WHERE s.number = ?",
            (device, session),
        )
        if row is None:
            raise RefusedError(Code.NOT_FOUND, "There is no such session for this device.")
        owner = self._db.one("SELECT device FROM attachments WHERE id = ?", (attachment_id,))
        if owner is not None and owner[0] != row[0]:
            raise RefusedError(Code.EXISTS, "This attachment is another device's: connect with a new one.")
        with self._db.transaction:
            self._db.write(
                "INSERT INTO attachments (id, session, device, agent, open, mode, exact, counter, race, used, guest, "
                "ticket) VALUES (?, ?, ?, ?, ?, ?, ?, 0, x'', ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "session = excluded.session, agent = excluded.agent, open = excluded.open, mode = excluded.mode, "
                "exact = excluded.exact, used = excluded.used, guest = excluded.guest, ticket = excluded.ticket",
                (
                    attachment_id, session, row[0], row[1], int(row[2] > CLOSED_PHASE), mode, exact, now, bool(ticket),
                    ticket,
                ),
            )  # fmt: skip
            # Whoever may only watch must not be able to make the session forget who drives it.
            known = self._db.all(
                "SELECT id, device = ? FROM attachments WHERE session = ? AND mode = ? ORDER BY used",
                (row[0], session, mode),
            )
            most = limits.ATTACHMENTS_MAX if mode == "drive" else limits.WATCHERS_MAX
            surplus = len(known) - most
            if surplus > 0 and sum(own for _, own in known) > most // 4:
                known.sort(key=lambda entry: not entry[1])
            for other, _own in known:
                if surplus <= 0:
                    break
                if other != attachment_id and other not in connected:
                    self._db.write("DELETE FROM attachments WHERE id = ?", (other,))
                    surplus -= 1

    def attachment(self, attachment_id: AttachmentId) -> AttachmentRow | None:
        """Returns an attachment with its session's uid and its device's key, or None; `revoked` is for the caller."""
        row = self._db.one(SELECT_ATTACHMENT + "WHERE a.id = ?", (attachment_id,))
        return attachment_row(row) if row is not None else None

    def last_driver_exact(self, number: int) -> bool:
        """Tells whether the attachment that drove a session last was an exact one."""
        row = self._db.one(
            "SELECT exact FROM attachments WHERE session = ? AND mode = 'drive' ORDER BY used DESC LIMIT 1", (number,)
        )
        return row is not None and bool(row[0])

    def spend_counter(self, attachment_id: AttachmentId, counter: int, race: bytes, now: int = 0) -> bool:
        """Stores counter and race id of a RESUME that was proved; False, and no change, if the counter is not higher.

        With `now` it also counts as a use, as `touch_attachment` does.
        """
        changed = self._db.write(
            "UPDATE attachments SET counter = ?1, race = ?2, used = max(used, ?3) WHERE id = ?4 AND counter < ?1",
            (counter, race, now, attachment_id),
        )
        return changed > 0

    def touch_attachment(self, attachment_id: AttachmentId, now: int) -> None:
        """Notes that an attachment was in use; the one longest unused is forgotten first."""
        self._db.write("UPDATE attachments SET used = ? WHERE id = ?", (now, attachment_id))

    # ---- devices -----------------------------------------------------------------------------------------------

    def put_device(self, device: DeviceId, public: bytes, tenant: str, label: str, now: int) -> None:
        """Remembers that a device connected to a tenant; `public` is its key as it travels, `device` the hash of that.

        Raises RefusedError: `REVOKED` if the tenant revoked it, `LIMIT` if the tenant has too many devices in use.
        """
        label = clean_label(label, limits.LABEL_MAX_CHARS)
        known = self._db.one(
            "SELECT row, label, seen, revoked FROM devices WHERE tenant = ? AND device = ?", (tenant, device)
        )
        if known is None:
            with self._db.transaction:
                self._room_for_device(tenant)
                self._db.write(
                    "INSERT INTO devices (tenant, device, public, label, created, seen, revoked) "
                    "VALUES (?, ?, ?, ?, ?, ?, 0)",
                    (tenant, device, public, label, now, now),
                )
            return
        number, old_label, seen, revoked = known
        if revoked:
            raise RefusedError(Code.REVOKED, REVOKED_TEXT)
        # To the minute is enough for a list, and saves a write for most connections.
        if label != old_label or abs(now - seen) >= SEEN_EVERY_SECONDS * SECOND:
            self._db.write("UPDATE devices SET label = ?, seen = ? WHERE row = ?", (label, now, number))

    def _room_for_device(self, tenant: str) -> None:
        """Forgets the device longest unseen that has no attachment, where the tenant has as many as it may."""
        (count,) = self._db.one("SELECT count(*) FROM devices WHERE tenant = ? AND revoked = 0", (tenant,))
        if count < DEVICES_PER_TENANT_MAX:
            return
        oldest = self._db.one(
            "SELECT row FROM devices d WHERE tenant = ? AND revoked = 0 "
            "AND NOT EXISTS (SELECT 1 FROM attachments a WHERE a.device = d.row) ORDER BY seen LIMIT 1",
            (tenant,),
        )
        if oldest is None:
            raise RefusedError(Code.LIMIT, f"{DEVICES_PER_TENANT_MAX} devices are in use already: close old sessions.")
        self._db.write("DELETE FROM devices WHERE row = ?", (oldest[0],))

    def device(self, device: DeviceId, tenant: str) -> DeviceRow | None:
        """Returns a device of a tenant, or None."""
        row = self._db.one(SELECT_DEVICE + "WHERE d.tenant = ? AND d.device = ?", (tenant, device))
        return device_row(row) if row is not None else None

    def devices(self, tenant: str, limit: int = DEVICES_PER_TENANT_MAX, start: int = 0) -> list[DeviceRow]:
        """Returns `limit` devices of a tenant from the `start`th on, in use before revoked, the one last seen first."""
        rows = self._db.all(
            SELECT_DEVICE + "WHERE d.tenant = ? ORDER BY d.revoked, d.seen DESC LIMIT ? OFFSET ?",
            (tenant, limit, start),
        )
        return [device_row(row) for row in rows]

    def revoke_device(self, tenant: str, device: DeviceId) -> bool:
        """Refuses a device and all its attachments to this tenant from now on; False if the tenant does not know it.

        The tickets that it issued end. It is on the disk when this returns. Raises RefusedError (`LIMIT`) if the tenant
        revoked too many.
        """
        row = self._db.one("SELECT revoked FROM devices WHERE tenant = ? AND device = ?", (tenant, device))
        if row is None or row[0]:
            return row is not None
        (count,) = self._db.one("SELECT count(*) FROM devices WHERE tenant = ? AND revoked = 1", (tenant,))
        if count >= limits.REVOKED_DEVICES_PER_TENANT_MAX:
            raise RefusedError(
                Code.LIMIT,
                f"{count} devices are revoked already: have the token revoked that this one came with (`sterna revoke "
                "--token`).",
            )
        sql = "UPDATE devices SET revoked = 1 WHERE tenant = ? AND device = ?"
        self._revoke(device_line(tenant, device), sql, (tenant, device))
        return True

    def _revoke(self, line: str, sql: str, values: tuple[str | bytes, ...]) -> None:
        """Writes a revocation into its file, then into the database; if either fails, into neither."""
        size = self._revocations.add(line)
        try:
            with self._db.transaction:
                self._db.write(sql, values)
                self._db.write(END_ISSUED)
        except BaseException:
            self._revocations.take_back(line, size)
            raise

    # ---- requests ----------------------------------------------------------------------------------------------

    def remember_request(
        self, device: DeviceId, request: bytes, session: int, attachment_id: AttachmentId, now: int
    ) -> None:
        """Remembers how a CONNECT was answered, for ten minutes; of all devices together REQUESTS_MAX of them.

        Beyond that a device that connects forgets its own oldest first, so that nobody makes others' be forgotten.
        """
        with self._db.transaction:
            self._db.write(
                "INSERT OR REPLACE INTO requests (device, request, session, attachment, at) VALUES (?, ?, ?, ?, ?)",
                (device, request, session, attachment_id, now),
            )
            if self._requests < 0:
                (self._requests,) = self._db.one("SELECT count(*) FROM requests")
            else:
                self._requests += 1
            oldest = "SELECT device, request FROM requests WHERE at < ? ORDER BY at LIMIT ?"
            gone = self._db.all(oldest, (now - _REQUEST_MEMORY, SWEEP_ROWS))
            if not gone and self._requests > REQUESTS_MAX:
                own = oldest.replace("WHERE", "WHERE device = ? AND")
                gone = self._db.all(own, (device, now, SWEEP_ROWS)) or self._db.all(oldest, (now + 1, SWEEP_ROWS))
            for key in gone:
                self._requests -= self._db.write("DELETE FROM requests WHERE device = ? AND request = ?", key)

    def find_request(self, device: DeviceId, request: bytes, now: int) -> RequestRow | None:
        """Returns how the same CONNECT was answered within ten minutes, or None.

        A device may be known to several tenants: whose the session is, the caller checks.
        """
        row = self._db.one(
            "SELECT session, attachment, at FROM requests WHERE device = ? AND request = ? AND at >= ?",
            (device, request, now - _REQUEST_MEMORY),
        )
        return RequestRow(*row) if row is not None else None

    # ---- tokens ------------------------------------------------------------------------------------------------

    def revoke_token(self, token: str) -> None:
        """Refuses the access token with this id from now on, and what tickets it issued.

        Raises RefusedError (`LIMIT`) beyond 10,000 of them.
        """
        known = self.revoked_tokens()
        if token in known:
            return
        if len(known) >= REVOKED_TOKENS_MAX:
            raise RefusedError(
                Code.LIMIT, f"{REVOKED_TOKENS_MAX} tokens are revoked: replace the key that signs tokens."
            )
        self._revoke(token_line(token), "INSERT INTO revoked_tokens (id) VALUES (?)", (token,))
        self._revoked = known | {token}

    # ---- anything else -----------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """Returns what `set_meta` stored under a key, or None."""
        row = self._db.one("SELECT value FROM meta WHERE key = ?", (key,))
        return row[0] if row is not None else None

    def set_meta(self, key: str, value: str) -> None:
        """Stores a short text of the node's own under a key, such as the machine's boot id."""
        self._db.write("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))
