"""One session on several devices, a frozen one among them, and agents that die: nothing lost, doubled or made up."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from sterna.pod.screen import open_terminal
from sterna.trust.local import read_local_token
from tests.e2e.exact_rig import Duplex, new_seed, size_of, start_node
from tests.e2e.exact_speaker import DONE, READY, STATUS, speech
from tests.e2e.rig import Rig, wait_for

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _close_all() -> Iterator[None]:
    yield
    for run in PipeRun.all:
        run.close()
    PipeRun.all.clear()


class PipeRun:
    """A `sterna pipe` whose standard input the test writes and whose output goes to a file; `all` end with the test."""

    all: ClassVar[list[PipeRun]] = []

    def __init__(self, rig: Rig, name: str, *args: str, env: dict[str, str] | None = None) -> None:
        self.out = rig.directory / f"{name}.pipe"
        self.err = rig.directory / f"{name}.said"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                rig.words("pipe", *args, "--host", "127.0.0.1", "--port", str(rig.port)),
                env={**rig.env, **(env or {})}, stdin=subprocess.PIPE, stdout=out, stderr=err,
            )  # fmt: skip
        self.all.append(self)

    @property
    def size(self) -> int:
        return self.out.stat().st_size

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def wait(self, seconds: float = 30.0) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.close()

    def said(self) -> str:
        # A device that is new to the node tells whom it trusts.
        lines = self.err.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("sterna: Trusting "))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def standstill(pipe: PipeRun, beyond: int) -> int:
    """Waits until a pipe has got more than `beyond` and nothing more for half a second; returns how much it has."""
    since, size = time.monotonic(), pipe.size

    def stands() -> bool:
        nonlocal since, size
        if pipe.size != size or size <= beyond:
            since, size = time.monotonic(), pipe.size
        return time.monotonic() - since >= 0.5

    wait_for(stands, 60, name="a standstill")
    return size


def waiting_in(pipe: PipeRun) -> int:
    """How much of its standard input a pipe has not read yet (FIONREAD, pipe(7))."""
    assert pipe.process.stdin is not None
    return int.from_bytes(fcntl.ioctl(pipe.process.stdin, termios.FIONREAD, bytes(4)), sys.byteorder)


def handled(rig: Rig, name: str) -> int:
    """How much input of a session its node knows to be handled, all attachments together."""
    return sum(lane["handled"] for lane in rig.json("info", name)["lanes"])


def another_device(rig: Rig) -> dict[str, str]:
    """The environment of a device that has a key, a state directory and an access token of its own."""
    state = rig.directory / "device2"
    token = read_local_token(os.fspath(rig.state / "node"))
    assert token is not None
    return {"STERNA_STATE": os.fspath(state), "STERNA_TOKEN": token}


def leave_first_device(rig: Rig, duplex: Duplex) -> tuple[bytes, int]:
    """Runs a pipe whose reader stops after a third, and tells it to end; returns its output and how much it took."""
    part = duplex.size // 3
    words = rig.words("pipe", duplex.agent, "--name", "moving", "--host", "127.0.0.1", "--port", str(rig.port))
    with subprocess.Popen(
        words, env=rig.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stderr is not None
        head: list[bytes] = []
        stdout = first.stdout
        reader = threading.Thread(target=lambda: head.append(stdout.read(part)))
        reader.start()
        with duplex.source.open("rb") as source:
            first.stdin.write(source.read(part))
            first.stdin.flush()
        reader.join(30)
        first.send_signal(signal.SIGTERM)
        head.append(stdout.read())
        said = first.stderr.read().decode()
        assert first.wait(10) == 128 + signal.SIGTERM
    pattern = r"sterna: The session goes on: (\d+) bytes of input were taken, --from-output (\d+) goes on\.\n"
    where = re.fullmatch(pattern, said)
    assert where is not None, said
    whole = b"".join(head)
    assert len(whole) == int(where[2])
    return whole, int(where[1])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shift", [0, -1], ids=["exact", "control"])
def test_a_second_device_goes_on_where_the_first_left(shift: int) -> None:
    seed, size = new_seed(), size_of(12 if shift else 50)
    with Rig() as rig:
        duplex = Duplex(rig, seed, size)
        rig.start_node()
        head, taken = leave_first_device(rig, duplex)
        args = ("--name", "moving", "--from-output", str(len(head) + shift))
        second = PipeRun(rig, "second", duplex.agent, *args, env=another_device(rig))
        with duplex.source.open("rb") as source:
            source.seek(taken)
            second.write(source.read())
        assert second.process.stdin is not None
        second.process.stdin.close()
        assert (second.wait(), second.said()) == (0, "")
        duplex.target.write_bytes(head + second.out.read_bytes())
        fault = duplex.fault()
        print(f"{size / 1e6:.0f} MB each way on two devices; left after {taken} in, {len(head)} out: {fault}")
        assert (fault == "") == (shift == 0), fault


def screen_of(written: bytes) -> str:
    """What a terminal of 80 by 24 shows after everything that was written to it."""
    terminal = open_terminal(80, 24)
    terminal.feed(written)
    return terminal.text()


class Seen:
    """What two exact pipes and a terminal that was frozen got of a session, and what was to be got."""

    def __init__(self, pipes: list[PipeRun], frozen: bytes, expected: bytes) -> None:
        self.digests = [hashlib.sha256(pipe.out.read_bytes()).hexdigest() for pipe in pipes]
        self.digest = hashlib.sha256(expected).hexdigest()
        self.statuses = [pipe.process.returncode for pipe in pipes]
        self.said = [pipe.said() for pipe in pipes]
        self.frozen = frozen
        self.expected = expected


def tail_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 100, 0))
        return file.read()


def freeze_one_of_three(broken: str = "") -> Seen:
    seed, size = new_seed(), size_of(6 if broken else 50)
    expected = READY + speech(str(seed), size) + DONE
    with Rig() as rig:
        command = [sys.executable, "-m", "tests.e2e.exact_speaker", str(seed), str(size)]
        root = f"{rig.env['PYTHONPATH']}:{HERE.parents[1]}"
        rig.start_pod("speak", *command, kind="pty", env={"PYTHONPATH": root})
        start_node(rig, broken=broken)
        pipes = [PipeRun(rig, "one", "speak", "--name", "many")]
        wait_for(lambda: pipes[0].size >= len(READY), name="the program")
        pipes.append(PipeRun(rig, "two", "speak", "--name", "many", env=another_device(rig)))
        wait_for(lambda: pipes[1].size >= len(READY), name="the second pipe")
        frozen = rig.terminal("attach", "speak", "--name", "many")
        frozen.expect("READY")
        frozen.process.send_signal(signal.SIGSTOP)
        # The second pipe stands still for a moment, which holds the agent, not the bytes.
        pipes[1].process.send_signal(signal.SIGSTOP)
        pipes[0].write(b"g")
        if broken == "nobody-paces":
            wait_for(lambda: pipes[0].size >= len(expected), 60, name="all output at the first pipe")
        else:
            assert standstill(pipes[0], len(READY)) < len(expected)
        pipes[1].process.send_signal(signal.SIGCONT)
        wait_for(lambda: all(DONE in tail_of(pipe.out) for pipe in pipes), 60, name="all output")
        frozen.process.send_signal(signal.SIGCONT)
        frozen.expect("DONE")
        goal = screen_of(expected)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: frozen.read(0.05) + b"x" and screen_of(bytes(frozen.seen)) == goal, 3.0)
        shown = bytes(frozen.seen)
        pipes[1].write(b"x")
        for pipe in pipes:
            pipe.wait()
        assert frozen.wait() == STATUS
        assert b"bytes of output were overwritten before this terminal got them" in frozen.seen
        return Seen(pipes, shown, expected)


@pytest.mark.timeout(120)
def test_a_frozen_terminal_beside_two_exact_pipes() -> None:
    seen = freeze_one_of_three()
    assert seen.digests == [seen.digest] * 2
    assert seen.statuses == [STATUS] * 2
    assert seen.said == ["", ""]
    assert screen_of(seen.frozen) == screen_of(seen.expected)
    assert "THE HEADER STAYS" in screen_of(seen.frozen)
    assert len(seen.frozen) < len(seen.expected) // 2


@pytest.mark.timeout(120)
def test_control_without_a_snapshot_the_screen_is_wrong() -> None:
    seen = freeze_one_of_three("no-snapshot")
    assert seen.digests == [seen.digest] * 2
    assert screen_of(seen.frozen) != screen_of(seen.expected)


@pytest.mark.timeout(120)
def test_control_without_pace_the_exact_ones_lose_output() -> None:
    seen = freeze_one_of_three("nobody-paces")
    assert seen.digests[1] != seen.digest
    assert "were overwritten before they could be read" in seen.said[1]


@pytest.mark.parametrize("broken", ["", "pretend-handled"], ids=["exact", "control"])
def test_a_killed_agent_names_the_uncertain_input_and_is_not_replaced(broken: str) -> None:
    with Rig() as rig:
        starts = rig.directory / "starts"
        command = ("sh", "-c", f"echo begun >> {starts}; echo up; exec sleep 600")
        rig.start_pod("deaf", *command, kind="stream")
        start_node(rig, broken=broken)
        pipe, away = PipeRun(rig, "pipe", "deaf", "--name", "once"), PipeRun(rig, "away", "deaf", "--name", "away")
        wait_for(lambda: pipe.size >= 3 and away.size >= 3, name="the programs")
        away.process.send_signal(signal.SIGINT)
        assert away.wait() == 128 + signal.SIGINT
        pipe.write(b"x" * 100_000)
        # The program reads nothing: what does not fit into its pipe stays with the pod.
        wait_for(lambda: waiting_in(pipe) == 0, name="the input")
        wait_for(lambda: handled(rig, "once") >= 65_536, name="what fits into the program's pipe")
        rig.kill_pod("deaf")
        rig.start_pod("deaf", *command, kind="stream")
        assert pipe.wait() == 1
        # Two frames of 32 KiB fit into a pipe (pipe(7)); the rest was on its way.
        named = "sterna: Input bytes 65536 to 99999 may not have reached the program.\n" in pipe.said()
        assert named == (not broken), pipe.said()
        again = rig.sterna("pipe", "deaf", "--name", "away")
        assert (again.returncode, again.stdout) == (1, "up\n")
        assert "The session ended: The agent" in again.stderr
        assert starts.read_text() == "begun\nbegun\n"


@contextlib.contextmanager
def ended_alone(kind: str, broken: str = "") -> Iterator[Rig]:
    """A session whose program wrote its last words and ended with status 5 while nobody was attached."""
    with Rig() as rig:
        go = rig.directory / "go"
        begun = f"echo begun >> {rig.directory / 'starts'}"
        script = f"{begun}; echo early; until [ -e {go} ]; do sleep 0.05; done; echo late; exit 5"
        rig.start_pod("alone", "sh", "-c", script, kind=kind)
        node = start_node(rig, broken=broken)
        pipe = PipeRun(rig, "pipe", "alone", "--name", "alone")
        wait_for(lambda: pipe.size >= 6, name="the first words")
        pipe.process.send_signal(signal.SIGINT)
        assert pipe.wait() == 128 + signal.SIGINT
        go.touch()
        wait_for(lambda: "session ended" in node.output(), name="the end")
        yield rig


@pytest.mark.parametrize("kind", ["stream", "pty"])
@pytest.mark.parametrize("kill", [False, True], ids=["node-lives", "node-killed"])
def test_the_last_words_of_a_program_that_ended_alone_are_kept(kind: str, kill: bool) -> None:
    with ended_alone(kind) as rig:
        if kill:
            rig.kill_node()
            start_node(rig)
        if kind == "pty":
            terminal = rig.terminal("attach", "alone", "--name", "alone")
            terminal.expect("late")
            assert terminal.wait() == 5
        else:
            later = rig.sterna("pipe", "alone", "--name", "alone")
            assert (later.returncode, later.stdout, later.stderr) == (5, "early\nlate\n", "")
        assert (rig.directory / "starts").read_text() == "begun\n"


def test_control_a_node_that_forgets_ends_is_caught() -> None:
    with ended_alone("stream", "forget-ends") as rig:
        later = rig.sterna("pipe", "alone", "--name", "alone")
        # It looks the same, but it is another program.
        assert (later.returncode, later.stdout) == (5, "early\nlate\n")
        assert (rig.directory / "starts").read_text() == "begun\nbegun\n"
