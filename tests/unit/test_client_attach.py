"""What `attach` holds back: typing that finds no room in the window, and receipts for output not written yet."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from sterna.client.attach import Attach, AttachOptions
from sterna.client.escape import EscapeKeys
from sterna.client.queries import LIVE, QueryFilter
from sterna.client.status import OutputTail, StatusLine
from sterna.protocol.client import Output, Screen


class Machine:
    """Takes as much input as there is `room` for, and notes what it is told."""

    def __init__(self) -> None:
        self.room = 0
        self.taken = b""
        self.receipts: list[int] = []

    def write(self, data: bytes, _now: int) -> int:
        count = min(len(data), self.room)
        self.room -= count
        self.taken += data[:count]
        return count

    def handled(self, position: int, _now: int) -> None:
        self.receipts.append(position)


class Tty:
    """A terminal with something typed that takes as much output as there is `room` for."""

    in_fd, out_fd = 10, 11

    def __init__(self) -> None:
        self.room = 0
        self.typed: deque[bytes] = deque()
        self.shown = b""
        self.modes: Any = self
        self.replay = b""

    def read(self) -> bytes | None:
        return self.typed.popleft() if self.typed else None

    def write(self, data: bytes, start: int = 0) -> int:
        count = min(len(data) - start, self.room)
        self.room -= count
        self.shown += data[start : start + count]
        return count


class Driver:
    """Knows which descriptors are watched."""

    def __init__(self) -> None:
        self.watched: set[int] = set()

    def watch(self, fd: int, _events: int, _callback: object) -> None:
        self.watched.add(fd)

    def unwatch(self, fd: int) -> None:
        self.watched.discard(fd)


def attached() -> tuple[Any, Machine, Tty, Driver]:
    """A client after its session was opened, without a process around it."""
    run: Any = Attach.__new__(Attach)
    machine, tty, driver = Machine(), Tty(), Driver()
    run._machine, run._terminal, run._driver, run._options = machine, tty, driver, AttachOptions()
    run._escape, run._filter = EscapeKeys(False, "~"), QueryFilter(LIVE)
    run._watching, run._typed, run._queue, run._left = False, b"", deque(), ""
    run._begun, run._draining = 0, False
    run._typist, run._notifier, run._painted, run._tail = True, None, True, OutputTail()
    run._status = StatusLine("n", run._tail, tty.modes, None)
    driver.watch(tty.in_fd, 0, None)
    return run, machine, tty, driver


def test_what_the_window_does_not_take_waits_and_goes_in_piece_by_piece() -> None:
    run, machine, tty, driver = attached()
    tty.typed.extend((b"0123456789", b"abc"))
    machine.room = 4
    run._keys(0)
    run._keys(0)  # there is more to read, but no room
    assert (machine.taken, tty.in_fd in driver.watched) == (b"0123", False)
    for room, taken in ((0, b"0123"), (3, b"0123456"), (1, b"01234567")):
        machine.room = room
        run._roomy()
        assert (machine.taken, tty.in_fd in driver.watched) == (taken, False)
    machine.room = 100
    run._roomy()
    assert tty.in_fd in driver.watched
    run._keys(0)
    assert machine.taken == b"0123456789abc"


@pytest.mark.parametrize("picture", [False, True], ids=["output", "picture"])
def test_nothing_counts_as_handled_before_the_terminal_has_all_of_it(picture: bool) -> None:
    run, machine, tty, driver = attached()
    tty.room = 3
    if picture:
        run._screen(Screen(b"a picture.", 10, False))
    else:
        run._output(Output(b"0123456789", 10, False))
    run._output(Output(b"abc", 13, False))
    assert (len(tty.shown), machine.receipts, tty.out_fd in driver.watched) == (3, [], True)
    for room, receipts in ((6, []), (1, [10]), (2, [10]), (5, [10, 13])):
        tty.room = room
        run._flush(0)
        assert machine.receipts == receipts
    assert tty.shown.endswith(b"abc")
    assert tty.out_fd not in driver.watched
