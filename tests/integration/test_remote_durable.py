"""`-durable`: processes, their bytes and their ends outlive the daemon."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import resource
import secrets
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sterna.limits import REMOTE_PUNCH_BYTES, REMOTE_RECORD_BYTES
from tests.integration.durable_rig import PatchedDaemon, Talk, children, holders, wait_gone
from tests.integration.remote_rig import Client, Daemon, alive, until

KILLS = 30
PROCESSES = 8


def kill(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.process.wait()


@pytest.mark.timeout(120)
def test_nothing_is_lost_when_the_daemon_is_killed_at_random_moments(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    daemon = Daemon(tmp_path, "-durable", "-extensions")
    talks = [Talk(tmp_path, f"p{number}", 10 + number, terminal=number % 4 == 0) for number in range(PROCESSES)]
    for talk in talks:
        talk.start()
    try:
        until(lambda: all(talk.pid for talk in talks), "the processes do not start")
        for _ in range(KILLS):
            time.sleep(rng.uniform(0, 0.3))
            kill(daemon)
            daemon = Daemon(tmp_path, "-durable", "-extensions")
    finally:
        for talk in talks:
            talk.enough.set()
        for talk in talks:
            talk.join()
    failures = [talk.failure for talk in talks if talk.failure]
    assert not failures, failures
    assert all(talk.reconnects > KILLS // 2 for talk in talks), "the clients hardly noticed"
    (holder,) = holders(tmp_path)
    until(lambda: not children(holder), "zombies are left")
    daemon.__exit__()
    wait_gone([holder, *(talk.pid for talk in talks)])
    assert not Path(f"{daemon.path}.holder").exists()


DIE = """
import os, random
from sterna.remote import durable, keeper
from sterna.limits import REMOTE_FRAME_BYTES
D, P, K = durable.DurableChild, durable.DurablePtyChild, keeper.Keeper
enter, commit, keep, write, finish, start = D._enter, D._commit, D.keep, D.write, D.finish, K.start
def die(share=0.03):
    if random.random() < share:
        os.kill(os.getpid(), 9)
def before(function, share=0.03):
    return lambda *words: (die(share), function(*words))[1]
def after(function, share=0.03):
    return lambda *words: (function(*words), die(share))[0]
class Deadly:
    into = set()
    def __getattr__(self, name):
        return getattr(os, name)
    def splice(self, source, target, size, flags):
        moved = os.splice(source, target, size, flags=flags)
        die(0.3 if target in self.into else 0.01)
        return moved
"""

# Records that go around often; all daemons of a test must have the same.
SMALL = "from sterna.remote import durable\ndurable.REMOTE_RECORD_BYTES = 1_000_000"

MOMENTS = {
    "a record goes around": f"""
{SMALL}
def around(self, *words):
    if self._ends[0] % 1_000_000 == 0:
        die(0.5)
    enter(self, *words)
    if self._ends[0] % 1_000_000 == 0:
        die(1)
D._enter = around
""",
    "output was moved and is in no frame": "D._enter = before(enter)",
    "a frame was recorded and not sent": "D._commit = after(commit)",
    "input was recorded and not acknowledged": "D.keep = after(keep)",
    "input was acknowledged and not moved": "D.write = before(write)",
    "input was moved": "D.write = after(write)",
    "a process was started and nobody was told": "K.start = after(start, 1)",
    "processes are taken up": "D.recover, D._commit = after(D.recover, 0.3), after(commit)",
    "the exit frame is not recorded": "D.finish = before(finish, 1)",
    "the exit frame was recorded and not sent": "D.finish = after(finish, 1)",
    "something was moved, into a terminal or out of it too": "durable.os = Deadly()",
}

# What would be wrong, to see that the clients notice it.
CONTROLS = {
    "output goes through the daemon": """
def read(self, stream):
    try:
        chunk = os.read(self._outputs[stream], REMOTE_FRAME_BYTES)
    except BlockingIOError:
        return None
    die()
    os.write(self._records[stream], chunk)
    return self._commit(stream, len(chunk)) if chunk else b""
D.read = read
""",
    "frames are recorded after they were sent": """
late, read = {}, D.read
def enter_late(self, kind, size, value):
    frame = durable._FRAME.pack(*self._ends, value, kind, size)
    late.setdefault(self, []).append((frame, self._frames * len(frame)))
    self._frames += 1
