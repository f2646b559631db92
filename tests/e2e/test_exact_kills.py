"""Many megabytes each way at once while the node, or the client, is killed, also at the worst points."""

from __future__ import annotations

import random
import subprocess
import time

import pytest

from tests.e2e.exact_rig import Duplex, elapsed, new_seed, size_of, start_node
from tests.e2e.rig import Daemon, Rig, _children

KILLS = 20
POINTS = ("append", "journalled", "write", "written", "input")
"""Before and after output is journalled, before and after bytes leave for anybody, after input was passed on."""


def progress(duplex: Duplex) -> int:
    return duplex.target.stat().st_size if duplex.target.exists() else 0


def wait_beyond(duplex: Duplex, position: int, pipe: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits until so many bytes of output have arrived, or the pipe has ended; False when it takes too long."""
    deadline = time.monotonic() + seconds
    while progress(duplex) < position and pipe.poll() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def died(node: Daemon, pipe: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits until a node has died by itself, or the pipe has ended; returns whether the node died."""
    deadline = time.monotonic() + seconds
    while node.running and pipe.poll() is None:
        assert time.monotonic() < deadline, "the node neither died nor brought the transfer to its end"
        time.sleep(0.002)
    return not node.running


def kill_nodes(short: int, *, broken: str = "", seconds: float = 600.0) -> tuple[str, int, int]:
    """Kills the node at random moments and at chosen points; returns fault, exit status and number of kills."""
    seed, size = new_seed(), size_of(short)
    rng = random.Random(seed)
    kills = dict.fromkeys((*POINTS, "random"), 0)
    with Rig() as rig:
        duplex = Duplex(rig, seed, size)
        start_node(rig)
        start = time.monotonic()
        pipe = duplex.start(duplex.words(rig.port), streams=True)
        for number in range(1, KILLS + 1):
            wait_beyond(duplex, size * number // (KILLS + 2), pipe, seconds)
            if pipe.poll() is not None:
                break
            assert rig.node is not None
            rig.node.kill()
            kills["random"] += 1
            if number % 2 and not broken:
                # This node dies at a point that the test chose, before the next one may live for a while.
                point = POINTS[number // 2 % len(POINTS)]
                rig.node = start_node(rig, die=f"{point}:{rng.randrange(1, 60)}", broken=broken)
                if not died(rig.node, pipe, seconds):
                    break  # the transfer was over before that point was reached so often
                kills[point] += 1
            start_node(rig, broken=broken)
        said = duplex.finish(pipe, seconds)
        fault = duplex.fault()
        count = sum(kills.values())
        took = elapsed(start)
        print(f"{size / 1e6:.0f} MB each way in {took}: {count} kills of the node ({kills}); {said[-1200:]} {fault}")
        return fault or said, pipe.returncode, count


@pytest.mark.timeout(900)
def test_every_byte_arrives_once_while_the_node_is_killed() -> None:
    fault, status, kills = kill_nodes(50)
    assert fault == ""
    assert status == 0
    assert kills >= KILLS


@pytest.mark.timeout(120)
def test_control_a_node_that_acknowledges_before_the_journal_is_caught() -> None:
    fault, _, _ = kill_nodes(20, broken="acknowledge-first", seconds=15.0)
    assert fault != ""


def kill_clients(short: int, least: int, *, broken: str = "", seconds: float = 600.0) -> tuple[str, int, int]:
    """Kills the client at random moments and starts it again with the same files; returns fault, status and kills."""
    seed, size = new_seed(), size_of(short)
    rng = random.Random(seed)
    said, kills = "", 0
    with Rig() as rig:
        duplex = Duplex(rig, seed, size)
        start_node(rig)
        start = time.monotonic()
        while True:
            pipe = duplex.start(duplex.words(rig.port, *duplex.files(), broken=broken), streams=False)
            if kills < least:
                # Also before it has connected: then the same request comes again.
                if kills < 4:
                    time.sleep(rng.uniform(0.02, 0.14))
                else:
                    wait_beyond(duplex, size * kills // (least + 2) + rng.randrange(size // 50), pipe, seconds)
            if kills >= least or pipe.poll() is not None:
                break
            pipe.kill()
            said += pipe.communicate()[1].decode()
            if pipe.returncode == 0:
                break
            kills += 1
        said += duplex.finish(pipe, seconds)
        fault = duplex.fault()
        if not (fault or broken):
            assert rig.node is not None
            ended = rig.node.output().count("session ended")
            left = _children(rig.pods[duplex.agent].pid)
            fault = "" if ended == 1 and not left else f"{ended} sessions ended, the programs {left} still run"
            fault = fault or (
                "the record is left" if (rig.directory / f".{duplex.target.name}.sterna").exists() else ""
            )
        print(f"{size / 1e6:.0f} MB each way in {elapsed(start)}: {kills} kills of the client; {said[-1200:]} {fault}")
        return fault or said, pipe.returncode, kills


@pytest.mark.timeout(900)
def test_every_byte_arrives_once_while_the_client_is_killed() -> None:
    fault, status, kills = kill_clients(50, 15)
    assert fault == ""
    assert status == 0
    assert kills >= 10


@pytest.mark.timeout(120)
def test_control_a_client_that_acknowledges_before_it_writes_is_caught() -> None:
    # It loses something only if it is killed between the two: one of a few runs has to show it.
    assert any(kill_clients(10, 6, broken="early", seconds=15.0)[0] for _ in range(6))
