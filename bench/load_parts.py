"""Parts of the load generator, each a process of its own: a node, a pod with many echo sessions, and clients.

Each takes commands as JSON lines on standard input and answers them on standard output (sterna's own modules do the
work; nothing here stands for them). Times that cross processes are CLOCK_MONOTONIC seconds.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import heapq
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.pod.server import PodServer, socket_path
from sterna.protocol import client as machine_events
from sterna.protocol import messages
from sterna.protocol.client import ClientMachine, Dial
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.messages import CONTEXT_CONNECT, ConnectBody, Open, Signed
from sterna.protocol.podside import Input, PodSession
from sterna.transport.pump import Pump, Reactor
from sterna.transport.tls import TlsSocket
from sterna.trust.device import DeviceKey
from sterna.trust.pins import local_pin

AGENT = "echo"
TENANTS = [f"t{i}" for i in range(8)]
"""Sessions are spread over several tenants, because one has a bounded number of them."""
GREETING = b"x" * 200
_TICK_SECONDS = 0.005
_NOTED_MS = 10.0


def percentile(values: list[float], share: float) -> float:
    """Returns the value below which `share` of the sorted values lie."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


async def commands(answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]) -> None:
    """Answers JSON lines until standard input ends or SIGTERM comes."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    loop.add_signal_handler(signal.SIGTERM, reader.feed_eof)
    while line := await reader.readline():
        result = await answer(json.loads(line))
        print(json.dumps(result or {}), flush=True)


# ---- the node ----------------------------------------------------------------------------------------------------


_gc_began = 0.0


def _note_gc(phase: str, info: dict[str, int]) -> None:
    """Says how long the collector takes (with LOAD_GC set)."""
    global _gc_began  # noqa: PLW0603 -- one process, one collector
    if phase == "start":
        _gc_began = time.perf_counter()
    elif (took := (time.perf_counter() - _gc_began) * 1e3) > 3:
        print(f"gc {time.monotonic():.3f} generation {info['generation']} {took:.1f} ms", file=sys.stderr)


async def node_main(state: str, port: int) -> None:
    """Runs a node with its usual settings until SIGTERM; notes pauses of its loop in STATE/pauses.

    Each line there: when (monotonic seconds), how long (ms), and how much CPU time the process took meanwhile (ms); a
    pause without CPU time is the machine's, not the node's.
    """
    began = time.monotonic()
    config = NodeConfig(
        port=port, state=f"{state}/node", sockets=f"{state}/sockets", cold_seconds=5, log_level="warning"
    )
    node = Node(config)
    scanned = time.monotonic()
    node.start()
    listens = time.monotonic()
    started = json.dumps({"began": began, "scan_s": scanned - began, "listens": listens})
    Path(state, "started").write_text(started)  # noqa: ASYNC240 -- a few bytes, before any work
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if os.environ.get("LOAD_GC"):
        gc.callbacks.append(_note_gc)
    with Path(state, "pauses").open("a", buffering=1) as pauses:  # noqa: ASYNC230 -- a line now and then
        last, cpu = time.monotonic(), time.process_time()
        while not stop.is_set():
            await asyncio.sleep(_TICK_SECONDS)
            now, used = time.monotonic(), time.process_time()
            pause = (now - last - _TICK_SECONDS) * 1e3
            if pause > _NOTED_MS:
                pauses.write(f"{now:.3f} {pause:.1f} {(used - cpu) * 1e3:.1f} {len(node.table)}\n")
            last, cpu = time.monotonic(), time.process_time()
    await node.close()


# ---- the pod -----------------------------------------------------------------------------------------------------


class EchoRunner:
    """Answers every byte with itself, without a task or a buffer of its own."""

    __slots__ = ("server", "session")

    def __init__(self, server: PodServer, session: PodSession, _request: Open) -> None:
        self.server = server
        self.session = session

    def input(self, item: Input) -> None:
        self.server.output(self.session, item.data)
        self.server.handled(item)

    def resized(self) -> None: ...

    def audience(self) -> None: ...

    def capture(self, token: int, _scrollback: bool) -> None:
        self.session.send_snapshot(token, self.session.out.end, b"", False)

    def roomy(self) -> None: ...

    def close(self) -> None: ...


async def pod_main(state: str) -> None:
    """Serves echo sessions for all tenants; `emit` makes a share of them print 100 bytes a second from then on."""
    servers = [
        PodServer(socket_path(f"{state}/sockets", t, AGENT), EchoRunner, kind="chat", features=[], sessions_max=200_000)
        for t in TENANTS
    ]
    loop = asyncio.get_running_loop()
    chosen: list[tuple[PodServer, PodSession]] = []
    at = 0

    def emit() -> None:
        """Prints a twentieth of the chosen ones, every twentieth of a second: programs do not print in step."""
        nonlocal at
        for server, session in chosen[at::20]:
            if session.out.room >= 100:
                server.reactor.run(server.output, session, b"x" * 99 + b"\n")
        at = (at + 1) % 20
        if chosen:
            loop.call_later(0.05, emit)

    async def answer(command: dict[str, Any]) -> dict[str, Any]:
        chosen.clear()
        await asyncio.sleep(0.1)
        if command["share"]:
            step = int(1 / command["share"])
            for server in servers:
                chosen.extend((server, s) for s in list(server.machine.sessions.values())[::step])
            emit()
        return {"sessions": sum(len(s.machine.sessions) for s in servers), "printing": len(chosen)}

    await commands(answer)
    for server in servers:
        server.close()


# ---- clients that hold attachments -------------------------------------------------------------------------------


class LoadClient:
    """One attachment with a TLS connection of its own; thousands of them in one process."""

    __slots__ = ("due", "fleet", "machine", "pumps", "sent_at", "shaking", "source", "state", "wanted")

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.fleet = fleet
        self.pumps: dict[int, Pump] = {}
        self.shaking: dict[int, socket.socket | None] = {}
        self.sent_at = 0.0
        self.wanted = b""
        self.state = "new"
        self.due = 0
        # An address of its own, as real clients have: the node's bounds for each address are in force.
        self.source = f"127.{1 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        tenant = TENANTS[0 if fleet.terminals else number % len(TENANTS)]
        cells = (80, 24) if fleet.terminals else (0, 0)
        body = ConnectBody(
            context=CONTEXT_CONNECT, node=fleet.node_id, request=os.urandom(16), key=fleet.key.public,
            attachment=os.urandom(16), credential=fleet.tokens[tenant], tenant=tenant, agent=AGENT, want="new",
            cols=cells[0], rows=cells[1], term="xterm-256color" if fleet.terminals else "", exact=not fleet.terminals,
        )  # fmt: skip
        self.machine = ClientMachine(
            body, device=fleet.key.id, sign=lambda c, b: fleet.key.sign(c, fleet.node_id, b), counter=time.time_ns,
            raise_counter=lambda _value: None, random=os.urandom, now=time.monotonic_ns(),
        )  # fmt: skip

    def settle(self) -> None:
        """Does what the machine wants."""
        machine = self.machine
        while True:
            if (action := machine.next_action()) is not None:
                if isinstance(action, Dial):
                    self._dial(action.connection)
                else:
                    self._drop(action.connection)
            elif (event := machine.next_event()) is not None:
                self._event(event)
            else:
                break
        due = machine.next_timeout()
        if due is not None and (not self.due or due < self.due):
            self.due = due
            self.fleet.at(due, self)

    def _event(self, event: machine_events.Event) -> None:
        if isinstance(event, machine_events.Output):
            self.machine.handled(event.end, time.monotonic_ns())
            if self.sent_at and self.wanted in event.data:
                self.fleet.latencies.append(time.perf_counter() - self.sent_at)
                self.sent_at = 0.0
        elif isinstance(event, machine_events.Opened):
            self.state = "up"
            self.fleet.came_up(self)
        elif isinstance(event, machine_events.Trouble):
            if event.since is not None:
                self.state = "down"
            elif self.state == "down":
                self.state = "up"
                self.fleet.came_up(self)
        elif isinstance(event, machine_events.Failed):
            self.state = f"failed: {event.error}"
            self.fleet.failures.append(str(event.error))

    def key(self, byte: bytes) -> None:
        """Types one key, unless the last one was not answered yet (that is counted)."""
        if self.sent_at:
            self.fleet.late += 1
            return
        self.wanted, self.sent_at = byte, time.perf_counter()
        self.machine.write(byte, time.monotonic_ns())
        self.settle()

    def timeout(self, now: int) -> None:
        """Lets the machine do what is due, if it is."""
        self.due = 0
        due = self.machine.next_timeout()
        if due is not None and due <= now:
            self.machine.handle_timeout(now)
        self.settle()

    # ---- connections ---------------------------------------------------------------------------------------------

    def _dial(self, number: int) -> None:
        fleet = self.fleet
        fleet.dials += 1
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT, ip(7)
        sock.bind((self.source, 0))
        code = sock.connect_ex(("127.0.0.1", fleet.port))
        if code != errno.EINPROGRESS:
            sock.close()
            self.machine.dial_failed(number, time.monotonic_ns(), refused=True)
            return
        self.shaking[number] = sock
        fleet.loop.add_writer(sock.fileno(), fleet.reactor.run, self._connected, number)

    def _connected(self, number: int) -> None:
        sock = self.shaking[number]
        assert sock is not None
        self.fleet.loop.remove_writer(sock.fileno())
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            del self.shaking[number]
            sock.close()
            self.machine.dial_failed(number, time.monotonic_ns(), refused=True)
        else:
            self.shaking[number] = None
            tls = TlsSocket(sock, self.fleet.context)
            # The machine's own link: what it queues there goes out without a copy.
            link = self.machine._connections[number].link
            self.machine.connected(number, time.monotonic_ns())
            pump = self.pumps[number] = Pump(
                self.fleet.reactor, tls, link, self, handshake=True, on_open=self._established
            )
            pump.data = number
            pump.start()
        self.settle()

    def _established(self, pump: Pump) -> None:
        number: int = pump.data  # type: ignore[assignment]  # set by _connected
        del self.shaking[number]
        self.machine.established(number, time.monotonic_ns())

    def _drop(self, number: int) -> None:
        sock = self.shaking.pop(number, None)
        if sock is not None:
            self.fleet.loop.remove_writer(sock.fileno())
            sock.close()
        pump = self.pumps.pop(number, None)
        if pump is not None:
            pump.abort("dropped")

    def received(self, pump: Pump, data: memoryview) -> None:
        """Passes bytes on."""
        self.machine.receive(pump.data, data, time.monotonic_ns())  # type: ignore[arg-type]  # set by _connected
        self.settle()

    def drained(self, pump: Pump) -> None:
        """Nothing: the window bounds what waits."""

    def ended(self, pump: Pump, reason: str) -> None:
        """Passes the loss on."""
        number: int = pump.data  # type: ignore[assignment]  # set by _connected
        if self.pumps.pop(number, None) is not None:
            if number in self.shaking:
                del self.shaking[number]
                self.fleet.broken[reason] = self.fleet.broken.get(reason, 0) + 1
                self.machine.dial_failed(number, time.monotonic_ns(), refused=True)
            else:
                self.machine.lost(number, time.monotonic_ns(), reason)
            self.settle()


class Fleet:
    """Many clients on one loop, with one coarse timer for all of them; `terminals` says that they have one."""

    def __init__(self, state: str, port: int, first: int, terminals: bool = False) -> None:
        self.terminals = terminals
        pin = local_pin(f"{state}/node")
        assert pin is not None, "the node made its certificate"
        self.node_id, self.context = pin.node_id, pin.context()
        self.tokens: dict[str, str] = json.loads(Path(state, "tokens").read_text())
        self.port = port
        self.first = first
        self.key = DeviceKey(Ed25519PrivateKey.generate())
        self.loop = asyncio.get_running_loop()
        self.reactor = Reactor(self.loop)
        self.clients: list[LoadClient] = []
        self.latencies: list[float] = []
        self.ups: dict[LoadClient, float] = {}
        self.failures: list[str] = []
        self.dials = self.late = 0
        self.broken: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._timers: list[tuple[int, int, LoadClient]] = []
        self._turn = 0
        self.loop.call_later(_TICK_SECONDS * 2, self._tick)

    def at(self, due: int, client: LoadClient) -> None:
        """Calls a client's `timeout` when it is due, some 10 ms late."""
        self._turn += 1
        heapq.heappush(self._timers, (due, self._turn, client))

    def _tick(self) -> None:
        now, timers = time.monotonic_ns(), self._timers
        while timers and timers[0][0] <= now:
            due, _, client = heapq.heappop(timers)
            if client.due == due:
                self.reactor.run(client.timeout, now)
        self.loop.call_later(_TICK_SECONDS * 2, self._tick)

    def came_up(self, client: LoadClient) -> None:
        """Notes that a client's session works; the last time counts."""
        self.ups[client] = time.monotonic()
        self._changed.set()

    async def _until(self, done: Callable[[], bool], seconds: float) -> bool:
        deadline = self.loop.time() + seconds
        while not done():
            if self.loop.time() > deadline:
                return False
            self._changed.clear()
            try:
                async with asyncio.timeout(1):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return True

    async def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Does what the command says; reports the time and CPU it took."""
        cpu = time.process_time()
        result: dict[str, Any] = await getattr(self, command.pop("do"))(**command)
        states: dict[str, int] = {}
        for client in self.clients:
            states[client.state] = states.get(client.state, 0) + 1
        result.update(
            states=states, cpu_s=time.process_time() - cpu, dials=self.dials, broken=self.broken,
            failures=self.failures[:3],
        )  # fmt: skip
        return result

    async def connect(self, count: int, at_once: int) -> dict[str, Any]:
        """Begins `count` sessions, at most `at_once` at a time."""
        began = time.monotonic()
        self.ups.clear()
        while len(self.clients) < count:
            room = at_once - (len(self.clients) - len(self.ups) - len(self.failures))
            if room <= 0 and not await self._until(
                lambda: len(self.clients) - len(self.ups) - len(self.failures) < at_once, 30
            ):
                break
            client = LoadClient(self, self.first + len(self.clients))
            self.clients.append(client)
            self.reactor.run(client.settle)
            if len(self.clients) % 8 == 0:
                await asyncio.sleep(0)
        await self._until(lambda: len(self.ups) + len(self.failures) >= count, 30)
        return {"seconds": time.monotonic() - began}

    async def line(self, text: str) -> dict[str, Any]:
        """Has every client send a line."""
        for client in self.clients:
            client.machine.write(text.encode() + b"\r", time.monotonic_ns())
            self.reactor.run(client.settle)
        await asyncio.sleep(2)
        return {}

    async def type(self, rate: float, seconds: float) -> dict[str, Any]:
        """Has every client type `rate` keys a second, none in step with another."""
        self.latencies.clear()
        self.late = 0
        clients = list(self.clients)
        random.Random(1).shuffle(clients)
        end = self.loop.time() + seconds
        gap = 1 / (rate * len(clients))
        due = self.loop.time()
        turn = 0
        while due < end:
            await asyncio.sleep(max(0.0, due - self.loop.time()))
            while due <= self.loop.time():
                client = clients[turn % len(clients)]
                self.reactor.run(client.key, b"abcdefghij"[turn % 10 : turn % 10 + 1])
                turn += 1
                due += gap
        await asyncio.sleep(1)
        found = sorted(value * 1e3 for value in self.latencies)
        return {
            "keys": turn, "answered": len(found), "late": self.late, "p50_ms": percentile(found, 0.5),
            "p90_ms": percentile(found, 0.9), "p99_ms": percentile(found, 0.99), "max_ms": found[-1] if found else 0.0,
        }  # fmt: skip

    async def arm(self) -> dict[str, Any]:
        """Forgets who came up, and when."""
        self.ups.clear()
        self.dials = 0
        self.broken = {}
        return {}

    async def recovered(self, seconds: float) -> dict[str, Any]:
        """Waits until every client has come up again since `arm`; tells when which share of them had."""
        await self._until(
            lambda: len(self.ups) >= len(self.clients) and all(client.state == "up" for client in self.clients), seconds
        )
        return {"ups": list(self.ups.values())}


# ---- a client that begins sessions and leaves them ---------------------------------------------------------------


class Opener:
    """Begins sessions over one connection to the node's own socket, uses each a little, and leaves it suspended."""

    def __init__(self, state: str, tenant: str, count: int, at_once: int) -> None:
        pin = local_pin(f"{state}/node")
        assert pin is not None, "the node made its certificate"
        self.node_id = pin.node_id
        self.tenant = tenant
        self.token: str = json.loads(Path(state, "tokens").read_text())[tenant]
        self.key = DeviceKey(Ed25519PrivateKey.generate())
        self.count, self.at_once = count, at_once
        self.begun = self.done = 0
        self.errors: list[str] = []
        self.link = Link()
        loop = asyncio.get_running_loop()
        self.finished = loop.create_future()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(f"{state}/node/node.sock")
        sock.setblocking(False)
        self.reactor = Reactor(loop)
        self.pump = Pump(self.reactor, sock, self.link, self)
        self.pump.start()
        self.reactor.run(self._more)

    def _more(self) -> None:
        while self.begun < self.count and self.begun - self.done < self.at_once:
            self.begun += 1
            body = messages.pack(ConnectBody(
                context=CONTEXT_CONNECT, node=self.node_id, request=os.urandom(16), key=self.key.public,
                attachment=os.urandom(16), credential=self.token, tenant=self.tenant, agent=AGENT, want="new",
                name=f"s{self.begun}", exact=True, cols=0, rows=0,
            ))  # fmt: skip
            signed = Signed(body, self.key.sign(CONTEXT_CONNECT, self.node_id, body))
            self.link.send_message(Type.CONNECT, self.begun, signed)
        if self.done >= self.count and not self.finished.done():
            self.finished.set_result(None)

    def received(self, pump: Pump, data: memoryview) -> None:
        for kind, handle, seq, payload in self.link.receive(data):
            if kind == Type.ACCEPT:
                self.link.send(Type.DATA, handle, 0, GREETING)
            elif kind == Type.DATA and seq + len(payload) >= len(GREETING):
                self.link.send_message(Type.SUSPEND, handle, messages.Suspend(len(GREETING)))
            elif kind in (Type.SUSPEND, Type.ERROR):
                self.done += 1
                if kind == Type.ERROR:
                    self.errors.append(messages.unpack(messages.Error, payload).message)
                self._more()

    def drained(self, pump: Pump) -> None: ...

    def ended(self, pump: Pump, reason: str) -> None:
        if not self.finished.done():
            self.finished.set_exception(RuntimeError(f"the node left: {reason}"))


async def opener_main(state: str) -> None:
    """Begins sessions of all tenants, one tenant after the other, and leaves them suspended."""

    async def answer(command: dict[str, Any]) -> dict[str, Any]:
        began = time.monotonic()
        errors: list[str] = []
        each = command["count"] // len(TENANTS)
        for tenant in TENANTS:
            opener = Opener(state, tenant, each, command["at_once"])
            await opener.finished
            opener.pump.abort("done")
            errors += opener.errors
        return {"seconds": time.monotonic() - began, "errors": errors[:3], "failed": len(errors)}

    await commands(answer)


def main() -> None:
    """Runs the part that the first argument names."""
    from sterna.cli.loop import run

    role, state, *more = sys.argv[1:]
    if role == "node":
        run(node_main(state, int(more[0])))
    elif role == "pod":
        run(pod_main(state))
    elif role == "opener":
        run(opener_main(state))
    else:

        async def fleet() -> None:
            await commands(Fleet(state, int(more[0]), int(more[1]), role == "terminals").answer)

        run(fleet())


if __name__ == "__main__":
    main()