def flush(self, stream):
    chunk = read(self, stream)
    while len(late.get(self, [])) > 1:
        die()
        os.pwrite(self._index.descriptor, *late[self].pop(0))
    return chunk
D._enter, D.read = enter_late, flush
""",
    "input is acknowledged when it is in memory": """
waiting = {}
def keep_later(self, data):
    waiting[self] = waiting.get(self, b"") + bytes(data)
    self._kept += len(data)
def write_now(self, data):
    kept = waiting.pop(self, b"")
    os.pwrite(self._input.descriptor, kept, self._kept - len(kept))
    return write(self, data)
from sterna.remote import process
Process = process.Process
write_stdin = Process._write_stdin
def later(self, events):
    if events:
        return write_stdin(self, events)
    self._watched_stdin = True
    self._loop.watch(self.child.stdin, 4, lambda mask: (die(0.3), write_stdin(self, mask)))
D.keep, D.write, Process._write_stdin = keep_later, write_now, later
""",
    "output of a terminal waits in the daemon's own pipe": """
init = P.__init__
def own(self, *words):
    init(self, *words)
    self._sources[0], self._out_write = os.pipe()
    Deadly.into.add(self._out_write)
P.__init__ = own
durable.os = Deadly()
""",
    "input of a terminal waits in the daemon's own pipe": """
init = P.__init__
def own(self, *words):
    init(self, *words)
    self._in_read, self._in_write = os.pipe()
    Deadly.into.add(self._in_write)
