"""What a new worktree gets besides its commit: local settings and the files that the user listed."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_SETTINGS = b".claude"
_COPY_BYTES = 1024 * 1024


def seed(repo: bytes, worktree: bytes, listed: Sequence[bytes]) -> None:
    """Copies the settings directory and `listed` files, best effort: whatever cannot be copied is left out.

    Parameters: `listed`, paths below `repo`; those that are no regular files are skipped.
    """
    _copy_tree(os.path.join(repo, _SETTINGS), os.path.join(worktree, _SETTINGS))
    for name in listed:
        if name and not name.startswith(b"/") and b".." not in name.split(b"/"):
            _copy_file(os.path.join(repo, name), os.path.join(worktree, name))


def _copy_tree(source: bytes, target: bytes) -> None:
    """Copies a directory with what is in it, links left out."""
    if os.path.islink(source):
        return
    for directory, folders, files in os.walk(source):
        here = os.path.join(target, os.path.relpath(directory, source))
        for name in folders:
            if not os.path.islink(os.path.join(directory, name)):
                _make(os.path.join(here, name))
        for name in files:
            _copy_file(os.path.join(directory, name), os.path.join(here, name))


def _make(path: bytes) -> None:
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    except OSError:
        pass


def _copy_file(source: bytes, target: bytes) -> None:
    _make(os.path.dirname(target))
    try:
        # O_NONBLOCK: what was a file a moment ago may be a pipe now
        reader = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        if stat.S_ISREG(os.fstat(reader).st_mode):
            _copy(reader, target)
    finally:
        os.close(reader)


def _copy(reader: int, target: bytes) -> None:
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    except OSError:
        return
    try:
        while os.sendfile(writer, reader, None, _COPY_BYTES):
            pass
    except OSError:
        pass
    finally:
        os.close(writer)
