"""What one tenant or device may take of the node's store before it makes only its own be forgotten."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sterna import limits
from sterna.ids import AttachmentId, DeviceId
from sterna.node import store
from tests.unit.test_node_store import MINE, NOW, OTHER, _db, again, attach, make

if TYPE_CHECKING:
    import pytest

    from sterna.node.store import Store

__all__ = ["_db"]


def test_the_oldest_last_screens_of_a_tenant_make_room(db: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FINALS_PER_TENANT_MAX_BYTES", 1_000)
    victim = make(db, tenant="bob").number
    db.set_final(victim, b"v" * 900)
    numbers = [make(db).number for _ in range(12)]

    def held() -> int:
        return sum(len(db.final(number)) for number in numbers)

    for count, number in enumerate(numbers):
        db.set_end(number, 34, "over", 0, None, b"lanes", NOW)
        if count == 6:
            db = again(db)
        db.set_final(number, b"s" * 200)
        db.set_final(number, b"t" * 200)
        assert held() <= 1_000
        assert db.final(number) == b"t" * 200
        assert db.lanes(number) == b"lanes"
        if count == 4:
            assert held() == 1_000
            db.close_session(numbers[0], NOW)
            db.set_final(numbers[1], b"")
            db.set_final(numbers[2], b"s" * 300)
    assert db.final(victim) == b"v" * 900
    db.purge(NOW + 1, 100)
    for number in (make(db).number for _ in range(5)):
        db.set_final(number, b"n" * 200)
        numbers.append(number)
    assert held() == 1_000, "what was forgotten counts no longer"
    db.close()


def test_a_device_with_many_attachments_makes_a_session_forget_its_own(db: Store) -> None:
    number = make(db).number
    mine = [attach(db, number, now=NOW + i) for i in range(8)]
    theirs = [attach(db, number, OTHER, now=NOW + 100 + i) for i in range(limits.ATTACHMENTS_MAX)]
    assert [i for i, other in enumerate(theirs) if db.attachment(other) is None] == list(range(8))
    assert all(db.attachment(each) is not None for each in mine)
    attach(db, number, now=NOW + 1_000)
    assert db.attachment(mine[0]) is None, "one that has few takes the place longest unused"


def test_who_connects_very_often_makes_only_its_own_requests_be_forgotten(
    db: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "REQUESTS_MAX", 50)
    attachment, first = AttachmentId(os.urandom(16)), os.urandom(16)
    db.remember_request(OTHER, first, 1, attachment, NOW)
    busy = [os.urandom(16) for _ in range(200)]
    for i, request in enumerate(busy):
        db.remember_request(MINE, request, 1, attachment, NOW + 1 + i)
    assert db.find_request(OTHER, first, NOW + 300) is not None
    known = [i for i, request in enumerate(busy) if db.find_request(MINE, request, NOW + 300) is not None]
    assert 40 <= len(known) <= 50
    assert known == list(range(200 - len(known), 200)), "the newest"
    for i in range(100):
        db.remember_request(DeviceId(bytes([i]) * 32), first, 1, attachment, NOW + 500 + i)
    assert db.find_request(DeviceId(bytes([99]) * 32), first, NOW + 700) is not None, "there is room for newcomers"


def test_a_file_made_before_an_index_came_gets_it(db: Store) -> None:
    names = "SELECT name FROM sqlite_master WHERE name LIKE 'requests_%'"
    before = sorted(db._db.all(names))
    db._db.write("DROP INDEX requests_device")
    db = again(db)
    assert sorted(db._db.all(names)) == before
    db.close()
