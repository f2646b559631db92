"""The client's memory of nodes: who was met where, and TLS contexts that accept nobody else.

Source: docs/protocol.md, section 4.

The first meeting (`probe_context`, `peer_of`, `judge`) only learns; nothing is sent before the second handshake, with
`client_context`, has proved that the other side holds the key it showed.
"""

from __future__ import annotations

import os
import ssl
from typing import Any, cast

from sterna import paths
from sterna.errors import SternaError, StorageError, TrustError
from sterna.ids import NodeId
from sterna.trust import base64url
from sterna.trust.certificate import CERTIFICATE_MAX_BYTES, node_id_of, subject_of
from sterna.trust.fingerprint import fingerprint, parse_fingerprint
from sterna.trust.tls import ALPN, harden

CERTIFICATE_FILE = "node.crt"
PINS_FILE = "known_nodes"
PINS_MAX = 4_096
PINS_FILE_MAX_BYTES = 8 * 1024 * 1024
CHAIN_MAX_CERTIFICATES = 10
_SYSTEM = "system"
_DER = 2  # _ssl.ENCODING_DER


class Pin:
    """A node as a client knows it: its id and its own certificate in DER; `system` if its chain is a public one."""

    __slots__ = ("ca", "node_id", "system")

    def __init__(self, node_id: NodeId, ca: bytes, *, system: bool = False) -> None:
        self.node_id = node_id
        self.ca = ca
        self.system = system

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pin):
            return NotImplemented
        return (self.node_id, self.ca, self.system) == (other.node_id, other.ca, other.system)

    def __hash__(self) -> int:
        return hash(self.node_id)

    def __repr__(self) -> str:
        return f"Pin({fingerprint(self.node_id)}{', system' if self.system else ''})"

    def context(self, alpn: tuple[str, ...] = (ALPN,)) -> ssl.SSLContext:
        """Returns the TLS context that accepts this node only (a `system` one: its host, as public authorities say)."""
        return system_context(alpn) if self.system else client_context(self.ca, alpn)


class PinStore:
    """The file of known nodes in a client's state directory: one line for each address, 0600, replaced as a whole."""

    __slots__ = ("path",)

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, PINS_FILE)

    def get(self, host: str, port: int) -> Pin | None:
        """Returns what is known of the node at an address, or None; raises TrustError if the file is open to others."""
        wanted = _address(host, port)
        for line in self._lines():
            if line.startswith(wanted + " "):
                pin = _parse(line)
                if pin is None:
                    # To take it for an unknown node would mean to trust whoever answers.
                    raise TrustError(f"The line {wanted} in {self.path} is damaged: remove it to trust the node anew.")
                return pin
        return None

    def find(self, node_id: NodeId) -> Pin | None:
        """Returns what is known of a node wherever it was met, or None; `system` pins do not count."""
        wanted = f" {fingerprint(node_id)} "
        for line in self._lines():
            if wanted in line and (pin := _parse(line)) is not None and not pin.system:
                return pin
        return None

    def all(self) -> list[tuple[str, Pin]]:
        """Returns every known node with its address as `host:port` (IPv6 addresses in brackets), oldest first."""
        found = ((line.split(" ", 1)[0], _parse(line)) for line in self._lines())
        return [(address, pin) for address, pin in found if pin is not None]

    def put(self, host: str, port: int, pin: Pin) -> None:
        """Remembers a node, in place of what was known at that address; beyond 4,096 the oldest is forgotten."""
        ca = _SYSTEM if pin.system else base64url.encode(pin.ca)
        self._replace(host, port, f"{_address(host, port)} {fingerprint(pin.node_id)} {ca}")

    def forget(self, host: str, port: int) -> bool:
        """Forgets the node at an address, and tells whether one was known."""
        return self._replace(host, port, None)

    def _replace(self, host: str, port: int, line: str | None) -> bool:
        prefix = _address(host, port) + " "
        with paths.locked(self.path + ".lock"):
            lines = self._lines()
            kept = [each for each in lines if not each.startswith(prefix)]
            known = len(kept) < len(lines)
            if line is not None:
                kept.append(line)
            if line is not None or known:
                content = "".join(f"{each}\n" for each in kept[-PINS_MAX:])
                paths.atomic_write(self.path, content.encode("ascii"))
        return known

    def _lines(self) -> list[str]:
        content = paths.read_private(self.path, PINS_FILE_MAX_BYTES) or b""
        try:
            return content.decode("ascii").splitlines()
        except UnicodeDecodeError as error:
            raise StorageError(f"The file {self.path} is damaged: remove it, and trust your nodes anew.") from error


def _address(host: str, port: int) -> str:
    """Returns the key of an address: lower case, IPv6 in brackets, no final dot; TrustError if it is impossible."""
    name = host.strip("[]").lower().rstrip(".")
    if not name or len(name) > 253 or not name.isascii() or not name.isprintable() or " " in name:
        raise TrustError(f"{host[:80]!r} is no host name or address: no node can be known under it.")
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _parse(line: str) -> Pin | None:
    """Returns the pin in a line of the file, or None if the line is damaged."""
    fields = line.split(" ")
    try:
        node_id = parse_fingerprint(fields[1])
        if fields[2] == _SYSTEM:
            return Pin(node_id, b"", system=True)
        ca = base64url.decode(fields[2], CERTIFICATE_MAX_BYTES)
        # The id and the certificate belong together; if they do not, neither is to be believed.
        return Pin(node_id, ca) if ca is not None and node_id_of(ca) == node_id else None
    except (IndexError, SternaError):
        return None


