"""sterna.trust.links: links that say where a session is, with the secret where no server sees it."""

from __future__ import annotations

import pytest

from sterna.errors import UsageError
from sterna.ids import NodeId, SessionUid
from sterna.trust.links import LINK_MAX_CHARS, ShareLink, is_link, parse_link, unreachable_reason

TICKET = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
NODE = NodeId(bytes(range(32)))
UID = SessionUid(bytes(range(16)))
NODE_TEXT = TICKET
UID_TEXT = "AAECAwQFBgcICQoLDA0ODw"


def fields(link: ShareLink) -> tuple[object, ...]:
    return tuple(getattr(link, name) for name in ShareLink.__slots__)


def test_both_forms_are_pinned() -> None:
    link = ShareLink(
        "node.example", 7222, ticket=TICKET, node_id=NODE, session=UID, session_port=7220, agent="shell", mode="watch"
    )
    assert link.web() == (f"https://node.example:7222/#t={TICKET}&n={NODE_TEXT}&s={UID_TEXT}&a=shell&m=watch&p=7220")
    assert link.terminal() == f"sterna://node.example:7220/?n={NODE_TEXT}&s={UID_TEXT}&a=shell&m=watch#t={TICKET}"
    assert fields(parse_link(link.web())) == fields(link)
    again = parse_link(link.terminal())
    assert (again.port, again.session_port, again.ticket) == (7220, 7220, TICKET)
    assert TICKET not in repr(link)


def test_smallest_links() -> None:
    link = parse_link("https://node.example")
    assert (link.host, link.port, link.session_port, link.ticket, link.node_id) == (
        "node.example",
        443,
        443,
        None,
        None,
    )
    assert parse_link("sterna://node.example").port == 7220
    assert ShareLink("h", 1).web() == "https://h:1/"
    assert ShareLink("h", 1).terminal() == "sterna://h:1/"


def test_ipv6() -> None:
    for host in ("2001:db8::1", "[2001:db8::1]"):
        link = ShareLink(host, 7222, ticket=TICKET)
        assert link.web() == f"https://[2001:db8::1]:7222/#t={TICKET}"
        assert parse_link(link.web()).host == "2001:db8::1"


def test_unknown_fields_of_newer_nodes_are_ignored() -> None:
    assert parse_link(f"https://h:1/#t={TICKET}&z=9").ticket == TICKET


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "https://", "https:///", "http://h:1/", "ftp://h/", "sterna:h", "https://h:0/", "https://h:65536/",
        "https://h:999999/", "https://h:x/", "https://user@h:1/", "https://h:1/path", "https://h 1/", "https://h\n:1/",
        "https://ü.example/", "https://[::1", "https://[h]:1/", "https://::1:1/", " https://h:1/", "https://h:1/ ",
        "https://h:1/\n", "https://h:1/#", "https://h:1/#t", "https://h:1/#t=", "https://h:1/#t=x", f"https://h:1/#T={TICKET}",
        f"https://h:1/#t={TICKET[:-1]}", f"https://h:1/#t={TICKET}A", f"https://h:1/#t={TICKET[:-1]}9",
        f"https://h:1/#t={TICKET}&", f"https://h:1/#&t={TICKET}", f"https://h:1/#t={TICKET}&t={TICKET}",
        f"https://h:1/#t={TICKET}#", f"https://h:1/#t={TICKET}%20", f"https://h:1/#t={TICKET}&n=abc",
        f"https://h:1/#t={TICKET}&s=abc", f"https://h:1/#t={TICKET}&p=0", f"https://h:1/#t={TICKET}&p=x",
        f"https://h:1/#t={TICKET}&p=70000", f"https://h:1/#t={TICKET}&m=root", f"https://h:1/#t={TICKET}&a=-x",
        f"https://h:1/?m=watch#m=drive&t={TICKET}", f"https://h:1/?t={TICKET}", f"sterna://h:1/?t={TICKET}#n={NODE_TEXT}",
        "https://h:1/#" + "&".join("a=b" for _ in range(100)), "https://h:1/#t=" + "A" * LINK_MAX_CHARS,
    ],
)  # fmt: skip
def test_junk_is_refused_without_repeating_the_secret(text: str) -> None:
    if text == "https://h:1/#":
        assert parse_link(text).ticket is None
        return
    with pytest.raises(UsageError) as caught:
        parse_link(text)
    assert TICKET[:-1] not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "port", "more"),
    [
        ("", 1, {}), ("a b", 1, {}), ("h/x", 1, {}), ("h#", 1, {}), ("h@x", 1, {}), ("h", 0, {}), ("h", 65_536, {}),
        ("h", 1, {"ticket": "x"}), ("h", 1, {"node_id": NodeId(b"x")}), ("h", 1, {"session": SessionUid(b"x")}),
        ("h", 1, {"agent": "a&b"}), ("h", 1, {"mode": "x"}), ("h", 1, {"session_port": 0}),
    ],
)  # fmt: skip
def test_impossible_links_are_not_made(host: str, port: int, more: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ShareLink(host, port, **more)  # type: ignore[arg-type]  # a table of wrong values


def test_what_is_meant_as_a_link() -> None:
    assert is_link("https://x")
    assert is_link("sterna://x")
    assert not is_link("shell")
    assert not is_link("user@host")


@pytest.mark.parametrize(
    ("host", "word"),
    [
        ("127.0.0.1", "loopback"), ("127.8.9.1", "loopback"), ("127.1", "loopback"), ("0x7f000001", "loopback"),
        ("2130706433", "loopback"), ("::1", "loopback"), ("[::1]", "loopback"), ("::ffff:127.0.0.1", "loopback"),
        ("localhost", "every device"), ("LOCALHOST.", "every device"), ("a.localhost", "every device"),
        ("localhost.localdomain", "every device"), ("::", "none in particular"),
        ("0.0.0.0", "none in particular"),  # noqa: S104 - an address to refuse, nothing binds to it
        ("0", "none in particular"), ("0.0.0.5", "none in particular"), ("169.254.3.4", "link-local"),
        ("fe80::1", "link-local"), ("fe80::1%eth0", "link-local"), ("::ffff:169.254.1.1", "link-local"),
        ("224.0.0.1", "multicast"), ("ff02::1", "multicast"), ("255.255.255.255", "broadcast"), ("", "no address"),
        ("*", "no address"), (" ", "no address"),
    ],
)  # fmt: skip
def test_addresses_no_other_device_reaches(host: str, word: str) -> None:
    reason = unreachable_reason(host)
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize(
    "host",
    ["192.0.2.1", "10.0.0.1", "192.168.1.5", "100.64.0.1", "2001:db8::1", "fd00::1", "::ffff:192.0.2.1", "node.example",
     "build", "laptop.local", "my-localhost"],
)  # fmt: skip
def test_addresses_another_device_may_reach(host: str) -> None:
    assert unreachable_reason(host) is None
