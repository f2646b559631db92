"""What a node lets those do that came by a link, or whose access is over: however they come back."""

from __future__ import annotations

import asyncio
import functools
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sterna import limits
from sterna.errors import Code
from sterna.node import clients
from sterna.node.app import Node
from sterna.protocol.frame import Type
from sterna.protocol.messages import Accept, Call, Error, Resumed
from sterna.trust.device import DeviceKey
from sterna.trust.tickets import ticket_hash
from tests.e2e.raw_client import Raw, Site, new_device
from tests.e2e.rig import Rig
from tests.integration.test_node_crowds import running, until


@pytest.fixture
def directory() -> Iterator[Path]:
    # A Unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="st-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def node(directory: Path) -> AsyncIterator[Node]:
    async with running(directory) as node:
        yield node


@pytest.fixture
def site(node: Node, directory: Path) -> Site:
    return Site(cast("Rig", SimpleNamespace(state=directory, port=node.address[1])))


def caller(site: Site, token: str = "", device: DeviceKey | None = None, *, local: bool = False) -> Raw:
    """A connection that may CALL."""
    raw = site.client(credential=token or None, device=device, local=local)
    raw.connect(want="call", agent="", mode="watch")
    return raw


def ticket(site: Site, name: str) -> str:
    """A link for a session, made by the node's own user."""
    with site.client() as owner:
        owner.connect(name=name, want="named")
        text: str = owner.call("share", session=name, mode="watch", ttl=600)["ticket"]
    return text


def joined(raw: Raw, name: str) -> tuple[Accept, bytes]:
    """Watches a session; returns what to come back with."""
    body = raw.connect_body(want="join", name=name, mode="watch", exact=False)
    raw.send(Type.CONNECT, 1, 0, raw.signed(body))
    accept = raw.answer(1)
    assert isinstance(accept, Accept), accept
    return accept, body.attachment


def refusal(raw: Raw) -> Code | None:
    """How somebody who asks for no session is answered."""
    answer = raw.ask(1, want="call", agent="", mode="watch")
    raw.close()
    return Code(answer.code) if isinstance(answer, Error) else None


# ---- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["there", "gone"])
async def test_a_guest_that_resumes_has_no_more_connections_than_one_that_connects(
    node: Node, site: Site, link: str
) -> None:
    def attack() -> None:
        device = new_device()
        first = site.client(credential=ticket(site, "shared"), device=device)
        kept, (accept, attachment) = [first], joined(first, "shared")
        if link == "gone":
            asyncio.run_coroutine_threadsafe(forget(), loop).result()
        for number in range(1, limits.GUEST_CONNECTIONS_MAX * 2):
            kept.append(site.client(device=device))
            assert isinstance(kept[-1].resume(1, accept, attachment), Resumed)
            assert len(node.connections) == min(number, limits.GUEST_CONNECTIONS_MAX - 1) + 1
        assert kept[-1].alive()
        assert kept[-2].ended(), "it is the one that it left"
        kept[-1].send(Type.SUSPEND, 1)
        kept[-1].until(Type.SUSPEND)
        kept.append(site.client(device=device))
        answer = kept[-1].resume(1, accept, attachment)
        assert isinstance(answer, Error)
        assert (answer.code, answer.retry_after) == (Code.BUSY, 5.0), "it may come again"
        for raw in kept:
            raw.close()

    async def forget() -> None:
        node.store._db.write("DELETE FROM tickets")

    loop = asyncio.get_running_loop()
    await asyncio.to_thread(attack)


async def test_a_guest_that_comes_back_keeps_what_else_is_on_its_connection(node: Node, site: Site) -> None:
    def come_back() -> None:
        device = new_device()
        link = ticket(site, "shared")
        kept = [site.client(credential=link, device=device) for _ in range(limits.GUEST_CONNECTIONS_MAX)]
        accept, attachment = joined(kept[0], "shared")
        assert isinstance(kept[0].ask(2, want="join", name="shared", mode="watch"), Accept)
        for raw in kept[1:]:
            raw.connect(want="call", agent="", mode="watch")
        with site.client(device=device) as late:
            answer = late.resume(1, accept, attachment)
        assert isinstance(answer, Error)
        assert answer.code == Code.BUSY
        assert all(raw.alive() for raw in kept)
        for raw in kept:
            raw.close()

    await asyncio.to_thread(come_back)


