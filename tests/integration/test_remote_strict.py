"""What `-strict` makes safer, each beside what the daemon does without it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.remote_rig import TOKEN, Client, Daemon, alive, until
from tests.integration.test_remote_git import IDENTITY, shell

COMMAND = [sys.executable, "-m", "sterna.remote"]
NOBODY = 65_534
SHUTDOWN = b'{"jsonrpc":"2.0","id":1,"method":"server.shutdown"}\n'
UNAUTHORIZED = {"code": -32001, "message": "Unauthorized: invalid or missing auth token"}


def environment(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.environ["PATH"], "SHELL": "/bin/sh", "LC_ALL": "C"}


def run(*words: str, home: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *words], env=environment(home), cwd=home, input=stdin, capture_output=True, check=False, timeout=60
    )


def serve(path: Path, *flags: str, token: str = TOKEN) -> subprocess.CompletedProcess[bytes]:
    return run("-serve", "-socket", str(path), "-token-fd", "0", *flags, home=path.parent, stdin=token.encode())


def peer(client: Client) -> int:
    credentials = client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[:4], sys.byteorder)


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    until(lambda: not alive(pid), "the daemon is gone")


def answers(path: Path, token: str = TOKEN) -> bool:
    try:
        with Client(str(path)) as client:
            client.send(
                json.dumps({"jsonrpc": "2.0", "id": 1, "method": "server.ping", "auth": token}).encode() + b"\n"
            )
            return b"pong" in client.line()
    except OSError:
        return False


@pytest.fixture(autouse=True)
def no_daemon_stays(tmp_path: Path) -> Iterator[None]:
    """Ends what the launcher started in this test's directory, also when the test fails."""
    yield
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"-serve" in words and any(word.startswith(os.fsencode(f"{tmp_path}/")) for word in words):
            end(int(place.name))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("strict"), "-strict", **IDENTITY) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


# ------------------------------------------------------------------------------------------------------- who connects

CONNECT = (
    "import os, socket, sys\nsock = socket.socket(socket.AF_UNIX)\nuser = int(sys.argv[2])\n"
    "if user: os.setgroups([]); os.setgid(user); os.setuid(user)\n"
    "sock.connect(sys.argv[1])\nsock.sendall(sys.argv[3].encode() + b'\\n')\n"
    "try: print(sock.recv(100).decode(), end='')\nexcept ConnectionError: pass\n"
)


def ping_as(user: int, path: str) -> str:
    line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "server.ping", "auth": TOKEN})
    words = [sys.executable, "-S", "-c", CONNECT, path, str(user), line]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=20).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_only_the_own_user_and_root_are_served() -> None:
    """The socket is opened to everybody by hand, which is what the check is for."""
    for flags, served in (([], True), (["-strict"], False)):
        directory = Path(tempfile.mkdtemp())
        try:
            directory.chmod(0o755)
            with Daemon(directory, *flags) as daemon:
                os.chmod(daemon.path, 0o666)  # noqa: S103 # as somebody would by mistake
                assert bool(ping_as(NOBODY, daemon.path)) == served
                assert "pong" in ping_as(0, daemon.path)
                refused = f"[Server] Refused a connection of user {NOBODY}" in daemon.log.read_text()
                assert refused != served
        finally:
            shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_is_served_by_the_daemon_of_somebody_else() -> None:
    from sterna.remote import strict

    before = os.geteuid()
    os.seteuid(NOBODY)
    try:
        assert [strict.may_connect(user) for user in (0, NOBODY, 1)] == [True, True, False]
    finally:
        os.seteuid(before)


# ------------------------------------------------------------------------------------------------- one daemon a socket


