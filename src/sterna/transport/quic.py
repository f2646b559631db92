"""QUIC for the node: one UDP socket, any number of connections, one link per bidirectional stream.

Sources: RFC 9000 (section 8: address validation, section 9: migration), RFC 9001 (TLS), RFC 9002 (loss recovery).
qh3 does the packets and the handshake; here are the socket, the dispatch by connection ID, the Retry, migration, the
timers and all bounds. There is no 0-RTT, because no session ticket is issued.

qh3 follows a peer to three other addresses at most and never back to an earlier one, so it is told that all datagrams
come from the first, and `QuicPeer` follows: to an address that a datagram came from and that answers a PING.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import os
import re
import socket
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from qh3._hazmat import pull_quic_header
from qh3.quic import events
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.packet import QuicPacketType, encode_quic_retry, encode_quic_version_negotiation

from sterna import limits
from sterna.errors import ConfigError
from sterna.protocol.link import Link
from sterna.transport.places import Places, place
from sterna.transport.pump import _NOBODY, Conduit, Owner, Reactor, _ignore
from sterna.transport.quic_connection import PatientConnection
from sterna.transport.udp import Address, runs, send_run
from sterna.trust.tls import ALPN

IDLE_SECONDS = 60.0
STREAM_WINDOW_BYTES = 4 * limits.WINDOW_BYTES
CONNECTION_WINDOW_BYTES = 4 * STREAM_WINDOW_BYTES
STREAMS_MAX = 64
RETRY_ABOVE = 32
BEGIN_PER_TURN_MAX = limits.HANDSHAKES_PER_TURN_MAX
SEND_HIGH_BYTES = 256 * 1024
SEND_LOW_BYTES = 128 * 1024
WAITING_DATAGRAMS_MAX = 2_048

_CID_BYTES = 8
_CID_MAX_BYTES = 20
_DATAGRAM_MAX_BYTES = 4_096
_INITIAL_MIN_BYTES = 1_200  # RFC 9000, section 14.1
_BATCH = 64
_TOKEN = struct.Struct("!dB")
_TOKEN_SECONDS = 10.0
_MAC_BYTES = 16
_SWEEP_SECONDS = 1.0
_DATAGRAM_SENT_BYTES = 1_500
_CANDIDATE_SECONDS, _CANDIDATE_MAX_SECONDS, _ASK_AGAIN_SECONDS, _MISSED_SECONDS = 0.05, 3.0, 0.05, 10.0
_LONG = 0x80
_NO_ERROR, _REFUSED = 0, 1
_APPLICATION = 0x100
_PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----\r?\n?", re.DOTALL)

Adopt = Callable[[Callable[[Link, Owner], Conduit]], bool]
"""Takes what makes a conduit for a link; False, and nothing is begun, when there are too many (`Node.adopt`)."""


def server_configuration(pem: bytes) -> QuicConfiguration:
    """Returns what all connections of a node share: its key and certificates, in any order in `pem`, and the windows.

    Raises ConfigError if they cannot be used.
    """
    blocks = [(match[1], match[0]) for match in _PEM.finditer(pem)]
    certificates = b"".join(text for kind, text in blocks if kind == b"CERTIFICATE")
    keys = [text for kind, text in blocks if kind.endswith(b"PRIVATE KEY")]
    configuration = QuicConfiguration(
        is_client=False, alpn_protocols=[ALPN], connection_id_length=_CID_BYTES, idle_timeout=IDLE_SECONDS,
        max_data=CONNECTION_WINDOW_BYTES, max_stream_data=STREAM_WINDOW_BYTES,
    )  # fmt: skip
    try:
        configuration.load_cert_chain(certificates, keys[0])
    except Exception as error:  # whatever its parsers raise
        raise ConfigError(f"The node's certificate and key cannot be used for QUIC: {error}.") from error
    return configuration


class QuicStream:
    """A conduit over one bidirectional stream; its end leaves the connection's other streams alone."""

    __slots__ = ("_closed", "_connection", "_marked", "_number", "data", "link", "owner", "peer")

    def __init__(self, connection: QuicPeer, number: int, link: Link, owner: Owner) -> None:
        self._connection = connection
        self._number = number
        self.link = link
        self.owner = owner
        self.peer = connection.host
        self.data: object = None
        self._closed = self._marked = False
        link.wake = self._wake

    @property
    def handshaking(self) -> bool:
        """A stream begins after the handshake."""
        return False

    @property
    def queued(self) -> int:
        """How many bytes wait for the other side to take them."""
        return self.link.out_bytes + (0 if self._closed else self._connection.unsent(self._number))

    @property
    def closed(self) -> bool:
        """Whether the stream is over."""
        return self._closed

    def start(self) -> None:
        """Begins: the connection gives it what comes."""

    def hold(self, on: bool) -> None:
        """Does nothing: who may send how much is QUIC's to say, and the owner's bound."""

    def received(self, data: bytes, ended: bool) -> None:
        """Passes on what came, and the stream's end."""
        if data:
            self.owner.received(self, memoryview(data))
            if self.link.closing and not self._closed:
                self.flush()
        if ended and not self._closed:
            if not self.link.closing and self.link.receive_eof() is not None:
                # It ended inside a frame and may still read: it is told so.
                self.link.check()
            self.link.closing = True
            self.link.blocked = False
            self.flush("closed by the other side")

    def _wake(self) -> None:
        if not self._marked:
            self._marked = True
            self._connection.reactor.mark(self)

    def flush(self, reason: str = "closed") -> None:
        """Sends what the link has; what the other side does not take waits, and blocks bulk data, until it does."""
        self._marked = False
        link = self.link
        if self._closed:
            return
        if link.blocked:
            if link.out_bytes > limits.OUTBOUND_MAX_BYTES:
                self.abort("it takes nothing and too much waits for it")
            return
        if parts := link.data_to_send():
            self._connection.put(self._number, parts[0] if len(parts) == 1 else b"".join(parts))
            self._connection.transmit()
            link.blocked = self._connection.unsent(self._number) >= SEND_HIGH_BYTES
        if link.closing:
            self._close(reason)

    def unblock(self) -> None:
        """Goes on once enough was sent of what waited."""
        if not self._closed and self.link.blocked and self._connection.unsent(self._number) < SEND_LOW_BYTES:
            self.link.blocked = False
            self.flush()
            if not self.link.blocked:
                self.owner.drained(self)

    def _close(self, reason: str) -> None:
        """Ends the stream after what was sent."""
        if not self._closed:
            self._connection.finish(self._number)
            self.end(reason)

    def abort(self, reason: str) -> None:
        """Ends the stream at once."""
        if not self._closed:
            self._connection.reset(self._number)
            self.end(reason)

    def end(self, reason: str) -> None:
        """Notes that the stream is over."""
        if self._closed:
            return
        self._closed = True
        self.link.closing = True
        self._connection.forget(self._number)
        owner, self.owner = self.owner, _NOBODY
        owner.ended(self, reason)
        self.link.wake = _ignore


