"""What clients and files can do to the remote daemon: a clear error, bounded memory, and others who notice nothing."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import resource
import socket
import subprocess
import tarfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.remote_rig import TOKEN, Client, Daemon, until

LINE = 1_048_575
PULSE_SECONDS = 0.25  # for nine of ten pings beside the abuse, on a machine that others use as well
PULSE_WORST_SECONDS = 5
MIB = 1 << 20


def anonymous_mib(daemon: Daemon) -> float:
    """What the daemon has in memory and no file behind it."""
    for line in Path(f"/proc/{daemon.process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no Pss_Anon")


class Pulse:
    """Another client, which pings all the time and looks at the daemon's memory."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.times: list[float] = []
        self.peak = 0.0
        self._stop = threading.Event()
        self._client = daemon.connect()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            began = time.monotonic()
            if self._client.ask("server.ping") != {"pong": True}:
                return
            self.times.append(time.monotonic() - began)
            self.peak = max(self.peak, anonymous_mib(self._daemon))

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        until(lambda: len(self.times) > 5 or not self._thread.is_alive(), "the pulse stands still")
        alive = self._thread.is_alive()
        self._stop.set()
        self._thread.join()
        self._client.sock.close()
        times = sorted(self.times)
        usual, worst = times[len(times) * 9 // 10], times[-1]
        print(f"{len(times)} pings, 90 % in {usual * 1e3:.1f} ms, all in {worst * 1e3:.0f} ms; {self.peak:.0f} MiB")
        assert alive, "the pulse stopped"
        assert usual < PULSE_SECONDS
        assert worst < PULSE_WORST_SECONDS


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("abuse"), CLAUSTRUM_LOG_LEVEL="error") as running:
        yield running


@pytest.fixture
def pulse(daemon: Daemon) -> Iterator[Pulse]:
    with Pulse(daemon) as beating:
        yield beating


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


def line_of(size: int, **more: object) -> bytes:
    """A request of exactly so many bytes with its end."""
    message = {"jsonrpc": "2.0", "id": 1, "method": "server.ping", "auth": TOKEN, **more, "x": ""}
    empty = json.dumps(message).encode()
    return empty[:-2] + b"x" * (size - len(empty) - 1) + b'"}\n'


def test_ten_thousand_connections(daemon: Daemon, pulse: Pulse) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(10_000, hard - 1_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    before = anonymous_mib(daemon)
    clients: list[socket.socket] = []
    try:
        for _ in range(wanted):
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].connect(daemon.path)
        request = line_of(150)
        for client in clients:
            client.settimeout(20)
            client.sendall(request)
        for client in clients:
            assert client.recv(1000) == b'{"jsonrpc":"2.0","id":1,"result":{"pong":true}}\n'
        grown = (anonymous_mib(daemon) - before) * 1024 / wanted
        print(f"{wanted} connections, {grown:.1f} KiB each")
        assert grown < 8
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) < 100, "the connections are not closed")


