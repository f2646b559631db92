"""The brake on failures: what it counts, and what a blocked address may still try."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from sterna import limits
from sterna.ids import NodeId
from sterna.node.doorkeeper import Doorkeeper
from sterna.units import SECOND

NOW = 5 * SECOND


def test_a_blocked_address_has_twenty_proofs_a_second_checked() -> None:
    store = cast("Any", SimpleNamespace(revoked_tokens=set))
    door = Doorkeeper(NodeId(b"N" * 32), cast("Any", None), store)
    for _ in range(limits.FAILURES_PER_MINUTE_MAX):
        assert not door.blocked("one", NOW)
        door.failed("one", NOW)
    assert door.blocked("one", NOW)
    most = limits.PROOFS_PER_SECOND_MAX
    assert [door.admits("one", NOW + i) for i in range(most + 5)] == [True] * most + [False] * 5
    assert door.admits("two", NOW)
    assert door.admits("one", NOW + SECOND)