class _Candidate:
    """An address that a peer may have moved to: `uid` is the first PING it has to answer, `budget` what it may get."""

    __slots__ = ("address", "asked", "began", "budget", "uid")

    def __init__(self, address: Address, uid: int, budget: int, now: float) -> None:
        self.address = address
        self.uid = uid
        self.budget = budget
        self.began = self.asked = now


class QuicPeer:
    """One QUIC connection: its streams, its timer, and its connection IDs in the listener's table.

    `address` is where it is now, `host` the address it came from first; `since` when it began, or when its last stream
    ended.
    """

    __slots__ = (
        "_adopt", "_candidate", "_first", "_highest", "_initial", "_listener", "_missed", "_pings", "_quic",
        "_skipped", "_streams", "_timer", "_timer_at", "address", "cids", "dead", "host", "place", "ready",
        "reactor", "since",
    )  # fmt: skip

    def __init__(
        self, listener: QuicListener, quic: PatientConnection, address: Address, adopt: Adopt,
        initial: tuple[int, bytes, bytes] | None,
    ) -> None:  # fmt: skip
        """`initial` is what a Retry has to name (version, IDs of node and client); None after one."""
        self._listener = listener
        self._quic = quic
        self._initial = initial
        self._adopt = adopt
        self.reactor: Reactor = listener.reactor
        self.address = self._first = address
        self.host: str = address[0]
        self.place = place(self.host)
        self._candidate: _Candidate | None = None
        self._missed = -_MISSED_SECONDS
        self._pings = 0
        self.cids: set[bytes] = set()
        self._streams: dict[int, QuicStream] = {}
        self._highest = -4
        self._skipped: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.ready = self.dead = False
        self.since = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether there is no stream."""
        return not self._streams

    # ---- in ----------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, address: Address) -> None:
        """Takes one datagram; what it brings is dealt with by `deal`."""
        now = time.monotonic()
        if address != self.address and not self.ready:
            return  # nobody moves before the handshake is done (RFC 9000, section 9)
        try:
            if address != self.address:
                self._consider(address, len(data), now)
            self._quic.take_run(data, len(data), self._first, now)
        except Exception as error:  # noqa: BLE001  # whatever hostile bytes make its parsers raise
            self.drop(f"broken packets: {error}")

    def _consider(self, address: Address, size: int, now: float) -> None:
        """Asks an address whether the peer is there; till then it gets three times of what came from it.

        The first one gets a whole datagram, unless another did not answer lately: so nobody can use us to flood others,
        and a PING that goes with a full packet arrives. The acknowledgement proves that what went there was read; qh3
        never repeats a PING under its old number.
        """
        candidate = self._candidate
        if candidate is not None and candidate.address != address:
            if now - candidate.began < _CANDIDATE_SECONDS:
                return
            self._missed = now
            candidate = None
        if candidate is None:
            least = _DATAGRAM_SENT_BYTES if now - self._missed >= _MISSED_SECONDS else 0
            candidate = _Candidate(address, self._pings + 1, max(least, 3 * size), now)
            self._candidate = candidate
        else:
            candidate.budget += 3 * size
            if now - candidate.asked < _ASK_AGAIN_SECONDS:
                return
            candidate.asked = now
        self._pings += 1
        self._quic.send_ping(self._pings)

    def _answered(self, uid: int) -> None:
        """Goes over to the address that answered."""
        candidate = self._candidate
        if candidate is not None and uid >= candidate.uid:
            self.address = candidate.address
            self._candidate = None
            self._listener.moves += 1

    def _where(self, size: int) -> Address:
        """Returns where the next datagram goes."""
        candidate = self._candidate
        if candidate is None:
            return self.address
        if time.monotonic() - candidate.began > _CANDIDATE_MAX_SECONDS:
            self._missed = time.monotonic()
            self._candidate = None
            return self.address
        if candidate.budget < size:
            return self.address
        candidate.budget -= size
        return candidate.address

    def deal(self) -> None:
        """Deals with all events."""
        while not self.dead:
            event = self._quic.next_event()
            if event is None:
                close = getattr(self._quic, "_close_event", None)
                if close is not None:
                    # One side closed it; qh3 tells that as an event only when it has waited for late packets. If it was
                    # qh3, for what it was sent, it has that to say.
                    self.transmit()
                    self.drop(close.reason_phrase or "closed by the other side")
                return
            if isinstance(event, events.StreamDataReceived):
                self._stream_data(event)
            elif isinstance(event, events.PingAcknowledged):
                self._answered(event.uid)
            elif isinstance(event, events.StreamReset | events.StopSendingReceived):
                stream = self._streams.get(event.stream_id)
                if stream is not None:
                    stream.abort("the other side ended the stream")
            elif isinstance(event, events.ConnectionIdIssued):
                self._listener.know(event.connection_id, self)
            elif isinstance(event, events.ConnectionIdRetired):
                self._listener.unknow(event.connection_id)
                self.cids.discard(event.connection_id)
            elif isinstance(event, events.HandshakeCompleted):
                self.ready = True
                self._listener.shook(self)
            elif isinstance(event, events.ConnectionTerminated):
                self.drop(event.reason_phrase or "closed by the other side")

    def _stream_data(self, event: events.StreamDataReceived) -> None:
        number = event.stream_id
        stream = self._streams.get(number)
        if stream is None:
            if not self._is_new(number):
                return
            if number % 4:
                self.close(_APPLICATION, "only bidirectional streams of the client carry sessions")
                return
            stream = self._begin(number)
            if stream is None:
                return
        stream.received(event.data, event.end_stream)

    def _is_new(self, number: int) -> bool:
        """Tells whether a stream begins; streams may begin in any order (RFC 9000, section 2.1)."""
        if number % 4:
            return True
        if number > self._highest:
            self._skipped.update(range(self._highest + 4, number, 4))
            self._highest = number
            return True
        if number in self._skipped:
            self._skipped.discard(number)
            return True
        return False

    def _begin(self, number: int) -> QuicStream | None:
        made: list[QuicStream] = []

        def carry(link: Link, owner: Owner) -> Conduit:
            stream = self._streams[number] = QuicStream(self, number, link, owner)
            made.append(stream)
            return stream

        if len(self._streams) >= STREAMS_MAX or not self._adopt(carry):
            self.reset(number)
            return None
        self._listener.proving(self)
        return made[0]

    # ---- out ---------------------------------------------------------------------------------------------------

    def unsent(self, number: int) -> int:
        """Returns how many bytes of a stream were not sent yet."""
        return 0 if self.dead else self._quic.get_send_buffer_size(number)

    def put(self, number: int, data: bytes) -> None:
        """Queues bytes of a stream."""
        if not self.dead:
            try:
                self._quic.send_stream_data(number, data)
            except Exception as error:  # noqa: BLE001  # its errors have no common base
                self.drop(f"broken connection: {error}")

    def finish(self, number: int) -> None:
        """Ends a stream after what was queued."""
        if not self.dead:
            self._quiet(self._quic.send_stream_data, number, b"", True)
            self._quiet(self._quic.stop_stream, number, _NO_ERROR)
            self.transmit()

    def reset(self, number: int) -> None:
        """Ends a stream at once."""
        if not self.dead:
            self._quiet(self._quic.reset_stream, number, _REFUSED)
            self._quiet(self._quic.stop_stream, number, _REFUSED)
            self.transmit()

    def _quiet(self, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception:  # noqa: BLE001, S110  # the stream is over on that side already
            pass

    def forget(self, number: int) -> None:
        """Forgets a stream that ended."""
        self._streams.pop(number, None)
        if not self._streams and not self.dead:
            self.since = time.monotonic()
            self._listener.idle(self)

    def transmit(self) -> None:
        """Sends what may be sent now, and sets the timer."""
        listener = self._listener
        if self.dead:
            return
        if listener.full:
            listener.wait(self)
            return
        quic, now = self._quic, time.monotonic()
        try:
            # Before the handshake is done all of it or nothing: see below.
            for whole, _ in () if self.ready else quic.datagrams_to_send(now):
                listener.send(whole, self._where(len(whole)))
            for run in runs(iter(lambda: quic.next_datagram(now), None)):
                if self._candidate is None:
                    listener.send_run(run, self.address)
                else:
                    for data in run:
                        listener.send(data, self._where(len(data)))
        except Exception as error:  # noqa: BLE001  # a broken connection must not end the others
            self.drop(f"broken connection: {error}")
            if self._initial is not None and not self.ready:
                # Where a client says hello in one datagram, qh3 fails to cut its answer to three times of that. It has
                # sent nothing yet, so the client can still be asked for its address, which ends the limit.
                self._listener.retry(*self._initial, self.address)
            return
        self._arm()

    def unblock(self) -> None:
        """Lets streams go on whose waiting bytes were sent."""
        for stream in [stream for stream in self._streams.values() if stream.link.blocked]:
            stream.unblock()

    def _arm(self) -> None:
        """Sets the timer; one that is early stays, it will look again."""
        due = self._quic.get_timer()
        if due is None or self.dead:
            return
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self.reactor.loop.call_later(max(due - time.monotonic(), 0.0), self._due)

    def _due(self) -> None:
        self._timer = None
        now = time.monotonic()
        due = self._quic.get_timer()
        if due is not None and due <= now + 0.001:
            try:
                self._quic.handle_timer(max(now, due))
            except Exception as error:  # noqa: BLE001  # a broken connection must not end the others
                self.drop(f"broken connection: {error}")
            self._listener.touched(self)
        else:
            self._arm()

    # ---- end ---------------------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Tells the other side that the connection ends, and ends it."""
        if not self.dead:
            self._quic.close(code, None, reason)
            self.transmit()
            self.drop(reason)

    def drop(self, reason: str) -> None:
        """Ends the connection without a word."""
        if self.dead:
            return
        self.dead = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._listener.gone(self)
        for stream in list(self._streams.values()):
            stream.end(reason)


