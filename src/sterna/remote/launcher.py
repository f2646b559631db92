"""`-serve` as the user calls it: starts the daemon as a child of its own session and waits until it can be reached."""

from __future__ import annotations

import os
import socket
import stat
import sys
import time
from typing import TYPE_CHECKING, Final

from sterna.limits import REMOTE_DIAL_SECONDS, REMOTE_START_POLL_MS, REMOTE_START_SECONDS
from sterna.remote.directories import make_directories, remove
from sterna.remote.environment import DAEMON_MARK, LOCK_PIPE, TOKEN_PIPE, own_environment
from sterna.remote.failure import StartError
from sterna.remote.token import read_descriptor

if TYPE_CHECKING:
    from collections.abc import Callable

    from sterna.remote.flags import Flags

LOG_NAME: Final = "remote-server.log"
TOKEN_FD: Final = 3


def launch(flags: Flags, path: str) -> None:
    """Starts the daemon that listens at `path`. Raises `StartError` when it does not within ten seconds."""
    token = read_descriptor(flags.ints["token-fd"]) if flags.ints["token-fd"] >= 0 else None
    directory = os.path.dirname(path) or "."
    try:
        make_directories(directory)
    except (OSError, ValueError):
        pass
    lock = -1
    if flags.bools["strict"]:
        from sterna.remote.strict import lock as take_lock

        lock = take_lock(path)  # held until the daemon has it: of two starts at once one gives up
    _start(_log_file(directory), token, lock)
    deadline = time.monotonic() + REMOTE_START_SECONDS
    while not _exists(path):
        if time.monotonic() > deadline:
            raise StartError(f"timeout waiting for daemon to accept on {path}")
        time.sleep(REMOTE_START_POLL_MS / 1000)
    _dial(path)


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


def _start(log: int, token: bytes | None, lock: int) -> None:
    """Starts this program once more, with the mark that makes it the daemon."""
    entries = dict(entry.partition(b"=")[::2] for entry in own_environment() if not entry.startswith(b"="))
    entries[DAEMON_MARK.encode()] = b"1"
    source, sink = os.pipe() if token is not None else (-1, -1)
    if token is not None:
        entries[TOKEN_PIPE.encode()] = str(TOKEN_FD).encode()
    if lock >= 0:
        entries[LOCK_PIPE.encode()] = b"%d" % lock
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        try:
            if lock >= 0:
                os.set_inheritable(lock, True)
            _become(log, source, entries)
        finally:
            os._exit(1)
    if token is not None:
        os.close(source)
        _feed(sink, token)


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
