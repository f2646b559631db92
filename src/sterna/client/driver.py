"""The poll() loop that drives a `ClientMachine` in a terminal program: no asyncio, so it starts fast and answers
fast.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Callable

from sterna.client.endpoint import Endpoint, unreachable
from sterna.client.watchers import AckWatch, AddressWatch, SleepWatch, tcp_state
from sterna.protocol.client import ClientMachine, Dial, Event
from sterna.units import MILLISECOND

_READ_BYTES = 256 * 1024
_RECORD_BYTES = 16 * 1024
_AGAIN = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_WATCH_BUSY, _WATCH_IDLE = 100 * MILLISECOND, 1000 * MILLISECOND
_STUCK_MS = 200
_IN, _OUT = select.POLLIN, select.POLLOUT
_ANY_ERROR = select.POLLERR | select.POLLHUP | select.POLLNVAL


class _Channel:
    """One socket on its way to, or at, the node."""

    __slots__ = ("fd", "number", "out", "shaking", "sock", "waiting")

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.sock = sock
        self.fd = sock.fileno()
        self.waiting = True  # for connect(2) to finish
        self.shaking = False
        self.out: list[bytes] = []


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
        self._watched: dict[int, Callable[[int], None]] = {}
        self._turn = 0
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._addresses: AddressWatch | None = None
        self._sleep = SleepWatch()
        self._acks = AckWatch()
        self._acks_of = -1
        self._next_watch = 0

    # ---- other descriptors -------------------------------------------------------------------------------------

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls back when a descriptor is ready; `events` as for poll(2)."""
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
                return
            self._on_event(event)

    def _send_all(self) -> None:
        for number, parts in self.machine.data_to_send():
            channel = self._numbers.get(number)
            if channel is not None:
                channel.out.extend(parts)
                self._send(channel)

    def turn(self, until: int | None = None) -> None:
        """Waits for the next thing to happen, at most until `until` (monotonic nanoseconds), and deals with it."""
        self.settle()
        now = time.monotonic_ns()
        due = self.machine.next_timeout()
        if until is not None and (due is None or until < due):
            due = until
        if self._addresses is not None and (due is None or self._next_watch < due):
            due = self._next_watch
        wait = None if due is None else max(0, -((now - due) // MILLISECOND))
        ready = self._poll.poll(wait)
        for fd, events in ready:
            callback = self._watched.get(fd)
            if callback is not None:
                callback(events)
            else:
                channel = self._channels.get(fd)
                if channel is not None:
                    self._ready(channel, events)
        # What came goes on its way first: a key and its echo wait for this.
        self.settle()
        now = time.monotonic_ns()
        if (due is not None and now >= due) or now >= self._next_watch:
            self.machine.handle_timeout(now)
            if now >= self._next_watch:
                self._look_around(now)
            self.settle()

    def _look_around(self, now: int) -> None:
        """Looks for the machine's sleep and for bytes that the network does not acknowledge."""
        owed = self.machine.input.end > self.machine.input.base
        self._next_watch = now + (_WATCH_BUSY if owed else _WATCH_IDLE)
        if self._addresses is None:
            self._addresses = AddressWatch()
            if self._addresses.fileno() >= 0:
                self.watch(self._addresses.fileno(), _IN, self._address_event)
        if self._sleep.slept(now, time.clock_gettime_ns(time.CLOCK_BOOTTIME)):
            self.machine.suspect(now, "the machine slept")
            return
        number = self.machine.active
        channel = self._numbers.get(number) if number is not None else None
        if channel is None or channel.sock.family == socket.AF_UNIX:
            return
        if self._acks_of != channel.number:
            self._acks_of = channel.number
            self._acks = AckWatch()
        if self._acks.waiting_ms(tcp_state(channel.sock), now) >= _STUCK_MS:
            self.machine.suspect(now, "the network does not acknowledge")

    def _address_event(self, _events: int) -> None:
        if self._addresses is not None and self._addresses.changed():
            self.machine.suspect(time.monotonic_ns(), "the network changed")

    # ---- sockets -----------------------------------------------------------------------------------------------

    def _dial(self, number: int) -> None:
        addresses = self.endpoint.addresses
        family, address = addresses[self._turn % len(addresses)]
        self._turn += 1
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS, errno.EAGAIN):
            sock.close()
            self.machine.dial_failed(number, time.monotonic_ns(), refused=True, reason=self._unreachable(code))
            return
        channel = _Channel(number, sock)
        self._channels[channel.fd] = self._numbers[number] = channel
        self._poll.register(channel.fd, _OUT)
        if code == 0:
            self._connected(channel)

    def _unreachable(self, code: int) -> str:
        return f"The node at {self.endpoint.name} cannot be reached: {os.strerror(code)}."

    def _drop(self, number: int) -> None:
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
            self._finish_connect(channel)
        elif channel.shaking:
            self._shake(channel)
        else:
            if events & _OUT:
                self._send(channel)
            if events & (_IN | _ANY_ERROR):
                self._receive(channel)

    def _finish_connect(self, channel: _Channel) -> None:
        code = channel.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            again = code == errno.ECONNRESET
            self._failed(channel, refused=True, again=again, reason=self._unreachable(code))
        else:
            self._connected(channel)

    def _connected(self, channel: _Channel) -> None:
        channel.waiting = False
        context = self.endpoint.context
        if context is None:
            self._open(channel)
            return
        del self._channels[channel.fd]
        self._poll.unregister(channel.fd)
        channel.sock = context.wrap_socket(channel.sock, do_handshake_on_connect=False)
        channel.fd = channel.sock.fileno()
        self._channels[channel.fd] = channel
        self._poll.register(channel.fd, _IN)
        channel.shaking = True
        self.machine.connected(channel.number, time.monotonic_ns())
        self._shake(channel)

    def _shake(self, channel: _Channel) -> None:
        assert isinstance(channel.sock, ssl.SSLSocket)
        try:
            channel.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._poll.modify(channel.fd, _IN)
        except ssl.SSLWantWriteError:
            self._poll.modify(channel.fd, _OUT)
        except ssl.SSLCertVerificationError:
            text = f"The node at {self.endpoint.name} is not the one known there: its certificate is another's."
            self._failed(channel, refused=True, reason=text)
        except OSError as error:
            # The network may have ended it; what the other side does not speak or want stays so.
            again = isinstance(error, (ssl.SSLEOFError, ConnectionError))
            self._failed(channel, refused=True, again=again, reason=str(unreachable(self.endpoint.name, error)))
        else:
            channel.shaking = False
            self._open(channel)

    def _open(self, channel: _Channel) -> None:
        self._poll.modify(channel.fd, _IN)
        self.machine.established(channel.number, time.monotonic_ns())

    def _failed(self, channel: _Channel, *, refused: bool, reason: str, again: bool = False) -> None:
        self._close(channel)
        self.machine.dial_failed(channel.number, time.monotonic_ns(), refused=refused, again=again, reason=reason)

    def _send(self, channel: _Channel) -> None:
        if not channel.out:
            return
        data = memoryview(channel.out[0] if len(channel.out) == 1 else b"".join(channel.out))
        try:
            while data:
                data = data[channel.sock.send(data) :]
        except _AGAIN:
            channel.out = [bytes(data)]
            self._poll.modify(channel.fd, _IN | _OUT)
        except OSError as error:
            self._lost(channel, error)
        else:
            channel.out = []
            if channel.number in self._numbers:
                self._poll.modify(channel.fd, _IN)

    def _receive(self, channel: _Channel) -> None:
        sock, view, filled = channel.sock, self._view, 0
        error: OSError | None = None
        try:
            while filled < _READ_BYTES - _RECORD_BYTES:
                count = sock.recv_into(view[filled:])
                if not count:
                    error = ConnectionResetError(errno.ECONNRESET, "the node closed the connection")
                    break
                filled += count
                if count < _RECORD_BYTES:
                    break  # TLS gives one record at a time, whole, and holds none back
        except _AGAIN:
            pass
        except OSError as found:
            error = found
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
        if self._addresses is not None and self._addresses.fileno() >= 0:
            self.unwatch(self._addresses.fileno())
            self._addresses.close()
