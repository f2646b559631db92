"""The poll() loop that drives a `ClientMachine` in a terminal program: no asyncio, so it starts fast and answers
fast.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sterna.client.dialling import Dialling
from sterna.client.endpoint import Endpoint, unreachable
from sterna.client.watchers import AckWatch, AddressWatch, SleepWatch, tcp_state
from sterna.protocol.client import ClientMachine, Dial, Event, Opened, Trouble
from sterna.transport.tls import TlsSocket
from sterna.units import MILLISECOND, SECOND

if TYPE_CHECKING:
    from sterna.transport.quic_client import QuicChannel

_READ_BYTES = 256 * 1024
_RECORD_BYTES = 16 * 1024
_PIECE_BYTES = 128 * 1024
_READS_MAX = 32
"""Records read before anything else is done: full ones fill the buffer sooner, small ones may come without end."""
_AGAIN = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_WATCH_QUICK, _WATCH_BUSY, _WATCH_IDLE = 50 * MILLISECOND, 100 * MILLISECOND, 1000 * MILLISECOND
_STUCK_MS = 200
_QUIET_MS = 250
_PROBE_MS = 150
STANDBY = 0
"""The number of a connection that is not the machine's yet; the machine counts from 1."""
STANDBY_SECONDS = 2
_MIGRATION_MS = 150
_SETTLED = SECOND
_MOVING = "the session goes over to QUIC"
_SILENT = "the network does not acknowledge"
_IN, _OUT = select.POLLIN, select.POLLOUT
_ANY_ERROR = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Mover:
    """When a session goes over to QUIC, how it gets over a change of address there, and when the network is suspect:
    the same for all drivers.

    A session over TCP whose client moves is asked for a connection beside it (`wants_standby`), goes over once that is
    established, and nobody is told of it unless it takes long. Times are monotonic nanoseconds.
    """

    __slots__ = (
        "_acks", "_acks_of", "_began", "_endpoint", "_held", "_machine", "_moving", "_settled", "_source", "migrating",
        "troubled",
    )  # fmt: skip

    def __init__(self, machine: ClientMachine, endpoint: Endpoint) -> None:
        self._machine = machine
        self._endpoint = endpoint
        self._acks = AckWatch()
        self._acks_of = -1
        self._settled = self._began = 0
        self._moving = False
        self._held: Trouble | None = None
        self._source = ""
        self.migrating = 0
        self.troubled = False

    def wants_standby(self, now: int, *, quic: bool) -> bool:
        """Tells whether a QUIC connection is to be made beside the active one; loads QUIC once the session is settled.

        `quic` says that the active one goes over QUIC already.
        """
        ways = self._endpoint.ways
        if not ways.wanted or self._machine.active is None or self.troubled or quic:
            self._settled = 0
            return False
        self._settled = self._settled or now
        if now - self._settled < _SETTLED or now < ways.retry_at:
            return False
        ways.load()
        return ways.channel is not None

    @property
    def unsettled(self) -> bool:
        """Whether to look again soon: QUIC is being loaded, or a move is on its way."""
        ways = self._endpoint.ways
        return self._moving or (self._settled > 0 and ways.loading and not ways.retry_at)

    def standby_failed(self, standby: QuicChannel, now: int) -> None:
        """Notes that a standby was not used in time."""
        self._endpoint.ways.remember(False, now)

    def ready(self, now: int) -> bool:
        """Tells whether the session may go over to the standby, which is established now, and was not told to."""
        self._endpoint.ways.remember(True, now)
        return not self._moving and not self.troubled and self._machine.active is not None

    def move(self, now: int) -> None:
        """Takes the session over to the standby."""
        self._moving = True
        self._began = now
        self._machine.suspect(now, _MOVING)

    def opened(self, now: int, *, quic: bool, source: str) -> None:
        """Notes which way carries the session after a race, and from which address of ours."""
        ways = self._endpoint.ways
        ways.won(quic=quic, now=now)
        ways.moves = ways.moves or self._source not in ("", source)
        self._source = source

    def passes(self, event: Event) -> bool:
        """Tells whether the user gets an event now: that a move has begun is no news."""
        if isinstance(event, Opened):
            self._endpoint.ways.learn(event.accept.quic)
        elif isinstance(event, Trouble):
            self.troubled = event.since is not None
            if event.since is None:
                self._moving = False
                self._held = None
            elif self._moving:
                self._held = event
                return False
        return True

    def late(self, now: int) -> Trouble | None:
        """Returns what was held back of a move that takes long."""
        if self._held is None or now - self._began < _QUIET_MS * MILLISECOND:
            return None
        held, self._held, self._moving = self._held, None, False
        return held

    def migrate(self, channel: QuicChannel, now: int) -> bool:
        """Brings the active QUIC connection to our new address; True says that its descriptor is another one now."""
        self._endpoint.ways.renew()
        self.migrating = now
        try:
            return channel.migrate()
        except OSError:
            self.migrating = 0
            return False  # no way to the node now: the next change may bring one

    def stuck(self, channel: QuicChannel, now: int) -> str:
        """Returns why the active QUIC connection is suspect, or "": no answer to a migration, or to what was sent."""
        if self.migrating:
            if channel.answered:
                self.migrating = 0
            elif now - self.migrating >= _MIGRATION_MS * MILLISECOND:
                self.migrating = 0
                return "the network changed"
            return ""
        channel.watch(_PROBE_MS)
        if channel.waiting_ms(now) >= max(_STUCK_MS, 3 * channel.rtt_ms):
            self._endpoint.ways.doubt()
            return _SILENT
        return ""

    def silent(self, number: int, sock: socket.socket, now: int) -> str:
        """Returns why the active connection over TCP is suspect, or ""."""
        if self._acks_of != number:
            self._acks_of = number
            self._acks = AckWatch()
        return _SILENT if self._acks.waiting_ms(tcp_state(sock), now) >= _STUCK_MS else ""


