"""Requests that wait for somebody, such as the writer of a FIFO, hold up no others, however many they are."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.integration.durable_rig import PatchedDaemon
from tests.integration.remote_rig import until

WORKERS = 3
FEW = f"from sterna.remote import workers\nworkers.Workers.__init__.__defaults__ = ({WORKERS},)"
COUNT = 2 * WORKERS
EMPTY = {"success": False, "fileCount": 0, "error": "gzip: EOF"}


@pytest.mark.parametrize("method", ["files.read", "files.extract_tar", "git.status"])
def test_more_of_them_than_workers(method: str, tmp_path: Path) -> None:
    repository, plain = tmp_path / "repository", tmp_path / "plain"
    for directory in (repository, plain):
        subprocess.run(["git", "init", "-q", str(directory)], check=True)
    (repository / ".git/config").unlink()
    fifos = [repository / ".git/config", *(tmp_path / str(number) for number in range(COUNT))]
    for fifo in fifos:
        os.mkfifo(fifo)
    (plain / "file").write_text("text")
    daemon, over = PatchedDaemon(tmp_path, FEW), threading.Event()
    until(lambda: "listening on" in daemon.log.read_text(), "the daemon does not listen")

    def write() -> None:
        """Ends each wait as a writer does that says nothing."""
        while not over.wait(0.005):
            for fifo in fifos:
                with contextlib.suppress(OSError):
                    os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))

    writer = threading.Thread(target=write)
    with daemon, daemon.connect() as waiting, daemon.connect() as other:
        for number, fifo in enumerate(fifos[1:]):
            params = {
                "files.read": {"path": str(fifo)},
                "files.extract_tar": {"archivePath": str(fifo), "destDir": str(tmp_path / "target")},
                "git.status": {"path": str(repository)},
            }[method]
            waiting.post(method, number, **params)
        for _ in range(COUNT):
            assert other.ask("files.read", path=str(plain / "file")) == {"content": "text", "exists": True}
        if method != "git.status":
            assert other.ask("git.status", path=str(plain))["changes"] == ["?? file"]
        assert waiting.silent(0.05)
        writer.start()
        try:
            results = [json.loads(waiting.line())["result"] for _ in range(COUNT)]
        finally:
            over.set()
            writer.join()
    ends = {"files.read": {"content": "", "exists": True}, "files.extract_tar": EMPTY}
    if method in ends:
        assert results == [ends[method]] * COUNT
