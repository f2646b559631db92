"""What a client notices of its surroundings leads to a new connection: sleep, addresses, bytes without an answer.

The watches themselves are tested on their own; here they say what the test wants, and node and connections are real:
the network forgets the connection that is there, without a word, and takes new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from types import ModuleType

import pytest

import sterna
from sterna.client import aio, blocking, driver
from sterna.client.blocking import BlockingSession
from sterna.client.conversation import Happening
from sterna.client.watchers import AckWatch, SleepWatch, TcpState
from tests.e2e.proxy import CutProxy
from tests.e2e.rig import Rig

pytestmark = pytest.mark.xdist_group("client_watching")
SECONDS = 15.0
REASONS = {
    "sleep": "the machine slept",
    "addresses": "the network changed",
    "acknowledgements": "the network does not acknowledge",
}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        rig.start_pod("cat", "cat", kind="stream")
        rig.start_node()
        yield rig


@pytest.fixture
def proxy(rig: Rig) -> Iterator[CutProxy]:
    proxy = rig.proxy()
    yield proxy
    proxy.close()


class Surroundings:
    """Lets the watches of a driver's module see trouble once it is told to, and only one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.waiting_ms = 0
        self._slept = False
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        around = self

        class Addresses:
            """Instead of the netlink socket: a pipe that becomes readable when something changed."""

            def fileno(self) -> int:
                return around._read

            def changed(self) -> bool:
                return bool(os.read(around._read, 16))

            def close(self) -> None:
                """The test closes the pipe."""

        def slept(watch: SleepWatch, monotonic_ns: int, boottime_ns: int, wall_ns: int | None = None) -> bool:
            found, around._slept = around._slept, False
            return found

        def waiting_ms(watch: AckWatch, state: TcpState | None, now_ns: int) -> int:
            assert state is not None, "the kernel was asked about the connection"
            return around.waiting_ms

        patch.setattr(module, "AddressWatch", Addresses)
        patch.setattr(SleepWatch, "slept", slept)
        patch.setattr(AckWatch, "waiting_ms", waiting_ms)

    def trouble(self, kind: str) -> None:
        if kind == "sleep":
            self._slept = True
        elif kind == "addresses":
            os.write(self._write, b"!")
        else:
            self.waiting_ms = 200

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def told(events: list[Happening]) -> list[str]:
    """The reasons of the troubles that began."""
    return [event.reason for event in events if isinstance(event, sterna.Trouble) and event.since is not None]


def over(events: list[Happening]) -> bool:
    """Whether the last trouble is over."""
    return bool(events) and isinstance(events[-1], sterna.Trouble) and events[-1].since is None


def turn(session: BlockingSession, seconds: float) -> None:
    """Lets the driver work for a while, with nothing to read."""
    with contextlib.suppress(TimeoutError):
        session.read(timeout=seconds)
        raise AssertionError("there was nothing to read")


@pytest.mark.parametrize("kind", REASONS)
def test_trouble_around_a_poll_driver_brings_a_second_connection(
    rig: Rig, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    around = Surroundings(monkeypatch, driver)
    events: list[Happening] = []
    with blocking.connect(
        "cat", new=True, state=str(rig.state), host="127.0.0.1", port=proxy.port, on_event=events.append
    ) as session:
        session.write(b"before")
        assert session.read(6, timeout=SECONDS) == b"before"
        around.waiting_ms = 199
        turn(session, 1.3)  # at least one look around
        first = session._machine.active
        assert told(events) == []
        session.write(b"awake")  # the machine itself notices silence a second after this, not before
        assert session.read(5, timeout=SECONDS) == b"awake"
        proxy.freeze(existing_only=True)
        around.trouble(kind)
        deadline = time.monotonic() + SECONDS
        while not over(events) or session._machine.active == first:
            assert time.monotonic() < deadline, f"no second connection took over; there was {told(events)}"
            turn(session, 0.05)
            if told(events):
                around.waiting_ms = 0
        assert told(events) == [REASONS[kind]]
        assert session._machine.active is not None
        session.write(b"after")
        assert session.read(5, timeout=SECONDS) == b"after"
    around.close()


@pytest.mark.parametrize("kind", REASONS)
async def test_trouble_around_an_asyncio_driver_brings_a_second_connection(
    rig: Rig, proxy: CutProxy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    around = Surroundings(monkeypatch, aio)
    events: list[Happening] = []
    async with asyncio.timeout(SECONDS):
        session = await sterna.connect(
            "cat", new=True, state=str(rig.state), host="127.0.0.1", port=proxy.port, on_event=events.append
        )
        async with session:
            await session.write(b"before")
            assert await session.read(6) == b"before"
            around.waiting_ms = 199
            await asyncio.sleep(1.3)  # at least one look around
            first = session._machine.active
            assert told(events) == []
            await session.write(b"awake")  # the machine itself notices silence a second after this, not before
            assert await session.read(5) == b"awake"
            proxy.freeze(existing_only=True)
            around.trouble(kind)
            while not over(events) or session._machine.active == first:
                await asyncio.sleep(0.01)
                if told(events):
                    around.waiting_ms = 0
            assert told(events) == [REASONS[kind]]
            assert session._machine.active is not None
            await session.write(b"after")
            assert await session.read(5) == b"after"
    around.close()
