"""A client (quic_roamer.py) that changes its address, in network namespaces, while 100 numbered lines a second come."""

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

from sterna.client.endpoint import WAYS_FILE
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


def start(rig: QuicRig, seconds: float, quic_port: int | None = None) -> subprocess.Popen[str]:
    words = ["nsenter", f"--net=/run/netns/{CLIENT}", sys.executable, "-m", "tests.e2e.quic_roamer"]
    words += [os.fspath(rig.state), NODE, str(rig.port), str(rig.quic_port if quic_port is None else quic_port)]
    env = {name: value for name, value in rig.env.items() if name != "STERNA_QUIC_PORT"}
    return subprocess.Popen([*words, str(seconds)], env=env, stdout=subprocess.PIPE, text=True)


def address() -> str:
    """The client's address now."""
    shown = json.loads(subprocess.check_output(["ip", "-n", CLIENT, "-json", "-4", "addr", "show", "eth0"]))
    found: str = shown[0]["addr_info"][0]["local"]
    return found


def test_nothing_is_lost_or_doubled_and_the_echo_is_back_within_50_ms(rig: QuicRig) -> None:
    with start(rig, 1.0 * CHANGES + 1.0) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "ready\n"
            changes = []
            at = int(address().rpartition(".")[2])
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
    with start(rig, 5.0) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "ready\n"
            subprocess.run(["ip", "-n", CLIENT, "addr", "del", f"{address()}/24", "dev", "eth0"], check=True)
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


def test_a_client_that_moves_goes_over_to_quic(rig: QuicRig) -> None:
    """TCP gets over the first change, and QUIC follows; the second is a migration; another program begins over TCP."""
    (rig.state / "client" / WAYS_FILE).unlink(missing_ok=True)
    with start(rig, 6.0, 0) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "ready\n"
            at = int(address().rpartition(".")[2])
            changes = [change(at, 41)]
            time.sleep(3.0)
            changes.append(change(41, 42))
            found: dict[str, Any] = json.loads(client.stdout.readline())
        finally:
            client.terminate()
    lines = found["lines"]
    back = [min(came for sent, came in found["echoes"] if sent >= done) - done for done in changes]
    print(f"{len(lines)} lines; echo back after {back[0] * 1000:.0f} and {back[1] * 1000:.0f} ms; {found['over']}")
    assert lines == list(range(lines[0], lines[0] + len(lines)))
    assert not found["loaded"], "no start waits for QUIC to be imported"
    assert [over for _, over in found["over"]] == ["tcp", "tcp", "quic"]
    assert back[0] <= 0.2
    assert back[1] <= 0.05
    assert (rig.state / "client" / WAYS_FILE).read_text() == f"{NODE}:{rig.port} quic {rig.quic_port}\n"
    with start(rig, 2.0, 0) as client:
        found = json.loads(client.communicate(timeout=10)[0].splitlines()[-1])
    assert [over for _, over in found["over"]] == ["tcp"], "it stays where a key costs less"


def test_where_tcp_does_not_get_through_any_more_quic_does(rig: QuicRig) -> None:
    """The rest of the network works: the session goes on over QUIC, whose port the node has told."""
    (rig.state / "client" / WAYS_FILE).unlink(missing_ok=True)
    rules = f"table inet cut {{ chain in {{ type filter hook input priority 0; tcp dport {rig.port} drop; }}; }};"
    nft = ["nsenter", f"--net=/run/netns/{NAMES}-h1", "nft"]
    with start(rig, 4.0, 0) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "ready\n"
            time.sleep(1.0)
            subprocess.run([*nft, "-f", "-"], input=rules, text=True, check=True)
            done = time.monotonic()
            found: dict[str, Any] = json.loads(client.stdout.readline())
        finally:
            client.terminate()
            subprocess.run([*nft, "delete", "table", "inet", "cut"], check=True)
    lines = found["lines"]
    back = min(came for sent, came in found["echoes"] if sent >= done) - done
    print(f"{len(lines)} lines; echo back {back * 1000:.0f} ms after TCP was blocked; {found['over']}")
    assert lines == list(range(lines[0], lines[0] + len(lines)))
    assert found["over"][-1][1] == "quic"
    assert back < 2.5


def change(before: int, after: int) -> float:
    """Gives the client another address; returns when that was done (CLOCK_MONOTONIC, the same in all processes)."""
    batch = f"addr del {SUBNET}.{before}/24 dev eth0\naddr add {SUBNET}.{after}/24 dev eth0\n"
    subprocess.run(["ip", "-n", CLIENT, "-batch", "-"], input=batch, text=True, check=True)
    return time.monotonic()
