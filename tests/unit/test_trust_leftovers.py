"""Unfinished files of killed processes go at the next start, and nothing else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sterna.trust.device import DeviceKey
from sterna.trust.leftovers import AGE_SECONDS, remove_leftovers
from sterna.trust.tokens import TokenKey

OLD = time.time() - AGE_SECONDS - 1

# Writes a file and is killed (SIGKILL) before it gets its name.
WRITER = """
import os, signal, sys
from sterna import paths
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
paths.atomic_write(sys.argv[1], b"secret")
"""


def left(path: Path) -> Path:
    """What a process leaves that is killed while it writes the file `path`; older than any write lasts."""
    before = set(path.parent.iterdir())
    done = subprocess.run([sys.executable, "-c", WRITER, os.fspath(path)], check=False, timeout=30)
    assert done.returncode == -signal.SIGKILL
    (found,) = set(path.parent.iterdir()) - before
    assert found.read_bytes() == b"secret"
    os.utime(found, (OLD, OLD))
    return found


@pytest.fixture(name="state")
def _state(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    (state / "remotes").mkdir(mode=0o700, parents=True)
    state.chmod(0o700)
    return state


@pytest.mark.parametrize("start", [DeviceKey.load, TokenKey.load], ids=["client", "node"])
def test_they_go_at_the_next_start(state: Path, start: type) -> None:
    first, second = left(state / "token.key"), left(state / "remotes" / "host.json")
    start(os.fspath(state))
    assert not first.exists()
    assert not second.exists()


def test_what_is_not_ours_or_young_stays(state: Path, tmp_path: Path) -> None:
    pattern = left(state / "token.key").name
    (state / pattern).unlink()
    kept = {
        "another name": state / "notes.tmp",
        "nearly the name": state / pattern.replace(".tmp", ".tmp2"),
        "no dot": state / pattern[1:],
        "too deep": state / "remotes" / "deeper" / pattern,
        "a link": state / f".a{pattern}",
        "a directory": state / f".b{pattern}",
        "a pipe": state / f".c{pattern}",
        "young": state / f".d{pattern}",
        "beyond a link": tmp_path / "outside" / pattern,
    }
    kept["too deep"].parent.mkdir()
    kept["beyond a link"].parent.mkdir()
    for what in ("another name", "nearly the name", "no dot", "too deep", "young", "beyond a link"):
        kept[what].write_text("kept")
    kept["a link"].symlink_to(kept["beyond a link"])
    kept["a directory"].mkdir()
    os.mkfifo(kept["a pipe"])
    (state / "linked").symlink_to(kept["beyond a link"].parent)
    for what, path in kept.items():
        if what != "young":
            os.utime(path, (OLD, OLD), follow_symlinks=False)
    gone = state / f".e{pattern}"
    gone.write_text("gone")
    os.utime(gone, (OLD, OLD))
    remove_leftovers(os.fspath(state))
    assert [what for what, path in kept.items() if not os.path.lexists(path)] == []
    assert not gone.exists()


def test_foreign_files_stay(state: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a file away needs root")
    found = left(state / "token.key")
    os.chown(found, 12_345, 12_345)
    remove_leftovers(os.fspath(state))
    assert found.exists()
    os.chown(found, 0, 0)
    remove_leftovers(os.fspath(state))
    assert not found.exists()


def test_a_directory_that_cannot_be_read_is_no_error(state: Path) -> None:
    remove_leftovers(os.fspath(state / "nowhere"))
