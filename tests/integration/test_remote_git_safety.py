"""What git's methods must not do to the rest of the machine: hostile branches, hooks, paths."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sterna.remote.calls import CallError, Params, Result
from sterna.remote.git import Git, GitError
from sterna.remote.seeding import seed
from tests.integration.remote_rig import alive, until
from tests.integration.test_remote_git import IDENTITY, shell

FIELDS = ("path", "baseRepo", "branchName", "worktreePath", "sourceBranch")


def made(home: Path, seconds: float = 0, path: str = "", *, strict: bool = False) -> Git:
    variables = {**IDENTITY, "HOME": str(home), "PATH": path or os.environ["PATH"], "LC_ALL": "C"}
    return Git([f"{name}={value}".encode() for name, value in variables.items()], str(home), seconds, strict=strict)


def ask(git: Git, method: str, **params: object) -> Result:
    return git.methods[method](Params({**dict.fromkeys(FIELDS, ""), **{name: str(v) for name, v in params.items()}}))


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    shell(tmp_path, "git init -q -b main repo; cd repo; echo a > a; git add a; git commit -qm one")
    return tmp_path / "repo"


def refused(result: Result) -> bool:
    return str(result.get("error")).startswith("worktreePath must not be or contain the home directory: ")


@pytest.mark.parametrize("strict", [False, True])
def test_home_is_not_removed_by_another_spelling(repo: Path, strict: bool) -> None:
    top = repo.parent
    (top / "real" / "sub").mkdir(parents=True)
    home = top / "real" / "me"
    shell(repo, f"git worktree add -q -b home {home}; touch {home}/precious")
    (top / "link").symlink_to("real/sub")
    (top / "over").symlink_to("real")
    (top / "tome").symlink_to("real/me")
    (repo / "inner").symlink_to("../real/sub")
    git = made(home, strict=strict)
    for path in (
        f"{top}/link/../me",  # cleaned before links are followed this would be another directory
        f"{top}/link/..",
        f"{top}/link/../../real",
        f"{top}/over/me/",
        "../real/me",
        "inner/../me",
        "../link/..",
        f"{top}/tome",  # git follows it
        "me",  # for git the worktree whose path ends so
        "real/me",
    ):
        assert refused(ask(git, "git.worktree_remove", baseRepo=repo, worktreePath=path)), path
        assert (home / "precious").exists(), path
    if strict:
        assert refused(ask(git, "git.worktree_remove", baseRepo=home, worktreePath="."))
        assert refused(ask(git, "git.worktree_remove", baseRepo=home, worktreePath=""))
        assert (home / "precious").exists()
    shell(repo, "git worktree add -q -b other ../other")
    assert ask(git, "git.worktree_remove", baseRepo=repo, worktreePath="../other") == {"success": True}
    assert not (top / "other").exists()


def test_the_directory_above_a_links_target_is_not_emptied(repo: Path) -> None:
    (repo.parent / "real" / "sub").mkdir(parents=True)
    (repo.parent / "real" / "keep").touch()
    (repo.parent / "link").symlink_to("real/sub")
    home = Path("/nowhere/me")
    path = f"{repo.parent}/link/.."
    result = ask(made(home), "git.worktree_remove", baseRepo=repo, worktreePath=path)
    assert str(result["error"]).endswith(f"manual cleanup also failed: RemoveAll {path}: invalid argument")
    assert (repo.parent / "real" / "keep").exists()


# ------------------------------------------------------------------------------------------------------------ seeding


def test_a_link_that_the_branch_holds_is_not_written_through(repo: Path) -> None:
    secrets = repo.parent / "home" / ".ssh"
    secrets.mkdir(parents=True)
    (secrets / "authorized_keys").write_text("mine")
    shell(repo, f"git checkout -q -b evil; ln -s {secrets} .claude; ln -s {secrets} d; ln -s {secrets}/new e.env")
    shell(repo, "git add -A; git commit -qm two; git checkout -q main")
    shell(repo, "mkdir .claude d; echo theirs > .claude/authorized_keys; echo theirs > d/authorized_keys")
    shell(repo, "echo '/d/' > .worktreeinclude; echo '*.env' >> .worktreeinclude; echo no > e.env; echo yes > f.env")
    tree = repo.parent / "tree"
    params = {"baseRepo": repo, "branchName": "new", "worktreePath": tree, "sourceBranch": "evil"}
    assert ask(made(secrets.parent), "git.worktree_create", **params)["success"]
    assert (secrets / "authorized_keys").read_text() == "mine"
    assert os.listdir(secrets) == ["authorized_keys"]
    assert (tree / "f.env").read_text() == "yes\n"


def test_only_regular_files_are_overwritten(tmp_path: Path) -> None:
    repo, tree = tmp_path / "repo", tmp_path / "tree"
    for name in ("fifo", "inner/link/x", "inner/x", "dir", "ok"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text("new")
    shutil.copytree(repo, repo / ".claude")
    (tree / ".claude" / "inner").mkdir(parents=True)
    (tree / "ok").write_text("something longer")
    (tree / "dir").mkdir()
    (tmp_path / "outside").mkdir()
    for place in (tree, tree / ".claude"):
        os.mkfifo(place / "fifo")
        (place / "inner").mkdir(exist_ok=True)
        (place / "inner" / "link").symlink_to(tmp_path / "outside")
    reader = os.open(tree / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    names = [str(path.relative_to(repo)).encode() for path in repo.rglob("*") if path.is_file()]
    seed(bytes(repo), bytes(tree), names)
    assert os.listdir(tmp_path / "outside") == []
    assert os.read(reader, 10) == b""
    os.close(reader)
    for name in ("ok", "inner/x", ".claude/ok", ".claude/inner/x"):
        assert (tree / name).read_text() == "new"
    seed(bytes(repo), bytes(tmp_path / "never"), names)  # the worktree is gone again
    assert not (tmp_path / "never").exists()


# ------------------------------------------------------------------------------------ what git prints, and for how long


def stand_in(tmp_path: Path, script: str) -> str:
    """Returns a PATH on which git is a script."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    return f"{tmp_path}/bin:{os.environ['PATH']}"


