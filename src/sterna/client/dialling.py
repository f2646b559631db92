"""How TCP connections to a node begin and fail: the same for all drivers."""

from __future__ import annotations

import errno
import os
import socket
import time

from sterna.client.endpoint import Endpoint, unreachable
from sterna.protocol.client import ClientMachine


class Dialling:
    """Begins a machine's connections to a node, at its addresses in turn, and tells the machine of those that fail.

    `refused_since` (monotonic nanoseconds) is when the first of those was refused that all were since; 0 if none was.
    """

    __slots__ = ("_endpoint", "_machine", "_turn", "refused_since")

    def __init__(self, machine: ClientMachine, endpoint: Endpoint) -> None:
        self._machine = machine
        self._endpoint = endpoint
        self._turn = 0
        self.refused_since = 0

    def begin(self, number: int) -> socket.socket | None:
        """Returns a socket that is connected once it is writable, or None if it cannot be."""
        family, address = self._endpoint.addresses[self._turn % len(self._endpoint.addresses)]
        self._turn += 1
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code in (0, errno.EINPROGRESS, errno.EAGAIN):
            return sock
        sock.close()
        self._failed(number, code)
        return None

    def connected(self, number: int, sock: socket.socket) -> bool:
        """Tells whether a socket that is writable is connected; one that is not is of no use any more."""
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._failed(number, code)
        else:
            self.refused_since = 0
        return not code

    def _failed(self, number: int, code: int) -> None:
        now = time.monotonic_ns()
        self.refused_since = (self.refused_since or now) if code in (errno.ECONNREFUSED, errno.ENOENT) else 0
        text = str(unreachable(self._endpoint.name, OSError(code, os.strerror(code))))
        self._machine.dial_failed(number, now, refused=True, again=code == errno.ECONNRESET, reason=text)
