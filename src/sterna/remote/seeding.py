"""What a new worktree gets besides its commit: local settings and the files that the user listed."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from sterna.remote.beneath import step

if TYPE_CHECKING:
    from collections.abc import Sequence

_SETTINGS = b".claude"
_COPY_BYTES = 1024 * 1024


def seed(repo: bytes, worktree: bytes, listed: Sequence[bytes]) -> None:
    """Copies the settings directory and `listed` files, best effort: whatever cannot be copied is left out.

    What the branch holds decides nothing: a link in the worktree is not followed, and what is no regular file stays.

    Parameters: `listed`, paths below `repo`; those that are no regular files are skipped.
    """
    try:
        root = os.open(worktree, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, ValueError):
        return
    try:
        _copy_tree(os.path.join(repo, _SETTINGS), root)
        for name in listed:
            if name and not name.startswith(b"/") and b".." not in name.split(b"/"):
                _copy_file(os.path.join(repo, name), root, name)
    finally:
        os.close(root)


def _copy_tree(source: bytes, root: int) -> None:
    """Copies the settings directory with what is in it, links left out."""
    if os.path.islink(source):
        return
    for directory, folders, files in os.walk(source):
        here = os.path.join(_SETTINGS, os.path.relpath(directory, source))
        for name in folders:
            if not os.path.islink(os.path.join(directory, name)):
                inside = _entered(root, os.path.join(here, name))
                if inside >= 0:
                    os.close(inside)
        for name in files:
            _copy_file(os.path.join(directory, name), root, os.path.join(here, name))


def _entered(root: int, path: bytes) -> int:
    """Returns the descriptor of a directory below an open one, made if it is missing, -1 when there is no way there."""
    try:
        here = os.dup(root)
        for part in path.split(b"/"):
            if part not in {b"", b"."}:
                here = step(here, part, 0o755)
    except OSError:
        return -1
    return here


def _copy_file(source: bytes, root: int, target: bytes) -> None:
    try:
        # O_NONBLOCK: what was a file a moment ago may be a pipe now
        reader = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        if stat.S_ISREG(os.fstat(reader).st_mode):
            above, _, name = target.rpartition(b"/")
            directory = _entered(root, above)
            if directory >= 0:
                _copy(reader, directory, name)
    finally:
        os.close(reader)


def _copy(reader: int, directory: int, name: bytes) -> None:
    """Copies into a file of an open directory, which is closed."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        writer = os.open(name, flags, 0o666, dir_fd=directory)
    except OSError:
        return
    finally:
        os.close(directory)
    try:
        os.ftruncate(writer, 0)  # which fails for all but regular files
        while os.sendfile(writer, reader, None, _COPY_BYTES):
            pass
    except OSError:
        pass
    finally:
        os.close(writer)
