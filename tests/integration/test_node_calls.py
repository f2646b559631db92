"""What a CALL costs is bounded by what it answers, not by what the tenant has."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sterna.clock import SYSTEM_CLOCK
from sterna.errors import Code
from sterna.ids import DeviceId, SessionUid
from sterna.node import calls
from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.node.doorkeeper import Visitor
from sterna.node.schema import Issuer
from sterna.node.store import DEVICES_PER_TENANT_MAX, SessionRow
from sterna.node.tickets import TICKETS_PER_TENANT_MAX
from sterna.protocol import messages
from sterna.protocol.messages import Call, Error, Mode
from sterna.protocol.states import State
from sterna.units import SECOND

OWNER = DeviceId(b"o" * 32)
SESSIONS = 300


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    os.mkdir(tmp_path / "sockets", 0o700)
    node = Node(NodeConfig(port=0, state=str(tmp_path / "node"), sockets=str(tmp_path / "sockets")))
    try:
        yield node
    finally:
        await node.close()


def begin(node: Node, tenant: str = "ada", agent: str = "bash") -> SessionRow:
    return node.store.create_session(
        uid=SessionUid(os.urandom(16)), log_id=1, tenant=tenant, agent=agent, name=None, kind="pty", owner=OWNER, now=1
    )


def visitor(session: SessionRow | None = None, mode: Mode = "drive") -> Visitor:
    """The owner of the tenant `ada`, or somebody with a share ticket for one session."""
    found = Visitor("ada", OWNER, b"k" * 33, ("*",) if session is None else (session.agent,), frozenset((mode,)))
    if session is not None:
        found.session, found.ticket = session.number, b"t" * 32
    return found


def ask(node: Node, who: Visitor, method: str, **params: Any) -> Any:
    packed = msgspec.Raw(messages.pack(params))
    result = node.calls.answer(None, who, Call(1, method, packed), 0)  # type: ignore[arg-type]  # no connection
    return result.error if result.error is not None else msgspec.msgpack.decode(result.value)


def counted(monkeypatch: pytest.MonkeyPatch, node: Node, method: str, size: Callable[[Any], int]) -> list[int]:
    """How much each call of a method of the store returned."""
    real, sizes = getattr(node.store, method), list[int]()

    def count(*args: Any, **more: Any) -> Any:
        value = real(*args, **more)
        sizes.append(size(value))
        return value

    monkeypatch.setattr(node.store, method, count)
    return sizes


async def test_a_guests_list_reads_its_one_session(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with node.store.transaction():
        rows = [begin(node) for _ in range(SESSIONS)]
    shared = rows[SESSIONS // 2]
    lists = counted(monkeypatch, node, "sessions", len)
    single = counted(monkeypatch, node, "session", lambda _row: 1)
    page = ask(node, visitor(shared), "list")
    assert ([session["uid"] for session in page["sessions"]], page["next"]) == ([shared.uid.hex()], 0)
    assert ask(node, visitor(shared, "watch"), "list", agent="bash")["sessions"] == page["sessions"]
    assert ask(node, visitor(shared), "list", agent="other")["sessions"] == []
    assert ask(node, visitor(shared), "list", after=shared.number)["sessions"] == []
    assert (sum(lists), sum(single)) == (0, 4)
    node.store.close_session(shared.number, 2)
    assert ask(node, visitor(shared), "list")["sessions"] == []
    node.store.purge(3)
    assert ask(node, visitor(shared), "list") == {"sessions": [], "agents": [], "next": 0}


async def test_a_guest_of_one_tenant_sees_no_session_of_another(node: Node) -> None:
    foreign = begin(node, tenant="bob")
    assert ask(node, visitor(foreign), "list")["sessions"] == []
    assert ask(node, visitor(), "info", session=foreign.uid.hex()).code == Code.NOT_FOUND


async def test_an_owners_list_comes_in_pages(node: Node) -> None:
    with node.store.transaction():
        rows = [begin(node) for _ in range(SESSIONS)]
    found, after = [], 0
    while True:
        page = ask(node, visitor(), "list", after=after)
        found += [session["uid"] for session in page["sessions"]]
        after = page["next"]
        if not after:
            break
    assert found == [row.uid.hex() for row in rows]


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 250])
async def test_devices_come_in_pages_and_no_more_are_read_than_that_takes(
    node: Node, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    devices = [DeviceId(os.urandom(32)) for _ in range(count)]
    with node.store.transaction():
        for seen, device in enumerate(devices):
            node.store.put_device(device, b"k" * 33, "ada", "", seen)
    read = counted(monkeypatch, node, "devices", len)
    found, after = [], 0
    while True:
        page = ask(node, visitor(), "devices", after=after)
        assert read.pop() <= after + calls._PAGE + 1
        found += [device["id"] for device in page["devices"]]
        after = page["next"]
        if not after:
            break
        assert len(page["devices"]) == calls._PAGE
    assert found == [device.hex() for device in reversed(devices)]


@pytest.mark.parametrize("after", [-1, -(2**63), DEVICES_PER_TENANT_MAX, 2**63 - 1])
async def test_no_page_of_devices_is_out_of_bounds(node: Node, after: int) -> None:
    node.store.put_device(OWNER, b"k" * 33, "ada", "", 1)
    page = ask(node, visitor(), "devices", after=after)
    assert [device["self"] for device in page["devices"]] == ([True] if after < 0 else [])
    assert page["next"] == 0


@pytest.mark.parametrize("count", [0, 1, 100, 101, 250])
async def test_links_come_in_pages_and_no_more_are_read_than_that_takes(
    node: Node, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    hashes = sorted(os.urandom(32) for _ in range(count))
    wall = SYSTEM_CLOCK.wall()
    with node.store.transaction():
        for hashed in hashes:
            node.store.add_ticket(hashed, "ada", None, "*", "drive", wall + 60 * SECOND, wall)
    read = counted(monkeypatch, node, "shares", len)
    found, after = [], 0
    while True:
        page = ask(node, visitor(), "shares", after=after)
        assert read.pop() <= calls._PAGE + 1
        found += [share["id"] for share in page["shares"]]
        after = page["next"]
        if not after:
            break
        assert len(page["shares"]) == calls._PAGE
    assert found == [hashed.hex()[:16] for hashed in hashes]
    for wrong in (-1, -(2**63)):
        page = ask(node, visitor(), "shares", after=wrong)
        assert [each["id"] for each in page["shares"]] == found[: calls._PAGE]
        assert page["next"] == (calls._PAGE if count > calls._PAGE else 0)
    for wrong in (TICKETS_PER_TENANT_MAX, 2**63 - 1):
        assert ask(node, visitor(), "shares", after=wrong) == {"shares": [], "next": 0}


async def test_a_beginning_that_two_links_have_ends_neither(node: Node) -> None:
    wall = SYSTEM_CLOCK.wall()
    for last in (b"\x01", b"\x02"):
        node.store.add_ticket(b"\xab" * 7 + last * 25, "ada", None, "*", "drive", wall + SECOND * 60, wall)
    assert ask(node, visitor(), "unshare", id="ab" * 7).code == Code.NOT_FOUND
    assert len(node.store.shares("ada", Issuer(), wall)) == 2
    assert ask(node, visitor(), "unshare", id="ab" * 7 + "01")["id"] == "ab" * 7 + "01"
    assert [row.hash[7] for row in node.store.shares("ada", Issuer(), wall)] == [2]


async def test_a_device_that_is_named_in_full_is_looked_up_directly(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, near = DeviceId(b"\xab" * 32), DeviceId(b"\xab" * 31 + b"\xac")
    for device in (other, near):
        node.store.put_device(device, b"k" * 33, "ada", "", 1)
    read = counted(monkeypatch, node, "devices", len)
    for wrong in ("", "ab", "abababab", "AB" * 32, "cd" * 32, "ab" * 31):
        refused = ask(node, visitor(), "revoke", device=wrong)
        assert isinstance(refused, Error), wrong
        assert refused.code == Code.NOT_FOUND
    read.clear()
    assert ask(node, visitor(), "revoke", device=other.hex()) == {"device": other.hex()}
    assert not read
    assert ask(node, visitor(), "revoke", device=near.hex()[:-1]).code == Code.NOT_FOUND, "more than one"
    assert ask(node, visitor(), "revoke", device="ab" * 31 + "ac") == {"device": near.hex()}
    assert [row.revoked for row in node.store.devices("ada")] == [True, True]


async def test_a_uid_is_looked_up_before_a_name(node: Node) -> None:
    """A name that reads as a uid may be there from before such names were refused."""
    victim, liar = begin(node), begin(node)
    node.store._db.write("UPDATE sessions SET name = ? WHERE number = ?", (victim.uid.hex(), liar.number))
    for written in (victim.uid.hex(), victim.uid.hex().upper()):
        assert ask(node, visitor(), "info", session=written)["uid"] == victim.uid.hex()
    assert ask(node, visitor(), "close", session=victim.uid.hex()) == {"name": victim.name}


async def test_nobody_is_attached_to_a_session_that_is_not_in_memory(node: Node) -> None:
    """Its row is of a node that was killed: whoever was attached then has not come back."""
    row = begin(node)
    node.store.set_state(row.number, State.ACTIVE, 2)
    (session,) = ask(node, visitor(), "list")["sessions"]
    assert (session["state"], session["attached"]) == ("suspended", 0)
    about = ask(node, visitor(), "info", session=row.uid.hex())
    assert (about["state"], about["attachments"]) == ("suspended", [])
