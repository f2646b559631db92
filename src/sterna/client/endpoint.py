"""Where a node is and how to prove that it is the right one: a state directory, an address, or a share link."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable

from sterna import paths
from sterna.errors import ConnectionLostError, TrustError, UsageError
from sterna.ids import NodeId, SessionUid
from sterna.trust.fingerprint import fingerprint
from sterna.trust.links import ShareLink, is_link, parse_link
from sterna.trust.local import read_local_token
from sterna.trust.pins import Pin, PinStore, changed, judge, local_pin, peer_of, probe_context

DEFAULT_PORT = 7220
LOCAL_SOCKET = "node.sock"
_PROBE_SECONDS = 10.0

Address = tuple[int, tuple[object, ...] | str]
"""A socket family and what connect(2) takes for it."""

notice: Callable[[str], None] = lambda _text: None  # noqa: E731 -- replaced by the command line
"""Hears, in one sentence, that a node is trusted on first use."""


class Endpoint:
    """One node as a client reaches it.

    `addresses` are tried in turn; `context` is None for the node's own Unix socket; `credential` is a token or ticket.
    `place` is host, port and the file that says which node is known there, if it was given so.
    """

    __slots__ = ("addresses", "context", "credential", "name", "node_id", "place", "session", "watch")

    def __init__(
        self, name: str, addresses: list[Address], node_id: NodeId, *, context: ssl.SSLContext | None, credential: str
    ) -> None:
        self.name = name
        self.addresses = addresses
        self.node_id = node_id
        self.context = context
        self.credential = credential
        self.session: SessionUid | None = None
        self.watch = False
        self.place: tuple[str, int, str] | None = None


def state_of_node(state: str | None) -> str:
    """Returns the node's own directory: `node` in the state directory, or `state` itself (`sterna node --state`)."""
    base = state if state is not None else paths.state_path()
    inner = os.path.join(base, "node")
    itself = os.path.exists(os.path.join(base, LOCAL_SOCKET)) and not os.path.exists(os.path.join(inner, LOCAL_SOCKET))
    return base if itself or not os.path.isdir(inner) else inner


def client_state(state: str | None = None) -> str:
    """Returns the directory of the client's own state (device key, pins), made if it is absent."""
    base = paths.state_path() if state is None else state
    return paths.private_dir(os.path.join(base, "client"))


def resolve(host: str, port: int) -> list[Address]:
    """Returns the addresses of a host; ConnectionLostError if it has none."""
    # As bytes, because for a str Python imports its tables for names in other scripts: 2 ms of each start.
    name = host.encode() if host.isascii() else host
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectionLostError(f"The host {host!r} cannot be found: {error.strerror}.") from None
    return [(family, address) for family, _, _, _, address in found]


def find(
    *,
    state: str | None = None,
    host: str | None = None,
    port: int | None = None,
    link: str | None = None,
    token: str | None = None,
) -> Endpoint:
    """Returns the node that is meant, ready to be dialled.

    A link names everything; `host` goes over TCP and TLS, with the local node's certificate and token if `state` holds
    that node; `port` alone means 127.0.0.1; none of them the node of this user on this machine, over its Unix socket.
    Raises SternaError with what to do.
    """
    if link is not None:
        return _by_link(parse_link(link), state)
    if host is None and port is not None:
        host = "127.0.0.1"
    node_state = state_of_node(state)
    credential = token or os.environ.get("STERNA_TOKEN", "")
    pin = local_pin(node_state) if os.path.isdir(node_state) else None
    if not credential and pin is not None:
        credential = read_local_token(node_state) or ""
    if host is not None:
        if not credential:
            raise UsageError(f"Reaching {host} needs an access token: use a share link, or set STERNA_TOKEN.")
        own = not token and not os.environ.get("STERNA_TOKEN")
        return _by_address(host, port or DEFAULT_PORT, state, credential, pin, own=own)
    path = os.path.join(node_state, LOCAL_SOCKET)
    if pin is None or not os.path.exists(path):
        raise UsageError("No node runs here: start one with `sterna up`, or name a host or a share link.")
    return Endpoint("this machine", [(socket.AF_UNIX, path)], pin.node_id, context=None, credential=credential)


