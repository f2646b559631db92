"""A client that changes its address, in network namespaces, while 100 numbered lines a second come over QUIC.

Run as a program it is that client: `test_quic_roam STATE HOST PORT QUIC_PORT SECONDS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sterna.client.blocking import connect
from tests.integration.test_quic import QuicRig

LAB = Path(__file__).parents[3] / "shared" / "lab" / "netns.sh"
NAMES = f"quic{os.getpid() % 10_000}"
SUBNET = "10.61.7"
NODE = f"{SUBNET}.11"
CLIENT = f"{NAMES}-h2"
CHANGES = 8

pytestmark = [
    pytest.mark.skipif(not LAB.exists(), reason="needs the network lab beside the project"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    pytest.mark.xdist_group("quic_roam"),
]

AGENT = """
import os, select, time
number, due, rest = 0, time.monotonic(), b""
while True:
    if select.select([0], [], [], max(0, due - time.monotonic()))[0]:
        data = os.read(0, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\\n")
        os.write(1, b"".join(b"E " + line + b"\\n" for line in lines))
    if time.monotonic() >= due:
        os.write(1, b"L %d\\n" % number)
        number, due = number + 1, due + 0.01
"""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuicRig]:
    lab = tmp_path_factory.mktemp("lab")
    words = [os.fspath(LAB), "up", os.fspath(lab), "--prefix", NAMES, "--subnet", SUBNET, "2"]
    subprocess.run(words, check=True, capture_output=True)
    try:
        with QuicRig(NODE) as rig:
            rig.start_pod("both", sys.executable, "-c", AGENT, kind="stream")
            rig.start_quic_node("nsenter", f"--net=/run/netns/{NAMES}-h1")
            yield rig
    finally:
        subprocess.run([os.fspath(LAB), "down", os.fspath(lab)], check=False, capture_output=True)


def test_nothing_is_lost_or_doubled_and_the_echo_is_back_within_50_ms(rig: QuicRig) -> None:
    words = ["nsenter", f"--net=/run/netns/{CLIENT}", sys.executable, "-m", "tests.e2e.test_quic_roam"]
    words += [os.fspath(rig.state), NODE, str(rig.port), str(rig.quic_port), str(1.0 * CHANGES + 1.0)]
    with subprocess.Popen(words, env=rig.env, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "ready\n"
            changes = []
            at = 12
            # New addresses, and the first one again: a peer may come back to where it was.
            for last in (*range(21, 20 + CHANGES), 12):
                changes.append(change(at, last))
                at = last
                time.sleep(0.8)
            found: dict[str, Any] = json.loads(client.stdout.readline())
        finally:
            client.terminate()
    lines, echoes = found["lines"], found["echoes"]
    back = [min(came for sent, came in echoes if sent >= done) - done for done in changes]
    told = [f"{each * 1000:.1f}" for each in back]
    print(f"{len(lines)} lines; echo back after {', '.join(told)} ms; connections used: {found['numbers']}")
    assert lines == list(range(lines[0], lines[0] + len(lines)))
    assert len(lines) >= 700
    assert found["troubles"] == []
    assert len(found["numbers"]) == 1, "every change was a migration, not a resume"
    assert max(back) <= 0.05


def test_a_while_without_any_address_costs_nothing_but_that_while(rig: QuicRig) -> None:
    words = ["nsenter", f"--net=/run/netns/{CLIENT}", sys.executable, "-m", "tests.e2e.test_quic_roam"]
    words += [os.fspath(rig.state), NODE, str(rig.port), str(rig.quic_port), "5.0"]
    with subprocess.Popen(words, env=rig.env, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "ready\n"
            before = json.loads(subprocess.check_output(["ip", "-n", CLIENT, "-json", "-4", "addr", "show", "eth0"]))
            now = before[0]["addr_info"][0]["local"]
            subprocess.run(["ip", "-n", CLIENT, "addr", "del", f"{now}/24", "dev", "eth0"], check=True)
            time.sleep(1.5)
            subprocess.run(["ip", "-n", CLIENT, "addr", "add", f"{SUBNET}.77/24", "dev", "eth0"], check=True)
            done = time.monotonic()
            found: dict[str, Any] = json.loads(client.stdout.readline())
        finally:
            client.terminate()
    lines = found["lines"]
    back = min(came for _, came in found["echoes"] if came >= done) - done
    print(f"{len(lines)} lines; the first echo {back * 1000:.1f} ms after the new address; {found['numbers']}")
    assert lines == list(range(lines[0], lines[0] + len(lines)))
    assert back < 0.5


def change(before: int, after: int) -> float:
    """Gives the client another address; returns when that was done (CLOCK_MONOTONIC, the same in all processes)."""
    batch = f"addr del {SUBNET}.{before}/24 dev eth0\naddr add {SUBNET}.{after}/24 dev eth0\n"
    subprocess.run(["ip", "-n", CLIENT, "-batch", "-"], input=batch, text=True, check=True)
    return time.monotonic()


def run(state: str, host: str, port: int, quic_port: int, seconds: float) -> None:
    os.environ["STERNA_QUIC_PORT"] = str(quic_port)
    os.environ["STERNA_STATE"] = state
    session = connect("both", new=True, state=state, host=host, port=port, timeout=10.0)
    driver = session._driver
    machine = driver.machine
    seen, due = b"", 0.0
    sent_at: dict[int, float] = {}
    lines: list[int] = []
    echoes: list[tuple[float, float]] = []
    numbers: list[int] = []
    start = 0.0
    while not start or time.monotonic() < start + seconds:
        now = time.monotonic()
        if not start and machine.active in driver._quics:
            start = now
            session.events()
            print("ready", flush=True)
        if start and machine.active is not None and machine.active not in numbers:
            numbers.append(machine.active)
        if now >= due:
            due = now + 0.005
            sent_at[len(sent_at)] = now
            session.write(b"%d\n" % (len(sent_at) - 1), timeout=10.0)
        try:
            seen += session.read(timeout=max(due - time.monotonic(), 0.0))
        except TimeoutError:
            continue
        now = time.monotonic()
        *whole, seen = seen.split(b"\n")
        for line in whole:
            kind, _, number = line.partition(b" ")
            if kind == b"L":
                lines.append(int(number))
            else:
                echoes.append((sent_at[int(number)], now))
    troubles = [repr(event) for event in session.events()]
    print(json.dumps({"lines": lines, "echoes": echoes, "numbers": numbers, "troubles": troubles}), flush=True)
    session.abort()


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
