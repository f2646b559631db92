"""Notices what breaks connections: changed addresses, the machine's sleep, and peers that no longer acknowledge.

Sources: netlink(7), rtnetlink(7), linux/rtnetlink.h, linux/if_addr.h, clock_gettime(2), tcp(7), linux/tcp.h.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import TypeVar

from sterna.limits import CLOCK_JUMP_MS
from sterna.units import MILLISECOND

NETLINK_DRAIN_MAX_MESSAGES = 256
NETLINK_MESSAGE_MAX_BYTES = 65_536
NETLINK_REMEMBERED_MAX = 4_096

_K = TypeVar("_K")
_V = TypeVar("_V")

_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE = 24, 25
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_TENTATIVE = 0x40
_SCOPE_LINK = 253
_LINK_UP = 0x1 | 0x40 | 0x10000  # IFF_UP, IFF_RUNNING, IFF_LOWER_UP
_RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY = 4, 5, 6
_RT_TABLE_LOCAL = 255
_RTN_UNICAST = 1
_RTM_F_CLONED = 0x200

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")


class AddressWatch:
    """Watches this machine's addresses, links and default routes over a netlink socket.

    A change is: a usable address that came or went (not a refreshed lifetime, not a link-local address), a link that
    has such an address and went up or down, a default route that came or went. On systems without netlink, or where
    it is not allowed, `fileno()` is -1 and nothing is ever noticed.
    """

    __slots__ = ("_addresses", "_links", "_routes", "_socket")

    def __init__(self) -> None:
        self._addresses: dict[tuple[int, bytes], None] = {}
        self._links: dict[int, bool] = {}
        self._routes: dict[tuple[int, bytes], None] = {}
        self._socket = _open_netlink()
        if self._socket is not None:
            try:
                self._learn(_GETLINK)
                self._learn(_GETADDR)
            except OSError:
                self.close()

    def fileno(self) -> int:
        """Returns the descriptor to poll for reading, or -1."""
        return -1 if self._socket is None else self._socket.fileno()

    def changed(self) -> bool:
        """Reads what is waiting, at most NETLINK_DRAIN_MAX_MESSAGES messages, and returns whether anything changed."""
        changed = False
        for _ in range(NETLINK_DRAIN_MAX_MESSAGES):
            if self._socket is None:
                break
            try:
                data = self._socket.recv(NETLINK_MESSAGE_MAX_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                # ENOBUFS: the kernel had more to tell than fits, so something did change.
                changed = True
                continue
            changed |= self._take(data)
        return changed

    def close(self) -> None:
        """Closes the socket; nothing is noticed from then on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _learn(self, request: int) -> None:
        """Asks for what exists now, so that a repeated announcement of it is no change (the kernel answers at once)."""
        assert self._socket is not None
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
        header = _HEADER.pack(_HEADER.size + len(body), request, _NLM_F_REQUEST | _NLM_F_DUMP, request, 0)
        self._socket.send(header + body)
        for _ in range(NETLINK_DRAIN_MAX_MESSAGES):
            try:
                data = self._socket.recv(NETLINK_MESSAGE_MAX_BYTES)
            except BlockingIOError:
                break
            self._take(data)
            if _kind_of_last(data) in (_NLMSG_DONE, _NLMSG_ERROR):
                break

    def _take(self, data: bytes) -> bool:
        changed = False
        position = 0
        while position + _HEADER.size <= len(data):
            length, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, position)
            if length < _HEADER.size or position + length > len(data):
                break
            body = data[position + _HEADER.size : position + length]
            position += (length + 3) & ~3
            try:
                if kind in (_NEWLINK, _DELLINK):
                    changed |= self._take_link(body, kind == _NEWLINK)
                elif kind in (_NEWADDR, _DELADDR):
                    changed |= self._take_address(body, kind == _NEWADDR)
                elif kind in (_NEWROUTE, _DELROUTE):
                    changed |= self._take_route(body, kind == _NEWROUTE)
            except struct.error:
                continue
        return changed

    def _take_link(self, body: bytes, new: bool) -> bool:
        _family, _type, index, flags, _change = _LINK.unpack_from(body)
        up = new and flags & _LINK_UP == _LINK_UP
        before = self._links.get(index, False)
        if new:
            _remember(self._links, index, up)
        else:
            self._links.pop(index, None)
        # Wireless statistics and the like are announced as links with nothing changed.
        return up != before and any(key[0] == index for key in self._addresses)

    def _take_address(self, body: bytes, new: bool) -> bool:
        _family, _prefix, flags, scope, index = _ADDRESS.unpack_from(body)
        if scope >= _SCOPE_LINK:
            return False
        attributes = _attributes(body, _ADDRESS.size)
        address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS, b"")
        if _IFA_FLAGS in attributes:
            flags = struct.unpack_from("=I", attributes[_IFA_FLAGS])[0]
        key = (index, address)
        before = key in self._addresses
        if new and not flags & _IFA_F_TENTATIVE:
            _remember(self._addresses, key, None)
            return not before
        if not new:
            self._addresses.pop(key, None)
        return before and not new

    def _take_route(self, body: bytes, new: bool) -> bool:
        family, prefix, _src, _tos, table, _protocol, _scope, kind, flags = _ROUTE.unpack_from(body)
        if prefix or table == _RT_TABLE_LOCAL or kind != _RTN_UNICAST or flags & _RTM_F_CLONED:
            return False
        attributes = _attributes(body, _ROUTE.size)
        parts = (attributes.get(kind, b"") for kind in (_RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY))
        key = (family, b"/".join(parts))
        before = key in self._routes
        if new:
            _remember(self._routes, key, None)
            return not before
        self._routes.pop(key, None)
        return True


