"""What `-strict` makes safer around the socket: who may connect, one daemon for each, replies after a half-close."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from errno import ECONNREFUSED, EINVAL, ENOENT
from typing import TYPE_CHECKING, Final

from sterna.remote.connection import Connection
from sterna.remote.environment import LOCK_PIPE
from sterna.remote.failure import StartError
from sterna.remote.gotext import bytes_of, errno_text, failure, number_of
from sterna.remote.loop import WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from sterna.remote.connection import Budget
    from sterna.remote.loop import Loop

_PEER: Final = struct.Struct("iII")  # struct ucred: process, user, group
_ABOVE_STREAMS: Final = 10  # where a descriptor is in nobody's way while a child's first ones are set up


def peer_user(sock: socket.socket) -> int:
    """Returns the user that connected. Source: unix(7), SO_PEERCRED."""
    user: int = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1]
    return user


def may_connect(user: int) -> bool:
    """Returns whether a user may speak to this daemon: its own, and root, which could read the token anyway."""
    return user in {0, os.geteuid()}


class LingeringConnection(Connection):
    """A connection that a client's half-close does not end before all replies are sent."""

    __slots__ = ("_ended",)

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        handle: Callable[[Connection, bytes], None],
        gone: Callable[[Connection, str], None],
        budget: Budget,
    ) -> None:
        self._ended = False
        super().__init__(loop, sock, handle, gone, budget)

    def _end(self) -> None:
        line = bytes(self._partial).removesuffix(b"\r")
        if line:
            self._handle(self, line)
        self._ended = True
        self.flush()

    def _lost(self) -> None:
        if self._ended:
            self.close()
        else:
            super()._lost()

    def _set_mask(self) -> None:
        if not self._ended:
            super()._set_mask()
        elif self.closed:
            pass
        elif not (self._out or self.pending or self._deciding):
            self.close()
        else:
            mask = WRITE if self._out else 0
            if mask != self._mask:
                self._mask = mask
                self._loop.change(self._socket.fileno(), mask)


def lock_name(path: str) -> str:
    """Returns the lock file of a socket."""
    return path + ".lock"


def lock(path: str) -> int:
    """Returns the descriptor of the held lock of a socket, and clears away the socket of a daemon that is gone.

    Raises `StartError` when a daemon serves there, or when what is there is no socket.
    """
    name = lock_name(path)
    try:
        opened = os.open(bytes_of(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        descriptor = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, _ABOVE_STREAMS)
        os.close(opened)
    except (OSError, ValueError) as error:
        raise StartError(failure("open", name, error)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartError(_taken(path, f" (PID {_signature(descriptor)})")) from error
        _clear(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def inherited_lock(path: str) -> int:
    """Returns the lock that the launcher holds for this process, or takes it. Raises `StartError`."""
    number = os.environ.pop(LOCK_PIPE, "")
    if number.isdigit():
        try:
            if os.path.samestat(os.fstat(int(number)), os.stat(bytes_of(lock_name(path)))):
                return int(number)
        except OSError:
            pass
    return lock(path)


def sign(descriptor: int) -> None:
    """Writes into the lock file who holds it, for whoever finds it held."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except OSError:
        pass  # a full disk; the lock holds all the same


def holder(path: str) -> str:
    """Returns the process id of the daemon that holds the lock of a socket, an empty text when none does."""
    try:
        descriptor = os.open(bytes_of(lock_name(path)), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError):
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _signature(descriptor)
    else:
        return ""
    finally:
        os.close(descriptor)


def _signature(descriptor: int) -> str:
    pid = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
    return pid if pid.isdigit() else "not known yet"


def _clear(path: str) -> None:
    """Removes a socket that nobody listens at any more. Raises `StartError` for everything else."""
    try:
        if not stat.S_ISSOCK(os.lstat(bytes_of(path)).st_mode):
            raise StartError(f"{path} is no socket; move it away or choose another -socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(bytes_of(path))
    except (OSError, ValueError) as error:
        if number_of(error) == ENOENT:
            return
        if number_of(error) != ECONNREFUSED:
            raise StartError(f"{path} cannot be examined: {errno_text(number_of(error) or EINVAL)}") from error
        os.unlink(bytes_of(path))
    else:
        raise StartError(_taken(path, ""))


def _taken(path: str, who: str) -> str:
    return f"a daemon{who} already serves {path}; stop it with -stop -strict or choose a -socket in another directory"
