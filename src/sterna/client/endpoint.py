"""Where a node is and how to prove that it is the right one: a state directory, an address, or a share link."""

from __future__ import annotations

import os
import socket
import ssl
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sterna import paths
from sterna.client.line import Line
from sterna.errors import ConnectionLostError, SternaError, TrustError, UsageError
from sterna.ids import NodeId, SessionUid
from sterna.trust.fingerprint import fingerprint
from sterna.trust.links import ShareLink, is_link, parse_link
from sterna.trust.local import read_local_token
from sterna.trust.pins import Pin, PinStore, changed, judge, local_pin, peer_of, probe_context
from sterna.units import SECOND

if TYPE_CHECKING:
    from sterna.transport.quic_client import QuicChannel

DEFAULT_PORT = 7220
LOCAL_SOCKET = "node.sock"
WAYS_FILE = "known_ways"
WAYS_MAX = 1_024
WAYS_FILE_MAX_BYTES = 512 * 1024
_PROBE_SECONDS = 10.0
_QUIC_MODULE = "sterna.transport.quic_client"
_REST, _REST_MAX = 60 * SECOND, 3600 * SECOND
_TCP_TRIES = 4

Address = tuple[int, tuple[object, ...] | str]
"""A socket family and what connect(2) takes for it."""

notice: Callable[[str], None] = lambda _text: None  # noqa: E731 -- replaced by the command line
"""Hears, in one sentence, that a node is trusted on first use."""


class Endpoint:
    """One node as a client reaches it.

    `addresses` are tried in turn; `context` is None for the node's own Unix socket; `credential` is a token or ticket.
    `place` is host, port and the file that says which node is known there, if it was given so. `ways` knows how it may
    be reached over QUIC.
    """

    __slots__ = ("addresses", "context", "credential", "name", "node_id", "place", "session", "watch", "ways")

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
        self.ways = Ways()


class Ways:
    """Whether the next connection to a node goes over QUIC or TCP (docs/protocol.md, section 1).

    A session stays with TCP, where a key costs less, until its client has moved: then it goes over to QUIC. Where TCP
    does not get through, QUIC is tried beside it. QUIC is only imported for one of these, because that takes longer
    than a connection.

    `targets` are the node's UDP addresses, none where QUIC is off or its port not known yet; without a `port` it is
    learnt from the node, as long as `addresses` says where that is. `ca` is the node's own certificate. What was found
    is kept in the file `path` under `key` for the next program. Times are monotonic nanoseconds.
    """

    __slots__ = (
        "_addresses", "_connected", "_doubted", "_key", "_learns", "_loading", "_path", "_port", "_rest", "_tries",
        "_turn", "ca", "moves", "retry_at", "targets", "works",
    )  # fmt: skip

    def __init__(
        self, addresses: list[Address] | None = None, ca: bytes = b"", *, port: int = 0, path: str = "", key: str = ""
    ) -> None:
        self._addresses = addresses or []
        self._learns = port == 0
        self._port = 0
        self.targets: list[Address] = []
        self.ca = ca
        self._path = path
        self._key = key
        self.works: bool | None = None
        self.moves = port != 0
        self.retry_at = 0
        self._rest = _REST
        self._tries = self._turn = 0
        self._loading = self._connected = self._doubted = False
        self._aim(port)
        if path:
            self._recall()

    def _aim(self, port: int) -> None:
        self._port = port
        places = [(family, address) for family, address in self._addresses if port and not isinstance(address, str)]
        self.targets = [(family, (address[0], port, *address[2:])) for family, address in places]

    def learn(self, port: int) -> None:
        """Takes the node's word for its UDP port (0: none), unless the user named one."""
        if self._learns and port != self._port and 0 <= port < 65_536:
            self.works = None
            self.retry_at = 0
            self._aim(port)

    @property
    def channel(self) -> type[QuicChannel] | None:
        """What makes QUIC connections, None while it is not loaded or there is no use for it."""
        module = sys.modules.get(_QUIC_MODULE) if self.targets else None
        # While another thread imports it, the module is there without its content.
        return getattr(module, "QuicChannel", None)

    @property
    def wanted(self) -> bool:
        """Whether a session that runs over TCP is to go over to QUIC: it moved, or the user named the port."""
        return bool(self.targets) and self.moves

    @property
    def loading(self) -> bool:
        """Whether QUIC is being imported."""
        return self._loading and bool(self.targets) and self.channel is None

    def load(self) -> None:
        """Begins to import QUIC in a thread, so that nobody waits for it."""
        if self.targets and not self._loading:
            self._loading = True
            if _QUIC_MODULE not in sys.modules:
                import threading

                threading.Thread(target=self._import, daemon=True).start()

    def _import(self) -> None:
        try:
            import sterna.transport.quic_client  # noqa: F401  # it is taken from the table of modules
        except ImportError:
            self.targets = []  # QUIC is not there: everything goes over TCP

    def target(self) -> Address:
        """Returns the UDP address that is next in turn."""
        self._turn += 1
        return self.targets[self._turn % len(self.targets)]

    def over_quic(self) -> bool:
        """Tells whether the next attempt of a race goes over QUIC: each second one, the first where it may work.

        Until QUIC is imported, which begins when TCP has had its time, all of them go over TCP.
        """
        self._tries += 1
        if self.channel is None:
            if self._tries >= _TCP_TRIES:
                self.load()
            return False
        first = not self._doubted and (self.works or (self.works is None and self._connected))
        return self._tries % 2 == (1 if first else 0)

    def doubt(self) -> None:
        """Has the coming race begin over TCP: QUIC gets no answer now."""
        self._doubted = True

    def won(self, *, quic: bool, now: int) -> None:
        """Notes that a race is over; one that TCP has won says nothing about QUIC, as both may have been cut off."""
        self._tries = 0
        self._connected = True
        self._doubted = False
        if quic:
            self.remember(True, now)

    def remember(self, works: bool, now: int) -> None:
        """Notes whether QUIC works; where it does not, it is tried again after a minute, later after an hour."""
        if works:
            self._rest = _REST
        else:
            self.retry_at = now + self._rest
            self._rest = min(self._rest * 2, _REST_MAX)
        if works is not self.works:
            self.works = works
            self._keep(works)

    def renew(self) -> None:
        """Forgets that QUIC did not work: we are in another network."""
        self.retry_at = 0
        self._rest = _REST
        self.works = self.works or None

    def _recall(self) -> None:
        try:
            lines = (paths.read_private(self._path, WAYS_FILE_MAX_BYTES) or b"").decode("ascii").splitlines()
        except (SternaError, UnicodeDecodeError):
            return  # it only saves time
        for line in lines:
            key, word, port, *_ = (*line.split(" "), "", "")
            known = int(port) if port.isdigit() and len(port) < 6 else 0
            if key == self._key and word in ("quic", "tcp") and (self._learns or known == self._port):
                self.learn(known)
                self.works = word == "quic"
                self.retry_at = 0 if self.works else time.monotonic_ns() + _REST

    def _keep(self, works: bool) -> None:
        if not self._path:
            return
        try:
            content = (paths.read_private(self._path, WAYS_FILE_MAX_BYTES) or b"").decode("ascii", "replace")
            lines = [line for line in content.splitlines() if not line.startswith(self._key + " ")]
            lines.append(f"{self._key} {'quic' if works else 'tcp'} {self._port}")
            content = "".join(f"{line}\n" for line in lines[-WAYS_MAX:])
            paths.atomic_write(self._path, content.encode("ascii", "replace"))
        except (SternaError, OSError):
            pass  # it only saves time


