"""`-serve` as the user calls it: starts the daemon as a child of its own session and waits until it can be reached."""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
import time
from typing import TYPE_CHECKING, Final

from sterna.limits import REMOTE_DIAL_SECONDS, REMOTE_START_POLL_MS, REMOTE_START_SECONDS
from sterna.remote.directories import make_directories, remove
from sterna.remote.environment import DAEMON_MARK, LOCK_PIPE, TOKEN_PIPE, own_environment
from sterna.remote.failure import StartError
from sterna.remote.token import checked, content, read_descriptor

if TYPE_CHECKING:
    from collections.abc import Callable

    from sterna.remote.flags import Flags

LOG_NAME: Final = "remote-server.log"
TOKEN_FD: Final = 3
_OURS: Final = ("durable", "extensions", "strict")  # with any of these the start may say more than the contract's
_LOG_END_BYTES: Final = 4096
_PATH_MAX_BYTES: Final = 107  # unix(7), sun_path


def launch(flags: Flags, path: str) -> None:
    """Starts the daemon that listens at `path`. Raises `StartError` when it does not within ten seconds."""
    token = read_descriptor(flags.ints["token-fd"]) if flags.ints["token-fd"] >= 0 else None
    telling = any(flags.bools[name] for name in _OURS)
    if telling:
        _check(flags, token, path)
    directory = os.path.dirname(path) or "."
    try:
        make_directories(directory)
    except (OSError, ValueError):
        pass
    lock = -1
    if flags.bools["strict"]:
        from sterna.remote.strict import lock as take_lock

        lock = take_lock(path)  # held until the daemon has it: of two starts at once one gives up
    log = _log_file(directory)
    child = _start(log, token, lock)
    if telling:
        _await(child, path, os.path.join(directory, LOG_NAME) if log >= 0 else "")
        return
    deadline = time.monotonic() + REMOTE_START_SECONDS
    while not _exists(path):
        if time.monotonic() > deadline:
            raise StartError(f"timeout waiting for daemon to accept on {path}")
        time.sleep(REMOTE_START_POLL_MS / 1000)
    _dial(path)


def _check(flags: Flags, token: bytes | None, path: str) -> None:
    """Looks at the token and the socket's path before anything is touched. Raises `StartError`."""
    if (size := len(os.fsencode(path))) > _PATH_MAX_BYTES:
        raise StartError(f"the path of the socket has {size} bytes of {_PATH_MAX_BYTES}: choose a shorter -socket")
    name = flags.texts["token-file"]
    if token is not None:
        checked(token)
    elif not name:
        raise StartError("there is no token: pass -token-file FILE or -token-fd N")
    elif not _exists(name) or _exists(name, stat.S_ISREG):  # a pipe can be read only once
        checked(content(name))


def _await(child: int, path: str, log: str) -> None:
    """Returns when the child, and no other daemon, listens at `path`. Raises `StartError` with its last words."""
    deadline = time.monotonic() + REMOTE_START_SECONDS
    while _listener(path) != child:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise StartError(f"the daemon ended at its start: {_last_words(log)}")
        if time.monotonic() > deadline:
            raise StartError(f"timeout waiting for daemon to accept on {path}: {_last_words(log)}")
        time.sleep(REMOTE_START_POLL_MS / 1000)


def _listener(path: str) -> int:
    """Returns the process that listens at `path`, 0 when none does. Source: unix(7), SO_PEERCRED."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
            peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        except (OSError, ValueError):
            return 0
    return int(struct.unpack("iII", peer)[0])


def _last_words(log: str) -> str:
    if not log:
        return "what it said is above"
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        lines = []
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing").removeprefix("claustrum: ")
    return f"{last} (the log is {log})"


def _dial(path: str) -> None:
    """Connects once and hangs up.

    A socket appears a moment before it can be reached, or was left behind: that moment is waited for.
    """
    deadline = time.monotonic() + REMOTE_DIAL_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
                return
            except (ConnectionRefusedError, FileNotFoundError):
                if time.monotonic() > deadline or (_exists(path) and not _exists(path, stat.S_ISSOCK)):
                    return
            except OSError:
                return
        time.sleep(REMOTE_START_POLL_MS / 1000)


def _exists(path: str, wanted: Callable[[int], bool] = bool) -> bool:
    """Returns whether there is something at `path`, and whether its mode is `wanted`."""
    try:
        return wanted(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _log_file(directory: str) -> int:
    """Returns the descriptor of a new log, -1 when there can be none: a file of somebody else is never written to."""
    name = os.path.join(directory, LOG_NAME)
    remove(name)
    try:
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    except OSError:
        return -1


def _start(log: int, token: bytes | None, lock: int) -> int:
    """Starts this program once more, with the mark that makes it the daemon; returns its process id."""
    entries = dict(entry.partition(b"=")[::2] for entry in own_environment() if not entry.startswith(b"="))
    entries[DAEMON_MARK.encode()] = b"1"
    source, sink = os.pipe() if token is not None else (-1, -1)
    if token is not None:
        entries[TOKEN_PIPE.encode()] = str(TOKEN_FD).encode()
    if lock >= 0:
        entries[LOCK_PIPE.encode()] = b"%d" % lock
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            if lock >= 0:
                os.set_inheritable(lock, True)
            _become(log, source, entries)
        finally:
            os._exit(1)
    if token is not None:
        os.close(source)
        _feed(sink, token)
    return child


def _become(log: int, source: int, entries: dict[bytes, bytes]) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if log >= 0:
        os.dup2(log, 1)
        os.dup2(log, 2)
    if source >= 0:
        if source == TOKEN_FD:
            os.set_inheritable(source, True)
        else:
            os.dup2(source, TOKEN_FD)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], entries)  # noqa: S606 # itself, no shell needed


def _feed(sink: int, token: bytes) -> None:
    view = memoryview(token)
    try:
        while view:
            view = view[os.write(sink, view) :]
    except OSError:
        pass  # the daemon ended; waiting for its socket says so
    os.close(sink)