class _Channel:
    """One socket on its way to, or at, the node."""

    __slots__ = ("fd", "number", "out", "shaking", "sock", "tls", "waiting")

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.sock = sock
        self.tls: TlsSocket | None = None
        self.fd = sock.fileno()
        self.waiting = True  # for connect(2) to finish
        self.shaking = False
        self.out: list[bytes] = []

    @property
    def more(self) -> bool:
        """Whether there may be more to read although poll(2) does not say so."""
        return self.tls is not None and self.tls.more

    @property
    def events(self) -> int:
        """What to poll for."""
        return _IN | _OUT if self.out or (self.tls is not None and self.tls.unsent) else _IN


class PollDriver:
    """Runs one machine: dials, reads, writes, and keeps its time; other descriptors may be watched beside it.

    `on_event` gets every event of the machine.
    """

    def __init__(self, machine: ClientMachine, endpoint: Endpoint, on_event: Callable[[Event], None]) -> None:
        self.machine = machine
        self.endpoint = endpoint
        self._on_event = on_event
        self._poll = select.poll()
        self._channels: dict[int, _Channel] = {}
        self._numbers: dict[int, _Channel] = {}
        self._unread: set[_Channel] = set()  # those with more to read
        self._watched: dict[int, Callable[[int], bool | None]] = {}
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._addresses: AddressWatch | None = None
        self._sleep = SleepWatch()
        self._next_watch = 0
        self._dialling = Dialling(machine, endpoint)
        self._mover = Mover(machine, endpoint)
        self._quics: dict[int, QuicChannel] = {}
        self._quic_fds: dict[int, int] = {}  # descriptors and the numbers of their connections
        self._opened: set[int] = set()  # the numbers of those that the machine knows as established
        self._standby_until = 0
        self._last_active: int | None = None

    def refused_for(self, now: int) -> int:
        """Returns how long (nanoseconds) the node's machine has refused every connection: no node is there."""
        return now - self._dialling.refused_since if self._dialling.refused_since else 0

    # ---- other descriptors -------------------------------------------------------------------------------------

    def watch(self, fd: int, events: int, callback: Callable[[int], bool | None]) -> None:
        """Calls back when a descriptor is ready; `events` as for poll(2).

        The callback returns False if it has done nothing to the machine.
        """
        self._watched[fd] = callback
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stops watching a descriptor."""
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # ---- the loop ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Does what the machine wants now: dials, sends, delivers events, until there is nothing left."""
        machine = self.machine
        while True:
            action = machine.next_action()
            if action is not None:
                if isinstance(action, Dial):
                    self._dial(action.connection)
                else:
                    self._drop(action.connection)
                continue
            self._send_all()
            event = machine.next_event()
            if event is None:
                break
            if self._mover.passes(event):
                self._on_event(event)
        active = machine.active
        if active != self._last_active:
            self._last_active = active
            if active is not None:
                self._mover.opened(time.monotonic_ns(), quic=active in self._quics, source=self._source(active))

    def _source(self, number: int) -> str:
        """Returns our own address of a connection, "" for one inside of this machine."""
        if number in self._quics:
            return self._quics[number].source
        sock = self._numbers[number].sock
        return "" if sock.family == socket.AF_UNIX else str(sock.getsockname()[0])

    def _send_all(self) -> None:
        for number, parts in self.machine.data_to_send():
            channel = self._numbers.get(number)
            if channel is not None:
                channel.out.extend(parts)
                self._send(channel)
            elif (quic := self._quics.get(number)) is not None:
                quic.send(parts)
                self._next_watch = min(self._next_watch, time.monotonic_ns() + _WATCH_QUICK)
                self._tend(number, quic)

    def turn(self, until: int | None = None) -> None:
        """Waits for the next thing to happen, at most until `until` (monotonic nanoseconds), and deals with it."""
        self.settle()
        now = time.monotonic_ns()
        due = self.machine.next_timeout()
        if until is not None and (due is None or until < due):
            due = until
        if self._addresses is not None and (due is None or self._next_watch < due):
            due = self._next_watch
        for quic in self._quics.values():
            timer = quic.next_timeout()
            if timer is not None and (due is None or timer < due):
                due = timer
        unread, self._unread = self._unread, set()
        wait = 0 if unread else None if due is None else max(0, -((now - due) // MILLISECOND))
        ready = self._poll.poll(wait)
        # While a terminal takes its output piece by piece, nothing else has changed.
        while len(ready) == 1 and not unread and (alone := self._watched.get(ready[0][0])) is not None:
            changed = alone(ready[0][1]) is not False
            ready, now = [], time.monotonic_ns()
            if changed or (due is not None and now >= due):
                break
            ready = self._poll.poll(None if due is None else -((now - due) // MILLISECOND))
        for channel in unread:
            self._receive(channel)
        for fd, events in ready:
            callback = self._watched.get(fd)
            if callback is not None:
                callback(events)
            else:
                found = self._channels.get(fd)
                if found is not None:
                    self._ready(found, events)
                elif fd in self._quic_fds:
                    self._quic_ready(self._quic_fds[fd], events)
        # What came goes on its way first: a key and its echo wait for this.
        self.settle()
        now = time.monotonic_ns()
        if (due is not None and now >= due) or now >= self._next_watch:
            for number, quic in list(self._quics.items()):
                quic.handle_timeout(now)
                self._tend(number, quic)
            self.machine.handle_timeout(now)
            if now >= self._next_watch:
                self._look_around(now)
            self.settle()

    def _look_around(self, now: int) -> None:
        """Looks for the machine's sleep and for bytes that the network does not acknowledge."""
        number = self.machine.active
        quic = self._quics.get(number) if number is not None else None
        owed = self.machine.input.end > self.machine.input.base
        quick = self._mover.migrating or self._mover.unsettled or (quic is not None and quic.busy)
        self._next_watch = now + (_WATCH_QUICK if quick else _WATCH_BUSY if owed else _WATCH_IDLE)
        if self._addresses is None:
            self._addresses = AddressWatch()
            if self._addresses.fileno() >= 0:
                self.watch(self._addresses.fileno(), _IN, self._address_event)
        self._look_for_quic(now, quic)
        if self._sleep.slept(now, time.clock_gettime_ns(time.CLOCK_BOOTTIME)):
            self.machine.suspect(now, "the machine slept")
            return
        if quic is not None:
            reason = self._mover.stuck(quic, now)
            if reason:
                self.machine.suspect(now, reason)
            return
        channel = self._numbers.get(number) if number is not None else None
        if channel is None or channel.sock.family == socket.AF_UNIX:
            return
        reason = self._mover.silent(channel.number, channel.sock, now)
        if reason:
            self.machine.suspect(now, reason)

    def _look_for_quic(self, now: int, active: QuicChannel | None) -> None:
        """Begins a QUIC connection beside one over TCP, and gives it up if it takes too long."""
        held = self._mover.late(now)
        if held is not None:
            self._on_event(held)
        if STANDBY in self._quics:
            if now >= self._standby_until:
                self._mover.standby_failed(self._quics[STANDBY], now)
                self._quic_close(STANDBY)
        elif self._mover.wants_standby(now, quic=active is not None):
            self._standby_until = now + STANDBY_SECONDS * SECOND
            if not self._dial_quic(STANDBY):
                self.endpoint.ways.remember(False, now)

    def _address_event(self, _events: int) -> None:
        if self._addresses is None or not self._addresses.changed():
            return
        now = time.monotonic_ns()
        number = self.machine.active
        quic = self._quics.get(number) if number is not None else None
        if number is not None and quic is not None:
            old = quic.fileno()
            if self._mover.migrate(quic, now):
                self._poll.unregister(old)
                del self._quic_fds[old]
                self._register(number, quic)
            self._next_watch = min(self._next_watch, now + _WATCH_QUICK)
            self._tend(number, quic)
        if quic is None or self._mover.troubled:
            self.endpoint.ways.renew()
            self.machine.suspect(now, "the network changed")

    # ---- QUIC --------------------------------------------------------------------------------------------------

    def _dial_quic(self, number: int) -> bool:
        ways = self.endpoint.ways
        family, address = ways.target()
        make = ways.channel
        if make is None or isinstance(address, str):
            return False
        try:
            quic = make(family, address, ways.ca)
        except OSError:
            return False
        self._quics[number] = quic
        self._register(number, quic)
        self._tend(number, quic)
        return True

    def _register(self, number: int, quic: QuicChannel) -> None:
        self._quic_fds[quic.fileno()] = number
        self._poll.register(quic.fileno(), _IN)

    def _take_standby(self, number: int) -> bool:
        """Gives the connection that is established already to the machine."""
        quic = self._quics.get(STANDBY)
        if quic is None or not quic.established or quic.over:
            return False
        del self._quics[STANDBY]
        self._quics[number] = quic
        self._quic_fds[quic.fileno()] = number
        self._tend(number, quic)
        return True

    def _quic_ready(self, number: int, events: int) -> None:
        quic = self._quics[number]
        if events & _OUT:
            quic.flush()
        data = quic.receive()
        if data and number in self._opened:
            self.machine.receive(number, data, time.monotonic_ns())
        self._tend(number, quic)

    def _tend(self, number: int, quic: QuicChannel) -> None:
        """Tells the machine what became of a QUIC connection, and sets what it is polled for."""
        if self._quics.get(number) is not quic:
            return
        now = time.monotonic_ns()
        if quic.over or quic.ended:
            opened = number in self._opened
            self._quic_close(number)
            if number == STANDBY:
                self.endpoint.ways.remember(False, now)
            elif opened:
                self.machine.lost(number, now, quic.over or "the node closed the connection")
            else:
                self._dial_tcp(number)  # what stands behind it then is said of TCP
            return
        if quic.established and number not in self._opened:
            if number != STANDBY:
                self._opened.add(number)
                self.machine.established(number, now)
            elif self._mover.ready(now):
                self._mover.move(now)
        self._poll.modify(quic.fileno(), _IN | _OUT if quic.wants_write else _IN)

    def _quic_close(self, number: int) -> None:
        quic = self._quics.pop(number)
        self._opened.discard(number)
        del self._quic_fds[quic.fileno()]
        self._poll.unregister(quic.fileno())
        quic.close()

    # ---- sockets -----------------------------------------------------------------------------------------------

    def _dial(self, number: int) -> None:
        if self._take_standby(number):
            return
        if not (self.endpoint.ways.over_quic() and self._dial_quic(number)):
            self._dial_tcp(number)

    def _dial_tcp(self, number: int) -> None:
        sock = self._dialling.begin(number)
        if sock is not None:
            channel = _Channel(number, sock)
            self._channels[channel.fd] = self._numbers[number] = channel
            self._poll.register(channel.fd, _OUT)

    def _drop(self, number: int) -> None:
        quic = self._quics.get(number)
        if quic is not None:
            quic.send(self.machine.farewell(number) if number in self._opened else [])
            self._quic_close(number)
            return
        channel = self._numbers.get(number)
        if channel is None:
            return
        last = self.machine.farewell(number)
        if not channel.waiting and not channel.shaking:
            channel.out.extend(last)
            self._send(channel)
        self._close(channel)

    def _close(self, channel: _Channel) -> None:
        if self._numbers.pop(channel.number, None) is not None:
            del self._channels[channel.fd]
            self._poll.unregister(channel.fd)
            channel.sock.close()

    def _ready(self, channel: _Channel, events: int) -> None:
        if channel.waiting:
            if self._dialling.connected(channel.number, channel.sock):
                self._connected(channel)
            else:
                self._close(channel)
        elif channel.shaking:
            self._shake(channel)
        else:
            if events & _OUT:
                self._send(channel)
            if events & (_IN | _ANY_ERROR):
                self._receive(channel)

    def _connected(self, channel: _Channel) -> None:
        channel.waiting = False
        context = self.endpoint.context
        if context is None:
            self._open(channel)
            return
        channel.tls = TlsSocket(channel.sock, context, piece=_PIECE_BYTES)
        channel.shaking = True
        self.machine.connected(channel.number, time.monotonic_ns())
        self._shake(channel)

    def _shake(self, channel: _Channel) -> None:
        assert channel.tls is not None
        try:
            channel.tls.do_handshake()
        except _AGAIN:
            self._poll.modify(channel.fd, channel.events)
        except ssl.SSLCertVerificationError:
            text = f"The node at {self.endpoint.name} is not the one known there: its certificate is another's."
            self._failed(channel, reason=text)
        except OSError as error:
            # The network may have ended it; what the other side does not speak or want stays so.
            again = isinstance(error, (ssl.SSLEOFError, ConnectionError))
            self._failed(channel, again=again, reason=str(unreachable(self.endpoint.name, error)))
        else:
            channel.shaking = False
            self._open(channel)

    def _open(self, channel: _Channel) -> None:
        self._poll.modify(channel.fd, channel.events)
        self.machine.established(channel.number, time.monotonic_ns())
        if channel.more:
            self._unread.add(channel)

    def _failed(self, channel: _Channel, *, reason: str, again: bool = False) -> None:
        self._close(channel)
        self.machine.dial_failed(channel.number, time.monotonic_ns(), refused=True, again=again, reason=reason)

    def _send(self, channel: _Channel) -> None:
        sock = channel.tls or channel.sock
        data = memoryview(channel.out[0] if len(channel.out) == 1 else b"".join(channel.out))
        try:
            while data:
                data = data[sock.send(data) :]
            if channel.tls is not None:
                channel.tls.flush()
        except _AGAIN:
            pass
        except OSError as error:
            self._lost(channel, error)
            return
        channel.out = [bytes(data)] if data else []
        self._poll.modify(channel.fd, channel.events)

    def _receive(self, channel: _Channel) -> None:
        if channel.number not in self._numbers:
            return
        sock, view, filled = channel.tls or channel.sock, self._view, 0
        error: OSError | None = None
        try:
            for _ in range(_READS_MAX):
                count = sock.recv_into(view[filled:])
                if not count:
                    error = ConnectionResetError(errno.ECONNRESET, "the node closed the connection")
                    break
                filled += count
                if filled > _READ_BYTES - _RECORD_BYTES or (count < _RECORD_BYTES and not channel.more):
                    break
        except _AGAIN:
            pass
        except OSError as found:
            error = found
        if channel.tls is not None:
            if channel.tls.more and error is None:
                self._unread.add(channel)
            if channel.tls.unsent:
                self._poll.modify(channel.fd, channel.events)
        if filled:
            self.machine.receive(channel.number, view[:filled], time.monotonic_ns())
        if error is not None:
            self._lost(channel, error)

    def _lost(self, channel: _Channel, error: OSError) -> None:
        if channel.number in self._numbers:
            # What was queued by the machine in answer must not be lost on the way out.
            self._close(channel)
            self.machine.lost(channel.number, time.monotonic_ns(), error.strerror or str(error))

    def close(self) -> None:
        """Closes everything."""
        self.settle()
        for channel in list(self._numbers.values()):
            self._close(channel)
        for number in list(self._quics):
            self._quic_close(number)
        if self._addresses is not None and self._addresses.fileno() >= 0:
            self.unwatch(self._addresses.fileno())
            self._addresses.close()
