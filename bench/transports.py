"""What a session costs over a WebSocket and over QUIC, beside TCP: echo, bulk output, memory of idle ones in the node.

`python bench/transports.py web|quic` starts a node, its pods and its clients as real processes on the loopback
interface and writes what it found to bench/results. Keys go over both ways in turn, so that a busy moment of the
machine meets both.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from load import Field, anonymous_kib, cpu_seconds, field, free_port, say
from load_parts import AGENT, TENANTS, percentile
from report import RESULTS, about_machine, table, write
from wires import WIRES, Attachment

from sterna.trust.pins import Pin, local_pin

NAMES = {"tcp": "TCP with TLS", "web": "a WebSocket with TLS", "quic": "QUIC"}
KEYS = 300
GAP_SECONDS = 0.03
BULK_BYTES = 64 * 1024 * 1024
BULK_ROUNDS = 3
IDLE = 200
TERMINAL = "terminal"
STREAM = "stream"
_PRINTER = """
import os, sys, tty
if os.isatty(0):
    tty.setraw(0)
os.write(1, b"ready")
block = (b"x" * 79 + b"\\n") * 400
while size := os.read(0, 100):
    if not size.strip().isdigit():
        os.write(1, size)
        continue
    left = int(size)
    while left:
        left -= os.write(1, block[:left])