class QuicListener:
    """Serves QUIC on one UDP socket; every new stream of a client goes to `adopt`.

    A connection costs state only for an address that answered a Retry, once more than RETRY_ABOVE handshakes are open
    or several begin at once. Connections without a stream are bounded in total and per address, the oldest makes room,
    and live for `seconds`; what streams have to prove is the owner's business.
    """

    def __init__(
        self, reactor: Reactor, sock: socket.socket, adopt: Adopt, configuration: QuicConfiguration, *,
        per_address: int = limits.UNAUTHENTICATED_PER_ADDRESS_MAX, unproved_max: int = 1024,
        seconds: float = limits.HANDSHAKE_SECONDS,
    ) -> None:  # fmt: skip
        self.reactor = reactor
        self._sock = sock
        self._adopt = adopt
        self.configuration = configuration
        self._per_address = per_address
        self._unproved_max = unproved_max
        self._seconds = seconds
        self._key = os.urandom(32)
        self._cids: dict[bytes, QuicPeer] = {}
        self._peers: set[QuicPeer] = set()
        self._unproved: OrderedDict[QuicPeer, None] = OrderedDict()
        self._places = Places()
        self._shaking: set[QuicPeer] = set()
        self._begun = 0
        self._waiting: deque[tuple[bytes, Address]] = deque()
        self._held: dict[QuicPeer, None] = {}
        self._runs = True
        self._sweep: asyncio.TimerHandle | None = None
        self.retries = self.evicted = self.moves = 0
        reactor.loop.add_reader(sock.fileno(), self._readable)

    @property
    def address(self) -> tuple[str, int]:
        """The host and UDP port that it listens on."""
        name = self._sock.getsockname()
        return name[0], name[1]

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._peers)

    @property
    def shaking(self) -> int:
        """How many handshakes are not done."""
        return len(self._shaking)

    # ---- in ----------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        self._begun = 0
        touched: dict[QuicPeer, None] = {}
        for _ in range(_BATCH):
            try:
                data, address = self._sock.recvfrom(_DATAGRAM_MAX_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                continue  # an ICMP error for something sent before
            peer = self._peer(data, address)
            if peer is not None:
                peer.receive(data, address)
                touched[peer] = None
        self.touched(*touched)

    def touched(self, *peers: QuicPeer) -> None:
        """Deals with what happened on connections: as one event, and then what is to be sent goes out."""
        self.reactor.run(self._deal, peers)
        for peer in peers:
            peer.transmit()
        self.reactor.run(self._unblock, peers)

    def _deal(self, peers: Iterable[QuicPeer]) -> None:
        for peer in peers:
            peer.deal()

    def _unblock(self, peers: Iterable[QuicPeer]) -> None:
        for peer in peers:
            peer.unblock()

    def _peer(self, data: bytes, address: Address) -> QuicPeer | None:
        """Returns whose datagram this is, a new one's too; None for what is nobody's."""
        if len(data) <= _CID_BYTES:
            return None
        if not data[0] & _LONG:
            return self._cids.get(data[1 : 1 + _CID_BYTES])
        try:
            version, kind, _, target, source, token, *_ = pull_quic_header(data, 0, _CID_BYTES)
        except ValueError:
            return None
        peer = self._cids.get(target)
        if peer is not None or len(data) < _INITIAL_MIN_BYTES or version is None:
            return peer
        if version not in self.configuration.supported_versions:
            answer = encode_quic_version_negotiation(
                source_cid=target, destination_cid=source, supported_versions=self.configuration.supported_versions
            )
            self.send(answer, address)
            return None
        if kind != QuicPacketType.INITIAL or not _CID_BYTES <= len(target) <= _CID_MAX_BYTES:
            return None
        return self._new(version, target, source, token, address)

    def _new(self, version: int, target: bytes, source: bytes, token: bytes, address: Address) -> QuicPeer | None:
        original, retried = target, None
        if token:
            original = self._redeem(token, target, address)
            if not original:
                return None  # forged, or too old: the client begins anew
            retried = target
        elif len(self._shaking) >= RETRY_ABOVE or self._begun >= BEGIN_PER_TURN_MAX:
            self.retry(version, target, source, address)
            return None
        self._begun += 1
        self._make_room(place(address[0]))
        try:
            quic = PatientConnection(
                configuration=self.configuration, original_destination_connection_id=original,
                retry_source_connection_id=retried,
            )  # fmt: skip
        except Exception:  # noqa: BLE001  # whatever it does not like about an address or an ID of a stranger
            return None
        peer = QuicPeer(self, quic, address, self._adopt, None if retried else (version, target, source))
        self._peers.add(peer)
        self._shaking.add(peer)
        self._hold(peer)
        self.know(target, peer)
        self.know(quic.host_cid, peer)
        if self._sweep is None:
            self._sweep = self.reactor.loop.call_later(_SWEEP_SECONDS, self._look)
        return peer

    def _hold(self, peer: QuicPeer) -> None:
        self._unproved[peer] = None
        self._places.add(peer.place)

    def idle(self, peer: QuicPeer) -> None:
        """Notes that a connection has no stream any more: it counts again as one that has proved nothing."""
        if peer not in self._unproved:
            self._make_room(peer.place)
            self._hold(peer)

    def _make_room(self, where: str) -> None:
        if self._places.at(where) >= self._per_address:
            self._evict(next(peer for peer in self._unproved if peer.place == where))
        elif len(self._unproved) >= self._unproved_max:
            self._evict(next(iter(self._unproved)))

    def _evict(self, peer: QuicPeer) -> None:
        self.evicted += 1
        peer.close(_NO_ERROR, "too many connections without a session")

    # ---- Retry (RFC 9000, section 8.1.2) -----------------------------------------------------------------------

    def retry(self, version: int, target: bytes, source: bytes, address: Address) -> None:
        """Asks an address to show that it can read what is sent to it; that keeps no state."""
        self.retries += 1
        chosen = os.urandom(_CID_BYTES)
        head = _TOKEN.pack(time.monotonic() + _TOKEN_SECONDS, len(target)) + target
        answer = encode_quic_retry(
            version=version, source_cid=chosen, destination_cid=source, original_destination_cid=target,
            retry_token=head + self._mac(head, chosen, address),
        )  # fmt: skip
        self.send(answer, address)

    def _redeem(self, token: bytes, chosen: bytes, address: Address) -> bytes:
        """Returns the connection ID that a client chose before it was asked; b"" if the token is not good."""
        head, mac = token[:-_MAC_BYTES], token[-_MAC_BYTES:]
        if len(head) < _TOKEN.size or not hmac.compare_digest(mac, self._mac(head, chosen, address)):
            return b""
        due, size = _TOKEN.unpack_from(head)
        return head[_TOKEN.size : _TOKEN.size + size] if due >= time.monotonic() else b""

    def _mac(self, head: bytes, chosen: bytes, address: Address) -> bytes:
        place = f"{address[0]} {address[1]} {chosen.hex()} ".encode()
        return hmac.digest(self._key, place + head, hashlib.sha256)[:_MAC_BYTES]

    # ---- connections -------------------------------------------------------------------------------------------

    def know(self, cid: bytes, peer: QuicPeer) -> None:
        """Notes that a connection ID is a connection's."""
        if not peer.dead:
            self._cids[cid] = peer
            peer.cids.add(cid)

    def unknow(self, cid: bytes) -> None:
        """Forgets a connection ID."""
        self._cids.pop(cid, None)

    def shook(self, peer: QuicPeer) -> None:
        """Notes that a handshake is done."""
        self._shaking.discard(peer)

    def proving(self, peer: QuicPeer) -> None:
        """Notes that a connection has a stream: the owner looks after it now."""
        if peer in self._unproved:
            del self._unproved[peer]
            self._places.remove(peer.place)

    def gone(self, peer: QuicPeer) -> None:
        """Forgets a connection."""
        self._peers.discard(peer)
        self._shaking.discard(peer)
        self._held.pop(peer, None)
        self.proving(peer)
        for cid in peer.cids:
            self._cids.pop(cid, None)
        peer.cids.clear()

    def _look(self) -> None:
        """Once a second: connections go whose handshake takes too long, or that had no stream for as long."""
        self._sweep = None
        late = time.monotonic() - self._seconds
        for peer in [peer for peer in self._peers if peer.idle and peer.since < late]:
            peer.close(_NO_ERROR, "no session")
        if self._peers:
            self._sweep = self.reactor.loop.call_later(_SWEEP_SECONDS, self._look)

    # ---- out ---------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether the socket takes nothing now."""
        return bool(self._waiting)

    def wait(self, peer: QuicPeer) -> None:
        """Lets a connection send once the socket takes datagrams again."""
        self._held[peer] = None

    def send(self, data: bytes, address: Address) -> None:
        """Sends a datagram, or keeps it until the socket takes it; one that finds no place is lost, as on any path."""
        if self._waiting:
            if len(self._waiting) < WAITING_DATAGRAMS_MAX:
                self._waiting.append((data, address))
            return
        try:
            self._sock.sendto(data, address)
        except (BlockingIOError, InterruptedError):
            self._waiting.append((data, address))
            self.reactor.loop.add_writer(self._sock.fileno(), self._writable)
        except OSError:
            pass  # no route, or too large: the same as a loss

    def send_run(self, run: list[bytes], address: Address) -> None:
        """Sends datagrams in one call, if it can."""
        if self._runs and not self._waiting:
            try:
                send_run(self._sock, run, address)
                return
            except OSError as error:
                # What no interface on the way there can take apart, none will.
                self._runs = error.errno not in (errno.EINVAL, errno.EIO, errno.ENOPROTOOPT)
        for data in run:
            self.send(data, address)

    def _writable(self) -> None:
        waiting = self._waiting
        while waiting:
            try:
                self._sock.sendto(*waiting[0])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                pass
            waiting.popleft()
        self.reactor.loop.remove_writer(self._sock.fileno())
        held = list(self._held)
        self._held.clear()
        self.touched(*held)

    def close(self) -> None:
        """Ends all connections and closes the socket."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for peer in list(self._peers):
            peer.close(_NO_ERROR, "the node stops")
        if self._sock.fileno() >= 0:
            self.reactor.loop.remove_reader(self._sock.fileno())
            self.reactor.loop.remove_writer(self._sock.fileno())
            self._sock.close()


__all__ = ["IDLE_SECONDS", "QuicListener", "QuicStream", "server_configuration"]
