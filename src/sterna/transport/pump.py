"""The one driver between a socket and a `Link`: reads, writes, TLS handshake, orderly close.

It works on any asyncio loop through `add_reader`/`add_writer` with non-blocking sockets, or with a `TlsSocket` on one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

from sterna import limits
from sterna.protocol.link import Link
from sterna.transport.tls import TlsSocket

READ_BYTES = 256 * 1024
_RECORD_BYTES = 16 * 1024
_BUDGET_BYTES = READ_BYTES - _RECORD_BYTES
_READS_MAX = 64  # each of them a TLS record, and what else comes before it
_LINGER_SECONDS = 1.0
_LINGER_MAX_BYTES = 4 * 1024 * 1024
_READ_AGAIN = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Conduit(Protocol):
    """One connection that carries a link's frames, whatever it runs over.

    `peer` is the other side's address, `data` whatever the owner keeps with it.
    """

    link: Link
    peer: str
    data: object

    @property
    def handshaking(self) -> bool:
        """Whether the handshake is not done yet: nothing can be said to the other side."""

    @property
    def queued(self) -> int:
        """How many bytes wait for the other side to take them."""

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""

    def start(self) -> None:
        """Begins to read."""

    def flush(self) -> None:
        """Sends what the link has; what the other side does not take blocks the link until it does."""

    def hold(self, on: bool) -> None:
        """Stops reading, or goes on; what is on its way may still come."""

    def abort(self, reason: str) -> None:
        """Ends the connection at once."""


class Owner(Protocol):
    """Who deals with what a connection brings."""

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Takes bytes; the view is only valid during the call."""

    def drained(self, pump: Conduit) -> None:
        """Learns that a blocked connection takes bulk data again."""

    def ended(self, pump: Conduit, reason: str) -> None:
        """Learns, once, that the connection is over."""


class _Nobody:
    """Stands for the owner of a pump that has ended."""

    __slots__ = ()

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Drops them."""

    def drained(self, pump: Conduit) -> None:
        """Does nothing."""

    def ended(self, pump: Conduit, reason: str) -> None:
        """Does nothing."""


_NOBODY = _Nobody()


def _ignore() -> None:
    """Stands for the hook of a link whose pump has ended."""


class Reactor:
    """What the pumps of one loop share: the read buffer and the list of those with something to send.

    Frames that one event causes on any number of connections go out together at its end, one write per connection.
    """

    __slots__ = ("_active", "_dirty", "_scheduled", "buffer", "loop", "view")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.buffer = bytearray(READ_BYTES)
        self.view = memoryview(self.buffer)
        self._dirty: list[Conduit] = []
        self._active = False
        self._scheduled = False

    def mark(self, pump: Conduit) -> None:
        """Notes that a pump has something to send; it goes out when the current event is dealt with."""
        self._dirty.append(pump)
        if not self._active and not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._soon)

    def _soon(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Sends what all marked pumps have."""
        dirty = self._dirty
        while dirty:
            batch = dirty[:]
            dirty.clear()
            for pump in batch:
                pump.flush()

    def run(self, callback: Callable[..., None], *args: object) -> None:
        """Runs a callback as one event: what it queues goes out at its end."""
        outer, self._active = self._active, True
        try:
            callback(*args)
        finally:
            self._active = outer
            if not outer and self._dirty:
                self.flush()


