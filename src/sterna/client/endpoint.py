"""Where a node is and how to prove that it is the right one: a state directory, an address, or a share link."""

from __future__ import annotations

import os
import socket
import ssl

from sterna import paths
from sterna.errors import ConnectionLostError, TrustError, UsageError
from sterna.ids import NodeId, SessionUid
from sterna.trust.links import ShareLink, is_link, parse_link
from sterna.trust.local import read_local_token
from sterna.trust.pins import Pin, PinStore, judge, local_pin, peer_of, probe_context

DEFAULT_PORT = 7220
LOCAL_SOCKET = "node.sock"
_PROBE_SECONDS = 10.0

Address = tuple[int, tuple[object, ...] | str]
"""A socket family and what connect(2) takes for it."""


class Endpoint:
    """One node as a client reaches it.

    `addresses` are tried in turn; `context` is None for the node's own Unix socket; `credential` is a token or ticket.
    """

    __slots__ = ("addresses", "context", "credential", "name", "node_id", "session", "watch")

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


def state_of_node(state: str | None) -> str:
    """Returns the node's state directory: in `state` itself, or in the user's usual place."""
    base = state if state is not None else paths.state_path()
    inner = os.path.join(base, "node")
    return inner if os.path.isdir(inner) else base


def client_state(state: str | None = None) -> str:
    """Returns the directory of the client's own state (device key, pins), made if it is absent."""
    base = paths.state_path() if state is None else state
    return paths.private_dir(os.path.join(base, "client"))


def resolve(host: str, port: int) -> list[Address]:
    """Returns the addresses of a host; ConnectionLostError if it has none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
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
    that node; neither means the node of this user on this machine, over its Unix socket. Raises SternaError with what
    to do.
    """
    if link is not None:
        return _by_link(parse_link(link), state)
    node_state = state_of_node(state)
    credential = token or os.environ.get("STERNA_TOKEN", "")
    pin = local_pin(node_state) if os.path.isdir(node_state) else None
    if not credential and pin is not None:
        credential = read_local_token(node_state) or ""
    if host is not None:
        if not credential:
            raise UsageError(f"Reaching {host} needs an access token: use a share link, or set STERNA_TOKEN.")
        return _by_address(host, port or DEFAULT_PORT, state, credential, pin if not token else None)
    path = os.path.join(node_state, LOCAL_SOCKET)
    if pin is None or not os.path.exists(path):
        raise UsageError("No node runs here: start one with `sterna up`, or name a host or a share link.")
    return Endpoint("this machine", [(socket.AF_UNIX, path)], pin.node_id, context=None, credential=credential)


def _by_address(host: str, port: int, state: str | None, credential: str, pin: Pin | None) -> Endpoint:
    addresses = resolve(host, port)
    if pin is None:
        store = PinStore(client_state(state))
        pin = store.get(host, port) or meet(addresses, host, port, store, None)
    return Endpoint(f"{host}:{port}", addresses, pin.node_id, context=pin.context(), credential=credential)


def _by_link(link: ShareLink, state: str | None) -> Endpoint:
    if link.ticket is None:
        raise UsageError("This link has no ticket: ask for a new one with `sterna share`.")
    port = link.session_port
    addresses = resolve(link.host, port)
    store = PinStore(client_state(state))
    pin = store.get(link.host, port)
    if pin is None or (link.node_id is not None and pin.node_id != link.node_id):
        pin = meet(addresses, link.host, port, store, link.node_id)
    endpoint = Endpoint(f"{link.host}:{port}", addresses, pin.node_id, context=pin.context(), credential=link.ticket)
    endpoint.session = link.session
    endpoint.watch = link.mode == "watch"
    return endpoint


def meet(addresses: list[Address], host: str, port: int, store: PinStore, expected: NodeId | None) -> Pin:
    """Learns who is at an address that was never used before: asks, judges, proves with a second handshake, remembers.

    Raises TrustError when it is not who was expected, ConnectionLostError when nobody answers.
    """
    with _handshake(addresses, host, probe_context()) as probe:
        pin = judge(store, host, port, peer_of(probe, expected), expected)
    _handshake(addresses, host, pin.context()).close()
    store.put(host, port, pin)
    return pin


def _handshake(addresses: list[Address], host: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    reason = "no address"
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(_PROBE_SECONDS)
        try:
            sock.connect(address)
            return context.wrap_socket(sock)
        except ssl.SSLCertVerificationError:
            sock.close()
            raise TrustError(
                f"The node at {host} does not hold the key of its own certificate; do not go on."
            ) from None
        except OSError as error:
            sock.close()
            reason = error.strerror or str(error)
    raise ConnectionLostError(f"The node at {host} cannot be reached: {reason}.")


__all__ = ["Address", "Endpoint", "client_state", "find", "is_link", "meet", "resolve", "state_of_node"]
