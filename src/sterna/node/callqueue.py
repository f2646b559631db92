"""CALLs wait in line: one is answered in each turn of the loop, so that no number of them holds up anybody's keys."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from sterna import limits
from sterna.ids import DeviceId
from sterna.transport.pump import Reactor

Calls = deque[tuple[Callable[[], None], int]]


class CallQueue:
    """The CALLs of all connections of a node: tenants take turns, and so do the devices of each.

    What waits is bounded for each device, for each tenant (by what it leaves free to the others) and in all.
    """

    __slots__ = ("_bytes", "_reactor", "_total", "_waiting")

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._waiting: OrderedDict[str, OrderedDict[DeviceId, Calls]] = OrderedDict()
        self._bytes: dict[tuple[str, DeviceId | None], int] = {}
        self._total = 0

    def __len__(self) -> int:
        return sum(len(calls) for devices in self._waiting.values() for calls in devices.values())

    def add(self, tenant: str, device: DeviceId, size: int, answer: Callable[[], None]) -> bool:
        """Has a CALL of so many bytes answered later; False if too much of that device or tenant waits already."""
        size += limits.CALL_COST_BYTES
        free = limits.CALLS_MAX_BYTES - self._total - size
        if (
            self._bytes.get((tenant, device), 0) + size > limits.CALLS_PER_DEVICE_MAX_BYTES
            or self._bytes.get((tenant, None), 0) + size > limits.SHARE_TIMES_FREE * free
        ):
            return False
        if not self._total:
            self._reactor.loop.call_soon(self._next)
        self._count(tenant, device, size)
        self._waiting.setdefault(tenant, OrderedDict()).setdefault(device, deque()).append((answer, size))
        return True

    def _count(self, tenant: str, device: DeviceId, size: int) -> None:
        self._total += size
        for key in ((tenant, device), (tenant, None)):
            self._bytes[key] = self._bytes.get(key, 0) + size
            if not self._bytes[key]:
                del self._bytes[key]

    def _next(self) -> None:
        tenant, devices = self._waiting.popitem(last=False)
        device, calls = devices.popitem(last=False)
        answer, size = calls.popleft()
        if calls:
            devices[device] = calls
        if devices:
            self._waiting[tenant] = devices
        try:
            self._reactor.run(answer)
        finally:
            self._count(tenant, device, -size)
            if self._total:
                self._reactor.loop.call_soon(self._next)
