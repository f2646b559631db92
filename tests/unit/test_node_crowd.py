"""Connections of tenants and links: how many each may have, and that what ended is not counted."""

from __future__ import annotations

import pytest

from sterna import limits
from sterna.errors import Code, RefusedError
from sterna.ids import DeviceId
from sterna.node.crowd import Crowd

GUEST, OTHER = DeviceId(b"g" * 32), DeviceId(b"o" * 32)


def fill(crowd: Crowd, tenant: str, guest: DeviceId | None = None) -> tuple[list[object], RefusedError]:
    """Admits connections until one is refused; returns those, and the refusal."""
    admitted: list[object] = []
    while True:
        connection = object()
        try:
            crowd.admit(connection, tenant, guest)
        except RefusedError as error:
            return admitted, error
        admitted.append(connection)


def test_no_tenant_takes_all_connections() -> None:
    crowd = Crowd(9_000)
    greedy, error = fill(crowd, "greedy")
    assert (len(greedy), error.code) == (8_000, Code.BUSY)
    assert error.retry_after
    crowd.admit(greedy[0], "greedy", None)  # it is there already
    ada, _ = fill(crowd, "ada")
    assert 800 <= len(ada) < 1_000
    bob, _ = fill(crowd, "bob")
    assert len(bob) > 50
    for connection in (*greedy[:4_000], *ada, *bob):
        crowd.gone(connection)
        crowd.gone(connection)
    assert len(fill(crowd, "greedy")[0]) == 4_000
    for connection in greedy:
        crowd.gone(connection)


@pytest.mark.parametrize("most", [1, 2, 9, 10, 17, 18, 100])
def test_the_share_is_exact(most: int) -> None:
    """Eight ninths of what is there, then of what that leaves."""
    crowd = Crowd(most)
    for tenant in ("greedy", "ada"):
        admitted, _ = fill(crowd, tenant)
        assert len(admitted) == limits.SHARE_TIMES_FREE * most // (limits.SHARE_TIMES_FREE + 1)
        most -= len(admitted)


def test_a_link_has_only_so_many_and_a_connection_is_counted_once() -> None:
    crowd = Crowd(9_000)
    guests, error = fill(crowd, "ada", GUEST)
    assert (len(guests), error.code) == (limits.GUEST_CONNECTIONS_MAX, Code.LIMIT)
    crowd.admit(guests[0], "ada", GUEST)
    crowd.admit(guests[0], "bob", OTHER)
    crowd.gone(guests[0])
    crowd.admit(object(), "ada", GUEST)
    with pytest.raises(RefusedError):
        crowd.admit(object(), "ada", GUEST)
    assert len(fill(crowd, "ada", OTHER)[0]) == limits.GUEST_CONNECTIONS_MAX
    for connection in (*guests,):
        crowd.gone(connection)
    assert GUEST in crowd._counts, "the one that came later"
