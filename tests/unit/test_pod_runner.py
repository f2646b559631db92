"""A program's runner: how sizes and pictures are kept from stopping the loop that all sessions of a pod share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sterna import limits
from sterna.pod.runner import ProgramRunner
from sterna.pod.screen import LazyScreen, ScreenCopy
from sterna.pod.server import Picture
from sterna.protocol.podside import PodSession


class Server:
    """A pod's server whose work beside the loop is done when the test says so."""

    def __init__(self) -> None:
        self.reactor = SimpleNamespace(
            loop=asyncio.get_running_loop(), view=memoryview(bytearray(65_536)), run=lambda call: call()
        )
        self.machine = SimpleNamespace(acknowledge_due=lambda *_: None)
        self.work: list[tuple[Callable[[], None], Callable[[], None]]] = []

    def beside(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        self.work.append((work, done))

    def draw(self, picture: Picture) -> None:
        if picture.begin():
            self.work.append((picture.copy, picture.copied))
            self.work.append((picture.paint, picture.painted))

    def output(self, session: PodSession, data: bytes) -> None:
        session.out.write(data)

    def do(self) -> None:
        """Does the oldest piece of work."""
        work, done = self.work.pop(0)
        work()
        done()


class Screen(LazyScreen):
    """Notes what is asked of it, in order."""

    __slots__ = ("log",)

    def __init__(self) -> None:
        super().__init__(80, 24)
        self.log: list[str] = []

    def resize(self, cols: int, rows: int) -> None:
        self.log.append(f"resize {cols}x{rows} after {self.backlog}")
        super().resize(cols, rows)

    def snapshot(self, scrollback: bool = True, *, final: bool = False) -> bytes:
        self.log.append(f"draw {scrollback}")
        return super().snapshot(scrollback, final=final)

    def copy(self) -> ScreenCopy | None:
        self.log.append("copy")
        return super().copy()


class Session(PodSession):
    """Notes which snapshots were sent."""

    __slots__ = ("answered",)

    def __init__(self) -> None:
        super().__init__(b"U" * 16)
        self.answered: list[int] = []

    def send_snapshot(self, token: int, position: int, data: bytes, zstd: bool) -> None:
        self.answered.append(token)


class Bench:
    """A runner with a pipe in place of its program's terminal."""

    def __init__(self) -> None:
        self.alive, self.exit = os.pipe()
        self.output, self.program_side = os.pipe()
        os.set_blocking(self.output, False)
        self.sizes: list[tuple[int, int]] = []
        program = SimpleNamespace(
            pidfd=self.alive, read_fd=self.output, write_fd=-1, kind="pty",
            resize=lambda cols, rows: self.sizes.append((cols, rows)),
        )  # fmt: skip
        self.server, self.session, self.screen = Server(), Session(), Screen()
        self.runner = ProgramRunner(cast("Any", self.server), self.session, cast("Any", program), self.screen)

    def resize(self, cols: int, rows: int) -> None:
        self.session.cols, self.session.rows = cols, rows
        self.runner.resized()

    def close(self) -> None:
        self.runner._stop_watching()
        self.server.reactor.loop.remove_reader(self.alive)
        for fd in (self.alive, self.exit, self.output, self.program_side):
            os.close(fd)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    made.close()


async def test_a_flood_of_sizes_is_one_now_and_the_last_one_later(bench: Bench) -> None:
    for number in range(1000):
        bench.resize(100 + number % 2, 30)
    assert bench.sizes == [(100, 30)]
    assert bench.screen.log == []  # the layout is not made on the loop
    bench.server.do()
    async with asyncio.timeout(5):
        while len(bench.sizes) < 2:
            await asyncio.sleep(limits.RESIZE_EVERY_MS / 1000)
    assert bench.sizes == [(100, 30), (101, 30)]
    bench.server.do()
    bench.resize(101, 30)
    assert bench.screen.log == ["resize 100x30 after 0", "resize 101x30 after 0"]
    assert (bench.sizes[2:], bench.server.work) == ([], [])


async def test_output_for_the_new_size_is_read_after_the_screen_has_it(bench: Bench) -> None:
    os.write(bench.program_side, b"old")
    async with asyncio.timeout(5):
        while bench.screen.backlog < 3:
            await asyncio.sleep(0)
    bench.resize(100, 30)
    os.write(bench.program_side, b"new")
    bench.runner.roomy()
    await asyncio.sleep(0)
    assert bench.screen.backlog == 3
    bench.server.do()
    assert bench.screen.log == ["resize 100x30 after 3"]
    async with asyncio.timeout(5):
        while bench.session.out.end < 6:
            await asyncio.sleep(0)


async def test_a_picture_is_drawn_after_the_size_that_came_before_it(bench: Bench) -> None:
    bench.resize(100, 30)
    bench.resize(110, 40)
    bench.runner.capture(1, True)
    while bench.server.work:
        bench.server.do()
    assert bench.screen.log == ["resize 100x30 after 0", "resize 110x40 after 0", "copy"]
    assert bench.session.answered == [1]


async def test_pictures_that_wait_for_one_are_drawn_together(bench: Bench) -> None:
    for token in range(10):
        bench.runner.capture(token, token % 3 != 1)
    while bench.server.work:
        bench.server.do()
    assert sorted(bench.session.answered) == list(range(10))
    assert bench.screen.log == ["copy", "draw False"]
