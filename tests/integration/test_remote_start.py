"""Around the daemon: what it logs, what costs it a line and not its life, and its helpers at the socket."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import threading
from pathlib import Path

import pytest

from sterna.limits import REMOTE_STOP_REPLY_SECONDS
from sterna.remote import bridge, rendezvous, stop, strict
from sterna.remote.failure import StartError
from tests.integration.remote_rig import Daemon, until

REFUSED = b'{"jsonrpc":"2.0","id":1,"error":{"code":-32001,"message":"Unauthorized: invalid or missing auth token"}}\n'
PONG = b'{"jsonrpc":"2.0","id":1,"result":{"pong":true}}\n'
TIME = re.compile(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ", re.MULTILINE)


def lines(log: Path) -> list[str]:
    """Returns the lines of a log without their times, those about the login shell left out."""
    return [line for line in TIME.sub("", log.read_text()).split("\n") if line and "[shellenv]" not in line]


def test_what_is_logged(tmp_path: Path) -> None:
    with Daemon(tmp_path, "-listen-pipe") as daemon:
        until(lambda: "INFO  [Server] Connection closed: @" in lines(daemon.log), "the rig's own connection ended")
        before = lines(daemon.log)
        assert before == [
            "WARN  [daemon] -listen-pipe is only for Windows and ignored here",
            f"Claustrum remote server listening on {daemon.path}",
            "INFO  [Server] New connection from: @", "INFO  [Server] Connection closed: @",
        ]  # fmt: skip
        with daemon.connect() as client:
            client.send(b'{"jsonrpc":"2.0","id":1,"method":"a\\nb","auth":"wrong"}\n')
            assert client.line() == REFUSED
            client.send(b'{"jsonrpc":"2.0","id":{"b":1.0,"a":"\\u2028"},"method":"' + b"m" * 300 + b'"}\n')
            client.line()
        until(lambda: lines(daemon.log)[-1].endswith("closed: @") and len(lines(daemon.log)) > 5, "it ended")
        refused = "WARN  [Server] Unauthorized request:"
        assert lines(daemon.log)[len(before) :] == [
            "INFO  [Server] New connection from: @",
            f"{refused} method=a\\x0ab, id=1",
            f"{refused} method={'m' * 200}… (300 characters), id=" + '{"a":"\\u2028","b":1}',
            "INFO  [Server] Connection closed: @",
        ]  # fmt: skip


def test_what_costs_a_line_and_not_the_daemon(tmp_path: Path) -> None:
    """A token's file that cannot be removed, a place for the token that is taken, an address that is in use."""
    (tmp_path / "daemon.token" / "full").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = "-token-file", "/proc/self/comm", "-metrics-addr", address
        with Daemon(tmp_path, *flags, CLAUSTRUM_LOG_LEVEL="Warning") as daemon:
            token = Path(f"/proc/{daemon.process.pid}/comm").read_bytes().rstrip()
            with daemon.connect() as client:
                client.send(b'{"jsonrpc":"2.0","id":1,"method":"server.ping","auth":"%b"}\n' % token)
                assert client.line() == PONG
            removal, persisting, metrics = lines(daemon.log)[:3]
    assert removal.startswith("WARN  [daemon] failed to remove token file: remove /proc/self/comm: ")
    said = rf"WARN  \[daemon\] failed to persist token: write {tmp_path}/daemon\.token-[0-9a-f]+: is a directory"
    assert re.fullmatch(said, persisting)
    assert metrics.startswith(f"ERROR [metrics] listen {address}: ")
    assert not list(tmp_path.glob("daemon.token-*"))
    assert " INFO " not in daemon.log.read_text(), "lines below the level that was asked for"


def test_stopping_does_not_wait_for_a_daemon_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REMOTE_STOP_REPLY_SECONDS == 2, "the contract's deadline"
    monkeypatch.setattr(stop, "REMOTE_STOP_REPLY_SECONDS", 0.05)
    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        deaf.listen()
        thread = threading.Thread(target=stop.stop, args=(str(path),))
        thread.start()
        with deaf.accept()[0] as asked:
            thread.join(1)
            waits = thread.is_alive()
            assert asked.recv(100) == b'{"jsonrpc":"2.0","id":1,"method":"server.shutdown"}\n'
        thread.join()
    assert not waits
    assert not path.exists()


def test_the_bridge_passes_the_end_of_its_input_on(monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = os.pipe()
    ours, daemon = socket.socketpair()
    os.write(sink, b"last words")
    os.close(sink)

    def ended(seconds: float) -> None:
        daemon.settimeout(1)
        assert [daemon.recv(100), daemon.recv(100)] == [b"last words", b""]
        daemon.sendall(b"reply")
        assert ours.recv(100) == b"reply", "the other direction is open"
        raise EOFError(seconds)

    monkeypatch.setattr("sterna.remote.bridge.time.sleep", ended)
    with ours, daemon, pytest.raises(EOFError, match=r"^40$"):
        bridge._feed(source, ours.fileno())
    os.close(source)


def test_a_link_is_no_lock(tmp_path: Path) -> None:
    path, elsewhere = str(tmp_path / "rpc.sock"), tmp_path / "elsewhere"
    os.symlink(elsewhere, strict.lock_name(path))
    for _ in range(2):
        with pytest.raises(StartError, match=f"^open {path}.lock: too many levels of symbolic links$"):
            strict.lock(path)
        assert strict.holder(path) == ""
    assert not elsewhere.exists()
    os.unlink(strict.lock_name(path))
    os.close(strict.lock(path))


def test_of_two_that_meet_one_starts_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, token, started, got = str(tmp_path / "rpc.sock"), list[str](), list[str](), list[str]()
    second, there = threading.Thread(target=lambda: got.append(rendezvous.token_of(path, "second"))), threading.Event()
    flock = fcntl.flock

    def locking(descriptor: int, operation: int) -> None:
        if threading.current_thread() is second:
            there.set()
        flock(descriptor, operation)

    def found(_path: str) -> str | None:
        known = token[0] if token else None
        if threading.current_thread() is second:
            there.set()
        return known

    def start(_path: str, value: str) -> None:
        started.append(value)
        if value == "first":
            second.start()
            assert there.wait(10), "the second one is on its way"
            token.append(value)

    monkeypatch.setattr(fcntl, "flock", locking)
    monkeypatch.setattr(rendezvous, "_found", found)
    monkeypatch.setattr(rendezvous, "_start", start)
    assert rendezvous.token_of(path, "first") == "first"
    second.join(10)
    assert (started, got) == (["first"], ["first"])