def _open_netlink() -> socket.socket | None:
    if sys.platform != "linux":
        return None
    try:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    except OSError:
        return None
    try:
        opened.bind((0, _GROUPS))
    except OSError:
        opened.close()
        return None
    return opened


def _kind_of_last(data: bytes) -> int:
    position, kind = 0, 0
    while position + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, position)[:2]
        position += max((length + 3) & ~3, _HEADER.size)
    return kind


def _attributes(body: bytes, position: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while position + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, position)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = body[position + _ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3
    return found


def _remember(known: dict[_K, _V], key: _K, value: _V) -> None:
    """Keeps at most NETLINK_REMEMBERED_MAX entries; the oldest goes first and may then count as new again."""
    if key not in known and len(known) >= NETLINK_REMEMBERED_MAX:
        del known[next(iter(known))]
    known[key] = value


class SleepWatch:
    """Notices that the machine slept, or stood still as a virtual machine does, between two calls.

    A jump of more than `jump_ms` milliseconds between the clock that stops in sleep and one that does not.
    """

    __slots__ = ("_boottime_ahead_ns", "_jump_ns", "_wall_ahead_ns")

    def __init__(self, jump_ms: int = CLOCK_JUMP_MS) -> None:
        self._jump_ns = jump_ms * MILLISECOND
        self._boottime_ahead_ns: int | None = None
        self._wall_ahead_ns: int | None = None

    def slept(self, monotonic_ns: int, boottime_ns: int, wall_ns: int | None = None) -> bool:
        """Returns whether the clocks came apart since the call before.

        `boottime_ns` counts sleep, `monotonic_ns` does not. `wall_ns` adds what neither shows (a stopped virtual
        machine, systems without CLOCK_BOOTTIME); a wall clock that is set by hand is then taken for sleep.
        """
        boottime_ahead = boottime_ns - monotonic_ns
        slept = self._boottime_ahead_ns is not None and boottime_ahead - self._boottime_ahead_ns > self._jump_ns
        self._boottime_ahead_ns = boottime_ahead
        if wall_ns is not None:
            wall_ahead = wall_ns - monotonic_ns
            slept |= self._wall_ahead_ns is not None and abs(wall_ahead - self._wall_ahead_ns) > self._jump_ns
            self._wall_ahead_ns = wall_ahead
        return slept


# struct tcp_info up to tcpi_rttvar: eight bytes of states and options, then 32-bit words.
_TCP_INFO = struct.Struct("=8B17I")
_UNACKED, _LAST_DATA_SENT, _LAST_ACK_RECEIVED, _RTT = 8 + 4, 8 + 9, 8 + 12, 8 + 15
_RETRANSMITS = 2


class TcpState:
    """What the kernel knows of a TCP connection: segments in flight, milliseconds, round trip in microseconds."""

    __slots__ = ("last_ack_ms", "last_sent_ms", "retransmits", "rtt_us", "unacked_segments")

    def __init__(
        self, *, unacked_segments: int, last_ack_ms: int, last_sent_ms: int, rtt_us: int, retransmits: int
    ) -> None:
        self.unacked_segments = unacked_segments
        self.last_ack_ms = last_ack_ms
        self.last_sent_ms = last_sent_ms
        self.rtt_us = rtt_us
        self.retransmits = retransmits


def tcp_state(sock: socket.socket) -> TcpState | None:
    """Reads TCP_INFO of a connected TCP socket (also under TLS); None where there is none."""
    if sys.platform != "linux":
        return None
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:
        return None
    if len(data) < _TCP_INFO.size:
        return None
    words = _TCP_INFO.unpack(data)
    return TcpState(
        unacked_segments=words[_UNACKED],
        last_ack_ms=words[_LAST_ACK_RECEIVED],
        last_sent_ms=words[_LAST_DATA_SENT],
        rtt_us=words[_RTT],
        retransmits=words[_RETRANSMITS],
    )


def unacknowledged(sock: socket.socket) -> tuple[int, int] | None:
    """Returns how many sent segments are not acknowledged and the milliseconds since the last acknowledgement.

    The second number also grows while nothing is sent; `AckWatch` tells how long something has been waiting.
    None where there is no TCP_INFO.
    """
    state = tcp_state(sock)
    return None if state is None else (state.unacked_segments, state.last_ack_ms)


class AckWatch:
    """Tells for how long one connection's sent bytes have gone without any acknowledgement."""

    __slots__ = ("_since_ns",)

    def __init__(self) -> None:
        self._since_ns: int | None = None

    def waiting_ms(self, state: TcpState | None, now_ns: int) -> int:
        """Returns milliseconds, 0 when nothing waits; `now_ns` is monotonic nanoseconds."""
        if state is None or not state.unacked_segments:
            self._since_ns = None
            return 0
        if self._since_ns is None:
            # The oldest that could be waiting was sent at most this long ago.
            self._since_ns = now_ns - min(state.last_ack_ms, state.last_sent_ms) * MILLISECOND
        self._since_ns = max(self._since_ns, now_ns - state.last_ack_ms * MILLISECOND)
        return int((now_ns - self._since_ns) // MILLISECOND)
