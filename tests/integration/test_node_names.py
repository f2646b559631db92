"""Whose session a name reaches: never that of another agent, or one that is only called as another's uid is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sterna.cli import target
from sterna.client.calls import pick
from sterna.client.session import Wish
from sterna.errors import Code, RefusedError
from sterna.protocol.messages import Accept, Error
from tests.e2e.raw_client import Raw, Site
from tests.e2e.rig import Rig

pytestmark = pytest.mark.xdist_group("node-names")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Rig() as rig:
        for agent in ("echo", "other", "echo-2", "echo-4"):
            rig.start_pod(agent, "cat", kind="stream")
        rig.start_node()
        yield Site(rig)


@pytest.fixture
def raw(site: Site) -> Iterator[Raw]:
    """A connection; the sessions that a test made are closed after it."""
    with site.client() as raw:
        raw.connect(want="call")
        yield raw
        for session in raw.call("list")["sessions"]:
            raw.call("close", session=session["uid"])


_handle = iter(range(2, 10_000))


def begin(raw: Raw, **changes: Any) -> Accept | Error:
    answer = raw.ask(next(_handle), **changes)
    assert isinstance(answer, Accept | Error)
    return answer


def name(raw: Raw, **changes: Any) -> str:
    answer = begin(raw, **changes)
    assert isinstance(answer, Accept), answer
    return answer.name


def code(raw: Raw, **changes: Any) -> Code:
    answer = begin(raw, **changes)
    assert isinstance(answer, Error), answer
    assert answer.message.endswith("."), answer
    return Code(answer.code)


# ---- names that sessions get -----------------------------------------------------------------------------------


def test_names_that_the_node_chooses_are_no_other_agents(raw: Raw) -> None:
    assert [name(raw) for _ in range(4)] == ["echo", "echo-3", "echo-5", "echo-6"]
    assert [name(raw, agent="echo-2") for _ in range(2)] == ["echo-2", "echo-2-2"]
    shown = {(session["name"], session["agent"]) for session in raw.call("list")["sessions"]}
    assert shown == {(n, "echo") for n in ("echo", "echo-3", "echo-5", "echo-6")} | {
        (n, "echo-2") for n in ("echo-2", "echo-2-2")
    }


@pytest.mark.parametrize("want", ["new", "named"])
def test_a_name_that_is_another_agents_is_refused(raw: Raw, want: str) -> None:
    assert code(raw, want=want, name="other") == Code.EXISTS
    assert raw.call("list")["sessions"] == [], "nothing of it is left"
    assert name(raw, want=want, name="echo") == "echo", "an agent's own sessions may be called so"
    assert name(raw, agent="other", want=want, name="other") == "other"
    assert name(raw) == "echo-3"


@pytest.mark.parametrize("want", ["new", "named"])
def test_a_name_that_reads_as_a_uid_is_refused(raw: Raw, want: str) -> None:
    victim = begin(raw)
    assert isinstance(victim, Accept)
    assert code(raw, want=want, name=victim.uid.hex()) == Code.BAD_REQUEST
    assert code(raw, want=want, name=os.urandom(16).hex().upper()) == Code.BAD_REQUEST


def test_a_session_cannot_be_renamed_to_another_agent_or_a_uid(raw: Raw) -> None:
    assert name(raw) == "echo"
    mine = name(raw, name="mine")
    for wrong in ("other", "echo-2", os.urandom(16).hex()):
        refused = raw.call("rename", session=mine, name=wrong)
        assert isinstance(refused, Error), wrong
    assert raw.call("rename", session="echo", name="free") == {"name": "free"}
    assert raw.call("rename", session=mine, name="echo") == {"name": "echo"}


def test_an_agent_called_as_a_uid_is_gives_its_sessions_other_names(site: Site) -> None:
    agent = os.urandom(16).hex()
    site.rig.start_pod(agent, "cat", kind="stream")
    with site.client() as raw:
        raw.connect(want="call")
        while agent not in [known["name"] for known in raw.call("list")["agents"]]:
            time.sleep(0.02)
        assert [name(raw, agent=agent) for _ in range(2)] == [f"{agent}-2", f"{agent}-3"]
        for number in (2, 3):
            raw.call("close", session=f"{agent}-{number}")


# ---- names that clients look up --------------------------------------------------------------------------------


def listed(name: str, agent: str, *, uid: str = "", state: str = "active", changed: int = 1) -> dict[str, Any]:
    uid = uid or os.urandom(16).hex()
    return {"name": name, "agent": agent, "uid": uid, "state": state, "changed": changed, "attached": 0, "reason": "",
            "status": None, "signal": None}  # fmt: skip


def test_pick_goes_by_uid_then_by_the_agents_own_name() -> None:
    squatter, first, later = listed("main", "evil"), listed("work", "main"), listed("main-2", "main", changed=2)
    liar = listed(first["uid"], "evil")
    sessions = [liar, squatter, first, later]
    assert pick(sessions, first["uid"]) is first
    assert pick(sessions, "main") is later, "the session of the agent so called"
    own = listed("main", "main", state="exited")
    assert pick([first, later, own], "main") is own, "the agent's session so called"
    assert pick(sessions, "work") is first
    assert pick(sessions, "main-2") is later


def test_pick_types_into_no_other_agents_program() -> None:
    squatter = listed("main", "evil")
    assert pick([squatter], "main") is squatter, "nobody else is so called"
    with pytest.raises(RefusedError, match="give its uid") as caught:
        pick([squatter], "main", [{"name": "main"}])
    assert caught.value.code == Code.NOT_FOUND
    with pytest.raises(RefusedError, match="no session or agent"):
        pick([squatter], "nobody", [{"name": "main"}])


def test_attach_goes_by_uid_before_agents_and_names() -> None:
    victim, liar = listed("work", "main"), listed("x", "evil")
    liar["name"] = victim["uid"]
    wish = target._meant(victim["uid"], [liar, victim], [{"name": "main"}, {"name": victim["uid"]}])
    assert (wish.want, wish.uid) == ("join", bytes.fromhex(victim["uid"]))
    wish = target._meant("main", [listed("main", "evil"), victim], [{"name": "main"}])
    assert (wish.want, wish.agent) == ("latest", "main")


def test_a_line_of_the_list_is_chosen_by_its_number_first(monkeypatch: pytest.MonkeyPatch) -> None:
    liar, second = listed("2", "evil", changed=9), listed("work", "main", changed=8)
    for typed, meant in ((b"2\n", second), (b"work\n", second), (b"1\n", liar), (b"\n", liar)):
        out, into = os.pipe()
        os.write(into, typed)
        os.close(into)
        with open(out, encoding="utf-8") as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)
            wish = target._ask([liar, second], [{"name": "main"}])
        assert isinstance(wish, Wish)
        assert wish.uid == bytes.fromhex(meant["uid"]), typed


def test_send_to_an_agent_reaches_no_session_of_another(site: Site, raw: Raw) -> None:
    """A session may have had its name before the agent came."""
    assert name(raw, name="soon") == "soon"
    site.rig.start_pod("soon", "cat", kind="stream")
    while "soon" not in [known["name"] for known in raw.call("list")["agents"]]:
        time.sleep(0.02)
    refused = site.rig.sterna("send", "soon", "secret")
    assert refused.returncode != 0
    assert "another agent's" in refused.stderr
    of_agent = name(raw, agent="soon")
    assert of_agent == "soon-2"
    assert site.rig.json("info", "soon")["agent"] == "soon"
