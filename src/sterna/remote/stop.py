"""`-stop`: asks the daemon to shut down and clears its socket away, whatever became of it."""

from __future__ import annotations

import os
import socket
import time
from typing import Final

from sterna.limits import REMOTE_START_POLL_MS, REMOTE_STOP_REPLY_SECONDS, REMOTE_TOKEN_MAX_BYTES
from sterna.remote.directories import remove, socket_identity
from sterna.remote.failure import StartError
from sterna.remote.gotext import text_of
from sterna.remote.token import FILE_NAME
from sterna.remote.wire import encode, utf8

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
    from sterna.remote.strict import holder

    listening = socket_identity(path)
    token = ""
    try:
        with open(os.path.join(os.path.dirname(path) or ".", FILE_NAME), "rb") as file:
            token = text_of(file.read(REMOTE_TOKEN_MAX_BYTES))
    except OSError:
        pass  # then the daemon says what it thinks of a request without one
    request = {"jsonrpc": "2.0", "id": 1, "method": "server.shutdown", "auth": token}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(REMOTE_STOP_REPLY_SECONDS)
        try:
            sock.connect(path)
        except OSError as error:  # what is there, if anything, was not put there by a daemon that this stops
            if pid := holder(path):
                raise StartError(f"the daemon (PID {pid}) has lost its socket {path}; end it by SIGTERM") from error
            return
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
    deadline = time.monotonic() + REMOTE_STOP_REPLY_SECONDS
    while holder(path) and time.monotonic() < deadline:  # so that the next start finds the lock free
        time.sleep(REMOTE_START_POLL_MS / 1000)
    if listening is not None and socket_identity(path) == listening:
        remove(path)