"""


class Bench:
    """A node that speaks all ways, and its pods."""

    def __init__(self, here: Field, way: str) -> None:
        self.here = here
        self.way = way
        self.ports = {"tcp": here.port, "web": free_port(), "quic": free_port()}
        state = here.state
        words = ["-m", "sterna", "node", "-p", str(here.port), "-s", f"{state}/sockets", "--state", f"{state}/node"]
        words += ["--web-port", str(self.ports["web"]), "--log-level", "warning"]
        os.environ["STERNA_NODE_QUIC_PORT"] = str(self.ports["quic"])
        self.node = here.run(*words)
        self._pods(state)
        until = time.monotonic() + 20
        while (pin := self._pin()) is None or not self._listens():
            if time.monotonic() > until or self.node.process.poll() is not None:
                raise RuntimeError("the node did not start")
            time.sleep(0.05)
        self.pin: Pin = pin
        self.tokens: dict[str, str] = json.loads(Path(state, "tokens").read_text())
        self._turn = 0

    def _pods(self, state: str) -> None:
        here = self.here
        here.part("pod")
        for name, kind in ((TERMINAL, "pty"), (STREAM, "stream")):
            words = ["-m", "sterna", "pod", "--tenant", TENANTS[0], "--agent", name, "--kind", kind]
            here.run(*words, "--sockets", f"{state}/sockets", "--", sys.executable, "-u", "-c", _PRINTER)

    def _pin(self) -> Pin | None:
        return local_pin(f"{self.here.state}/node")

    def _listens(self) -> bool:
        return os.path.exists(f"{self.here.state}/node/node.sock")

    def attach(self, way: str, agent: str, tenant: str = TENANTS[0]) -> Attachment:
        """Begins a session over a new connection from an address of its own."""
        self._turn += 1
        source = f"127.{2 + (self._turn >> 8)}.0.{self._turn & 255}" if self._turn & 255 else "127.1.1.1"
        wire = WIRES[way](self.ports[way], self.pin, source)
        cells = (80, 24) if agent == TERMINAL else (0, 0)
        return Attachment(wire, self.pin, self.tokens[tenant], tenant, agent, cells)

    def first(self, way: str, agent: str) -> Attachment:
        """Begins a session with an agent that may not be there yet."""
        until = time.monotonic() + 20
        while True:
            try:
                session = self.attach(way, agent)
                session.expect(b"ready")
                return session
            except Exception:  # whatever it is, it shall be gone after a while
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)


def echo(bench: Bench) -> dict[str, Any]:
    """Keys to a program in a terminal, over TCP and the way measured in turn: 30 ms apart, and one after another."""
    both = {way: bench.first(way, TERMINAL) for way in ("tcp", bench.way)}
    found: dict[str, Any] = {}
    for kind, gap in (("paced", GAP_SECONDS), ("at_once", 0.0)):
        times: dict[str, list[float]] = {way: [] for way in both}
        for number in range(KEYS + 20):
            for way, session in both.items():
                took = session.echo()
                if gap:
                    session.idle(gap)
                if number >= 20:
                    times[way].append(took * 1e3)
        for way, values in times.items():
            values.sort()
            found[f"{way}_{kind}_p50_ms"] = percentile(values, 0.5)
            found[f"{way}_{kind}_p99_ms"] = percentile(values, 0.99)
        say(f"echo, {kind}: " + ", ".join(f"{way} {percentile(each, 0.5):.3f} ms" for way, each in times.items()))
    for session in both.values():
        session.wire.close()
    return found


def bulk(bench: Bench) -> dict[str, Any]:
    """64 MiB of text to the protocol client, from a program in a terminal and from one on pipes."""
    found: dict[str, Any] = {}
    for agent in (TERMINAL, STREAM):
        for way in ("tcp", bench.way):
            session = bench.first(way, agent)
            cpu = cpu_seconds(bench.node.pid)
            speeds = [BULK_BYTES / session.bulk(BULK_BYTES) / 1e6 for _ in range(BULK_ROUNDS)]
            found[f"{way}_{agent}_mb_s"] = statistics.median(speeds)
            found[f"{way}_{agent}_node_cpu_s"] = (cpu_seconds(bench.node.pid) - cpu) / BULK_ROUNDS
            session.wire.close()
            say(f"{agent}: {way} {found[f'{way}_{agent}_mb_s']:.0f} MB/s")
    return found


def memory(way: str) -> float:
    """What an idle session of an echo agent costs a node, each with a connection of its own; in KiB."""
    with field() as here:
        bench = Bench(here, way)
        bench.first(way, TERMINAL)
        # What is made once, with the first ones, is no session's.
        some = [bench.attach(way, AGENT, TENANTS[number % len(TENANTS)]) for number in range(20)]
        settle(some)
        before = anonymous_kib(bench.node.pid)
        more = [bench.attach(way, AGENT, TENANTS[number % len(TENANTS)]) for number in range(IDLE)]
        settle(some + more)
        each = (anonymous_kib(bench.node.pid) - before) / IDLE
    say(f"memory: {way} {each:.1f} KiB")
    return each


def settle(sessions: list[Attachment]) -> None:
    """Has each echo a few keys, and all of them say what they still have to say."""
    for session in sessions:
        for _ in range(3):
            session.echo()
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        for session in sessions:
            session.turn(0.0)


def rows(way: str, found: dict[str, Any]) -> list[str]:
    """Returns the tables."""
    targets = {"echo": "≤ 0.25 ms", "bulk": "≥ 80 MB/s", "memory": "≤ 64 KiB"}

    def ms(kind: str, part: str) -> str:
        return f"{found[f'{way}_{kind}_{part}_ms']:.2f} ms (TCP {found[f'tcp_{kind}_{part}_ms']:.2f})"

    def speed(agent: str) -> str:
        return f"{found[f'{way}_{agent}_mb_s']:.0f} MB/s (TCP {found[f'tcp_{agent}_mb_s']:.0f})"

    each = f"{found[f'{way}_kib_each']:.1f} KiB (TCP {found['tcp_kib_each']:.1f})"
    return table(
        f"A session over {NAMES[way]}",
        ("Echo of a key in a terminal, one after another, p50", ms("at_once", "p50"), targets["echo"]),
        ("… p99", ms("at_once", "p99"), ""),
        ("Echo of a key, 30 ms apart, p50", ms("paced", "p50"), ""),
        ("… p99", ms("paced", "p99"), ""),
        ("64 MiB of text from a program in a terminal", speed(TERMINAL), targets["bulk"]),
        ("… from a program on pipes", speed(STREAM), targets["bulk"]),
        (f"Node memory (Pss_Anon) for each of {found['sessions']} idle sessions", each, targets["memory"]),
    )


BESIDE = {
    "web": (
        "Beside it ttyd, without TLS and measured on another day of a like machine: echo p50 0.13 ms and p99 2.9 ms, "
        "64 MiB of text at 79 MB/s, 6 KiB for an idle session; a change of the client's address ends its session."
    ),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures the way that is named and writes what was found."""
    way = (arguments or sys.argv[1:])[0]
    machine = about_machine()
    with field() as here:
        bench = Bench(here, way)
        found = {**echo(bench), **bulk(bench), "sessions": IDLE}
    found |= {f"{each}_kib_each": memory(each) for each in ("tcp", way)}
    text = "\n".join([*rows(way, found), BESIDE.get(way, "")])
    write(RESULTS, way, f"Sessions over {NAMES[way]}", text, found, machine)
    return found


if __name__ == "__main__":
    main()
