"""The daemon's methods with typed results (docs/remote.md, section "On the wire")."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")

REPEATED = frozenset(
    {
        "server.ping", "server.version", "server.capabilities",
        "files.list", "files.validate", "files.stat", "files.read",
        "git.info", "git.status", "git.list_branches", "process.closeStdin",
    }
)  # fmt: skip
"""Methods that change nothing when they are called twice: after a lost connection they are called once more."""


class Pong(msgspec.Struct):
    """The result of `ping`."""

    pong: bool


class Version(msgspec.Struct):
    """Which daemon it is, and on what."""

    version: str
    platform: str
    arch: str


class Capabilities(msgspec.Struct):
    """What the daemon can do."""

    version: str
    methods: list[str]
    features: list[str]


class Entry(msgspec.Struct, rename="camel"):
    """A name in a directory."""

    name: str
    path: str
    is_dir: bool


class Listing(msgspec.Struct):
    """The entries of a directory."""

    entries: list[Entry]


class Validity(msgspec.Struct, rename="camel"):
    """Whether a path exists; otherwise `error` says why not."""

    valid: bool
    is_dir: bool
    error: str = ""


class Stat(msgspec.Struct, rename="camel"):
    """What a path is; `mode` as `ls -l` writes it, `size` in bytes."""

    exists: bool
    is_dir: bool
    size: int
    mode: str


class Content(msgspec.Struct):
    """The text of a file."""

    content: str
    exists: bool


class Extracted(msgspec.Struct, rename="camel"):
    """How unpacking went; `error` is the reason when it failed."""

    success: bool
    file_count: int
    error: str = ""


class GitInfo(msgspec.Struct, rename="camel"):
    """The repository that a path lies in."""

    is_repo: bool
    repo: str = ""
    branch: str = ""
    root: str = ""
    repo_slug: str = ""
    default_branch: str = ""


class GitStatus(msgspec.Struct, rename="camel"):
    """Changes as `git status --porcelain` prints them."""

    is_repo: bool
    clean: bool = False
    changes: list[str] = []


class Branches(msgspec.Struct, rename="camel"):
    """Local branches."""

    is_repo: bool
    branches: list[str]


class Worktree(msgspec.Struct, rename="camel"):
    """A worktree that was made, or why not."""

    success: bool
    path: str = ""
    error: str = ""
    error_code: str = ""
    source_branch: str = ""


class Done(msgspec.Struct):
    """Whether it was done; `error` is the reason when it failed."""

    success: bool
    error: str = ""


class Spawned(msgspec.Struct, rename="camel"):
    """A process that was started; `start_time` in Unix seconds."""

    success: bool
    pid: int = 0
    start_time: float = 0.0


class Applied(msgspec.Struct):
    """How many bytes of input the process was given so far."""

    success: bool
    applied: int
    duplicate: bool = False


class Killed(msgspec.Struct, rename="camel"):
    """What became of a process that was to end."""

    found: bool
    died: bool
    already_exited: bool = False
    escalated: bool = False


class Reattached(msgspec.Struct, rename="camel"):
    """A process as it is when its output has been moved here."""

    found: bool
    running: bool
    first_seq: int
    last_seq: int
    stdin_applied: int
    pid: int = 0
    start_time: float = 0.0


class Calls:
    """The methods that concern no process. Paths are the daemon's; a leading `~` is its home directory.

    All raise `RemoteError` when the daemon refuses, `ConnectionLostError` when the connection is lost and the call is
    not one that may simply be repeated.
    """

    async def call(self, method: str, params: dict[str, object], kind: type[T], *, again: bool = False) -> T:
        """Returns the result of any method, as `kind`."""
        raise NotImplementedError

    async def ping(self) -> None:
        """Returns once the daemon has answered."""
        await self.call("server.ping", {}, Pong)

    async def version(self) -> Version:
        """Returns which daemon it is."""
        return await self.call("server.version", {}, Version)

    async def capabilities(self) -> Capabilities:
        """Returns what the daemon can do."""
        return await self.call("server.capabilities", {}, Capabilities)

    async def list_files(self, path: str) -> list[Entry]:
        """Returns what is in a directory, without names that begin with a dot."""
        return (await self.call("files.list", {"path": path}, Listing)).entries

    async def validate(self, path: str) -> Validity:
        """Returns whether a path exists."""
        return await self.call("files.validate", {"path": path}, Validity)

    async def stat(self, path: str) -> Stat:
        """Returns what a path is."""
        return await self.call("files.stat", {"path": path}, Stat)

    async def read_file(self, path: str, max_bytes: int = 0) -> Content:
        """Returns the text of a file of at most `max_bytes` bytes, 262,144 for 0."""
        return await self.call("files.read", {"path": path, "maxBytes": max_bytes}, Content)

    async def extract_tar(self, archive: str, directory: str) -> Extracted:
        """Replaces a directory by what a gzipped tar holds, and deletes that."""
        return await self.call("files.extract_tar", {"archivePath": archive, "destDir": directory}, Extracted)

    async def git_info(self, path: str) -> GitInfo:
        """Returns which repository a path lies in."""
        return await self.call("git.info", {"path": path}, GitInfo)

    async def git_status(self, path: str) -> GitStatus:
        """Returns what is changed in a repository."""
        return await self.call("git.status", {"path": path}, GitStatus)

    async def git_branches(self, path: str) -> Branches:
        """Returns the local branches of a repository."""
        return await self.call("git.list_branches", {"path": path}, Branches)

    async def create_worktree(self, repo: str, branch: str, path: str, source: str = "") -> Worktree:
        """Makes a worktree with a new branch that begins at the branch `source`, or where the repository is."""
        params: dict[str, object] = {"baseRepo": repo, "branchName": branch, "worktreePath": path}
        return await self.call("git.worktree_create", params | {"sourceBranch": source}, Worktree)

    async def remove_worktree(self, repo: str, path: str, branch: str = "") -> Done:
        """Removes a worktree, its directory in any case, and the branch if one is named."""
        params: dict[str, object] = {"baseRepo": repo, "worktreePath": path, "branchName": branch}
        return await self.call("git.worktree_remove", params, Done)

    async def feed(self, process_id: str, data: bytes, offset: int | None = None) -> Applied:
        """Gives input to a process; `Process.write` is exact through lost connections, this is one call."""
        params: dict[str, object] = {"id": process_id, "data": data}
        return await self.call("process.stdin", params if offset is None else params | {"offset": offset}, Applied)

    async def kill(self, process_id: str, signal: str = "TERM", *, again: bool = False) -> None:
        """Sends KILL to a process and its group, or INT, HUP or TERM to the process alone.

        Parameters: `again`, whether it is sent once more when the connection was lost before it was confirmed.
        """
        await self.call("process.kill", {"id": process_id, "signal": signal}, Done, again=again)

    async def kill_and_wait(
        self, process_id: str, signal: str = "TERM", *, seconds: float = 3.0, escalate: bool = True
    ) -> Killed:
        """Sends a signal and waits up to `seconds` (30 at most) for the end; then, with `escalate`, sends KILL."""
        wait = max(1, round(seconds * 1000))
        params: dict[str, object] = {"id": process_id, "signal": signal, "timeoutMs": wait, "escalate": escalate}
        return await self.call("process.killAndWait", params, Killed)
