"""How files.write replaces a file: what is on the disk, and who can read it, at every moment. Bounds of reading."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from sterna.remote import files
from sterna.remote.calls import CallError, Params
from sterna.remote.files import Files
from sterna.remote.write import Writer


def params(path: Path, **more: object) -> Params:
    return Params({"path": str(path), "content": "bmV3", "mode": None, "ifSize": None, "ifMtime": "", **more})


def watched(monkeypatch: pytest.MonkeyPatch, name: str, before: Callable[..., object]) -> None:
    """Calls `before` with the arguments of a system call whenever it is made."""
    call: Callable[..., Any] = getattr(os, name)

    def both(*args: Any) -> Any:
        before(*args)
        return call(*args)

    monkeypatch.setattr(os, name, both)


def test_content_is_on_the_disk_before_its_name_and_its_name_before_the_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    watched(monkeypatch, "fsync", lambda fd: steps.append(f"sync {os.readlink(f'/proc/self/fd/{fd}')}"))
    watched(monkeypatch, "rename", lambda *_: steps.append("rename"))
    assert Writer("/").write(params(tmp_path / "f"))["success"]
    assert steps[0].startswith(f"sync {tmp_path}/.sterna-")
    assert steps[1:] == ["rename", f"sync {tmp_path}"]


@pytest.mark.parametrize(("old", "mode", "wanted"), [(0o640, None, 0o640), (0o644, 0o600, 0o600), (None, 0o400, 0o400)])
def test_nobody_reads_content_before_its_mode_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: int | None, mode: int | None, wanted: int
) -> None:
    file, modes = tmp_path / "f", []
    if old is not None:
        file.write_text("old")
        file.chmod(old)
    watched(monkeypatch, "write", lambda fd, _: modes.append(stat.S_IMODE(os.fstat(fd).st_mode)))
    assert Writer("/").write(params(file, mode=mode))["success"]
    assert modes == [0o600]
    assert stat.S_IMODE(file.stat().st_mode) == wanted


@pytest.mark.parametrize("allowed", [True, False])
def test_a_file_keeps_its_owner_where_the_system_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    owners: list[tuple[int, int]] = []

    def give(_descriptor: int, user: int, group: int) -> None:
        owners.append((user, group))
        if not allowed:
            raise PermissionError

    monkeypatch.setattr(os, "fchown", give)
    assert Writer("/").write(params(tmp_path / "f"))["success"]
    assert owners == []
    assert Writer("/").write(params(tmp_path / "f"))["success"]
    assert owners == [(os.getuid(), os.getgid())]


@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
def test_nothing_is_left_of_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = tmp_path / "f"
    file.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(EIO, os.strerror(EIO))

    watched(monkeypatch, name, fail)
    with pytest.raises(CallError, match=f"^write {file}: input/output error$"):
        Writer("/").write(params(file))
    assert os.listdir(tmp_path) == ["f"]
    assert file.read_text() == "old"


def test_one_writer_looks_when_the_other_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expects that there is no file: while one is about to put its own there, the other must not look yet."""
    both = threading.Barrier(2)

    def meet(*_: object) -> None:
        try:
            both.wait(0.1)
        except threading.BrokenBarrierError:
            pass  # the other one waits for its turn

    watched(monkeypatch, "rename", meet)
    writer, results = Writer("/"), list[Any]()
    threads = [
        threading.Thread(target=lambda: results.append(writer.write(params(tmp_path / "f", ifSize=-1))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result["success"] for result in results) == [False, True]


def test_what_has_no_size_or_grows_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    read, path = Files("/").methods["files.read"], "/proc/self/maps"
    assert os.stat(path).st_size == 0
    assert read(Params({"path": path, "maxBytes": 10}))["exists"]
    monkeypatch.setattr(files, "REMOTE_READ_DEVICE_MAX_BYTES", 100)
    with pytest.raises(CallError, match=f"^read {path}: file too large$"):
        read(Params({"path": path, "maxBytes": 10}))
    assert read(Params({"path": path, "maxBytes": 1 << 20}))["exists"]
