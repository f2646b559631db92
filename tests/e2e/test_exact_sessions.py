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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from sterna.pod.screen import open_terminal
from sterna.trust.local import read_local_token
from tests.e2e.exact_rig import Duplex, new_seed, size_of
from tests.e2e.exact_speaker import STATUS, text
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
        return self.err.read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def waiting_in(pipe: PipeRun) -> int:
    """How much of its standard input a pipe has not read yet (FIONREAD, pipe(7))."""
    assert pipe.process.stdin is not None
    return int.from_bytes(fcntl.ioctl(pipe.process.stdin, termios.FIONREAD, bytes(4)), sys.byteorder)


@contextlib.contextmanager
def rig_with(agent: str, *command: str, kind: str = "stream") -> Iterator[Rig]:
    with Rig() as rig:
        root = f"{rig.env['PYTHONPATH']}:{HERE.parents[1]}"
        rig.start_pod(agent, *command, kind=kind, env={"PYTHONPATH": root})
        rig.start_node()
        yield rig


def another_device(rig: Rig) -> dict[str, str]:
    """The environment of a device that has a key, a state directory and an access token of its own."""
    state = rig.directory / "device2"
    token = read_local_token(os.fspath(rig.state / "node"))
    assert token is not None
    return {"STERNA_STATE": os.fspath(state), "STERNA_TOKEN": token}


def follow(first: PipeRun, second_from: int, rig: Rig, duplex: Duplex) -> tuple[bytes, int, str]:
    """Leaves on the first device and goes on at the second from a position; returns both outputs as one."""
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    pattern = r"sterna: The session goes on: (\d+) bytes of input were taken, --from-output (\d+) goes on\.\n"
    said = re.fullmatch(pattern, first.said())
    assert said is not None, first.said()
    head = first.out.read_bytes()
    assert len(head) == int(said[2])
    position = str(len(head) + second_from)
    args = ("--name", "moving", "--from-output", position)
    second = PipeRun(rig, "second", duplex.agent, *args, env=another_device(rig))
    with duplex.source.open("rb") as source:
        source.seek(int(said[1]))
        try:
            second.write(source.read())
        except BrokenPipeError:
            print(second.said())
    assert second.process.stdin is not None
    second.process.stdin.close()
    status = second.wait()
    return head + second.out.read_bytes(), status, second.said()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shift", [0, 1], ids=["exact", "control"])
def test_a_second_device_goes_on_where_the_first_left(shift: int) -> None:
    seed, size = new_seed(), size_of(20)
    with Rig() as rig:
        duplex = Duplex(rig, seed, size)
        rig.start_node()
        first = PipeRun(rig, "first", duplex.agent, "--name", "moving")
        sent = size // 3
        with duplex.source.open("rb") as source:
            first.write(source.read(sent))
        while first.size < size // 3:
            time.sleep(0.001)
        whole, status, said = follow(first, shift, rig, duplex)
        duplex.target.write_bytes(whole)
        fault = duplex.fault()
        assert (status, said) == (0, "")
        assert (fault == "") == (shift == 0), fault


def screen_of(written: bytes) -> str:
    """What a terminal of 80 by 24 shows after everything that was written to it."""
    terminal = open_terminal(80, 24)
    terminal.feed(written)
    return terminal.text()


