"""Whoever may make sockets in the shared directory keeps no other tenant's agents out, and does not fill the log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sterna import limits
from sterna.node import pods
from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.protocol import messages
from sterna.protocol.frame import Type, encode
from sterna.protocol.messages import Hello

SECONDS = 20.0
HELLO = encode(Type.HELLO, 0, 0, messages.pack(Hello(1, "pty", b"i" * 16, ["many"])))
ATTACKED = 4_200


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(pods, "_GONE_SECONDS", 0.5)
    # A Unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="st-"))
    (path / "sockets").mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Node]:
    node = Node(NodeConfig(port=0, state=str(directory / "node"), sockets=str(directory / "sockets")))
    try:
        node.start()
        yield node
    finally:
        await node.close()


async def until(done: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def listening(path: Path) -> socket.socket:
    """A socket that connections are made to and nobody ever answers on."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(path))
    sock.listen(100)
    return sock


@asynccontextmanager
async def greeting(path: Path) -> AsyncIterator[None]:
    """An agent that greets, and nothing more."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(greet, path)
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def ready(node: Node, tenant: str, agent: str) -> bool:
    pod = node.registry.pod(tenant, agent)
    return pod is not None and pod.is_ready


def about_pods(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "sterna.node.pods"]


@pytest.mark.parametrize("first", [True, False], ids=["there before the node", "while it runs"])
async def test_one_socket_under_thousands_of_names_keeps_no_agent_of_others_out(
    directory: Path, caplog: pytest.LogCaptureFixture, first: bool
) -> None:
    caplog.set_level(logging.INFO)
    sockets = directory / "sockets"

    def attack() -> None:
        for number in range(ATTACKED):
            os.link(sockets / "mallory_0", sockets / f"mallory_x{number}")

    with listening(sockets / "mallory_0"):
        if first:
            attack()
        async with running(directory) as node:
            if not first:
                await until(lambda: node.registry.pod("mallory", "0"))
                attack()
            async with greeting(sockets / "ada_main"):
                await until(lambda: ready(node, "ada", "main"))
                assert len(node.registry.pods("mallory")) <= 1, "each name was taken for an agent"
                said = about_pods(caplog)
                assert len(said) < 2 * pods._NOTICES_BURST
                assert any("more names" in getattr(record, "reason", "") for record in said)


async def test_a_tenant_has_so_many_agents_and_the_next_as_soon_as_there_is_room(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PODS_PER_TENANT_MAX", 8)
    sockets = directory / "sockets"
    async with running(directory) as node, contextlib.AsyncExitStack() as stack:
        taken = [listening(sockets / f"mallory_{number}") for number in range(12)]
        await stack.enter_async_context(greeting(sockets / "mallory_last"))
        async with greeting(sockets / "ada_main"):
            await until(lambda: ready(node, "ada", "main"))
        assert len(node.registry.pods("mallory")) == 8
        assert node.registry.pod("mallory", "last") is None
        for number, sock in enumerate(taken):
            (sockets / f"mallory_{number}").unlink()
            sock.close()
        for pod in node.registry.pods("mallory"):  # as when what served them ends
            if pod.connection is not None:
                pod.connection.pump.abort("it ended")
        await until(lambda: ready(node, "mallory", "last"))
        await until(lambda: len(node.registry.pods("mallory")) == 1)


async def test_the_node_as_a_whole_has_so_many_agents_and_the_next_as_soon_as_there_is_room(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PODS_MAX", 2)
    sockets = directory / "sockets"
    async with running(directory) as node, greeting(sockets / "ada_main"), greeting(sockets / "bob_main"):
        await until(lambda: ready(node, "ada", "main") and ready(node, "bob", "main"))
        async with greeting(sockets / "eve_main"):
            await until(lambda: node.registry._crowded)
            assert node.registry.pod("eve", "main") is None
            (sockets / "bob_main").unlink()
            connection = node.registry.pods("bob")[0].connection
            assert connection is not None
            connection.pump.abort("it ended")
            await until(lambda: ready(node, "eve", "main"))
            assert node.registry.pod("bob", "main") is None


async def test_an_agent_whose_event_was_lost_is_found(directory: Path) -> None:
    """More happens than the kernel keeps (inotify(7), max_queued_events), then an agent comes."""
    queued = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    sockets = directory / "sockets"
    async with running(directory) as node:
        for number in range(queued + 100):
            (sockets / f"x{number}").touch()
            (sockets / f"x{number}").unlink()
        async with greeting(sockets / "ada_main"):
            await until(lambda: ready(node, "ada", "main"))


async def test_what_no_event_told_is_found_when_the_directory_is_listed_next(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pods, "_LIST_SECONDS", 0.1)
    monkeypatch.setattr(pods, "_LIST_PAUSE_SECONDS", 0.1)
    caplog.set_level(logging.INFO)
    sockets, elsewhere = directory / "sockets", directory / "elsewhere"
    async with greeting(elsewhere):
        os.link(elsewhere, sockets / "ada_main")
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(os.fspath(sockets / "ada_dead"))
        async with running(directory) as node:
            await until(lambda: about_pods(caplog))
            assert node.registry.pod("ada", "main") is None
            elsewhere.unlink()
            await until(lambda: ready(node, "ada", "main"))
            await until(lambda: node.registry.pod("ada", "dead") is None)
            # A socket that nobody serves is no agent each time again.
            rested = node.registry._rested
            await until(lambda: node.registry._rested >= rested + 0.5)
            assert node.registry.pod("ada", "dead") is None
            assert len([record for record in about_pods(caplog) if getattr(record, "pod", "") == "ada_dead"]) == 1


async def test_a_directory_that_cannot_be_read_is_read_when_it_can(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods, "_LIST_SECONDS", 0.05)
    monkeypatch.setattr(pods, "_LIST_PAUSE_SECONDS", 0.05)
    sockets, away = directory / "sockets", directory / "away"
    async with running(directory) as node:
        sockets.rename(away)
        await until(lambda: node.registry.notices._said)
        async with greeting(directory / "new"):
            away.rename(sockets)
            os.rename(directory / "new", sockets / "ada_main")
            await until(lambda: ready(node, "ada", "main"))


async def test_a_storm_of_events_leaves_one_timer_for_an_agent_that_is_not_there(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "sockets" / "ada_main"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    async with running(directory) as node:
        pod = node.registry.pod("ada", "main")
        assert pod is not None
        tries = 0

        def refuse() -> socket.socket:
            nonlocal tries
            tries += 1
            raise ConnectionRefusedError(111, "nobody serves it")

        monkeypatch.setattr(pod, "dial", refuse)
        for _ in range(50):
            pod.connect()
        before = tries
        await until(lambda: pod.gone)
        assert tries - before < 10


class Log:
    """A clock, and what is logged meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        self.now = 0
        self._caplog = caplog
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(pods, "SYSTEM_CLOCK", self)
        self.notices = pods.Notices()

    def monotonic(self) -> int:
        return self.now

    def lines(self) -> list[tuple[str, int]]:
        """For each line its pod, and how many were left out before it."""
        found = [(getattr(r, "pod", ""), getattr(r, "left_out", 0)) for r in about_pods(self._caplog)]
        self._caplog.clear()
        return found


def test_of_each_name_one_line_a_minute_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(monkeypatch, caplog)
    for second in range(120):
        log.now = second * 10**9
        log.notices.say(logging.INFO, "pod gone", "ada_main")
    assert log.lines() == [("ada_main", 0), ("ada_main", 59)]
    log.notices.say(logging.INFO, "pod connected", "ada_main")
    log.notices.say(logging.INFO, "pod gone", "ada_other", reason="\x1b[m" + "x" * 1000)
    assert log.lines() == [("ada_main", 59), ("ada_other", 0)]


def test_of_all_names_one_line_a_second_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(monkeypatch, caplog)
    for number in range(100_000):  # for ten minutes
        log.now = number * 6_000_000
        log.notices.say(logging.WARNING, "pod socket refused", f"mallory_{number}")
    lines = log.lines()
    assert 600 <= len(lines) <= 600 + pods._NOTICES_BURST
    assert len(log.notices._said) <= 60 + pods._NOTICES_BURST, "what was said long ago is forgotten"
    log.now += 10**9
    log.notices.sum_up()
    (summed,) = log.lines()
    assert len(lines) + sum(left_out for _, left_out in lines) + summed[1] == 100_000, "each is logged or counted"
    log.notices.sum_up()
    assert not log.lines()
