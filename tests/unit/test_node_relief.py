"""What waits for all clients together is bounded: those that let most wait go first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sterna.node.app import Node


class Connection:
    def __init__(self, queued: int, *, blocked: bool = True) -> None:
        self.link = SimpleNamespace(blocked=blocked)
        self.pump = SimpleNamespace(queued=queued, abort=self.abort)
        self.reason = ""

    def abort(self, reason: str) -> None:
        self.reason = reason


def relieve(connections: list[Connection], most: int) -> list[int]:
    node: Any = SimpleNamespace(connections=set(connections))
    Node._relieve(node, most)
    return sorted(connection.pump.queued for connection in connections if connection.reason)


def test_below_the_bound_nobody_goes() -> None:
    assert relieve([Connection(40), Connection(60)], 100) == []


def test_beyond_it_those_that_let_most_wait_go_and_no_more_than_needed() -> None:
    assert relieve([Connection(50), Connection(30), Connection(40), Connection(10)], 100) == [50]
    assert relieve([Connection(50), Connection(30), Connection(40), Connection(10)], 45) == [40, 50]


def test_who_takes_what_it_gets_stays() -> None:
    assert relieve([Connection(500, blocked=False), Connection(60), Connection(70)], 100) == [70]
