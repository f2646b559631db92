"""Runs `sterna` in a process whose pipe client keeps notes, or is broken on purpose: the controls of the exact tests.

Usage: exact_pipe.py NOTES BREAK ARGS… Each line of the file NOTES is one lost connection: how many bytes that
we had sent were not acknowledged at that moment. BREAK is "" or one of BREAKS.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from sterna.client import driver
from sterna.client.transfer import Transfer
from sterna.protocol.client import ClientMachine
from sterna.protocol.frame import Type
from sterna.protocol.stream import SendStream

_DATA = int(Type.DATA)


def note_cuts(path: str) -> None:
    """Notes what is unacknowledged whenever the connection that carries the session is lost."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    lost = ClientMachine.lost

    def noting(self: ClientMachine, number: int, now: int, reason: str = "") -> None:
        if number == self.active:
            os.write(fd, f"{self.input.sent - self.input.base}\n".encode())
        lost(self, number, now, reason)

    ClientMachine.lost = noting  # type: ignore[method-assign]  # that is the point


def forget_unacknowledged() -> None:
    """Breaks the replay: what the node did not get before a cut is not sent again, but for the end mark."""

    def rewind(self: SendStream, position: int) -> None:
        marks = [kind for kind, at, _ in self.unacknowledged() if kind != _DATA and at >= position]
        self._items.clear()
        self.base = self.sent = self.end = position
        self._next = 0
        for kind in marks:
            self.mark(kind)

    SendStream.rewind = rewind  # type: ignore[method-assign]  # that is the point


def acknowledge_early() -> None:
    """Breaks the order of file and acknowledgement: output counts as written before it is, by one piece."""

    def size(self: Any) -> int:
        found = os.fstat(self.target).st_size
        return found + 1000 if found else 0

    Transfer.size = property(size)  # type: ignore[assignment,method-assign]  # that is the point


def narrow_sockets() -> None:
    """Breaks nothing: the sockets take so little at a time that most writes go out in parts."""
    original = driver._Channel.__init__

    def narrow(self: driver._Channel, number: int, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        original(self, number, sock)

    driver._Channel.__init__ = narrow  # type: ignore[method-assign]  # that is the point


BREAKS = {"forget": forget_unacknowledged, "early": acknowledge_early, "narrow": narrow_sockets}


def main() -> None:
    notes, broken = sys.argv[1:3]
    sys.argv[1:3] = []
    note_cuts(notes)
    if broken:
        BREAKS[broken]()
    from sterna.cli.main import main as cli

    cli()


if __name__ == "__main__":
    main()
