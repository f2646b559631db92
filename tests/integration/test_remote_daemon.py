"""The daemon's start, its framing, its bounds and its end."""

from __future__ import annotations

import base64
import gzip
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.remote_rig import TOKEN, Client, Daemon, alive, until

COMMAND = [sys.executable, "-m", "sterna.remote"]
PING = f'{{"jsonrpc":"2.0","id":7,"method":"server.ping","auth":"{TOKEN}"}}'.encode()
PONG = b'{"jsonrpc":"2.0","id":7,"result":{"pong":true}}\n'
PARSE_ERROR = b'{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"Parse error"}}\n'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("remote")) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


def run(*words: str, home: Path, stdin: bytes = b"", **more: str) -> subprocess.CompletedProcess[bytes]:
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "SHELL": "/bin/sh", **more}
    return subprocess.run(
        [*COMMAND, *words], env=environment, cwd=home, input=stdin, capture_output=True, check=False, timeout=40
    )


# -------------------------------------------------------------------------------------------------------------- framing


def test_lines_of_any_cut_are_answered(client: Client) -> None:
    for byte in PING + b"\r\n":
        client.send(bytes([byte]))
    assert client.line() == PONG
    client.send(b"\n\r\n" + PING + b"\n" + PING + b"\r\r\n   \n" + PING + b"\n")
    assert [client.line() for _ in range(4)] == [PONG, PONG, PARSE_ERROR, PONG]


def test_the_longest_line_is_served_and_a_longer_one_ends_the_connection(daemon: Daemon) -> None:
    for line in (PING + b" " * (1_048_575 - len(PING)) + b"\n", PING + b" " * (1_048_574 - len(PING)) + b"\r\n"):
        with daemon.connect() as client:
            client.send(line)
            assert client.line() == PONG
    for line in (b" \n", b" ", b"\r\n"):
        with daemon.connect() as client:
            client.send(PING + b"\n")
            assert client.line() == PONG
            try:
                client.send(PING + b" " * (1_048_575 - len(PING)) + line)
            except OSError:
                pass
            assert client.line() == b""
    assert "[Server] scanner error on @: bufio.Scanner: token too long" in daemon.log.read_text()


def test_the_last_line_needs_no_end(daemon: Daemon, tmp_path: Path) -> None:
    made = tmp_path / "made"
    request = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "process.spawn",
        "auth": TOKEN,
        "params": {"id": "t", "command": "touch", "args": [str(made)]},
    }
    with daemon.connect() as client:
        client.send(json.dumps(request).encode())
        client.sock.shutdown(socket.SHUT_WR)
        while client.line():
            pass
    until(made.exists, "the request was served")


def test_checks_come_in_their_order(client: Client) -> None:
    for members, code in (
        ({"method": 5}, -32700), ({"method": "x", "auth": "no", "jsonrpc": "1"}, -32001),
        ({"method": "x", "auth": TOKEN, "jsonrpc": "1"}, -32600),
        ({"method": "x", "auth": TOKEN}, -32601), ({"method": "x.y", "auth": TOKEN}, -32601),
        ({"method": "files.nope", "auth": TOKEN, "params": 1}, -32601),
        ({"method": "files.stat", "auth": TOKEN}, -32602),
        ({"method": "files.stat", "auth": TOKEN, "params": 1}, -32602),
        ({"method": "server.shutdown", "jsonrpc": 2}, -32700),
        ({"method": "server.shutdown", "jsonrpc": "1"}, -32600), ({"method": "Server.shutdown"}, -32001),
    ):  # fmt: skip
        client.send(json.dumps({"jsonrpc": "2.0", "id": 1} | members).encode() + b"\n")
        assert json.loads(client.line())["error"]["code"] == code, members


def test_a_slow_file_holds_up_nobody(client: Client, daemon: Daemon) -> None:
    os.mkfifo(daemon.home / "fifo")
    for number in range(20):
        client.post("files.read", 1000 + number, path=str(daemon.home / "fifo"))
    assert client.ask("server.ping") == {"pong": True}
    with open(daemon.home / "fifo", "wb") as file:
        file.write(b"late")
    assert json.loads(client.line())["result"]["exists"]


