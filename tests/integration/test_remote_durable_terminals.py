"""`-durable -extensions`: terminals belong to the holder; they do what others do, and outlive the daemon."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration import test_remote_extensions as plain
from tests.integration.durable_rig import PatchedDaemon, children, holders, wait_gone
from tests.integration.remote_rig import TOKEN, Daemon, alive, until
from tests.integration.test_remote_durable import DIE, ended, feed, kill, output, spawn_shell

FLAGS = ("-durable", "-extensions")
TYPE = "trap 'stty size' WINCH; echo up; while :; do read x && echo got $x; done"

client = plain.client
test_size_and_session = plain.test_a_terminal_with_its_size_and_a_session_of_its_own
test_defaults = plain.test_a_terminal_without_wishes
test_typing = plain.test_typing_resizing_and_interrupting
test_last_output = plain.test_the_last_output_of_a_terminal_is_not_lost
test_large_input = plain.test_a_terminal_with_a_large_input


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("durable"), *FLAGS) as running:
        yield running


def of_children(pid: int) -> set[str]:
    """Returns what a process has open of the kinds that its children have, records apart."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(entry))
    return {link for link in links if link.startswith(("/dev/ptmx", "/dev/pts", "pipe:"))}


def test_killing_what_has_a_terminal(tmp_path: Path) -> None:
    with Daemon(tmp_path, *FLAGS) as daemon, daemon.connect() as client:
        own = of_children(daemon.process.pid)
        pid = spawn_shell(client, "k", "sleep 99 & wait", pty={})
        (holder,) = holders(tmp_path)
        assert client.ask("process.killAndWait", id="k", signal="KILL") == {"found": True, "died": True}
        assert not alive(pid)
        for name in ("HUP", "INT", "TERM"):
            spawn_shell(
                client, name, f"trap 'echo {name}; exit 3' {name}; echo up; while :; do sleep 0.01; done", pty={}
            )
            plain.read_to(client, b"up")
            client.post("process.kill", 1, id=name, signal=name)
            frames = client.frames_to_exit(name)
            assert (output(frames), frames[-1]["exitCode"]) == (name.encode() + b"\r\n", 3)
        assert client.ask("process.spawn", id="x", command="/nonexistent", pty={})["code"] == -32603
        until(lambda: of_children(daemon.process.pid) <= own, "the daemon keeps a descriptor")
        until(lambda: not of_children(holder), "the holder keeps a descriptor")
        assert not children(holder)


def test_a_terminal_of_a_killed_daemon_goes_on(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, *FLAGS)
    with daemon.connect() as client:
        pid = spawn_shell(client, "p", TYPE, pty={})
        (holder,) = holders(tmp_path)
        plain.read_to(client, b"up\r\n")
        client.post("process.stdin", 1, id="p", data=plain.b64(b"one\r"))
        plain.read_to(client, b"got one\r\n")
        before, frames = client.reply("process.reattach", id="p", fromSeq=0, wantPid=True)
    kill(daemon)
    assert alive(pid)
    with Daemon(tmp_path, *FLAGS) as daemon, daemon.connect() as client:
        assert client.reply("process.reattach", id="p", fromSeq=0, wantPid=True) == (before, frames)
        assert client.reply("process.reattach", id="p", fromSeq=1)[1] == frames[1:]
        assert "has a terminal" in client.ask("process.closeStdin", id="p")["message"]
        client.post("process.resize", 2, id="p", cols=132, rows=50)
        plain.read_to(client, b"50 132\r\n")
        client.post("process.stdin", 3, id="p", data=plain.b64(b"one\rtwo\r"), offset=0)
        assert plain.read_to(client, b"got two\r\n").replace(b"two\r\n", b"", 1) == b"got two\r\n"
        client.post("process.stdin", 4, id="p", data=plain.b64(b"\x03"))
        assert client.frames_to_exit("p")[-1]["exitCode"] in {-1, 130}
        until(lambda: not children(holder), "a zombie is left")
        until(lambda: not of_children(holder), "a descriptor is left")


def test_what_a_terminal_said_while_no_daemon_was_there(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, *FLAGS)
    with daemon.connect() as client:
        script = f"until [ -e {tmp_path}/go ]; do sleep 0.01; done; seq 300; exit 42"
        pids = [spawn_shell(client, "late", script, pty={}), spawn_shell(client, "before", "echo b; exit 5", pty={})]
        until(lambda: ended(client, "before"), "it goes on")
    kill(daemon)
    (tmp_path / "go").touch()
    until(lambda: not any(alive(pid) for pid in pids), "they go on")
    said = {"late": b"".join(b"%d\r\n" % number for number in range(1, 301)), "before": b"b\r\n"}
    with Daemon(tmp_path, *FLAGS) as daemon, daemon.connect() as client:
        for process, code in (("late", 42), ("before", 5)):
            until(partial(ended, client, process), "the end is not noticed")
            frames = client.reply("process.reattach", id=process, fromSeq=0)[1]
            assert (output(frames), frames[-1]["exitCode"]) == (said[process], code)


