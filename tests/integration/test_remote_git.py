"""git's methods of a real daemon in real repositories."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.durable_rig import PatchedDaemon
from tests.integration.remote_rig import Client, Daemon, until

IDENTITY = {
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
    "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org",
}  # fmt: skip


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("remote"), **IDENTITY) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


def shell(place: Path, script: str) -> None:
    environment = {**os.environ, **IDENTITY, "HOME": str(place)}
    subprocess.run(["sh", "-ec", script], cwd=place, env=environment, check=True, capture_output=True)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    shell(
        tmp_path,
        "git init -q -b main repo; cd repo; echo a > a; git add a; git commit -qm one; git branch feature; git tag v1",
    )
    return tmp_path / "repo"


def test_information(client: Client, repo: Path) -> None:
    info = {"isRepo": True, "repo": "repo", "branch": "main", "root": str(repo), "repoSlug": "", "defaultBranch": ""}
    assert client.ask("git.info", path=str(repo)) == info
    shell(repo, "git remote add origin x:o/r; git config url.https://github.com/.insteadOf x:")
    shell(repo, "mkdir sub; git checkout -q --detach")
    shell(repo, "git update-ref refs/remotes/origin/dev HEAD")
    shell(repo, "git symbolic-ref refs/remotes/origin/HEAD refs/remotes/origin/dev")
    result = client.ask("git.info", path=str(repo / "sub"))
    assert result == info | {"branch": result["branch"], "repoSlug": "o/r", "defaultBranch": "dev"}
    assert result["branch"].startswith("detached:")
    assert client.ask("git.info", path=str(repo.parent)) == {"isRepo": False, "repoSlug": "", "defaultBranch": ""}


def test_status_and_branches(client: Client, repo: Path) -> None:
    assert client.ask("git.status", path=str(repo)) == {"isRepo": True, "clean": True}
    shell(repo, "echo b > a; touch 'sp ace'")
    assert client.ask("git.status", path=str(repo)) == {
        "isRepo": True,
        "clean": False,
        "changes": ["M a", '?? "sp ace"'],
    }
    assert client.ask("git.list_branches", path=str(repo)) == {"isRepo": True, "branches": ["feature", "main"]}
    assert client.ask("git.status", path=str(repo / ".git")) == {"code": -32603, "message": "exit status 128"}
    for method, result in (
        ("git.status", {"isRepo": False, "clean": False}),
        ("git.list_branches", {"isRepo": False, "branches": []}),
    ):
        assert client.ask(method, path="/a\0b") == result


@pytest.mark.parametrize(
    ("source", "taken"), [("feature", "feature"), ("v1", "main"), ("HEAD", "main"), ("", "main"), ("none", "main")]
)
def test_a_worktree_comes_from_a_branch_only(client: Client, repo: Path, source: str, taken: str) -> None:
    place = str(repo.parent / "tree")
    params = {"baseRepo": str(repo), "branchName": "new", "worktreePath": place, "sourceBranch": source}
    assert client.ask("git.worktree_create", **params) == {"success": True, "path": place, "sourceBranch": taken}
    again = client.ask("git.worktree_create", **params)
    assert again["errorCode"] == "worktree_add_failed"
    assert again["error"].startswith("git worktree add failed: Preparing worktree (new branch 'new')\nfatal: ")


def test_a_worktree_is_seeded(client: Client, repo: Path) -> None:
    shell(repo, "mkdir -p .claude/n empty; echo 1 > .claude/n/x; ln -s n .claude/l")
    shell(repo, "printf '*.env\\n/empty\\n' > .worktreeinclude")
    shell(repo, "echo s > a.env; chmod 600 a.env; ln -s a.env b.env; mkdir d; echo t > d/c.env")
    shell(repo, "echo no > other; echo q > é.env")
    place = repo.parent / "tree"
    assert client.ask("git.worktree_create", baseRepo=str(repo), branchName="new", worktreePath=str(place))["success"]
    found = sorted(
        str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() and ".git" not in path.parts
    )
    assert found == [".claude/n/x", "a", "a.env", "d/c.env"]
    assert (place / "a.env").stat().st_mode & 0o777 == 0o666 & ~umask()
    relative = {"baseRepo": str(repo), "branchName": "other", "worktreePath": "../beside"}
    assert client.ask("git.worktree_create", **relative)["path"] == "../beside"
    assert (repo.parent / "beside" / ".claude" / "n" / "x").exists()


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_worktree_is_removed_even_if_git_does_not_want_to(client: Client, repo: Path) -> None:
    shell(repo, "git worktree add -q -b one ../one; git worktree add -q -b two ../two")
    shell(repo, "git worktree lock ../two; mkdir ../plain")
    for name in ("one", "two", "plain", "missing"):
        place = repo.parent / name
        assert client.ask("git.worktree_remove", baseRepo=str(repo), worktreePath=str(place), branchName=name) == {
            "success": True
        }
        assert not place.exists()
    # git keeps the branch of a worktree that was deleted behind its back
    assert client.ask("git.list_branches", path=str(repo))["branches"] == ["feature", "main", "two"]


def test_home_is_never_removed(client: Client, daemon: Daemon) -> None:
    for path in ("~", "/", str(daemon.home), str(daemon.home.parent), f"{daemon.home}/x/.."):
        result = client.ask("git.worktree_remove", baseRepo="/", worktreePath=path)
        assert result["error"].startswith("worktreePath must not be or contain the home directory: "), path
    result = client.ask("git.worktree_remove", baseRepo="/", worktreePath="/a\0b/c")
    assert "manual cleanup also failed: open /a\0b: invalid argument" in result["error"]
    assert daemon.home.exists()


def test_relative_paths_of_a_daemon_whose_directory_is_gone(tmp_path: Path, repo: Path) -> None:
    """The way up from there still leads to what was above it."""
    shell(repo, "git worktree add -q ../tree")
    (tmp_path / "d").mkdir()
    daemon = PatchedDaemon(tmp_path, "import os, sys; sys.argv[0] = '/x'; os.chdir('d'); os.rmdir('../d')")
    until(lambda: "listening on" in daemon.log.read_text(), "the daemon does not listen")
    with daemon, daemon.connect() as client:
        for path in ("..", "../", "../../" + tmp_path.name, "../d/.."):
            assert client.ask("git.worktree_remove", baseRepo="/", worktreePath=path) == {
                "success": False,
                "error": f'worktreePath must not be or contain the home directory: "{path}"',
            }
        assert client.ask("git.worktree_remove", baseRepo=str(repo), worktreePath="../tree") == {"success": True}
        assert not (repo / "../tree").exists()
        assert client.ask("git.worktree_remove", worktreePath="nothing") == {"success": True}
        assert client.ask("files.list", path="..")["entries"]
