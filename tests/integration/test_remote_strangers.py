"""What strangers and stalled clients can make the daemon hold: metrics requests, changes of files."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import cast

import pytest

from sterna.limits import REMOTE_FILE_WATCH_NAMES_MAX
from sterna.remote import inotify
from sterna.remote.connection import Connection
from sterna.remote.filewatch import FileWatches, _Watch
from tests.integration.remote_rig import Daemon, until
from tests.integration.test_remote_extensions import b64, changes


def test_the_oldest_of_many_metrics_requests_makes_room(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Daemon(tmp_path, "-metrics-addr", f"127.0.0.1:{port}") as daemon:
        opened = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
        silent = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(100)]
        for sock in silent[:68]:
            assert sock.recv(1) == b""
        assert len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= opened + 32
        with socket.create_connection(("127.0.0.1", port), timeout=5) as asking:
            asking.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert asking.recv(12) == b"HTTP/1.1 200"
        assert silent[68].recv(1) == b""
        silent[-1].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert silent[-1].recv(12) == b"HTTP/1.1 200"
        for sock in silent:
            sock.close()
        until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= opened, "all are forgotten")


def test_the_daemons_own_temporary_files_are_no_changes(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with Daemon(tmp_path, "-extensions") as daemon, daemon.connect() as client, daemon.connect() as writer:
        client.ask("files.watch", path=str(tmp_path / "d"))
        assert writer.ask("files.write", path=f"{tmp_path}/d/f", content=b64(b"x"))["success"]
        (tmp_path / "d" / ".out.staged-0123456789abcdef").mkdir()
        others = [".sterna-notes", ".out.staged-notes", "x.sterna-0123456789abcdef", "last"]
        for name in others:
            (tmp_path / "d" / name).touch()
        names = [("created", f"{tmp_path}/d/{name}") for name in ("f", *others)]
        assert changes(client, f"{tmp_path}/d/last") == names
        own = f"{tmp_path}/d/.sterna-0123456789abcdef"  # unless it is asked for
        client.ask("files.watch", path=own)
        Path(own).touch()
        assert changes(client, own) == [("created", own)]


class Stalled:
    """A client that reads nothing."""

    def __init__(self) -> None:
        self.full, self.paused, self.lines = True, set[object](), list[bytes]()

    def write(self, line: bytes) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("end", [b"", b"last"])
def test_a_stalled_client_costs_a_bounded_number_of_names(end: bytes) -> None:
    client = Stalled()
    watch = _Watch(cast(FileWatches, None), 1, cast(Connection, client), "/d", 1, None)
    for number in range(3 * REMOTE_FILE_WATCH_NAMES_MAX):
        watch.note(inotify.CREATE, b"%d" % number)
        watch.tell()
        assert len(watch._changes) <= REMOTE_FILE_WATCH_NAMES_MAX
    client.full = False
    watch.resume()
    assert [b"overflow" in line for line in client.lines] == [True]
    watch.note(inotify.CREATE, b"again")
    if end:
        watch.note(inotify.OVERFLOW, b"")
    watch.tell()
    assert [b"overflow" in line for line in client.lines] == [True, bool(end)]
    assert not watch._changes
