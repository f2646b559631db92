"""QUIC against a real node and real programs: echo, migration, every byte through a hundred cuts, hostile datagrams."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection

import sterna
from sterna.cli.loop import run
from sterna.client import driver
from sterna.client.blocking import BlockingSession
from sterna.client.blocking import connect as connect_blocking
from sterna.client.conversation import Happening
from sterna.client.driver import STANDBY
from sterna.client.endpoint import WAYS_FILE
from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.protocol.client import Trouble
from sterna.transport.quic import BEGIN_PER_TURN_MAX, RETRY_ABOVE, QuicListener, server_configuration
from sterna.transport.quic_client import QuicChannel
from sterna.transport.udp import udp_socket
from tests.e2e.rig import Daemon, Rig, wait_for

HERE = Path(__file__)
LINES = """
import os, time
due, number = time.monotonic(), 0
while True:
    os.write(1, b"%d\\n" % number)
    number, due = number + 1, due + 0.01
    time.sleep(max(0, due - time.monotonic()))
"""


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class QuicRig(Rig):
    """A rig whose node listens for QUIC, too."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.host = host
        self.quic_port = free_udp_port()
        self.env["PYTHONPATH"] += f":{HERE.parents[2]}"

    def __enter__(self) -> Self:
        return self

    def start_quic_node(self, *prefix: str) -> Daemon:
        """Starts a node (in a network namespace, with a `prefix` that goes there); returns once it listens."""
        words = [*prefix, sys.executable, "-m", "tests.integration.test_quic", os.fspath(self.state), self.host]
        words += [str(self.port), str(self.quic_port)]
        node = self.node = Daemon(words, self.env, self.directory / "node.log")
        wait_for(lambda: node.first_line() or self._check(node), name="the node")
        return node


async def serve(state: str, host: str, port: int, quic_port: int) -> None:
    """Runs a node with QUIC until it is killed; SIGUSR1 ends all its QUIC connections."""
    known: dict[str, Any] = {"quic_port": quic_port} if "quic_port" in NodeConfig.__struct_fields__ else {}
    node = Node(NodeConfig(host=host, port=port, state=f"{state}/node", sockets=f"{state}/sockets", **known))
    node.start()
    quic: QuicListener | None = getattr(node, "_quic", None)
    if quic is None:
        pem = await asyncio.to_thread(Path(f"{state}/node/node-leaf.pem").read_bytes)
        quic = QuicListener(node.reactor, udp_socket(host, quic_port), node.adopt, server_configuration(pem))
    listener = quic

    def cut() -> None:
        for peer in list(listener._peers):
            peer.close(0, "cut")

    def tell() -> None:
        text = f"connections {listener.connections} shaking {listener.shaking} "
        text += f"retries {listener.retries} moves {listener.moves} unproved {len(listener._unproved)}"
        print(text, file=sys.stderr, flush=True)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, cut)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, tell)
    print("listening", flush=True)
    await asyncio.Event().wait()


class Relay:
    """A NAT for UDP in front of a port: what it sends comes from a port of its own, another one after `rebind`."""

    def __init__(self, target: int) -> None:
        self._target = ("127.0.0.1", target)
        self.front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.front.bind(("127.0.0.1", 0))
        self.port: int = self.front.getsockname()[1]
        self._back: dict[tuple[str, int], socket.socket] = {}
        self._lock = threading.Lock()
        self.blocked = False
        self.passed = self.passed_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def rebind(self) -> None:
        """Gives every client another port."""
        with self._lock:
            old, self._back = self._back, {}
        for sock in old.values():
            sock.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                back = dict(self._back)
            try:
                ready = select.select([self.front, *back.values()], [], [], 0.05)[0]
            except (OSError, ValueError):
                continue  # rebound meanwhile
            for sock in ready:
                with contextlib.suppress(OSError):
                    self._pass(sock, back)

    def _pass(self, sock: socket.socket, back: dict[tuple[str, int], socket.socket]) -> None:
        data, address = sock.recvfrom(65536)
        if self.blocked:
            return
        self.passed += 1
        self.passed_bytes += len(data) + 28  # with the headers of IP and UDP
        if sock is not self.front:
            self.front.sendto(data, next(client for client, each in back.items() if each is sock))
            return
        with self._lock:
            if address not in self._back:
                self._back[address] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                self._back[address].connect(self._target)
            self._back[address].send(data)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.rebind()
        self.front.close()


