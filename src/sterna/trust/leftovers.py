"""What a process that was killed while it wrote a file left behind: a part of a secret, perhaps all of it."""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import suppress

AGE_SECONDS = 60
"""A file of this age is no longer being written by anybody."""

_NAME = re.compile(r"\..{1,80}\.[0-9]{1,10}\.[0-9a-f]{12}\.tmp", re.DOTALL)


def remove_leftovers(directory: str) -> None:
    """Removes old unfinished files of `paths.atomic_write` from a directory and those directly in it.

    Only this user's regular files that are called so go. What cannot be read or removed stays.
    """
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in _remove(descriptor):
                with suppress(OSError):
                    _enter(descriptor, name)
        finally:
            os.close(descriptor)


def _enter(parent: int, name: str) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        _remove(descriptor)
    finally:
        os.close(descriptor)


def _remove(descriptor: int) -> list[str]:
    """Removes what is left over in an open directory; returns the names of the directories in it."""
    inner: list[str] = []
    with os.scandir(descriptor) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            elif _NAME.fullmatch(entry.name):
                found = entry.stat(follow_symlinks=False)
                old = time.time() - found.st_mtime >= AGE_SECONDS
                if old and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    with suppress(OSError):
                        os.unlink(entry.name, dir_fd=descriptor)
    return inner
