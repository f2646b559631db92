"""Parts of the load generator: a node, a pod with thousands of echo sessions, and clients that hold thousands of attachments."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sterna import limits
from sterna.client.endpoint import Endpoint
from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.pod.server import PodServer, socket_path
from sterna.protocol import client as machine_events
from sterna.protocol.client import ClientMachine, Dial, Drop
from sterna.protocol.messages import CONTEXT_CONNECT, ConnectBody, Open
from sterna.protocol.podside import Input, PodSession
from sterna.transport.pump import Pump, Reactor
from sterna.transport.ticker import Ticker
from sterna.trust.device import DeviceKey
from sterna.trust.pins import local_pin


def anonymous_kib(pid: int) -> int:
    """Returns a process's private anonymous memory (Pss_Anon) in KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1])
    return 0


# ---- the node ----------------------------------------------------------------------------------------------------


async def node_main(state: str, port: int) -> None:
    """Runs a node until SIGTERM and writes the loop's longest pause so far to STATE/pause every second."""
    started = time.perf_counter()
    config = NodeConfig(
        port=port, state=f"{state}/node", sockets=f"{state}/sockets", unauthenticated_max=4096, unauthenticated_per_address=4096,
        cold_seconds=5, log_level="warning", tenant_uids={t: [os.getuid()] for t in tenants()},
    )  # fmt: skip
    node = Node(config)
    opened = time.perf_counter()
    node.start()
    Path(state, "started").write_text(json.dumps({"scan_s": opened - started, "listen_s": time.perf_counter() - opened}))
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    worst, last = 0.0, time.perf_counter()
    written = last
    while not stop.is_set():
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        worst = max(worst, now - last - 0.005)
        last = now
        if now - written > 1:
            Path(state, "pause").write_text(json.dumps({"worst_ms": worst * 1e3, "hot": len(node.table)}))
            if Path(state, "reset").exists():
                Path(state, "reset").unlink()
                worst = 0.0
            written = now
            last = time.perf_counter()
    await node.close()


def tenants() -> list[str]:
    """Returns the tenants among which sessions are spread (a tenant has a bounded number of them)."""
    return [f"t{i}" for i in range(8)]


# ---- the pod -----------------------------------------------------------------------------------------------------


class EchoRunner:
    """Answers every byte with itself, without a task or a buffer of its own."""

    __slots__ = ("server", "session")

    def __init__(self, server: PodServer, session: PodSession, request: Open) -> None:
        self.server = server
        self.session = session

    def input(self, item: Input) -> None:
        """Echoes."""
        self.server.output(self.session, item.data)
        self.server.handled(item)

    def resized(self) -> None:
        """Nothing."""

    def audience(self) -> None:
        """Nothing."""

    def capture(self, token: int, scrollback: bool) -> None:
        """Sends an empty snapshot."""
        self.session.send_snapshot(token, self.session.out.end, b"", False)

    def roomy(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


async def pod_main(state: str) -> None:
    """Serves echo sessions for all tenants; lines `emit SHARE` on standard input make that share of them print 100 bytes a second."""
    servers = [
        PodServer(socket_path(f"{state}/sockets", t, "echo"), EchoRunner, kind="chat", features=[], sessions_max=200_000)
        for t in tenants()
    ]
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    share = 0.0

    def command() -> None:
        nonlocal share
        line = os.read(0, 4096).decode().split()
        if not line:
            stop.set()
        elif line[0] == "emit":
            share = float(line[1])

    loop.add_reader(0, command)
    while not stop.is_set():
        await asyncio.sleep(1)
        if share:
            for server in servers:
                sessions = list(server.machine.sessions.values())
                for session in sessions[:: max(1, int(1 / share))]:
                    if session.out.room > 100:
                        server.reactor.run(server.output, session, b"x" * 99 + b"\n")
    for server in servers:
        server.close()


# ---- clients -----------------------------------------------------------------------------------------------------


class LoadClient:
    """One attachment, driven on asyncio; many of them in one process."""

    __slots__ = ("fleet", "machine", "pumps", "sent_at", "state", "token", "wanted")

    def __init__(self, fleet: Fleet, tenant: str, token: str) -> None:
        self.fleet = fleet
        self.pumps: dict[int, Pump] = {}
        self.sent_at = 0.0
        self.wanted = b""
        self.state = "new"
        endpoint = fleet.endpoint
        body = ConnectBody(
            context=CONTEXT_CONNECT, node=endpoint.node_id, request=os.urandom(16), key=fleet.key.public,
            attachment=os.urandom(16), credential=token, tenant=tenant, agent="echo", want="new", exact=True, cols=0, rows=0,
        )  # fmt: skip
        self.machine = ClientMachine(
            body, device=fleet.key.id, sign=lambda c, b: fleet.key.sign(c, endpoint.node_id, b), counter=time.time_ns,
            raise_counter=lambda _v: None, random=os.urandom, now=time.monotonic_ns(),
        )  # fmt: skip

    def settle(self) -> None:
        """Does what the machine wants."""
        machine = self.machine
        while True:
            action = machine.next_action()
            if isinstance(action, Dial):
                self.fleet.dial(self, action.connection)
                continue
            if isinstance(action, Drop):
                pump = self.pumps.pop(action.connection, None)
                if pump is not None and not pump.closed:
                    pump.link.send_raw(machine.farewell(action.connection))
                    pump.flush()
                    pump.abort("dropped")
                continue
            for number, parts in machine.data_to_send():
                if number in self.pumps:
                    self.pumps[number].link.send_raw(parts)
            event = machine.next_event()
            if event is None:
                break
            self.event(event)
        self.fleet.ticker.watch(self)

    def event(self, event: machine_events.Event) -> None:
        """Counts."""
        if isinstance(event, machine_events.Opened):
            self.state = "up"
            self.fleet.changed()
        elif isinstance(event, machine_events.Trouble):
            self.state = "up" if event.since is None else "down"
            self.fleet.changed()
        elif isinstance(event, machine_events.Output):
            self.machine.handled(event.end, time.monotonic_ns())
            if self.sent_at and self.wanted in event.data:
                self.fleet.latencies.append(time.perf_counter() - self.sent_at)
                self.sent_at = 0.0
        elif isinstance(event, machine_events.Suspended):
            self.state = "suspended"
            self.fleet.changed()
        elif isinstance(event, machine_events.Failed):
            self.state = f"failed: {event.error}"
            self.fleet.changed()

    def key(self, byte: bytes) -> None:
        """Types one key."""
        self.wanted, self.sent_at = byte, time.perf_counter()
        self.machine.write(byte, time.monotonic_ns())
        self.settle()

    def next_timeout(self) -> int | None:
        """As the machine says."""
        return self.machine.next_timeout()

    def handle_timeout(self, now: int) -> None:
        """As the machine wants."""
        self.machine.handle_timeout(now)
        self.settle()

    def received(self, pump: Pump, data: memoryview) -> None:
        """Passes bytes on."""
        self.machine.receive(pump.data, bytes(data), time.monotonic_ns())  # type: ignore[arg-type]  # set by dial
        self.settle()

    def drained(self, pump: Pump) -> None:
        """Nothing."""

    def ended(self, pump: Pump, reason: str) -> None:
        """Passes the loss on."""
        number = pump.data
        if self.pumps.pop(number, None) is not None:  # type: ignore[call-overload]  # set by dial
            self.machine.lost(number, time.monotonic_ns(), reason)  # type: ignore[arg-type]  # set by dial
            self.settle()
