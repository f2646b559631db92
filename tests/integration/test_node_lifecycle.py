"""What a node does with sessions over its own life: a restarted machine, retention, a full ring, its last minute."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import sterna
from sterna import limits
from sterna.cli import doctor
from sterna.client import aio
from sterna.errors import DRAINING_TEXT, Code
from sterna.node import app
from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.pod.serve import AgentSession, serve
from sterna.protocol.frame import Type
from sterna.protocol.messages import Accept, Close, Error
from sterna.protocol.states import State
from sterna.transport.udp import udp_socket
from sterna.trust.device import DeviceKey
from tests.e2e.raw_client import Raw, Site
from tests.e2e.rig import Rig

SECONDS = 20.0
AgentCode = Callable[[AgentSession], Awaitable[None]]


@pytest.fixture
def directory() -> Iterator[Path]:
    # A Unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="st-"))
    (path / "sockets").mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


async def until(done: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


class Echo:
    """An agent that echoes, counts how often it was begun, and ends all its sessions when `end` is set."""

    def __init__(self) -> None:
        self.begun = 0
        self.end = asyncio.Event()

    async def __call__(self, session: AgentSession) -> None:
        self.begun += 1
        echo = asyncio.create_task(self._echo(session))
        await self.end.wait()
        echo.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await echo

    async def _echo(self, session: AgentSession) -> None:
        async for data in session:
            await session.write(data)


@asynccontextmanager
async def agent(directory: Path, code: AgentCode) -> AsyncIterator[None]:
    """The agent `echo`, in this process."""
    sockets, stop = str(directory / "sockets"), asyncio.Event()
    task = asyncio.create_task(serve(code, name="echo", sockets=sockets, stop=stop))
    await until(lambda: os.path.exists(f"{sockets}/local_echo"))
    try:
        yield
    finally:
        stop.set()
        await task


@asynccontextmanager
async def running(directory: Path, **settings: Any) -> AsyncIterator[Node]:
    """A node in this process; ready once it knows the agent."""
    given = {"port": 0, "state": str(directory / "node"), "sockets": str(directory / "sockets"), **settings}
    node = Node(NodeConfig(**given))
    try:
        node.start()
        await until(lambda: any(pod.is_ready for pod in node.pods("local")))
        yield node
    finally:
        await node.close()


async def connect(node: Node, directory: Path, **more: Any) -> aio.Session:
    host, port = node.address
    return await aio.connect(agent="echo", state=str(directory), host=host, port=port, timeout=SECONDS, **more)


async def left_behind(node: Node, directory: Path, name: str) -> int:
    """A session with one echo in its history that nobody is attached to; returns its number."""
    async with await connect(node, directory, name=name) as session:
        await session.write(b"history")
        assert await session.read() == b"history"
    row = node.store.session_by_name("local", name)
    assert row is not None
    return row.number


# ---- a restart of the machine --------------------------------------------------------------------------------------


async def test_sessions_of_an_earlier_boot_are_named_as_ended_and_never_replaced(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = Echo()
    monkeypatch.setattr(app, "boot_id", lambda: "one")
    async with agent(directory, echo), running(directory) as node:
        number = await left_behind(node, directory, "work")
    monkeypatch.setattr(app, "boot_id", lambda: "two")
    async with agent(directory, echo), running(directory) as node:
        row = node.store.session(number)
        assert row is not None
        assert (row.state, row.end_code) == (State.EXITED, Code.AGENT_LOST)
        assert row.end_reason == "The machine was restarted."
        async with await connect(node, directory, name="work", output=0) as session:
            assert not session.created
            assert await session.read() == b"history"
            assert await session.read() == b""
            close = session._conversation.close
        assert close is not None
        assert (close.code, close.reason) == (Code.AGENT_LOST, "The machine was restarted.")
        assert echo.begun == 1
        assert node.store.sessions(None, (State.CONNECTING, State.ACTIVE, State.SUSPENDED), 0, 9) == []


async def test_a_node_that_starts_again_in_the_same_boot_goes_on_with_its_sessions(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = Echo()
    monkeypatch.setattr(app, "boot_id", lambda: "one")
    async with agent(directory, echo):
        async with running(directory) as node:
            await left_behind(node, directory, "work")
        async with running(directory) as node, await connect(node, directory, name="work", output=0) as session:
            await session.write(b" goes on")
            seen = b""
            while len(seen) < len(b"history goes on"):
                seen += await session.read()
            assert seen == b"history goes on"
    assert echo.begun == 1


# ---- retention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1, 3600, 0], ids=["a-second", "an-hour", "for-ever"])
async def test_an_ended_session_is_kept_as_long_as_retention_says(
    directory: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    monkeypatch.setattr(app, "_SWEEP_SECONDS", 0.1)
    monkeypatch.setattr(app, "_HOUSEKEEP_EVERY", 1)
    echo = Echo()
    async with agent(directory, echo), running(directory, retention_seconds=seconds) as node:
        number = await left_behind(node, directory, "work")
        echo.end.set()
        await until(lambda: _state(node, number) is State.EXITED)
        assert number in node.journal
        if seconds == 1:
            await until(lambda: node.store.session(number) is None)
            assert number not in node.journal
            assert node.table.loaded(number) is None
        else:
            after = node._sweeps + 20  # two seconds: the one above was gone by then
            await until(lambda: node._sweeps >= after)
            assert _state(node, number) is State.EXITED
            assert number in node.journal


def _state(node: Node, number: int) -> State | None:
    row = node.store.session(number)
    return State(row.state) if row is not None else None


async def test_a_session_that_goes_on_is_never_too_old(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_SWEEP_SECONDS", 0.1)
    monkeypatch.setattr(app, "_HOUSEKEEP_EVERY", 1)
    async with agent(directory, Echo()), running(directory, retention_seconds=1) as node:
        number = await left_behind(node, directory, "work")
        after = node._sweeps + 20
        await until(lambda: node._sweeps >= after)
        assert _state(node, number) is State.SUSPENDED
        assert number in node.journal


# ---- a full ring ---------------------------------------------------------------------------------------------------

PIECE = bytes(32_768)
MUCH = 4 * limits.RING_BYTES


class Flood:
    """An agent that writes without end, as long as it is let."""

    def __init__(self) -> None:
        self.written = 0

    async def __call__(self, session: AgentSession) -> None:
        while True:
            await session.write(PIECE)
            self.written += len(PIECE)
            await asyncio.sleep(0)


@pytest.mark.parametrize("on_full", ["pause", "overwrite"])
async def test_a_flood_that_nobody_reads_is_held_or_runs_on_as_configured(directory: Path, on_full: str) -> None:
    flood = Flood()
    async with agent(directory, flood), running(directory, on_full=on_full) as node:
        async with await connect(node, directory, name="flood", exact=False) as session:
            assert await session.read()
        row = node.store.session_by_name("local", "flood")
        assert row is not None
        await until(lambda: (live := node.table.load(row.number)) is not None and not live.attachments)
        before = flood.written
        if on_full == "overwrite":
            await until(lambda: flood.written > before + MUCH)
            return
        # Held: as soon as its window is full of what was not acknowledged, it writes nothing more.
        quiet, last = time.monotonic(), -1
        while time.monotonic() - quiet < 1.0:
            if flood.written != last:
                quiet, last = time.monotonic(), flood.written
            assert flood.written <= before + MUCH, "it was not held"
            await asyncio.sleep(0.02)
        live = node.table.load(row.number)
        assert live is not None
        assert live.log.tail <= live.read_to, "nothing was lost that nobody had read"
        async with await connect(node, directory, name="flood", exact=False) as session:
            # And whoever reads lets it go on.
            while flood.written <= last:
                assert await session.read()


# ---- the last minute -----------------------------------------------------------------------------------------------


async def test_a_node_that_drains_sends_everybody_away_and_has_them_back_after_its_restart(directory: Path) -> None:
    happened: list[sterna.Gap | sterna.Uncertain | sterna.Trouble | sterna.Notice] = []
    async with agent(directory, Echo()):
        async with running(directory) as node:
            port = node.address[1]
            site = Site(cast("Rig", SimpleNamespace(state=directory, port=port)))
            session = await connect(node, directory, name="work", on_event=happened.append)
            await session.write(b"before")
            assert await session.read() == b"before"
            told = await asyncio.to_thread(attached, site)
            await node.drain(SECONDS)
            assert not node.connections, "what was queued went out, and nobody is left"
            error = await asyncio.to_thread(told.error)
            assert (error.code, error.message) == (Code.DRAINING, DRAINING_TEXT)
            assert error.retry_after
            assert await asyncio.to_thread(told.ended)
            told.close()
            late = await asyncio.to_thread(refused, site)
            assert (late.code, late.name) == (Code.DRAINING, "draining")
            assert late.retry_after
            assert node.store.session_by_name("local", "late") is None
        async with running(directory, port=port) as node:
            async with asyncio.timeout(SECONDS):
                await session.write(b"after")
                assert await session.read() == b"after"
                await session.suspend()
    troubles = [event for event in happened if isinstance(event, sterna.Trouble)]
    assert next(trouble.reason for trouble in troubles if trouble.since is not None) == DRAINING_TEXT
    assert troubles[-1].since is None
    assert not any(isinstance(event, sterna.Gap | sterna.Uncertain) for event in happened)


def attached(site: Site) -> Raw:
    """A client of its own with a session of its own."""
    raw = site.client()
    raw.connect(name="told", want="named")
    return raw


def refused(site: Site) -> Error:
    """What a client that comes now is answered; one that only asks is served."""
    with site.client() as raw:
        assert isinstance(raw.ask(want="call"), Accept)
        answer = raw.ask(2, want="named", name="late")
        assert isinstance(answer, Error), answer
        return answer


# ---- what is missing ------------------------------------------------------------------------------------------------


async def test_a_usual_quic_port_in_use_is_said_to_who_looks_at_the_node(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with udp_socket("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(app, "QUIC_PORT", port)
        said = f"There is no QUIC: UDP port {port} on 127.0.0.1 is in use;"
        for quic_port, level, text in ((port, "WARN", said), (0, "OK", "turned off")):
            async with agent(directory, Echo()), running(directory, quic_port=quic_port) as node:
                assert node.no_quic.startswith(said) is (quic_port == port)
                found = await asyncio.to_thread(lambda: list(doctor.examine(str(directory))))
                (line,) = [each for each in found if each.name == "quic"]
                assert (line.level, line.text.startswith(text)) == (level, True)


# ---- who was sent away ---------------------------------------------------------------------------------------------


def revoked(site: Site, raw: Raw) -> Code:
    """The owner revokes the device."""
    with site.client() as owner:
        owner.connect(want="call")
        assert owner.call("revoke", device=raw.device.id.hex()) == {"device": raw.device.id.hex()}
        return raw.code(1)


def out_of_step(_site: Site, raw: Raw) -> Code:
    """Some of its input is missing."""
    raw.send(Type.DATA, 1, 1_000, b"later")
    return raw.code(1)


def closing(_site: Site, raw: Raw) -> Code:
    """It wants to close what it may only watch."""
    raw.say(Type.CLOSE, 1, Close())
    return raw.code(1)


@pytest.mark.parametrize(
    ("act", "mode", "code"),
    [(revoked, "drive", Code.REVOKED), (out_of_step, "drive", Code.GAP), (closing, "watch", Code.READ_ONLY)],
)
async def test_a_session_whose_only_attachment_was_refused_is_suspended_also_once_it_left_memory(
    directory: Path, act: Callable[[Site, Raw], Code], mode: str, code: Code
) -> None:
    async with agent(directory, Echo()), running(directory) as node:
        number = await left_behind(node, directory, "work")
        await until(lambda: stored(node, number) is State.SUSPENDED)
        site = Site(cast("Rig", SimpleNamespace(state=directory, port=node.address[1])))
        raw = await asyncio.to_thread(site.client)
        await asyncio.to_thread(raw.connect, want="join", name="work", mode=mode)
        assert stored(node, number) is State.ACTIVE
        assert await asyncio.to_thread(act, site, raw) is code
        await until(lambda: stored(node, number) is State.SUSPENDED, 3)
        now = time.monotonic_ns()
        node.table.cold(0, now)
        for session in node.table.cold(0, now):
            assert node.table.evict(session, 0, now, app.park)
        assert node.table.loaded(number) is None
        assert await asyncio.to_thread(listed, site) == [("work", "suspended", 0)]
        await asyncio.to_thread(raw.close)


def stored(node: Node, number: int) -> State:
    """A session's state in the database."""
    row = node.store.session(number)
    assert row is not None
    return State(row.state)


