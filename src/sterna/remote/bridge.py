"""`-bridge`: standard input and output as a connection to the daemon."""

from __future__ import annotations

import _thread
import os
import socket
from typing import NoReturn

from sterna.remote.failure import StartError
from sterna.remote.gotext import errno_text

_COPY_BYTES = 256 * 1024


def bridge(path: str) -> NoReturn:
    """Copies both ways until either side ends, then ends the process.

    Raises `StartError` when nobody listens at `path`.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        text = errno_text(error.errno) if error.errno else "invalid argument"
        raise StartError(f"dial server: dial unix {path}: connect: {text}") from error
    _thread.start_new_thread(_copy, (0, sock.fileno()))
    _copy(sock.fileno(), 1)


def _copy(source: int, target: int) -> NoReturn:
    """Copies until the source ends or the target is gone, and takes the other direction along."""
    try:
        while data := os.read(source, _COPY_BYTES):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
    except OSError:
        pass
    os._exit(0)
