"""Share tickets in the node's store: they end with the access of who made them, or when that is said; nobody makes
another's go."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from sterna.errors import Code, StorageError
from sterna.ids import AttachmentId, DeviceId
from sterna.node import tickets
from sterna.node.schema import Issuer
from sterna.node.store import Store
from sterna.units import SECOND
from tests.unit.test_node_store import DAY, KEPT, KEY, MINE, NOW, OTHER, _db, again, attach, code, make

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["_db"]

GUEST = DeviceId(b"g" * 32)
TOKEN, ANOTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
OWNER, WATCHER = Issuer(OTHER, ANOTHER), Issuer(MINE, TOKEN, owner=False)


def share(db: Store, issuer: Issuer = WATCHER, ttl: int = 5 * DAY, now: int = NOW) -> bytes:
    """A fresh ticket's hash."""
    hashed = os.urandom(32)
    db.add_ticket(hashed, "ada", None, "*", "drive", now + ttl, now, issuer)
    return hashed


def bound(db: Store, issuer: Issuer = WATCHER, now: int = NOW) -> bytes:
    """The same, of one that a device has used."""
    hashed = share(db, issuer, now=now)
    assert db.redeem_ticket(hashed, GUEST, now) is not None
    return hashed


def held(db: Store, hashes: Iterable[bytes]) -> list[bool]:
    """Which tickets the store still knows."""
    return [db._db.one("SELECT 1 FROM tickets WHERE hash = ?", (hashed,)) is not None for hashed in hashes]


def test_a_revoked_device_does_not_use_a_link_up(db: Store) -> None:
    db.put_device(GUEST, KEY, "ada", "phone", NOW)
    db.revoke_device("ada", GUEST)
    hashed = share(db)
    db.redeem_ticket(hashed, GUEST, NOW)  # which put_device then refuses
    assert db.redeem_ticket(hashed, OTHER, NOW) is not None
    assert db.redeem_ticket(hashed, GUEST, NOW) is None


# ---- access that ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["device", "token"])
def test_the_tickets_of_revoked_access_end(db: Store, what: str) -> None:
    db.put_device(MINE, KEY, "ada", "laptop", NOW)
    db.put_device(MINE, KEY, "bob", "laptop", NOW)
    # One token on two devices, and one device with two tokens.
    cousin = Issuer(OTHER, TOKEN) if what == "token" else Issuer(MINE, ANOTHER)
    stay = Issuer(MINE, ANOTHER) if what == "token" else Issuer(OTHER, TOKEN)
    gone, kept = [share(db), bound(db), share(db, cousin)], [share(db, stay), bound(db, stay), bound(db, Issuer())]
    if what == "device":
        db.revoke_device("bob", MINE)
        assert held(db, gone) == [True] * 3, "another tenant's revocation"
        db.revoke_device("ada", MINE)
    else:
        db.revoke_token(TOKEN)
    assert [db.redeem_ticket(hashed, GUEST, NOW + 1) is not None for hashed in gone + kept] == [False] * 3 + [True] * 3
    assert held(db, gone + kept) == [False] * 3 + [True] * 3
    assert code(lambda: share(db)) is Code.REVOKED
    db = again(db)
    assert held(db, gone + kept) == [False] * 3 + [True] * 3
    db.close()


@pytest.mark.parametrize("what", ["device", "token"])
def test_a_ticket_of_revoked_access_is_refused_though_it_is_there(db: Store, what: str) -> None:
    db.put_device(MINE, KEY, "ada", "laptop", NOW)
    hashed = bound(db, OWNER)
    if what == "device":
        db.revoke_device("ada", MINE)
        db._db.write("UPDATE tickets SET issuer = ?", (MINE,))
    else:
        db.revoke_token(TOKEN)
        db._db.write("UPDATE tickets SET token = ?", (TOKEN,))
    assert held(db, [hashed]) == [True]
    assert db.redeem_ticket(hashed, GUEST, NOW) is None


