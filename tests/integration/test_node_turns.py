"""No number of small frames takes more than its share of one turn of the loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.codec import Decoder
from sterna.protocol.frame import Type, encode
from sterna.protocol.link import Link
from sterna.protocol.messages import Error
from tests.e2e.raw_client import Site
from tests.integration.test_node_crowds import running

if TYPE_CHECKING:
    from sterna.node.app import Node
    from sterna.node.clients import ClientConnection
    from sterna.transport.pump import Conduit, Owner
    from tests.e2e.rig import Rig


class Carrier:
    """A conduit that keeps what is said, and whether it was told to stop reading."""

    def __init__(self, link: Link, owner: Owner) -> None:
        self.link, self.owner, self.peer, self.data = link, owner, "198.51.100.7", None
        self.handshaking = self.closed = self.held = False
        self.queued = 0
        self.answers = 0

    def start(self) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Counts the answers."""
        self.answers += len(Decoder().feed(b"".join(self.link.data_to_send())))

    def hold(self, on: bool) -> None:
        """Notes it."""
        self.held = on

    def abort(self, reason: str) -> None:
        """Ends it."""
        if not self.closed:
            self.closed = self.link.closing = True
            self.owner.ended(cast("Conduit", self), reason)


def adopted(node: Node, count: int, *, proved: bool) -> list[Carrier]:
    """That many connections of one guest, or of strangers."""
    carriers: list[Carrier] = []

    def carry(link: Link, owner: Owner) -> Conduit:
        carriers.append(Carrier(link, owner))
        return cast("Conduit", carriers[-1])

    for _ in range(count):
        assert node.adopt(carry)
        cast("ClientConnection", carriers[-1].owner).proved = proved
    return carriers


async def test_small_frames_are_dealt_with_by_the_turn_in_their_order(tmp_path: Path) -> None:
    most, rounds = limits.FRAMES_PER_TURN_MAX, 10
    flood = b"".join(encode(Type.PING, 0, 0, b"%08d" % number) for number in range(most * rounds))
    async with running(tmp_path) as node:
        first, second = adopted(node, 2, proved=True)
        for each in (first, second):
            node.reactor.run(each.owner.received, each, memoryview(flood))
            each.flush()
            assert (each.answers, each.held) == (most, True)
        turns = 0
        while first.held or second.held:
            before = first.answers + second.answers
            await asyncio.sleep(0)
            first.flush()
            second.flush()
            turns += 1
            assert first.answers + second.answers - before <= most, "both went on in one turn"
            assert abs(first.answers - second.answers) <= most, "they do not take turns"
        assert first.answers == second.answers == most * rounds
        assert turns >= 2 * (rounds - 1)


async def test_what_comes_while_frames_wait_stands_behind_them(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        (carrier,) = adopted(node, 1, proved=True)
        said = [b"%08d" % number for number in range(3 * limits.FRAMES_PER_TURN_MAX)]
        flood = b"".join(encode(Type.PING, 0, 0, word) for word in said)
        heard: list[bytes] = []
        carrier.flush = lambda: heard.extend(  # type: ignore[method-assign]  # it keeps them instead
            frame[3] for frame in Decoder().feed(b"".join(carrier.link.data_to_send()))
        )
        for at in range(0, len(flood), 1_001):  # frames in two pieces, too
            node.reactor.run(carrier.owner.received, carrier, memoryview(flood[at : at + 1_001]))
        while len(heard) < len(said):
            await asyncio.sleep(0)
            carrier.flush()
        assert heard == said
        assert not carrier.held


async def test_who_sends_on_although_nothing_is_read_is_cut_off(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        (carrier,) = adopted(node, 1, proved=True)
        piece = memoryview(encode(Type.PING, 0, 0, bytes(8)) * 10_000)
        for _ in range(limits.HELD_MAX_BYTES // len(piece) + 2):
            node.reactor.run(carrier.owner.received, carrier, piece)
        assert carrier.closed


def refused(site: Site) -> Code:
    """What a stranger hears who only says that it is there."""
    with site.client() as raw:
        raw.raw(encode(Type.PING, 0, 0, bytes(8)) * (limits.FRAMES_BEFORE_PROOF_MAX + 1))
        kind, _, _, payload = raw.until(Type.ERROR)
        assert raw.ended()
        assert kind == Type.ERROR
        return Code(messages.unpack(Error, payload).code)


async def test_a_stranger_has_few_frames(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        site = Site(cast("Rig", SimpleNamespace(state=tmp_path, port=node.address[1])))
        assert await asyncio.to_thread(refused, site) == Code.RATE_LIMITED
