"""What a token does not allow: nobody gets more than was given, and only the node's own user rules over tokens."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.client.blocking import connect
from sterna.client.calls import Caller
from sterna.client.endpoint import Endpoint, find
from sterna.errors import Code, RefusedError
from sterna.ids import SessionUid
from sterna.trust.links import ShareLink
from tests.e2e.rig import Rig


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        rig.start_pod("cat", "cat", kind="stream")
        rig.start_node()
        rig.sterna("new", "--name", "mine")
        yield rig


@pytest.fixture
def elsewhere() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="st-") as directory:
        os.chmod(directory, 0o700)
        yield directory


def token(rig: Rig, *flags: str) -> str:
    text: str = rig.json("token", *flags)["token"]
    return text


def reach(rig: Rig, state: str, credential: str) -> Endpoint:
    return find(state=state, host="127.0.0.1", port=rig.port, token=credential)


def refused(endpoint: Endpoint, state: str, method: str, **params: object) -> RefusedError:
    with Caller(endpoint, state=state) as caller, pytest.raises(RefusedError) as error:
        caller.call(method, **params)
    return error.value


WEAK = {
    "watching": ["--modes", "watch"],
    "one agent": ["--agents", "cat"],
    "none": ["--agents", "none*", "--modes", "watch", "--ttl", "60s"],
    "another tenant": ["--tenant", "other"],
}


@pytest.mark.parametrize("flags", WEAK.values(), ids=WEAK)
def test_no_token_makes_another_one_nor_ends_one_nor_stops_the_node(rig: Rig, elsewhere: str, flags: list[str]) -> None:
    endpoint = reach(rig, elsewhere, token(rig, *flags))
    for method, params in (("token", {}), ("drain", {}), ("revoke", {"token": "0" * 32})):
        assert refused(endpoint, elsewhere, method, **params).code == Code.DENIED
    assert rig.sterna("ls").returncode == 0


@pytest.mark.parametrize("name", ["watching", "one agent", "none"])
def test_a_token_for_less_than_the_tenant_neither_sees_nor_revokes_its_devices(
    rig: Rig, elsewhere: str, name: str
) -> None:
    endpoint = reach(rig, elsewhere, token(rig, *WEAK[name]))
    assert refused(endpoint, elsewhere, "devices").code == Code.DENIED
    ours = next(device["id"] for device in rig.json("devices")["devices"] if device["self"])
    assert refused(endpoint, elsewhere, "revoke", device=ours[:16]).code == Code.DENIED


def test_control_a_token_for_the_whole_tenant_sees_its_devices(rig: Rig, elsewhere: str) -> None:
    endpoint = reach(rig, elsewhere, token(rig))
    with Caller(endpoint, state=elsewhere) as caller:
        assert any(device["self"] for device in caller.pages("devices", "devices"))


def test_a_guest_learns_nothing_of_the_node(rig: Rig, elsewhere: str) -> None:
    endpoint = reach(rig, elsewhere, token(rig, *WEAK["another tenant"]))
    with Caller(endpoint, state=elsewhere) as caller:
        assert caller.call("node")["connections"] == 0


def test_a_token_beyond_ten_years_and_huge_numbers_are_answered(rig: Rig) -> None:
    state = str(Path(rig.state))
    endpoint = find(state=state)
    for ttl in (2**63, 2**64 - 1, -1, 11 * 365 * 86_400):
        with Caller(endpoint, state=state) as caller, pytest.raises(RefusedError) as error:
            caller.call("token", ttl=ttl)
        assert error.value.code in (Code.BAD_REQUEST, Code.BAD_PAYLOAD)


def test_many_devices_come_in_pages(rig: Rig) -> None:
    credential = token(rig)
    with tempfile.TemporaryDirectory(prefix="st-") as base:
        for number in range(105):
            state = Path(base, str(number))
            state.mkdir(mode=0o700)
            with Caller(reach(rig, str(state), credential), state=str(state)) as caller:
                caller.call("node")
    assert len(rig.json("devices")["devices"]) > 105


def test_a_watcher_displaces_nobody(rig: Rig, elsewhere: str) -> None:
    ours = str(Path(rig.state))
    with connect("cat", name="held", state=ours) as driver:
        driver.write(b"one")
        assert driver.read() == b"one"
        node = find(state=ours)
        with Caller(node, state=ours) as caller:
            shared = caller.call("share", session="held", mode="watch")
        link = ShareLink(
            "127.0.0.1", rig.port, ticket=shared["ticket"], node_id=node.node_id, mode="watch",
            session=SessionUid(bytes.fromhex(shared["session"])), agent="cat",
        ).terminal()  # fmt: skip
        with connect(link=link, state=elsewhere, mode="watch", displace=True):
            driver.write(b"two")
            assert driver.read() == b"two"