async def test_who_came_by_a_token_resumes_on_more(site: Site) -> None:
    def come_back() -> None:
        ticket(site, "mine")
        device = new_device()
        kept = [site.client(device=device)]
        accept, attachment = joined(kept[0], "mine")
        for _ in range(limits.GUEST_CONNECTIONS_MAX + 1):
            kept.append(site.client(device=device))
            assert isinstance(kept[-1].resume(1, accept, attachment), Resumed)
        for raw in kept:
            raw.close()

    await asyncio.to_thread(come_back)


async def test_connections_that_a_revoked_device_resumed_on_end(node: Node, site: Site) -> None:
    def attack() -> None:
        device, other = new_device(), new_device()
        first = site.client(credential=ticket(site, "shared"), device=device)
        accept, attachment = joined(first, "shared")
        neighbour = site.client(device=other)
        theirs = joined(neighbour, "shared")
        kept = [site.client(device=device) for _ in range(4)]
        kept[0].device = other
        assert isinstance(kept[0].ask(1, want="call", agent=""), Accept)
        kept[0].device = device
        for raw in kept:
            assert isinstance(raw.resume(2, accept, attachment), Resumed)
        back = site.client(device=other)
        assert isinstance(back.resume(1, *theirs), Resumed)
        back.device = device
        assert isinstance(back.resume(2, accept, attachment), Resumed)
        with caller(site, local=True) as admin:
            assert admin.call("revoke", device=device.id.hex()) == {"device": device.id.hex()}
            assert all(raw.ended() for raw in [first, *kept[1:]])
            assert back.code(2) == Code.REVOKED
            assert back.alive(), "somebody else is attached on it"
            assert kept[0].alive(), "somebody else is on it too"
        for raw in (first, neighbour, back, *kept):
            raw.close()

    await asyncio.to_thread(attack)


