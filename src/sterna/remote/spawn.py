"""Children started by posix_spawn(3), which needs no copy of the daemon's memory map."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from errno import EINVAL
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_SETPGROUP, _SETSIGDEF, _SETSIGMASK, _SETSID = 0x02, 0x04, 0x08, 0x80  # <spawn.h>
_OPAQUE_BYTES = 1024  # more than posix_spawnattr_t, posix_spawn_file_actions_t and sigset_t take in any libc

_libc: Final = ctypes.CDLL(None)


def _attributes(group: int) -> ctypes.Array[ctypes.c_char]:
    """Returns attributes: a process group or session of its own, no blocked signals, ignored ones back to default."""
    attributes, signals = (ctypes.create_string_buffer(_OPAQUE_BYTES) for _ in range(2))
    _libc.posix_spawnattr_init(attributes)
    _libc.posix_spawnattr_setflags(attributes, ctypes.c_short(group | _SETSIGDEF | _SETSIGMASK))
    _libc.posix_spawnattr_setpgroup(attributes, 0)
    _libc.sigemptyset(signals)
    _libc.posix_spawnattr_setsigmask(attributes, signals)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        _libc.sigaddset(signals, int(number))
    _libc.posix_spawnattr_setsigdefault(attributes, signals)
    return attributes


_ATTRIBUTES: Final = _attributes(_SETPGROUP)
_ROOM: Final = 256  # descriptors that workers may be opening
_SOFT_LIMIT: Final = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def descriptor_limit() -> int:
    """Returns how many descriptors this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_descriptor_limit() -> None:
    """Lets the daemon open as many descriptors as it may.

    Children start with the limit that it was given, unless the daemon has about as many open.
    """
    _limit_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _limit_descriptors(soft: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (OSError, ValueError):
        pass  # somebody has lowered the hard limit


def spawn(
    executable: bytes,
    argv: Sequence[bytes],
    env: Sequence[bytes],
    cwd: bytes,
    streams: tuple[int, int, int],
    terminal: bytes = b"",
    *,
    session: bool = False,
) -> int:
    """Returns the process id of a new child in a process group of its own, or in a `session` of its own.

    Parameters: `executable`, a path, relative ones seen from `cwd`; `env`, entries `NAME=value`; `cwd`, empty for the
    daemon's own; `streams`, descriptors above 2 that become 0, 1 and 2. Every other descriptor must be close-on-exec.
    With `terminal`, a device's path, the child has a session of its own and opens that in place of `streams`.

    Raises `OSError` with the number of the step that failed, `EINVAL` for a NUL byte. Source: posix_spawn(3).
    """
    if b"\0" in executable or b"\0" in cwd or any(b"\0" in word for word in argv):
        raise OSError(EINVAL, os.strerror(EINVAL))
    actions = ctypes.create_string_buffer(_OPAQUE_BYTES)
    _libc.posix_spawn_file_actions_init(actions)
    try:
        if cwd:
            _libc.posix_spawn_file_actions_addchdir_np(actions, cwd)
        if terminal:  # opening it makes it the controlling one of the new session, which has none
            _libc.posix_spawn_file_actions_addopen(actions, 0, terminal, os.O_RDWR, 0)
        for target, descriptor in enumerate((0, 0, 0) if terminal else streams):
            if descriptor != target:
                _libc.posix_spawn_file_actions_adddup2(actions, descriptor, target)
        pid, words, entries = ctypes.c_int(), _strings(argv), _strings(env)
        attributes = _attributes(_SETSID) if terminal or session else _ATTRIBUTES
        raised = descriptor_limit()
        if max(streams) + _ROOM < _SOFT_LIMIT:  # else other threads would find no descriptors in that moment
            _limit_descriptors(_SOFT_LIMIT)
        try:
            number = _libc.posix_spawn(ctypes.byref(pid), executable, actions, attributes, words, entries)
        finally:
            _limit_descriptors(raised)
    finally:
        _libc.posix_spawn_file_actions_destroy(actions)
    if number:
        raise OSError(number, os.strerror(number))
    return pid.value


def spawn_followed(
    executable: bytes,
    argv: Sequence[bytes],
    env: Sequence[bytes],
    cwd: bytes,
    streams: tuple[int, int, int],
    terminal: bytes = b"",
) -> tuple[int, int]:
    """Returns the process id of a new child and a descriptor of it; without one (`OSError`) there is no child either.

    Parameters and errors: see `spawn`. Source: pidfd_open(2).
    """
    pid = spawn(executable, argv, env, cwd, streams, terminal)
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _strings(words: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(words) + 1))(*words, None)


def trim_memory() -> None:
    """Gives freed memory back to the system, where the C library can (glibc)."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
