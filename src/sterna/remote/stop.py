"""`-stop`: asks the daemon to shut down and clears its socket away, whatever became of it."""

from __future__ import annotations

import socket
from typing import Final

from sterna.limits import REMOTE_STOP_REPLY_SECONDS
from sterna.remote.directories import remove

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
