"""The node: everything composed in one place, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from sterna import limits, paths
from sterna.clock import SYSTEM_CLOCK
from sterna.errors import DRAINING_TEXT, Code, UsageError
from sterna.journal.journal import Journal
from sterna.node.callqueue import CallQueue
from sterna.node.calls import Calls
from sterna.node.clients import ClientConnection
from sterna.node.config import QUIC_PORT, NodeConfig
from sterna.node.crowd import Crowd
from sterna.node.database import WAL_MAX_BYTES
from sterna.node.doorkeeper import Doorkeeper
from sterna.node.pods import Pod, PodRegistry, Port
from sterna.node.store import Store
from sterna.node.table import SessionTable
from sterna.node.turns import Turns
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.session import Session
from sterna.protocol.states import State
from sterna.transport.listen import Accepted, Listener, peer_uid, tcp_socket, unix_socket
from sterna.transport.pump import Conduit, Owner, Pump, Reactor
from sterna.transport.ticker import Ticker
from sterna.transport.tls import TlsSocket
from sterna.trust.local import create_local_token
from sterna.trust.node_identity import CHAIN_FILE, LEAF_FILE, NodeIdentity
from sterna.trust.tls import ALPN
from sterna.trust.tokens import Access, TokenFile, TokenKey
from sterna.units import MILLISECOND, SECOND

if TYPE_CHECKING:
    from sterna.transport.quic import QuicListener

log = logging.getLogger("sterna.node")

T = TypeVar("T")

LOCAL_SOCKET = "node.sock"
DAMAGED_TEXT = (
    "The database was damaged and begun anew: sessions (names and output), devices and share links are lost, while "
    "keys, tokens and revocations stay; end the programs of the lost sessions by restarting their agents."
)
_PEM_MAX_BYTES = 1024 * 1024
_SWEEP_SECONDS = 1.0
_FILES_KEPT = 1024
_EVICT_EVERY = 5
_HOUSEKEEP_EVERY = 60
_RENEW_EVERY = 86_400
_DEAD_AFTER = 3
_DRAIN_SECONDS = 5.0
_SLICE = 4 * MILLISECOND


class Node:
    """The session daemon of one machine.

    Make one inside a running loop, then `start`, and `close` at the end. `address` is where TCP clients reach it.
    """

    def __init__(self, config: NodeConfig) -> None:
        """Opens store and journal, loads or makes the identity; raises SternaError with what is wrong."""
        self.config = config
        self.directory = paths.private_dir(config.state)
        self.sockets = paths.socket_dir(config.sockets)
        now_s = SYSTEM_CLOCK.wall() // SECOND
        self.identity = NodeIdentity.load(self.directory, config.hosts(), now_s=now_s)
        self.token_key = TokenKey.load(self.directory)
        tokens = TokenFile.load(config.token_file) if config.token_file else None
        access = Access([self.token_key.public], file=tokens, local=create_local_token(self.directory))
        self.journal = Journal(os.path.join(self.directory, "journal"), quota_bytes=config.journal_quota_bytes)
        self.store = Store(self.directory)
        self.doorkeeper = Doorkeeper(self.identity.node_id, access, self.store)
        self.reactor = Reactor(asyncio.get_running_loop())
        self.ticker = Ticker(self.reactor)
        self.table = SessionTable(
            self.store, self.journal, boot=boot_id(), overwrite=config.on_full == "overwrite",
            retention=config.retention_seconds, ring_bytes=config.ring_bytes, spill_bytes=config.spill_bytes,
        )  # fmt: skip
        self.table.on_lost = self._soon
        if self.store.damaged:
            log.error(DAMAGED_TEXT, extra={"moved_to": self.store.damaged})
        self.table.claim_logs()
        self.registry = PodRegistry(self.sockets, self.table, self.reactor, self.ticker, config.tenants())
        self.calls = Calls(self)
        self.call_queue = CallQueue(self.reactor)
        self.turns = Turns(self.reactor)
        self.connections: set[ClientConnection] = set()
        self._unproved: dict[ClientConnection, None] = {}
        # What else has files open here (the journal, the store, pods) must find room beside the clients.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._connections_max = min(limits.CONNECTIONS_MAX, files - min(_FILES_KEPT, files // 4))
        self.crowd = Crowd(self._connections_max)
        self._listeners: list[Listener] = []
        self._secured: dict[Listener, str] = {}
        self._tls: Listener | None = None
        self._quic: QuicListener | None = None
        self.no_quic = ""  # a sentence where it should be there and cannot
        self._sweeps = 0
        self._timer: asyncio.TimerHandle | None = None
        self._checkpointing: asyncio.Future[bool] | None = None
        self.draining = self._closed = False
        self.stop_requested = asyncio.Event()
        self._all_gone = asyncio.Event()
        self.started = SYSTEM_CLOCK.wall()
        self.accepted = 0
        self._local_path = os.path.join(self.directory, LOCAL_SOCKET)

    def _soon(self, work: Callable[[], None]) -> None:
        self.reactor.loop.call_soon(lambda: self.reactor.run(work))

    # ---- start -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listens, and looks for pods; UsageError when an address cannot be had."""
        self._end_of_boot()
        self._tls = self.listen(tcp_socket(self.config.host, self.config.port), self._remote, ALPN)
        self._listeners.append(Listener(self.reactor, unix_socket(self._local_path), self._local))
        if self.config.quic_port:
            self._quic = self._listen_quic()
        self.registry.start()
        self._timer = self.reactor.loop.call_later(_SWEEP_SECONDS, self._sweep)
        log.info("node started", extra={"host": self.address[0], "port": self.address[1]})

    def listen(self, sock: socket.socket, accepted: Accepted, alpn: str) -> Listener:
        """Takes TLS connections of a listening socket, with the node's certificate and its bounds, until `close`."""
        try:
            listener = Listener(
                self.reactor, sock, accepted, context=self._context(alpn),
                per_address=self.config.unauthenticated_per_address,
            )  # fmt: skip
        except BaseException:
            sock.close()
            raise
        self._secured[listener] = alpn
        self._listeners.append(listener)
        return listener

    def _listen_quic(self) -> QuicListener | None:
        """Takes QUIC connections; where the usual port is in use, TCP has to do."""
        from sterna.transport.quic import QuicListener, server_configuration
        from sterna.transport.udp import udp_socket

        config = self.config
        try:
            sock = udp_socket(config.host, config.quic_port)
        except UsageError as error:
            if config.quic_port != QUIC_PORT:
                raise
            log.warning("no QUIC", extra={"reason": str(error)})
            self.no_quic = f"There is no QUIC: {error}"
            return None
        try:
            return QuicListener(
                self.reactor, sock, self.adopt, server_configuration(self._pem()),
                per_address=config.unauthenticated_per_address, unproved_max=config.unauthenticated_max,
            )  # fmt: skip
        except BaseException:
            sock.close()
            raise

    @property
    def quic_port(self) -> int:
        """The UDP port of QUIC, 0 if there is none."""
        return self._quic.address[1] if self._quic is not None else 0

    def _pem(self) -> bytes:
        """Returns the certificates that TLS presents, and their key."""
        config = self.config
        if config.tls_cert is None:
            files = [os.path.join(self.directory, LEAF_FILE)]
        else:
            files = [os.path.join(self.directory, CHAIN_FILE), config.tls_key or config.tls_cert]
        content = b""
        for path in files:
            with open(path, "rb") as file:
                content += file.read(_PEM_MAX_BYTES) + b"\n"
        return content

    def _context(self, alpn: str) -> ssl.SSLContext:
        config = self.config
        return self.identity.server_context(certificate=config.tls_cert, key=config.tls_key, alpn=(alpn,))

    @property
    def address(self) -> tuple[str, int]:
        """The host and TCP port it listens on."""
        assert self._tls is not None
        return self._tls.address

    @property
    def silent(self) -> int:
        """How many accepted connections have not sent anything yet."""
        return sum(listener.silent for listener in self._secured)

    @property
    def evicted(self) -> int:
        """How many of those were closed to make room, or because they stayed silent."""
        return sum(listener.evicted for listener in self._secured)

    def _end_of_boot(self) -> None:
        """After a restart of the machine no program lives on: its sessions are named as ended, never replaced."""
        boot = self.table.boot
        if self.store.meta("boot") not in (None, boot):
            after, living = 0, (State.CONNECTING, State.ACTIVE, State.SUSPENDED)
            wall = SYSTEM_CLOCK.wall()
            while batch := self.store.sessions(None, living, after, 500):
                after = batch[-1].number
                with self.store.transaction():
                    for row in batch:
                        if row.boot != boot:
                            reason = "The machine was restarted."
                            self.store.set_end(row.number, int(Code.AGENT_LOST), reason, None, None, b"", wall)
        self.store.set_meta("boot", boot)

    def _remote(self, sock: socket.socket | TlsSocket, peer: str) -> None:
        self._take(sock, peer, handshake=isinstance(sock, TlsSocket), local=False)

    def _local(self, sock: socket.socket, _peer: str) -> None:
        _pid, uid = peer_uid(sock)
        if uid not in (0, os.geteuid()):
            sock.close()
            return
        self._take(sock, "local", handshake=False, local=True)

    def _take(self, sock: socket.socket | TlsSocket, peer: str, *, handshake: bool, local: bool) -> None:
        def carry(link: Link, owner: Owner) -> Conduit:
            return Pump(self.reactor, sock, link, owner, peer=peer, handshake=handshake)

        if not self.adopt(carry, local=local):
            sock.close()

    def adopt(self, carry: Callable[[Link, Owner], Conduit], *, local: bool = False) -> bool:
        """Takes a client's connection, whatever carries it; False, and nothing is begun, when there are too many."""
        if len(self.connections) >= self._connections_max + (limits.LOCAL_CONNECTIONS_RESERVED if local else 0):
            return False
        connection = ClientConnection(self, carry, local=local)
        self.accepted += 1
        self.connections.add(connection)
        if not local:
            self._unproved[connection] = None
            if len(self._unproved) > self.config.unauthenticated_max:
                oldest = next(iter(self._unproved))
                oldest.pump.abort("too many connections without a proof")
        connection.pump.start()
        return True

    def proved(self, connection: ClientConnection) -> None:
        """Notes that somebody on a connection proved who they are."""
        self._unproved.pop(connection, None)

    def gone(self, connection: ClientConnection, reason: str) -> None:
        """Forgets a connection that ended."""
        self.connections.discard(connection)
        self.crowd.gone(connection)
        self._unproved.pop(connection, None)
        if self.draining and not self.connections:
            self._all_gone.set()

    # ---- housekeeping ------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Once a second: late handshakes end; more rarely: dead peers, cold sessions, retention, certificates."""
        self._timer = self.reactor.loop.call_later(_SWEEP_SECONDS, self._sweep)
        self._sweeps += 1
        now = SYSTEM_CLOCK.monotonic()
        self.reactor.run(self._late, now)
        self._relieve()
        self.doorkeeper.sum_up(now)
        if self._sweeps % _EVICT_EVERY == 0:
            self._slowly(iter(list(self.connections)), self._check_peer)
            self._slowly(iter(self.table.cold(self.config.cold_seconds * SECOND, now)), self._evict)
        if self._sweeps % _HOUSEKEEP_EVERY == 0:
            self._purge()
        if self._sweeps % _HOUSEKEEP_EVERY == 0 or self.store.wal_bytes() > WAL_MAX_BYTES:
            self._checkpoint()
        if self._sweeps % _RENEW_EVERY == 0 and self.identity.renew(now_s=SYSTEM_CLOCK.wall() // SECOND):
            for listener, alpn in self._secured.items():
                listener.context = self._context(alpn)
            if self._quic is not None:
                from sterna.transport.quic import server_configuration

                self._quic.configuration = server_configuration(self._pem())

    def _checkpoint(self) -> None:
        """Brings the store onto the disk beside the loop; a log that grew long meanwhile would hold writers up."""
        if self._checkpointing is None or self._checkpointing.done():
            self._checkpointing = self.reactor.loop.run_in_executor(None, self.store.checkpoint)
            self._checkpointing.add_done_callback(_log_failure)

    def _slowly(self, items: Iterator[T], work: Callable[[T, int], None]) -> None:
        """Does some work, a few milliseconds long; the rest in later turns of the loop, so that nobody waits for it."""

        def some() -> None:
            began = now = SYSTEM_CLOCK.monotonic()
            for item in () if self._closed else items:
                work(item, now)
                now = SYSTEM_CLOCK.monotonic()
                if now - began > _SLICE:
                    self.reactor.loop.call_soon(self._slowly, items, work)
                    return

        self.reactor.run(some)

    def _evict(self, session: Session, now: int) -> None:
        """Takes a cold session out of memory."""
        self.table.evict(session, self.config.cold_seconds * SECOND, now, park)

    def _purge(self) -> None:
        """Forgets what is older than the retention time, a batch in each turn of the loop."""
        if not self._closed and self.table.purge():
            self.reactor.loop.call_soon(self._purge)

    def _late(self, now: int) -> None:
        deadline = now - limits.HANDSHAKE_SECONDS * SECOND
        for connection in list(self._unproved):
            if connection.since > deadline:
                break
            if connection.pump.handshaking or connection.link.closing:
                connection.pump.abort("no valid CONNECT or RESUME in time")
                continue
            connection.link.fail(Code.TIMEOUT, "No valid CONNECT or RESUME came in time.")
            connection.pump.flush()

    def _relieve(self, most: int = limits.OUTBOUND_TOTAL_MAX_BYTES) -> None:
        """Keeps what waits for all clients together below `most` bytes: those that let most wait go; they may
        resume.
        """
        queued = [(connection.pump.queued, connection) for connection in self.connections if connection.link.blocked]
        total = sum(size for size, _ in queued)
        for size, connection in sorted(queued, key=lambda entry: -entry[0]) if total > most else ():
            connection.pump.abort("too much waits for all clients together")
            total -= size
            if total <= most:
                return

    def _check_peer(self, connection: ClientConnection, now: int) -> None:
        """Asks a quiet client whether it is there, and gives up one that says nothing three times."""
        if connection.last < now - limits.KEEPALIVE_SECONDS * SECOND * _DEAD_AFTER and connection.pinged:
            connection.pump.abort("it does not answer")
        elif connection.last < now - limits.KEEPALIVE_SECONDS * SECOND * 2 and not connection.pinged:
            connection.pinged = True
            connection.link.send(Type.PING, 0, 0, b"")

    def pods(self, tenant: str) -> list[Pod]:
        """Returns the agents of a tenant."""
        return self.registry.pods(tenant)

    # ---- end ---------------------------------------------------------------------------------------------------

    async def drain(self, seconds: float = _DRAIN_SECONDS) -> None:
        """Takes no new sessions, lets what is queued go out, and tells clients to come back later."""
        if self.draining:
            return
        self.draining = True
        log.info("node drains", extra={"connections": len(self.connections)})

        def tell() -> None:
            for connection in list(self.connections):
                connection.link.fail(Code.DRAINING, DRAINING_TEXT, retry_after=1.0)

        self.reactor.run(tell)
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_gone.wait(), seconds)

    async def close(self) -> None:
        """Stops at once; sessions and pods stay."""
        self._closed = True
        for listener in self._listeners:
            listener.close()
        if self._timer is not None:
            self._timer.cancel()
        self.ticker.close()
        await self.registry.close()
        for connection in list(self.connections):
            connection.pump.abort("the node stops")
        if self._quic is not None:
            self._quic.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._local_path)
        self.store.close()
        self.journal.close()


def _log_failure(checkpoint: asyncio.Future[bool]) -> None:
    if not checkpoint.cancelled() and checkpoint.exception() is not None:
        log.error("the store could not be written", extra={"reason": str(checkpoint.exception())})


def park(session: Session) -> None:
    """Lets a session leave memory: its pod's frames, or a client, bring it back."""
    if isinstance(session.port, Port):
        session.port.connection.park(session)


def boot_id() -> str:
    """Returns what tells this start of the machine from another one (proc(5), random/boot_id); "" where there is
    none.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read(64).strip()
    except OSError:
        return ""
