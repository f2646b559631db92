"""What thousands of sessions at once rely on: nothing that ended stays in memory, and no turn of the loop is long."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sterna import limits
from sterna.client import aio
from sterna.node.app import Node
from sterna.node.clients import ClientConnection
from sterna.node.config import NodeConfig
from sterna.pod.serve import AgentSession, serve
from sterna.protocol.session import Session
from sterna.transport.listen import Listener, tcp_socket
from sterna.transport.pump import Pump, Reactor

SECONDS = 20.0
KINDS = (ClientConnection, Pump, Session)


@asynccontextmanager
async def running(directory: Path, **settings: int) -> AsyncIterator[Node]:
    """A node with an agent that echoes, in this process."""
    sockets = str(directory / "sockets")
    os.mkdir(sockets, 0o700)

    async def echo(session: AgentSession) -> None:
        async for data in session:
            await session.write(data)

    stop = asyncio.Event()
    agent = asyncio.create_task(serve(echo, name="echo", sockets=sockets, stop=stop))
    await until(lambda: os.path.exists(f"{sockets}/local_echo"))
    node = Node(NodeConfig(port=0, state=str(directory / "node"), sockets=sockets, **settings))  # type: ignore[arg-type]  # sizes and times only
    node.start()
    try:
        await until(lambda: any(pod.is_ready for pod in node.pods("local")))
        yield node
    finally:
        await node.close()
        stop.set()
        await agent


async def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def connect(node: Node, directory: Path) -> aio.Session:
    host, port = node.address
    return await aio.connect(agent="echo", new=True, state=str(directory), host=host, port=port, timeout=SECONDS)


def living() -> Counter[str]:
    """How many objects of each kind there are that cost memory for each connection or session."""
    return Counter(type(found).__name__ for found in gc.get_objects() if isinstance(found, KINDS))


async def test_what_a_connection_cost_is_free_when_it_ends_without_waiting_for_the_collector(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        async with await connect(node, tmp_path) as first:
            await first.write(b"x")
            assert await first.read() == b"x"
        await until(lambda: not node.connections)
        gc.collect()
        gc.disable()
        try:
            before = living()
            for _ in range(5):
                session = await connect(node, tmp_path)
                await session.write(b"x")
                assert await session.read() == b"x"
                await session.close()
                del session
            await until(lambda: not node.connections and len(node.table) == 1)
            await asyncio.sleep(0.2)  # the ticker looks once more at sessions that had something due
            assert living() == before
        finally:
            gc.enable()


async def test_cold_sessions_leave_memory_and_their_frames_bring_them_back(tmp_path: Path) -> None:
    async with running(tmp_path, cold_seconds=1) as node:
        names = []
        for _ in range(3):
            async with await connect(node, tmp_path) as session:
                await session.write(b"before ")
                assert await session.read() == b"before "
                names.append(session.name)
        await until(lambda: not len(node.table))
        host, port = node.address
        for name in names:
            again = await aio.connect(name=name, output=0, state=str(tmp_path), host=host, port=port, timeout=SECONDS)
            async with again:
                await again.write(b"after")
                seen = b""
                while len(seen) < len(b"before after"):
                    seen += await again.read()
                assert seen == b"before after"


async def test_a_session_that_warms_up_between_look_and_eviction_stays(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        async with await connect(node, tmp_path) as session:
            await session.write(b"x")
            assert await session.read() == b"x"
        await until(lambda: not node.connections)
        now = time.monotonic_ns()
        assert node.table.cold(0, now) == []  # output came since the last look
        (cold,) = node.table.cold(0, now)
        parked: list[Session] = []
        async with await aio.connect(name=cold.name, state=str(tmp_path), timeout=SECONDS):
            assert not node.table.evict(cold, 0, now, parked.append)
        assert node.table.evict(cold, 0, time.monotonic_ns(), parked.append)
        assert parked == [cold]
        assert not node.table.evict(cold, 0, time.monotonic_ns(), parked.append)


async def test_long_work_gives_the_loop_back_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sterna.node.app._SLICE", -1)  # every slice is over at once
    done: list[int] = []
    async with running(tmp_path) as node:
        node._slowly(iter(range(5)), lambda item, _now: done.append(item))
        assert done == [0]
        await asyncio.sleep(0)
        assert done == [0, 1]
        await until(lambda: len(done) == 5)
        node._slowly(iter(range(5, 9)), lambda item, _now: done.append(item))
    await asyncio.sleep(0.05)
    assert len(done) < 9, "nothing is done any more once the node is closed"


async def test_a_quiet_client_is_asked_and_one_that_is_gone_is_given_up(tmp_path: Path) -> None:
    async with running(tmp_path) as node, await connect(node, tmp_path) as session:
        (connection,) = node.connections
        long_ago = time.monotonic_ns() - 10 * limits.KEEPALIVE_SECONDS * 10**9
        node._check_peer(connection, time.monotonic_ns())
        asked = [connection.pinged]
        connection.last = long_ago
        node._check_peer(connection, time.monotonic_ns())
        asked.append(connection.pinged)
        assert asked == [False, True]
        await until(lambda: not connection.pinged)  # it answered
        assert connection.last > long_ago
        connection.last, connection.pinged = long_ago, True
        node._check_peer(connection, time.monotonic_ns())
        assert connection.pump.closed
        await session.write(b"back")
        assert await session.read() == b"back"


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection: the client's, the server's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        return mine, server.accept()[0]


async def test_handshakes_begin_a_few_in_each_turn_of_the_loop_those_first_that_came_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[list[int]] = [[]]
    listener = Listener(Reactor(asyncio.get_running_loop()), tcp_socket("127.0.0.1", 0), lambda _sock, _peer: None)
    monkeypatch.setattr(listener, "_begin", lambda sock, _peer: turns[-1].append(sock.getpeername()[1]))
    pairs = [tcp_pair() for _ in range(3 * limits.HANDSHAKES_PER_TURN_MAX)]
    try:
        order = [mine.getsockname()[1] for mine, _ in pairs]
        # Two have gone while they waited: no handshake for them, and nobody waits the longer for it.
        gone = {order[0], order[9]}
        for index in (0, 9):
            pairs[index][0].close()
        listener._queue.extend((theirs, "peer") for _, theirs in pairs)
        while listener.queued:
            listener._begin_some()
            turns.append([])
        assert [port for turn in turns for port in turn] == [port for port in order if port not in gone]
        assert max(map(len, turns)) == limits.HANDSHAKES_PER_TURN_MAX
    finally:
        for pair in pairs:
            for end in pair:
                end.close()
        listener.close()


async def test_the_store_reaches_the_disk_before_its_log_grows_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sterna.node.app.WAL_MAX_BYTES", 1)
    async with running(tmp_path) as node:
        calls: list[float] = []
        real = node.store.checkpoint

        def checkpoint() -> bool:
            calls.append(time.monotonic())
            return real()

        monkeypatch.setattr(node.store, "checkpoint", checkpoint)
        async with await connect(node, tmp_path):
            await until(lambda: bool(calls))