def local_pin(directory: str) -> Pin | None:
    """Returns the node whose state is in `directory` of this machine, or None if none ever ran there.

    Raises TrustError if what is there is damaged or open to others.
    """
    path = os.path.join(directory, CERTIFICATE_FILE)
    content = paths.read_private(path, CERTIFICATE_MAX_BYTES * 2)
    if content is None:
        return None
    try:
        ca = ssl.PEM_cert_to_DER_cert(content.decode("ascii"))
    except ValueError as error:
        raise TrustError(f"The certificate in {path} is damaged: start the node again to write it anew.") from error
    return Pin(node_id_of(ca), ca)


def client_context(ca: bytes, alpn: tuple[str, ...] = (ALPN,)) -> ssl.SSLContext:
    """Returns a client's TLS 1.3 context that accepts only chains to exactly the certificate `ca` (DER).

    Names are not checked: the certificate is the identity, and a node may be reached under any name or address.
    Raises TrustError if `ca` is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    harden(context, alpn)
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError) as error:
        raise TrustError("The certificate kept for this node is damaged: forget the node, trust it anew.") from error
    return context


def system_context(alpn: tuple[str, ...] = (ALPN,)) -> ssl.SSLContext:
    """Returns a client's TLS 1.3 context that checks chain and host name by the system's authorities.

    For nodes with a certificate of the user's own (`--tls-cert`); wrap sockets with `server_hostname`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    harden(context, alpn)
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def probe_context(alpn: tuple[str, ...] = (ALPN,)) -> ssl.SSLContext:
    """Returns a client's TLS 1.3 context that accepts anybody: only to learn who is there, never to send anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    harden(context, alpn)
    return context


def peer_of(connection: ssl.SSLSocket | ssl.SSLObject, expected: NodeId | None = None) -> Pin:
    """Returns what the other side of a finished handshake says it is: not yet proved, if it was a probe.

    A node's own certificate is recognised by its subject, which contains the beginning of its own id; with `expected`
    by the id. Raises TrustError if the other side shows none.
    """
    for certificate in reversed(_chain(connection)):
        node_id = node_id_of(certificate)
        if node_id == expected or subject_of(node_id).encode("ascii") in certificate:
            return Pin(node_id, certificate)
    raise TrustError(
        "The other side does not show a certificate of a Sterna node: check host and port, and that no proxy ends TLS."
    )


def _chain(connection: ssl.SSLSocket | ssl.SSLObject) -> list[bytes]:
    """Returns the certificates the other side sent, in DER, its own first.

    Public since Python 3.13; 3.11 and 3.12 have it on the inner object only.
    """
    public = getattr(connection, "get_unverified_chain", None)
    if public is not None:
        chain = cast("list[bytes]", public())
    else:
        # Before the handshake there is no chain (None), and on a closed connection no inner object.
        inner: Any = getattr(connection, "_sslobj", None)
        found = inner.get_unverified_chain() if inner is not None else None
        chain = [cast("bytes", each.public_bytes(_DER)) for each in found or ()]
    if len(chain) > CHAIN_MAX_CERTIFICATES:
        raise TrustError(f"The other side shows more than {CHAIN_MAX_CERTIFICATES} certificates: it is no Sterna node.")
    return chain


def judge(store: PinStore, host: str, port: int, found: Pin, expected: NodeId | None = None) -> Pin:
    """Decides whether the node found at an address may be talked to, and returns the pin to go on with.

    `expected` is the node id a share link or the user named: it must match, and overrules what was known. Otherwise a
    known node must be the same as before, and an unknown one is trusted on first use. Nothing is stored: `put` the pin
    when the handshake with its context has succeeded. Raises TrustError with the reason and the way out.
    """
    if expected is not None:
        if found.node_id != expected:
            raise TrustError(
                f"The node at {_address(host, port)} has the fingerprint {fingerprint(found.node_id)}, but the one "
                f"asked for is {fingerprint(expected)}: get a new link, and do not go on if it stays so."
            )
        return found
    known = store.get(host, port)
    if known is not None and known.node_id != found.node_id:
        raise changed(host, port, known.node_id, found.node_id, store.path)
    return found


def confirm(connection: ssl.SSLSocket | ssl.SSLObject, pin: Pin, host: str, port: int, path: str = PINS_FILE) -> None:
    """Checks after a handshake with `pin.context()` that it is this node; raises TrustError if it is another.

    For usual pins the handshake has proved it; with a `system` one it proved the host name, and any node may use that.
    """
    if pin.system and (found := peer_of(connection, pin.node_id)).node_id != pin.node_id:
        raise changed(host, port, pin.node_id, found.node_id, path)


def changed(host: str, port: int, known: NodeId, found: NodeId, path: str) -> TrustError:
    """Returns the error for a node that is not the one known at this address; `path` is the file that knows it."""
    address = _address(host, port)
    return TrustError(
        f"The node at {address} is not the one known there: its fingerprint is {fingerprint(found)}, the known one is "
        f"{fingerprint(known)}; if it was set up anew, open a new share link or remove the line {address} from {path}, "
        "else somebody may be listening."
    )