class Pump:
    """Drives one socket for one link; `peer` is the other side's address or uid, for logs and limits.

    With `handshake` the TLS handshake comes first, which a client's side begins; `on_open` is called after it.
    """

    __slots__ = (
        "_closed", "_discards", "_fd", "_handshake", "_held", "_marked", "_on_open", "_pending", "_raw",
        "_reactor", "_sock", "_timer", "_tls", "_writing", "data", "link", "owner", "peer",
    )  # fmt: skip

    def __init__(
        self, reactor: Reactor, sock: socket.socket | TlsSocket, link: Link, owner: Owner, *, peer: str = "",
        handshake: bool = False, on_open: Callable[[Pump], None] | None = None,
    ) -> None:  # fmt: skip
        self._reactor = reactor
        self._sock = sock
        self._fd = sock.fileno()
        self.link = link
        self.owner = owner
        self.peer = peer
        self._tls = sock if isinstance(sock, TlsSocket) else None
        self._raw = sock.raw if isinstance(sock, TlsSocket) else sock
        self.data: object = None
        self._handshake = handshake
        self._on_open = on_open
        self._pending: memoryview | None = None
        self._writing = self._closed = self._held = self._marked = False
        self._timer: asyncio.TimerHandle | None = None
        self._discards = _LINGER_MAX_BYTES
        link.wake = self._wake
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def socket(self) -> socket.socket:
        """The socket, to be looked at, not to be read or written."""
        return self._raw

    @property
    def handshaking(self) -> bool:
        """Whether the TLS handshake is not done yet: nothing can be said to the other side."""
        return self._handshake

    @property
    def queued(self) -> int:
        """How many bytes wait for the other side to take them."""
        return self.link.out_bytes + (len(self._pending) if self._pending is not None else 0)

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._closed

    def start(self) -> None:
        """Begins to read; in a TLS handshake the client speaks first, and a server's listener has seen that."""
        self._reactor.loop.add_reader(self._fd, self._readable)
        if self._handshake:
            self._reactor.run(self._shake)

    def _readable(self) -> None:
        reactor = self._reactor
        reactor.run(self._shake if self._handshake else self._read)

    def _shake(self) -> None:
        """Goes on with the TLS handshake."""
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except _READ_AGAIN:
            self._watch_unsent()
            return
        except OSError as error:
            self.abort(f"TLS handshake failed: {getattr(error, 'reason', None) or error}")
            return
        self._handshake = False
        if self._writing:
            self._drop_writer()
        if self._on_open is not None:
            self._on_open(self)
        self.flush()
        self._read()

    def _watch_unsent(self) -> None:
        """Has what TLS itself had to say sent once the socket takes it."""
        if self._tls is not None and self._tls.unsent and not (self._writing or self._closed):
            self._want_writer()

    def _read(self) -> None:
        """Reads what is there, at most one buffer, and hands it over in one piece."""
        view, sock, tls, filled, reads = self._reactor.view, self._sock, self._tls, 0, 0
        reason, ended = "", False
        try:
            while filled < _BUDGET_BYTES and reads < _READS_MAX:
                reads += 1
                count = sock.recv_into(view[filled:] if filled else view)
                if not count:
                    reason, ended = "closed by the other side", True
                    break
                filled += count
                # Less than a record, or less than asked for: nothing more is there, and asking again would cost a call.
                if tls is None or (count < _RECORD_BYTES and not tls.more):
                    break
            else:
                if tls is not None and tls.more:
                    self._reactor.loop.call_soon(self._read_on)  # the socket may have nothing more to say
        except _READ_AGAIN:
            pass
        except OSError as error:
            reason = str(error.strerror or error)
        self._watch_unsent()
        if filled:
            self.owner.received(self, view[:filled])
            if self.link.closing and not self._closed:
                self.flush()
        if self._held:
            return  # the end is told once more when reading goes on
        if ended and not self.link.closing and self.link.receive_eof() is not None:
            # It ended inside a frame and may still read: it is told so.
            self.link.check()
            self.flush()
        if reason:
            self.abort(reason)

    def hold(self, on: bool) -> None:
        """Stops reading, or goes on."""
        if on == self._held or self._closed:
            return
        self._held = on
        if on:
            self._reactor.loop.remove_reader(self._fd)
        else:
            self._reactor.loop.add_reader(self._fd, self._readable)
            self._reactor.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self._closed and not self._held:
            self._reactor.run(self._read)

    def _wake(self) -> None:
        if not self._marked:
            self._marked = True
            self._reactor.mark(self)

    def flush(self) -> None:
        """Sends what the link has; what the socket does not take waits, and blocks bulk data, until it does."""
        self._marked = False
        if self._closed or self._handshake:
            return
        link = self.link
        if self._pending is None:
            parts = link.data_to_send()
            if not parts:
                if link.closing:
                    self.close()
                return
            self._pending = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
        elif link.blocked:
            if link.out_bytes > limits.OUTBOUND_MAX_BYTES:
                self.abort("it takes nothing and too much waits for it")
            return
        self._send()

    def _send(self) -> None:
        sock, link, data = self._sock, self.link, self._pending
        while True:
            try:
                while data:
                    data = data[sock.send(data) :]
                if self._tls is not None:
                    self._tls.flush()
            except _READ_AGAIN:
                self._pending = data or memoryview(b"")
                link.blocked = True
                if not self._writing:
                    self._want_writer()
                return
            except OSError as error:
                self._pending = None
                self.abort(str(error.strerror or error))
                return
            parts = link.data_to_send()
            if not parts:
                break
            data = memoryview(b"".join(parts))
        self._pending = None
        if self._writing:
            self._drop_writer()
        if link.closing:
            self.close()

    def _writable(self) -> None:
        self._reactor.run(self._write_on)

    def _write_on(self) -> None:
        if self._handshake:
            assert self._tls is not None
            with contextlib.suppress(OSError):  # what is wrong with the socket is told by reading it
                self._tls.flush()
                self._drop_writer()
            return
        self._send()
        if self._pending is None and self.link.blocked and not self._closed:
            self.link.blocked = False
            self.owner.drained(self)

    def _want_writer(self) -> None:
        self._writing = True
        self._reactor.loop.add_writer(self._fd, self._writable)

    def _drop_writer(self) -> None:
        self._writing = False
        self._reactor.loop.remove_writer(self._fd)

    def close(self) -> None:
        """Ends the connection after what was sent: says so, then waits for the other side's end.

        Closing at once while the peer still sends would reset the connection and take the last ERROR with it; one that
        goes on for a second, or for 4 MiB, does not want to read it.
        """
        if self._closed:
            return
        self._finish("closed")
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_WR)
        loop = self._reactor.loop
        loop.add_reader(self._fd, self._discard)
        self._timer = loop.call_later(_LINGER_SECONDS, self._gone)

    def _discard(self) -> None:
        """Reads what still comes, one buffer each time: others have their turn, too."""
        try:
            count = self._raw.recv_into(self._reactor.view)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        self._discards -= count
        if not count or self._discards < 0:
            self._gone()

    def _gone(self) -> None:
        self._reactor.loop.remove_reader(self._fd)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sock.close()

    def abort(self, reason: str) -> None:
        """Ends the connection at once."""
        if self._closed:
            return
        self._finish(reason)
        self._sock.close()

    def _finish(self, reason: str) -> None:
        self._closed = True
        loop = self._reactor.loop
        loop.remove_reader(self._fd)
        if self._writing:
            self._drop_writer()
        self._pending = None
        self.link.closing = True
        owner, self.owner = self.owner, _NOBODY
        owner.ended(self, reason)
        # Nothing of a connection that is over points back at its pump now: it leaves memory at once, TLS state and all,
        # and not when the collector gets to the oldest objects, which is hours later.
        self.link.wake = _ignore
        self._on_open = None
