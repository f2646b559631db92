"""Properties of trust: nothing but the exact bytes opens anything, and junk never raises what it should not."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sterna.errors import TrustError, UsageError
from sterna.ids import NodeId, SessionUid
from sterna.trust import base64url
from sterna.trust.certificate import node_id_of
from sterna.trust.device import CONNECT, ED25519, P256, RESUME, DeviceKey, verify
from sterna.trust.fingerprint import fingerprint, parse_fingerprint
from sterna.trust.links import ShareLink, parse_link, unreachable_reason
from sterna.trust.tickets import new_ticket
from sterna.trust.tokens import DRIVE, WATCH, Access, TokenKey

NOW = 1_800_000_000
KEY = TokenKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
DEVICE = DeviceKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
TOKEN = KEY.issue("acme", ["build-*", "shell"], [DRIVE, WATCH], now_s=NOW, expires=NOW + 60)
NODES = st.binary(min_size=32, max_size=32).map(NodeId)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


def test_every_flipped_bit_of_a_token_is_refused() -> None:
    for index in range(len(TOKEN)):
        for bit in range(7):
            changed = TOKEN[:index] + chr(ord(TOKEN[index]) ^ 1 << bit) + TOKEN[index + 1 :]
            with pytest.raises(TrustError):
                KEY.verify(changed, NOW)
    # The control: unchanged it is good.
    assert KEY.verify(TOKEN, NOW).tenant == "acme"


@given(index=st.integers(0, len(TOKEN) - 1), text=st.text(max_size=3))
def test_any_other_text_in_a_token_is_refused(index: int, text: str) -> None:
    changed = TOKEN[:index] + text + TOKEN[index + 1 :]
    if changed != TOKEN:
        with pytest.raises(TrustError):
            KEY.verify(changed, NOW)


@given(st.text() | st.binary().map(lambda data: "st1." + base64url.encode(data) + "." + base64url.encode(bytes(64))))
def test_junk_tokens_are_refused(text: str) -> None:
    with pytest.raises(TrustError):
        Access([KEY.public], local="lt1.x").grant(text, NOW)


@given(agent=NAMES, tenant=st.sampled_from(["acme", "acm", "acme2", "ACME", "local"]))
def test_no_other_tenant_and_no_other_agent(agent: str, tenant: str) -> None:
    grant = KEY.verify(TOKEN, NOW)
    expected = tenant == "acme" and (agent == "shell" or agent.startswith("build-"))
    assert grant.allows(tenant, agent, DRIVE) == expected


@given(
    public=st.binary(max_size=70)
    | st.binary(min_size=32, max_size=32).map(bytes((ED25519,)).__add__)
    | st.binary(min_size=64, max_size=64).map(bytes((P256, 4)).__add__),
    body=st.binary(max_size=100),
    signature=st.binary(max_size=70) | st.binary(min_size=64, max_size=64),
)
# The identity and another point of small order, with signatures that hold for them and any message.
@example(public=b"\x01\x01" + bytes(31), body=b"x", signature=b"\x01" + bytes(63))
@example(public=b"\x01" + bytes(32), body=b"x", signature=bytes(64))
def test_junk_signatures_never_raise_and_never_verify(public: bytes, body: bytes, signature: bytes) -> None:
    assert not verify(public, CONNECT, NodeId(bytes(32)), body, signature)


@given(
    node=NODES, body=st.binary(max_size=300), other=st.binary(max_size=300), context=st.sampled_from([CONNECT, RESUME])
)
def test_signatures_hold_for_one_message_only(node: NodeId, body: bytes, other: bytes, context: str) -> None:
    signature = DEVICE.sign(context, node, body)
    assert verify(DEVICE.public, context, node, body, signature)
    assert verify(DEVICE.public, context, node, other, signature) == (other == body)
    assert not verify(DEVICE.public, RESUME if context == CONNECT else CONNECT, node, body, signature)


@given(st.binary(max_size=200))
def test_base64url_comes_back(data: bytes) -> None:
    text = base64url.encode(data)
    assert base64url.decode(text, len(data)) == data
    assert base64url.decode(text, len(data) - 1) is None or not data


@given(st.text(max_size=50) | st.text("ABab01-_=+/\n", max_size=20))
def test_base64url_has_one_text_for_each_value(text: str) -> None:
    data = base64url.decode(text, 100)
    assert data is None or base64url.encode(data) == text


@given(NODES)
def test_fingerprints_come_back(node: NodeId) -> None:
    assert parse_fingerprint(fingerprint(node)) == parse_fingerprint(node.hex()) == node


@given(st.text(max_size=140) | st.text("abcxyz234567-", min_size=50, max_size=66))
def test_junk_fingerprints_are_refused_or_exact(text: str) -> None:
    try:
        node = parse_fingerprint(text)
    except UsageError:
        return
    assert fingerprint(node).replace("-", "") == text.strip().lower().replace("-", "").replace(" ", "").replace(":", "")


@given(host=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,30}", fullmatch=True) | st.ip_addresses().map(str),
       port=st.integers(1, 65_535), session_port=st.none() | st.integers(1, 65_535), node=st.none() | NODES,
       session=st.none() | st.binary(min_size=16, max_size=16).map(SessionUid), agent=st.none() | NAMES,
       mode=st.sampled_from([None, "drive", "watch"]), ticketed=st.booleans())  # fmt: skip
def test_links_come_back(
    host: str, port: int, session_port: int | None, node: NodeId | None, session: SessionUid | None, agent: str | None,
    mode: str | None, ticketed: bool,
) -> None:  # fmt: skip
    ticket = new_ticket()[0] if ticketed else None
    link = ShareLink(
        host, port, ticket=ticket, node_id=node, session=session, session_port=session_port, agent=agent, mode=mode
    )
    web, terminal = parse_link(link.web()), parse_link(link.terminal())
    for name in ShareLink.__slots__:
        assert getattr(web, name) == getattr(link, name)
        if name != "port":
            assert getattr(terminal, name) == getattr(link, name)
    assert link.port == port
    if ticket is not None:
        assert ticket not in link.web().split("#")[0] + link.terminal().split("#")[0] + repr(link)


@given(st.text(max_size=100) | st.text("https://sterna:[]?#&=tnspam0129.AB", max_size=100).map("https://h:1/".__add__))
def test_junk_links_give_usage_errors_only(text: str) -> None:
    try:
        parse_link(text)
    except UsageError:
        pass
    unreachable_reason(text)


@settings(max_examples=300)
@given(st.binary(max_size=300) | st.binary(max_size=100).map(b"\x30\x82".__add__))
def test_junk_certificates_give_trust_errors_only(data: bytes) -> None:
    with pytest.raises(TrustError):
        node_id_of(data)
