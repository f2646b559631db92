"""Lost answers, repeated questions and connections that race each other: one session, one winner, nothing doubled.

Each test is a function of a site, run against a node as it is and, as its control, against one without the check.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.frame import Type
from sterna.protocol.messages import Accept, Error, Resumed
from tests.e2e.raw_client import Raw, Site
from tests.e2e.rig import Daemon, Rig, wait_for

pytestmark = pytest.mark.xdist_group("races")

# Says after each line how many bytes came so far, so that a byte too many or too few shows in every later answer.
COUNT = """
import sys
n = 0
for line in sys.stdin.buffer:
    n += len(line)
    print(n, line.decode().strip(), flush=True)
"""
ROUNDS = 20


@contextlib.contextmanager
def at_site(broken: str = "") -> Iterator[Site]:
    """A node as it is, or without one of its checks, with the counting agent."""
    with Rig() as rig:
        rig.start_pod("count", sys.executable, "-c", COUNT, kind="stream")
        if broken:
            words = [sys.executable, os.fspath(Path(__file__).with_name("broken_node.py")), broken]
            words += [os.fspath(rig.state), os.fspath(rig.sockets), str(rig.port)]
            node = rig.node = Daemon(words, rig.env, rig.directory / "node.log")
            wait_for(lambda: node.first_line() or rig._check(node), name="the node")
        else:
            rig.start_node()
        yield Site(rig)


class Counted:
    """What a client knows about its attachment to the counting agent, and how it checks that nothing is doubled."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.attachment = os.urandom(16)
        self.raw = site.client()
        self.accept = self.raw.connect(agent="count", attachment=self.attachment)
        self.sent = self.got = 0
        self.word = 0

    def line(self) -> tuple[bytes, bytes]:
        """The next line, and the agent's right answer to it."""
        self.word += 1
        line = b"word %d\n" % self.word
        return line, b"%d %s" % (self.sent + len(line), line)

    def check(self, raw: Raw, handle: int) -> None:
        """One line on this connection is counted once."""
        line, wanted = self.line()
        raw.send(Type.DATA, handle, self.sent, line)
        got = raw.data(len(wanted), handle)
        assert got == wanted, f"{got!r} instead of {wanted!r}"
        self.sent += len(line)
        self.got += len(wanted)
        raw.send(Type.ACK, handle, self.got, self.got.to_bytes(8, "big"))


def sessions(site: Site) -> int:
    with site.client() as raw:
        raw.connect(want="call")
        return len([s for s in raw.call("list")["sessions"] if s["agent"] == "count"])


# ---- CONNECT ---------------------------------------------------------------------------------------------------


def lost_accept(site: Site) -> None:
    """The connection ends at a random moment after CONNECT was sent; the repeated one gives that same session."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for turn in range(ROUNDS):
        before = sessions(site)
        with site.client() as raw, site.client(device=raw.device) as again:
            body = raw.connect_body(agent="count", name=f"lost{turn}")
            payload = raw.signed(body)
            raw.send(Type.CONNECT, 1, 0, payload)
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.01)
            raw.sock.close()
            again.send(Type.CONNECT, 1, 0, payload)
            first = again.answer(1)
            assert isinstance(first, Accept), first
            assert sessions(site) == before + 1, "the repeated CONNECT made another session"
            again.send(Type.CONNECT, 2, 0, payload)
            second = again.answer(2)
            assert isinstance(second, Accept), second
            assert (second.uid, second.name) == (first.uid, first.name)
            assert not second.created
            again.send(Type.DATA, 2, 0, b"one\n")
            assert again.data(6, handle=2) == b"4 one\n"


def duplicated_connect(site: Site) -> None:
    """The same CONNECT on five connections at once: one session, and one of them keeps the attachment."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(site.client())
        raws = [first, *(stack.enter_context(site.client(device=first.device, local=bool(n % 2))) for n in range(4))]
        payload = first.signed(first.connect_body(agent="count"))
        before = sessions(site)
        with ThreadPoolExecutor(len(raws)) as pool:
            list(pool.map(lambda raw: raw.send(Type.CONNECT, 1, 0, payload), raws))
            answers = list(pool.map(lambda raw: raw.answer(1), raws))
        uids = {answer.uid for answer in answers if isinstance(answer, Accept)}
        assert len(uids) == 1, "the same CONNECT made several sessions"
        assert sum(isinstance(answer, Accept) and answer.created for answer in answers) == 1
        assert sessions(site) == before + 1
        # All but the last one to arrive were displaced; that one counts right.
        left = [raw for raw in raws if not displaced(raw, 1)]
        assert len(left) == 1
        left[0].send(Type.DATA, 1, 0, b"one\n")
        assert left[0].data(6) == b"4 one\n"


def displaced(raw: Raw, handle: int) -> bool:
    """Whether the node has said that an attachment went to another connection."""
    mark = os.urandom(8)
    raw.send(Type.PING, 0, 0, mark)
    while True:
        kind, on, _, payload = raw.until(Type.ERROR, Type.PONG)
        if kind == Type.PONG and payload == mark:
            return False
        if kind == Type.ERROR and on == handle:
            assert messages.unpack(Error, payload).code == Code.DISPLACED
            return True


# ---- RESUME ----------------------------------------------------------------------------------------------------


