"""QUIC for clients: one connection with one stream over one UDP socket, for any loop that can poll a descriptor.

Sources: RFC 9000 (section 9: migration), RFC 9001. A `QuicChannel` has no loop; what a driver calls: `fileno`,
`receive`, `send`, `next_timeout`, `handle_timeout`, and `migrate` when the machine's addresses changed. `QuicPump` does
that on an asyncio loop. Importing this module takes 30 to 60 ms (qh3), so drivers do it beside a session that is there.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from qh3.quic import events
from qh3.quic.configuration import QuicConfiguration

from sterna import limits
from sterna.transport import udp
from sterna.transport.quic_connection import PatientConnection
from sterna.trust.tls import ALPN
from sterna.units import MILLISECOND, SECOND

if TYPE_CHECKING:
    import asyncio

    from sterna.transport.pump import Reactor

IDLE_SECONDS = 60.0
WINDOW_BYTES = 4 * limits.WINDOW_BYTES
_STREAM = 0
_FULL_BYTES = 1_000
_READ_BYTES = 128 * 1024
_INITIAL_RTT_SECONDS = 0.1
_BUSY_MS, _STEADY_MS = 500, 500
_BAD_CERTIFICATES = range(0x100 + 42, 0x100 + 50)  # CRYPTO_ERROR with a certificate's alert (RFC 8446, section 6.2)
_NO_APPLICATION_PROTOCOL = 0x100 + 120  # RFC 9001, section 8.1
_AGAIN = (BlockingIOError, InterruptedError)


class QuicChannel:
    """One QUIC connection to a node whose own certificate is `ca` (DER), and its stream for one session.

    `established` says that the node proved who it is; `over` is "" or why the connection ended, and `stranger` that
    another one than the node answered. Addresses as for connect(2). Raises OSError if there is no way to the address.
    """

    def __init__(self, family: int, address: tuple[object, ...], ca: bytes) -> None:
        self._family = family
        self._address = address
        self._sock = self._open()
        self._quic = PatientConnection(
            configuration=QuicConfiguration(
                is_client=True, alpn_protocols=[ALPN], idle_timeout=IDLE_SECONDS, max_data=4 * WINDOW_BYTES,
                max_stream_data=WINDOW_BYTES, cadata=ssl.DER_cert_to_PEM_cert(ca).encode("ascii"),
                verify_hostname=False, initial_rtt=_INITIAL_RTT_SECONDS,
            )
        )  # fmt: skip
        self._blocked = b""
        self._pings = 0
        self._probe = 0
        self._probe_answered = 0
        self._waits_since = -1
        self._began = self._heard = self._busy = self._asked = self._came = self._run = time.monotonic_ns()
        self.rtt_ms = 0
        self.established = False
        self.ended = False
        self.stranger = False
        self.over = ""
        self._quic.connect(address, time.monotonic())
        self._transmit()

    def fileno(self) -> int:
        """Returns the descriptor to poll; another one after `migrate` returned True, -1 after `close`."""
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether the socket took less than there was: poll for writing, too, then call `flush`."""
        return bool(self._blocked)

    @property
    def source(self) -> str:
        """Our own address."""
        return str(self._sock.getsockname()[0])

    def _open(self) -> socket.socket:
        sock = udp.open_udp(self._family)
        udp.join(sock)
        try:
            sock.connect(self._address)
        except OSError:
            sock.close()
            raise
        return sock

    # ---- in ----------------------------------------------------------------------------------------------------

    def receive(self) -> bytes:
        """Reads what is there, not too much at once, answers it, and returns the bytes of the stream."""
        quic, address, now, left = self._quic, self._address, time.monotonic(), _READ_BYTES
        try:
            while left > 0:
                data, size = udp.receive(self._sock)
                if data and quic.take_run(data, size, address, now):
                    self._heard = time.monotonic_ns()
                left -= len(data) if len(data) >= _FULL_BYTES else left  # after a small one most likely none is there
        except _AGAIN:
            pass
        except OSError as error:
            # Nobody listens there (ICMP): while nothing is established that is an answer, later anybody could forge it.
            if not self.established:
                self._end(f"{os.strerror(error.errno or 0)}")
        except Exception as error:  # noqa: BLE001  # whatever hostile bytes make its parsers raise
            self._end(f"broken packets: {error}")
        came = self._deal()
        self._transmit()
        return came

    def _deal(self) -> bytes:
        parts: list[bytes] = []
        while (event := self._quic.next_event()) is not None:
            if isinstance(event, events.StreamDataReceived):
                if event.stream_id == _STREAM:
                    self._note_data(self._heard)
                    parts.append(event.data)
                    self.ended |= event.end_stream
            elif isinstance(event, events.HandshakeCompleted):
                self.rtt_ms = (time.monotonic_ns() - self._began) // MILLISECOND
                self.established = bool(event.alpn_protocol == ALPN)
                if not self.established:
                    self._transmit()  # the end of the handshake: the node cannot read what is said before that
                    self._quic.close(_NO_APPLICATION_PROTOCOL, None, "it names no protocol that we speak")
            elif isinstance(event, events.PingAcknowledged):
                self._probe_answered = max(self._probe_answered, event.uid)
                if event.uid == self._probe:
                    self.rtt_ms = (time.monotonic_ns() - self._asked) // MILLISECOND
            elif isinstance(event, events.StreamReset | events.StopSendingReceived):
                self.ended = True
            elif isinstance(event, events.ConnectionTerminated):
                self._end(event.reason_phrase or "the connection timed out")
        close = getattr(self._quic, "_close_event", None)
        if close is not None:
            # The node closed it; qh3 tells that as an event only when it has waited for late packets.
            self.stranger |= not self.established and close.error_code in _BAD_CERTIFICATES
            self._end(close.reason_phrase or "the node closed the connection")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _note_data(self, now: int) -> None:
        if now - self._came > _STEADY_MS // 2 * MILLISECOND:
            self._run = now
        self._came = self._busy = now

    def _end(self, reason: str) -> None:
        self.over = self.over or reason

    # ---- out ---------------------------------------------------------------------------------------------------

    def send(self, parts: list[bytes]) -> None:
        """Sends bytes on the stream, as the path takes them; the session's window bounds what waits."""
        if parts and not self.over:
            self._busy = time.monotonic_ns()
            try:
                self._quic.send_stream_data(_STREAM, parts[0] if len(parts) == 1 else b"".join(parts))
            except Exception as error:  # noqa: BLE001  # its errors have no common base
                self._end(f"broken connection: {error}")
            self._transmit()

    @property
    def queued(self) -> int:
        """How many bytes were not sent yet."""
        return 0 if self.over else self._quic.get_send_buffer_size(_STREAM)

    def flush(self) -> None:
        """Goes on when the socket takes datagrams again."""
        if self._put(self._blocked):
            self._blocked = b""
            self._transmit()

    def _put(self, data: bytes) -> bool:
        try:
            self._sock.send(data)
        except _AGAIN:
            return False
        except OSError:
            pass  # no route now, or an ICMP error for something sent before: the same as a loss
        return True

    def _transmit(self) -> None:
        if self._blocked or self._sock.fileno() < 0:
            return
        now = time.monotonic()
        try:
            while (data := self._quic.next_datagram(now)) is not None:
                if not self._put(data):
                    self._blocked = data
                    return
        except Exception as error:  # noqa: BLE001  # its errors have no common base
            self._end(f"broken connection: {error}")

    # ---- time --------------------------------------------------------------------------------------------------

    def next_timeout(self) -> int | None:
        """Returns when `handle_timeout` is to be called, in monotonic nanoseconds, or None."""
        due = None if self.over else self._quic.get_timer()
        return None if due is None else int(due * SECOND)

    def handle_timeout(self, now: int) -> None:
        """Does what is due: sends again, acknowledges, gives up."""
        due = self._quic.get_timer()
        if self.over or due is None or int(due * SECOND) > now + MILLISECOND:
            return
        try:
            self._quic.handle_timer(max(now / SECOND, due))
        except Exception as error:  # noqa: BLE001  # its errors have no common base
            self._end(f"broken connection: {error}")
        self._deal()  # timers bring no bytes
        self._transmit()

    def waiting_ms(self, now: int) -> int:
        """Returns for how many milliseconds sent packets wait for any answer, 0 when none do."""
        if self.over or not self._quic.should_wait_for_ack(now / SECOND):
            self._waits_since = -1
            return 0
        if self._waits_since < 0:
            self._waits_since = now
        self._waits_since = max(self._waits_since, self._heard)
        return max(0, now - self._waits_since) // MILLISECOND

    @property
    def busy(self) -> bool:
        """Whether bytes of the session came or went just now: silence would tell something."""
        return bool(time.monotonic_ns() - self._busy < _BUSY_MS * MILLISECOND)

    def watch(self, quiet_ms: int) -> None:
        """Asks, once in each silence, whether the path still works if what came steadily stops for `quiet_ms`.

        What comes now and then, as echoes and answers do, may stop at any time: that is left to the heartbeat.
        """
        steady = self._came - self._run >= _STEADY_MS * MILLISECOND
        if steady and self._asked < self._came and time.monotonic_ns() - self._heard >= quiet_ms * MILLISECOND:
            self.probe()

    # ---- paths -------------------------------------------------------------------------------------------------

    def migrate(self) -> bool:
        """Goes over to a new socket if our address towards the node has changed; True says that there is one.

        In either case the path is tried: `answered` tells. OSError says that there is no way to the node now.
        """
        sock = self._open()
        moved = bool(sock.getsockname()[0] != self._sock.getsockname()[0])
        if moved:
            old, self._sock = self._sock, sock
            old.close()
            self._blocked = b""
            self._renew_id()
        else:
            sock.close()
        self.probe()
        return moved

    def _renew_id(self) -> None:
        """Takes another connection ID: one on two paths shows that they belong together (RFC 9000, section 9.5)."""
        try:
            self._quic.change_connection_id()
        except ValueError:
            pass  # the node has not given another one yet

    def probe(self) -> None:
        """Asks whether the path works."""
        self._pings += 1
        self._probe = self._pings
        self._asked = time.monotonic_ns()
        self._quic.send_ping(self._probe)
        self._transmit()

    @property
    def answered(self) -> bool:
        """Whether the latest probe was answered."""
        return bool(self._probe_answered >= self._probe)

    # ---- end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Says goodbye and closes the socket."""
        if self._sock.fileno() >= 0:
            if not self.over:
                self._quic.close()
                self._transmit()
                self._end("closed")
            self._sock.close()


