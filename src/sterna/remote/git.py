"""The methods `git.*`: git itself, run in worker threads, always as `git -C DIRECTORY`."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Final

from sterna.errors import SternaError
from sterna.remote.calls import BAD_PARAMS, FAILED, SUCCESS, CallError
from sterna.remote.environment import find_command, search_path
from sterna.remote.fields import TEXT, Kind
from sterna.remote.gotext import bytes_of, errno_text, expand, failure, quote, text_of, trim
from sterna.remote.removal import RemovalError, holds_home, names_home, remove_all, resolved
from sterna.remote.seeding import seed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sterna.remote.calls import Params, Result

_ALL: Final[Mapping[str, Kind]] = dict.fromkeys(
    ("path", "baseRepo", "branchName", "worktreePath", "sourceBranch"), TEXT
)
FIELDS: Final[Mapping[str, Mapping[str, Kind]]] = dict.fromkeys(
    ("git.info", "git.status", "git.list_branches", "git.worktree_create", "git.worktree_remove"), _ALL
)

_OUTPUT_MAX_BYTES: Final = 16 * 1024 * 1024  # of one git, with what its hooks and filters print
_READ_BYTES: Final = 64 * 1024
_URL: Final = re.compile(r"(?:https?|ssh|git)://(?:[^/]*@)?(?P<host>[^/@]*)/(?P<path>.*)", re.IGNORECASE | re.ASCII)
_SCP: Final = re.compile(r"(?:[^/:]*@)?(?P<host>[^/:@]+):(?P<path>.*)", re.ASCII)
_OWNER: Final = re.compile(r"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*")
_REPO: Final = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")


class GitError(SternaError):
    """git failed; the text is how os/exec says it, `output` what git printed."""

    def __init__(self, text: str, output: str = "", *, timed_out: bool = False) -> None:
        super().__init__(text)
        self.output, self.timed_out = output, timed_out


def repo_slug(url: str) -> str:
    """Returns `owner/repo` of a remote on github.com, else an empty string."""
    match = _URL.fullmatch(url) or ("://" not in url and _SCP.fullmatch(url)) or None
    if match is None or match["host"].lower() != "github.com":
        return ""
    owner, slash, repo = match["path"].rstrip("/").removesuffix(".git").partition("/")
    if not slash or not _OWNER.fullmatch(owner) or not _REPO.fullmatch(repo):
        return ""
    return "" if repo in {".", ".."} or repo.endswith(".wiki") else f"{owner}/{repo}"


class Git:
    """Runs git.

    Parameters: `environment`, the entries it sees; `home`, what `~` stands for and what is never deleted; `seconds`,
    after which git is killed, 0 for never; `seconds_text`, the same as the contract's texts print it; `strict`, whether
    only worktrees that the repository knows of are removed.
    """

    def __init__(
        self, environment: list[bytes], home: str, seconds: float = 0, seconds_text: str = "", *, strict: bool = False
    ) -> None:
        self._strict = strict
        self._environment = dict(entry.partition(b"=")[::2] for entry in environment if b"=" in entry)
        self._environment.pop(b"", None)
        self._path = search_path(environment)
        self._home, self._seconds, self._seconds_text = home, seconds or None, seconds_text
        self._running: set[subprocess.Popen[bytes]] = set()
        self._turn = threading.Lock()  # so that no group is killed whose number may be another one's by now
        self.methods: Mapping[str, Callable[[Params], Result]] = {
            "git.info": self._info,
            "git.status": self._status,
            "git.list_branches": self._list_branches,
            "git.worktree_create": self._worktree_create,
            "git.worktree_remove": self._worktree_remove,
        }

    def close(self) -> None:
        """Kills every git with what it started; called once, at the end."""
        with self._turn:
            for process in self._running:
                _kill_group(process)

    def _expanded(self, params: Params, name: str) -> str:
        return expand(params.text(name), self._home)

    def _run(self, directory: str, *words: str, both: bool = False) -> str:
        """Returns what git prints on its output, with `both` also on its error output. Raises `GitError`."""
        try:
            executable = find_command("git", self._path)
        except LookupError as error:
            raise GitError(str(error)) from error
        try:
            process = subprocess.Popen(
                [bytes_of(word) for word in (executable, "-C", directory, *words)], env=self._environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, close_fds=False, process_group=0,
                stderr=subprocess.STDOUT if both else subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise GitError(failure("fork/exec", executable, error)) from error
        with process:
            output = text_of(self._output(process))
        if process.returncode > 0:
            raise GitError(f"exit status {process.returncode}", output)
        if process.returncode < 0:
            raise GitError(f"signal: {_signal_text(-process.returncode)}", output)
        return output

    def _output(self, process: subprocess.Popen[bytes]) -> bytes:
        """Returns what a git prints until it has ended, whole lines when that is too much. Raises `GitError`."""
        with self._turn:
            self._running.add(process)
        finished = False
        try:
            deadline = time.monotonic() + self._seconds if self._seconds else math.inf
            output = _read(process, deadline)
            finished = output is not None and _ends_before(process.pid, deadline)
        finally:
            if not finished:
                _kill_group(process)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self._turn:
                self._running.discard(process)
                process.wait()
        if output is None or not finished:
            raise GitError("signal: killed", timed_out=True)
        return output

    def _asked(self, directory: str, *words: str) -> str:
        """Returns git's trimmed answer, an empty one when it fails."""
        try:
            return trim(self._run(directory, *words))
        except GitError:
            return ""

    def _succeeds(self, directory: str, *words: str) -> bool:
        try:
            self._run(directory, *words)
        except GitError:
            return False
        return True

    # -------------------------------------------------------------------------------------------------------- reading

    def _info(self, params: Params) -> Result:
        path = self._expanded(params, "path")
        if self._asked(path, "rev-parse", "--is-inside-work-tree") != "true":
            return {"isRepo": False, "repoSlug": "", "defaultBranch": ""}
        root = self._asked(path, "rev-parse", "--show-toplevel")
        try:
            branch = trim(self._run(path, "symbolic-ref", "--short", "HEAD"))
        except GitError:
            branch = "detached:" + self._asked(path, "rev-parse", "--short", "HEAD")
        default = self._asked(path, "symbolic-ref", "refs/remotes/origin/HEAD")
        return {
            "isRepo": True,
            "repo": root.rstrip("/").rpartition("/")[2] or ("/" if root else "."),
            "branch": branch,
            "root": root,
            "repoSlug": repo_slug(self._asked(path, "remote", "get-url", "origin")),
            "defaultBranch": default.removeprefix("refs/remotes/origin/"),
        }

    def _status(self, params: Params) -> Result:
        path = self._expanded(params, "path")
        if not self._succeeds(path, "rev-parse", "--git-dir"):
            return {"isRepo": False, "clean": False}
        try:
            output = trim(self._run(path, "status", "--porcelain"))
        except GitError as error:
            raise CallError(FAILED, str(error)) from error
        if not output:
            return {"isRepo": True, "clean": True}
        return {"isRepo": True, "clean": False, "changes": [line for line in output.split("\n") if trim(line)]}

    def _list_branches(self, params: Params) -> Result:
        path = self._expanded(params, "path")
        if not self._succeeds(path, "rev-parse", "--git-dir"):
            return {"isRepo": False, "branches": []}
        try:
            output = self._run(path, "for-each-ref", "--format=%(refname:short)", "refs/heads")
        except GitError as error:
            raise CallError(FAILED, str(error)) from error
        names = [trim(line) for line in output.split("\n")]
        return {"isRepo": True, "branches": sorted((name for name in names if name), key=bytes_of)}

    # ------------------------------------------------------------------------------------------------------ worktrees

    def _worktree_create(self, params: Params) -> Result:
        repo, path = self._expanded(params, "baseRepo"), self._expanded(params, "worktreePath")
        branch, source = params.text("branchName"), params.text("sourceBranch")
        if not branch:
            raise CallError(BAD_PARAMS, "branchName is required")
        if self._asked(repo, "rev-parse", "--is-inside-work-tree") != "true":
            return {"success": False, "error": "not a git repository", "errorCode": "not_a_repo"}
        if not source or not self._succeeds(repo, "show-ref", "--verify", "--quiet", "refs/heads/" + source):
            source = self._asked(repo, "rev-parse", "--abbrev-ref", "HEAD")
        try:
            self._run(repo, "worktree", "add", "-b", branch, path, *([source] if source else []), both=True)
        except GitError as error:
            output = error.output.rstrip("\n") if error.output or not error.timed_out else str(error)
            text = f"git worktree add failed: {output}"
            return {"success": False, "error": text, "errorCode": "worktree_add_failed"}
        self._seed(repo, path)
        result: Result = {"success": True, "path": path}
        return result | {"sourceBranch": source} if source else result

    def _seed(self, repo: str, path: str) -> None:
        listed = ""
        if os.path.isfile(bytes_of(os.path.join(repo, ".worktreeinclude"))):
            words = ("ls-files", "--others", "--ignored", "--exclude-from=.worktreeinclude")
            try:
                listed = self._run(repo, *words)
            except GitError:
                pass
        seed(bytes_of(repo or "."), bytes_of(os.path.join(repo, path)), [bytes_of(line) for line in listed.split("\n")])

    def _worktree_remove(self, params: Params) -> Result:
        repo, path = self._expanded(params, "baseRepo"), self._expanded(params, "worktreePath")
        branch = params.text("branchName")
        refusal = f"worktreePath must not be or contain the home directory: {quote(path)}"
        if path and (holds_home(path, self._home, repo) or names_home(path, self._home, repo)):
            return {"success": False, "error": refusal}
        if self._strict:
            path, problem = self._own_worktree(repo, path)
            if problem:
                return {"success": False, "error": problem}
            if holds_home(path, self._home):
                return {"success": False, "error": refusal}
        try:
            self._run(repo, "worktree", "remove", "--force", path, both=True)
        except GitError as error:
            if error.timed_out:
                text = (
                    f"git worktree remove timed out after {self._seconds_text}; no cleanup was attempted, "
                    "and git may have partially removed the worktree"
                )
                return {"success": False, "error": text}
            try:
                remove_all(path)
            except RemovalError as failed:
                cause = f"{failed.operation} {failed.path}: {errno_text(failed.errno or 0)}"
                text = f"failed to remove worktree: {trim(error.output)}; manual cleanup also failed: {cause}"
                return {"success": False, "error": text}
        if branch:
            self._succeeds(repo, "branch", "-D", branch)
        return SUCCESS

    def _own_worktree(self, repo: str, path: str) -> tuple[str, str]:
        """Returns the full path of a worktree, and why it must not be removed unless it may be."""
        try:
            listed = self._run(repo, "worktree", "list", "--porcelain", "-z")
        except GitError as error:
            return path, f"git worktree list failed: {error}"
        wanted = resolved(os.path.join(repo, path))
        for record in listed.split("\0\0")[1:]:  # the first one is the main working tree
            place, *attributes = record.split("\0")
            if place.startswith("worktree ") and resolved(place[9:]) == wanted:
                locked = any(attribute.partition(" ")[0] == "locked" for attribute in attributes)
                return wanted, f"worktree is locked: {quote(path)}" if locked else ""
        return path, f"worktreePath is not a worktree of the repository: {quote(path)}"


def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """Returns what a child prints, None when that does not end in time; of too much, the whole lines at the start."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    output, lost = bytearray(), False
    while poll.poll(_milliseconds(deadline)):
        piece = os.read(descriptor, _READ_BYTES)
        if not piece:
            return bytes(output[: output.rfind(b"\n") + 1] if lost else output)
        lost = lost or len(output) + len(piece) > _OUTPUT_MAX_BYTES
        if not lost:
            output += piece
    return None


def _milliseconds(deadline: float) -> float | None:
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic()) * 1000


def _ends_before(pid: int, deadline: float) -> bool:
    """Waits for the end of a child, which is not reaped; returns whether it came in time."""
    pause = 0.0005
    flags = os.WEXITED | os.WNOWAIT | (0 if deadline == math.inf else os.WNOHANG)
    while os.waitid(os.P_PID, pid, flags) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to a child that is not reaped yet, and to everything in its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # the rest of it has become another user's


def _signal_text(number: int) -> str:
    return (signal.strsignal(number) or f"signal {number}").lower()
