"""What the node's database holds: its tables and indexes, and the rows as the program sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from sterna.ids import AttachmentId, DeviceId, SessionUid
from sterna.protocol.messages import Kind, Mode
from sterna.protocol.states import State

if TYPE_CHECKING:
    from sterna.node.database import Database

APPLICATION_ID = 0x53544E41
"""Marks the file as ours ("STNA"; sqlite.org/pragma.html#pragma_application_id)."""
VERSION = 1
"""Which schema the file has (PRAGMA user_version); rises when a table changes."""

CLOSED_PHASE, EXITED_PHASE, LIVING_PHASE = 0, 1, 2
PHASES = {
    State.CONNECTING: LIVING_PHASE,
    State.ACTIVE: LIVING_PHASE,
    State.SUSPENDED: LIVING_PHASE,
    State.EXITED: EXITED_PHASE,
    State.CLOSED: CLOSED_PHASE,
}
"""The coarse state: most indexes stand on it, so that going from active to suspended and back leaves them untouched."""

_INDEX_OF_ISSUERS = "CREATE INDEX tickets_token ON tickets (token)"

# AUTOINCREMENT: the journal's logs are named by number, so a number must never come back.
TABLES = (
    """
    CREATE TABLE sessions (
        number INTEGER PRIMARY KEY AUTOINCREMENT, uid BLOB NOT NULL, log_id INTEGER NOT NULL, tenant TEXT NOT NULL,
        agent TEXT NOT NULL, name TEXT NOT NULL, label TEXT NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL,
        epoch INTEGER NOT NULL, created INTEGER NOT NULL, changed INTEGER NOT NULL, owner BLOB NOT NULL,
        instance BLOB NOT NULL, end_code INTEGER, end_reason TEXT, status INTEGER, signal INTEGER,
        cols INTEGER NOT NULL, rows INTEGER NOT NULL, cwd TEXT, argv BLOB, boot TEXT NOT NULL, phase INTEGER NOT NULL
    )
    """,
    "CREATE UNIQUE INDEX sessions_uid ON sessions (uid)",
    "CREATE UNIQUE INDEX sessions_name ON sessions (tenant, name) WHERE phase > 0",
    "CREATE INDEX sessions_agent ON sessions (tenant, agent, phase, number)",
    "CREATE INDEX sessions_tenant ON sessions (tenant, state, number)",
    "CREATE INDEX sessions_state ON sessions (state, number)",
    "CREATE INDEX sessions_ended ON sessions (changed) WHERE phase < 2",
    # What is large and seldom read stands apart, so that a session's row stays within one page.
    "CREATE TABLE ends (session INTEGER PRIMARY KEY, lanes BLOB NOT NULL, final BLOB NOT NULL)",
    """
    CREATE TABLE devices (
        row INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, device BLOB NOT NULL, public BLOB NOT NULL,
        label TEXT NOT NULL, created INTEGER NOT NULL, seen INTEGER NOT NULL, revoked INTEGER NOT NULL
    )
    """,
    "CREATE UNIQUE INDEX devices_id ON devices (tenant, device)",
    "CREATE INDEX devices_seen ON devices (tenant, revoked, seen DESC)",
    """
    CREATE TABLE attachments (
        id BLOB PRIMARY KEY, session INTEGER NOT NULL, device INTEGER NOT NULL, agent TEXT NOT NULL,
        open INTEGER NOT NULL, mode TEXT NOT NULL, exact INTEGER NOT NULL, counter INTEGER NOT NULL,
        race BLOB NOT NULL, used INTEGER NOT NULL, guest INTEGER NOT NULL DEFAULT 0,
        ticket BLOB NOT NULL DEFAULT x''
    ) WITHOUT ROWID
    """,
    "CREATE INDEX attachments_session ON attachments (session, used)",
    "CREATE INDEX attachments_device ON attachments (device, open, agent, used, session)",
    """
    CREATE TABLE requests (
        device BLOB NOT NULL, request BLOB NOT NULL, session INTEGER NOT NULL, attachment BLOB NOT NULL,
        at INTEGER NOT NULL, PRIMARY KEY (device, request)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX requests_at ON requests (at)",
    "CREATE INDEX IF NOT EXISTS requests_device ON requests (device, at)",
    """
    CREATE TABLE tickets (
        hash BLOB PRIMARY KEY, tenant TEXT NOT NULL, session INTEGER, agents TEXT NOT NULL, mode TEXT NOT NULL,
        expires INTEGER NOT NULL, device BLOB, issuer BLOB NOT NULL DEFAULT x'', token TEXT NOT NULL DEFAULT '',
        until INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID
    """,
    "CREATE INDEX tickets_tenant ON tickets (tenant, expires)",
    "CREATE INDEX tickets_expires ON tickets (expires)",
    "CREATE INDEX tickets_session ON tickets (session) WHERE session IS NOT NULL",
    _INDEX_OF_ISSUERS,
    "CREATE TABLE revoked_tokens (id TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
)

ADDED = [statement for statement in TABLES if "IF NOT EXISTS" in statement]
"""What files of this version may lack that were made before it came."""
ADDED_COLUMNS = {
    ("tickets", "token"): (
        "ALTER TABLE tickets ADD COLUMN issuer BLOB NOT NULL DEFAULT x''",
        "ALTER TABLE tickets ADD COLUMN token TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE tickets ADD COLUMN until INTEGER NOT NULL DEFAULT 0",
        _INDEX_OF_ISSUERS,
        # Nobody knows who made these, so no revocation ends them: time has to.
        "UPDATE tickets SET until = strftime('%s', 'now', '+30 days') * 1000000000",
    ),
    ("attachments", "guest"): (
        "ALTER TABLE attachments ADD COLUMN guest INTEGER NOT NULL DEFAULT 0",
        """
        UPDATE attachments SET guest = 1 WHERE EXISTS (
            SELECT 1 FROM devices d JOIN tickets t ON t.tenant = d.tenant AND t.device = d.device
            WHERE d.row = attachments.device
        )
        """,
    ),
    ("attachments", "ticket"): ("ALTER TABLE attachments ADD COLUMN ticket BLOB NOT NULL DEFAULT x''",),
}
"""The columns that such files may lack, and what adds them."""

SELECT_SESSION = (
    "SELECT s.number, s.uid, s.log_id, s.tenant, s.agent, s.name, s.label, s.kind, s.state, s.epoch, s.created, "
    "s.changed, s.owner, s.instance, s.end_code, s.end_reason, s.status, s.signal, s.cols, s.rows, s.cwd, s.boot, "
    "s.argv FROM sessions s "
)
SELECT_ATTACHMENT = (
    "SELECT a.id, a.session, s.uid, s.tenant, s.agent, s.state, d.device, d.public, d.label, d.revoked, a.mode, "
    "a.exact, a.counter, a.race, a.used, a.guest "
    "FROM attachments a JOIN sessions s ON s.number = a.session JOIN devices d ON d.row = a.device "
)
SELECT_DEVICE = (
    "SELECT d.device, d.public, d.tenant, d.label, d.created, d.seen, d.revoked, "
    "(SELECT count(DISTINCT a.session) FROM attachments a WHERE a.device = d.row AND a.open = 1) "
    "FROM devices d "
)


class SessionRow(msgspec.Struct, frozen=True, gc=False):
    """One session as the store has it; `created` and `changed` are Unix nanoseconds.

    `owner` is the device that began it, `instance` the pod's run it lives in (16 bytes, empty before it is known),
    `boot` the machine's boot at its creation. `end_code` and what follows it are None while the program runs.
    """

    number: int
    uid: SessionUid
    log_id: int
    tenant: str
    agent: str
    name: str
    label: str
    kind: Kind
    state: State
    epoch: int
    created: int
    changed: int
    owner: DeviceId
    instance: bytes
    end_code: int | None
    end_reason: str | None
    status: int | None
    signal: int | None
    cols: int
    rows: int
    cwd: str | None
    boot: str
    argv: list[str] | None


class AttachmentRow(msgspec.Struct, frozen=True, gc=False):
    """One attachment with what a RESUME is checked against: its session's uid and state, its device's public key.

    `number` is the session's, `counter` and `race` are what was spent last, `used` is in Unix nanoseconds; `guest` says
    that its device came by a share ticket.
    """

    id: AttachmentId
    number: int
    uid: SessionUid
    tenant: str
    agent: str
    state: State
    device: DeviceId
    public: bytes
    label: str
    revoked: bool
    mode: Mode
    exact: bool
    counter: int
    race: bytes
    used: int
    guest: bool = False


class DeviceRow(msgspec.Struct, frozen=True, gc=False):
    """One device of one tenant; `seen` is when it last connected, `sessions` how many open sessions it used."""

    id: DeviceId
    public: bytes
    tenant: str
    label: str
    created: int
    seen: int
    revoked: bool
    sessions: int


class RequestRow(msgspec.Struct, frozen=True, gc=False):
    """What a CONNECT that comes again was answered with."""

    session: int
    attachment: AttachmentId
    at: int


class TicketRow(msgspec.Struct, frozen=True, gc=False):
    """What a share ticket allows: agents by a glob, a mode, one session unless None; `expires` in Unix nanoseconds."""

    tenant: str
    session: int | None
    agents: str
    mode: Mode
    expires: int


class ShareRow(msgspec.Struct, frozen=True, gc=False):
    """A share ticket that is out: by its hash, with the session it is for (None: all of them) and its issuer's device.

    `device` is what uses it, None if nobody has yet; `expires` is in Unix nanoseconds.
    """

    hash: bytes
    uid: SessionUid | None
    name: str | None
    agent: str | None
    mode: Mode
    expires: int
    issuer: bytes
    device: DeviceId | None
    label: str | None


class Issuer(msgspec.Struct, frozen=True, gc=False):
    """Who makes a share ticket: a device, and the id of the token that it came with ("": the node's own user).

    `until` is when that token expires, in Unix nanoseconds (0: never); `owner` says that it has all of its tenant's
    rights.
    """

    device: DeviceId = DeviceId(b"")
    token: str = ""
    until: int = 0
    owner: bool = True


def complete(database: Database) -> None:
    """Adds the columns to a file that was made before they came; all of them, or none where the disk fails."""
    with database.transaction:
        for (table, column), statements in ADDED_COLUMNS.items():
            if database.one("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column)) is None:
                for statement in statements:
                    database.write(statement)


_STATES = {state.value: state for state in State}
_decode_argv = msgspec.msgpack.Decoder(list[str]).decode


def session_row(row: Any) -> SessionRow:
    """Returns a row of SELECT_SESSION as what it means."""
    values = list(row)
    values[8] = _STATES[values[8]]
    if values[22] is not None:
        values[22] = _decode_argv(values[22])
    return SessionRow(*values)


def attachment_row(row: Any) -> AttachmentRow:
    """Returns a row of SELECT_ATTACHMENT as what it means."""
    values = list(row)
    values[5] = _STATES[values[5]]
    values[9], values[11], values[15] = bool(values[9]), bool(values[11]), bool(values[15])
    return AttachmentRow(*values)


def device_row(row: Any) -> DeviceRow:
    """Returns a row of SELECT_DEVICE as what it means."""
    values = list(row)
    values[6] = bool(values[6])
    return DeviceRow(*values)
