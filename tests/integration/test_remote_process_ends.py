"""Signals, waits and ends of processes, in the test's own process: nothing here takes the seconds that it is about."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sterna.limits import (
    REMOTE_DRAIN_SECONDS,
    REMOTE_FILE_WATCHES_MAX,
    REMOTE_KILL_WAIT_MAX_MS,
    REMOTE_KILL_WAIT_MS,
    REMOTE_REAP_SECONDS,
    REMOTE_RETENTION_SECONDS,
    REMOTE_SWEEP_SECONDS,
)
from sterna.remote import filewatch
from sterna.remote import process as process_module
from sterna.remote.child import Child
from tests.integration.inprocess_rig import Inside
from tests.integration.remote_rig import Client, alive, until

NOT_RUNNING = {"code": -32602, "message": "Process not running"}


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    with Inside(tmp_path) as running:
        yield running


@pytest.fixture
def client(inside: Inside) -> Iterator[Client]:
    with inside.connect() as connected:
        yield connected


class Other:
    """A second process in a script: it copies what it is told, so that its answer shows that no signal is on its way.

    Parameters: `output`, where what it is told goes to; `escaped`, whether it has a process group of its own.
    """

    def __init__(self, directory: Path, output: str = "", *, escaped: bool = False) -> None:
        self._in, self._out = directory / "in", directory / "out"
        for fifo in (self._in, self._out):
            os.mkfifo(fifo)
        self._feed, self._answer = (os.open(fifo, os.O_RDWR | os.O_NONBLOCK) for fifo in (self._in, self._out))
        self._pid_file = directory / "other"
        start = "setsid cat" if escaped else "cat"
        self.script = f"{start} <{self._in} {output or f'>{self._out} 2>&1'} & echo $! >{self._pid_file}; "

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._feed)
        os.close(self._answer)
        if alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)

    @property
    def pid(self) -> int:
        return int(self._pid_file.read_text())

    def tell(self, data: bytes) -> None:
        os.write(self._feed, data)

    def end(self) -> None:
        """Has it read the end of its input."""
        os.kill(self.pid, signal.SIGKILL)

    def answers(self) -> bool:
        self.tell(b"?")
        ready, _, _ = select.select([self._answer], [], [], 5)
        return bool(ready) and os.read(self._answer, 1) == b"?"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def start(client: Client, name: str, script: str) -> int:
    pid: int = client.ask("process.spawn", id=name, command="sh", args=["-c", script], wantPid=True)["pid"]
    return pid


def output(frames: list[Any]) -> bytes:
    return b"".join(base64.b64decode(frame["data"]) for frame in frames if frame["stream"] == "stdout")


def ready(client: Client) -> None:
    assert base64.b64decode(json.loads(client.line())["data"]) == b"ready\n"


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["TERM", "SIGHUP", "INT", "", "9"])
@pytest.mark.parametrize("method", ["process.kill", "process.killAndWait"])
def test_only_kill_is_for_the_whole_group(client: Client, tmp_path: Path, name: str, method: str) -> None:
    with Other(tmp_path) as other:
        start(client, "p", other.script + "echo ready; read x")
        ready(client)
        client.post(method, 1, id="p", signal=name, escalate=False)
        assert client.frames_to_exit("p")[-1]["exitCode"] == -1
        assert other.answers()


@pytest.mark.parametrize("method", ["process.kill", "process.killAndWait"])
def test_kill_is_for_the_whole_group(client: Client, tmp_path: Path, method: str) -> None:
    with Other(tmp_path) as other:
        start(client, "p", other.script + "echo ready; read x")
        ready(client)
        assert client.ask(method, id="p", signal="KILL", escalate=False)
        until(lambda: not alive(other.pid), "the other one is killed, too")


def test_nothing_is_sent_once_the_child_has_exited(inside: Inside, client: Client, tmp_path: Path) -> None:
    """Another one of its group still holds its output, so it counts as running."""
    with Other(tmp_path, output=f"| tee {tmp_path}/out") as other:
        pid = start(client, "p", other.script)
        until(lambda: not alive(pid), "the child has exited")
        assert client.ask("process.kill", id="p", signal="KILL") == {"success": True}
        client.post("process.killAndWait", 2, id="p", signal="KILL", escalate=False, timeoutMs=5)
        assert json.loads(client.line())["result"] == {"found": True, "died": False}
        assert other.answers()
        inside.ring(REMOTE_DRAIN_SECONDS)
        assert client.frames_to_exit("p")[-1]["exitCode"] == 0


def test_an_id_used_again_kills_the_whole_old_group(client: Client, tmp_path: Path) -> None:
    with Other(tmp_path) as other:
        start(client, "p", other.script + "echo ready; read x")
        ready(client)
        start(client, "p", "true")
        until(lambda: not alive(other.pid), "the other one is killed, too")


# ---------------------------------------------------------------------------------------------------------------- waits


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [(None, REMOTE_KILL_WAIT_MS / 1000), (0, 3.0), (-5, 3.0), (2_500, 2.5), (30_000, 30.0), (30_001, 30.0),
     (2**63 - 1, REMOTE_KILL_WAIT_MAX_MS / 1000)],
)  # fmt: skip
def test_how_long_an_end_is_waited_for(inside: Inside, client: Client, asked: int | None, seconds: float) -> None:
    start(client, "p", "trap '' TERM; echo ready; read x")
    ready(client)
    client.post("process.killAndWait", 1, id="p", timeoutMs=asked, escalate=False)
    inside.ring(seconds)
    assert json.loads(client.line())["result"] == {"found": True, "died": False}


def test_escalation_kills_the_whole_group_and_its_end_is_waited_for(
    inside: Inside, client: Client, tmp_path: Path
) -> None:
    with Other(tmp_path, output=">/dev/stdout") as other:
        start(client, "p", "trap '' TERM; " + other.script + "echo ready; read x")
        ready(client)
        client.post("process.killAndWait", 1, id="p", timeoutMs=5)
        assert client.frames_to_exit("p")[-1]["exitCode"] == -1, "though another one held the output"
        assert json.loads(client.line())["result"] == {"found": True, "died": True, "escalated": True}
        assert not inside.waits(REMOTE_REAP_SECONDS)


def test_an_escalation_that_does_not_help_is_told_after_seven_seconds(
    inside: Inside, client: Client, tmp_path: Path
) -> None:
    with Other(tmp_path, output=">/dev/stdout", escaped=True) as other:
        start(client, "p", "trap '' TERM; " + other.script + "echo ready; read x")
        ready(client)
        client.post("process.killAndWait", 1, id="p", timeoutMs=5)
        inside.ring(7.0)
        assert json.loads(client.line())["result"] == {"found": True, "died": False, "escalated": True}
        inside.ring(REMOTE_DRAIN_SECONDS)
        assert client.frames_to_exit("p")[-1]["exitCode"] == -1
        assert alive(other.pid)


# ----------------------------------------------------------------------------------------------- outputs that stay open


def stalled(inside: Inside, client: Client, script: str) -> int:
    """Starts a process with more output than the client takes, and waits until it is held up."""
    pid = start(client, "p", script + f"exec head -c {4 << 20} /dev/zero")
    process = inside.processes.get("p")
    assert process is not None
    until(lambda: process._paused, "the process is held up")
    return pid


def in_pipe(inside: Inside) -> int:
    process = inside.processes.get("p")
    assert process is not None
    return int.from_bytes(fcntl.ioctl(process.child.output(0), termios.FIONREAD, bytes(4)), sys.byteorder)


def test_what_comes_before_outputs_are_closed_is_kept(inside: Inside, client: Client, tmp_path: Path) -> None:
    with Other(tmp_path, output=">/dev/stdout", escaped=True) as other, inside.connect() as second:
        pid = stalled(inside, client, other.script)
        os.kill(pid, signal.SIGKILL)
        until(lambda: inside.waits(REMOTE_DRAIN_SECONDS), "its end is noticed")
        other.tell(b"last words")
        until(lambda: in_pipe(inside) == 10, "they are in the pipe")
        inside.ring(REMOTE_DRAIN_SECONDS)
        assert second.ask("process.stdin", id="p", data="") == NOT_RUNNING
        _, frames = second.reply("process.reattach", id="p", fromSeq=0)
        assert output(frames).endswith(b"\0last words")
        assert frames[-1]["stream"] == "exit"


def test_a_replaced_process_that_was_held_up_ends_when_its_output_does(
    inside: Inside, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Other(tmp_path, output=">/dev/stdout", escaped=True) as other, inside.connect() as second:
        pid = stalled(inside, client, other.script)
        start(second, "p", "read x")
        until(lambda: not alive(pid), "the old one is killed")
        assert inside.do(inside.processes.alive) == 2, "its output is open yet"
        killed: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(Child, "kill_group", lambda child: killed.append(child.pid))
            inside.do(inside.processes.kill_all)
        assert pid in killed
        assert len(killed) == 2
        other.end()
        until(lambda: not Path(f"/proc/{pid}").exists(), "the old one is reaped")
        assert inside.do(inside.processes.alive) == 1


def test_a_process_that_was_held_up_goes_on_when_its_client_is_gone(inside: Inside, client: Client) -> None:
    stalled(inside, client, "")
    assert "frameSink" not in inside.log.read_text()
    client.sock.close()
    with inside.connect() as second:
        until(lambda: second.ask("process.stdin", id="p", data="") == NOT_RUNNING, "it comes to its end")
    assert "WARN  [frameSink] write failed, detaching: write: broken pipe\n" in inside.log.read_text()


# ---------------------------------------------------------------------------------------------------------------- input


@pytest.fixture
def small_queue(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Makes the input queue small, and returns input that fills it together with the pipe."""
    monkeypatch.setattr(process_module, "REMOTE_STDIN_QUEUE_BYTES", 10_000)
    return bytes(100_000)


