"""Measures the remote daemon as its users meet it, beside what the daemon that it replaces was measured to do.

Run as `python bench/remote.py [--daemon CMD] [--mib N] [--only NAME ...]`. Each figure is the median of three runs.
With `--results` they go to bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from report import RESULTS, about_machine, write

SOURCE = Path(__file__).resolve().parent.parent / "src"
TOKEN = "bench"  # noqa: S105 # of daemons that live for seconds
RUNS = 3
PINGS = 2_000
FLOOD = "head -c {bytes} /dev/zero"

# measure: (what the compiled daemon does, target)
BESIDE = {
    "start to first answer": ("33 ms", "200 ms"),
    "ping round trip p50": ("54 µs", "120 µs"),
    "ping round trip p99": ("96 µs", "–"),
    "pings with 64 in flight": ("120,700 /s", "40,000 /s"),
    "spawn of /bin/true to its exit frame": ("0.75 ms", "1.5 ms"),
    "stdout of one process": ("235 MB/s", "300 MB/s"),
    "stdout of eight processes": ("250 MB/s", "300 MB/s"),
    "ping during a flood p99": ("1.5 ms", "1.5 ms"),
    "memory at rest": ("4 MB", "40 MiB"),
    "memory after three floods of 64 MiB": ("284 MB", "120 MiB"),
}


def request(number: int, method: str, **params: object) -> bytes:
    message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params, "auth": TOKEN}
    return json.dumps(message).encode() + b"\n"


class Daemon:
    """A daemon of its own in a fresh directory."""

    def __init__(self, command: list[str]) -> None:
        self.directory = tempfile.mkdtemp(prefix="remote-bench-")
        self.path = self.directory + "/rpc.sock"
        Path(self.directory, "token").write_text(TOKEN)
        environment = {
            **os.environ, "HOME": self.directory, "SHELL": "/bin/sh", "CLAUSTRUM_LOG_LEVEL": "error",
            "PYTHONPATH": os.fspath(SOURCE),
        }  # fmt: skip
        began = time.perf_counter()
        words = [*command, "-serve", "-socket", self.path, "-token-file", self.directory + "/token"]
        subprocess.run(words, env=environment, check=True, cwd=self.directory)
        with self.connect() as sock:
            ask(sock, request(1, "server.ping"))
            self.start_seconds = time.perf_counter() - began
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid = int.from_bytes(credentials[:4], sys.byteorder)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        return sock

    def memory_mib(self) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def close(self) -> None:
        with self.connect() as sock:
            sock.sendall(b'{"jsonrpc":"2.0","method":"server.shutdown"}\n')
            sock.recv(1)
        shutil.rmtree(self.directory, ignore_errors=True)


def ask(sock: socket.socket, line: bytes) -> bytes:
    sock.sendall(line)
    data = b""
    while not data.endswith(b"\n"):
        data += sock.recv(65536)
    return data


def ping_microseconds(sock: socket.socket, count: int) -> list[float]:
    line, times = request(1, "server.ping"), []
    for _ in range(count):
        began = time.perf_counter()
        ask(sock, line)
        times.append((time.perf_counter() - began) * 1e6)
    return sorted(times)


def pings_per_second(sock: socket.socket, count: int = 60_000, flight: int = 64) -> float:
    line, buffer = request(1, "server.ping"), bytearray(1 << 20)
    began, answered = time.perf_counter(), 0
    sock.sendall(line * flight)
    sent = flight
    while answered < count:
        size = sock.recv_into(buffer)
        fresh = buffer.count(b"\n", 0, size)
        answered += fresh
        more = min(fresh, count - sent)
        if more > 0:
            sock.sendall(line * more)
            sent += more
    return count / (time.perf_counter() - began)


def spawn_ms(sock: socket.socket, count: int) -> float:
    times = []
    for number in range(count):
        began = time.perf_counter()
        sock.sendall(request(number, "process.spawn", id=f"t{number}", command="/bin/true"))
        data = b""
        while b'"stream":"exit"' not in data or not data.endswith(b"\n"):
            data += sock.recv(65536)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def flood(sock: socket.socket, size: int, processes: int) -> float:
    """Returns how many million bytes of output a second arrived."""
    buffer, mark, carry = bytearray(1 << 20), b'"stream":"exit"', 0
    view = memoryview(buffer)
    began = time.perf_counter()
    for number in range(processes):
        name = f"f{number}-{began}"
        words = ["-c", FLOOD.format(bytes=size // processes)]
        sock.sendall(request(number, "process.spawn", id=name, command="sh", args=words))
    ended = 0
    while ended < processes or buffer[carry - 1 : carry] != b"\n":
        got = sock.recv_into(view[carry:])
        if got == 0:
            raise SystemExit("the daemon closed the connection")
        end = carry + got
        found = buffer.count(mark, 0, end)
        ended += found
        carry = min(len(mark) - 1, end)  # a mark may be cut by the end of a read
        view[:carry] = view[end - carry : end]
    return size / (time.perf_counter() - began) / 1e6


def flood_pings(daemon: Daemon, size: int) -> float:
    """Returns the 99th percentile of pings on a connection of their own while another one is flooded, in ms."""
    with daemon.connect() as sock, daemon.connect() as other:
        ended = threading.Event()

        def run() -> None:
            flood(sock, size, 1)
            ended.set()

        program = (
            "import socket,sys,time\ns=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1])\n"
            "l=sys.argv[2].encode()+b'\\n';t=[]\n"
            "while len(t)<3000:\n b=time.perf_counter();s.sendall(l);s.recv(65536)\n"
            " t.append(time.perf_counter()-b);time.sleep(0.0003)\n"
            "t.sort();print(t[len(t)*99//100]*1e3)\n"
        )
        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.05)
        line = request(1, "server.ping").decode().strip()
        done = subprocess.run(
            [sys.executable, "-S", "-c", program, daemon.path, line], stdout=subprocess.PIPE, check=True, text=True
        )
        still = not ended.is_set()
        thread.join()
        del other
    if not still:
        print("(the flood ended before the pings did)")
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--daemon", default=f"{sys.executable} -m sterna.remote")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--only", nargs="*", default=list(BESIDE))
    parser.add_argument("--results", action="store_true")
    options = parser.parse_args()
    command, size = shlex.split(options.daemon), options.mib * 2**20
    machine = about_machine()
    figures: dict[str, list[float]] = {}

    def measure(name: str, take: Callable[[], float]) -> None:
        if any(only in name for only in options.only):
            figures.setdefault(name, []).append(take())

    for _ in range(RUNS):
        daemon = Daemon(command)
        try:
            with daemon.connect() as sock:
                measure("start to first answer", lambda daemon=daemon: daemon.start_seconds * 1e3)
                measure("memory at rest", daemon.memory_mib)
                times = ping_microseconds(sock, PINGS)
                measure("ping round trip p50", lambda times=times: times[len(times) // 2])
                measure("ping round trip p99", lambda times=times: times[len(times) * 99 // 100])
                measure("pings with 64 in flight", lambda sock=sock: pings_per_second(sock))
                measure("spawn of /bin/true to its exit frame", lambda sock=sock: spawn_ms(sock, 200))
                measure("stdout of one process", lambda sock=sock: flood(sock, size, 1))
                measure("stdout of eight processes", lambda sock=sock: flood(sock, size, 8))
                measure("ping during a flood p99", lambda daemon=daemon: flood_pings(daemon, size * 6))
        finally:
            daemon.close()
        daemon = Daemon(command)
        try:
            with daemon.connect() as sock:
                for _flood in range(3):
                    flood(sock, 64 * 2**20, 1)
                time.sleep(0.2)
                measure("memory after three floods of 64 MiB", daemon.memory_mib)
        finally:
            daemon.close()
    lines = ["| measure | measured | Go daemon | target |", "|---|---|---|---|"]
    for name, (beside, target) in BESIDE.items():
        if name in figures:
            unit = target.partition(" ")[2] or beside.partition(" ")[2]
            lines.append(f"| {name} | {statistics.median(figures[name]):,.2f} {unit} | {beside} | {target} |")
    if options.results:
        text = f"Medians of {RUNS} runs.\n\n" + "\n".join(lines)
        write(RESULTS, "remote", "The remote daemon", text, figures, machine)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