def raced_resumes(site: Site) -> None:
    """Two RESUMEs with one race id over TCP and the Unix socket at the same time, in both orders: one of them wins."""
    client = Counted(site)
    client.check(client.raw, 1)
    holder, on = client.raw, 1
    won = {"tcp": 0, "unix": 0}
    for turn in range(ROUNDS):
        tcp = site.client(device=client.raw.device)
        unix = site.client(device=client.raw.device, local=True)
        race, counter = os.urandom(16), time.time_ns()
        raws = [tcp, unix] if turn % 2 else [unix, tcp]
        payloads = [
            raw.signed(raw.resume_body(
                client.accept, client.attachment, race=race, counter=counter + n, output=client.got
            ))
            for n, raw in enumerate(raws)
        ]  # fmt: skip
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda pair: pair[0].send(Type.RESUME, 1, 0, pair[1]), zip(raws, payloads, strict=True)))
            answers = list(pool.map(lambda raw: raw.answer(1), raws))
        winners = [raw for raw, answer in zip(raws, answers, strict=True) if isinstance(answer, Resumed)]
        losers = [answer for answer in answers if isinstance(answer, Error)]
        assert len(winners) == 1, f"{len(winners)} winners of one race"
        assert [answer.code for answer in losers] == [Code.SUPERSEDED]
        resumed = next(answer for answer in answers if isinstance(answer, Resumed))
        # What the agent has acknowledged may lag behind what it was given.
        assert resumed.input is not None
        assert resumed.input <= client.sent
        assert resumed.output == client.got
        # The winner displaced who was there before; the loser displaced nobody, and nothing of it counts.
        assert displaced(holder, on)
        loser = raws[1 - raws.index(winners[0])]
        line, _ = client.line()
        loser.send(Type.DATA, 1, client.sent, line)
        assert loser.alive()
        client.word -= 1
        client.check(winners[0], 1)
        assert not displaced(winners[0], 1)
        won["unix" if winners[0] is unix else "tcp"] += 1
        loser.close()
        holder.close()
        holder, on = winners[0], 1
    print(won)
    holder.close()


def late_frames(site: Site) -> None:
    """What a displaced connection still sends (input, SIGNAL, EOF, CLOSE, SUSPEND) changes nothing."""
    client = Counted(site)
    client.check(client.raw, 1)
    for _ in range(5):
        old, raw = client.raw, site.client(device=client.raw.device)
        answer = raw.resume(1, client.accept, client.attachment, output=client.got)
        assert isinstance(answer, Resumed), answer
        line, wanted = client.line()
        # The same input on both, the late one with a little more behind it; and everything that could end things.
        raw.send(Type.DATA, 1, client.sent, line)
        old.send(Type.DATA, 1, client.sent, line + b"late\n")
        old.send(Type.DATA, 1, client.sent + len(line), b"later\n")
        old.send(Type.SIGNAL, 1, client.sent + len(line), messages.pack(messages.Signal("KILL")))
        old.send(Type.EOF, 1, client.sent + len(line))
        old.say(Type.SUSPEND, 1, messages.Suspend())
        old.say(Type.CLOSE, 1, messages.Close())
        assert displaced(old, 1)
        assert old.alive()
        got = raw.data(len(wanted))
        assert got == wanted, f"{got!r} instead of {wanted!r}"
        client.sent += len(line)
        client.got += len(wanted)
        client.check(raw, 1)
        client.raw = raw
        old.close()
    client.raw.close()


def input_sent_again(site: Site) -> None:
    """After each cut the client sends again from where it knows it was handled, overlapping what was taken already."""
    client = Counted(site)
    raw, handle = client.raw, 1
    for turn in range(ROUNDS):
        line, wanted = client.line()
        raw.send(Type.DATA, handle, client.sent, line)
        if turn % 2:
            # It is on its way or there already; nobody knows.
            raw.close()
            raw = site.client(device=raw.device, local=turn % 4 == 1)
            answer = raw.resume(1, client.accept, client.attachment, output=client.got)
            assert isinstance(answer, Resumed), answer
            handle = 1
        raw.send(Type.DATA, handle, client.sent, line)
        for at in range(1, len(line)):
            raw.send(Type.DATA, handle, client.sent + at, line[at:])
        got = raw.data(len(wanted), handle)
        assert got == wanted, f"{got!r} instead of {wanted!r}"
        client.sent += len(line)
        client.got += len(wanted)
        raw.send(Type.ACK, handle, client.got, client.got.to_bytes(8, "big"))
    raw.close()


RACES: dict[str, tuple[Callable[[Site], None], str, str]] = {
    "lost accept": (lost_accept, "requests", "Error|another session"),
    "duplicated connect": (duplicated_connect, "requests", "several sessions|created|== 1"),
    "raced resumes": (raced_resumes, "race", "2 winners"),
    "late frames": (late_frames, "late", "instead of|ended before|nothing came"),
    "input sent again": (input_sent_again, "twice", "instead of"),
}
"""Each race, the check whose absence it must notice, and how it then fails."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with at_site() as found:
        yield found


@pytest.mark.parametrize("name", RACES)
def test_one_session_one_winner_nothing_doubled(site: Site, name: str) -> None:
    RACES[name][0](site)


@pytest.mark.parametrize("name", RACES)
def test_control_without_the_check_it_is_noticed(name: str) -> None:
    race, broken, failure = RACES[name]
    with at_site(broken) as site, pytest.raises(AssertionError, match=failure):
        race(site)