@pytest.fixture(scope="module")
def rig() -> Iterator[QuicRig]:
    with QuicRig() as rig:
        rig.start_pod("cat", "cat", kind="stream")
        rig.start_pod("lines", sys.executable, "-c", LINES, kind="stream")
        rig.start_quic_node()
        yield rig


@pytest.fixture
def relay(rig: QuicRig) -> Iterator[Relay]:
    relay = Relay(rig.quic_port)
    yield relay
    relay.close()


class Over:
    """A session over QUIC for tests: on a `poll` driver or on asyncio, with what happened to it."""

    def __init__(self, rig: QuicRig, port: int, monkeypatch: pytest.MonkeyPatch, agent: str = "cat") -> None:
        monkeypatch.setenv("STERNA_QUIC_PORT", str(port))
        monkeypatch.setattr(driver, "_SETTLED", 0)
        (rig.state / "client" / WAYS_FILE).unlink(missing_ok=True)
        self.happened: list[Happening] = []
        self.session: BlockingSession = connect_blocking(
            agent, new=True, state=os.fspath(rig.state), host="127.0.0.1", port=rig.port, timeout=10.0,
            on_event=self.happened.append,
        )  # fmt: skip
        self.driver = self.session._driver
        self.ways = self.driver.endpoint.ways

    def quic(self) -> QuicChannel | None:
        """The active connection, if it goes over QUIC."""
        active = self.driver.machine.active
        return self.driver._quics.get(active) if active is not None else None

    def turn_until(self, done: Callable[[], bool], seconds: float = 10.0) -> float:
        """Lets the driver work until `done()`; returns the seconds it took."""
        start = time.monotonic()
        while not done():
            assert time.monotonic() - start < seconds, "waited in vain"
            self.driver.turn(time.monotonic_ns() + 2_000_000)
        return time.monotonic() - start

    def turn(self, seconds: float) -> None:
        """Lets the driver work for a while."""
        turn(self.driver, seconds)

    def move(self) -> None:
        """Waits until the session has gone over to QUIC."""
        self.turn_until(lambda: self.quic() is not None)

    def echo(self, text: bytes = b"key") -> float:
        """Types, and waits for the echo; returns the seconds."""
        start = time.monotonic()
        self.session.write(text, timeout=10.0)
        got = b""
        while len(got) < len(text):
            got += self.session.read(timeout=10.0)
        assert got == text
        return time.monotonic() - start


@pytest.fixture
def over(rig: QuicRig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Over]:
    over = Over(rig, rig.quic_port, monkeypatch)
    yield over
    over.session.abort()


def test_a_session_goes_over_to_quic_without_a_word(rig: QuicRig, over: Over) -> None:
    assert over.quic() is None, "nothing is known yet: the first connection goes over TCP"
    over.echo()
    over.move()
    times = sorted(over.echo() for _ in range(200))
    print(f"echo p50 {times[100] * 1000:.2f} ms, p99 {times[197] * 1000:.2f} ms")
    assert over.quic() is not None
    assert [event for event in over.happened if isinstance(event, Trouble) and event.since is not None] == []
    assert Path(over.ways._path).read_text().endswith(f" quic {rig.quic_port}\n")