def test_what_is_no_directory_cannot_be_listed(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, text in (
            ("file", "readdirent {}: not a directory"), ("fifo", "readdirent {}: not a directory"),
            ("file/below", "open {}: not a directory"), ("socket", "open {}: no such device or address"),
            ("link", "open {}: no such device or address"), ("a\0b", "open {}: invalid argument"),
        ):  # fmt: skip
            error = client.ask("files.list", path=f"{tmp_path}/{name}")
            assert error == {"code": -32603, "message": text.format(f"{tmp_path}/{name}")}


def test_a_limit_below_zero_is_none(client: Client, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("text")
    for limit in (-1, -(2**63), 0, None, 4):
        assert client.ask("files.read", path=str(tmp_path / "f"), maxBytes=limit) == {"content": "text", "exists": True}
    (tmp_path / "f").write_bytes(bytes(262_145))
    assert client.ask("files.read", path=str(tmp_path / "f"), maxBytes=-1)["code"] == -32602


def test_an_endless_device_is_an_error(client: Client) -> None:
    assert client.ask("files.read", path="/dev/zero") == {"code": -32603, "message": "read /dev/zero: file too large"}


# ---------------------------------------------------------------------------------------------------------------- abuse


def test_two_thousand_clients_and_their_end(daemon: Daemon) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients: list[Client] = []
    try:
        clients.extend(daemon.connect() for _ in range(min(2_000, hard - 100)))
        for client in clients[::100]:
            client.send(PING + b"\n")
            assert client.line() == PONG
    finally:
        for client in clients:
            client.sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with daemon.connect() as client:
        assert client.ask("server.ping") == {"pong": True}
    assert daemon.memory_mib() < 120


def test_without_descriptors_clients_wait_until_others_have_gone(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (40, 40))
        clients = [daemon.connect() for _ in range(60)]
        error = clients[0].ask("process.spawn", id="x", command="true")
        assert error == {"code": -32603, "message": "pipe2: too many open files"}
        before = daemon.processor_seconds()
        time.sleep(0.5)  # nothing to wait for: the daemon is to do nothing
        assert daemon.processor_seconds() - before < 0.2
        for client in clients[:50]:
            client.sock.close()
        for client in clients[50:]:
            assert client.ask("server.ping") == {"pong": True}
            client.sock.close()


def test_a_client_that_only_sends_is_not_read_for_ever(daemon: Daemon) -> None:
    with daemon.connect() as greedy, daemon.connect() as other:
        greedy.sock.settimeout(1)
        line = json.dumps({"id": "x" * 100_000, "method": "y"}).encode() + b"\n"
        sent = 0
        while sent < 20_000_000:
            try:
                sent += greedy.sock.send(line)
            except TimeoutError:
                break
        else:
            pytest.fail("the daemon reads on although nobody takes its replies")
        assert other.ask("server.ping") == {"pong": True}
    assert daemon.memory_mib() < 150


# -------------------------------------------------------------------------------------------------------- start and end


def test_a_token_by_descriptor_never_touches_the_disk_before_the_daemon_has_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "rpc.sock"
    done = run("-serve", "-socket", str(path), "-token-fd", "0", home=tmp_path, stdin=TOKEN.encode() + b"\n\r\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    log = path.parent / "remote-server.log"
    try:
        until(lambda: "INFO  [Server] Connection closed: @" in log.read_text(), "the launcher has called once")
        with Client(str(path)) as client:
            assert client.ask("server.ping") == {"pong": True}
            credentials = client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid = int.from_bytes(credentials[:4], sys.byteorder)
            assert os.getsid(pid) == pid
            client.post("process.spawn", id="e", command="env")
            frames = client.frames_to_exit("e")
        assert (path.parent / "daemon.token").read_bytes() == TOKEN.encode()
        assert {name.name: oct(name.stat().st_mode & 0o777) for name in path.parent.iterdir()} == {
            "rpc.sock": "0o600", "daemon.token": "0o600", "remote-server.log": "0o600",
        }  # fmt: skip
        assert oct((tmp_path / "a").stat().st_mode & 0o777) == oct(path.parent.stat().st_mode & 0o777) == "0o700"
        assert frames[-1]["exitCode"] == 0
        assert log.read_text().split("\n")[0] == f"Claustrum remote server listening on {path}"
    finally:
        done = run("-stop", "-socket", str(path), home=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [name.name for name in path.parent.iterdir()] == ["remote-server.log"]


def test_the_socket_of_a_running_daemon_is_taken_over(tmp_path: Path) -> None:
    with Daemon(tmp_path) as old, old.connect() as before, Daemon(tmp_path) as new:
        assert before.ask("server.version") == {
            "version": before.ask("server.capabilities")["version"],
            "platform": "linux",
            "arch": before.ask("server.version")["arch"],
        }
        with new.connect() as after:
            assert after.ask("server.ping") == {"pong": True}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_graceful_end_takes_the_processes_along(tmp_path: Path, number: signal.Signals) -> None:
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        pid = client.ask("process.spawn", id="s", command="sleep", args=["300"], wantPid=True)["pid"]
        daemon.process.send_signal(number)
        assert client.line() == b""
        assert daemon.process.wait(10) == 0
        assert not os.path.exists(daemon.path)
        assert not (tmp_path / "daemon.token").exists()
        until(lambda: not alive(pid), "the process is killed")


def test_children_are_kept_when_it_is_wanted(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-keep-children") as daemon, daemon.connect() as client:
        pid = client.ask("process.spawn", id="s", command="sleep", args=["300"], wantPid=True)["pid"]
        client.send(b'{"jsonrpc":"2.0","method":"server.shutdown"}\n')
        assert client.line() == b""
        assert daemon.process.wait(10) == 0
        os.kill(pid, signal.SIGKILL)
    assert (
        "[Server] -keep-children: leaving 1 running child process(es) alive across shutdown" in daemon.log.read_text()
    )


def test_the_bridge_relays_and_ends_with_either_side(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        for who in ("client", "daemon"):
            bridge = subprocess.Popen(
                [*COMMAND, "-bridge", "-socket", daemon.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={"HOME": "/"},
            )
            with bridge:
                assert bridge.stdin is not None
                assert bridge.stdout is not None
                bridge.stdin.write(PING + b"\n")
                bridge.stdin.flush()
                assert bridge.stdout.readline() == PONG
                if who == "client":
                    bridge.stdin.close()
                else:
                    daemon.process.terminate()
                assert bridge.wait(10) == 0


def test_a_daemon_without_standard_streams_gives_children_theirs(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    words = " ".join([*COMMAND, "-serve", "-socket", str(tmp_path / "s"), "-token-file", str(tmp_path / "token")])
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SHELL": "/bin/sh", "CLAUSTRUM_DAEMON_CHILD": "1"}
    process = subprocess.Popen(["sh", "-c", f"exec {words} <&- >&- 2>&-"], env=environment)
    try:
        until((tmp_path / "daemon.token").exists, "the daemon serves")
        with Client(str(tmp_path / "s")) as client:
            client.ask("process.spawn", id="c", command="cat")
            assert client.ask("process.stdin", id="c", data="aGk=") == {"success": True, "applied": 2}
            assert json.loads(client.line())["data"] == "aGk="
        assert {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)} == {os.devnull}
    finally:
        process.terminate()
        process.wait(10)


def test_counters_are_served_when_it_is_wanted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Daemon(tmp_path, "-metrics-addr", f"127.0.0.1:{port}") as daemon, daemon.connect() as client:
        client.post("process.spawn", id="m", command="sh", args=["-c", "read a; echo $a"])
        client.line()
        client.ask("process.stdin", id="m", data="YWJjCg==")
        client.frames_to_exit("m")
        client.ask("process.reattach", id="m")
        client.ask("process.reattach", id="unknown")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            lines = answer.read().decode().split("\n")
        values = dict(line.split(" ") for line in lines if line and not line.startswith("#"))
        assert values.pop("claustrum_connections_total") >= "2"
        assert values == {
            "claustrum_process_spawns_total": "1", "claustrum_process_exits_total": "1",
            "claustrum_reattaches_total": "1",
            "claustrum_stream_bytes_total": "4", "claustrum_stdin_bytes_total": "4",
        }  # fmt: skip
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)


def test_bounds_that_are_off_by_default(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-files-read-regular-only", "-max-extract-bytes", "10") as daemon, daemon.connect() as client:
        assert client.ask("files.read", path="/dev/null") == {
            "code": -32602,
            "message": "files.read: not a regular file",
        }
        (tmp_path / "big").write_bytes(b"x" * 11)
        subprocess.run(["tar", "-czf", "a.tgz", "big"], cwd=tmp_path, check=True)
        result = client.ask("files.extract_tar", archivePath=str(tmp_path / "a.tgz"), destDir=str(tmp_path / "out"))
        assert result == {"success": False, "fileCount": 0, "error": "extraction size limit exceeded"}


def test_git_is_killed_when_its_time_is_over(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "git").write_text("#!/bin/sh\ncase $* in *--git-dir*|*is-inside*) echo true;; *) exec sleep 60;; esac\n")
    (tools / "git").chmod(0o755)
    with Daemon(tmp_path, "-git-timeout", "300ms", PATH=f"{tools}:/usr/bin:/bin") as daemon, daemon.connect() as client:
        assert client.ask("git.status", path="/") == {"code": -32603, "message": "signal: killed"}
        (tmp_path / "tree").mkdir()
        result = client.ask("git.worktree_remove", baseRepo="/", worktreePath=str(tmp_path / "tree"))
        assert result["error"].startswith("git worktree remove timed out after 300ms; no cleanup was attempted")
        assert (tmp_path / "tree").exists()


def test_the_login_shell_says_what_path_children_have(tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text(
        '#!/bin/sh\necho noise; export PATH=/from/login:$PATH:$HOME\nwhile [ $1 != -c ]; do shift; done\neval "$2"\n'
    )
    shell.chmod(0o755)
    with Daemon(tmp_path, SHELL=str(shell), PATH="/usr/bin:/bin") as daemon, daemon.connect() as client:
        client.post("process.spawn", id="p", command="sh", args=["-c", "echo $PATH"])
        path = f"/from/login:/usr/bin:/bin:{tmp_path}"
        assert path in base64.b64decode(client.frames_to_exit("p")[0]["data"]).decode()
        assert f"[shellenv] Extracted shell PATH ({len(path)} chars)" in daemon.log.read_text()
        missing = {"code": -32603, "message": 'exec: "shell": executable file not found in $PATH'}
        for more in ({}, {"env": {"PATH": str(tmp_path)}}):  # commands are looked up on the daemon's own
            assert client.ask("process.spawn", id="p", command="shell", **more) == missing


def test_a_login_shell_that_hangs_is_killed(tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/pid; wait\n")
    shell.chmod(0o755)
    began = time.monotonic()
    with Daemon(tmp_path, SHELL=str(shell), PATH="/usr/bin:/bin") as daemon, daemon.connect() as client:
        client.post("process.spawn", id="p", command="sh", args=["-c", "echo $PATH"])
        assert client.ask("server.ping") == {"pong": True}
        assert client.frames_to_exit("p")[-1]["exitCode"] == 0
        assert 3 < time.monotonic() - began < 15
        until(lambda: not alive(int((tmp_path / "pid").read_text())), "the whole group is killed")


def test_configuration_beside_the_program(tmp_path: Path) -> None:
    program = tmp_path / "sterna-remote"
    program.write_text(f"#!{sys.executable}\nfrom sterna.remote.app import main\nmain()\n")
    program.chmod(0o755)
    sha = "0123456789ABCDEF" * 2 + "01234567"
    (tmp_path / "claustrum.conf").write_text(f"# comment\nVersion-Override = {sha}\ncli-keep = 9\nbroken\n")
    done = subprocess.run(
        [str(program), "-version"], env={"HOME": "/", "PYTHONPATH": "src"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"claude-ssh {sha.lower()} (via Claustrum ")
    (tmp_path / "real").write_text(f"version-override = {sha}\n")
    (tmp_path / "claustrum.conf").unlink()
    (tmp_path / "claustrum.conf").symlink_to(tmp_path / "real")
    done = subprocess.run([str(program), "-version"], env={"HOME": "/"}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("claustrum ")


def test_modes_that_cannot_begin(tmp_path: Path) -> None:
    done = run(home=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        b"claustrum: one of --version/--install/--serve/--bridge/--stop is required\n",
    )
    done = run("-socket", home=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(b"flag needs an argument: -socket\nUsage of ")
    done = run("-serve", "-token-fd", "77", home=tmp_path)
    assert (done.returncode, done.stderr) == (1, b"claustrum: read --token-fd: read token-fd: bad file descriptor\n")
    done = run("-bridge", "-socket", f"{tmp_path}/{'x' * 120}", home=tmp_path)
    assert done.stderr.endswith(b": connect: invalid argument\n")
    done = run("-serve", "-socket", str(tmp_path / "s"), home=tmp_path, CLAUSTRUM_DAEMON_CHILD="1")
    assert (done.returncode, done.stderr) == (1, b"claustrum: daemonized child requires --token-file or --token-fd\n")
    (tmp_path / "t").write_text("x")
    done = run(
        "-serve", "-socket", "/nowhere/s", "-token-file", f"{tmp_path}/t", home=tmp_path, CLAUSTRUM_DAEMON_CHILD="1"
    )
    assert (done.returncode, done.stderr) == (
        1,
        b"claustrum: listen unix: listen unix /nowhere/s: bind: no such file or directory\n",
    )


def test_paths_are_utf_8_in_every_locale(tmp_path: Path) -> None:
    def posix(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return run(*words, home=tmp_path, stdin=stdin, LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")

    done = posix("-install", "-cli-dir", "/ä/\udcff", "-cli-version", ".")
    assert '"cliPath":"/ä/\\ufffd"'.encode() in done.stdout
    path = tmp_path / "é" / "s"
    assert posix("-serve", "-socket", str(path), "-token-fd", "0", stdin=TOKEN.encode()).returncode == 0
    try:
        with Client(str(path)) as client:
            assert [entry["name"] for entry in client.ask("files.list", path="~")["entries"]] == ["é"]
    finally:
        posix("-stop", "-socket", str(path))
    assert not path.exists()


def test_installing(tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("the program zstd is not there to make an archive with")
    script = tmp_path / "cli"
    script.write_text("#!/bin/sh\nexit 0\n")
    subprocess.run(["zstd", "-q", str(script)], check=True)
    packed = tmp_path / "cli.zst"
    words = ("-install", "-cli-dir", str(tmp_path / "dir"), "-cli-version", "1.0", "-cli-zst")

    def result(*more: str) -> dict[str, object]:
        done = run(*words, *more, home=tmp_path)
        assert done.returncode == 0
        mark, _, text = done.stdout.decode().partition("__INSTALL_RESULT__")
        assert not mark
        value: dict[str, object] = json.loads(text)
        return value

    assert (
        result(str(tmp_path / "none"))["cliError"] == f"opening input: open {tmp_path}/none: no such file or directory"
    )
    (tmp_path / "cut.zst").write_bytes(packed.read_bytes()[:-6])
    assert result(str(tmp_path / "cut.zst"))["cliError"] == "decompressing: unexpected EOF"
    assert "cliError" not in result(str(packed))
    assert not packed.exists()
    assert result(str(packed))["cliWasPresent"] is True
    assert (tmp_path / "dir" / "1.0").read_bytes() == script.read_bytes()


def test_threads_of_a_busy_daemon_do_not_disturb_it(daemon: Daemon) -> None:
    (daemon.home / "blob").write_bytes(gzip.compress(b"x" * 1000))

    def work() -> None:
        with daemon.connect() as client:
            for _ in range(50):
                assert client.ask("files.stat", path=str(daemon.home / "blob"))["exists"]
                assert client.ask("git.info", path="/")["isRepo"] is False

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    with daemon.connect() as client:
        while any(thread.is_alive() for thread in threads):
            assert client.ask("server.ping") == {"pong": True}
    for thread in threads:
        thread.join()
