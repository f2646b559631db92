"""`-bridge`: standard input and output as a connection to the daemon."""

from __future__ import annotations

import _thread
import os
import socket
import time
from typing import NoReturn

from sterna.limits import REMOTE_BRIDGE_DRAIN_SECONDS
from sterna.remote.failure import StartError
from sterna.remote.gotext import errno_text

_COPY_BYTES = 256 * 1024


def bridge(path: str, *, drain: bool = False) -> NoReturn:
    """Copies both ways until either side ends, then ends the process.

    With `drain` the end of standard input is passed on, and what the daemon still answers is copied until it closes the
    connection, 40 seconds at most: longer than any reply takes. Raises `StartError` when nobody listens at `path`.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        text = errno_text(error.errno) if error.errno else "invalid argument"
        raise StartError(f"dial server: dial unix {path}: connect: {text}") from error
    _thread.start_new_thread(_feed if drain else _copy, (0, sock.fileno()))
    _copy(sock.fileno(), 1)


def _feed(source: int, target: int) -> NoReturn:
    """Copies until the source ends or the target is gone, and leaves the other direction some time."""
    _copied(source, target)
    try:
        with socket.socket(fileno=os.dup(target)) as other:
            other.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the daemon has closed; what it said before is still to be copied
    time.sleep(REMOTE_BRIDGE_DRAIN_SECONDS)
    os._exit(0)


def _copy(source: int, target: int) -> NoReturn:
    """Copies until the source ends or the target is gone, and takes the other direction along."""
    _copied(source, target)
    os._exit(0)


def _copied(source: int, target: int) -> None:
    try:
        while data := os.read(source, _COPY_BYTES):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
    except OSError:
        pass