def test_a_second_start_says_so(tmp_path: Path) -> None:
    path = tmp_path / "d" / "rpc.sock"
    path.parent.mkdir(mode=0o700)
    assert serve(path, "-strict").returncode == 0
    with Client(str(path)) as client:
        pid = peer(client)
    try:
        log = path.parent / "remote-server.log"
        inode = log.stat().st_ino
        second = serve(path, "-strict", token="other")
        assert second.returncode == 1
        text = (
            f"a daemon (PID {pid}) already serves {path}; "
            "stop it with -stop -strict or choose a -socket in another directory"
        )
        assert second.stderr.decode() == f"claustrum: {text}\n"
        assert answers(path)
        assert (path.parent / "daemon.token").read_text() == TOKEN
        assert log.stat().st_ino == inode  # and not begun anew
        third = serve(path, token="other")  # without the flag: as ever
        assert third.returncode == 0
        until(lambda: answers(path, "other"), "it takes the socket over")
        with Client(str(path)) as client:
            other = peer(client)
        assert other != pid
        os.kill(pid, signal.SIGTERM)
        until(lambda: not alive(pid), "the first one ends")
        assert answers(path, "other")  # its socket is not removed by the first one
        assert (path.parent / "daemon.token").read_text() == "other"
        assert b"already serves" in serve(path, "-strict").stderr  # found by asking, as this one holds no lock
        end(other)
    finally:
        end(pid)


