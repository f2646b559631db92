"""The brake on failures: what it counts, and what a blocked address may still try."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sterna import limits
from sterna.errors import Code
from sterna.ids import NodeId
from sterna.node.doorkeeper import Doorkeeper
from sterna.transport.places import place
from sterna.units import SECOND

NOW = 5 * SECOND


def door() -> Doorkeeper:
    return Doorkeeper(NodeId(b"N" * 32), cast("Any", None), cast("Any", SimpleNamespace(revoked_tokens=set)))


def test_a_blocked_address_has_twenty_proofs_a_second_checked() -> None:
    keeper = door()
    for _ in range(limits.FAILURES_PER_MINUTE_MAX):
        assert not keeper.blocked("one", NOW)
        keeper.failed("one", NOW)
    assert keeper.blocked("one", NOW)
    most = limits.PROOFS_PER_SECOND_MAX
    assert [keeper.admits("one", NOW + i) for i in range(most + 5)] == [True] * most + [False] * 5
    assert keeper.admits("two", NOW)
    assert keeper.admits("one", NOW + SECOND)


def test_addresses_of_one_ipv6_network_are_counted_together() -> None:
    keeper = door()
    for number in range(limits.FAILURES_PER_MINUTE_MAX):
        keeper.failed(f"2001:db8:1:2::{number:x}", NOW)
        keeper.failed(f"::ffff:192.0.2.{number}", NOW)
    assert keeper.blocked("2001:db8:1:2:ffff::1", NOW)
    assert not keeper.blocked("2001:db8:1:3::1", NOW)
    assert not keeper.blocked("::ffff:192.0.2.1", NOW), "those of IPv4 are no network"
    most = limits.PROOFS_PER_SECOND_MAX
    admitted = [keeper.admits(f"2001:db8:1:2::{number:x}", NOW) for number in range(most + 5)]
    assert admitted == [True] * most + [False] * 5


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("local", "local"), ("", ""),
        ("2001:db8::1", "2001:0db8:0000:0000::/64"), ("fe80::1%eth0", "fe80:0000:0000:0000::/64"),
    ],
)  # fmt: skip
def test_what_an_address_is_counted_as(address: str, counted: str) -> None:
    assert place(address) == counted


def test_failures_of_many_addresses_are_logged_once_a_second_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    keeper = door()
    with caplog.at_level(logging.WARNING):
        for number in range(5_000):
            keeper.failed(f"2001:db8:{number:x}::1", NOW, Code.EXPIRED)
        burst = len(caplog.records)
        assert burst <= 60
        assert (caplog.records[0].__dict__["peer"], caplog.records[0].__dict__["code"]) == ("2001:db8:0::1", "EXPIRED")
        for second in range(1, 11):
            for number in range(500):
                keeper.failed(f"2001:db8:{number:x}::1", NOW + second * SECOND)
        keeper.sum_up(NOW + 10 * SECOND)
        assert burst + 9 <= len(caplog.records) <= burst + 11
        keeper.sum_up(NOW + 12 * SECOND)
        keeper.sum_up(NOW + 14 * SECOND)
    assert caplog.records[-1].message == "access denied to others"
    left_out = sum(record.__dict__.get("left_out", 0) for record in caplog.records)
    logged = sum("peer" in record.__dict__ for record in caplog.records)
    assert logged + left_out == keeper.denied == 10_000
