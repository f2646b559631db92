"""Terminals for children: pairs whose master this process keeps, see pty(7)."""

from __future__ import annotations

import fcntl
import os
import struct
import termios


def open_terminal(columns: int, rows: int, opened: list[int]) -> bytes:
    """Opens a terminal and returns its path; its master and the other end are put into `opened`. Raises `OSError`."""
    opened += os.openpty()
    master, slave = opened[-2:]
    set_size(master, columns, rows)
    os.set_blocking(master, False)
    return os.ttyname(slave).encode()


def set_size(descriptor: int, columns: int, rows: int) -> None:
    """Sets the terminal's size; what runs in its foreground is told by SIGWINCH. Raises `OSError`."""
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def queued(descriptor: int) -> int:
    """Returns how many bytes are in a pipe."""
    size = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    return int.from_bytes(size, "little")