def listed(site: Site) -> list[tuple[str, str, int]]:
    """The node's list of sessions."""
    with site.client() as raw:
        raw.connect(want="call")
        return [(each["name"], each["state"], each["attached"]) for each in raw.call("list")["sessions"]]


# ---- connections -----------------------------------------------------------------------------------------------------


async def test_connections_are_counted_for_their_tenant_however_they_came_and_until_they_end(directory: Path) -> None:
    async with agent(directory, Echo()), running(directory) as node:
        site = Site(cast("Rig", SimpleNamespace(state=directory, port=node.address[1])))
        node.crowd._most = 2
        assert await asyncio.to_thread(came_and_went, site) == [Code.BUSY] * 2
        await until(lambda: not node.connections)
        assert not node.crowd._counts
        assert await asyncio.to_thread(came_and_went, site) == [Code.BUSY] * 2


def came_and_went(site: Site) -> list[Code]:
    """How CONNECT and RESUME are answered while somebody has the one place that a tenant may have of two."""
    with site.client() as gone:
        body = gone.connect_body(exact=True)
        gone.send(Type.CONNECT, 1, 0, gone.signed(body))
        accept = gone.answer(1)
        assert isinstance(accept, Accept), accept
        with site.client() as late:
            answers = [late.ask(want="call")]
    back = resumed(site, gone.device, accept, body.attachment)
    with back, site.client(device=gone.device) as again:
        answers.append(again.resume(1, accept, body.attachment))
    assert all(isinstance(answer, Error) for answer in answers), answers
    return [Code(answer.code) for answer in answers if isinstance(answer, Error)]


def resumed(site: Site, device: DeviceKey, accept: Accept, attachment: bytes) -> Raw:
    """Comes back once the node knows that the connection before has ended."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        raw = site.client(device=device)
        answer = raw.resume(1, accept, attachment)
        if not isinstance(answer, Error):
            return raw
        assert answer.code == Code.BUSY
        raw.close()
    raise AssertionError("its place was not given back")