def test_of_ten_starts_at_once_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    results: list[tuple[int, str]] = []

    def start(token: str) -> None:
        results.append((serve(path, "-strict", token=token).returncode, token))

    threads = [threading.Thread(target=start, args=(f"token{number}",)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [token for code, token in results if code == 0]
    assert len(winners) == 1
    assert answers(path, winners[0])
    with Client(str(path)) as client:
        end(peer(client))


def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert serve(path, "-strict").returncode == 0
    assert answers(path)
    with Client(str(path)) as client:
        end(peer(client))
    assert path.exists()
    assert serve(path, "-strict").returncode == 0  # the lock of a killed daemon holds nobody up
    with Client(str(path)) as client:
        end(peer(client))
    path.unlink()
    path.write_text("mine")
    refused = serve(path, "-strict")
    text = f"claustrum: {path} is no socket; move it away or choose another -socket\n"
    assert (refused.returncode, refused.stderr.decode()) == (1, text)
    assert path.read_text() == "mine"
    assert serve(path).returncode == 0  # without the flag it is replaced
    until(lambda: answers(path), "the daemon listens")
    with Client(str(path)) as client:
        end(peer(client))


def test_children_inherit_nothing_of_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    assert serve(path, "-strict").returncode == 0
    with Client(str(path)) as client:
        pid = peer(client)
        words = ["-c", "ls -l /proc/self/fd; env; sleep 60"]
        shown = client.ask("process.spawn", id="p", command="sh", args=words, wantPid=True)
        child = shown["pid"]
        # The daemon's own descriptors are there until the child has become another program.
        until(lambda: Path(f"/proc/{child}/comm").read_text() == "sh\n", "the child runs")
        assert len(os.listdir(f"/proc/{child}/fd")) == 3
        assert b"CLAUSTRUM" not in Path(f"/proc/{child}/environ").read_bytes()
    end(pid)
    assert serve(path, "-strict").returncode == 0  # the child of the killed one is still there
    with Client(str(path)) as client:
        end(peer(client))
    end(child)


# ---------------------------------------------------------------------------------------------------------- the end


def test_shutting_down_needs_the_token(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-strict") as daemon:
        with daemon.connect() as client:
            client.send(SHUTDOWN)
            assert json.loads(client.line()) == {"jsonrpc": "2.0", "id": 1, "error": UNAUTHORIZED}
            assert client.ask("server.ping") == {"pong": True}
            client.post("server.shutdown")
            assert client.line() == b""
        assert daemon.process.wait(10) == 0
        assert not os.path.exists(daemon.path)
    with Daemon(tmp_path) as plain, plain.connect() as client:
        client.send(SHUTDOWN)
        assert client.line() == b""
        assert plain.process.wait(10) == 0


def test_stopping_removes_only_what_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    for flags in (["-strict"], []):
        assert serve(path, *flags).returncode == 0
        with Client(str(path)) as client:
            pid = peer(client)
        done = run("-stop", "-strict", "-socket", str(path), home=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        until(lambda: not alive(pid), "the daemon ends")  # noqa: B023 # called at once
        assert not path.exists()
    assert serve(path, "-strict").returncode == 0
    assert run("-stop", "-strict", "-socket", str(path), home=tmp_path).returncode == 0
    assert serve(path, "-strict").returncode == 0  # at once: the lock is free
    assert run("-stop", "-strict", "-socket", str(path), home=tmp_path).returncode == 0
    path.write_text("mine")
    assert run("-stop", "-strict", "-socket", str(path), home=tmp_path).returncode == 0
    assert path.read_text() == "mine"
    assert run("-stop", "-socket", str(path), home=tmp_path).returncode == 0  # without the flag it goes
    assert not path.exists()


def test_stopping_says_when_a_daemon_goes_on(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-strict") as daemon:
        until((tmp_path / "daemon.token").exists, "the daemon has written its token")
        (tmp_path / "daemon.token").write_text("another one")
        done = run("-stop", "-strict", "-socket", daemon.path, home=tmp_path)
        assert done.returncode == 1
        assert done.stderr.decode() == (
            f"claustrum: the daemon at {daemon.path} goes on: it does not take the token beside it; end it by SIGTERM\n"
        )
        assert os.path.exists(daemon.path)
        os.unlink(f"{daemon.path}.kept")  # else it comes back
        stopped = run("-stop", "-socket", daemon.path, home=tmp_path)  # without the flag: unlinked, goes on
        assert stopped.returncode == 0
        assert daemon.process.poll() is None
        done = run("-stop", "-strict", "-socket", daemon.path, home=tmp_path)
        text = (
            f"claustrum: the daemon (PID {daemon.process.pid}) has lost its socket {daemon.path}; end it by SIGTERM\n"
        )
        assert (done.returncode, done.stderr.decode()) == (1, text)


def test_a_socket_that_was_removed_comes_back(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-strict") as daemon:
        path = Path(daemon.path)
        before = path.stat().st_ino
        for _ in range(2):
            assert run("-stop", "-socket", daemon.path, home=tmp_path).returncode == 0
            until(lambda: answers(path), "the socket is back")
        assert path.stat().st_ino == before
        with Client(daemon.path) as client:
            assert peer(client) == daemon.process.pid
        path.unlink()
        path.write_text("of somebody else")
        time.sleep(0.7)
        assert path.read_text() == "of somebody else"
        path.unlink()
        until(lambda: answers(path), "the socket is back")
        assert run("-stop", "-strict", "-socket", daemon.path, home=tmp_path).returncode == 0
        assert daemon.process.wait(10) == 0
        assert sorted(tmp_path.glob("rpc.sock*")) == [tmp_path / "rpc.sock.lock"]


@pytest.mark.parametrize("flag", ["-strict", "-durable", "-extensions"])
def test_a_start_that_fails_says_why(flag: str, tmp_path: Path) -> None:
    path, missing = tmp_path / "rpc.sock", str(tmp_path / "typo")
    assert serve(path).returncode == 0
    with Client(str(path)) as client:
        pid = peer(client)
    log = (tmp_path / "remote-server.log").stat().st_ino
    words = ["-serve", flag, "-socket", str(path)]
    long = tmp_path / ("x" * 120)
    for more, reason in (
        ((), "there is no token: pass -token-file FILE or -token-fd N"),
        (("-token-fd", "0"), "token is empty"),
        (("-token-file", missing), f"read --token-file: open {missing}: no such file or directory"),
        (("-token-fd", "0", "-socket", str(long)), f"the path of the socket has {len(str(long))} bytes of 107"),
    ):
        began = time.monotonic()
        done = run(*words, *more, home=tmp_path, stdin=b"" if reason == "token is empty" else b"t")
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode().startswith(f"claustrum: {reason}")
        assert time.monotonic() - began < 5
        assert (tmp_path / "remote-server.log").stat().st_ino == log, "the log of the daemon that serves"
    if flag != "-strict":  # it looks at the name itself
        place = tmp_path / "d"
        (place / "rpc.sock" / "full").mkdir(parents=True)
        done = run("-serve", flag, "-socket", str(place / "rpc.sock"), "-token-fd", "0", home=tmp_path, stdin=b"t")
        assert done.returncode == 1
        said = done.stderr.decode()
        assert "the daemon ended at its start: listen unix: " in said
        assert "address already in use" in said
        assert f"(the log is {place / 'remote-server.log'})" in said
    assert answers(path)
    end(pid)


def test_stopping_leaves_the_next_daemon_its_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system gives the number of a removed socket to the next one."""
    from sterna.remote import stop

    path = tmp_path / "rpc.sock"
    assert serve(path, "-strict").returncode == 0
    seen: list[int] = []

    def identity(_path: str) -> tuple[int, int]:
        if seen:
            assert serve(path, "-strict").returncode == 0, "the one that was stopped is waited for"
        seen.append(1)
        return 1, 1

    monkeypatch.setattr(stop, "socket_identity", identity)
    stop.stop_own(str(path))
    assert len(seen) == 2
    assert answers(path)
    monkeypatch.undo()
    stop.stop_own(str(path))
    assert not path.exists()


def test_a_socket_that_its_daemon_leaves_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True)\n"
        "c = s.accept()[0]; c.recv(999); c.close(); import time; time.sleep(0.3)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as left:
        assert left.stdout is not None
        left.stdout.readline()
        assert run("-stop", "-strict", "-socket", str(path), home=tmp_path).returncode == 0
        assert not alive(left.pid), "it is waited for"
    assert not path.exists()


def test_a_pipe_is_no_token(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-strict") as daemon:
        until((tmp_path / "daemon.token").exists, "the daemon has written its token")
        (tmp_path / "daemon.token").unlink()
        os.mkfifo(tmp_path / "daemon.token")
        done = run("-stop", "-strict", "-socket", daemon.path, home=tmp_path)
        assert done.returncode == 1
        assert b"it does not take the token beside it" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_token_goes_to_no_listener_of_somebody_else() -> None:
    script = (
        "import os, socket, sys; os.setuid(int(sys.argv[2])); s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1])\n"
        "s.listen(); print(flush=True); c = s.accept()[0]; print(c.recv(999), flush=True)"
    )
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        place, token = Path(name) / "rpc.sock", Path(name) / "daemon.token"
        token.write_text(TOKEN)
        for owner, status in ((0, 1), (NOBODY, 0)):  # whose token it is may see it
            os.chown(token, owner, owner)
            words = [sys.executable, "-c", script, str(place), str(NOBODY)]
            with subprocess.Popen(words, stdout=subprocess.PIPE) as listener:
                assert listener.stdout is not None
                listener.stdout.readline()
                done = run("-stop", "-strict", "-socket", str(place), home=Path(name))
                got = listener.stdout.readline()
            assert done.returncode == status
            assert (TOKEN.encode() in got) == (status == 0)
            assert (b"belongs to user 65534; nothing was sent to it" in done.stderr) == (status == 1)
            place.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------- half-closes, the bridge


def exchange(path: str, data: bytes) -> bytes:
    """Sends, closes the sending side, and returns what comes until the daemon closes."""
    with Client(path) as client:
        client.send(data)
        client.sock.shutdown(socket.SHUT_WR)
        seen = b""
        while line := client.line():
            seen += line
        return seen


def request(number: int, method: str, **params: object) -> bytes:
    message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params, "auth": TOKEN}
    return json.dumps(message).encode() + b"\n"


def test_replies_survive_a_half_close(daemon: Daemon, tmp_path: Path) -> None:
    requests = (
        request(1, "files.list", path="/") + request(2, "git.info", path="/")
        + request(3, "process.spawn", id="h", command="sleep", args=["60"])
        + request(4, "process.killAndWait", id="h", signal="TERM") + request(5, "server.ping")[:-1]
    )  # fmt: skip
    for _ in range(20):
        lines = [json.loads(line) for line in exchange(daemon.path, requests).splitlines()]
        assert sorted(line["id"] for line in lines if "id" in line) == [1, 2, 3, 4, 5]
    with Daemon(tmp_path) as plain:
        slow = request(1, "git.info", path="/")
        assert exchange(plain.path, slow) == b""


def test_a_half_closed_client_gets_more_than_a_socket_holds(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x" * 200_000)
    requests = b"".join(request(number, "files.read", path=str(tmp_path / "f")) for number in range(50))
    assert exchange(daemon.path, requests).count(b"\n") == 50


def test_a_half_closed_client_that_goes_is_forgotten(daemon: Daemon) -> None:
    before = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
    for _ in range(50):
        with daemon.connect() as client:
            client.send(request(1, "files.list", path="/dev") * 3)
            client.sock.shutdown(socket.SHUT_WR)
    until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= before, "no connection is left")
    start = daemon.processor_seconds()
    with daemon.connect() as client:  # waits for its reply without keeping the daemon busy
        client.send(request(1, "process.spawn", id="l", command="cat") + request(2, "process.killAndWait", id="l",
                    signal="HUP", escalate=False, timeoutMs=700) + request(3, "process.kill", id="none"))  # fmt: skip
        client.sock.shutdown(socket.SHUT_WR)
        while client.line():
            pass
    assert daemon.processor_seconds() - start < 0.3


def test_the_bridge_waits_for_replies(daemon: Daemon, tmp_path: Path) -> None:
    pings = b"".join(request(number, "git.info", path="/") for number in range(30))
    drained = run("-bridge", "-strict", "-socket", daemon.path, home=tmp_path, stdin=pings)
    assert drained.returncode == 0
    assert drained.stdout.count(b"\n") == 30
    plain = run("-bridge", "-socket", daemon.path, home=tmp_path, stdin=pings)
    assert plain.returncode == 0
    assert plain.stdout.count(b"\n") < 30


def test_the_bridge_ends_with_the_daemon(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-strict") as daemon:
        bridge = subprocess.Popen(
            [*COMMAND, "-bridge", "-strict", "-socket", daemon.path], env=environment(tmp_path),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert bridge.stdin is not None
        assert bridge.stdout is not None
        bridge.stdin.write(request(1, "server.ping"))
        bridge.stdin.flush()
        assert b"pong" in bridge.stdout.readline()
        daemon.process.kill()
        assert bridge.wait(10) == 0
        bridge.stdin.close()
        bridge.stdout.close()


# ----------------------------------------------------------------------------------------------------------- archives


def archive(place: Path, names: dict[str, bytes], cut: int = 0) -> str:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    place.write_bytes(data[: len(data) - cut])
    return str(place)


def tree(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def test_an_extraction_that_fails_changes_nothing(client: Client, tmp_path: Path) -> None:
    target = tmp_path / "out"
    names = {"a": b"1", "d/b": b"2"}
    expected = {"success": True, "fileCount": 2}
    assert client.ask("files.extract_tar", archivePath=archive(tmp_path / "t", names), destDir=str(target)) == expected
    assert tree(target) == [".synced", "a", "d", "d/b"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    for bad in (
        archive(tmp_path / "t1", {"new": os.urandom(100_000)}, cut=5_000),
        archive(tmp_path / "t2", {"new": b"x", "../../escape": b"y"}),
    ):
        result = client.ask("files.extract_tar", archivePath=bad, destDir=str(target))
        assert not result["success"]
        assert str(target) not in result["error"] or "staged" not in result["error"]
        assert tree(target) == [".synced", "a", "d", "d/b"]
        assert not os.path.exists(bad)
    assert os.listdir(tmp_path) == ["out"]
    assert client.ask("files.extract_tar", archivePath=archive(tmp_path / "t", {"c": b""}), destDir=str(target))[
        "success"
    ]
    assert tree(target) == [".synced", "c"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_archive_in_the_directory_that_it_replaces(client: Client, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    inside = archive(target / "t.tgz", {"t.tgz": b"of the new one"})
    assert client.ask("files.extract_tar", archivePath=inside, destDir=str(target))["success"]
    assert (target / "t.tgz").read_bytes() == b"of the new one"


def test_without_the_flag_a_failed_extraction_leaves_what_it_got(tmp_path: Path) -> None:
    with Daemon(tmp_path) as plain, plain.connect() as client:
        target = tmp_path / "out"
        target.mkdir()
        (target / "old").write_text("")
        bad = archive(tmp_path / "t2", {"new": b"x", "../../escape": b"y"})
        assert not client.ask("files.extract_tar", archivePath=bad, destDir=str(target))["success"]
        assert tree(target) == ["new"]


def test_nobody_sees_a_directory_that_is_half_unpacked(client: Client, tmp_path: Path) -> None:
    target, going, seen = tmp_path / "out", True, set()
    names = {f"{number:03}": b"x" * 100 for number in range(60)}
    first = archive(tmp_path / "t", names)
    assert client.ask("files.extract_tar", archivePath=first, destDir=str(target))["success"]

    def look() -> None:
        while going:
            directory = os.open(target, os.O_RDONLY)  # must always be there
            if os.path.exists(f"/proc/self/fd/{directory}/.synced"):
                seen.add(True)
            os.close(directory)

    looker = threading.Thread(target=look)
    looker.start()
    for _ in range(6):
        again = archive(tmp_path / "t", names)
        assert client.ask("files.extract_tar", archivePath=again, destDir=str(target))["fileCount"] == 60
    going = False
    looker.join()
    assert seen == {True}
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_extraction_left_is_swept(client: Client, tmp_path: Path) -> None:
    (tmp_path / ".out.staged-0123456789abcdef" / "deep").mkdir(parents=True)
    (tmp_path / ".other.staged-0123456789abcdef").mkdir()
    target = tmp_path / "out"
    target.write_text("a file is replaced too")
    assert client.ask("files.extract_tar", archivePath=archive(tmp_path / "t", {"a": b""}), destDir=str(target))[
        "success"
    ]
    assert sorted(os.listdir(tmp_path)) == [".other.staged-0123456789abcdef", "out"]
    assert tree(target) == [".synced", "a"]


def test_swapping_without_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from errno import EINVAL

    from sterna.remote import staging

    def refuse(_one: bytes, _other: bytes) -> None:
        raise OSError(EINVAL, "no exchange on this file system")

    monkeypatch.setattr(staging, "_exchange", refuse)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    staged = staging.Staging(str(tmp_path / "out"))
    Path(staged.path, "new").write_text("")
    staged.swap()
    assert tree(tmp_path) == ["out", "out/new"]


# ---------------------------------------------------------------------------------------------------- files and git


def test_only_regular_files_are_read(client: Client, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused = {"code": -32602, "message": "files.read: not a regular file"}
    for path in ("/dev/zero", str(tmp_path / "fifo"), "/dev/null"):
        assert client.ask("files.read", path=path) == refused
    assert client.ask("files.read", path="/proc/self/comm")["exists"]
    with Daemon(tmp_path) as plain, plain.connect() as other:
        assert other.ask("files.read", path="/dev/null") == {"content": "", "exists": True}


def test_git_has_a_deadline(tmp_path: Path) -> None:
    """The bound is a minute; the flag makes it shorter here, and 0 takes it away."""
    from sterna.limits import REMOTE_GIT_STRICT_SECONDS
    from sterna.remote import daemon as parts
    from sterna.remote.flags import parse

    assert REMOTE_GIT_STRICT_SECONDS == 60
    for words, seconds in (([], 0.0), (["-strict"], 60.0), (["-strict", "-git-timeout=0"], 0.0),
                           (["-strict", "-git-timeout=5s"], 5.0)):  # fmt: skip
        assert parts.git_seconds(parse(words)) == seconds
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\ncase $* in *status*) exec sleep 60;; esac\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    with Daemon(tmp_path, "-strict", "-git-timeout", "300ms", PATH=path) as daemon, daemon.connect() as client:
        began = time.monotonic()
        assert client.ask("git.status", path="/") == {"code": -32603, "message": "signal: killed"}
        assert time.monotonic() - began < 10


def test_only_worktrees_of_the_repository_are_removed(client: Client, tmp_path: Path) -> None:
    shell(tmp_path, "git init -q -b main repo; cd repo; echo a > a; git add a; git commit -qm one")
    repo = tmp_path / "repo"
    shell(repo, "git worktree add -q -b one ../one; git worktree add -q -b two ../two; git worktree lock ../two")
    shell(repo, "git worktree add -q -b three ../three; mkdir ../plain ../one/sub; ln -s one ../link")
    shell(tmp_path, "git init -q -b main other; mkdir other/x")

    def remove(name: str) -> str:
        place = name if name.startswith("/") else str(tmp_path / name)
        result = client.ask("git.worktree_remove", baseRepo=str(repo), worktreePath=place)
        return "" if result == {"success": True} else result["error"]

    for name in ("plain", "repo", "other", "other/x", "one/sub", "missing", "one/../plain", "/etc"):
        place = name if name.startswith("/") else f"{tmp_path}/{name}"
        assert remove(name) == f'worktreePath is not a worktree of the repository: "{place}"', name
    assert remove("two") == f'worktree is locked: "{tmp_path}/two"'
    for name in ("plain", "repo", "other/x", "one/sub", "two"):
        assert (tmp_path / name).is_dir()
    assert remove("link") == ""  # what it leads to is a worktree
    assert not (tmp_path / "one").exists()
    shell(tmp_path, "echo broken > three/.git")  # git does not remove this one, and it is one all the same
    assert remove("three") == ""
    assert not (tmp_path / "three").exists()
    result = client.ask("git.worktree_remove", baseRepo=str(repo), worktreePath="../two")
    assert result["error"] == 'worktree is locked: "../two"'
    result = client.ask("git.worktree_remove", baseRepo=str(tmp_path), worktreePath=str(tmp_path / "plain"))
    assert result == {"success": False, "error": "git worktree list failed: exit status 128"}
    with Daemon(tmp_path) as plain, plain.connect() as other:
        assert other.ask("git.worktree_remove", baseRepo=str(repo), worktreePath=str(tmp_path / "plain"))["success"]
        assert not (tmp_path / "plain").exists()  # without the flag


def test_both_flags_may_stand_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "claustrum.conf").write_text("strict = yes\nExtensions = on\n")
    program = tmp_path / "sterna-remote"
    program.write_text(f"#!{sys.executable}\nfrom sterna.remote.app import main\nmain()\n")
    program.chmod(0o755)
    path = tmp_path / "rpc.sock"
    words = [str(program), "-serve", "-socket", str(path), "-token-fd", "0"]
    subprocess.run(words, env=environment(tmp_path), input=TOKEN.encode(), check=True, timeout=30)
    with Client(str(path)) as client:
        client.send(SHUTDOWN)
        assert json.loads(client.line())["error"] == UNAUTHORIZED
        assert client.ask("process.list") == {"processes": []}
    again = subprocess.run(words, env=environment(tmp_path), input=b"x", capture_output=True, check=False, timeout=30)
    assert b"already serves" in again.stderr
    done = subprocess.run([program, "-stop", "-socket", path], env=environment(tmp_path), check=False, timeout=30)
    assert done.returncode == 0  # with the token, as strict is on for every mode
    assert not answers(path)
    words.append("-strict=false")
    subprocess.run(words, env=environment(tmp_path), input=TOKEN.encode(), check=True, timeout=30)
    with Client(str(path)) as client:
        client.send(SHUTDOWN)
        assert client.line() == b""
