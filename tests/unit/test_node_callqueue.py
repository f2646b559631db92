"""CALLs that wait: whose turn it is, and how much of whom may wait."""

from __future__ import annotations

from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from sterna import limits
from sterna.errors import Code, ProtocolError
from sterna.ids import DeviceId
from sterna.node.callqueue import CallQueue
from sterna.node.clients import ClientConnection
from sterna.protocol.messages import Call

if TYPE_CHECKING:
    from collections.abc import Callable

MINE, OTHER, GUEST = (DeviceId(letter * 32) for letter in (b"m", b"o", b"g"))


class Turns:
    """A queue, and an event loop whose turns a test takes; `answered` says who was, in order."""

    def __init__(self) -> None:
        self.answered: list[str] = []
        self._soon: deque[tuple[Any, ...]] = deque()
        loop = SimpleNamespace(call_soon=lambda *work: self._soon.append(work))
        self.queue = CallQueue(cast("Any", SimpleNamespace(loop=loop, run=lambda work: work())))

    def add(self, tenant: str, device: DeviceId, name: str, size: int = 10) -> bool:
        return self.queue.add(tenant, device, size, lambda: self.answered.append(name))

    def turn(self) -> None:
        work, *values = self._soon.popleft()
        work(*values)

    def all(self) -> list[str]:
        while self._soon:
            self.turn()
        return self.answered


def test_tenants_and_their_devices_take_turns() -> None:
    turns = Turns()
    for number in range(100):
        assert turns.add("ada", GUEST, f"guest {number}")
    for number in range(2):
        assert turns.add("ada", MINE, f"ada {number}")
        assert turns.add("bob", OTHER, f"bob {number}")
    assert len(turns.queue) == 104
    assert turns.all()[:6] == ["guest 0", "bob 0", "ada 0", "bob 1", "guest 1", "ada 1"]
    assert turns.answered[6:] == [f"guest {number}" for number in range(2, 100)]
    assert len(turns.queue) == 0


def test_one_is_answered_in_each_turn_of_the_loop_also_of_those_that_come_meanwhile() -> None:
    turns = Turns()

    def answer() -> None:
        turns.answered.append("first")
        turns.add("ada", MINE, "second")

    turns.queue.add("ada", MINE, 10, answer)
    turns.turn()
    assert turns.answered == ["first"]
    assert turns.all() == ["first", "second"]
    assert turns.add("ada", MINE, "third")
    assert turns.all()[-1] == "third"


def test_an_answer_that_fails_does_not_hold_up_the_next() -> None:
    turns = Turns()

    def broken() -> None:
        raise ZeroDivisionError

    turns.queue.add("ada", MINE, 10, broken)
    turns.add("ada", MINE, "next")
    with pytest.raises(ZeroDivisionError):
        turns.turn()
    assert turns.all() == ["next"]


def fill(add: Callable[[], bool]) -> int:
    count = 0
    while add():
        count += 1
    return count


def test_what_one_device_lets_wait_is_bounded_and_the_room_comes_back() -> None:
    turns = Turns()
    cost = 30_000 + limits.CALL_COST_BYTES
    most = limits.CALLS_PER_DEVICE_MAX_BYTES // cost
    for _ in range(2):
        assert fill(lambda: turns.add("ada", GUEST, "guest", 30_000)) == most
        assert turns.add("ada", MINE, "ada", 30_000)
        turns.all()


def test_no_tenant_takes_all_room_for_calls() -> None:
    turns = Turns()
    cost = 30_000 + limits.CALL_COST_BYTES
    count = sum(fill(partial(turns.add, "greedy", DeviceId(bytes([number]) * 32), "", 30_000)) for number in range(100))
    most = limits.CALLS_MAX_BYTES * limits.SHARE_TIMES_FREE // (limits.SHARE_TIMES_FREE + 1)
    assert most - 100 * cost < count * cost <= most
    assert fill(lambda: turns.add("ada", MINE, "", 30_000)) == limits.CALLS_PER_DEVICE_MAX_BYTES // cost


def test_a_connection_that_asks_for_more_is_told_so() -> None:
    turns = Turns()
    visitor = SimpleNamespace(tenant="ada", device=GUEST)
    connections = [
        cast(
            "Any",
            SimpleNamespace(visitor=visitor, calls=0, node=SimpleNamespace(call_queue=turns.queue), _answer=print),
        )
        for _ in range(5)
    ]
    size = limits.CONTROL_MAX_BYTES

    def ask() -> None:
        for connection in connections:
            for _ in range(limits.CALLS_WAITING_MAX):
                ClientConnection._call(connection, Call(1, "list"), size)

    with pytest.raises(ProtocolError) as error:
        ask()
    assert error.value.code is Code.LIMIT
    assert sum(connection.calls for connection in connections) == len(turns.queue)
    assert len(turns.queue) * size <= limits.CALLS_PER_DEVICE_MAX_BYTES