@pytest.mark.parametrize("what", ["device", "token"])
def test_a_revocation_that_the_database_lost_ends_the_tickets_too(db: Store, what: str) -> None:
    db.put_device(MINE, KEY, "ada", "laptop", NOW)
    hashes = [share(db), bound(db), bound(db, OWNER)]
    rows = db._db.all("SELECT * FROM tickets")
    if what == "device":
        db.revoke_device("ada", MINE)
    else:
        db.revoke_token(TOKEN)
    # A power failure took the last commits, but not the file beside the database.
    db._db.write("UPDATE devices SET revoked = 0")
    db._db.write("DELETE FROM revoked_tokens")
    for row in rows:
        db._db.write("INSERT OR REPLACE INTO tickets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    assert held(db, hashes) == [True, True, True]
    db = again(db)
    assert held(db, hashes) == [False, False, True]
    db.close()


def test_a_revocation_that_cannot_be_stored_ends_no_ticket(db: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, write = bound(db), db._db._execute

    def full(sql: str, values: tuple[object, ...]) -> object:
        if sql == tickets.END_ISSUED:
            raise StorageError("The disk is full.")
        return write(sql, values)

    monkeypatch.setattr(db._db, "_execute", full)
    with pytest.raises(StorageError):
        db.revoke_token(TOKEN)
    monkeypatch.undo()
    assert not db.revoked_tokens()
    assert db.redeem_ticket(hashed, GUEST, NOW) is not None


def test_no_ticket_outlives_the_token_of_who_made_it(db: Store) -> None:
    until = NOW + KEPT + 2 * DAY
    issuer = Issuer(MINE, TOKEN, until)
    long, short = os.urandom(32), os.urandom(32)
    assert db.add_ticket(long, "ada", None, "*", "drive", until + DAY, NOW, issuer) == until
    assert db.add_ticket(short, "ada", None, "*", "drive", NOW + DAY, NOW, issuer) == NOW + DAY
    for day, expires in ((0, NOW + KEPT), (1, NOW + KEPT + DAY), (2, until), (5, until), (31, until)):
        found = db.redeem_ticket(short, GUEST, NOW + day * DAY)
        assert found is not None
        assert found.expires == expires
    assert db.redeem_ticket(short, GUEST, until) is None
    assert db.redeem_ticket(long, GUEST, until) is None
    assert code(lambda: share(db, issuer, now=until)) is Code.EXPIRED


def test_use_never_cuts_a_ticket_short(db: Store) -> None:
    hashed, expires = share(db, ttl=KEPT + 10 * DAY), NOW + KEPT + 10 * DAY
    for day, until in ((0, expires), (9, expires), (11, NOW + KEPT + 11 * DAY)):
        found = db.redeem_ticket(hashed, GUEST, NOW + day * DAY)
        assert found is not None
        assert found.expires == until
    assert db.redeem_ticket(hashed, GUEST, expires) is not None


# ---- too many ------------------------------------------------------------------------------------------------------


def test_a_token_without_all_rights_makes_only_its_own_tickets_go(db: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "TICKETS_PER_TOKEN_MAX", 3)
    others = [bound(db, OWNER), share(db, OWNER), bound(db, Issuer()), share(db, Issuer(OTHER, "t", owner=False))]
    own = [bound(db), share(db, ttl=DAY), share(db)]
    own.append(share(db))
    assert held(db, own) == [True, False, True, True], "what nobody used goes first, the oldest of it"
    own = [own[0], *(bound(db, now=NOW + i * SECOND) for i in (1, 2, 3))]
    assert held(db, own) == [False, True, True, True], "then what was not used for longest"
    device = Issuer(GUEST, TOKEN, owner=False)
    share(db, device)
    assert sum(held(db, own)) == 2, "another device with the same token gets no more"
    assert held(db, others) == [True] * 4
    for _ in range(5):
        share(db, OWNER)
    assert held(db, others) == [True] * 4, "who has all rights is not bounded by that"


def test_of_a_tenants_tickets_none_that_is_in_use_goes_for_anothers(db: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "TICKETS_PER_TENANT_MAX", 4)
    third = Issuer(OTHER, "t", owner=False)
    crowd = [bound(db), share(db), share(db, OWNER), bound(db, OWNER)]
    assert code(lambda: share(db, third)) is Code.LIMIT, "it has none that could go"
    assert held(db, crowd) == [True] * 4
    mine = share(db)
    assert held(db, [*crowd, mine]) == [True, False, True, True, True]
    crowd = [crowd[0], mine, crowd[3], share(db, OWNER)]
    assert held(db, crowd) == [True] * 4, "its own goes first"
    crowd = [*crowd, bound(db, OWNER)]
    crowd.append(share(db, OWNER))
    assert held(db, crowd) == [True, False, True, False, True, True], "an owner's goes for another's unused one"
    db.redeem_ticket(crowd[-1], GUEST, NOW)
    crowd.append(share(db, OWNER, now=NOW + SECOND))
    assert sum(held(db, crowd)) == 4
    assert held(db, crowd[:1]) == [True], "in use, and another's"
    monkeypatch.setattr(tickets, "TICKETS_PER_TENANT_MAX", 1)
    db._db.write("DELETE FROM tickets WHERE token != ?", (TOKEN,))
    assert code(lambda: share(db, OWNER)) is Code.LIMIT


# ---- listed and ended ----------------------------------------------------------------------------------------------


def test_who_may_see_a_ticket(db: Store) -> None:
    work = make(db, name="work")
    one, two, up = b"1" * 32, b"2" * 32, b"3" * 32
    db.add_ticket(one, "ada", work.number, "bash", "watch", NOW + DAY, NOW, WATCHER)
    db.add_ticket(two, "ada", None, "*", "drive", NOW + 2 * DAY, NOW, OWNER)
    db.add_ticket(up, "ada", None, "*", "drive", NOW + 3 * DAY, NOW)
    db.add_ticket(b"4" * 32, "bob", None, "*", "drive", NOW + DAY, NOW, Issuer(MINE, TOKEN))
    db.add_ticket(b"5" * 32, "ada", None, "*", "drive", NOW + 1, NOW, WATCHER)
    db.put_device(GUEST, KEY, "ada", "phone", NOW)
    db.put_device(GUEST, KEY, "bob", "other", NOW)
    db.redeem_ticket(two, GUEST, NOW)

    def seen(whose: Issuer, **page: int) -> list[bytes]:
        return [row.hash for row in db.shares("ada", whose, NOW + 1, **page)]

    assert seen(Issuer(GUEST, "t")) == [one, up, two], "an owner sees all of its tenant's"
    assert seen(OWNER, limit=2) == [one, up]
    assert seen(OWNER, limit=2, start=2) == [two]
    assert seen(WATCHER) == [one]
    assert seen(Issuer(GUEST, TOKEN, owner=False)) == [one], "the same token"
    assert seen(Issuer(MINE, "t", owner=False)) == [one], "the same device"
    assert seen(Issuer(GUEST, "t", owner=False)) == []
    assert seen(Issuer(GUEST, "", owner=False)) == [], "those that no token made are nobody's but an owner's"
    first, _, last = db.shares("ada", OWNER, NOW + 1)
    assert (first.name, first.agent, first.mode, first.device, first.label) == ("work", "bash", "watch", None, None)
    assert (first.uid, first.issuer, first.expires) == (work.uid, MINE, NOW + DAY)
    assert (last.uid, last.name, last.agent, last.device, last.label) == (None, None, None, GUEST, "phone")


def came(db: Store, number: int, device: DeviceId, ticket: bytes) -> AttachmentId:
    """An attachment that a CONNECT made, with a share ticket or without one."""
    attachment = attach(db, number, device)
    db.add_attachment(attachment, number, device, "drive", False, NOW, ticket=ticket)
    db.remember_request(device, attachment, number, attachment, NOW)
    return attachment


def test_an_ended_ticket_takes_with_it_what_came_by_it_and_nothing_else(db: Store) -> None:
    here, there = make(db).number, make(db).number
    ended, other, theirs = bound(db), bound(db), share(db)
    db.redeem_ticket(theirs, OTHER, NOW)
    gone = [came(db, here, GUEST, ended), came(db, there, GUEST, ended)]
    kept = [came(db, here, GUEST, other), came(db, here, GUEST, b""), came(db, here, OTHER, theirs)]
    assert db.end_ticket("bob", ended) == [], "another tenant's"
    assert held(db, [ended]) == [True]
    assert sorted(db.end_ticket("ada", ended)) == sorted(zip(gone, (here, there), strict=True))
    assert db.end_ticket("ada", ended) == []
    for _ in range(2):
        assert held(db, [ended, other, theirs]) == [False, True, True]
        assert db.redeem_ticket(ended, GUEST, NOW) is None
        assert [db.attachment(each) is not None for each in gone + kept] == [False] * 2 + [True] * 3
        asked = zip([GUEST] * 4 + [OTHER], gone + kept, strict=True)
        found = [db.find_request(device, request, NOW) for device, request in asked]
        assert [row is not None for row in found] == [False] * 2 + [True] * 3
        db = again(db)
    db.close()


def test_an_attachment_that_came_anew_by_a_token_outlives_the_ticket(db: Store) -> None:
    number, ended = make(db).number, bound(db)
    attachment = came(db, number, GUEST, ended)
    db.add_attachment(attachment, number, GUEST, "drive", False, NOW)
    assert db.end_ticket("ada", ended) == []
    assert db.attachment(attachment) is not None


def test_one_that_nobody_used_ends_alone(db: Store) -> None:
    number, ended = make(db).number, share(db)
    attachment = came(db, number, GUEST, bound(db))
    assert db.end_ticket("ada", ended) == []
    assert held(db, [ended]) == [False]
    assert db.attachment(attachment) is not None


@pytest.mark.parametrize("what", ["session", "all"])
def test_attachments_from_before_end_with_every_ticket_that_may_have_let_them_in(db: Store, what: str) -> None:
    here, there = make(db).number, make(db).number
    hashed = os.urandom(32)
    db.add_ticket(hashed, "ada", here if what == "session" else None, "*", "drive", NOW + DAY, NOW)
    db.redeem_ticket(hashed, GUEST, NOW)
    old = [came(db, here, GUEST, b"t"), came(db, there, GUEST, b"t"), came(db, here, OTHER, b"t")]
    db._db.write("UPDATE attachments SET ticket = x''")
    token = came(db, here, GUEST, b"")
    db.end_ticket("ada", hashed)
    assert [db.attachment(each) is None for each in (*old, token)] == [True, what == "all", False, False]


def test_what_is_synced_is_on_the_disk_when_that_returns(db: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, list[tuple[str, int]]()

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    db.end_ticket("ada", share(db))
    assert synced == []
    db.sync()
    assert synced == [(os.path.realpath(db.path) + "-wal", db.wal_bytes())]
    monkeypatch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StorageError, match="after a power failure, look again"):
        db.sync()


# ---- files from before ---------------------------------------------------------------------------------------------


def test_a_file_made_before_tickets_had_an_issuer_gets_what_it_lacks(db: Store) -> None:
    number = make(db).number
    came_by_link, came_by_token = attach(db, number, GUEST), attach(db, number, MINE)
    known = {
        table: db._db.all("SELECT name FROM pragma_table_info(?)", (table,)) for table in ("tickets", "attachments")
    }
    index = "SELECT sql FROM sqlite_master WHERE name = 'tickets_token'"
    assert db._db.all(index)
    hashed = bound(db)
    db._db.write("DROP INDEX tickets_token")
    for column in ("issuer", "token", "until"):
        db._db.write(f"ALTER TABLE tickets DROP COLUMN {column}")
    for column in ("guest", "ticket"):
        db._db.write(f"ALTER TABLE attachments DROP COLUMN {column}")
    untils = []
    for _ in range(2):
        db = again(db)
        for table, columns in known.items():
            assert db._db.all("SELECT name FROM pragma_table_info(?)", (table,)) == columns
        assert db._db.all(index)
        found = [db.attachment(attachment) for attachment in (came_by_link, came_by_token)]
        assert [row is not None and row.guest for row in found] == [True, False]
        untils += db._db.all("SELECT until FROM tickets")
    (until,) = untils[0]
    assert untils[1] == (until,), "opened again, nothing changes"
    assert abs(until - KEPT - time.time_ns()) < 60 * SECOND
    ticket = db.redeem_ticket(hashed, GUEST, NOW + 20 * DAY)
    assert ticket is not None
    assert ticket.expires == NOW + 20 * DAY + KEPT
    # Its clock is this machine's.
    db._db.write("UPDATE tickets SET expires = ?", (until,))
    for now in (until - KEPT, until - 1):
        ticket = db.redeem_ticket(hashed, GUEST, now)
        assert ticket is not None
        assert ticket.expires == until
    assert db.redeem_ticket(hashed, GUEST, until) is None
    db.close()


def test_an_attachment_says_how_its_device_came(db: Store) -> None:
    number = make(db).number
    attachment = attach(db, number)
    for guest in (True, False, True):
        db.add_attachment(attachment, number, MINE, "drive", False, NOW, ticket=b"t" * 32 if guest else b"")
        row = db.attachment(attachment)
        assert row is not None
        assert row.guest is guest