P.__init__ = own
durable.os = Deadly()
""",
}


def suffer(directory: Path, patch: str, deaths: int) -> list[BaseException]:
    """Returns what went wrong for clients of a daemon that dies so often by a patch, and is then started without it."""
    talks = [Talk(directory, f"p{number}", 10 + number, terminal=number == 0) for number in range(3)]
    daemon: Daemon = PatchedDaemon(directory, DIE + patch, "-durable", "-extensions")
    for talk in talks:
        talk.start()
    try:
        deadline, died = time.monotonic() + 4, 0  # some moments come once
        for _ in range(deaths):
            while daemon.process.poll() is None and time.monotonic() < deadline:
                if "finish" in patch and all(talk.pid for talk in talks):
                    for talk in talks:
                        talk.enough.set()
                time.sleep(0.005)
                if any(talk.failure for talk in talks) or all(talk.over for talk in talks):
                    break
            died += daemon.process.poll() is not None
            kill(daemon)
            daemon = PatchedDaemon(directory, DIE + patch, "-durable", "-extensions")
        assert died, "the daemon has not died by itself"
        kill(daemon)
        daemon = PatchedDaemon(directory, SMALL if SMALL in patch else "", "-durable", "-extensions")
        until(lambda: "listening on" in daemon.log.read_text(), "the daemon does not listen")
        for talk in talks:
            talk.enough.set()
        until(lambda: all(talk.over for talk in talks) or any(talk.failure for talk in talks), "no end")
    finally:
        for talk in talks:
            talk.abandoned.set()
        daemon.__exit__()
        for talk in talks:
            talk.join()
    until(lambda: not holders(directory), "a holder is left")
    return [talk.failure for talk in talks if talk.failure]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_is_lost_when_the_daemon_dies_while(moment: str, tmp_path: Path) -> None:
    failures = suffer(tmp_path, MOMENTS[moment], 6)
    assert not failures, failures


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mistake", CONTROLS)
def test_a_loss_is_noticed_when(mistake: str, tmp_path: Path) -> None:
    failures = suffer(tmp_path, CONTROLS[mistake], 20)
    print(failures)
    assert failures


def spawn_shell(client: Client, process: str, script: str, **more: object) -> int:
    result = client.ask("process.spawn", id=process, command="/bin/sh", args=["-c", script], wantPid=True, **more)
    pid = result["pid"]
    assert isinstance(pid, int)
    return pid


def output(frames: list[Any]) -> bytes:
    return b"".join(base64.b64decode(frame["data"]) for frame in frames if "data" in frame)


def feed(client: Client, process: str, data: bytes) -> Any:
    return client.ask("process.stdin", id=process, data=base64.b64encode(data).decode())


def ended(client: Client, process: str) -> bool:
    return not client.ask("process.reattach", id=process, fromSeq=1 << 40)["running"]


def test_an_upgrade_by_sigterm_keeps_everything(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-durable", "-keep-children") as daemon, daemon.connect() as client:
        pid = spawn_shell(client, "p", "echo one; read x; echo $x; read y; echo $y; exit 3")
        until(lambda: client.ask("process.reattach", id="p", fromSeq=9)["lastSeq"] == 1, "no output")
        before, frames = client.reply("process.reattach", id="p", fromSeq=0, wantPid=True)
        feed(client, "p", b"two\n")
    assert not Path(daemon.path).exists()
    assert alive(pid)
    with Daemon(tmp_path, "-durable") as daemon, daemon.connect() as client:
        after, again = client.reply("process.reattach", id="p", fromSeq=0, wantPid=True)
        assert again[:1] == frames
        assert (after["pid"], after["startTime"]) == (pid, before["startTime"])
        assert after["stdinApplied"] == 4
        assert feed(client, "p", b"three\n") == {"success": True, "applied": 10}
        frames = again + (client.frames_to_exit("p") if again[-1]["stream"] != "exit" else [])
        assert output(frames) == b"one\ntwo\nthree\n"
        assert frames[-1]["exitCode"] == 3


def test_what_ended_while_no_daemon_was_there_has_its_exit_code(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "-durable")
    with daemon.connect() as client:
        pids = [
            spawn_shell(client, "code", f"until [ -e {tmp_path}/go ]; do sleep 0.01; done; echo late; exit 42"),
            spawn_shell(client, "signal", f"until [ -e {tmp_path}/go ]; do sleep 0.01; done; kill -9 $$"),
            spawn_shell(client, "before", "exit 5"),
        ]
        until(lambda: ended(client, "before"), "it goes on")
    kill(daemon)
    (tmp_path / "go").touch()
    until(lambda: not any(alive(pid) for pid in pids), "they go on")
    with Daemon(tmp_path, "-durable") as daemon, daemon.connect() as client:
        codes = {}
        for process in ("code", "signal", "before"):
            until(partial(ended, client, process), "the end is not noticed")
            result, frames = client.reply("process.reattach", id=process, fromSeq=0)
            assert result["lastSeq"] == frames[-1]["seq"] == len(frames)
            codes[process] = (output(frames), frames[-1]["exitCode"])
        assert codes == {"code": (b"late\n", 42), "signal": (b"", -1), "before": (b"", 5)}
        (holder,) = holders(tmp_path)
        until(lambda: not children(holder), "zombies are left")


def test_sigterm_kills_processes_and_ends_the_holder(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-durable") as daemon, daemon.connect() as client:
        pids = [spawn_shell(client, f"p{number}", "sleep 1000 & sleep 1000") for number in range(3)]
        below = [pid for parent in pids for pid in children(parent)]
        (holder,) = holders(tmp_path)
    wait_gone([holder, *pids])
    assert not any(alive(pid) for pid in below)
    assert not Path(f"{daemon.path}.holder").exists()


IMPATIENT = """
from sterna.remote import keeper
times = "holder.REMOTE_HOLDER_IDLE_SECONDS, holder.REMOTE_RETENTION_SECONDS = 0.5, 0.5"
keeper._CODE = f"import sys; sys.path.insert(0, sys.argv[1]); from sterna.remote import holder; {times}; holder.main()"
"""


def test_a_holder_without_daemon_forgets_what_ended_long_ago_and_ends(tmp_path: Path) -> None:
    daemon = PatchedDaemon(tmp_path, IMPATIENT, "-durable")
    until(lambda: "listening on" in daemon.log.read_text(), "the daemon does not listen")
    with daemon.connect() as client:
        pids = [spawn_shell(client, "seen", "true"), spawn_shell(client, "unseen", "sleep 0.2")]
        until(lambda: ended(client, "seen"), "it goes on")
    (holder,) = holders(tmp_path)
    kill(daemon)
    wait_gone([holder, *pids])
    assert not Path(f"{daemon.path}.holder").exists()


def test_a_holder_waits_for_its_processes(tmp_path: Path) -> None:
    daemon = PatchedDaemon(tmp_path, IMPATIENT, "-durable")
    until(lambda: "listening on" in daemon.log.read_text(), "the daemon does not listen")
    with daemon.connect() as client:
        pid = spawn_shell(client, "p", "sleep 3; exit 6")
    (holder,) = holders(tmp_path)
    kill(daemon)
    until(lambda: not alive(pid), "it goes on")
    with Daemon(tmp_path, "-durable") as second, second.connect() as client:
        assert holders(tmp_path) == [holder]
        until(lambda: ended(client, "p"), "the end is not noticed")
        assert client.reply("process.reattach", id="p", fromSeq=0)[1][-1]["exitCode"] == 6


def test_a_daemon_ends_when_its_holder_does_not_answer(tmp_path: Path) -> None:
    patch = "from sterna.remote import keeper\nkeeper.REMOTE_HOLDER_REPLY_SECONDS = 0.5"
    daemon = PatchedDaemon(tmp_path, patch, "-durable")
    until(lambda: "listening on" in daemon.log.read_text(), "the daemon does not listen")
    (holder,) = holders(tmp_path)
    with daemon.connect() as client:
        pid = spawn_shell(client, "p", "read x; exit 7")
        os.kill(holder, signal.SIGSTOP)
        try:
            client.post("process.spawn", 1, id="q", command="/bin/sh", args=["-c", "echo q"])  # it may start or not
            assert daemon.process.wait(20) == 1
            assert "The holder does not answer" in daemon.log.read_text()
        finally:
            os.kill(holder, signal.SIGCONT)
    with Daemon(tmp_path, "-durable") as second, second.connect() as client:
        assert client.ask("process.reattach", id="p", fromSeq=0, wantPid=True)["pid"] == pid
        feed(client, "p", b"\n")
        until(lambda: ended(client, "p"), "it goes on")
        assert client.reply("process.reattach", id="p", fromSeq=0)[1][-1]["exitCode"] == 7


def test_a_second_start_takes_the_processes_over(tmp_path: Path) -> None:
    first = Daemon(tmp_path, "-durable")
    with first.connect() as client:
        pid = spawn_shell(client, "p", "read x; echo $x")
    with Daemon(tmp_path, "-durable") as second:
        assert first.process.wait(10) == -signal.SIGKILL
        until(lambda: "listening on" in second.log.read_text(), "the second daemon does not listen")
        with second.connect() as client:
            assert client.ask("process.reattach", id="p", fromSeq=0, wantPid=True)["pid"] == pid
            client.post("process.stdin", 1, id="p", data=base64.b64encode(b"hello\n").decode())
            assert output(client.frames_to_exit("p")) == b"hello\n"
        assert len(holders(tmp_path)) == 1


def test_an_id_that_is_used_again_leaves_nothing_at_the_holder(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-durable") as daemon, daemon.connect() as client:
        (holder,) = holders(tmp_path)
        descriptors = Path(f"/proc/{holder}/fd"), Path(f"/proc/{daemon.process.pid}/fd")
        spawn_shell(client, "p", "sleep 1000")
        until(lambda: children(daemon.process.pid) == [holder], "the login shell has not ended")
        before = [len(list(path.iterdir())) for path in descriptors]
        old = [spawn_shell(client, "p", script) for script in ["sleep 1000", "true", "sleep 1000"] * 3]
        wait_gone(old[:-1])
        until(
            lambda: all(len(list(path.iterdir())) <= most for path, most in zip(descriptors, before, strict=True)),
            "descriptors are left",
        )
        assert len(children(holder)) == 1


def test_processes_outlive_a_killed_holder_as_long_as_the_daemon(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-durable") as daemon, daemon.connect() as client:
        pid = spawn_shell(client, "p", "read x; echo $x; exit 3")
        (holder,) = holders(tmp_path)
        os.kill(holder, signal.SIGKILL)
        until(lambda: "The holder has ended" in daemon.log.read_text(), "the daemon does not notice")
        wait_gone([holder])
        assert alive(pid)
        client.post("process.stdin", 1, id="p", data=base64.b64encode(b"hello\n").decode())
        frames = client.frames_to_exit("p")
        assert (output(frames), frames[-1]["exitCode"]) == (b"hello\n", -1)
        spawn_shell(client, "q", "exit 4")
        until(lambda: ended(client, "q"), "it goes on")
        assert client.reply("process.reattach", id="q", fromSeq=0)[1][-1]["exitCode"] == 4
        (other,) = holders(tmp_path)
        assert other != holder


def test_only_the_owner_reaches_the_holder(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-durable") as daemon, daemon.connect() as client:
        path = Path(f"{daemon.path}.holder")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        spawn_shell(client, "p", "sleep 1000")
        if os.getuid() != 0:
            pytest.skip("only root can become another user")
        os.chmod(path, 0o666)  # noqa: S103 # what is tested is the check behind it
        for directory in (tmp_path, *tmp_path.parents):
            if directory.stat().st_uid == 0 and directory.name.startswith(("pytest-", "popen-", "test_")):
                os.chmod(directory, 0o711)  # noqa: S103 # as above
        asking = f"""
