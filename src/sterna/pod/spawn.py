"""Starts a process with posix_spawn(3): no fork of the daemon's memory, no code of ours between fork and exec.

CPython's own os.posix_spawn cannot change the directory or close inherited descriptors, and os.fork copies the page
tables of the whole daemon and is not safe beside threads, so the C library's function is called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import stat
from typing import TYPE_CHECKING

from sterna.errors import AgentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SETSIGDEF = 0x04
_SETSIGMASK = 0x08
_SETSID = 0x80
# glibc and musl need at most 336 (attributes), 80 (actions) and 128 (signal set) bytes for these opaque types.
_OPAQUE_BYTES = 512
_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"


class _Libc:
    """The C library's functions, looked up once; calls that report by return value raise OSError."""

    __slots__ = ("handle",)

    def __init__(self) -> None:
        self.handle = ctypes.CDLL(None)

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function that returns 0 or an errno."""
        code = getattr(self.handle, name)(*arguments)
        if code:
            raise OSError(code, os.strerror(code))

    def has(self, name: str) -> bool:
        """Says whether this C library has the function."""
        return hasattr(self.handle, name)


@functools.cache
def _library() -> _Libc:
    return _Libc()


def find_command(argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> str:
    """Returns the path of argv[0] as execvp(3) would find it with the program's own PATH and directory.

    Raises AgentError that names what is wrong: the directory, the command, or its permissions.
    """
    if not os.path.isdir(cwd):
        raise AgentError(f"The directory {cwd!r} does not exist: start the session with another --cwd.")
    if not os.access(cwd, os.X_OK):
        raise AgentError(f"The directory {cwd!r} may not be entered: start the session with another --cwd.")
    name = argv[0]
    folders = [""] if "/" in name else env.get("PATH", _DEFAULT_PATH).split(":")
    denied = ""
    for folder in folders:
        path = os.path.join(cwd, folder, name)
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(path, os.X_OK):
            return path
        denied = path
    if denied:
        raise AgentError(f"{denied!r} cannot be executed: it is no program or its permissions forbid it.")
    raise AgentError(f"The command {name!r} was not found: check its spelling and PATH.")


def check_command(argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> None:
    """Raises AgentError if there is no such command; sessions may run elsewhere, so `cwd` need not be there."""
    find_command(argv, cwd if os.access(cwd, os.X_OK) else "/", env)


def spawn(
    path: str,
    argv: Sequence[str],
    *,
    cwd: str,
    env: Mapping[str, str],
    terminal: str | None = None,
    descriptors: tuple[int, int, int] | None = None,
) -> int:
    """Starts `path` as leader of an own session and process group and returns its process id.

    `terminal` is the path of a PTY's slave, which becomes descriptors 0 to 2 and the controlling terminal;
    `descriptors` are what becomes 0, 1 and 2 otherwise. All other descriptors are closed, all signals are unblocked
    and have their default dispositions. Raises OSError if the program could not be executed; then nothing is left.
    Source: posix_spawn(3).
    """
    libc = _library()
    actions = ctypes.create_string_buffer(_OPAQUE_BYTES)
    attributes = ctypes.create_string_buffer(_OPAQUE_BYTES)
    libc.call("posix_spawn_file_actions_init", actions)
    try:
        libc.call("posix_spawnattr_init", attributes)
        try:
            _set_attributes(libc, attributes)
            _set_actions(libc, actions, cwd, terminal, descriptors)
            pid = ctypes.c_int()
            libc.call(
                "posix_spawn",
                ctypes.byref(pid),
                ctypes.c_char_p(os.fsencode(path)),
                actions,
                attributes,
                _strings([os.fsencode(a) for a in argv]),
                _strings([os.fsencode(f"{k}={v}") for k, v in env.items()]),
            )
            return pid.value
        finally:
            libc.call("posix_spawnattr_destroy", attributes)
    finally:
        libc.call("posix_spawn_file_actions_destroy", actions)


def _strings(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(values) + 1))(*values, None)


def _set_attributes(libc: _Libc, attributes: ctypes.Array[ctypes.c_char]) -> None:
    signals = ctypes.create_string_buffer(_OPAQUE_BYTES)
    libc.handle.sigemptyset(signals)
    libc.call("posix_spawnattr_setsigmask", attributes, signals)
    libc.handle.sigfillset(signals)
    libc.call("posix_spawnattr_setsigdefault", attributes, signals)
    libc.call("posix_spawnattr_setflags", attributes, ctypes.c_short(_SETSID | _SETSIGMASK | _SETSIGDEF))


def _set_actions(
    libc: _Libc,
    actions: ctypes.Array[ctypes.c_char],
    cwd: str,
    terminal: str | None,
    descriptors: tuple[int, int, int] | None,
) -> None:
    """Lists what happens between fork and exec, in order."""
    if terminal is not None:
        # A session leader without a terminal gets the one it opens (no O_NOCTTY): tty(4), proc(5).
        libc.call("posix_spawn_file_actions_addopen", actions, 0, ctypes.c_char_p(os.fsencode(terminal)), os.O_RDWR, 0)
        libc.call("posix_spawn_file_actions_adddup2", actions, 0, 1)
        libc.call("posix_spawn_file_actions_adddup2", actions, 0, 2)
    elif descriptors is not None:
        for target, source in enumerate(descriptors):
            # Equal numbers are fine: dup2 then only clears close-on-exec.
            libc.call("posix_spawn_file_actions_adddup2", actions, source, target)
    libc.call("posix_spawn_file_actions_addchdir_np", actions, ctypes.c_char_p(os.fsencode(cwd)))
    if libc.has("posix_spawn_file_actions_addclosefrom_np"):
        libc.call("posix_spawn_file_actions_addclosefrom_np", actions, 3)
        return
    # An older C library: Python's descriptors close themselves, inherited ones are named one by one.
    for entry in os.listdir("/proc/self/fd"):
        number = int(entry)
        if number > 2:
            try:
                inherited = os.get_inheritable(number)
            except OSError:
                continue
            if inherited:
                libc.call("posix_spawn_file_actions_addclose", actions, number)
