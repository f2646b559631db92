"""Processes of a real daemon: streams, input, signals, reattachment, slow readers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.remote_rig import Client, Daemon, alive, until


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("remote"), CLAUDE_RPC_TOKEN="of somebody else") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def output(frames: list[Any], stream: str = "stdout") -> bytes:
    return b"".join(base64.b64decode(frame["data"]) for frame in frames if frame["stream"] == stream)


def test_frames_are_numbered_together_and_the_exit_is_the_last(client: Client) -> None:
    client.post(
        "process.spawn", id="mix", command="sh", args=["-c", "for i in 1 2 3; do echo $i; echo e$i >&2; done; exit 7"]
    )
    frames = client.frames_to_exit("mix")
    assert [frame["seq"] for frame in frames] == list(range(1, len(frames) + 1))
    assert output(frames) == b"1\n2\n3\n"
    assert output(frames, "stderr") == b"e1\ne2\ne3\n"
    assert frames[-1] == {"type": "stream", "processId": "mix", "stream": "exit", "seq": len(frames), "exitCode": 7}


def test_a_big_output_arrives_whole_in_frames_of_at_most_32768_bytes(client: Client) -> None:
    client.post("process.spawn", id="big", command="sh", args=["-c", "seq 1 3000000"])
    frames = client.frames_to_exit("big")
    data = output(frames)
    assert data == b"".join(b"%d\n" % number for number in range(1, 3_000_001))
    assert max(len(frame["data"]) for frame in frames[:-1]) <= 43_692
    result, replayed = client.reply("process.reattach", id="big", fromSeq=0)
    assert result["firstSeq"] > 1
    assert result["lastSeq"] == len(frames)
    assert replayed == frames[result["firstSeq"] - 1 :]
    _, tail = client.reply("process.reattach", id="big", fromSeq=len(frames) - 3)
    assert tail == frames[-3:]


def test_the_child_sees_its_environment_its_directory_and_no_descriptors(client: Client, tmp_path: Path) -> None:
    script = 'echo "$0 $1 $A"; pwd; echo $(ls /proc/self/fd); ps -o pgid= -p $$; echo $$; '
    script += "env | grep -c '^CLAUSTRUM_[DT]\\|^CLAUDE_RPC\\|^LC_CTYPE'"
    client.post(
        "process.spawn",
        id="env",
        command="sh",
        args=["-c", script, "zero", "é\ufffd"],
        cwd=str(tmp_path),
        env={"A": "x=y"},
    )
    lines = output(client.frames_to_exit("env")).decode().split("\n")
    assert lines[0] == "zero é\ufffd x=y"
    assert lines[1] == str(tmp_path)
    assert lines[2].split() == ["0", "1", "2", "3"], "3 is the directory that ls reads"
    assert lines[3].strip() == lines[4], "a process group of its own"
    assert lines[5] == "0"


def test_children_have_the_limit_of_descriptors_that_the_daemon_was_started_with(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    try:
        with Daemon(tmp_path) as daemon, daemon.connect() as client:
            client.post("process.spawn", id="limit", command="sh", args=["-c", "ulimit -n"])
            assert output(client.frames_to_exit("limit")) == b"1000\n"
            assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cwd": "/nowhere"}, "chdir /nowhere: stat /nowhere: no such file or directory"),
        ({"cwd": "/etc/passwd"}, "chdir /etc/passwd: not a directory"),
        ({"cwd": "/a\0b"}, "chdir /a\0b: stat /a\0b: invalid argument"),
        ({"command": "no-such"}, 'exec: "no-such": executable file not found in $PATH'),
        ({"command": "./x"}, "fork/exec ./x: no such file or directory"),
        ({"command": "/etc/passwd"}, "fork/exec /etc/passwd: permission denied"),
        ({"command": "/bin/true", "args": ["\0"]}, "fork/exec /bin/true: invalid argument"),
        ({"command": "/bin/true", "args": ["x" * 200_000]}, "fork/exec /bin/true: argument list too long"),
        ({"command": "/bin/true", "env": {"A\0": "b"}}, "exec: environment variable contains NUL"),
        ({"cwd": "/nowhere", "command": "no-such"}, "chdir /nowhere: stat /nowhere: no such file or directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_leaves_the_id_alone(client: Client, params: dict[str, Any], message: str) -> None:
    client.post("process.spawn", id="kept", command="sh", args=["-c", "echo kept; exit 5"])
    client.frames_to_exit("kept")
    error = client.ask("process.spawn", **{"id": "kept", "command": "true"} | params)
    assert error == {"code": -32603, "message": message}
    assert client.ask("process.reattach", id="kept", fromSeq=0)["lastSeq"] == 2


def test_scripts_without_an_interpreter_are_no_executables(client: Client, tmp_path: Path) -> None:
    for name, text, message in (
        ("noshebang", "echo hi\n", "exec format error"),
        ("badinterp", "#!/no/interp\n", "no such file or directory"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
        error = client.ask("process.spawn", id="s", command=f"./{name}", cwd=str(tmp_path))
        assert error == {"code": -32603, "message": f"fork/exec ./{name}: {message}"}


def test_offsets_of_input(client: Client) -> None:
    client.ask("process.spawn", id="in", command="sh", args=["-c", "cat; echo end"])

    def feed(data: bytes, **more: object) -> Any:
        return client.ask("process.stdin", id="in", data=b64(data), **more)

    assert feed(b"abc") == {"success": True, "applied": 3}
    assert feed(b"abcdef", offset=0) == {"success": True, "applied": 6}
    assert feed(b"cdef", offset=2) == {"success": True, "applied": 6, "duplicate": True}
    assert feed(b"", offset=2) == {"success": True, "applied": 6, "duplicate": True}
    assert feed(b"", offset=6) == feed(b"") == {"success": True, "applied": 6}
    assert feed(b"x", offset=7) == {"code": -32003, "message": "stdin offset gap: offset ahead of applied bytes"}
    assert feed(b"x", offset=2**64 - 1)["code"] == -32003
    assert feed(b"g", offset=None) == {"success": True, "applied": 7}
    assert client.ask("process.reattach", id="in", fromSeq=0)["stdinApplied"] == 7
    until(
        lambda: (
            client.reply("process.reattach", id="in", fromSeq=0)[1]
            and output(client.reply("process.reattach", id="in", fromSeq=0)[1]) == b"abcdefg"
        ),
        "the input came through",
    )
    client.ask("process.killAndWait", id="in", signal="KILL")
    assert feed(b"x") == {"code": -32602, "message": "Process not running"}


def test_a_full_input_queue_blocks_later_input_of_its_connection_and_nothing_else(
    daemon: Daemon, tmp_path: Path
) -> None:
    script = f"until [ -e {tmp_path}/go ]; do sleep 0.02; done; head -c 9100000 | sha256sum"
    with daemon.connect() as one, daemon.connect() as other:
        one.ask("process.spawn", id="full", command="sh", args=["-c", script])
        one.ask("process.spawn", id="second", command="cat")
        chunk = os.urandom(700_000)
        for number in range(13):
            one.post("process.stdin", number, id="full", data=b64(chunk))
        one.post("process.stdin", 100, id="second", data=b64(b"later\n"))
        one.post("server.ping", 101)
        seen = []
        while 101 not in seen:
            seen.append(json.loads(one.line())["id"])
        assert 12 not in seen
        assert 100 not in seen
        assert other.ask("process.stdin", id="second", data=b64(b"now\n")) == {"success": True, "applied": 4}
        assert other.ask("server.ping") == {"pong": True}
        (tmp_path / "go").touch()
        assert output(one.frames_to_exit("full")).split()[0].decode() == hashlib.sha256(chunk * 13).hexdigest()
        assert other.ask("process.reattach", id="full", fromSeq=0)["stdinApplied"] == 13 * 700_000
        other.ask("process.killAndWait", id="second", signal="KILL")


def test_blocked_input_is_never_given_to_another_process_of_the_same_id(daemon: Daemon) -> None:
    with daemon.connect() as one, daemon.connect() as other:
        one.ask("process.spawn", id="same", command="sleep", args=["300"])
        for number in range(1, 15):
            one.post("process.stdin", number, id="same", data=b64(bytes(700_000)))
        for _ in range(12):  # 8 MiB and what the pipe holds
            assert json.loads(one.line())["result"]["success"]
        other.ask("process.spawn", id="same", command="cat")
        blocked = json.loads(one.line())
        assert "error" in blocked or blocked["result"]["applied"] == 13 * 700_000, (
            "refused, or dropped with the old one"
        )
        assert json.loads(one.line())["result"]["applied"] == 700_000, "the next one was for whoever has the id"
        other.ask("process.killAndWait", id="same", signal="KILL")


def test_one_chunk_larger_than_the_queue_is_taken(client: Client) -> None:
    client.ask("process.spawn", id="huge", command="sha256sum")
    part = os.urandom(700_000)
    for _ in range(3):
        assert client.ask("process.stdin", id="huge", data=b64(part))["success"]
    client.ask("process.killAndWait", id="huge", signal="KILL")


def test_input_to_a_child_that_does_not_read_is_accepted_and_dropped(client: Client) -> None:
    client.ask("process.spawn", id="deaf", command="sh", args=["-c", "exec 0<&-; echo closed; sleep 60"])
    client.line()
    for number in range(1, 21):
        assert client.ask("process.stdin", id="deaf", data=b64(bytes(700_000)))["applied"] == number * 700_000
    client.ask("process.killAndWait", id="deaf", signal="KILL")


def test_killing(client: Client) -> None:
    client.ask(
        "process.spawn",
        id="k",
        command="sh",
        args=["-c", "trap 'echo hup; exit 3' HUP; trap '' TERM; echo r; while :; do sleep 0.1; done"],
    )
    client.line()
    assert client.ask("process.kill", id="k", signal="QUIT") == {"success": True}
    assert client.ask("process.kill", id="k", signal="SIGHUP") == {"success": True}
    frames = client.frames_to_exit("k")
    assert (output(frames), frames[-1]["exitCode"]) == (b"hup\n", 3)
    assert client.ask("process.killAndWait", id="k") == {"found": True, "died": True, "alreadyExited": True}
    assert client.ask("process.kill", id="k", signal="KILL") == {"success": True}


def test_kill_and_wait_puts_the_exit_frame_first_and_sweeps_the_group(client: Client, tmp_path: Path) -> None:
    script = f"sleep 300 >/dev/null 2>&1 & echo $! > {tmp_path}/pid; echo ready; wait"
    client.ask("process.spawn", id="group", command="sh", args=["-c", script])
    client.line()
    orphan = int((tmp_path / "pid").read_text())
    result, frames = client.reply("process.killAndWait", id="group", signal="TERM")
    assert result == {"found": True, "died": True}
    assert frames == [{"type": "stream", "processId": "group", "stream": "exit", "seq": 2, "exitCode": -1}]
    until(lambda: not alive(orphan), "the rest of the group is killed")


def test_without_escalation_the_group_is_left_alone(client: Client, tmp_path: Path) -> None:
    script = f"sleep 300 >/dev/null 2>&1 & echo $! > {tmp_path}/pid; echo ready; wait"
    client.ask("process.spawn", id="left", command="sh", args=["-c", script])
    client.line()
    orphan = int((tmp_path / "pid").read_text())
    assert client.ask("process.killAndWait", id="left", escalate=False) == {"found": True, "died": True}
    assert alive(orphan)
    os.kill(orphan, 9)


def test_an_id_used_again_kills_the_old_group_and_starts_from_one(client: Client) -> None:
    first = client.ask("process.spawn", id="again", command="sleep", args=["300"], wantPid=True)
    client.post("process.spawn", id="again", command="echo", args=["new"])
    frames = client.frames_to_exit("again")
    assert [(frame["seq"], frame["stream"]) for frame in frames] == [(1, "stdout"), (2, "exit")]
    until(lambda: not os.path.exists(f"/proc/{first['pid']}"), "the old process is reaped")
    assert client.silent(0.1)


def test_a_process_outlives_its_connection_and_moves_to_the_next(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.connect() as one:
        one.ask(
            "process.spawn",
            id="moves",
            command="sh",
            args=["-c", f"echo one; until [ -e {tmp_path}/go ]; do sleep 0.02; done; echo two"],
        )
        one.line()
    (tmp_path / "go").touch()
    with daemon.connect() as other, daemon.connect() as third:
        until(lambda: not other.ask("process.reattach", id="moves", fromSeq=9)["running"], "it ends without anybody")
        assert output(third.reply("process.reattach", id="moves", fromSeq=0)[1]) == b"one\ntwo\n"


def test_a_stalled_subscriber_stalls_its_child_and_nobody_else(daemon: Daemon) -> None:
    with daemon.connect() as stalled, daemon.connect() as other:
        stalled.ask("process.spawn", id="flood", command="sh", args=["-c", "seq 1 100000000"])
        stalled.line()
        before, quiet = daemon.processor_seconds(), 0.0
        while quiet < 5:  # the daemon's processor time stands still once everything is full
            time.sleep(0.02)
            now = daemon.processor_seconds()
            quiet, before = (quiet + 1, now) if now == before else (0, now)
        assert other.ask("server.ping") == {"pong": True}
        other.post("process.spawn", id="beside", command="seq", args=["1", "200000"])
        assert output(other.frames_to_exit("beside")).endswith(b"\n200000\n")
        result = other.ask("process.reattach", id="flood", fromSeq=2**63)
        assert result["running"]
        assert result["lastSeq"] < 2_000
        assert other.line(), "taken over, the output goes on"
        other.ask("process.killAndWait", id="flood", signal="KILL")
    assert daemon.memory_mib() < 150


def test_output_of_a_child_that_exits_while_its_subscriber_stalls_is_kept(daemon: Daemon) -> None:
    with daemon.connect() as stalled, daemon.connect() as other:
        stalled.ask("process.spawn", id="filler", command="sh", args=["-c", "seq 1 100000000"])
        stalled.line()
        stalled.post("process.spawn", id="short", command="sh", args=["-c", "seq 1 9000; exit 6"])
        not_running = {"code": -32602, "message": "Process not running"}
        until(lambda: other.ask("process.stdin", id="short", data="") == not_running, "it has ended")
        _, frames = other.reply("process.reattach", id="short", fromSeq=0)
        assert output(frames) == b"".join(b"%d\n" % number for number in range(1, 9_001))
        assert frames[-1]["exitCode"] == 6
        other.ask("process.killAndWait", id="filler", signal="KILL")


def test_a_cut_reader_gets_every_byte_once(daemon: Daemon) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with daemon.connect() as first:
        first.ask(
            "process.spawn", id="cuts", command="sh", args=["-c", "sleep 0.3; seq 1 1000000; sleep 0.3; seq 1 10"]
        )
    got, seq, ended = b"", 0, False
    while not ended:
        with daemon.connect() as client:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.post("process.reattach", id="cuts", fromSeq=seq)
            for _ in range(chance.randrange(1, 120)):
                message = json.loads(client.line())
                if "type" not in message:
                    continue
                if message["seq"] <= seq:
                    continue
                assert message["seq"] == seq + 1
                seq = message["seq"]
                if message["stream"] == "exit":
                    ended = True
                    break
                got += base64.b64decode(message["data"])
    assert got == b"".join(b"%d\n" % number for number in [*range(1, 1_000_001), *range(1, 11)])


def test_pid_and_start_time_are_told_on_request(client: Client) -> None:
    before = time.time()
    result = client.ask("process.spawn", id="pid", command="sleep", args=["30"], wantPid=True)
    assert before - 1 < result["startTime"] < time.time() + 1
    assert alive(result["pid"])
    again = client.ask("process.reattach", id="pid", wantPid=True)
    assert (again["pid"], again["startTime"]) == (result["pid"], result["startTime"])
    assert "pid" not in client.ask("process.reattach", id="pid")
    client.ask("process.killAndWait", id="pid", signal="KILL")


def test_many_processes_at_once_leave_no_zombie(daemon: Daemon) -> None:
    with daemon.connect() as client:
        for number in range(100):
            client.post(
                "process.spawn", number, id=f"many{number}", command="sh", args=["-c", f"echo {number}; exit {number}"]
            )
        codes: dict[str, int] = {}
        while len(codes) < 100:
            message = json.loads(client.line())
            if message.get("stream") == "exit":
                codes[message["processId"]] = message["exitCode"]
        assert codes == {f"many{number}": number for number in range(100)}
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
    until(lambda: not children.read_text().split(), "all are reaped")
