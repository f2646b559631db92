"""The recorded vectors of the contract, played against `sterna-remote`, one group at a time so that workers share."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "rpc"
GROUPS = (
    "cli", "envelope", "files", "git_basic", "git_status", "params_typing", "process", "tilde", "worktree_remove",
    "worktree_source",
)  # fmt: skip

MODULE = f"{sys.executable} -m sterna.remote"
EXECUTABLE = Path(sys.executable).with_name("sterna-remote")

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded vectors are not beside this checkout")


def test_every_group_is_played() -> None:
    assert sorted(path.stem for path in (SHARED / "vectors").glob("*.jsonl")) == sorted(GROUPS)


@pytest.mark.timeout(180)  # some vectors wait for ten seconds by design
@pytest.mark.parametrize("group", GROUPS)
def test_vectors(group: str, tmp_path: Path) -> None:
    play(group, tmp_path)


@pytest.mark.timeout(180)
def test_vectors_of_durable_processes(tmp_path: Path) -> None:
    play("process", tmp_path, f"{MODULE} -durable")


@pytest.mark.skipif(not EXECUTABLE.exists(), reason="the executable is not installed in this environment")
def test_vectors_of_the_installed_executable(tmp_path: Path) -> None:
    play("envelope", tmp_path, shlex.quote(str(EXECUTABLE)))


def play(group: str, tmp_path: Path, daemon: str = MODULE) -> None:
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [
            sys.executable, str(SHARED / "play.py"), "--daemon", daemon,
            "--env", f"PYTHONPATH={source}", "--cases", str(SHARED / "vectors" / f"{group}.jsonl"),
        ],
        cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith(" passed, 0 failed")
