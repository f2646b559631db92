"""Listening sockets: accept, TLS, and the bounds on connections that have not proved anything yet."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from sterna import limits
from sterna.errors import StorageError, UsageError
from sterna.transport.places import Places, place
from sterna.transport.pump import Reactor
from sterna.transport.tls import TlsSocket

_ACCEPT_BATCH = 64
_PAUSE_SECONDS = 0.1
_ESTABLISHED = 1  # TCP_ESTABLISHED, tcp_states.h of Linux
_HANDSHAKE = 22
_RECORD_HEAD_BYTES = 5
_RECORD_MAX_BYTES = 16 * 1024
_UCRED = struct.Struct("iII")
_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
_NOTSENT_BYTES = 64 * 1024

Accepted = Callable[[Any, str], None]
"""Gets a connected, non-blocking socket (with TLS a `TlsSocket` whose handshake has not begun) and the peer's name."""


def tcp_socket(host: str, port: int) -> socket.socket:
    """Returns a listening TCP socket; UsageError when the address is in use or is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Bytes that the network has not taken yet wait here, where newer ones may overtake, not in the kernel's buffer.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, _NOTSENT_BYTES)
        sock.bind((host, port))
        sock.listen(4096)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"Port {port} on {host} is in use; stop what listens there or choose another with --port."
            ) from None
        raise UsageError(f"Cannot listen on {host} port {port}: {error.strerror}.") from None
    sock.setblocking(False)
    return sock


def unix_socket(path: str) -> socket.socket:
    """Returns a listening Unix socket at `path`, mode 0600; a dead one there is replaced, a living one is not.

    Raises UsageError when something answers there already, StorageError when the path is not ours to use.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            pass
        else:
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
                raise StorageError(f"{path} is in the way and is not our socket; remove it or choose another place.")
            probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                probe.settimeout(1)
                probe.connect(path)
            except OSError:
                os.unlink(path)
            else:
                raise UsageError(f"Something already serves {path}; stop it first or use it.")
            finally:
                probe.close()
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise StorageError(f"Cannot make the socket {path}: {error.strerror}.") from None
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def peer_uid(sock: socket.socket) -> tuple[int, int]:
    """Returns (pid, uid) of the process at the other end of a Unix socket (SO_PEERCRED, unix(7))."""
    pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def _first_record(sock: socket.socket) -> int:
    """Returns the length of a connection's first TLS record while it is not whole, 0 once it is, -1 if it never will
    be.

    A record has a type (22: handshake), two bytes of version, two of length (RFC 8446, section 5.1). A message spread
    over several records is OpenSSL's to wait for.
    """
    try:
        wanted = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)
        data = sock.recv(_RECORD_HEAD_BYTES + _RECORD_MAX_BYTES, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return 1
    except OSError:
        return -1
    if len(data) < wanted or data[0] != _HANDSHAKE:
        return -1
    if len(data) < _RECORD_HEAD_BYTES:
        return _RECORD_HEAD_BYTES
    whole = _RECORD_HEAD_BYTES + int.from_bytes(data[3:5], "big")
    if whole > _RECORD_HEAD_BYTES + _RECORD_MAX_BYTES:
        return -1
    return whole if len(data) < whole else 0


def _gone(sock: socket.socket) -> bool:
    """Tells whether a TCP peer has closed or reset its connection already (tcp(7), TCP_INFO: the state comes first)."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
    except OSError:
        return True


class Listener:
    """Accepts connections of one listening socket.

    With `context`, TLS begins only once a connection's whole first message is there, so one that sends nothing, or half
    of it, costs no TLS state. Of those only so many are kept in total and per address: the oldest makes room, because
    an honest client needs milliseconds. The others wait in line: a few handshakes begin in each turn of the loop, so
    that thousands who come at once (the node was restarted) hold up nobody who is there already, and none is sent away.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        accepted: Accepted,
        *,
        context: ssl.SSLContext | None = None,
        per_address: int = limits.UNAUTHENTICATED_PER_ADDRESS_MAX,
        unproved_max: int = 1024,
        seconds: float = limits.HANDSHAKE_SECONDS,
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._accepted = accepted
        self.context = context
        self._per_address = per_address
        self._unproved_max = unproved_max
        self._seconds = seconds
        self._silent: OrderedDict[int, tuple[socket.socket, str, str, float]] = OrderedDict()
        self._queue: deque[tuple[socket.socket, str]] = deque()
        self._beginning = False
        self._places = Places()
        self._sweep: asyncio.TimerHandle | None = None
        self.evicted = 0
        reactor.loop.add_reader(sock.fileno(), self._ready)

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that it listens on (for TCP)."""
        name = self._sock.getsockname()
        return name[0], name[1]

    @property
    def silent(self) -> int:
        """How many connections have not sent their first message yet."""
        return len(self._silent)

    @property
    def queued(self) -> int:
        """How many connections wait for their TLS handshake to begin."""
        return len(self._queue)

    def _ready(self) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, name = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause()
                    return
                raise
            sock.setblocking(False)
            peer = name[0] if isinstance(name, tuple) else "local"
            if self.context is None:
                self._reactor.run(self._accepted, sock, peer)
            else:
                self._hold(sock, peer)

    def _pause(self) -> None:
        """Out of descriptors: the oldest silent connection goes, and accepting rests for a moment."""
        if self._silent:
            self._evict(next(iter(self._silent)))
        loop, fd = self._reactor.loop, self._sock.fileno()
        loop.remove_reader(fd)
        loop.call_later(_PAUSE_SECONDS, self._again)

    def _again(self) -> None:
        if self._sock.fileno() >= 0:
            self._reactor.loop.add_reader(self._sock.fileno(), self._ready)

    def _hold(self, sock: socket.socket, peer: str) -> None:
        """Waits for the first bytes of a connection."""
        where = place(peer)
        if self._places.at(where) >= self._per_address:
            self._evict(next(fd for fd, held in self._silent.items() if held[2] == where))
        elif len(self._silent) >= self._unproved_max:
            self._evict(next(iter(self._silent)))
        loop, fd = self._reactor.loop, sock.fileno()
        self._silent[fd] = (sock, peer, where, loop.time() + self._seconds)
        self._places.add(where)
        loop.add_reader(fd, self._spoke, fd)
        if self._sweep is None:
            self._sweep = loop.call_later(self._seconds, self._expire)

    def _release(self, fd: int) -> tuple[socket.socket, str]:
        sock, peer, where, _ = self._silent.pop(fd)
        self._reactor.loop.remove_reader(fd)
        self._places.remove(where)
        return sock, peer

    def _evict(self, fd: int) -> None:
        self.evicted += 1
        self._release(fd)[0].close()

    def _expire(self) -> None:
        """Closes connections that stayed silent for too long."""
        loop = self._reactor.loop
        self._sweep = None
        now = loop.time()
        while self._silent:
            fd, (_, _, _, due) = next(iter(self._silent.items()))
            if due > now:
                self._sweep = loop.call_later(due - now + 0.01, self._expire)
                return
            self._evict(fd)

    def _spoke(self, fd: int) -> None:
        whole = _first_record(self._silent[fd][0])
        if whole > 0:
            # Readable from now on when all of that is there, or when no more will come (socket(7), SO_RCVLOWAT).
            self._silent[fd][0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, whole)
            return
        sock, peer = self._release(fd)
        if whole < 0:
            sock.close()
        elif len(self._queue) >= limits.HANDSHAKES_QUEUED_MAX:
            self.evicted += 1
            sock.close()
        else:
            self._queue.append((sock, peer))
            if not self._beginning:
                self._beginning = True
                self._reactor.loop.call_soon(self._begin_some)

    def _begin_some(self) -> None:
        """Begins the handshakes of one turn of the loop, those first that wait longest."""
        left = limits.HANDSHAKES_PER_TURN_MAX
        while self._queue and left:
            sock, peer = self._queue.popleft()
            if _gone(sock):
                sock.close()
            else:
                self._begin(sock, peer)
                left -= 1
        self._beginning = bool(self._queue)
        if self._beginning:
            self._reactor.loop.call_soon(self._begin_some)

    def _begin(self, sock: socket.socket, peer: str) -> None:
        assert self.context is not None
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            tls = TlsSocket(sock, self.context, server_side=True)
        except OSError:
            sock.close()
            return
        self._reactor.run(self._accepted, tls, peer)

    def close(self) -> None:
        """Stops listening and drops connections that have not sent anything."""
        loop = self._reactor.loop
        if self._sock.fileno() >= 0:
            loop.remove_reader(self._sock.fileno())
            self._sock.close()
        for fd in list(self._silent):
            self._release(fd)[0].close()
        while self._queue:
            self._queue.popleft()[0].close()
        if self._sweep is not None:
            self._sweep.cancel()
