"""What the tests of exactness share: a rig with a duplex program, a proxy that cuts by bytes, and the verdict."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.exact_duplex import stream
from tests.e2e.proxy import CutProxy, _Pair
from tests.e2e.rig import STOP_SECONDS, Daemon, Rig, wait_for

HERE = Path(__file__).parent
MEGABYTE = 1_000_000
FULL = os.environ.get("STERNA_EXACT_MB")
"""The size in megabytes each way, in place of each test's own."""


def size_of(short: int) -> int:
    """Returns how many bytes go each way: so many megabytes, or STERNA_EXACT_MB."""
    return int(float(FULL or short) * MEGABYTE)


def new_seed() -> int:
    """A seed, printed so that a failure can be repeated: STERNA_EXACT_SEED takes it."""
    seed = int(os.environ.get("STERNA_EXACT_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"STERNA_EXACT_SEED={seed}")
    return seed


class ByteCutProxy(CutProxy):
    """Cuts all connections after random numbers of bytes, `mean` on average, `most` times; by reset or by close."""

    def __init__(self, target: int, seed: int, mean: int, most: int) -> None:
        self._rng = random.Random(seed)
        self._mean = mean
        self._most = most
        self._at = self._later_at(0)
        super().__init__(target)

    def _later_at(self, now: int) -> int:
        return now + self._rng.randrange(1, 2 * self._mean)

    def _write(self, pair: _Pair) -> None:
        if pair not in self._pairs:
            return
        super()._write(pair)
        passed = self.bytes_up + self.bytes_down
        if passed >= self._at and self.cuts < self._most:
            self._cut_all(self._rng.random() < 0.7)
            self._at = self._later_at(passed)


class Duplex:
    """A `stream` pod with the duplex program, the files of a transfer with it, and the verdict about them."""

    def __init__(self, rig: Rig, seed: int, size: int, agent: str = "duplex") -> None:
        self.rig = rig
        self.seed = seed
        self.size = size
        self.agent = agent
        self.source = rig.directory / f"{agent}-in"
        self.target = rig.directory / f"{agent}-out"
        self.notes = rig.directory / f"{agent}-notes"
        self.notes.touch()
        self._helpers: tuple[subprocess.Popen[bytes], ...] = ()
        self._digests = {side: hashlib.sha256() for side in ("in", "out")}
        with self.source.open("wb") as file:
            for block in stream(f"{seed}-in", size):
                file.write(block)
                self._digests["in"].update(block)
        for block in stream(f"{seed}-out", size):
            self._digests["out"].update(block)
        rig.start_pod(agent, sys.executable, os.fspath(HERE / "exact_duplex.py"), str(seed), str(size), kind="stream")

    def words(self, port: int, *args: str, broken: str = "") -> list[str]:
        """The words of `sterna pipe` over TCP, run by the helper that keeps notes."""
        helper = [sys.executable, "-m", "tests.e2e.exact_pipe", os.fspath(self.notes), broken]
        return [*helper, "pipe", self.agent, "--host", "127.0.0.1", "--port", str(port), *args]

    def files(self) -> list[str]:
        return ["--in", os.fspath(self.source), "--out", os.fspath(self.target)]

    def start(self, words: list[str], *, streams: bool) -> subprocess.Popen[bytes]:
        """Starts a pipe; with `streams` its standard streams are the files of this transfer."""
        env = {**self.rig.env, "PYTHONPATH": f"{self.rig.env['PYTHONPATH']}:{HERE.parents[1]}"}
        if not streams:
            return subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        with self.source.open("rb") as source, self.target.open("wb") as target:
            # Through pipes, as in a shell: nothing there can be read twice or sought.
            feeder = subprocess.Popen(["cat"], stdin=source, stdout=subprocess.PIPE)
            eater = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=target)
            pipe = subprocess.Popen(words, env=env, stdin=feeder.stdout, stdout=eater.stdin, stderr=subprocess.PIPE)
            for end in (feeder.stdout, eater.stdin):
                assert end is not None
                end.close()
        self._helpers = (feeder, eater)
        return pipe

    def finish(self, pipe: subprocess.Popen[bytes], seconds: float) -> str:
        """Waits for a pipe's end; returns what it said on standard error, and whether it had to be killed."""
        try:
            _, said = pipe.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            pipe.kill()
            _, said = pipe.communicate(timeout=STOP_SECONDS)
            said += b"it did not end\n"
        for helper in self._helpers:
            helper.wait(STOP_SECONDS)
        return said.decode()

    def fault(self) -> str:
        """Compares both directions by SHA-256; returns what is wrong, "" if nothing is."""
        data = self.target.read_bytes()
        body, trailer = data[: self.size], data[self.size :].decode(errors="replace")
        if hashlib.sha256(body).hexdigest() != self._digests["out"].hexdigest():
            return f"the output differs ({len(data)} bytes for {self.size}, then {trailer[:100]!r})"
        expected = f"\nread {self.size} sha256 {self._digests['in'].hexdigest()} wrong -1\n"
        return "" if trailer == expected else f"the input differs: {trailer[:200]!r} instead of {expected!r}"

    def cuts(self) -> tuple[int, int]:
        """How often the client lost a connection, and how often with unacknowledged bytes in both directions.

        The client notes what it sent and the node had not acknowledged, the node what it sent and the client had not.
        """
        up, down = (path.read_text().split() for path in (self.notes, node_notes(self.rig)))
        return len(up), sum(int(sent) > 0 and int(got) > 0 for sent, got in zip(up, down, strict=False))


def node_notes(rig: Rig) -> Path:
    """Where the node of `start_node` notes what was unacknowledged when an attachment ended."""
    return rig.directory / "node-notes"


def start_node(rig: Rig, *, die: str = "", broken: str = "") -> Daemon:
    """Starts the node by `exact_node.py` instead of `sterna up`; returns once it listens, or died as told."""
    words = [
        sys.executable,
        os.fspath(HERE / "exact_node.py"),
        os.fspath(rig.state),
        os.fspath(rig.sockets),
        str(rig.port),
    ]
    env = {**rig.env, "EXACT_NODE_NOTES": os.fspath(node_notes(rig)), "EXACT_DIE": die, "EXACT_BREAK": broken}
    node = rig.node = Daemon(words, env, rig.directory / "node.log")
    wait_for(lambda: node.first_line() or not node.running, name="the node")
    return node


def elapsed(start: float) -> str:
    return f"{time.monotonic() - start:.1f} s"
