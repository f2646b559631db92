"""Installing in this process, with what goes wrong on the way: probes that hang, downloads, sweeps of others."""

from __future__ import annotations

import glob
import hashlib
import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sterna.remote import install as install_module
from sterna.remote.download import DownloadError, download
from sterna.remote.flags import parse
from sterna.remote.install import install, libc
from sterna.remote.unzstd import unzstd
from tests.unit.test_remote_archives import reader, zst

SCRIPT = b"#!/bin/sh\nexit 0\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of versions, with a compressed one beside it."""
    (tmp_path / "cli.zst").write_bytes(zst(SCRIPT))
    return tmp_path / "dir"


def installed(place: Path, *more: str) -> dict[str, Any]:
    words = ["-install", "-cli-dir", str(place), "-cli-version", "1.0", "-cli-zst", str(place.parent / "cli.zst")]
    result: dict[str, Any] = json.loads(install(parse([*words, *more])).removeprefix("__INSTALL_RESULT__"))
    return result


# --------------------------------------------------------------------------------------------------------- libc, probes


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("echo musl libc", "musl"), ("echo musl libc >&2", "musl"), ("echo musl libc; exit 1", "glibc"),
        ("echo GNU", "glibc"), ("exec sleep 5; echo musl", "glibc"),
    ],
)  # fmt: skip
def test_the_c_library_is_what_ldd_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str
) -> None:
    monkeypatch.setattr(glob, "glob", lambda _pattern: [])
    (tmp_path / "ldd").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "ldd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    began = time.monotonic()
    assert libc(0.2 if "sleep" in script else 0) == name
    assert time.monotonic() - began < 4
    monkeypatch.setattr(glob, "glob", lambda _pattern: ["there"])
    assert libc(0) == "musl"


def test_a_version_that_hangs_when_tried_is_not_runnable(place: Path) -> None:
    (place.parent / "cli.zst").write_bytes(zst(b"#!/bin/sh\nexec sleep 5\n"))
    began = time.monotonic()
    assert installed(place, "-cli-probe-timeout", "100ms")["cliError"] == (
        f"installed cli at {place}/1.0 is not runnable"
    )
    assert time.monotonic() - began < 4
    assert os.listdir(place) == []


# --------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("times", [1, 2])
def test_a_version_that_somebody_sweeps_away_is_unpacked_once_more(
    place: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    runs, swept = install_module._Install._runs, list[str]()

    def meanwhile(self: install_module._Install, path: str) -> bool:
        if ".fetch-" in path and len(swept) < times:
            swept.append(path)
            os.unlink(path)
        return runs(self, path)

    monkeypatch.setattr(install_module._Install, "_runs", meanwhile)
    result = installed(place)
    assert len(set(swept)) == times
    if times == 1:
        assert "cliError" not in result
        assert (place / "1.0").read_bytes() == SCRIPT
    else:
        assert result["cliError"].startswith("staging file vanished before install: rename ")
        assert result["cliError"].endswith(f" {place}/1.0: no such file or directory")


def test_the_size_of_a_version_can_be_bounded(place: Path) -> None:
    assert installed(place, "-max-cli-bytes", str(len(SCRIPT) - 1))["cliError"] == "decompressing: size limit exceeded"
    assert (place.parent / "cli.zst").exists(), "it goes only when it was unpacked"
    assert "cliError" not in installed(place, "-max-cli-bytes", str(len(SCRIPT)))


def test_a_negative_bound_is_none(place: Path) -> None:
    assert "cliError" not in installed(place, "-max-cli-bytes", "-1", "-cli-probe-timeout", "-1s")


@pytest.mark.parametrize("ahead", [-1000, 1000])
@pytest.mark.parametrize("spelling", ["", "/", "/../dir"])
def test_so_many_versions_stay_and_the_new_one_is_among_them(place: Path, ahead: int, spelling: str) -> None:
    place.mkdir()
    (place / "directory").mkdir()
    for number in range(5):
        (place / str(number)).touch()
        os.utime(place / str(number), (0, time.time() + ahead + number))
    assert "cliError" not in installed(place, "-cli-dir", f"{place}{spelling}", "-cli-keep", "3")
    assert sorted(os.listdir(place)) == ["1.0", "3", "4", "directory"]


def test_all_frames_of_a_file_are_unpacked() -> None:
    big = bytes(range(256)) * 512
    pieces = [big[start : start + 100] for start in range(0, len(big), 100)]
    packed = b"".join(map(zst, pieces))
    for step in (1000, 1 << 20):
        assert b"".join(unzstd(reader(packed, step))) == big


# ------------------------------------------------------------------------------------------------------------ downloads


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /STATUS/SIZE with a body of that size."""

    def do_GET(self) -> None:
        _, status, size = self.path.split("/")
        self.send_response(int(status))
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(b"x" * int(size))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Downloads into a file of the test; returns the sum, or what went wrong."""
    monkeypatch.setenv("no_proxy", "*")
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)

    def get(url: str, seconds: float = 0, most: int = 0) -> str:
        try:
            return download(url, file, seconds, most)
        except DownloadError as error:
            return str(error)

    yield get
    os.close(file)


def test_a_download(site: str, fetch: Callable[..., str], tmp_path: Path) -> None:
    assert fetch(f"{site}/200/1000000") == hashlib.sha256(b"x" * 1_000_000).hexdigest()
    assert (tmp_path / "file").read_bytes() == b"x" * 1_000_000


@pytest.mark.parametrize("status", [201, 204, 403, 404, 500])
def test_any_other_status_is_no_download(site: str, fetch: Callable[..., str], status: int) -> None:
    assert fetch(f"{site}/{status}/0") == f"download failed with status {status}"


def test_the_size_of_a_download_can_be_bounded(site: str, fetch: Callable[..., str], tmp_path: Path) -> None:
    assert fetch(f"{site}/200/1000", 0, 1000) == hashlib.sha256(b"x" * 1000).hexdigest()
    assert fetch(f"{site}/200/1001", 0, 1000) == "download failed: size limit exceeded"
    assert (tmp_path / "file").stat().st_size == 1000


def test_a_download_that_does_not_come_ends(fetch: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        assert fetch(url, 0.1) == f'download failed: Get "{url}": context deadline exceeded'


def test_what_cannot_be_reached(fetch: Callable[..., str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    assert fetch(f"http://{place}/x") == (
        f'download failed: Get "http://{place}/x": dial tcp {place}: connect: connection refused'
    )
    assert fetch("file:///x") == 'download failed: Get "file:///x": unsupported protocol scheme "file"'