def test_blocked_input_is_answered_when_its_process_ends(client: Client, tmp_path: Path, small_queue: bytes) -> None:
    """Another one still has the input open, so there is nothing else that would end the wait."""
    with Other(tmp_path, escaped=True) as other:
        start(client, "p", "exec 3<&0; " + other.script + "echo ready; exec sleep 300")
        ready(client)
        assert client.ask("process.stdin", id="p", data=b64(small_queue))["success"]
        client.post("process.stdin", 2, id="p", data=b64(small_queue))
        client.post("process.closeStdin", 3, id="p")
        client.post("process.stdin", 4, id="q", data="")
        client.post("process.kill", 5, id="p", signal="KILL")
        assert json.loads(client.line())["id"] == 5
        assert client.frames_to_exit("p")[-1]["exitCode"] == -1
        errors = [json.loads(client.line()) for _ in range(3)]
        assert [(error["id"], error["error"]["message"]) for error in errors] == [
            (2, "Process not running"), (3, "Process not running"), (4, "Process not found"),
        ]  # fmt: skip


def test_the_end_of_input_keeps_its_place(client: Client, tmp_path: Path, small_queue: bytes) -> None:
    start(client, "p", f"echo ready; until [ -e {tmp_path}/go ]; do sleep 0.005; done; wc -c")
    ready(client)
    client.post("process.stdin", 1, id="p", data=b64(small_queue))
    client.post("process.stdin", 2, id="p", data=b64(small_queue))
    client.post("process.closeStdin", 3, id="p")
    client.post("process.stdin", 4, id="p", data=b64(b"late"))
    client.post("server.ping", 5)
    assert [json.loads(client.line())["id"] for _ in range(2)] == [1, 5]
    (tmp_path / "go").touch()
    frames: list[Any] = []
    replies: list[Any] = []
    while len(frames) < 2 or len(replies) < 3:
        message = json.loads(client.line())
        (frames if "type" in message else replies).append(message)
    assert [reply["id"] for reply in replies] == [2, 3, 4]
    assert replies[1]["result"] == {"success": True, "applied": 2 * len(small_queue)}
    assert replies[2]["error"]["message"] == "Process stdin is closed"
    assert output(frames).strip() == b"200000"