def _ways(endpoint: Endpoint, pin: Pin, host: str, port: int, quic_port: int | None, state: str | None) -> Ways:
    """Returns the ways to a node: QUIC on `quic_port`, else $STERNA_QUIC_PORT, else where the node says; 0: never."""
    if quic_port is None:
        named = os.environ.get("STERNA_QUIC_PORT", "")
        quic_port = int(named) if named.isdigit() and int(named) < 65_536 else None
    if quic_port == 0 or pin.system:
        return Ways()
    path = os.path.join(client_state(state), WAYS_FILE)
    return Ways(endpoint.addresses, pin.ca, port=quic_port or 0, path=path, key=_joined(host, port))


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
    quic_port: int | None = None,
) -> Endpoint:
    """Returns the node that is meant, ready to be dialled.

    A link names everything; `host` goes over TCP and TLS, with the local node's certificate and token if `state` holds
    that node; `port` alone means 127.0.0.1; none of them the node of this user on this machine, over its Unix socket.
    `quic_port` is its UDP port (0: no QUIC; None: $STERNA_QUIC_PORT, else what the node says). Raises SternaError with
    what to do.
    """
    if link is not None:
        return _by_link(parse_link(link), state, quic_port)
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
        return _by_address(host, port or DEFAULT_PORT, state, credential, pin, own=own, quic_port=quic_port)
    path = os.path.join(node_state, LOCAL_SOCKET)
    if pin is None or not os.path.exists(path):
        raise UsageError("No node runs here: start one with `sterna up`, or name a host or a share link.")
    return Endpoint("this machine", [(socket.AF_UNIX, path)], pin.node_id, context=None, credential=credential)


def _by_address(
    host: str, port: int, state: str | None, credential: str, local: Pin | None, *, own: bool, quic_port: int | None
) -> Endpoint:
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
    endpoint.ways = _ways(endpoint, pin, host, port, quic_port, state)
    return endpoint


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _by_link(link: ShareLink, state: str | None, quic_port: int | None) -> Endpoint:
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
    endpoint.ways = _ways(endpoint, pin, link.host, port, quic_port, state)
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
        pin = judge(store, host, port, peer_of(probe.tls, expected), expected)
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
    what = f"The node at {name} cannot be reached: {error.strerror or error}"
    if isinstance(error, ConnectionRefusedError):
        port = ", and is the port right" if ":" in name else ""
        return ConnectionLostError(f"{what}; is `sterna up` running there{port}?")
    return ConnectionLostError(f"{what}.")


def stranger(endpoint: Endpoint) -> TrustError:
    """Returns the error for a node whose certificate is not the one known at that address, with both fingerprints."""
    if endpoint.place is None:
        return TrustError(f"The node at {endpoint.name} is not the one known there: its certificate is another's.")
    host, port, path = endpoint.place
    try:
        with _handshake(endpoint.addresses, endpoint.name, probe_context()) as probe:
            found = peer_of(probe.tls).node_id
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


def _handshake(addresses: list[Address], name: str, context: ssl.SSLContext) -> Line:
    reason = ConnectionLostError(f"The node at {name} has no address.")
    for address in addresses:
        try:
            return Line(address, context, time.monotonic() + _PROBE_SECONDS)
        except ssl.SSLCertVerificationError:
            raise TrustError(
                f"The node at {name} does not hold the key of its own certificate; do not go on."
            ) from None
        except OSError as error:
            reason = unreachable(name, error)
    raise reason


__all__ = [
    "Address", "Endpoint", "client_state", "find", "is_link", "meet", "resolve", "state_of_node", "stranger",
    "unreachable",
]  # fmt: skip
