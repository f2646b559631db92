"""What one connection may cost: so many sessions, and so many bytes that wait for it."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.frame import Type, encode
from sterna.protocol.link import Link
from sterna.protocol.messages import Accept, Error
from sterna.transport.pump import Conduit, Pump, Reactor
from tests.e2e.raw_client import MIB, Site
from tests.integration.test_node_crowds import running

if TYPE_CHECKING:
    from sterna.node.app import Node
    from tests.e2e.rig import Rig


def site_of(node: Node, directory: Path) -> Site:
    return Site(cast("Rig", SimpleNamespace(state=directory, port=node.address[1])))


def bound_holds(site: Site, most: int) -> None:
    """One connection with as many sessions as allowed, those counted that still wait for their agent."""
    with site.client() as raw:
        for handle in range(1, most):
            raw.connect(handle)
        raw.send(Type.CONNECT, most, 0, raw.signed(raw.connect_body()))
        for handle in range(most + 1, most + 4):
            raw.send(Type.CONNECT, handle, 0, raw.signed(raw.connect_body()))
        answers: dict[int, int] = {}
        while len(answers) < 4:
            kind, handle, _, payload = raw.until(Type.ACCEPT, Type.ERROR)
            answers[handle] = 0 if kind == Type.ACCEPT else messages.unpack(Error, payload).code
        assert answers == {most: 0, **dict.fromkeys(range(most + 1, most + 4), Code.LIMIT)}
        assert raw.echo(b"well", 0, handle=2) == b"well"


def ended_ones_make_room(site: Site, most: int) -> None:
    """More sessions than allowed at once, one after another, each ended by another connection of the owner's."""
    with site.client() as raw, site.client() as other:
        other.connect()
        for handle in range(1, most + 3):
            other.call("close", session=raw.connect(handle).uid.hex())
            raw.until(Type.CLOSE, handle=handle)


async def test_ended_sessions_do_not_use_up_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDLES_PER_CONNECTION_MAX", 5)
    async with running(tmp_path) as node:
        await asyncio.to_thread(ended_ones_make_room, site_of(node, tmp_path), 5)


async def test_one_connection_carries_so_many_sessions_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDLES_PER_CONNECTION_MAX", 5)
    async with running(tmp_path) as node:
        await asyncio.to_thread(bound_holds, site_of(node, tmp_path), 5)


def ask_for_history(site: Site, accept: Accept, times: int) -> bool:
    """Asks `times` times for a quarter of a MiB at once; returns whether the connection lives on."""
    with site.client() as raw:
        asks = [raw.signed(raw.connect_body(want="join", uid=accept.uid, output=0)) for _ in range(times)]
        raw.raw(b"".join(encode(Type.CONNECT, 1 + number, 0, ask) for number, ask in enumerate(asks)))
        return raw.alive()


def with_history(site: Site) -> Accept:
    """A session with a quarter of a MiB of output."""
    with site.client() as raw:
        accept = raw.connect()
        for at in range(0, 256 * 1024, 32 * 1024):
            raw.echo(os.urandom(32 * 1024), at)
        return accept


async def test_who_asks_for_more_at_once_than_may_wait_for_it_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as node:
        site = site_of(node, tmp_path)
        accept = await asyncio.to_thread(with_history, site)
        monkeypatch.setattr(limits, "OUTBOUND_MAX_BYTES", MIB // 2)
        for times, lives in ((1, True), (24, False)):
            assert await asyncio.to_thread(ask_for_history, site, accept, times) is lives


class Watch:
    """The owner of a pump that notes how it ended."""

    def __init__(self) -> None:
        self.reason = ""

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Drops it."""

    def drained(self, pump: Conduit) -> None:
        """Has nothing more."""

    def ended(self, pump: Conduit, reason: str) -> None:
        self.reason = reason


async def test_a_pump_keeps_so_many_bytes_for_who_takes_none_and_then_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OUTBOUND_MAX_BYTES", 2 * MIB)
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    with theirs:
        link, owner = Link(), Watch()
        pump = Pump(Reactor(asyncio.get_running_loop()), mine, link, owner)
        pump.start()
        queued = 0
        while not owner.reason and queued < 8 * MIB:
            link.send(Type.SNAPSHOT, 1, 0, bytes(60_000))
            queued += 60_000
            await asyncio.sleep(0)
        assert owner.reason == "it takes nothing and too much waits for it"
        assert 2 * MIB < queued < 4 * MIB  # what the socket holds comes on top
        assert pump.closed
