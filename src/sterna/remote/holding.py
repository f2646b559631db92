"""What the daemon and its holder say to each other: lists of byte strings, some of them with descriptors.

A message is its length, the number of its items, and each item after its own length, all little-endian u32. A holder
outlives upgrades of the daemon, so this changes only together with `VERSION`.
"""

from __future__ import annotations

import socket
import struct
from errno import EPROTO
from typing import TYPE_CHECKING, Final

from sterna.limits import REMOTE_HOLDER_MESSAGE_MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION: Final = b"2"
SUFFIX: Final = ".holder"  # of the socket's path

# Requests. Those of the second line have no answer.
HELLO, START, STATUS = b"hello", b"start", b"status"
CLOSE, REAP, DROP, END = b"close", b"reap", b"drop", b"end"
OK, FAILED = b"ok", b"failed"

# The descriptors that belong to a process, in their order. The first eight are closed one by one, at last by REAP. A
# terminal is both STDIN and STDOUT; what it prints and what is typed pass through pipes of which both ends are kept.
PIDFD, STDIN, STDOUT, STDERR, OUT_READ, OUT_WRITE, IN_READ, IN_WRITE, RECORD_OUT, RECORD_ERR, INDEX, INPUT = range(12)
PIPES: Final = 8
DESCRIPTORS: Final = 12

_U32: Final = struct.Struct("<I")
_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class HoldingError(OSError):
    """The other side has gone, or does not keep to the rules."""


def peer(sock: socket.socket) -> tuple[int, int]:
    """Returns process id and user id of the other side, as they were when it connected or began to listen."""
    pid, uid, _gid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid


def send(sock: socket.socket, items: Sequence[bytes], descriptors: Sequence[int] = ()) -> None:
    """Sends a message. Raises `OSError`."""
    body = b"".join((_U32.pack(len(items)), *(_U32.pack(len(item)) + item for item in items)))
    data = _U32.pack(len(body)) + body
    if descriptors:
        data = data[socket.send_fds(sock, [data], list(descriptors)) :]
    if data:
        sock.sendall(data)


def receive(sock: socket.socket) -> tuple[list[bytes], list[int]]:
    """Returns a message and the descriptors that came with it. Raises `HoldingError`, `OSError`."""
    head, descriptors = b"", []
    while len(head) < _U32.size:
        piece, came, _flags, _address = socket.recv_fds(
            sock, _U32.size - len(head), DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        if not piece:
            raise HoldingError(EPROTO, "the other side has gone")
        head += piece
        descriptors += came
    size = _U32.unpack(head)[0]
    if not _U32.size <= size <= REMOTE_HOLDER_MESSAGE_MAX_BYTES:
        raise HoldingError(EPROTO, "a message is too long")
    body = bytearray()
    while len(body) < size:
        piece = sock.recv(min(size - len(body), 1 << 20))
        if not piece:
            raise HoldingError(EPROTO, "the other side has gone")
        body += piece
    return _items(bytes(body)), descriptors


def _items(body: bytes) -> list[bytes]:
    items, at = [], _U32.size
    for _ in range(_U32.unpack_from(body)[0]):
        if at + _U32.size > len(body):
            raise HoldingError(EPROTO, "a message is cut")
        end = at + _U32.size + _U32.unpack_from(body, at)[0]
        items.append(body[at + _U32.size : end])
        at = end
    if at != len(body):
        raise HoldingError(EPROTO, "a message is cut")
    return items