class QuicPump:
    """Drives one QUIC connection on the loop, as a `Pump` does a socket; `on_tended` follows everything it does."""

    __slots__ = ("_fd", "_loop", "_on_tended", "_reactor", "_timer", "_writing", "channel", "number")

    def __init__(
        self, reactor: Reactor, channel: QuicChannel, number: int, on_tended: Callable[[QuicPump, bytes], None]
    ) -> None:
        self._reactor = reactor
        self._loop = reactor.loop
        self.channel = channel
        self.number = number
        self._on_tended = on_tended
        self._timer: asyncio.TimerHandle | None = None
        self._writing = False
        self._fd = -1
        self.rewatch()

    def rewatch(self) -> None:
        """Watches the channel's descriptor, which a migration changes."""
        self._unwatch()
        self._fd = self.channel.fileno()
        self._loop.add_reader(self._fd, self._readable)
        self.arm()

    def _unwatch(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            if self._writing:
                self._loop.remove_writer(self._fd)
                self._writing = False
            self._fd = -1

    def _readable(self) -> None:
        self._tended(self.channel.receive())

    def _writable(self) -> None:
        self.channel.flush()
        self._tended(b"")

    def _due(self) -> None:
        self._timer = None
        self.channel.handle_timeout(time.monotonic_ns())
        self._tended(b"")

    def _tended(self, data: bytes) -> None:
        self._reactor.run(self._on_tended, self, data)
        self.arm()

    def send(self, parts: list[bytes]) -> None:
        """Sends bytes."""
        self.channel.send(parts)
        self.arm()

    def arm(self) -> None:
        """Sets the timer and what the descriptor is watched for."""
        if self._fd < 0:
            return
        if self.channel.wants_write != self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._loop.remove_writer(self._fd)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.channel.next_timeout()
        if due is not None:
            self._timer = self._loop.call_later(max(due - time.monotonic_ns(), 0) / SECOND, self._due)

    def close(self) -> None:
        """Ends the connection."""
        self._unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.channel.close()


__all__ = ["QuicChannel", "QuicPump"]