def test_a_nat_that_gives_another_port_is_not_noticed(
    rig: QuicRig, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = Over(rig, relay.port, monkeypatch)
    try:
        over.move()
        number = over.driver.machine.active
        times = []
        for _ in range(5):
            over.echo()
            relay.rebind()
            times.append(over.echo(b"after the change"))
        print("echo after a change of port: " + ", ".join(f"{each * 1000:.1f} ms" for each in times))
        assert max(times) < 0.05
        assert over.driver.machine.active == number, "it went on without a resume"
        assert not [event for event in over.happened if isinstance(event, Trouble) and event.since is not None]
    finally:
        over.session.abort()


def test_a_key_and_its_echo_take_three_datagrams(rig: QuicRig, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    over = Over(rig, relay.port, monkeypatch)
    try:
        over.move()
        for _ in range(5):
            over.echo(b"k")
        before = relay.passed, relay.passed_bytes
        for _ in range(40):
            over.echo(b"k")
            over.turn(0.03)
        keys, octets = (relay.passed - before[0]) / 40, (relay.passed_bytes - before[1]) / 40
        print(f"{keys:.2f} datagrams, {octets:.0f} bytes a key")
        assert keys <= 3.2
        assert octets <= 260
    finally:
        over.session.abort()


def test_an_idle_session_costs_no_more_than_its_heartbeat(
    rig: QuicRig, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After typing the path is asked once a second, as over TCP: PING, PONG, and what acknowledges that."""
    over = Over(rig, relay.port, monkeypatch)
    try:
        over.move()
        over.echo()
        over.turn(0.5)
        before = relay.passed
        asked: list[object] = []
        monkeypatch.setattr(over.driver.machine, "_ping", counted(over.driver.machine._ping, asked))
        over.turn(3.0)
        print(f"{relay.passed - before} datagrams in 3 s, {len(asked)} PINGs")
        assert asked
        assert relay.passed - before <= 4 * len(asked)
    finally:
        over.session.abort()


def counted(function: Callable[..., None], calls: list[object]) -> Callable[..., None]:
    def call(*args: object) -> None:
        calls.append(args)
        function(*args)

    return call


def test_the_port_is_the_nodes_word_and_used_only_when_there_is_a_reason(
    rig: QuicRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STERNA_QUIC_PORT", raising=False)
    monkeypatch.setattr(driver, "_SETTLED", 0)
    (rig.state / "client" / WAYS_FILE).unlink(missing_ok=True)
    place: dict[str, Any] = {"state": os.fspath(rig.state), "host": "127.0.0.1", "port": rig.port, "timeout": 10.0}
    for named, port in ((None, rig.quic_port), (0, 0)):
        session = connect_blocking("cat", new=True, quic_port=named, **place)
        try:
            inner = session._driver
            ways = inner.endpoint.ways
            assert [address[1] for _, address in ways.targets] == ([port] if port else [])
            turn(inner, 0.2)
            assert not inner._quics, "on the network where it began it stays with TCP"
            ways.moves = True
            assert ways.wanted == bool(port)
            start = time.monotonic()
            while port and inner.machine.active not in inner._quics:
                assert time.monotonic() - start < 5.0
                turn(inner, 0.02)
        finally:
            session.abort()


def turn(inner: driver.PollDriver, seconds: float) -> None:
    """Lets a driver work for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        inner.turn(int(end * 1e9))


def test_where_udp_is_blocked_from_the_start_nothing_is_noticed(
    rig: QuicRig, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay.blocked = True
    over = Over(rig, relay.port, monkeypatch)
    try:
        over.turn_until(lambda: STANDBY in over.driver._quics)
        slowest = max(over.echo() for _ in range(20))
        over.turn_until(lambda: STANDBY not in over.driver._quics)
        assert over.ways.works is False
        assert slowest < 0.5
        assert over.happened == []
        start = time.monotonic()
        over.driver.machine.suspect(time.monotonic_ns(), "a test")
        over.driver.settle()
        assert over.driver._mover.troubled
        over.turn_until(lambda: not over.driver._mover.troubled)
        print(f"a race with UDP blocked took {(time.monotonic() - start) * 1000:.0f} ms")
        assert time.monotonic() - start < 0.5
    finally:
        over.session.abort()


def test_udp_that_is_blocked_in_a_session_hands_over_to_tcp(
    rig: QuicRig, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = Over(rig, relay.port, monkeypatch)
    try:
        over.move()
        over.echo()
        relay.blocked = True
        took = over.echo(b"typed while UDP is blocked")
        print(f"the first echo after UDP was blocked took {took * 1000:.0f} ms")
        assert over.quic() is None
        assert took < 0.5
    finally:
        over.session.abort()


def test_output_goes_on_within_half_a_second_after_udp_is_blocked(
    rig: QuicRig, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is typed: only what the client does not hear tells it."""
    over = Over(rig, relay.port, monkeypatch, agent="lines")
    try:
        over.move()
        seen, last, gap, blocked = b"", time.monotonic(), 0.0, 0.0
        start = last
        while last < start + 2.5:
            seen += over.session.read(timeout=5.0)
            now = time.monotonic()
            if blocked:
                gap = max(gap, now - last)
            elif now > start + 0.5:
                relay.blocked, blocked = True, now
            last = now
        numbers = [int(line) for line in seen.split(b"\n")[:-1]]
        print(f"{len(numbers)} lines, the longest pause was {gap * 1000:.0f} ms")
        assert numbers == list(range(len(numbers)))
        assert over.quic() is None
        assert gap <= 0.5
    finally:
        over.session.abort()


@pytest.mark.parametrize("size", [1, 300_000])
async def test_asyncio_goes_over_to_quic_and_leaves_politely(
    rig: QuicRig, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setenv("STERNA_QUIC_PORT", str(rig.quic_port))
    monkeypatch.setattr(driver, "_SETTLED", 0)
    (rig.state / "client" / WAYS_FILE).unlink(missing_ok=True)
    data = os.urandom(size)
    async with asyncio.timeout(10):
        async with await sterna.connect(
            "cat", new=True, state=os.fspath(rig.state), host="127.0.0.1", port=rig.port
        ) as session:  # fmt: skip
            inner = session._driver
            while inner.machine.active not in inner._quics:
                await asyncio.sleep(0.01)
            for _ in range(3):
                sending = asyncio.create_task(session.write(data))
                got = b""
                while len(got) < size:
                    got += await session.read()
                await sending
                assert got == data
    assert not inner._quics


def test_another_node_is_not_taken_for_ours(rig: QuicRig, monkeypatch: pytest.MonkeyPatch) -> None:
    with QuicRig() as other:
        other.start_quic_node()
        over = Over(rig, other.quic_port, monkeypatch)
        try:
            over.turn_until(lambda: STANDBY in over.driver._quics)
            standby = over.driver._quics[STANDBY]
            over.turn_until(lambda: STANDBY not in over.driver._quics)
            assert standby.stranger
            assert not standby.established
            over.echo()
            assert over.quic() is None
        finally:
            over.session.abort()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
async def test_every_byte_comes_once_through_a_hundred_cuts(
    rig: QuicRig, monkeypatch: pytest.MonkeyPatch, anyio_backend: object
) -> None:
    """The node closes the connection, or the client's socket goes dead, a hundred times during 20 MB each way."""
    seed = int(os.environ.get("STERNA_QUIC_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"STERNA_QUIC_SEED={seed}")
    rng = random.Random(seed)
    data = rng.randbytes(20_000_000)
    monkeypatch.setenv("STERNA_QUIC_PORT", str(rig.quic_port))
    monkeypatch.setattr(driver, "_SETTLED", 0)
    (rig.state / "client" / WAYS_FILE).unlink(missing_ok=True)
    session = await sterna.connect("cat", new=True, state=os.fspath(rig.state), host="127.0.0.1", port=rig.port)
    inner = session._driver
    back, size, cuts, over = hashlib.sha256(), 0, [0, 0], False

    async def read() -> None:
        nonlocal size, over
        async for chunk in session:
            back.update(chunk)
            size += len(chunk)
        over = True

    async def cut() -> None:
        assert rig.node is not None
        while sum(cuts) < 100:
            inner.endpoint.ways.renew()
            active = inner.machine.active
            quic = inner._quics.get(active) if active is not None else None
            if quic is None:
                await asyncio.sleep(0.005)
                continue
            await asyncio.sleep(rng.random() * 0.05)
            if inner.machine.active != active:
                continue
            kind = int(rng.random() < 0.25)
            cuts[kind] += 1
            if kind:
                quic.channel._sock.connect(("127.0.0.1", 9))
            else:
                rig.node.process.send_signal(signal.SIGUSR1)
            while inner.machine.active == active and not over:  # the last cut may come behind the last byte
                await asyncio.sleep(0.001)

    async def write() -> None:
        step = 40_000
        for start in range(0, len(data), step):
            # The last part waits for the last cut, so that all of them hit a session in use.
            while start / len(data) > (sum(cuts) + 1) / 100 or (start + step >= len(data) and sum(cuts) < 100):
                await asyncio.sleep(0.002)
            await session.write(data[start : start + step])
        await session.eof()

    start = time.monotonic()
    try:
        async with asyncio.timeout(100):
            await asyncio.gather(read(), cut(), write())
    finally:
        print(f"{size} bytes came, {cuts} cuts, over QUIC: {inner.machine.active in inner._quics}")
        session.abort()
    took = time.monotonic() - start
    print(f"20 MB each way in {took:.1f} s; {cuts[0]} connections closed by the node, {cuts[1]} sockets dead")
    assert (size, back.digest()) == (len(data), hashlib.sha256(data).digest())
    assert sum(cuts) == 100


def status(rig: QuicRig) -> dict[str, int]:
    """What the node's listener says about itself."""
    assert rig.node is not None
    before = rig.node.output().count("connections ")
    rig.node.process.send_signal(signal.SIGUSR2)
    wait_for(lambda: rig.node is not None and rig.node.output().count("connections ") > before)
    words = rig.node.output().rpartition("connections ")[2].split()
    names = ("connections", "shaking", "retries", "moves", "unproved")
    return dict(zip(names, map(int, words[::2]), strict=True))


def initial() -> bytes:
    """The first datagram of a QUIC client that nobody knows."""
    quic = QuicConnection(configuration=QuicConfiguration(is_client=True, alpn_protocols=["clawterm/1"]))
    quic.connect(("127.0.0.1", 7221), time.monotonic())
    data: bytes = quic.datagrams_to_send(time.monotonic())[0][0]
    return data


def test_hostile_datagrams_cost_nothing_and_harm_nobody(rig: QuicRig, over: Over) -> None:
    """Garbage, truncated and changed Initials, and 10,000 spoofed ones; a session keeps echoing beside them."""
    rng = random.Random(3)
    over.move()
    over.echo()
    pid = rig.node.pid if rig.node is not None else 0
    samples = [initial() for _ in range(50)]
    target = ("127.0.0.1", rig.quic_port)
    before, start = memory(pid), status(rig)
    slowest = 0.0
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(20)]
        for number, sock in enumerate(socks):
            sock.bind((f"127.0.{1 + number}.1", 0))
        for number in range(3_000):
            kind, sample = number % 3, bytearray(rng.choice(samples))
            if kind == 0:
                sample = bytearray(rng.randbytes(rng.randrange(1, 1500)))
            elif kind == 1:
                del sample[rng.randrange(1, len(sample)) :]
            else:
                sample[rng.randrange(len(sample))] ^= 1 << rng.randrange(8)
            rng.choice(socks).sendto(sample, target)
            if number % 100 == 0:
                slowest = max(slowest, over.echo())
        for number in range(10_000):
            # As if each came from somebody else: another connection ID, no more than a first packet.
            sample = bytearray(rng.choice(samples))
            sample[6:14] = rng.randbytes(8)
            rng.choice(socks).sendto(sample, target)
            if number % 100 == 0:
                slowest = max(slowest, over.echo())
        good = [initial() for _ in range(500)]
        for sample_ in good:
            rng.choice(socks).sendto(sample_, target)
        slowest = max(slowest, *(over.echo() for _ in range(20)))
    after, end = memory(pid), status(rig)
    grown = (after - before) / 1024
    print(f"memory grew by {grown:.0f} KiB; slowest echo {slowest * 1000:.0f} ms; {start} -> {end}")
    assert grown < 12 * 1024
    assert slowest < 1.0
    assert end["shaking"] <= RETRY_ABOVE + BEGIN_PER_TURN_MAX
    assert end["retries"] > start["retries"]
    assert over.quic() is not None


def test_half_made_connections_end_and_leave_nothing(rig: QuicRig) -> None:
    wait_for(lambda: status(rig)["shaking"] == 0, 25.0, name="the end of the handshakes")


def memory(pid: int) -> int:
    """A process's own memory in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("Pss_Anon:")[2].split()[0]) * 1024


if __name__ == "__main__":
    run(serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
