"""One connection to a node for a program without an event loop: each step waits, until a deadline."""

from __future__ import annotations

import select
import socket
import ssl
import time
from typing import TYPE_CHECKING, TypeVar

from sterna.transport.tls import TlsSocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from sterna.client.endpoint import Address

_READ_BYTES = 64 * 1024
_AGAIN = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_IN, _OUT = select.POLLIN, select.POLLOUT
T = TypeVar("T")


class Line:
    """A connection to `address`, with TLS if `context` is given; `with` closes it.

    `deadline`, in seconds of the monotonic clock, bounds each step and may be set anew between them: what comes after
    it raises TimeoutError, whatever the other side sends. All raise OSError when the connection fails.
    """

    __slots__ = ("_sock", "_tls", "deadline")

    def __init__(self, address: Address, context: ssl.SSLContext | None, deadline: float) -> None:
        family, target = address
        self.deadline = deadline
        self._tls: TlsSocket | None = None
        self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.settimeout(self._left())
            self._sock.connect(target)
            self._sock.setblocking(False)
            if family != socket.AF_UNIX:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                self._tls = TlsSocket(self._sock, context)
                self._finish(self._tls.do_handshake, _IN)
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tls(self) -> ssl.SSLObject:
        """The TLS state, to be asked for certificates."""
        assert self._tls is not None
        return self._tls.object

    def send(self, data: bytes) -> None:
        """Sends all of `data`."""
        sock, view = self._tls or self._sock, memoryview(data)
        while view:
            view = view[self._finish(lambda: sock.send(view), _OUT) :]  # noqa: B023  # called before it changes
        if self._tls is not None:
            self._finish(self._tls.flush, _OUT)

    def receive(self) -> bytes:
        """Returns the next bytes, b"" at the end."""
        buffer = bytearray(_READ_BYTES)
        view = memoryview(buffer)
        sock = self._tls or self._sock
        count = self._finish(lambda: sock.recv_into(view), _IN)
        return bytes(view[:count])

    def close(self) -> None:
        """Closes it."""
        self._sock.close()

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _finish(self, step: Callable[[], T], events: int) -> T:
        """Returns what `step` does; repeats it when there is news as long as it has to wait."""
        while True:
            left = self._left()
            try:
                return step()
            except _AGAIN:
                poll = select.poll()
                poll.register(self._sock, events | _OUT if self._unsent() else events)
                poll.poll(left * 1000)

    def _unsent(self) -> bool:
        """Tells whether something of TLS itself waits for the socket, which gets what it takes."""
        if self._tls is not None and self._tls.unsent:
            try:
                self._tls.flush()
            except BlockingIOError:
                return True
        return False
