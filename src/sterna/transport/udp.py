"""UDP in runs: many datagrams of one size in one call, which the kernel takes apart and puts together.

Source: udp(7), UDP_SEGMENT and UDP_GRO. A datagram of its own costs as much as ten thousand copied bytes.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator

from sterna.errors import UsageError

DATAGRAM_MAX_BYTES = 65_535
_SOCKET_BYTES = 4 * 1024 * 1024
_UDP_SEGMENT, _UDP_GRO = 103, 104
_RUN_MAX, _RUN_MAX_BYTES = 40, 60_000
_RUN_LEAST_BYTES = 1_000
_SIZE = struct.Struct("=H")
_SIZES = struct.Struct("=i")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_SIZES.size)

Address = tuple[str, int] | tuple[str, int, int, int]


def open_udp(family: int) -> socket.socket:
    """Returns a non-blocking UDP socket with large buffers."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
    return sock


def udp_socket(host: str, port: int) -> socket.socket:
    """Returns a bound UDP socket; UsageError when the address is in use or is not this machine's."""
    sock = open_udp(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"UDP port {port} on {host} is in use; stop what listens there or choose another with --quic-port."
            ) from None
        raise UsageError(f"Cannot listen on {host} UDP port {port}: {error.strerror}.") from None
    return sock


def join(sock: socket.socket) -> None:
    """Has the kernel join datagrams that came together; they are read with `receive`."""
    try:
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    except OSError:
        pass  # a kernel before 5.0: each comes alone


def receive(sock: socket.socket) -> tuple[bytes, int]:
    """Reads from a connected socket: the bytes, and the size of each datagram in them; the last may be smaller."""
    data, ancillary, _, _ = sock.recvmsg(DATAGRAM_MAX_BYTES, _ANCILLARY_BYTES)
    for level, kind, value in ancillary:
        if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
            return data, int(_SIZES.unpack(value[: _SIZES.size])[0])
    return data, len(data)


def runs(datagrams: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Groups datagrams that may go in one call: all of one size, a smaller one ends a run. Small ones go at once."""
    run: list[bytes] = []
    total = 0
    for data in datagrams:
        size = len(data)
        if run and (size > len(run[0]) or len(run) >= _RUN_MAX or total + size > _RUN_MAX_BYTES):
            yield run
            run, total = [], 0
        run.append(data)
        total += size
        if size < len(run[0]) or size < _RUN_LEAST_BYTES:
            yield run
            run, total = [], 0
    if run:
        yield run


def send_run(sock: socket.socket, run: list[bytes], address: Address) -> None:
    """Sends a run of `runs`; raises BlockingIOError when none of it was taken, OSError when it cannot go this way."""
    if len(run) == 1:
        sock.sendto(run[0], address)
    else:
        size = [(socket.IPPROTO_UDP, _UDP_SEGMENT, _SIZE.pack(len(run[0])))]
        sock.sendmsg([b"".join(run)], size, 0, address)


__all__ = ["DATAGRAM_MAX_BYTES", "Address", "join", "open_udp", "receive", "runs", "send_run", "udp_socket"]
