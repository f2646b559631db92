"""`-stop`: asks the daemon to shut down and clears its socket away, whatever became of it."""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from typing import Final

from sterna.limits import REMOTE_STOP_REPLY_SECONDS, REMOTE_TOKEN_MAX_BYTES
from sterna.remote.directories import remove, socket_identity
from sterna.remote.failure import StartError
from sterna.remote.gotext import text_of
from sterna.remote.token import FILE_NAME
from sterna.remote.wire import encode, utf8

_PEER: Final = struct.Struct("iII")  # struct ucred: process, user, group
_REQUEST: Final = b'{"jsonrpc":"2.0","id":1,"method":"server.shutdown"}\n'


def stop(path: str) -> None:
    """Stops the daemon that listens at `path`; says nothing and never fails."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(REMOTE_STOP_REPLY_SECONDS)
        try:
            sock.connect(path)
            sock.sendall(_REQUEST)
            sock.recv(4096)
        except OSError:
            pass
    remove(path)


def stop_own(path: str) -> None:
    """Stops the daemon that listens at `path` with its token, and removes nothing but its socket (`-strict`).

    Raises `StartError` when there is one that goes on.
    """
    from sterna.remote.strict import holder, lock, may_connect

    listening = socket_identity(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(REMOTE_STOP_REPLY_SECONDS)
        try:
            sock.connect(path)
        except OSError as error:  # what is there, if anything, was not put there by a daemon that this stops
            if pid := holder(path):
                raise StartError(f"the daemon (PID {pid}) has lost its socket {path}; end it by SIGTERM") from error
            return
        pid, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        token, owner = _token(os.path.join(os.path.dirname(path) or ".", FILE_NAME))
        if not may_connect(user) and user != owner:  # its owner may see a token, nobody else
            raise StartError(f"the listener at {path} belongs to user {user}; nothing was sent to it")
        request = {"jsonrpc": "2.0", "id": 1, "method": "server.shutdown", "auth": token}
        daemon = _followed(pid)
        try:
            sock.sendall(utf8(encode(request) + "\n"))
            answer = sock.recv(4096)
        except TimeoutError:
            answer = b"timeout"
        except OSError:
            answer = b""
    if answer:
        why = "it does not take the token beside it" if b'"error"' in answer else "it does not answer"
        raise StartError(f"the daemon at {path} goes on: {why}; end it by SIGTERM")
    if daemon >= 0:  # so that the next start finds the lock free; who holds it then is not waited for
        poll = select.poll()
        poll.register(daemon, select.POLLIN)
        poll.poll(REMOTE_STOP_REPLY_SECONDS * 1000)
        os.close(daemon)
    if listening is not None and socket_identity(path) == listening:
        try:
            os.close(lock(path))  # which removes a socket that nobody listens at
        except StartError:
            pass  # it is the next daemon's; the number of the old one is used again


def _token(path: str) -> tuple[str, int]:
    """Returns the token in a file, empty when there is none, and the user whose file it is, -1 for nobody's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return "", -1  # then the daemon says what it thinks of a request without one
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "", -1
        return text_of(file.read(REMOTE_TOKEN_MAX_BYTES)), status.st_uid


def _followed(pid: int) -> int:
    """Returns a descriptor of a process, -1 when it cannot be seen from here."""
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except OSError:
        return -1