def test_what_git_prints_is_kept_up_to_a_bound(tmp_path: Path) -> None:
    git = made(tmp_path, path=stand_in(tmp_path, "yes 0123456789 | head -c 40000000; echo end; exit 3"))
    with pytest.raises(GitError, match="exit status 3") as caught:
        git._run("/", "any")
    output = caught.value.output
    assert 16_700_000 < len(output) <= 16 * 1024 * 1024
    assert output.endswith("0123456789\n")
    with pytest.raises(CallError, match="exit status 3"):
        ask(made(tmp_path, path=stand_in(tmp_path / "bin", "case $* in *--git-dir*) ;; *) exit 3; esac")), "git.status")


HOOK = 'sleep 1000 & echo $! > "$HOME/child.new"; mv "$HOME/child.new" "$HOME/child"; '


@pytest.mark.parametrize("rest", ["wait", "exit 0", "exec >/dev/null 2>&1; wait"])
def test_what_git_started_ends_with_its_time(tmp_path: Path, rest: str) -> None:
    git = made(tmp_path, 0.5, stand_in(tmp_path, HOOK + rest))
    with pytest.raises(GitError, match="signal: killed") as caught:
        git._run("/", "any")
    assert caught.value.timed_out
    until(lambda: not alive(int((tmp_path / "child").read_text())), "what git started has ended")


def test_what_git_started_ends_with_the_daemon(tmp_path: Path) -> None:
    git = made(tmp_path, path=stand_in(tmp_path, HOOK + "wait"))
    failed: list[str] = []

    def run() -> None:
        try:
            git._run("/", "any")
        except GitError as error:
            failed.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until((tmp_path / "child").exists, "git has started something")
    git.close()
    thread.join(10)
    assert failed == ["signal: killed"]
    until(lambda: not alive(int((tmp_path / "child").read_text())), "what git started has ended")
    git.close()


def test_git_that_cannot_be_started_has_failed(repo: Path) -> None:
    git, long = made(repo.parent / "home"), "x" * 200_000
    assert ask(git, "git.info", path="/" + long) == {"isRepo": False, "repoSlug": "", "defaultBranch": ""}
    assert ask(git, "git.status", path="/" + long) == {"isRepo": False, "clean": False}
    assert ask(git, "git.list_branches", path=long) == {"isRepo": False, "branches": []}
    result = ask(git, "git.worktree_create", baseRepo=repo, branchName=long, worktreePath=repo.parent / "w")
    assert result == {"success": False, "error": "git worktree add failed: ", "errorCode": "worktree_add_failed"}
    result = ask(git, "git.worktree_remove", baseRepo=repo, worktreePath="/" + long)
    assert str(result["error"]).endswith(": file name too long")
    shell(repo, "git worktree add -q -b gone ../gone")
    assert ask(git, "git.worktree_remove", baseRepo=repo, worktreePath=repo.parent / "gone", branchName=long)["success"]
    with pytest.raises(GitError, match=r"fork/exec .*/git: argument list too long"):
        git._run("/", long)


def test_a_path_of_a_megabyte_is_decided_at_once(tmp_path: Path) -> None:
    script = (
        "from sterna.remote.removal import holds_home, names_home\n"
        "path = '/' + 'a/' * 500_000\n"
        "assert not holds_home(path, '/users/me', '/b')\nassert not names_home(path, '/users/me', '/b')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=10, check=True)
