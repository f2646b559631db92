"""The library against a real node and real programs, on asyncio and uvloop, over TLS through a network that fails."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import sterna
from sterna.client import aio, blocking
from sterna.client.calls import Caller
from sterna.client.endpoint import find
from sterna.errors import Code, RefusedError, TrustError, UsageError
from sterna.limits import WINDOW_BYTES
from tests.e2e.proxy import CutProxy
from tests.e2e.rig import Rig

pytestmark = pytest.mark.xdist_group("client_aio")
SECONDS = 20


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        rig.start_pod("main")
        rig.start_pod("cat", "cat", kind="stream")
        rig.start_node()
        yield rig


@pytest.fixture
def proxy(rig: Rig) -> Iterator[CutProxy]:
    proxy = rig.proxy()
    yield proxy
    proxy.close()


@asynccontextmanager
async def joined(rig: Rig, *args: Any, via: CutProxy | None = None, **more: Any) -> AsyncIterator[sterna.Session]:
    """A session within a time limit: over the Unix socket, or over TLS through a proxy."""
    if via is not None:
        more |= {"host": "127.0.0.1", "port": via.port}
    async with asyncio.timeout(SECONDS):
        session = await sterna.connect(*args, state=str(rig.state), **more)
        try:
            yield session
        finally:
            session.abort()


async def read_until(session: sterna.Session, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        data = await session.read()
        assert data, f"it ended after {seen!r}"
        seen += data
    return seen


def about(rig: Rig, name: str) -> Any:
    with Caller(find(state=str(rig.state)), state=str(rig.state)) as caller:
        return caller.call("info", session=name)


async def eventually(what: Callable[[], bool]) -> None:
    while not await asyncio.to_thread(what):
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("tls", [False, True], ids=["unix", "tls"])
async def test_a_shell_answers_and_its_status_comes_last(rig: Rig, proxy: CutProxy, tls: bool) -> None:
    async with joined(rig, new=True, via=proxy if tls else None) as session:
        assert (session.agent, session.kind, session.mode, session.created) == ("main", "pty", "drive", True)
        await session.write(b"echo $((6 * 7))-; exit 5\r")
        output = b"".join([chunk async for chunk in session])
        assert b"42-" in output
        assert session.exit_status == await session.wait_closed() == 5
        assert session.position == len(output)
        with pytest.raises(RefusedError) as refused:
            await session.write(b"too late")
        assert refused.value.code == Code.ENDED


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_byte_comes_once_and_in_order_through_a_failing_network(
    rig: Rig, proxy: CutProxy, seed: int
) -> None:
    print(f"seed {seed}")
    data = random.Random(seed).randbytes(2_000_000)
    happened: list[sterna.Gap | sterna.Uncertain | sterna.Trouble | sterna.Notice] = []
    async with joined(rig, "cat", new=True, via=proxy, on_event=happened.append) as session:
        back = hashlib.sha256()
        size = 0

        async def read() -> None:
            nonlocal size
            async for chunk in session:
                back.update(chunk)
                size += len(chunk)

        reader = asyncio.create_task(read())
        # Short actions only: what a frozen network costs is the business of the end-to-end tests.
        proxy.chaos(seed, every=(0.02, 0.15), actions=("reset", "close", "stall"))
        for start in range(0, len(data), 40_000):
            await session.write(data[start : start + 40_000])
            await asyncio.sleep(0.01)
        await session.eof()
        await reader
        proxy.calm()
    assert (size, back.digest()) == (len(data), hashlib.sha256(data).digest())
    assert proxy.cuts > 0
    troubles = [event for event in happened if isinstance(event, sterna.Trouble)]
    assert len(troubles) >= 2
    assert troubles[0].since is not None
    assert not any(isinstance(event, sterna.Gap | sterna.Uncertain) for event in happened)


async def test_a_killed_node_costs_nothing(rig: Rig, proxy: CutProxy) -> None:
    async with joined(rig, "cat", new=True, via=proxy) as session:
        await session.write(b"before ")
        assert await read_until(session, b"before ") == b"before "
        await asyncio.to_thread(rig.restart_node, kill=True)
        await session.write(b"after")
        assert await read_until(session, b"after") == b"after"
        events = session.events()
        trouble = await anext(events)
        assert isinstance(trouble, sterna.Trouble)
        assert trouble.since is not None


async def test_output_is_handled_when_more_is_asked_for(rig: Rig) -> None:
    script = ["sh", "-c", "printf one; read x; printf two; read x"]
    async with joined(rig, "cat", argv=script) as session:
        name = session.name
        assert await read_until(session, b"one") == b"one"
        machine = session._machine
        assert machine.intake.handled == 0
        asking = asyncio.create_task(session.read())
        await eventually(lambda: machine.intake.handled == 3)
        await session.write(b"\n")
        assert await asking == b"two"
        # Leaving without asking for more, by an error: "two" was not dealt with.
        with pytest.raises(KeyError):
            async with session:
                raise KeyError
        assert machine.intake.handled == 3
    async with joined(rig, name) as again:
        assert await read_until(again, b"two") == b"onetwo"
        await again.close()


async def test_a_reader_that_does_not_ask_holds_the_program_back(rig: Rig) -> None:
    size = 3_000_000
    async with joined(rig, "cat", argv=["sh", "-c", f"head -c {size} /dev/zero"]) as session:
        first = await session.read(1)
        assert first == b"\0"
        name = session.name
        await eventually(lambda: about(rig, name)["output"] >= WINDOW_BYTES)
        assert session._machine.intake.next <= WINDOW_BYTES
        told = await asyncio.to_thread(about, rig, name)
        assert told["output"] < size, "the program is held back, a few windows ahead of us"
        total = 1
        async for chunk in session:
            total += len(chunk)
        assert total == size
        assert session.exit_status == 0


async def test_write_waits_for_room(rig: Rig) -> None:
    async with joined(rig, "cat", argv=["sleep", "60"]) as session:
        writing = asyncio.create_task(session.write(b"y" * (4 * WINDOW_BYTES)))
        done, _ = await asyncio.wait([writing], timeout=0.3)
        assert not done, "the program reads nothing, so there is no room"
        assert session._machine.input.end - session._machine.input.base <= WINDOW_BYTES
        writing.cancel()
        await session.close()
        assert await session.read() == b""


async def test_an_end_of_input_that_had_to_wait_harms_no_later_session(rig: Rig) -> None:
    size = 200_000  # more than a pipe holds, so that the agent has to wait for the program
    for _ in range(3):
        async with joined(rig, "cat", argv=["sh", "-c", "sleep 0.2; wc -c"]) as session:
            await session.write(b"x" * size)
            await session.eof()
            assert await read_until(session, b"\n") == b"%d\n" % size
            assert await session.read() == b""


async def test_what_several_tasks_write_does_not_mix(rig: Rig) -> None:
    async with joined(rig, "cat", new=True) as session:
        lines = [bytes([65 + n]) * 100_000 + b"\n" for n in range(8)]
        writers = asyncio.gather(*(session.write(line) for line in lines))
        got = b""
        while len(got) < sum(map(len, lines)):
            got += await session.read()
        await writers
        await session.drain()
        assert session._machine.input.base == session._machine.input.end
        assert sorted(got.splitlines(keepends=True)) == lines
        await session.close()


async def test_signal_comes_in_order_with_the_input(rig: Rig) -> None:
    script = ["bash", "-c", "trap 'echo got-int' INT; echo ready; while :; do read x; echo \"line $x\"; done"]
    async with joined(rig, argv=script) as session:
        await read_until(session, b"ready")
        await session.write(b"a\r")
        await session.signal("sigint")
        await session.write(b"b\r")
        output = await read_until(session, b"line b")
        assert b"line a" in output
        assert b"got-int" in output
        await session.close()


async def test_resize_reaches_the_program(rig: Rig) -> None:
    async with joined(rig, new=True, size=(101, 33), term="xterm") as session:
        await session.write(b"stty size\r")
        await read_until(session, b"33 101")
        session.resize(90, 20)
        await session.write(b"stty size\r")
        await read_until(session, b"20 90")
        await session.close()


async def test_leaving_keeps_the_session_and_closing_ends_it(rig: Rig) -> None:
    async with joined(rig, "cat", name="stays") as session:
        assert session.created
        await session.write(b"note")
        await read_until(session, b"note")
        async with session:
            pass
    async with joined(rig, "stays") as session:
        assert not session.created
        assert await read_until(session, b"note") == b"note", "exact: from the oldest byte kept"
        await session.close()
    with pytest.raises(RefusedError) as refused:
        await sterna.connect("stays", state=str(rig.state))
    assert (refused.value.code, "no agent or session 'stays'" in str(refused.value)) == (Code.NOT_FOUND, True)


async def test_watching_sees_the_screen_and_may_not_type(rig: Rig) -> None:
    async with joined(rig, name="seen") as driver, joined(rig, "seen", mode="watch", exact=False) as watcher:
        await driver.write(b"echo $((40 + 2))-\r")
        await read_until(watcher, b"42-")
        with pytest.raises(UsageError, match="only watches"):
            await watcher.write(b"x")
        notices: list[str] = []
        async with joined(rig, "seen", mode="watch"):
            async for event in driver.events():
                if isinstance(event, sterna.Notice):
                    notices.append(event.event.kind)
                    break
        assert notices == ["joined"]
        await driver.close()
        with pytest.raises(RefusedError):
            await driver.write(b"x")


async def test_many_sessions_at_once_share_one_loop(rig: Rig, proxy: CutProxy) -> None:
    async def one(number: int) -> bytes:
        async with joined(rig, "cat", new=True, via=proxy) as session:
            await session.write(b"number %d." % number)
            got = await read_until(session, b".")
            await session.close()
            return got

    assert await asyncio.gather(*map(one, range(20))) == [b"number %d." % n for n in range(20)]
    assert aio._Surroundings._of == {}, "nothing stays on the loop"


async def test_the_wrong_node_is_refused(rig: Rig, proxy: CutProxy) -> None:
    with Rig() as other:
        await asyncio.to_thread(other.start_node)
        proxy.target = other.port
        with pytest.raises((TrustError, RefusedError), match="is not the one known there"):
            await sterna.connect(state=str(rig.state), host="127.0.0.1", port=proxy.port)


async def test_nobody_there_is_said_soon(rig: Rig, proxy: CutProxy) -> None:
    proxy.refuse()
    start = time.monotonic()
    with pytest.raises(sterna.SternaError, match="cannot be reached: Connection refused"):
        await sterna.connect(state=str(rig.state), host="127.0.0.1", port=proxy.port)
    assert time.monotonic() - start < 5
    proxy.accept()
    proxy.freeze()
    with pytest.raises(sterna.ConnectionLostError, match=r"No session within 0\.5 seconds"):
        await sterna.connect(state=str(rig.state), host="127.0.0.1", port=proxy.port, timeout=0.5)


def test_blocking_every_byte_through_a_failing_network(rig: Rig, proxy: CutProxy) -> None:
    seed = 7
    print(f"seed {seed}")
    rng = random.Random(seed)
    data = rng.randbytes(1_000_000)
    with blocking.connect(
        "cat", new=True, state=str(rig.state), host="127.0.0.1", port=proxy.port, timeout=SECONDS
    ) as session:
        got = b""
        for start in range(0, len(data), 20_000):
            session.write(data[start : start + 20_000], timeout=SECONDS)
            if rng.random() < 0.3:
                proxy.cut(reset=rng.random() < 0.5)
            while len(got) < start:
                got += session.read(timeout=SECONDS)
        session.eof(timeout=SECONDS)
        while chunk := session.read(timeout=SECONDS):
            got += chunk
        assert session.ended
        assert session.exit_status == 0
    assert got == data
    assert proxy.cuts > 0


def test_blocking_read_gives_up_in_time_and_goes_on(rig: Rig) -> None:
    with blocking.connect("cat", new=True, state=str(rig.state)) as session:
        with pytest.raises(TimeoutError):
            session.read(timeout=0.1)
        session.write(b"abc")
        session.drain(timeout=SECONDS)
        assert session.read(2, timeout=SECONDS) == b"ab"
        assert session.position == 2
        assert session.read(timeout=SECONDS) == b"c"
        with pytest.raises(UsageError):
            session.read(0)
        assert session.close(timeout=SECONDS) is None


def test_calls_over_tls_and_their_refusals(rig: Rig, proxy: CutProxy) -> None:
    endpoint = find(state=str(rig.state), host="127.0.0.1", port=proxy.port)
    with Caller(endpoint, state=str(rig.state)) as caller:
        assert {agent["name"] for agent in caller.listing()[1]} == {"main", "cat"}
        for method, params, code in (
            ("info", {"session": "nobody"}, Code.NOT_FOUND),
            ("fly", {}, Code.UNSUPPORTED),
            ("share", {"session": 3}, Code.BAD_PAYLOAD),
        ):
            with pytest.raises(RefusedError) as refused:
                caller.call(method, **params)
            assert refused.value.code == code
        proxy.cut()
        with pytest.raises(sterna.ConnectionLostError):
            caller.call("node")
    proxy.freeze()
    with pytest.raises(sterna.ConnectionLostError, match=r"did not answer within 0\.3 seconds"):
        Caller(endpoint, state=str(rig.state), timeout=0.3)


def test_a_list_of_several_pages_is_whole(rig: Rig) -> None:
    with Caller(find(state=str(rig.state)), state=str(rig.state)) as caller:
        made = []
        for _ in range(120):
            with blocking.connect("cat", new=True, state=str(rig.state)) as session:
                made.append(session.name)
        sessions, _agents = caller.listing()
        names = [session["name"] for session in sessions]
        assert len(names) == len(set(names))
        assert set(made) <= set(names)
        for name in made:
            caller.call("close", session=name)


def test_the_token_of_another_state_is_no_secret_to_find(rig: Rig) -> None:
    with pytest.raises(RefusedError) as refused:
        blocking.connect(state=str(rig.state), token="st1.made-up-by-" + os.urandom(4).hex())
    assert refused.value.code == Code.DENIED
