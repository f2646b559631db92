"""Nodes of other machines that were reached over ssh: what is remembered of them, and whether they answer directly."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import socket
import time

import msgspec

from sterna import limits, paths
from sterna.client.calls import Caller
from sterna.client.endpoint import Address, Endpoint, client_state, resolve
from sterna.errors import ConnectionLostError, SternaError, TrustError, UsageError
from sterna.ids import NodeId, check_agent
from sterna.trust import base64url
from sterna.trust.certificate import CERTIFICATE_MAX_BYTES, node_id_of
from sterna.trust.fingerprint import parse_fingerprint
from sterna.trust.pins import Pin

ADDRESSES_MAX = 16
RECORD_MAX_BYTES = 64 * 1024
_GRACE_SECONDS = 0.05
_TARGET = re.compile(
    r"(?:ssh://)?(?:(?P<user>[A-Za-z0-9._][A-Za-z0-9._+-]{0,63})@)?"
    r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,32})?)\]|(?P<host>[A-Za-z0-9_.][A-Za-z0-9._-]{0,252}))"
    r"(?::(?P<port>[0-9]{1,5}))?(?:/(?P<agent>[^/]*))?\Z"
)


class Target:
    """Where ssh shall go: `user@host`, or `ssh://[user@]host[:port][/agent]`; `port` is ssh's, None: as configured."""

    __slots__ = ("agent", "host", "port", "user")

    def __init__(self, text: str) -> None:
        """Raises UsageError if it is no such thing."""
        found = _TARGET.match(text)
        port = int(found["port"]) if found is not None and found["port"] else None
        if found is None or port == 0 or (port or 0) > 65_535 or (port is not None and not text.startswith("ssh://")):
            raise UsageError(f"{text[:80]!r} is no machine for ssh: use user@host, or ssh://user@host:port.")
        self.user: str | None = found["user"]
        self.host: str = found["six"] or found["host"]
        self.port = port
        self.agent: str | None = check_agent(found["agent"]) if found["agent"] else None

    @property
    def login(self) -> str:
        """What ssh takes."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def key(self) -> str:
        """Under what it is remembered."""
        return f"{self.login} {self.port or ''}"


class Remote(msgspec.Struct, forbid_unknown_fields=False):
    """A node on another machine: where it listens, who it is, and a token for it until `expires` (Unix seconds).

    `node` is the fingerprint, `ca` the node's own certificate in base64url; `host` is where it listens there.
    """

    addresses: list[str]
    port: int
    node: str
    ca: str
    token: str
    expires: int
    host: str = ""
    started: bool = False
    hint: str = ""

    def pin(self) -> Pin:
        """Returns the pin; raises TrustError if id and certificate do not belong together."""
        ca = base64url.decode(self.ca, CERTIFICATE_MAX_BYTES)
        node_id: NodeId = parse_fingerprint(self.node)
        if ca is None or node_id_of(ca) != node_id:
            raise TrustError("What the other machine says about its node does not fit together; attach again.")
        return Pin(node_id, ca)

    def check(self) -> None:
        """Raises UsageError if a value is impossible."""
        if not 0 < self.port <= 65_535 or len(self.addresses) > ADDRESSES_MAX or not self.token.isascii():
            raise UsageError("The other machine's answer makes no sense: update sterna there.")


class RemoteStore:
    """What the client remembers of nodes it reached over ssh: one private file for each target."""

    __slots__ = ("_directory",)

    def __init__(self, state: str | None) -> None:
        self._directory = paths.private_dir(os.path.join(client_state(state), "remotes"))

    def _path(self, target: Target) -> str:
        return os.path.join(self._directory, hashlib.sha256(target.key.encode()).hexdigest()[:32] + ".json")

    def get(self, target: Target, now_s: int) -> Remote | None:
        """Returns what is known and still valid at `now_s` (Unix seconds); None, too, if it is damaged."""
        content = paths.read_private(self._path(target), RECORD_MAX_BYTES)
        if content is None:
            return None
        try:
            remote = msgspec.json.decode(content, type=Remote)
            remote.check()
        except (msgspec.DecodeError, UnicodeDecodeError, UsageError):
            return None
        return remote if remote.expires > now_s else None

    def put(self, target: Target, remote: Remote) -> None:
        """Remembers a node."""
        paths.atomic_write(self._path(target), msgspec.json.encode(remote))

    def forget(self, target: Target) -> None:
        """Forgets a node."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(target))


def endpoint_of(remote: Remote, target: Target, *, seconds: float, state: str | None) -> Endpoint:
    """Returns the remote node as it can be reached directly now, after asking it.

    Raises ConnectionLostError if nothing answers within `seconds`, TrustError if another node does, RefusedError if the
    token is not valid any more.
    """
    addresses: list[Address] = []
    for host in dict.fromkeys(remote.addresses):
        with contextlib.suppress(ConnectionLostError):
            addresses += [each for each in resolve(host, remote.port) if each not in addresses]
    pin = remote.pin()
    context = pin.context()
    reason: SternaError = ConnectionLostError("It names no address that can be reached.")
    for address in _answering(addresses, seconds):
        endpoint = Endpoint(target.host, [address], pin.node_id, context=context, credential=remote.token)
        try:
            Caller(endpoint, state=state, timeout=seconds).close()
        except (ConnectionLostError, TrustError) as error:
            reason = error
            continue
        return endpoint
    raise reason


def _answering(addresses: list[Address], seconds: float) -> list[Address]:
    """Returns the addresses where somebody accepts a connection, the quickest first; all are tried at once."""
    poll = select.poll()
    open_: dict[int, tuple[socket.socket, Address]] = {}
    found: list[Address] = []
    try:
        for address in addresses[:ADDRESSES_MAX]:
            sock = socket.socket(address[0], socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            open_[sock.fileno()] = (sock, address)
            sock.connect_ex(address[1])
            poll.register(sock, select.POLLOUT)
        waiting = len(open_)
        deadline = time.monotonic() + seconds
        while waiting and (left := deadline - time.monotonic()) > 0:
            for fd, _events in poll.poll(left * 1000):
                poll.unregister(fd)
                waiting -= 1
                sock, address = open_[fd]
                if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    found.append(address)
                    # The others get a moment, so that a node with two addresses is known by both.
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    finally:
        for sock, _ in open_.values():
            sock.close()
    return found


assert ADDRESSES_MAX * 256 < RECORD_MAX_BYTES
assert limits.TOKEN_MAX_BYTES < RECORD_MAX_BYTES
