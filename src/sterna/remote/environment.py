"""The environment that children see, and how their command is found (os/exec)."""

from __future__ import annotations

import os
import stat
from errno import EINVAL, ENOENT, EPERM
from typing import TYPE_CHECKING

from sterna.remote.gotext import bytes_of, errno_text, join, number_of, quote, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DAEMON_MARK = "CLAUSTRUM_DAEMON_CHILD"
TOKEN_PIPE = "CLAUSTRUM_TOKEN_PIPE"  # noqa: S105 # a variable's name, no token
LOCK_PIPE = "CLAUSTRUM_LOCK"
_CHILD_MARK = b"CLAUDE_SSH_DAEMON_CHILD=1"
_OURS = (b"CLAUDE_RPC_TOKEN=", *(name.encode() + b"=" for name in (DAEMON_MARK, TOKEN_PIPE, LOCK_PIPE)))


def own_environment() -> list[bytes]:
    """Returns the entries this process was started with, without those that are only for it.

    They are read from the system: at its start Python may set LC_CTYPE, which children must not see.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = [entry for entry in file.read().split(b"\0") if entry]
    except OSError:
        entries = [name + b"=" + value for name, value in os.environb.items()]
    return [entry for entry in entries if not entry.startswith(_OURS)]


def child_environment(own: Sequence[bytes], login_path: bytes, extra: Mapping[str, str]) -> list[bytes]:
    """Returns the entries of a child: the daemon's, the login shell's PATH if it is known, then those of the request.

    Raises `ValueError` with the contract's text when there is a NUL in one.
    """
    merged: dict[bytes, bytes] = {}
    entries = [*own, _CHILD_MARK]
    if login_path:
        entries.append(b"PATH=" + login_path)
    entries += [bytes_of(f"{name}={value}") for name, value in extra.items()]
    for entry in entries:
        if b"\0" in entry:
            raise ValueError("exec: environment variable contains NUL")
        name = entry[: entry.find(b"=", 0)] if b"=" in entry else entry
        merged.pop(name, None)
        merged[name] = entry
    return list(merged.values())


def find_command(command: str, path: str) -> str:
    """Returns the path of an executable: `command` itself if it has a slash, else the first one in `path`.

    Raises `LookupError` with the contract's text. Source: os/exec, Command and LookPath.
    """
    if command == "/":
        raise LookupError(f"exec: {quote(command)}: is a directory")
    if "/" in command:
        return command
    for directory in path.split(":") if path else []:
        found = join(directory or ".", command)
        if not _cannot_run(found):
            if not found.startswith("/"):
                raise LookupError(f"exec: {quote(command)}: cannot run executable found relative to current directory")
            return found
    raise LookupError(f"exec: {quote(command)}: executable file not found in $PATH")


def _cannot_run(path: str) -> int:
    """Returns 0 for a file that may be executed, else an error number."""
    try:
        mode = os.stat(bytes_of(path)).st_mode
        if stat.S_ISDIR(mode):
            return EINVAL
        return 0 if os.access(bytes_of(path), os.X_OK, effective_ids=True) else EPERM
    except (OSError, ValueError):
        return ENOENT


def check_directory(path: str) -> None:
    """Raises `LookupError` with the contract's text when `path` is no directory."""
    try:
        mode = os.stat(bytes_of(path)).st_mode
    except (OSError, ValueError) as error:
        raise LookupError(f"chdir {path}: stat {path}: {errno_text(number_of(error))}") from error
    if not stat.S_ISDIR(mode):
        raise LookupError(f"chdir {path}: not a directory")


def search_path(own: Sequence[bytes]) -> str:
    """Returns PATH out of the entries of an environment."""
    return next((text_of(entry[5:]) for entry in reversed(own) if entry.startswith(b"PATH=")), "")