async def test_a_connection_that_is_of_no_use_any_more_ends(
    node: Node, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_UNUSED_SECONDS", 0.1)

    def attack() -> list[Raw]:
        device = new_device()
        first = site.client(device=device)
        body = first.connect_body(name="mine", want="named", exact=False)
        first.send(Type.CONNECT, 1, 0, first.signed(body))
        accept = first.answer(1)
        assert isinstance(accept, Accept)
        displaced, resumed = site.client(device=device), site.client(device=device)
        for raw in (displaced, resumed):
            assert isinstance(raw.resume(1, accept, body.attachment), Resumed)
        assert displaced.code(1) == Code.DISPLACED
        assert displaced.code() == Code.TIMEOUT
        assert displaced.ended()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            assert resumed.alive(), "something is attached"
            assert first.alive(), "it may make CALLs"
        resumed.send(Type.SUSPEND, 1)
        assert resumed.code() == Code.TIMEOUT
        assert resumed.ended()
        return [first, displaced, resumed]

    for raw in await asyncio.to_thread(attack):
        raw.close()
    await until(lambda: not node.connections)


async def test_what_looks_after_a_connection_ends_with_it(node: Node, site: Site) -> None:
    def come_and_go() -> None:
        device = new_device()
        with site.client(device=device) as first:
            body = first.connect_body(name="mine", want="named", exact=False)
            first.send(Type.CONNECT, 1, 0, first.signed(body))
            accept = first.answer(1)
            assert isinstance(accept, Accept)
        with site.client(device=device) as raw:
            assert isinstance(raw.resume(1, accept, body.attachment), Resumed)
            timers.extend(each.timer for each in node.connections if each.timer is not None)

    timers: list[asyncio.TimerHandle] = []
    await asyncio.to_thread(come_and_go)
    await until(lambda: not node.connections)
    assert [timer.cancelled() for timer in timers] == [True]


# ---- access that is over ---------------------------------------------------------------------------------------------


async def test_nobody_whose_access_is_over_comes_back_by_links_made_before(node: Node, site: Site) -> None:
    def attack() -> None:
        revoked, lasting = site.issue("local", "*"), site.issue("local", "*")
        lent, lost, safe = new_device(), new_device(), new_device()
        raws = [caller(site, revoked, lent), caller(site, lasting, lost), caller(site, lasting, safe)]
        links = [
            [raw.call("share", all=True, mode="drive", ttl=30 * 86_400)["ticket"] for _ in range(2)] for raw in raws
        ]
        friends = [new_device() for _ in raws]
        for (used, _unused), friend in zip(links, friends, strict=True):
            assert refusal(site.client(credential=used, device=friend)) is None
        with caller(site, local=True) as admin:
            assert admin.call("revoke", token=_id(node, revoked)) == {"token": _id(node, revoked)}
            assert admin.call("revoke", device=lost.id.hex()) == {"device": lost.id.hex()}
        for (used, unused), friend, code in zip(links, friends, (Code.DENIED, Code.DENIED, None), strict=True):
            assert refusal(site.client(credential=used, device=friend)) == code
            assert refusal(site.client(credential=unused, device=new_device())) == code
        late = raws[0].call("share", all=True, mode="drive", ttl=60)
        assert isinstance(late, Error)
        assert late.code == Code.REVOKED, "its connection is there still"
        for raw in raws:
            raw.close()

    await asyncio.to_thread(attack)


def _id(node: Node, token: str) -> str:
    return node.token_key.verify(token, int(time.time())).token


async def test_a_link_says_that_it_ends_with_the_token_of_who_made_it(node: Node, site: Site) -> None:
    def share() -> None:
        until = int(time.time()) + 3_600
        with caller(site, site.issue("local", "*", ttl=3_600)) as raw:
            shared = raw.call("share", all=True, mode="drive", ttl=86_400)
            assert abs(shared["expires"] - until) <= 5
            assert raw.call("share", all=True, mode="drive", ttl=60)["expires"] < until - 3_000
            assert refusal(site.client(credential=shared["ticket"])) is None
        with caller(site, local=True) as raw:
            assert raw.call("share", all=True, mode="drive", ttl=86_400)["expires"] > until + 80_000

    await asyncio.to_thread(share)
    rows = node.store._db.all("SELECT expires, until FROM tickets WHERE device IS NOT NULL")
    assert rows
    assert all(expires == until for expires, until in rows), "its first use gave it no more"


async def test_a_token_for_watching_ends_no_link_of_its_tenants_owner(
    node: Node, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> None:
        browser = new_device()
        with site.client() as owner, caller(site, site.issue("local", "echo", modes=("watch",))) as low:
            owner.connect(name="work", want="named")
            link = owner.call("share", all=True, mode="drive", ttl=600)["ticket"]
            unused = owner.call("share", all=True, mode="drive", ttl=600)["ticket"]
            assert refusal(site.client(credential=link, device=browser)) is None
            for _ in range(60):
                assert "ticket" in low.call("share", session="work", mode="watch", ttl=30 * 86_400)
            assert refusal(site.client(credential=link, device=browser)) is None
            assert refusal(site.client(credential=unused)) is None

    monkeypatch.setattr("sterna.node.tickets.TICKETS_PER_TENANT_MAX", 54)
    await asyncio.to_thread(attack)
    (count,) = node.store._db.one("SELECT count(*) FROM tickets")
    assert count == 52


# ---- links that are listed and ended ---------------------------------------------------------------------------------


def _number(text: str) -> str:
    """A ticket's id, as links are listed."""
    return ticket_hash(text).hex()[:16]


def _watching(raw: Raw) -> bool:
    """Whether the attachment on handle 1 is there: SUSPEND is answered in kind, and ends it."""
    raw.send(Type.SUSPEND, 1)
    return raw.until(Type.SUSPEND, Type.ERROR, handle=1)[0] == Type.SUSPEND


async def test_an_ended_link_takes_with_it_what_came_in_by_it_and_nothing_else(node: Node, site: Site) -> None:
    def end() -> None:
        device, other = new_device(), new_device()
        ended, second, theirs = (ticket(site, "shared") for _ in range(3))
        came = [site.client(credential=ended, device=device), site.client(credential=ended, device=device)]
        lost = [joined(raw, "shared") for raw in came]
        resumed = site.client(device=device)
        assert isinstance(resumed.resume(1, *lost[1]), Resumed)
        calling = caller(site, ended, device)
        stay = [site.client(credential=second, device=device), site.client(device=device)]
        stay.append(site.client(credential=theirs, device=other))
        kept = [joined(raw, "shared") for raw in stay]
        mixed = site.client(device=device)
        assert isinstance(mixed.ask(2, want="join", name="shared", mode="watch"), Accept)
        mixed.credential = ended
        joined_mixed = mixed.connect_body(want="join", name="shared", mode="watch")
        mixed.send(Type.CONNECT, 3, 0, mixed.signed(joined_mixed))
        assert isinstance(mixed.answer(3), Accept)
        with caller(site, local=True) as owner:
            listed = {each["id"]: each for each in owner.call("shares")["shares"]}
            shown = listed[_number(ended)]
            assert (shown["name"], shown["agent"], shown["mode"]) == ("shared", "echo", "watch")
            assert (shown["device"], shown["session"]) == (device.id.hex()[:16], lost[0][0].uid.hex())
            assert owner.call("unshare", id=_number(ended)[:8]) == shown
            assert {each["id"] for each in owner.call("shares")["shares"]} == {_number(second), _number(theirs)}
        assert came[0].code(1) == Code.DENIED
        assert resumed.code(1) == Code.DENIED
        assert mixed.code(3) == Code.DENIED
        assert all(raw.ended() for raw in (came[0], resumed, calling))
        for accept, attachment in lost:
            with site.client(device=device) as raw:
                answer = raw.resume(1, accept, attachment)
                assert isinstance(answer, Error)
                assert answer.code == Code.DENIED
        for who in (device, new_device()):
            assert refusal(site.client(credential=ended, device=who)) == Code.DENIED
        assert refusal(site.client(credential=second, device=device)) is None
        assert [raw.call("info", session="shared")["name"] for raw in stay] == ["shared"] * 3
        assert [_watching(raw) for raw in stay] == [True] * 3
        for raw, back in zip((stay[0], stay[1], stay[2]), kept, strict=True):
            assert isinstance(raw.resume(2, *back), Resumed)
        mixed.send(Type.SUSPEND, 2)
        mixed.until(Type.SUSPEND, handle=2)
        mixed.say(Type.CALL, 0, Call(1, "list"))
        assert mixed.code() == Code.DENIED, "the last that it was let in by was the link"
        for raw in (*came, resumed, calling, mixed, *stay):
            raw.close()

    await asyncio.to_thread(end)


@pytest.mark.parametrize("how", ["CONNECT", "RESUME"])
async def test_an_ended_link_lets_nobody_in_that_waits_for_the_agent(
    node: Node, site: Site, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    waiting: list[Callable[[], None]] = []
    ensure = node.registry.ensure

    def hold(*words: Any, **more: Any) -> None:
        waiting.append(functools.partial(ensure, *words, **more))

    async def go_on() -> None:
        for each in waiting:
            each()

    def wait_for_it() -> None:
        device, links = new_device(), [ticket(site, "shared") for _ in range(2)]
        raws = [site.client(credential=link, device=device) for link in links]
        bodies = [raw.connect_body(want="join", name="shared", mode="watch") for raw in raws]
        # Each connection carries somebody else too, so that it does not end.
        for raw in raws:
            raw.credential, guest = site.token, raw.credential
            assert isinstance(raw.ask(1, want="join", name="shared", mode="watch"), Accept)
            raw.credential = guest
        backs = []
        for raw, body in zip(raws, bodies, strict=True):
            if how == "RESUME":
                raw.send(Type.CONNECT, 2, 0, raw.signed(body))
                accept = raw.answer(2)
                assert isinstance(accept, Accept)
                raw.send(Type.SUSPEND, 2)
                raw.until(Type.SUSPEND, handle=2)
                backs.append(raw.signed(raw.resume_body(accept, body.attachment)))
            else:
                backs.append(raw.signed(body))
        monkeypatch.setattr(node.registry, "ensure", hold)
        for raw, back in zip(raws, backs, strict=True):
            raw.send(getattr(Type, how), 3, 0, back)
        _wait(lambda: len(waiting) == 2)
        with caller(site, local=True) as owner:
            owner.call("unshare", id=_number(links[0]))
        asyncio.run_coroutine_threadsafe(go_on(), loop).result()
        answers = [raw.answer(3) for raw in raws]
        assert isinstance(answers[0], Error)
        assert answers[0].code == Code.DENIED
        assert "link that let you in was ended" in answers[0].message
        assert isinstance(answers[1], Accept | Resumed), "control: the other link is there"
        for raw in raws:
            raw.close()

    loop = asyncio.get_running_loop()
    await asyncio.to_thread(wait_for_it)


def _wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


async def test_a_link_that_was_ended_is_on_the_disk_when_that_is_answered(
    node: Node, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> None:
        with caller(site, local=True) as owner:
            link = _number(owner.call("share", all=True)["ticket"])
            assert synced == []
            assert owner.call("unshare", id=link)["id"] == link
            assert synced == [0], "none was left then"

    def sync() -> None:
        synced.append(node.store._db.one("SELECT count(*) FROM tickets")[0])

    synced: list[int] = []
    monkeypatch.setattr(node.store, "sync", sync)
    await asyncio.to_thread(end)


async def test_links_are_listed_and_ended_by_who_made_them_and_by_owners(node: Node, site: Site) -> None:
    def attack() -> None:
        device = new_device()
        mine, other = (site.issue("local", "echo", modes=("watch",)) for _ in range(2))
        everybody = site.client()
        everybody.connect(name="work", want="named")
        maker = caller(site, mine, device)
        made, owned = maker.call("share", session="work", mode="watch"), everybody.call("share", all=True)
        guest = caller(site, owned["ticket"])
        strangers = [caller(site, other), caller(site, site.issue("bob", "*"))]
        first, all_of_them = _number(made["ticket"]), {_number(made["ticket"]), _number(owned["ticket"])}

        def seen(raw: Raw) -> set[str]:
            return {each["id"] for each in raw.call("shares")["shares"]}

        for call in (guest.call("shares"), guest.call("unshare", id=first), guest.call("unshare", id="0" * 16)):
            assert (call.code, call.message) == (
                Code.DENIED, "A share link neither shows nor ends links; ask who gave it to you.",
            )  # fmt: skip
        for raw in strangers:
            assert seen(raw) == set()
            assert raw.call("unshare", id=first).code == Code.NOT_FOUND
        assert seen(everybody) == all_of_them
        assert seen(maker) == {first}
        assert maker.call("unshare", id=_number(owned["ticket"])).code == Code.NOT_FOUND
        for wrong in ("", first[:7], first + "0", first.upper() + "G", made["ticket"], "%" * 8, first[:8] + "\n"):
            refused = everybody.call("unshare", id=wrong)
            assert refused.code == Code.BAD_REQUEST, wrong
            assert made["ticket"] not in refused.message
        assert seen(everybody) == all_of_them
        for same in (caller(site, mine), caller(site, other, device)):
            assert seen(same) == {first}, "the same token elsewhere, the same device with another one"
            same.close()
        assert maker.call("unshare", id=first)["issuer"] == device.id.hex()[:16]
        assert maker.call("unshare", id=first).code == Code.NOT_FOUND
        assert everybody.call("unshare", id=_number(owned["ticket"]))["session"] is None
        assert guest.ended()
        for raw in (everybody, maker, guest, *strangers):
            raw.close()

    await asyncio.to_thread(attack)
