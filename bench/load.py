"""The load generator: what thousands of sessions cost one node process.

`python bench/load.py [live] [suspended] [terminals]` runs these scenarios with real processes (node, pods, clients) on
the loopback interface and writes what it found to bench/results. The clients share the machine's cores with the node.
A pause of the node's loop is also given in CPU time: what is missing there, other processes had.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from load_parts import AGENT, TENANTS, percentile
from report import RESULTS, about_machine, table, write

from sterna.trust.tokens import TokenKey

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
SAMPLES = 3
_TICKS = os.sysconf("SC_CLK_TCK")


def anonymous_kib(pid: int) -> int:
    """Returns a process's private anonymous memory (proc_pid_smaps(5), Pss_Anon) in KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1])
    raise RuntimeError("this kernel does not tell Pss_Anon")


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time a process has used so far (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def free_port() -> int:
    """Returns a TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Part:
    """A process of the bench; `ask` sends it a command and returns its answer."""

    def __init__(self, *words: str) -> None:
        env = {**os.environ, "PYTHONPATH": os.fspath(SOURCE)}
        self.process = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.pid = self.process.pid

    def tell(self, **command: Any) -> None:
        """Sends a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Returns the answer to a command."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a command and returns its answer."""
        self.tell(**command)
        return self.hear()

    def kill(self) -> None:
        """Kills it (SIGKILL) and waits for its end."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends it."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


class Field:
    """A directory with a node, and the parts that work with it."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.port = free_port()
        self.parts: list[Part] = []
        for name in ("node", "sockets"):
            os.mkdir(f"{state}/{name}", 0o700)
        key = TokenKey.load(f"{state}/node")
        now = int(time.time())
        tokens = {tenant: key.issue(tenant, ["*"], ["drive"], now_s=now) for tenant in TENANTS}
        Path(state, "tokens").write_text(json.dumps(tokens))

    def part(self, role: str, *args: str) -> Part:
        """Starts a part."""
        return self.run(os.fspath(HERE / "load_parts.py"), role, self.state, *args)

    def run(self, *words: str) -> Part:
        """Starts a Python program."""
        part = Part(*words)
        self.parts.append(part)
        return part

    def node(self) -> tuple[Part, dict[str, float]]:
        """Starts the node; returns it and what it said about its start once it listens."""
        marker = Path(self.state, "started")
        marker.unlink(missing_ok=True)
        node = self.part("node", str(self.port))
        while not marker.exists() or not marker.read_text():
            time.sleep(0.005)
            if node.process.poll() is not None:
                raise RuntimeError("the node ended")
        started: dict[str, float] = json.loads(marker.read_text())
        return node, started

    def pauses(self, since: float, until: float) -> dict[str, float]:
        """Returns the node's worst pauses in a span of time, by the clock and by its own CPU time, in ms."""
        wall, cpu, long = 0.0, 0.0, 0
        for line in Path(self.state, "pauses").read_text().splitlines():
            at, took, used, _hot = map(float, line.split())
            if since <= at <= until:
                wall, cpu = max(wall, took), max(cpu, min(took, used))
                long += took > 50
        return {"worst_ms": wall, "worst_cpu_ms": cpu, "over_50_ms": long}


@contextlib.contextmanager
def field() -> Iterator[Field]:
    """A new directory, gone with everything that was started at the end."""
    state = tempfile.mkdtemp(prefix="load-")
    here = Field(state)
    try:
        yield here
    finally:
        for part in reversed(here.parts):
            if part.process.poll() is None:
                part.close()
        shutil.rmtree(state)


def say(text: str) -> None:
    """Prints progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# ---- live sessions -----------------------------------------------------------------------------------------------


def live(count: int, active: int, rate: float, seconds: float, samples: int) -> dict[str, Any]:
    """`count` live TLS sessions: memory, echo of `active` ones, and the return of all after `kill -9` of the node."""
    with field() as here:
        pod = here.part("pod")
        node, _ = here.node()
        time.sleep(2)
        node_base, pod_base = anonymous_kib(node.pid), anonymous_kib(pod.pid)
        fleets = [here.part("fleet", str(here.port), "0"), here.part("fleet", str(here.port), str(count - active))]
        cpu = cpu_seconds(node.pid)
        opened = [fleets[0].ask(do="connect", count=count - active, at_once=64)]
        opened.append(fleets[1].ask(do="connect", count=active, at_once=64))
        began_s = sum(found["seconds"] for found in opened)
        begin_cpu = cpu_seconds(node.pid) - cpu
        up = sum(found["states"].get("up", 0) for found in opened)
        say(f"{up} of {count} sessions in {began_s:.1f} s (node CPU {begin_cpu:.1f} s) {opened}")
        time.sleep(20)
        node_kib, pod_kib = anonymous_kib(node.pid), anonymous_kib(pod.pid)
        say(f"node {node_kib / 1024:.0f} MiB ({node_base / 1024:.0f} empty), pod {pod_kib / 1024:.0f} MiB")
        say(f"clients {[anonymous_kib(f.pid) // 1024 for f in fleets]} MiB")
        cpu, at = cpu_seconds(node.pid), time.monotonic()
        time.sleep(15)
        idle_cpu = (cpu_seconds(node.pid) - cpu) / (time.monotonic() - at)
        echoes = []
        for _ in range(samples):
            since, cpu = time.monotonic(), cpu_seconds(node.pid)
            echo = fleets[1].ask(do="type", rate=rate, seconds=seconds)
            echo["node_cpu_share"] = (cpu_seconds(node.pid) - cpu) / (time.monotonic() - since)
            echo.update(here.pauses(since, time.monotonic()))
            say(f"echo {echo}")
            echoes.append(echo)
        returns = []
        for _ in range(samples):
            returns.append(come_back(here, node, fleets))
            node = here.parts[-1]
            say(f"return {returns[-1]}")
            time.sleep(5)
        after_kib = anonymous_kib(node.pid)
        return {
            "sessions": up, "begin_s": began_s, "begin_node_cpu_s": begin_cpu, "node_mib": node_kib / 1024,
            "node_empty_mib": node_base / 1024, "node_kib_each": (node_kib - node_base) / count,
            "pod_kib_each": (pod_kib - pod_base) / count, "node_mib_after_return": after_kib / 1024,
            "idle_node_cpu_share": idle_cpu, "echo": echoes, "return": returns,
        }  # fmt: skip


def come_back(here: Field, node: Part, fleets: list[Part]) -> dict[str, Any]:
    """Kills the node, lets the clients wait for 3 s, starts it again; returns how long they need from its start."""
    for fleet in fleets:
        fleet.ask(do="arm")
    node.kill()
    time.sleep(3)
    at = time.monotonic()
    node, started = here.node()
    for fleet in fleets:
        fleet.tell(do="recovered", seconds=120)
    answers = [fleet.hear() for fleet in fleets]
    ups = sorted(up - at for answer in answers for up in answer.pop("ups"))
    cpu = cpu_seconds(node.pid)
    return {
        "listens_s": started["listens"] - at, "resumed": len(ups), "half_s": percentile(ups, 0.5),
        "p99_s": percentile(ups, 0.99), "all_s": ups[-1] if ups else 0.0, "node_cpu_s": cpu,
        "client_cpu_s": sum(a["cpu_s"] for a in answers), "dials": sum(a["dials"] for a in answers),
        "broken_handshakes": [a["broken"] for a in answers], "states": [a["states"] for a in answers],
        **here.pauses(at, time.monotonic()),
    }  # fmt: skip


# ---- suspended sessions ------------------------------------------------------------------------------------------


def suspended(count: int, share: float, seconds: float, samples: int) -> dict[str, Any]:
    """`count` suspended sessions, output in a share of them: memory, pauses, and the scan of a restart."""
    with field() as here:
        pod = here.part("pod")
        node, _ = here.node()
        time.sleep(2)
        base = anonymous_kib(node.pid)
        since, cpu = time.monotonic(), cpu_seconds(node.pid)
        made = here.part("opener").ask(count=count, at_once=64)
        make_cpu = cpu_seconds(node.pid) - cpu
        say(f"made {made}, node CPU {make_cpu:.1f} s, pauses {here.pauses(since, time.monotonic())}")
        time.sleep(20)
        quiet = anonymous_kib(node.pid)
        say(f"node {quiet / 1024:.0f} MiB ({base / 1024:.0f} empty), pod {anonymous_kib(pod.pid) / 1024:.0f} MiB")
        printing = pod.ask(share=share)
        runs = []
        for _ in range(samples):
            since, cpu = time.monotonic(), cpu_seconds(node.pid)
            time.sleep(seconds)
            busy = {"mib": anonymous_kib(node.pid) / 1024, "kib_each": (anonymous_kib(node.pid) - base) / count}
            busy["cpu_share"] = (cpu_seconds(node.pid) - cpu) / (time.monotonic() - since)
            busy.update(here.pauses(since, time.monotonic()))
            say(f"busy {busy}")
            runs.append(busy)
        scans = []
        for _ in range(samples):
            node.kill()
            at = time.monotonic()
            node, started = here.node()
            time.sleep(seconds)
            scan = {"scan_s": started["scan_s"], "listens_s": started["listens"] - at, "cpu_s": cpu_seconds(node.pid)}
            scan.update(here.pauses(at, time.monotonic()))
            scan["mib"] = anonymous_kib(node.pid) / 1024
            say(f"restart {scan}")
            scans.append(scan)
        return {
            "sessions": count - made["failed"], "printing": printing["printing"], "make_s": made["seconds"],
            "make_node_cpu_s": make_cpu, "quiet_kib_each": (quiet - base) / count, "empty_mib": base / 1024,
            "busy": runs, "restart": scans,
        }  # fmt: skip


# ---- terminals ---------------------------------------------------------------------------------------------------


def terminals(count: int) -> dict[str, Any]:
    """`count` idle shells under `sterna pod`, each with a TLS client: memory of pod and node, besides the shells."""
    shell = ["bash", "--norc", "--noprofile"]
    with field() as here:
        pod = here.run(
            "-m", "sterna", "pod", "--tenant", TENANTS[0], "--agent", AGENT,
            "--sockets", f"{here.state}/sockets", "--", *shell,
        )  # fmt: skip
        node, _ = here.node()
        time.sleep(2)
        node_base, pod_base = anonymous_kib(node.pid), anonymous_kib(pod.pid)
        clients = here.part("terminals", str(here.port), "0")
        found = clients.ask(do="connect", count=count, at_once=8)
        clients.ask(do="line", text="ls -l /usr/bin | head -40")
        time.sleep(20)
        node_kib, pod_kib = anonymous_kib(node.pid), anonymous_kib(pod.pid)
        cpu, at = cpu_seconds(pod.pid), time.monotonic()
        time.sleep(10)
        idle_cpu = (cpu_seconds(pod.pid) - cpu) / (time.monotonic() - at)
        clients.ask(do="line", text="seq 2000")
        time.sleep(10)
        scrolled_kib = anonymous_kib(pod.pid)
        result = {
            "sessions": found["states"].get("up", 0), "begin_s": found["seconds"],
            "node_kib_each": (node_kib - node_base) / count, "pod_kib_each": (pod_kib - pod_base) / count,
            "pod_empty_mib": pod_base / 1024, "idle_pod_cpu_share": idle_cpu,
            "pod_kib_each_2000_lines": (scrolled_kib - pod_base) / count,
        }  # fmt: skip
        say(f"terminals {result}")
        return result


# ---- report ------------------------------------------------------------------------------------------------------


def middle(runs: list[dict[str, Any]], key: str) -> float:
    """Returns the median of a figure over several runs."""
    return statistics.median(float(run[key]) for run in runs)


def worst(runs: list[dict[str, Any]], key: str) -> float:
    """Returns the largest of a figure over several runs."""
    return max(float(run[key]) for run in runs)


def live_rows(found: dict[str, Any]) -> list[str]:
    """Returns the table of live sessions."""
    echo, back = found["echo"], found["return"]
    both = f"{middle(back, 'node_cpu_s'):.1f} / {middle(back, 'client_cpu_s'):.1f} s"
    begin = f"{found['begin_node_cpu_s'] / found['sessions'] * 1e3:.2f} ms"
    return table(
        f"{found['sessions']:,} live TLS sessions",
        ("Node memory (Pss_Anon)", f"{found['node_mib']:.0f} MiB", "≤ 640 MiB"),
        ("… for each session, above the empty node", f"{found['node_kib_each']:.1f} KiB", "≤ 64 KiB"),
        ("… after all came back", f"{found['node_mib_after_return']:.0f} MiB", "≤ 640 MiB"),
        ("Pod memory for each session (chat agent)", f"{found['pod_kib_each']:.1f} KiB", "≤ 64 KiB"),
        ("Echo of the active ones, p50", f"{middle(echo, 'p50_ms'):.2f} ms", ""),
        ("… p99", f"{middle(echo, 'p99_ms'):.2f} ms", "≤ 20 ms"),
        ("… slowest of all runs", f"{worst(echo, 'max_ms'):.1f} ms", ""),
        ("Node CPU while they type", f"{middle(echo, 'node_cpu_share'):.0%} of a core", ""),
        ("Node CPU with nobody typing", f"{found['idle_node_cpu_share']:.1%} of a core", ""),
        ("Killed and started again: half are back", f"{middle(back, 'half_s'):.1f} s", ""),
        ("… all are back", f"{middle(back, 'all_s'):.1f} s", "≤ 30 s"),
        ("… CPU of node / clients meanwhile", both, ""),
        ("Begin one session (CPU of the node)", begin, ""),
    )  # fmt: skip


def suspended_rows(found: dict[str, Any]) -> list[str]:
    """Returns the table of suspended sessions."""
    busy, again = found["busy"], found["restart"]
    begin = f"{found['make_node_cpu_s'] / found['sessions'] * 1e3:.2f} ms"
    return table(
        f"{found['sessions']:,} suspended sessions, {found['printing']:,} of them printing 100 bytes a second",
        ("Node memory for each, above the empty node", f"{middle(busy, 'kib_each'):.2f} KiB", "≤ 2 KiB"),
        ("… with none printing", f"{found['quiet_kib_each']:.2f} KiB", "≤ 2 KiB"),
        ("Node memory after a restart", f"{middle(again, 'mib'):.0f} MiB", ""),
        ("Node CPU", f"{middle(busy, 'cpu_share'):.0%} of a core", ""),
        ("Longest pause of the loop (of it, CPU time)", pause(busy), "≤ 50 ms"),
        ("Restart: scan of store and journal", f"{middle(again, 'scan_s'):.2f} s", "≤ 15 s"),
        ("… until it listens, from the start of the process", f"{middle(again, 'listens_s'):.2f} s", ""),
        ("… longest pause while its pods' sessions are taken up (of it, CPU time)", pause(again), "≤ 50 ms"),
        ("Begin, use and leave one session (CPU of the node)", begin, ""),
    )  # fmt: skip


def pause(runs: list[dict[str, Any]]) -> str:
    """Returns the longest pause of several runs."""
    return f"{worst(runs, 'worst_ms'):.0f} ({worst(runs, 'worst_cpu_ms'):.0f}) ms"


def terminal_rows(found: dict[str, Any]) -> list[str]:
    """Returns the table of terminals."""
    return table(
        f"{found['sessions']:,} idle shells (`sterna pod -- bash`), each with a TLS client",
        ("Pod memory for each, besides the shell", f"{found['pod_kib_each']:.1f} KiB", "≤ 64 KiB"),
        ("… with 2,000 lines of scroll-back", f"{found['pod_kib_each_2000_lines']:.1f} KiB", ""),
        ("Node memory for each", f"{found['node_kib_each']:.1f} KiB", "≤ 64 KiB"),
        ("Pod CPU", f"{found['idle_pod_cpu_share']:.1%} of a core", ""),
    )


TABLES = {"live": live_rows, "suspended": suspended_rows, "terminals": terminal_rows}
SCENARIOS = ("live", "suspended", "terminals")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the scenarios that are named (all by default) and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--live", type=int, default=10_000, help="live sessions")
    parser.add_argument("--active", type=int, default=200, help="of these, type")
    parser.add_argument("--rate", type=float, default=4.0, help="keys a second of each active one")
    parser.add_argument("--suspended", type=int, default=100_000)
    parser.add_argument("--terminals", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--results", default=RESULTS, help="directory of the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"there is no scenario {unknown.pop()!r}: choose from {', '.join(SCENARIOS)}")
    found: dict[str, Any] = {}
    machine = about_machine()
    for scenario in options.scenarios:
        if scenario == "live":
            found["live"] = live(options.live, options.active, options.rate, options.seconds, options.samples)
        elif scenario == "suspended":
            found["suspended"] = suspended(options.suspended, 0.01, options.seconds, options.samples)
        else:
            found["terminals"] = terminals(options.terminals)
    text = "\n".join(row for name in found for row in TABLES[name](found[name]))
    write(options.results, "load", "Thousands of sessions on one node", text, found, machine)
    return found


if __name__ == "__main__":
    main()
