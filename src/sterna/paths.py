"""Where things live on the disk, and the only ways in which private files are made, read and locked."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from sterna.errors import StorageError, TrustError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

SYSTEM_SOCKETS = "/run/claw/sockets"
SOCKET_PATH_MAX_BYTES = 107
LOCK_WAIT_MS = 10_000
_LOCK_POLL_MS = 2

_FOREIGN_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FOREIGN_ANY = stat.S_IRWXG | stat.S_IRWXO


def _base(environ: Mapping[str, str], variable: str, fallback: str) -> str:
    """Returns an XDG base directory; a relative value is ignored, as the XDG base directory specification says."""
    value = environ.get(variable, "")
    if value.startswith("/"):
        return value
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        home = os.path.expanduser("~")
    if not home.startswith("/"):
        raise StorageError(f"There is no home directory: set HOME or {variable} to an absolute path.")
    return os.path.join(home, fallback)


def state_path(environ: Mapping[str, str] = os.environ) -> str:
    """Returns where state lives, `$XDG_STATE_HOME/sterna` or `~/.local/state/sterna`, without touching the disk."""
    return os.path.join(_base(environ, "XDG_STATE_HOME", ".local/state"), "sterna")


def config_path(environ: Mapping[str, str] = os.environ) -> str:
    """Returns where configuration lives, `$XDG_CONFIG_HOME/sterna` or `~/.config/sterna`, without touching the disk."""
    return os.path.join(_base(environ, "XDG_CONFIG_HOME", ".config"), "sterna")


def runtime_path(
    state: str | None = None, environ: Mapping[str, str] = os.environ, system: str = SYSTEM_SOCKETS
) -> str:
    """Returns where sockets live, without making it.

    `$XDG_RUNTIME_DIR/sterna` if that base exists and is ours (after `su` it may still name another user's), else
    `system` for root where it exists, else `sockets` in the state directory `state`.
    """
    base = environ.get("XDG_RUNTIME_DIR", "")
    if base.startswith("/"):
        try:
            status = os.stat(base)
        except OSError:
            pass
        else:
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                return os.path.join(base, "sterna")
    if os.geteuid() == 0 and os.path.isdir(system):
        return system
    return os.path.join(state if state is not None else state_path(environ), "sockets")


def state_dir(chosen: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the state directory, `chosen` or the usual one, made and checked by `private_dir`."""
    return private_dir(chosen if chosen is not None else state_path(environ))


def config_dir(chosen: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the configuration directory, `chosen` or the usual one, made and checked by `private_dir`."""
    return private_dir(chosen if chosen is not None else config_path(environ))


def runtime_dir(state: str | None = None, environ: Mapping[str, str] = os.environ, system: str = SYSTEM_SOCKETS) -> str:
    """Returns the directory of sockets, made and checked by `private_dir`.

    The system-wide one belongs to the administrator: it may be sticky and writable, as /tmp is, so that pods of several
    users can put their sockets there; the node checks each socket's owner.
    """
    path = runtime_path(state, environ, system)
    if path != system and state is None and path == os.path.join(state_path(environ), "sockets"):
        state_dir(None, environ)
    return socket_dir(path, system)


def socket_dir(path: str, system: str = SYSTEM_SOCKETS) -> str:
    """Returns a directory of sockets, made and checked by `private_dir` unless it is the system-wide one.

    Raises StorageError if others than its owner could replace what is in it.
    """
    if os.path.abspath(path) != system:
        return private_dir(path)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0:
        raise StorageError(f"{path} is not a directory of root: remove it, or let root make it.")
    if status.st_mode & _FOREIGN_WRITE and not status.st_mode & stat.S_ISVTX:
        raise StorageError(f"{path} is writable by others without the sticky bit: run `chmod +t {path}`.")
    return path


def private_dir(path: str) -> str:
    """Makes a directory with mode 0700 (and its missing parents) if it is absent, and returns its absolute path.

    Raises StorageError if it is a symlink, no directory, another user's, or writable by group or others. Its parents
    are not judged: who may write to them can replace the directory, but not fake its owner.
    """
    # Without this a trailing slash would make lstat follow a symlink.
    path = os.path.abspath(path)
    try:
        _make(path)
        status = os.lstat(path)
    except OSError as error:
        raise StorageError(f"The directory {path} cannot be made or read: {error.strerror}.") from error
    if stat.S_ISLNK(status.st_mode):
        raise StorageError(f"{path} is a symbolic link: name the real directory instead.")
    if not stat.S_ISDIR(status.st_mode):
        raise StorageError(f"{path} is not a directory: move it away, or choose another place.")
    if status.st_uid != os.geteuid():
        raise StorageError(
            f"{path} belongs to user {status.st_uid}, not to user {os.geteuid()} who runs this: choose another place."
        )
    if status.st_mode & _FOREIGN_WRITE:
        raise StorageError(f"{path} can be written to by other users: run `chmod go-w {path}`.")
    return path


def _make(path: str) -> None:
    """Makes a directory and its missing parents, all 0700; os.makedirs would leave the parents' mode to the umask."""
    if os.path.lexists(path):
        return
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        _make(parent)
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
        # The umask may have taken bits of the owner as well.
        os.chmod(path, 0o700)


def socket_path(directory: str, name: str) -> str:
    """Returns the path of a Unix socket, or raises UsageError if it is too long for the kernel (unix(7): 107 bytes)."""
    path = os.path.join(directory, name)
    if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
        raise UsageError(
            f"The socket path {path} is longer than {SOCKET_PATH_MAX_BYTES} bytes: choose a shorter directory or name."
        )
    return path


def atomic_write(path: str, data: bytes, mode: int = 0o600, *, sync: bool = False) -> None:
    """Replaces a file by `data` as a whole: a reader, or a crash, sees the old or the new content, never a part.

    With `sync` it is on the disk when the call returns, else when the kernel writes it. Raises StorageError.
    """
    directory, base = os.path.split(os.path.abspath(path))
    temporary = os.path.join(directory, f".{base[:80]}.{os.getpid()}.{os.urandom(6).hex()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                # The mode given to open() is cut down by the umask.
                os.fchmod(descriptor, mode)
                _write_all(descriptor, data)
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        if sync:
            sync_dir(directory)
    except OSError as error:
        raise StorageError(f"The file {path} cannot be written: {error.strerror}.") from error


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def sync_dir(path: str) -> None:
    """Makes the names in a directory durable (fsync(2) of the directory); raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: str, max_bytes: int, *, follow: bool = False) -> bytes | None:
    """Returns the content of a secret file of at most `max_bytes`, or None if there is no such file.

    Raises TrustError if it is no regular file, another user's, or open to group or others in any way; StorageError if
    it is too large or cannot be read. `follow` allows a symlink, for files that the user named.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        if not follow and stat.S_ISLNK(os.lstat(path).st_mode):
            raise TrustError(f"{path} is a symbolic link: put the file itself there.")
        descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"The file {path} cannot be read: {error.strerror}.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TrustError(f"{path} is not a regular file: move it away.")
        if status.st_uid != os.geteuid():
            raise TrustError(f"{path} belongs to user {status.st_uid}, not to user {os.geteuid()}: it is not trusted.")
        if status.st_mode & _FOREIGN_ANY:
            raise TrustError(f"{path} is open to other users: run `chmod 600 {path}` and think about replacing it.")
        return _read_bounded(descriptor, path, max_bytes)
    except OSError as error:
        raise StorageError(f"The file {path} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def _read_bounded(descriptor: int, path: str, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    # One byte more than allowed tells a file that is too large from one that fits exactly.
    while part := os.read(descriptor, min(max_bytes + 1 - total, 1 << 20)):
        parts.append(part)
        total += len(part)
        if total > max_bytes:
            raise StorageError(f"The file {path} is larger than {max_bytes} bytes: it is not what belongs there.")
    return b"".join(parts)


class locked:  # noqa: N801 - used as a function: `with locked(path):`
    """Holds an exclusive flock(2) on a lock file, made if absent and never removed, for the length of a `with` block.

    `wait_ms` bounds the wait (0: one attempt); then StorageError. The lock goes with the process, however it ends.
    It is held against other processes and against other `locked` blocks of the same one.
    """

    __slots__ = ("_descriptor", "_path", "_wait_ms")

    def __init__(self, path: str, wait_ms: int = LOCK_WAIT_MS) -> None:
        self._path = path
        self._wait_ms = wait_ms
        self._descriptor = -1

    def __enter__(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(self._path, flags, 0o600)
        except OSError as error:
            raise StorageError(f"The lock file {self._path} cannot be opened: {error.strerror}.") from error
        try:
            self._acquire(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _acquire(self, descriptor: int) -> None:
        deadline = time.monotonic_ns() + self._wait_ms * 1_000_000
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic_ns() >= deadline:
                    raise StorageError(
                        f"Another process holds {self._path}: wait for it to end, or choose another state directory."
                    ) from None
                time.sleep(_LOCK_POLL_MS / 1_000)
            except OSError as error:
                raise StorageError(f"{self._path} cannot be locked: {error.strerror}.") from error
            else:
                return

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