def test_what_was_on_its_way_to_the_record_is_not_late(tmp_path: Path) -> None:
    dying = PatchedDaemon(tmp_path, f"{DIE}\nP._fetch = after(P._fetch, 1)", *FLAGS)
    until(lambda: "listening on" in dying.log.read_text(), "the daemon does not listen")
    with dying.connect() as client:
        client.post("process.spawn", 1, id="p", command="sh", args=["-c", "echo hello; read x"], pty={})
        assert dying.process.wait(10) == -signal.SIGKILL
    with Daemon(tmp_path, *FLAGS) as daemon, daemon.connect() as client:
        assert output(client.reply("process.reattach", id="p", fromSeq=0)[1]) == b"hello\r\n"


def test_typed_input_that_nobody_has_read_yet_waits(tmp_path: Path) -> None:
    """It fills the terminal, then the pipe before that, then its record, and each of them outlives the daemon."""
    daemon = Daemon(tmp_path, *FLAGS)
    data = random.Random(7).randbytes(400_000)
    with daemon.connect() as client:
        script = f"stty raw -echo; echo up; until [ -e {tmp_path}/go ]; do sleep 0.01; done; head -c 400000 | sha256sum"
        spawn_shell(client, "p", script, pty={})
        plain.read_to(client, b"up")
        for at in range(0, len(data), 100_000):
            feed(client, "p", data[at : at + 100_000])
    kill(daemon)
    kill(Daemon(tmp_path, *FLAGS))
    (tmp_path / "go").touch()
    with Daemon(tmp_path, *FLAGS) as daemon, daemon.connect() as client:
        result, frames = client.reply("process.reattach", id="p", fromSeq=0)
        assert result["stdinApplied"] == len(data)
        frames += client.frames_to_exit("p") if result["running"] else []
        assert hashlib.sha256(data).hexdigest().encode() in output(frames)


def test_a_terminal_is_hung_up_with_its_holder_and_not_with_a_daemon(tmp_path: Path) -> None:
    script = f"trap 'echo hup >{tmp_path}/hup; exit' HUP; echo up; while :; do sleep 0.01; done"
    daemon = Daemon(tmp_path, *FLAGS, "-keep-children")
    with daemon.connect() as client:
        pid = spawn_shell(client, "p", script, pty={})
        plain.read_to(client, b"up")
    kill(daemon)
    with Daemon(tmp_path, *FLAGS, "-keep-children") as daemon, daemon.connect() as client:
        assert client.ask("process.reattach", id="p", fromSeq=0)["running"]
    assert alive(pid)
    assert not (tmp_path / "hup").exists()
    (holder,) = holders(tmp_path)
    os.kill(holder, signal.SIGKILL)
    until(lambda: not alive(pid), "it goes on")
    assert (tmp_path / "hup").read_text() == "hup\n"


def test_a_system_that_cannot_splice_terminals_says_so(tmp_path: Path) -> None:
    patch = """
from sterna.remote import keeper
refuse = "def splice(*words, flags): raise OSError(22, '')"
keeper._CODE = f'''import sys; sys.path.insert(0, sys.argv[1]); from sterna.remote import holder
{refuse}
holder.os.splice = splice; holder.main()'''
"""
    daemon = PatchedDaemon(tmp_path, patch, *FLAGS)
    until(lambda: "listening on" in daemon.log.read_text(), "the daemon does not listen")
    with daemon, daemon.connect() as client:
        refused = client.ask("process.spawn", id="p", command="true", pty={})
        assert refused == {"code": -32603, "message": "pipe2: invalid argument"}
        (holder,) = holders(tmp_path)
        assert not of_children(holder)
        spawn_shell(client, "q", "exit 4")
        until(lambda: ended(client, "q"), "pipes do not need it")


def test_all_flags_together(tmp_path: Path) -> None:
    flags = (*FLAGS, "-strict")
    daemon = Daemon(tmp_path, *flags)
    file, token = tmp_path / "file", tmp_path / "daemon.token"
    with daemon.connect() as client, daemon.connect() as watcher:
        watched = watcher.ask("files.watch", path=str(file))
        assert client.ask("files.write", path=str(file), content=plain.b64(b"text"))["success"]
        event = json.loads(watcher.line())
        assert event == {"type": "files", "watch": watched["watch"], "event": "created", "path": str(file)}
        pids = [spawn_shell(client, "pipe", "read x; echo got $x; read x"), spawn_shell(client, "pty", TYPE, pty={})]
        feed(client, "pipe", b"one\n")
        until(lambda: client.ask("process.reattach", id="pty", fromSeq=9)["lastSeq"], "it does not start")
        listed = client.ask("process.list")["processes"]
    token.unlink()
    kill(daemon)
    with Daemon(tmp_path, *flags) as daemon, daemon.connect() as client:
        assert token.read_text() == TOKEN
        again = client.ask("process.list")["processes"]
        assert [process["pid"] for process in again] == [process["pid"] for process in listed] == pids
        assert client.ask("files.read", path=str(file))["content"] == "text"
        feed(client, "pipe", b"\n")
        frames = client.reply("process.reattach", id="pipe", fromSeq=0)[1]
        frames += client.frames_to_exit("pipe") if frames[-1]["stream"] != "exit" else []
        assert (output(frames), frames[-1]["exitCode"]) == (b"got one\n", 0)
        (holder,) = holders(tmp_path)
        client.ask("process.reattach", id="pty", fromSeq=0)
        assert client.ask("process.resize", id="pty", cols=5, rows=4) == {"success": True}
        client.post("server.shutdown", 1)
        assert daemon.process.wait(10) == 0
    wait_gone(pids)
    until(lambda: not alive(holder), "the holder goes on")
    assert not Path(daemon.path).exists()
