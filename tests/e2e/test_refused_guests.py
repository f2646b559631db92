"""What somebody with a link, or a token for little, can cost the others: their connections and calls are bounded."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.frame import Type, encode
from sterna.trust.device import DeviceKey
from tests.e2e.raw_client import Raw, Site, new_device, unharmed
from tests.e2e.rig import Rig, wait_for

pytestmark = pytest.mark.xdist_group("refused-guests")

CALLS = 3_000


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        yield Site(rig)


def link_to(site: Site, name: str) -> str:
    owner = site.client()
    owner.connect(name=name, want="named")
    ticket: str = owner.call("share", session=name, mode="watch", ttl=600)["ticket"]
    owner.close()
    return ticket


def guest(site: Site, ticket: str, device: DeviceKey) -> Raw:
    return site.client(credential=ticket, device=device)


def test_a_link_has_only_so_many_connections(site: Site) -> None:
    ticket, device = link_to(site, "shared"), new_device()
    with unharmed(site):
        kept = []
        for _ in range(limits.GUEST_CONNECTIONS_MAX):
            raw = guest(site, ticket, device)
            raw.connect(want="call", mode="watch", agent="")
            kept.append(raw)
        late = guest(site, ticket, device)
        answer = late.ask(1, want="call", mode="watch", agent="")
        assert isinstance(answer, messages.Error)
        assert answer.code == Code.LIMIT
        kept.pop().close()

        def again() -> bool:
            raw = guest(site, ticket, device)
            kept.append(raw)
            return isinstance(raw.ask(1, want="call", mode="watch", agent=""), messages.Accept)

        wait_for(again, name="room for one more")
        for raw in kept:
            raw.close()


def watching(site: Site, ticket: str, device: DeviceKey, name: str, count: int) -> tuple[Raw, list[bytes]]:
    """A guest's connection that watches a session `count` times if it may; the attachments that it may."""
    raw, let_in = guest(site, ticket, device), []
    for handle in range(1, count + 1):
        body = raw.connect_body(want="join", name=name, mode="watch", exact=False)
        raw.send(Type.CONNECT, handle, 0, raw.signed(body))
        answer = raw.answer(handle)
        if isinstance(answer, messages.Accept):
            let_in.append(body.attachment)
        else:
            assert isinstance(answer, messages.Error)
            assert answer.code == Code.LIMIT
            assert "Links have too many places" in answer.message
    return raw, let_in


def test_links_leave_places_to_those_whose_session_it_is(site: Site) -> None:
    quarter, name = limits.WATCHERS_MAX // 4, "looked-at"
    links = [(link_to(site, name), new_device()) for _ in range(4)]
    with unharmed(site, 16):
        raws = []
        for number, (ticket, device) in enumerate(links):
            raw, let_in = watching(site, ticket, device, name, limits.WATCHERS_MAX)
            assert len(let_in) == (quarter if number < 3 else 0)
            raws.append(raw)
        with site.client() as owner:
            for handle in range(1, quarter + 1):
                owner.connect(handle, want="join", name=name, mode="watch")
            answer = owner.ask(quarter + 1, want="join", name=name, mode="watch")
            assert isinstance(answer, messages.Error)
            assert "at most" in answer.message
        for raw in raws:
            raw.close()


def test_a_link_does_not_come_back_to_more_places_than_it_may_have(site: Site) -> None:
    quarter, name = limits.WATCHERS_MAX // 4, "came-back"
    ticket, device = link_to(site, name), new_device()
    with site.client() as owner:
        uid = owner.connect(want="join", name=name, mode="watch")
    first, gone = watching(site, ticket, device, name, quarter)
    assert len(gone) == quarter
    first.close()
    wait_for(lambda: attached(site, name) == 0, name="their end")
    second, let_in = watching(site, ticket, device, name, quarter)
    assert len(let_in) == quarter
    third = guest(site, ticket, device)
    third.connect(want="call", mode="watch", agent="")
    answer = third.resume(2, uid, gone[0])
    assert isinstance(answer, messages.Error)
    assert answer.code == Code.LIMIT
    assert not isinstance(third.resume(3, uid, let_in[0]), messages.Error), "control: one that is there comes back"
    for raw in (second, third):
        raw.close()


def attached(site: Site, name: str) -> int:
    with site.client() as owner:
        owner.connect(want="call")
        return len(owner.call("info", session=name)["attachments"])


def test_a_storm_of_calls_holds_nobody_up(site: Site) -> None:
    ticket, device = link_to(site, "stormy"), new_device()
    call = encode(Type.CALL, 0, 0, messages.pack(messages.Call(1, "list", msgspec.Raw(messages.pack({})))))
    with unharmed(site, 16) as pulse:
        for _ in range(20):
            raw = guest(site, ticket, device)
            raw.connect(want="call", mode="watch", agent="")
            raw.raw(call * CALLS)
            assert raw.code() == Code.LIMIT
            raw.close()
    assert max(pulse.times) < 0.5


def test_calls_that_wait_are_answered_in_order(site: Site) -> None:
    with site.client() as raw:
        raw.connect(want="call")
        for number in range(limits.CALLS_WAITING_MAX // 2):
            raw.say(Type.CALL, 0, messages.Call(number, "list", msgspec.Raw(messages.pack({}))))
        for number in range(limits.CALLS_WAITING_MAX // 2):
            frame = raw.until(Type.RESULT)
            assert messages.unpack(messages.Result, frame[3]).id == number


def test_the_idle_connection_of_a_revoked_device_ends(site: Site) -> None:
    ticket, device = link_to(site, "lent"), new_device()
    with site.client() as owner, guest(site, ticket, device) as raw:
        raw.connect(want="call", mode="watch", agent="")
        owner.connect(want="call")
        assert owner.call("revoke", device=device.id.hex()) == {"device": device.id.hex()}
        assert raw.code() == Code.REVOKED
        assert raw.ended()
        assert owner.alive()