import os, socket
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(10)
sock.connect({str(path)!r})
try:
    sock.sendall((9).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"\\x05\\0\\0\\0hello")
    print(sock.recv(100))
except ConnectionError:
    print(b"")
"""
        said = subprocess.run([sys.executable, "-c", asking], capture_output=True, text=True, check=False, timeout=20)
        assert said.stdout == "b''\n", said
        assert client.ask("server.ping") == {"pong": True}


def test_a_socket_of_another_user_is_no_holder(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    path = f"{tmp_path}/rpc.sock.holder"
    posing = f"""
import os, socket
sock = socket.socket(socket.AF_UNIX)
sock.bind({path!r})
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock.listen(8)
print("ready", flush=True)
sock.accept()[0].recv(1)
"""
    with subprocess.Popen([sys.executable, "-c", posing], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        try:
            with pytest.raises(AssertionError, match="it belongs to another user"):
                Daemon(tmp_path, "-durable")
        finally:
            other.kill()


def test_input_is_closed_after_what_waits_though_the_daemon_is_killed(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "-durable", "-extensions")
    data = random.Random(4).randbytes(700_000)
    with daemon.connect() as client:
        spawn_shell(client, "p", f"until [ -e {tmp_path}/go ]; do sleep 0.01; done; exec cat")
        assert feed(client, "p", data)["applied"] == len(data)
        client.ask("process.closeStdin", id="p")
    kill(daemon)
    with Daemon(tmp_path, "-durable", "-extensions") as daemon, daemon.connect() as client:
        assert "closed" in feed(client, "p", b"more")["message"]
        (tmp_path / "go").touch()
        result, frames = client.reply("process.reattach", id="p", fromSeq=0)
        if result["running"]:
            frames += client.frames_to_exit("p")
        assert output(frames) == data
        assert frames[-1]["exitCode"] == 0


def test_records_are_bounded(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "-durable", "-extensions")
    pieces = [random.Random(number).randbytes(500_000) for number in range(40)]
    bound = 2 * REMOTE_RECORD_BYTES + 4 * REMOTE_PUNCH_BYTES
    with daemon.connect() as client:
        script = "seq 1 4000000; seq 4000000 8000000 >&2; sha256sum"
        spawn_shell(client, "p", script)
        (holder,) = holders(tmp_path)
        frames, last = [b""], b""
        while last != b"8000000\n":
            frames.append(client.line())
            last = output([json.loads(frames[-1])])[-8:]
        for piece in pieces:
            feed(client, "p", piece)
        until(lambda: memory_files(holder) < bound, "too many bytes are held")
        before = client.ask("process.reattach", id="p", fromSeq=1 << 40)
    kill(daemon)
    with Daemon(tmp_path, "-durable", "-extensions") as daemon, daemon.connect() as client:
        client.post("process.reattach", 1, id="p", fromSeq=0)
        for number in range(before["firstSeq"], before["lastSeq"] + 1):
            assert client.line() == frames[number]
        result = json.loads(client.line())["result"]
        assert result == before
        assert result["stdinApplied"] == len(b"".join(pieces))
        client.post("process.closeStdin", 1, id="p")
        digest = output(client.frames_to_exit("p"))
        assert digest.split()[0].decode() == hashlib.sha256(b"".join(pieces)).hexdigest()


def memory_files(pid: int) -> int:
    """Returns the bytes that the memory files of a process take."""
    total = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:" in os.readlink(entry):
            total += entry.stat().st_blocks * 512
    return total


def test_a_limit_of_file_sizes_is_refused(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, before[1]))
    try:
        with pytest.raises(AssertionError, match="ulimit -f"):
            Daemon(tmp_path, "-durable")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
