"""sterna.trust.pins: real TLS handshakes over loopback; what is trusted, what is refused, what is remembered."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import time
from typing import TYPE_CHECKING

import pytest
import trustme

from sterna import paths
from sterna.errors import StorageError, TrustError
from sterna.ids import NodeId
from sterna.trust import pins
from sterna.trust.fingerprint import fingerprint
from sterna.trust.node_identity import LEAF_FILE, NodeIdentity
from sterna.trust.pins import Pin, PinStore, client_context, confirm, judge, peer_of, probe_context, system_context
from sterna.trust.tls import ALPN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DAY = 86_400


def now() -> int:
    return int(time.time())


def loopback() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return client, server


class Handshake:
    """Both ends of a TLS connection over loopback TCP, driven in turns without threads."""

    def __init__(self, client: ssl.SSLContext, server: ssl.SSLContext, name: str = "127.0.0.1") -> None:
        near, far = loopback()
        near.setblocking(False)
        far.setblocking(False)
        self.client = client.wrap_socket(near, server_hostname=name, do_handshake_on_connect=False)
        self.server = server.wrap_socket(far, server_side=True, do_handshake_on_connect=False)

    def run(self) -> None:
        waiting = [self.client, self.server]
        deadline = time.monotonic() + 10
        while waiting:
            assert time.monotonic() < deadline
            for end in list(waiting):
                try:
                    end.do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    continue
                waiting.remove(end)

    def exchange(self) -> None:
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            sender.send(b"key")
            deadline = time.monotonic() + 10
            while True:
                try:
                    assert receiver.recv(16) == b"key"
                    break
                except ssl.SSLWantReadError:
                    assert time.monotonic() < deadline

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def connect() -> Iterator[type[Handshake]]:
    made: list[Handshake] = []

    class Tracked(Handshake):
        def __init__(self, client: ssl.SSLContext, server: ssl.SSLContext, name: str = "127.0.0.1") -> None:
            super().__init__(client, server, name)
            made.append(self)

    yield Tracked
    for each in made:
        each.close()


@pytest.fixture
def identity(tmp_path: Path) -> NodeIdentity:
    return NodeIdentity.load(str(tmp_path / "node"), now_s=now())


@pytest.fixture
def stranger(tmp_path: Path) -> NodeIdentity:
    return NodeIdentity.load(str(tmp_path / "stranger"), now_s=now())


@pytest.fixture
def store(tmp_path: Path) -> PinStore:
    return PinStore(paths.private_dir(str(tmp_path / "client")))


def meet(connect: type[Handshake], server: ssl.SSLContext, expected: NodeId | None = None) -> Pin:
    pair = connect(probe_context(), server)
    pair.run()
    return peer_of(pair.client, expected)


def test_pinned_handshake(connect: type[Handshake], identity: NodeIdentity) -> None:
    # Reached under a name that no certificate has: the pinned certificate is the identity.
    pair = connect(client_context(identity.ca), identity.server_context(), "roaming.example")
    pair.run()
    pair.exchange()
    assert pair.client.version() == pair.server.version() == "TLSv1.3"
    assert pair.client.selected_alpn_protocol() == pair.server.selected_alpn_protocol() == ALPN
    # No session ticket came with the handshake or after it: nothing to resume or to send early.
    assert pair.client.session is None or not pair.client.session.has_ticket
    assert peer_of(pair.client) == Pin(identity.node_id, identity.ca)


def test_wrong_authority_is_refused(connect: type[Handshake], identity: NodeIdentity, stranger: NodeIdentity) -> None:
    pair = connect(client_context(identity.ca), stranger.server_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        pair.run()


def test_stolen_certificate_without_its_key_is_refused(
    connect: type[Handshake], identity: NodeIdentity, stranger: NodeIdentity, tmp_path: Path
) -> None:
    # The stranger shows its own leaf and the node's certificate: a probe believes it, the pinned handshake does not.
    ours = ssl.DER_cert_to_PEM_cert(identity.ca)
    parts = (tmp_path / "stranger" / LEAF_FILE).read_text().split("-----BEGIN CERTIFICATE-----")
    mixed = tmp_path / "mixed.pem"
    mixed.write_text(parts[0] + "-----BEGIN CERTIFICATE-----" + parts[1] + ours)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(mixed)
    found = meet(connect, server)
    assert found.node_id == identity.node_id
    pair = connect(found.context(), server)
    with pytest.raises(ssl.SSLCertVerificationError):
        pair.run()


def test_public_certificate_is_no_pin(connect: type[Handshake], identity: NodeIdentity) -> None:
    public = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    public.issue_cert("127.0.0.1").configure_cert(server)
    pair = connect(client_context(identity.ca), server)
    with pytest.raises(ssl.SSLCertVerificationError):
        pair.run()
    with pytest.raises(TrustError, match="does not show a certificate of a Sterna node"):
        meet(connect, server)


def test_old_server_is_refused(connect: type[Handshake], identity: NodeIdentity) -> None:
    old = identity.server_context()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    for client in (client_context(identity.ca), probe_context(), system_context()):
        with pytest.raises(ssl.SSLError, match="PROTOCOL"):
            connect(client, old).run()


def test_old_client_is_refused(connect: type[Handshake], identity: NodeIdentity) -> None:
    old = client_context(identity.ca)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        connect(old, identity.server_context()).run()


def test_other_protocols_are_not_agreed_on(connect: type[Handshake], identity: NodeIdentity) -> None:
    web = identity.server_context(alpn=(ALPN, "http/1.1"))
    pair = connect(client_context(identity.ca, ("h2", "http/1.1")), web)
    pair.run()
    assert pair.client.selected_alpn_protocol() == "http/1.1"
    pair = connect(client_context(identity.ca, ("h2",)), web)
    pair.run()
    assert pair.client.selected_alpn_protocol() is None


def test_rotation_of_the_leaf_keeps_node_and_pin(connect: type[Handshake], tmp_path: Path, store: PinStore) -> None:
    directory = str(tmp_path / "node")
    # A first run eleven and a half months ago.
    identity = NodeIdentity.load(directory, now_s=now() - 350 * DAY)
    store.put("node.example", 7220, judge(store, "node.example", 7220, meet(connect, identity.server_context())))
    before = (tmp_path / "node" / LEAF_FILE).read_bytes()
    assert identity.renew(now_s=now())
    assert (tmp_path / "node" / LEAF_FILE).read_bytes() != before
    pin = store.get("node.example", 7220)
    assert pin is not None
    pair = connect(pin.context(), identity.server_context())
    pair.run()
    pair.exchange()
    assert judge(store, "node.example", 7220, peer_of(pair.client)) == pin


def test_expired_leaf_is_refused(connect: type[Handshake], tmp_path: Path) -> None:
    identity = NodeIdentity.load(str(tmp_path / "node"), now_s=now() - 400 * DAY)
    pair = connect(client_context(identity.ca), identity.server_context())
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        pair.run()


def test_first_use_then_the_same_then_another(
    connect: type[Handshake], identity: NodeIdentity, stranger: NodeIdentity, store: PinStore
) -> None:
    found = judge(store, "Node.Example.", 7220, meet(connect, identity.server_context()))
    assert found.node_id == identity.node_id
    assert store.all() == []
    store.put("Node.Example.", 7220, found)
    assert judge(store, "node.example", 7220, meet(connect, identity.server_context())) == found
    with pytest.raises(TrustError) as caught:
        judge(store, "node.example", 7220, meet(connect, stranger.server_context()))
    for part in (
        fingerprint(identity.node_id),
        fingerprint(stranger.node_id),
        "node.example:7220",
        store.path,
        "remove",
    ):
        assert part in str(caught.value)
    # Another port is another node.
    assert judge(store, "node.example", 7221, meet(connect, stranger.server_context())).node_id == stranger.node_id


def test_link_names_the_node(
    connect: type[Handshake], identity: NodeIdentity, stranger: NodeIdentity, store: PinStore
) -> None:
    found = meet(connect, identity.server_context(), identity.node_id)
    assert judge(store, "h", 1, found, identity.node_id) == found
    with pytest.raises(TrustError) as caught:
        judge(store, "h", 1, found, stranger.node_id)
    assert fingerprint(identity.node_id) in str(caught.value)
    assert fingerprint(stranger.node_id) in str(caught.value)
    # A fresh link overrules what was known at the address (the node was set up anew).
    store.put("h", 1, found)
    assert judge(store, "h", 1, meet(connect, stranger.server_context()), stranger.node_id).node_id == stranger.node_id


def test_certificate_of_the_users_own(
    connect: type[Handshake], identity: NodeIdentity, stranger: NodeIdentity, tmp_path: Path
) -> None:
    public = trustme.CA()
    issued = public.issue_cert("node.example")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    server = identity.server_context(certificate=str(chain), key=str(key))

    def client() -> ssl.SSLContext:
        context = system_context()
        public.configure_trust(context)
        return context

    pair = connect(client(), server, "node.example")
    pair.run()
    pair.exchange()
    # The node's own certificate travels behind the public chain, so the client learns whose session this is.
    assert peer_of(pair.client).node_id == identity.node_id
    pin = Pin(identity.node_id, b"", system=True)
    confirm(pair.client, pin, "node.example", 7220)
    with pytest.raises(TrustError, match="is not the one known there"):
        confirm(pair.client, Pin(stranger.node_id, b"", system=True), "node.example", 7220)
    wrong_name = connect(client(), server, "other.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        wrong_name.run()
    unknown = connect(system_context(), server, "node.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        unknown.run()
    # Without its public trust the pin of the node's own certificate does not accept the public chain.
    pinned = connect(client_context(identity.ca), server, "node.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        pinned.run()


def test_peer_before_the_handshake_is_refused(connect: type[Handshake], identity: NodeIdentity) -> None:
    pair = connect(probe_context(), identity.server_context())
    with pytest.raises(TrustError, match="does not show"):
        peer_of(pair.client)


def test_long_chains_are_refused(connect: type[Handshake], identity: NodeIdentity, tmp_path: Path) -> None:
    many = tmp_path / "many.pem"
    own = ssl.DER_cert_to_PEM_cert(identity.ca)
    many.write_text((tmp_path / "node" / LEAF_FILE).read_text() + own * pins.CHAIN_MAX_CERTIFICATES)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(many)
    with pytest.raises(TrustError, match="more than 10 certificates"):
        meet(connect, server)


@pytest.mark.parametrize("ca", [b"", b"junk", b"\x30\x03\x02\x01\x00"])
def test_context_of_a_damaged_certificate(ca: bytes) -> None:
    with pytest.raises(TrustError, match="damaged"):
        client_context(ca)


def test_store_keeps_addresses_apart(store: PinStore, identity: NodeIdentity, stranger: NodeIdentity) -> None:
    one, two = Pin(identity.node_id, identity.ca), Pin(stranger.node_id, stranger.ca)
    public = Pin(identity.node_id, b"", system=True)
    store.put("a.example", 7220, one)
    store.put("a.example", 72, two)
    store.put("2001:DB8::1", 7220, two)
    store.put("p.example", 443, public)
    assert store.get("A.example.", 7220) == one
    assert store.get("a.example", 72) == two
    assert store.get("a.example", 7) is None
    assert store.get("example", 7220) is None
    assert store.get("[2001:db8::1]", 7220) == two
    assert store.get("p.example", 443) == public
    assert [address for address, _ in store.all()] == [
        "a.example:7220",
        "a.example:72",
        "[2001:db8::1]:7220",
        "p.example:443",
    ]
    assert store.find(identity.node_id) == one
    assert store.find(NodeId(bytes(32))) is None
    store.put("a.example", 7220, two)
    assert store.get("a.example", 7220) == two
    assert store.find(identity.node_id) is None
    assert store.forget("a.example", 7220)
    assert not store.forget("a.example", 7220)
    assert store.get("a.example", 7220) is None
    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o600


def test_store_is_bounded(store: PinStore, identity: NodeIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "PINS_MAX", 3)
    pin = Pin(identity.node_id, identity.ca)
    for number in range(5):
        store.put(f"h{number}", 1, pin)
    assert [address for address, _ in store.all()] == ["h2:1", "h3:1", "h4:1"]


def test_full_store_fits_its_bound() -> None:
    # A node's own certificate has about 450 bytes, 600 characters in the file.
    line = 253 + 10 + 65 + 1_000
    assert pins.PINS_MAX * line < pins.PINS_FILE_MAX_BYTES


def test_damaged_line_is_no_unknown_node(store: PinStore, identity: NodeIdentity, stranger: NodeIdentity) -> None:
    store.put("a", 1, Pin(identity.node_id, identity.ca))
    good = (paths.read_private(store.path, 10_000) or b"").decode()
    other = fingerprint(stranger.node_id)
    for bad in (good[:50], good[:-9], good.replace(fingerprint(identity.node_id), other), "a:1 x y", "a:1 "):
        paths.atomic_write(store.path, bad.strip("\n").encode() + b"\n")
        with pytest.raises(TrustError, match="damaged"):
            store.get("a", 1)
        assert store.all() == []
        assert store.get("b", 1) is None
    paths.atomic_write(store.path, b"\xff\xfe")
    with pytest.raises(StorageError, match="damaged"):
        store.get("a", 1)


def test_readable_store_is_refused(store: PinStore, identity: NodeIdentity) -> None:
    store.put("a", 1, Pin(identity.node_id, identity.ca))
    os.chmod(store.path, 0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        store.get("a", 1)


@pytest.mark.parametrize("host", ["", "a b", "a\nb:1 x", "x" * 254, "ü", "a\x1b[0m"])
def test_hosts_that_would_break_the_file_are_refused(store: PinStore, host: str) -> None:
    with pytest.raises(TrustError, match="no host name"):
        store.put(host, 1, Pin(NodeId(bytes(32)), b"", system=True))


def test_repr_shows_the_fingerprint_only(identity: NodeIdentity) -> None:
    assert repr(Pin(identity.node_id, identity.ca)) == f"Pin({fingerprint(identity.node_id)})"