@pytest.mark.timeout(120)
def test_a_frozen_terminal_beside_two_exact_pipes() -> None:
    seed, size = new_seed(), size_of(6)
    expected = b"READY\r\n" + text(str(seed), size) + b"DONE\r\n"
    with rig_with("speak", sys.executable, "-m", "tests.e2e.exact_speaker", str(seed), str(size), kind="pty") as rig:
        pipes = [PipeRun(rig, "one", "speak", "--name", "many")]
        wait_for(lambda: pipes[0].size >= 7, name="the program")
        pipes.append(PipeRun(rig, "two", "speak", "--name", "many", env=another_device(rig)))
        wait_for(lambda: pipes[1].size >= 7, name="the second pipe")
        frozen = rig.terminal("attach", "speak", "--name", "many")
        frozen.expect("READY")
        frozen.process.send_signal(signal.SIGSTOP)
        pipes[0].write(b"g")
        wait_for(lambda: min(pipe.size for pipe in pipes) >= len(expected), 60, name="all output")
        frozen.process.send_signal(signal.SIGCONT)
        frozen.expect("DONE")
        fresh = rig.terminal("attach", "speak", "--name", "many")
        fresh.expect("DONE")

        def same() -> bool:
            for client in (frozen, fresh):
                client.read(0.05)
            # What a terminal shows that saw everything.
            return screen_of(bytes(frozen.seen)) == screen_of(bytes(fresh.seen)) == screen_of(expected)

        wait_for(same, name="the same screen")
        pipes[1].write(b"x")
        assert [pipe.wait() for pipe in pipes] == [STATUS, STATUS]
        assert [pipe.said() for pipe in pipes] == ["", ""]
        digests = {hashlib.sha256(pipe.out.read_bytes()).hexdigest() for pipe in pipes}
        assert digests == {hashlib.sha256(expected).hexdigest()}
        assert frozen.wait() == STATUS
        assert b"bytes of output were overwritten before this terminal got them" in frozen.seen
        assert len(frozen.seen) < len(expected) // 2


def test_a_killed_agent_names_the_uncertain_input_and_is_not_replaced() -> None:
    with Rig() as rig:
        starts = rig.directory / "starts"
        command = ("sh", "-c", f"echo begun >> {starts}; echo up; exec sleep 600")
        rig.start_pod("deaf", *command, kind="stream")
        rig.start_node()
        pipe, away = PipeRun(rig, "pipe", "deaf", "--name", "once"), PipeRun(rig, "away", "deaf", "--name", "away")
        wait_for(lambda: pipe.size >= 3 and away.size >= 3, name="the programs")
        away.process.send_signal(signal.SIGINT)
        assert away.wait() == 128 + signal.SIGINT
        pipe.write(b"x" * 100_000)
        # The program reads nothing: what does not fit into its pipe stays with the pod.
        wait_for(lambda: waiting_in(pipe) == 0, name="the input")
        time.sleep(0.5)
        rig.kill_pod("deaf")
        rig.start_pod("deaf", *command, kind="stream")
        assert pipe.wait() == 1
        # Two frames of 32 KiB fit into a pipe (pipe(7)); the rest was on its way.
        assert "sterna: Input bytes 65536 to 99999 may not have reached the program.\n" in pipe.said()
        again = rig.sterna("pipe", "deaf", "--name", "away")
        assert (again.returncode, again.stdout) == (1, "up\n")
        assert "The session ended: The agent" in again.stderr
        assert starts.read_text() == "begun\nbegun\n"


@pytest.mark.parametrize("kind", ["stream", "pty"])
@pytest.mark.parametrize("kill", [False, True], ids=["node-lives", "node-killed"])
def test_the_last_words_of_a_program_that_ended_alone_are_kept(kind: str, kill: bool) -> None:
    with Rig() as rig:
        go = rig.directory / "go"
        script = f"echo early; until [ -e {go} ]; do sleep 0.05; done; echo late; exit 5"
        rig.start_pod("alone", "sh", "-c", script, kind=kind)
        rig.start_node()
        pipe = PipeRun(rig, "pipe", "alone", "--name", "alone")
        wait_for(lambda: pipe.size >= 6, name="the first words")
        pipe.process.send_signal(signal.SIGINT)
        assert pipe.wait() == 128 + signal.SIGINT
        go.touch()
        node = rig.node
        assert node is not None
        wait_for(lambda: "session ended" in node.output(), name="the end")
        if kill:
            rig.restart_node(kill=True)
        if kind == "pty":
            terminal = rig.terminal("attach", "alone", "--name", "alone")
            terminal.expect("late")
            assert terminal.wait() == 5
        else:
            later = rig.sterna("pipe", "alone", "--name", "alone")
            assert (later.returncode, later.stdout, later.stderr) == (5, "early\nlate\n", "")