def _by_address(host: str, port: int, state: str | None, credential: str, local: Pin | None, *, own: bool) -> Endpoint:
    """Returns the node at an address: `own` says that it must be this user's; with a token it may be anybody's."""
    addresses = resolve(host, port)
    path = state_of_node(state)
    pin = local if own else None
    if pin is None:
        store = PinStore(client_state(state))
        pin = store.get(host, port) or meet(addresses, host, port, store, None, local=local)
        path = store.path
    endpoint = Endpoint(_joined(host, port), addresses, pin.node_id, context=pin.context(), credential=credential)
    endpoint.place = host, port, path
    return endpoint


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _by_link(link: ShareLink, state: str | None) -> Endpoint:
    if link.ticket is None:
        raise UsageError(
            "This link has no ticket: quote it ('sterna://…'), as the shell cuts it at each &, or ask for a new one."
        )
    port = link.session_port
    addresses = resolve(link.host, port)
    store = PinStore(client_state(state))
    pin = store.get(link.host, port)
    if pin is None or (link.node_id is not None and pin.node_id != link.node_id):
        pin = meet(addresses, link.host, port, store, link.node_id)
    endpoint = Endpoint(_joined(link.host, port), addresses, pin.node_id, context=pin.context(), credential=link.ticket)
    endpoint.place = link.host, port, store.path
    endpoint.session = link.session
    endpoint.watch = link.mode == "watch"
    return endpoint


def meet(
    addresses: list[Address], host: str, port: int, store: PinStore, expected: NodeId | None, local: Pin | None = None
) -> Pin:
    """Learns who is at an address that was never used before: asks, judges, proves with a second handshake, remembers.

    `local` is this user's own node, known already. Raises TrustError when it is not who was expected,
    ConnectionLostError when nobody answers.
    """
    name = _joined(host, port)
    with _handshake(addresses, name, probe_context()) as probe:
        pin = judge(store, host, port, peer_of(probe, expected), expected)
    _handshake(addresses, name, pin.context()).close()
    if expected is None and (local is None or local.node_id != pin.node_id):
        notice(f"Trusting {name} on first use, fingerprint {fingerprint(pin.node_id)}.")
    store.put(host, port, pin)
    return pin


def unreachable(name: str, error: OSError) -> ConnectionLostError:
    """Returns the error, in one sentence, for a node at `name` (host:port) to which no connection could be made."""
    if isinstance(error, ssl.SSLError):
        return ConnectionLostError(f"What listens at {name} does not answer as a Sterna node: check host and port.")
    if isinstance(error, TimeoutError):
        return ConnectionLostError(f"The node at {name} does not answer: check host and port, and the firewalls.")
    return ConnectionLostError(f"The node at {name} cannot be reached: {error.strerror or error}.")


def stranger(endpoint: Endpoint) -> TrustError:
    """Returns the error for a node whose certificate is not the one known at that address, with both fingerprints."""
    if endpoint.place is None:
        return TrustError(f"The node at {endpoint.name} is not the one known there: its certificate is another's.")
    host, port, path = endpoint.place
    try:
        with _handshake(endpoint.addresses, endpoint.name, probe_context()) as probe:
            found = peer_of(probe).node_id
    except (ConnectionLostError, TrustError):
        return TrustError(
            f"What listens at {endpoint.name} is not the node known there ({fingerprint(endpoint.node_id)}), nor any "
            "Sterna node: check host and port."
        )
    if os.path.isdir(path):
        return TrustError(
            f"The node at {endpoint.name} is not this user's node: its fingerprint is {fingerprint(found)}, that of "
            f"{path} is {fingerprint(endpoint.node_id)}; for another node give a share link or set STERNA_TOKEN."
        )
    return changed(host, port, endpoint.node_id, found, path)


def _handshake(addresses: list[Address], name: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    reason = ConnectionLostError(f"The node at {name} has no address.")
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(_PROBE_SECONDS)
        try:
            sock.connect(address)
            return context.wrap_socket(sock)
        except ssl.SSLCertVerificationError:
            sock.close()
            raise TrustError(
                f"The node at {name} does not hold the key of its own certificate; do not go on."
            ) from None
        except OSError as error:
            sock.close()
            reason = unreachable(name, error)
    raise reason


__all__ = [
    "Address", "Endpoint", "client_state", "find", "is_link", "meet", "resolve", "state_of_node", "stranger",
    "unreachable",
]  # fmt: skip