def test_blocked_input_of_a_connection_that_is_gone_is_dropped(
    inside: Inside, tmp_path: Path, small_queue: bytes
) -> None:
    with inside.connect() as client:
        start(client, "p", f"echo ready; until [ -e {tmp_path}/go ]; do sleep 0.005; done; cat >/dev/null")
        ready(client)
        start(client, "q", "cat")
        assert client.ask("process.stdin", id="p", data=b64(small_queue))["success"]
        client.post("process.stdin", 2, id="p", data=b64(small_queue))
        client.post("process.stdin", 3, id="q", data=b64(b"behind it"))
        client.post("server.ping", 4)
        assert json.loads(client.line())["id"] == 4
    with inside.connect() as second:
        until(lambda: inside.log.read_text().count("Connection closed") == 1, "its end is noticed")
        (tmp_path / "go").touch()
        # What is sent now comes after everything that waited.
        assert second.ask("process.stdin", id="p", data=b64(small_queue))["applied"] == 2 * len(small_queue)
        assert second.ask("process.reattach", id="q", fromSeq=0)["stdinApplied"] == 0


# ------------------------------------------------------------------------------------------------------------ retention


def test_exited_processes_are_swept_by_the_clock_and_by_spawns(inside: Inside, client: Client) -> None:
    def ended(name: str) -> None:
        start(client, name, "exit 3")
        client.frames_to_exit(name)
        process = inside.processes.get(name)
        assert process is not None
        process.ended_at -= REMOTE_RETENTION_SECONDS + 1

    for _ in range(2):
        ended("old")
        assert client.ask("process.reattach", id="old", fromSeq=9)["found"]
        inside.ring(REMOTE_SWEEP_SECONDS)
        assert not client.ask("process.reattach", id="old", fromSeq=9)["found"]
    ended("older")
    start(client, "new", "read x")
    assert not client.ask("process.reattach", id="older", fromSeq=9)["found"]
    assert client.ask("process.reattach", id="new", fromSeq=9)["found"]
    lines = inside.log.read_text().splitlines()
    told = [line.split(" ", 2)[2] for line in lines if "Pruned" in line]
    assert told == [f"INFO  [process.Manager] Pruned exited process {name}" for name in ("old", "old", "older")]


# --------------------------------------------------------------------------------------------------------------- bounds


def test_watched_directories_of_all_clients_are_bounded(
    inside: Inside, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REMOTE_FILE_WATCHES_MAX == 1_024
    monkeypatch.setattr(filewatch, "REMOTE_FILE_WATCHES_MAX", 3)
    with inside.connect() as second:
        last = 0
        for one in (client, second, client):
            last = one.ask("files.watch", path=str(tmp_path))["watch"]
        text = f"watch {tmp_path}: too many watches; end some with files.unwatch"
        for one in (client, second):
            assert one.ask("files.watch", path=str(tmp_path)) == {"code": -32603, "message": text}
        assert client.ask("files.unwatch", watch=last)["success"]
        assert "watch" in second.ask("files.watch", path=str(tmp_path))