def test_the_longest_lines_from_many(daemon: Daemon, pulse: Pulse) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(200)]
        for client in clients:
            client.send(line_of(LINE + 1)[: LINE // 2])
        for number, client in enumerate(clients):
            client.send(line_of(LINE + 1 + number % 2)[LINE // 2 :])
        for number, client in enumerate(clients):
            answer = b"" if number % 2 else b'{"jsonrpc":"2.0","id":1,"result":{"pong":true}}\n'
            assert client.line() == answer
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(300)]
        for client in clients:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.send(line_of(LINE)[:-10])
    assert pulse.peak < 340  # 256 MiB of unfinished lines of all clients, and what it needs itself


def test_nesting(client: Client, pulse: Pulse) -> None:
    for depth, answer in ((10_000, -32001), (10_001, -32700), (500_000, -32700)):
        client.send(b'{"params":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}\n")
        assert json.loads(client.line())["error"]["code"] == answer
    client.send(b'{"id":[' + b",".join([b"1.5"] * 260_000) + b"]}\n")
    assert json.loads(client.line())["error"]["code"] == -32001


def test_a_stalled_subscriber(daemon: Daemon, client: Client, pulse: Pulse) -> None:
    before = anonymous_mib(daemon)
    for number in range(3):
        client.post("process.spawn", number, id=f"flood{number}", command="head", args=["-c", "100000000", "/dev/zero"])
    size = ended = 0
    began = len(pulse.times)
    until(lambda: len(pulse.times) > began + 40, "the pulse stands still")
    assert anonymous_mib(daemon) - before < 40, "held up, not gathered"
    while ended < 3:
        message = json.loads(client.line())
        ended += message.get("stream") == "exit"
        size += len(message.get("data", "")) * 3 // 4 - message.get("data", "").count("=")
    assert size == 300_000_000


def test_full_input_queues(daemon: Daemon, client: Client, pulse: Pulse) -> None:
    before, chunk = anonymous_mib(daemon), b64encode(bytes(700_000)).decode()
    with daemon.connect() as other:
        for number in range(4):
            client.ask("process.spawn", id=f"full{number}", command="sleep", args=["1000"])
        sent = threading.Thread(target=_feed, args=(client, chunk))
        sent.start()
        began = len(pulse.times)
        until(lambda: len(pulse.times) > began + 40, "the pulse stands still")
        assert anonymous_mib(daemon) - before < 160  # 8 MiB for one process and 64 MiB of requests that wait, at most
        assert other.ask("process.spawn", id="beside", command="cat") == {"success": True}
        assert other.ask("process.stdin", id="beside", data="aGkK")["applied"] == 3
        for number in range(4):
            assert other.ask("process.killAndWait", id=f"full{number}", signal="KILL")["died"] is True
        other.ask("process.killAndWait", id="beside", signal="KILL")
        answers = [json.loads(client.line()) for _ in range(60)]
        sent.join()
    accepted = [answer for answer in answers if "result" in answer]
    assert 0 < len(accepted) < 60
    assert {answer["error"]["message"] for answer in answers if "error" in answer} == {"Process not running"}


def _feed(client: Client, chunk: str) -> None:
    for _ in range(15):
        for number in range(4):
            client.post("process.stdin", number, id=f"full{number}", data=chunk)


# ---- archives --------------------------------------------------------------------------------------------------------


def archive(path: Path, *members: tuple[str, bytes | int], kind: bytes = tarfile.REGTYPE, link: str = "") -> str:
    """Writes a gzipped tar; a member given as a number has so many zeros."""
    with gzip.open(path, "wb", compresslevel=1) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = content if isinstance(content, int) else len(content)
            entry.type, entry.linkname = kind, link
            tar.addfile(entry, _Zeros() if isinstance(content, int) else io.BytesIO(content))
    return str(path)


class _Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def extract(client: Client, source: str, target: Path) -> Any:
    return client.ask("files.extract_tar", archivePath=source, destDir=str(target))


def test_a_tar_bomb_against_a_bound(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with (
        Daemon(tmp_path / "home", "-max-extract-bytes", "1000000", CLAUSTRUM_LOG_LEVEL="error") as daemon,
        Pulse(daemon) as pulse,
        daemon.connect() as client,
    ):
        many = archive(tmp_path / "many", *((f"f{number}", 300_000) for number in range(10)))
        answer = {"success": False, "fileCount": 3, "error": "extraction size limit exceeded"}
        assert extract(client, many, tmp_path / "d") == answer
        one = archive(tmp_path / "one", ("zeros", 200 * MIB))
        assert extract(client, one, tmp_path / "d") == {**answer, "fileCount": 0}
        assert sum(path.stat().st_size for path in (tmp_path / "d").iterdir()) <= 1_000_000
        assert pulse.peak < 40


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a small disk takes the right to mount one")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_tar_bomb_without_a_bound_ends_with_the_disk(
    daemon: Daemon, client: Client, pulse: Pulse, small_disk: Path, tmp_path: Path
) -> None:
    bomb = archive(tmp_path / "bomb", ("small", b"x"), ("zeros", 100 * MIB))
    before = anonymous_mib(daemon)
    answer = extract(client, bomb, small_disk / "d")
    assert answer["error"] == f"write zeros: write {small_disk}/d/zeros: no space left on device"
    assert answer["fileCount"] == 1
    assert anonymous_mib(daemon) - before < 20
    assert client.ask("files.stat", path=str(small_disk / "d/small"))["size"] == 1


def test_a_daemon_whose_disk_is_full(small_disk: Path) -> None:
    with Daemon(small_disk) as daemon, daemon.connect() as client:
        with contextlib.suppress(OSError):
            (small_disk / "fill").write_bytes(bytes(8 * MIB))
        for number in range(200):
            client.ask("process.spawn", id=f"p{number % 5}", command="true")  # each leaves lines in the log
        assert client.ask("process.spawn", id="last", command="echo", args=["hi"]) == {"success": True}
        assert client.frames_to_exit("last")[0]["data"] == "aGkK"


def test_names_that_lead_out(client: Client, pulse: Pulse, tmp_path: Path) -> None:
    target, outside = tmp_path / "d", tmp_path / "evil"
    for name in ("../evil", "a/../../evil", "./../evil", "../d2/evil", "..", "x/../.."):
        answer = extract(client, archive(tmp_path / "t", (name, b"x")), target)
        assert answer == {"success": False, "fileCount": 0, "error": f"unsafe path in archive: {name}"}
    assert extract(client, archive(tmp_path / "t", ("/etc/evil", b"x")), target) == {"success": True, "fileCount": 1}
    assert (target / "etc/evil").read_bytes() == b"x"
    for kind, number in ((tarfile.SYMTYPE, 2), (tarfile.LNKTYPE, 1), (tarfile.FIFOTYPE, 6), (tarfile.CHRTYPE, 3)):
        link = archive(tmp_path / "t", ("l", 0), kind=kind, link=str(outside))
        answer = {"success": False, "fileCount": 0, "error": f"unsupported tar entry type {number}: l"}
        assert extract(client, link, target) == answer
    assert not outside.exists()
    assert not (tmp_path / "d2").exists()


def test_links_that_appear_while_files_are_unpacked(client: Client, pulse: Pulse, tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "d"
    victim.mkdir()
    stop, swapped = threading.Event(), 0

    def swap() -> None:
        nonlocal swapped
        while not stop.is_set():
            for name in ("in", "in/deep"):
                with contextlib.suppress(OSError):
                    os.rename(target / name, tmp_path / f"old{swapped}")
                    os.symlink(victim, target / name)
                    swapped += 1

    # So many that the directories are there for long enough to be swapped.
    packed = Path(archive(tmp_path / "t", *((f"in/deep/f{number}", b"x") for number in range(600)))).read_bytes()
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        refused, tries, deadline = 0, 0, time.monotonic() + 40
        while tries < 20 or (not swapped and time.monotonic() < deadline):
            tries += 1
            (tmp_path / "t").write_bytes(packed)  # it is removed once it is unpacked
            answer = extract(client, str(tmp_path / "t"), target)
            refused += not answer["success"]
            # What was there a moment ago may be a link now, or gone.
            assert answer.get("error", "mkdir ").startswith(("mkdir ", "create ", "clean destDir: ")), answer
    finally:
        stop.set()
        thread.join()
    print(f"{swapped} swaps, {refused} of {tries} refused")
    assert swapped
    assert list(victim.iterdir()) == []


# ---- files, processes, descriptors -----------------------------------------------------------------------------------


def test_files_without_an_end(daemon: Daemon, client: Client, pulse: Pulse, tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/urandom"):
        answer = client.ask("files.read", path=device)
        assert answer == {"code": -32603, "message": f"read {device}: file too large"}
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with daemon.connect() as waiting:
        for number in range(100):
            waiting.post("files.read", number, path=str(fifo))
        (tmp_path / "f").write_text("text")
        for _ in range(10):
            assert client.ask("files.read", path=str(tmp_path / "f"))["content"] == "text"
        assert waiting.silent(0.05)
        ended = 0
        while ended < 100:  # each ends with the writer that it waits for
            with contextlib.suppress(OSError):
                os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            with contextlib.suppress(TimeoutError):
                while ended < 100:
                    assert json.loads(waiting.line(0.2))["result"] == {"content": "", "exists": True}
                    ended += 1


def test_a_directory_that_is_gone(client: Client, pulse: Pulse, tmp_path: Path) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    client.ask("process.spawn", id="inside", command="sh", args=["-c", "read x; pwd -P; exit 3"], cwd=str(place))
    place.rmdir()
    answer = client.ask("process.spawn", id="late", command="true", cwd=str(place))
    assert answer == {"code": -32603, "message": f"chdir {place}: stat {place}: no such file or directory"}
    client.ask("process.stdin", id="inside", data="Cg==")
    assert client.frames_to_exit("inside")[-1]["exitCode"] == 3
    for method, params in (("git.info", {"path": str(place)}), ("git.status", {"path": str(place)})):
        assert client.ask(method, **params)["isRepo"] is False


def test_without_descriptors(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("text")
    with Daemon(tmp_path, CLAUSTRUM_LOG_LEVEL="error") as daemon, Pulse(daemon), daemon.connect() as client:
        assert client.ask("files.read", path=str(tmp_path / "f"))["content"] == "text"
        used = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (used + 60, used + 60))
        started, answer = 0, client.ask("process.spawn", id="p0", command="sleep", args=["1000"])
        while answer == {"success": True}:
            started += 1
            answer = client.ask("process.spawn", id=f"p{started}", command="sleep", args=["1000"])
        assert started > 10
        assert answer["code"] == -32603
        assert "too many open files" in answer["message"]
        _exhaust(lambda number: client.ask("process.spawn", id=f"p{number}", command="sleep", args=["1000"]), started)
        for number in range(started + 4):
            client.ask("process.killAndWait", id=f"p{number}", signal="KILL")
        assert client.ask("process.spawn", id="again", command="true") == {"success": True}
        assert client.ask("files.read", path=str(tmp_path / "f"))["content"] == "text"


def _exhaust(spawn: Callable[[int], Any], started: int) -> None:
    """It stays an error, and no descriptor gets lost by one."""
    for number in range(started, started + 4):
        assert "too many open files" in spawn(number)["message"]
