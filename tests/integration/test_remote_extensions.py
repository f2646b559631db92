"""What `-extensions` adds, with real processes, terminals and files; without the flag nothing of it is there."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.remote_rig import Client, Daemon, alive, until

METHODS = [
    "process.list", "process.watch", "process.unwatch", "process.closeStdin", "process.resize", "files.write",
    "files.watch", "files.unwatch",
]  # fmt: skip


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("extended"), "-extensions") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


def shell(client: Client, name: str, script: str, **more: object) -> None:
    assert client.ask("process.spawn", id=name, command="sh", args=["-c", script], **more)["success"]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def output(frames: list[Any], stream: str = "stdout") -> bytes:
    return b"".join(base64.b64decode(frame["data"]) for frame in frames if frame["stream"] == stream)


def read_to_exit(client: Client, frames: list[Any] | None = None) -> list[Any]:
    frames = frames if frames is not None else []
    while not frames or frames[-1]["stream"] != "exit":
        message = json.loads(client.line())
        if "type" in message:
            frames.append(message)
    return frames


def read_to(client: Client, mark: bytes) -> bytes:
    """Returns the output up to `mark`."""
    seen = b""
    while mark not in seen:
        message = json.loads(client.line())
        if message.get("stream") == "stdout":
            seen += base64.b64decode(message["data"])
    return seen


# ----------------------------------------------------------------------------------------------------- without the flag


def test_without_the_flag_there_is_nothing_of_it(tmp_path: Path) -> None:
    with Daemon(tmp_path) as plain, plain.connect() as client:
        for method in METHODS:
            assert client.ask(method, id="p", path="/") == {"code": -32601, "message": f"Unknown method: {method}"}
        capabilities = client.ask("server.capabilities")
        assert len(capabilities["methods"]) == 19
        assert capabilities["features"] == ["process.stdin.offset"]
        shell(client, "p", "tty; echo err >&2", pty={"cols": 10, "rows": 5})
        frames = read_to_exit(client)
        assert b"not a tty" in output(frames)
        assert output(frames, "stderr") == b"err\n"
        assert "pty" not in client.ask("process.spawn", id="q", command="true", pty=5)  # a wrong type of an unknown key
        reattached = client.ask("process.reattach", id="p", fromSeq=0, wantGap=True)
        assert set(reattached) == {"found", "running", "firstSeq", "lastSeq", "stdinApplied"}
        assert set(client.ask("files.stat", path="/", wantMtime=True)) == {"exists", "isDir", "size", "mode"}


def test_the_methods_are_listed_after_the_contract(client: Client) -> None:
    capabilities = client.ask("server.capabilities")
    assert capabilities["methods"][18:] == ["process.reattach", *METHODS]
    assert capabilities["features"] == [
        "process.stdin.offset", "process.list", "process.watch", "process.closeStdin", "process.spawn.pty",
        "process.reattach.wantGap", "files.write", "files.watch",
    ]  # fmt: skip
    for method in METHODS[1:5]:
        assert client.ask(method)["code"] == -32602


# ------------------------------------------------------------------------------------------------------------ processes


def test_the_list_has_what_runs_and_what_ran(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-extensions") as daemon, daemon.connect() as client:
        assert client.ask("process.list") == {"processes": []}
        started = client.ask("process.spawn", id="b", command="cat", wantPid=True)
        client.ask("process.stdin", id="b", data=b64(b"abc"))
        shell(client, "a", "exit 3")

        def settled() -> bool:
            first, second = client.ask("process.list")["processes"]
            return first["lastSeq"] == 1 and not second["running"]

        until(settled, "the first one echoes, the second one exits")
        assert client.ask("process.list")["processes"] == [
            {
                "id": "b", "pid": started["pid"], "running": True, "startTime": started["startTime"], "firstSeq": 1,
                "lastSeq": 1, "stdinApplied": 3, "command": "cat",
            },
            client.ask("process.list")["processes"][1] | {"id": "a", "running": False, "exitCode": 3, "command": "sh"},
        ]  # fmt: skip


def test_watchers_see_everything_beside_the_subscriber(daemon: Daemon, client: Client) -> None:
    shell(client, "w", "echo one; read x; echo two $x; exit 4")
    assert read_to(client, b"one\n")
    with daemon.connect() as first, daemon.connect() as second:
        reply, frames = first.reply("process.watch", id="w")
        assert frames == []  # the reply comes first
        assert reply == {"found": True, "running": True, "firstSeq": 1, "lastSeq": 1, "stdinApplied": 0}
        assert second.ask("process.watch", id="w", fromSeq=99)["found"]  # from now on
        assert second.ask("process.stdin", id="w", data=b64(b"x\n"))["success"]
        mine = read_to_exit(client)
        seen, late = read_to_exit(first), read_to_exit(second)
        assert output(seen) == b"one\ntwo x\n"
        assert seen[-1] == {"type": "stream", "processId": "w", "stream": "exit", "seq": 3, "exitCode": 4}
        assert late == mine == seen[1:]
        assert first.ask("process.watch", id="w")["running"] is False
        assert read_to_exit(first) == seen  # an exited process is repeated
    assert client.ask("process.watch", id="nobody")["found"] is False


def test_a_watch_ends_when_it_is_told_to(daemon: Daemon, client: Client) -> None:
    shell(client, "u", "while read x; do echo $x; done")
    with daemon.connect() as watcher:
        watcher.ask("process.watch", id="u")
        client.ask("process.stdin", id="u", data=b64(b"1\n"))
        assert read_to(watcher, b"1\n")
        assert watcher.ask("process.unwatch", id="u") == {"success": True}
        client.ask("process.stdin", id="u", data=b64(b"2\n"))
        assert read_to(client, b"2\n")
        assert watcher.silent(0.1)
        watcher.ask("process.watch", id="u", fromSeq=2)
        shell(client, "u", "true")  # the id is used again
        assert json.loads(watcher.line()) == {"type": "stream", "processId": "u", "stream": "unwatched"}


def test_no_connection_gets_a_frame_twice(daemon: Daemon, client: Client) -> None:
    shell(client, "t", "echo 1; read x; echo 2")
    assert read_to(client, b"1\n")
    message = "Process is already streamed to this connection"
    assert client.ask("process.watch", id="t") == {"code": -32602, "message": message}
    with daemon.connect() as other:
        assert other.ask("process.watch", id="t", fromSeq=1)["found"]
        assert other.ask("process.reattach", id="t", fromSeq=1)["found"]  # the watch has ended with it
        other.post("process.stdin", 1, id="t", data=b64(b"\n"))
        assert [frame["seq"] for frame in read_to_exit(other)] == [2, 3]


def test_a_stalled_watcher_holds_up_nobody_and_is_told_its_gap(daemon: Daemon, client: Client) -> None:
    """40 MiB pass while the watcher reads nothing: the subscriber has them all, the watcher gets gap and rest."""
    shell(client, "s", "read x; head -c 41943040 /dev/zero; exit 7")
    with daemon.connect() as watcher:
        watcher.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        watcher.ask("process.watch", id="s")
        client.post("process.stdin", 1, id="s", data=b64(b"\n"))
        frames = read_to_exit(client)
        assert len(output(frames)) == 41_943_040
        first = client.ask("process.reattach", id="s", fromSeq=frames[-1]["seq"])["firstSeq"]
        seen = read_to_exit(watcher)
        gaps = [frame for frame in seen if frame["stream"] == "gap"]
        assert gaps
        told: list[int] = []
        for frame in seen:
            told += range(frame["from"], frame["to"] + 1) if frame["stream"] == "gap" else [frame["seq"]]
        assert told == list(range(1, frames[-1]["seq"] + 1))
        assert gaps[-1]["to"] == first - 1
        assert seen[-1] == frames[-1]
    assert daemon.memory_mib() < 150


def test_a_watcher_that_waits_for_other_things_goes_on(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    """Its connection is full of replies while the process prints: the frames come when those have been read."""
    (tmp_path / "f").write_text("x" * 250_000)
    shell(client, "o", "read x; echo printed; read x")
    with daemon.connect() as watcher:
        watcher.ask("process.watch", id="o")
        for number in range(8):
            watcher.post("files.read", number, path=str(tmp_path / "f"))
        until(lambda: len(watcher.sock.recv(1 << 20, socket.MSG_PEEK)) > 100_000, "replies come")
        for _ in range(8):
            client.ask("files.read", path=str(tmp_path / "f"))
        client.post("process.stdin", 1, id="o", data=b64(b"\n"))
        assert read_to(client, b"printed")
        watcher.post("server.ping", 99)
        assert read_to(watcher, b"printed")


def test_two_hundred_watchers_and_their_sudden_end(daemon: Daemon, client: Client) -> None:
    shell(client, "m", "while read x; do echo $x; done")
    watchers = [daemon.connect() for _ in range(200)]
    for watcher in watchers:
        watcher.ask("process.watch", id="m")
    client.post("process.stdin", 1, id="m", data=b64(b"here\n"))
    for watcher in watchers:
        assert read_to(watcher, b"here\n")
        watcher.sock.close()
    client.post("process.stdin", 1, id="m", data=b64(b"on\n"))
    assert read_to(client, b"on\n")
    client.ask("process.kill", id="m", signal="KILL")


def test_a_gap_is_told_on_reattaching(daemon: Daemon, client: Client) -> None:
    shell(client, "g", "head -c 33554432 /dev/zero")
    last = read_to_exit(client)[-1]["seq"]
    reply, frames = client.reply("process.reattach", id="g", fromSeq=1, wantGap=True)
    assert reply["gap"] == {"from": 2, "to": reply["firstSeq"] - 1}
    assert list(reply)[-1] == "gap"
    assert frames[0]["seq"] == reply["firstSeq"] > 2
    assert "gap" not in client.ask("process.reattach", id="g", fromSeq=1)
    for seq in (reply["firstSeq"] - 1, last - 1):  # nothing is missing
        assert "gap" not in client.ask("process.reattach", id="g", fromSeq=seq, wantGap=True)
    with daemon.connect() as watcher:
        watcher.ask("process.watch", id="g", fromSeq=4)
        gap = {"type": "stream", "processId": "g", "stream": "gap", "from": 5, "to": reply["firstSeq"] - 1}
        assert json.loads(watcher.line()) == gap


def test_input_ends_after_what_was_accepted(client: Client) -> None:
    shell(client, "c", "sleep 0.2; wc -c")
    client.post("process.stdin", 1, id="c", data=b64(b"x" * 700_000))
    client.post("process.closeStdin", 2, id="c")
    client.post("process.stdin", 3, id="c", data=b64(b"late"))
    client.post("process.stdin", 4, id="c", data=b64(b"xx"), offset=5)
    replies: dict[int, Any] = {}
    frames: list[Any] = []
    while len(replies) < 4 or not frames or frames[-1]["stream"] != "exit":
        message = json.loads(client.line())
        if "type" in message:
            frames.append(message)
        else:
            replies[message["id"]] = message.get("result", message.get("error"))
    assert output(frames).strip() == b"700000"
    assert replies[2] == {"success": True, "applied": 700_000}
    assert replies[3] == {"code": -32602, "message": "Process stdin is closed"}
    assert replies[4] == {"success": True, "applied": 700_000, "duplicate": True}
    assert client.ask("process.closeStdin", id="c") == {"code": -32602, "message": "Process not running"}
    assert client.ask("process.closeStdin", id="zz") == {"code": -32602, "message": "Process not found"}


def test_the_end_of_input_waits_for_input_that_is_blocked(client: Client) -> None:
    """9 MiB and more than the queue holds are on their way; the end comes behind them."""
    shell(client, "d", "sleep 0.3; wc -c")
    pieces, size = 16, 750_000
    for number in range(pieces):
        client.post("process.stdin", number, id="d", data=b64(b"x" * size))
    client.post("process.closeStdin", 99, id="d")
    assert output(read_to_exit(client)).strip() == b"%d" % (pieces * size)


def test_input_may_end_twice_and_after_the_child_closed_it(client: Client) -> None:
    shell(client, "e", "exec 0<&-; echo closed; sleep 30")
    assert read_to(client, b"closed\n")
    client.ask("process.stdin", id="e", data=b64(b"nobody reads this"))
    assert client.ask("process.closeStdin", id="e")["success"]
    assert client.ask("process.closeStdin", id="e")["success"]
    assert client.ask("process.killAndWait", id="e", signal="KILL")["died"]


# ------------------------------------------------------------------------------------------------------------ terminals


def test_a_terminal_with_its_size_and_a_session_of_its_own(client: Client) -> None:
    script = (
        "tty; stty size; echo $TERM; echo err >&2; ps -o sid=,pgid=,tpgid= -p $$; echo $$; exec 3</dev/tty && echo ctl"
    )
    shell(client, "pty", script, pty={"cols": 101, "rows": 33, "term": "vt100"})
    frames = read_to_exit(client)
    lines = output(frames).decode().split("\r\n")
    assert lines[0].startswith("/dev/pts/")
    assert lines[1:4] == ["33 101", "vt100", "err"]
    assert lines[4].split() == [lines[5]] * 3
    assert lines[6] == "ctl"
    assert {frame["stream"] for frame in frames} == {"stdout", "exit"}
    assert frames[-1]["exitCode"] == 0


def test_a_terminal_without_wishes(client: Client) -> None:
    shell(client, "pty0", "stty size; echo $TERM", pty={})
    assert output(read_to_exit(client)) == b"24 80\r\nxterm-256color\r\n"
    shell(client, "pty1", "echo $TERM", pty={"term": "vt100"}, env={"TERM": "dumb"})
    assert output(read_to_exit(client)) == b"dumb\r\n"
    shell(client, "pty2", "test -t 0 || echo none", pty=None)
    assert output(read_to_exit(client)) == b"none\n"
    wrong: object
    for wrong in (5, [], "x", {"cols": "80"}, {"rows": 1.5}):
        assert client.ask("process.spawn", id="bad", command="true", pty=wrong) == {
            "code": -32602, "message": "Invalid params",
        }  # fmt: skip
    for size in ({"cols": -1}, {"rows": 65_536}):
        assert client.ask("process.spawn", id="bad", command="true", pty=size)["code"] == -32602


def test_typing_resizing_and_interrupting(client: Client) -> None:
    script = "trap 'stty size' WINCH; echo up; while :; do read x && echo got $x; done"
    shell(client, "type", script, pty={"cols": 80, "rows": 24})
    assert read_to(client, b"up\r\n")
    assert client.ask("process.resize", id="type", cols=132, rows=50) == {"success": True}
    assert read_to(client, b"50 132")
    client.post("process.stdin", 1, id="type", data=b64(b"word\r"))
    assert b"word" in read_to(client, b"got word\r\n")  # echoed by the terminal, then answered
    message = "Process has a terminal: send its end-of-file character instead"
    assert client.ask("process.closeStdin", id="type") == {"code": -32602, "message": message}
    client.post("process.stdin", 1, id="type", data=b64(b"\x03"))
    assert read_to_exit(client)[-1]["exitCode"] in {-1, 130}
    shell(client, "plain", "cat")
    message = "Process has no terminal"
    assert client.ask("process.resize", id="plain", cols=1, rows=1) == {"code": -32602, "message": message}
    assert client.ask("process.resize", id="gone", cols=1, rows=1) == {"code": -32602, "message": "Process not found"}


def test_the_last_output_of_a_terminal_is_not_lost(client: Client) -> None:
    shell(client, "seq", "seq 200000; exit 9", pty={})
    frames = read_to_exit(client)
    assert output(frames) == b"".join(b"%d\r\n" % number for number in range(1, 200_001))
    assert frames[-1]["exitCode"] == 9


def test_a_terminal_with_a_large_input(client: Client) -> None:
    shell(client, "raw", "stty raw -echo; echo ready; head -c 300000 | md5sum", pty={})
    assert read_to(client, b"ready")
    data = os.urandom(300_000)
    client.post("process.stdin", 1, id="raw", data=b64(data))
    assert hashlib.md5(data).hexdigest().encode() in output(read_to_exit(client))  # noqa: S324 # no secret, a checksum


def test_killing_what_has_a_terminal(client: Client, daemon: Daemon) -> None:
    pid = client.ask("process.spawn", id="k", command="sh", args=["-c", "sleep 99 & wait"], pty={}, wantPid=True)["pid"]
    reply = client.ask("process.killAndWait", id="k", signal="KILL")
    assert reply == {"found": True, "died": True}
    assert not alive(pid)
    descriptors = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
    for number in range(20):
        shell(client, f"fd{number}", "true", pty={})
        read_to_exit(client)
    assert client.ask("process.spawn", id="x", command="/nonexistent", pty={})["code"] == -32603
    until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= descriptors, "no descriptor is left behind")
    with daemon.connect() as other:
        shell(other, "hup", "trap 'echo hup; exit 0' HUP; echo up; while :; do sleep 0.01; done", pty={})
        assert read_to(other, b"up")
        assert other.ask("process.kill", id="hup", signal="HUP")["success"]
        assert b"hup" in output(read_to_exit(other))


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_replaced_as_a_whole(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "f"
    result = client.ask("files.write", path=str(file), content=b64(b"one"))
    assert result == {"success": True, "size": 3, "mtime": str(file.stat().st_mtime_ns)}
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()
    file.chmod(0o751)
    (tmp_path / "link").symlink_to("f")
    inode = file.stat().st_ino
    assert client.ask("files.write", path=str(tmp_path / "link"), content=b64(b"two\xff"))["size"] == 4
    assert file.read_bytes() == b"two\xff"
    assert file.stat().st_ino != inode
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o751
    assert client.ask("files.write", path=str(file), content="", mode=0o600)["size"] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["f", "link"]


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_a_file_that_changed_meanwhile_is_left_alone(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "f"
    ask = {"path": str(file), "content": b64(b"mine")}
    assert client.ask("files.write", **ask, ifSize=0) == {"success": False, "conflict": True}
    first = client.ask("files.write", **ask, ifSize=-1)
    assert first["success"]
    state = {"success": False, "size": 4, "mtime": first["mtime"], "conflict": True}
    assert client.ask("files.write", **ask, ifSize=-1) == state
    assert client.ask("files.write", **ask, ifMtime="1") == state
    known = client.ask("files.stat", path=str(file), wantMtime=True)
    assert known["mtime"] == first["mtime"]
    second = client.ask("files.write", path=str(file), content=b64(b"yours"), ifSize=4, ifMtime=known["mtime"])
    assert second["success"]
    assert client.ask("files.write", **ask, ifMtime=known["mtime"])["conflict"]
    assert file.read_bytes() == b"yours"
    assert os.listdir(tmp_path) == ["f"]


def test_of_concurrent_writers_one_wins(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "f"
    with daemon.connect() as client:
        for number in range(40):
            client.post("files.write", number, path=str(file), content=b64(b"%d" % number * 999), ifSize=-1)
        replies = [json.loads(client.line()) for _ in range(40)]
    winners = [reply["id"] for reply in replies if reply["result"]["success"]]
    assert len(winners) == 1
    assert file.read_bytes() == b"%d" % winners[0] * 999
    assert os.listdir(tmp_path) == ["f"]


def test_what_cannot_be_written(client: Client, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, code, text in (
        ("", -32602, "files.write: path is required"),
        (str(tmp_path), -32602, "files.write: path is a directory"),
        (f"{tmp_path}/new/", -32602, "files.write: path is a directory"),
        (f"{tmp_path}/fifo", -32602, "files.write: not a regular file"),
        (f"{tmp_path}/no/f", -32603, f"write {tmp_path}/no/f: no such file or directory"),
        (f"{tmp_path}/a\0b", -32603, f"open {tmp_path}/a\0b: invalid argument"),
        ("/proc/version", -32603, "write /proc/version: no such file or directory"),
    ):
        assert client.ask("files.write", path=path, content="") == {"code": code, "message": text}
    bad = {"code": -32602, "message": "Invalid base64 data"}
    assert client.ask("files.write", path=f"{tmp_path}/f", content="a") == bad
    assert client.ask("files.write", path=f"{tmp_path}/f", content="", mode=0o1000)["code"] == -32602
    assert os.listdir(tmp_path) == ["fifo"]


def test_readers_never_see_half_a_file(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"a" * 500_000)
    seen, going = set(), True

    def read() -> None:
        while going:
            data = file.read_bytes()
            seen.add((len(data), len(set(data))))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in b"bcdefghi":
        assert client.ask("files.write", path=str(file), content=b64(bytes([letter]) * 500_000))["success"]
    going = False
    reader.join()
    assert seen == {(500_000, 1)}


# ------------------------------------------------------------------------------------------------------- watching files


def changes(client: Client, until_path: str) -> list[tuple[str, str]]:
    """Returns events up to the first one of a path."""
    events: list[tuple[str, str]] = []
    while not events or events[-1][1] != until_path:
        message = json.loads(client.line())
        assert message["type"] == "files"
        events.append((message["event"], message.get("path", "")))
    return events


def test_changes_in_a_directory_are_told(client: Client, tmp_path: Path) -> None:
    number = client.ask("files.watch", path=str(tmp_path))["watch"]
    (tmp_path / "a").write_text("x")
    (tmp_path / "sub").mkdir()
    assert changes(client, f"{tmp_path}/sub") == [("created", f"{tmp_path}/a"), ("created", f"{tmp_path}/sub")]
    (tmp_path / "sub" / "below").write_text("not watched")
    with open(tmp_path / "a", "a") as file:
        for _ in range(50):
            file.write("y")
            file.flush()
    assert changes(client, f"{tmp_path}/a") == [("changed", f"{tmp_path}/a")]
    (tmp_path / "a").rename(tmp_path / "b")
    assert changes(client, f"{tmp_path}/b") == [("deleted", f"{tmp_path}/a"), ("created", f"{tmp_path}/b")]
    assert client.ask("files.unwatch", watch=number) == {"success": True}
    (tmp_path / "c").write_text("nobody is told")
    assert client.silent(0.2)


def test_one_name_is_watched_through_its_replacements(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "f"
    number = client.ask("files.watch", path=str(file))["watch"]
    (tmp_path / "other").write_text("")
    file.write_text("1")
    assert json.loads(client.line()) == {"type": "files", "watch": number, "event": "created", "path": str(file)}
    with daemon.connect() as writer:
        assert writer.ask("files.write", path=str(file), content=b64(b"2"))["success"]
    assert json.loads(client.line())["event"] == "created"
    file.unlink()
    assert changes(client, str(file)) == [("deleted", str(file))]
    tmp_path.rename(tmp_path.with_name("moved"))
    assert json.loads(client.line()) == {"type": "files", "watch": number, "event": "ended"}
    assert client.ask("files.watch", path=str(file))["code"] == -32603


def test_several_watches_of_one_directory_are_apart(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    with daemon.connect() as other:
        mine = client.ask("files.watch", path=str(tmp_path))["watch"]
        theirs = other.ask("files.watch", path=str(tmp_path))["watch"]
        assert mine != theirs
        assert other.ask("files.unwatch", watch=mine) == {"success": True}  # which is not theirs
        (tmp_path / "a").write_text("")
        assert json.loads(client.line())["watch"] == mine
        assert json.loads(other.line())["watch"] == theirs
    (tmp_path / "b").write_text("")
    assert changes(client, f"{tmp_path}/b") == [("created", f"{tmp_path}/b")]


def test_what_was_lost_is_told(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    """More changes than are kept for a client that reads nothing."""
    number = client.ask("files.watch", path=str(tmp_path))["watch"]
    with daemon.connect() as other:
        other.ask("files.watch", path=str(tmp_path / "last"))
        for name in range(4_000):
            os.close(os.open(tmp_path / f"{'n' * 200}{name}", os.O_CREAT | os.O_WRONLY, 0o600))
        (tmp_path / "last").touch()
        assert json.loads(other.line())["event"] == "created"  # what came before has been seen, too
        assert other.ask("server.ping") == {"pong": True}
    events: list[Any] = [{}]
    while events[-1].get("event") != "overflow":
        events.append(json.loads(client.line(3)))
        assert events[-1]["watch"] == number
    assert len(events) < 4_000
    assert daemon.memory_mib() < 150


def test_what_the_kernel_dropped_is_told(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    files = [tmp_path / "d" / name for name in "ab"]
    for file in files:
        file.touch()
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with Daemon(tmp_path, "-extensions") as daemon, daemon.connect() as client:
        number = client.ask("files.watch", path=str(tmp_path / "d"))["watch"]
        os.kill(daemon.process.pid, signal.SIGSTOP)
        for _ in range(most // 2 + 100):
            for file in files:
                os.utime(file)
        os.kill(daemon.process.pid, signal.SIGCONT)
        while (event := json.loads(client.line()))["event"] != "overflow":
            assert event["event"] == "changed"
        assert event == {"type": "files", "watch": number, "event": "overflow"}
        files[0].unlink()
        assert ("deleted", str(files[0])) in changes(client, str(files[0])) + changes_left(client)


def changes_left(client: Client) -> list[tuple[str, str]]:
    """Returns the events that come within a moment."""
    events: list[tuple[str, str]] = []
    while True:
        try:
            message = json.loads(client.line(0.3))
        except TimeoutError:
            return events
        events.append((message["event"], message.get("path", "")))


def test_watches_are_bounded(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    for _ in range(64):
        assert "watch" in client.ask("files.watch", path=str(tmp_path))
    refused = client.ask("files.watch", path=str(tmp_path))
    text = f"watch {tmp_path}: too many watches; end some with files.unwatch"
    assert refused == {"code": -32603, "message": text}
    with daemon.connect() as other:
        assert "watch" in other.ask("files.watch", path=str(tmp_path))
        missing = f"watch {tmp_path}/no/where: no such file or directory"
        assert other.ask("files.watch", path=f"{tmp_path}/no/where") == {"code": -32603, "message": missing}
    client.sock.close()

    def fresh() -> bool:
        with daemon.connect() as again:
            return "watch" in again.ask("files.watch", path=str(tmp_path))

    until(fresh, "watches end with their connection")


def test_watches_cost_nothing_once_they_ended(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    number = client.ask("files.watch", path=str(tmp_path))["watch"]
    client.ask("files.unwatch", watch=number)
    before = daemon.processor_seconds()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        (tmp_path / "f").write_text("")
        (tmp_path / "f").unlink()
    assert daemon.processor_seconds() - before < 0.1


# --------------------------------------------------------------------------------------------------------------- abuse


def test_anything_as_a_parameter_is_answered(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    names = (
        "id", "fromSeq", "cols", "rows", "pty", "term", "wantGap", "path", "content", "mode", "ifSize", "ifMtime",
        "watch", "wantMtime", "data", "offset",
    )  # fmt: skip
    values: tuple[object, ...] = (
        None, True, "", "p", "q", "~", str(tmp_path), str(tmp_path / "f"), "/proc/self", "\ud800", "a\0b", "YQ==",
        "a/" * 3000, 0, 1, -1, 24, 65_535, 1 << 62, (1 << 64) - 1, 1 << 70, 1.5, [], {}, {"cols": 3, "rows": None},
        {"term": "x" * 300}, [[]],
    )  # fmt: skip
    with Daemon(tmp_path, "-extensions") as daemon, daemon.connect() as client:
        methods = [*METHODS, "process.spawn", "process.reattach", "process.stdin", "files.stat"]
        for number in range(3_000):
            params = {name: chance.choice(values) for name in chance.sample(names, chance.randrange(6))}
            if chance.random() < 0.7:
                params |= {"id": chance.choice("pq"), "path": str(tmp_path / chance.choice("fg"))}
            if chance.random() < 0.5:
                params |= {"command": "cat"}
            client.post(chance.choice(methods), number, **params)
            if number % 100 == 99:
                answered: set[int] = set()
                while len(answered) < 100:
                    message = json.loads(client.line())
                    if "id" in message:
                        answered.add(message["id"])
        assert "panic" not in daemon.log.read_text()


def test_watchers_come_and_go_during_a_flood(tmp_path: Path) -> None:
    """Whoever comes late, reads slowly or leaves in the middle, the subscriber's bytes are all there."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    with Daemon(tmp_path, "-extensions") as daemon, daemon.connect() as client:
        shell(client, "first", "true")  # by its end the login shell is gone
        read_to_exit(client)
        descriptors = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
        shell(client, "flood", "seq 1 3000000; exit 5")
        ended = threading.Event()

        def churn(random_part: random.Random) -> None:
            while not ended.is_set():
                with daemon.connect() as watcher:
                    watcher.post("process.watch", 1, id="flood", fromSeq=random_part.randrange(700))
                    for _ in range(random_part.randrange(30)):
                        if b'"stream":"exit"' in watcher.line():
                            break
                    if random_part.random() < 0.5:
                        watcher.ask("process.unwatch", id="flood")

        threads = [threading.Thread(target=churn, args=(random.Random(chance.random()),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        frames = read_to_exit(client)
        ended.set()
        for thread in threads:
            thread.join()
        assert (
            hashlib.sha256(output(frames)).digest()
            == hashlib.sha256(b"".join(b"%d\n" % number for number in range(1, 3_000_001))).digest()
        )
        assert [frame["seq"] for frame in frames] == list(range(1, len(frames) + 1))
        until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= descriptors, "nothing is left behind")
        assert "panic" not in daemon.log.read_text()
