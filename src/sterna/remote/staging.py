"""A directory that is prepared beside its place and put there in one step (`-strict`)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from errno import EBUSY, EEXIST, EINVAL, ENOSYS, ENOTDIR, ENOTEMPTY, ENOTSUP
from typing import Final

from sterna.remote.directories import make_directories
from sterna.remote.gotext import bytes_of, text_of
from sterna.remote.removal import RemovalError, remove_all

_AT_FDCWD: Final = -100
_EXCHANGE: Final = 2  # <linux/fs.h>, RENAME_EXCHANGE
_MARK: Final = ".staged-"
_ATTEMPTS: Final = 100

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Staging:
    """An empty directory beside `place`; exactly one of `swap` and `drop` is called in the end.

    It is locked while it is in use, so that one whose daemon was killed can be told from others and is deleted by the
    next one. Raises `OSError`, with `MkdirError` for a directory above it that cannot be made.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        parent, _, name = place.rpartition("/")
        make_directories(parent or "/")
        prefix = f".{text_of(bytes_of(name)[:200])}{_MARK}"
        _sweep(parent or "/", prefix)
        for _ in range(_ATTEMPTS):
            self.path = f"{parent}/{prefix}{os.urandom(8).hex()}"
            self._lock = _locked(bytes_of(self.path))
            if self._lock >= 0:
                return
        raise OSError(EBUSY, os.strerror(EBUSY))

    def swap(self) -> None:
        """Puts the directory at its place and deletes what was there. Raises `OSError`; then the old one is there."""
        staged, place = bytes_of(self.path), bytes_of(self.place)
        while True:
            try:
                _exchange(staged, place)
                break
            except FileNotFoundError:
                try:
                    os.rename(staged, place)
                    break
                except OSError as error:
                    if error.errno not in {ENOTDIR, EEXIST, ENOTEMPTY}:
                        raise  # else somebody has put something there this very moment
            except OSError as error:
                if error.errno not in {EINVAL, ENOSYS, ENOTSUP}:
                    raise
                _move_aside(staged, place)
                break
        self.drop()

    def drop(self) -> None:
        """Deletes what is beside the place: the new directory, or after `swap` the old one, as far as it can be."""
        try:
            remove_all(self.path)
        except RemovalError:
            pass  # the next extraction tries again
        finally:
            os.close(self._lock)


def _locked(path: bytes) -> int:
    """Makes a directory; returns its locked descriptor, -1 when another extraction swept it away before that."""
    os.mkdir(path, 0o700)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1
    except OSError:
        os.rmdir(path)
        raise
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # once it is held nobody else removes it
    try:
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return -1


def _exchange(one: bytes, other: bytes) -> None:
    if not hasattr(_libc, "renameat2"):
        raise OSError(ENOSYS, os.strerror(ENOSYS))
    if _libc.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _EXCHANGE) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _move_aside(staged: bytes, place: bytes) -> None:
    """Swaps in two steps where the file system knows no exchange; the old one goes back when the second one fails."""
    aside = staged + b".old"
    os.rename(place, aside)
    try:
        os.rename(staged, place)
    except OSError:
        os.rename(aside, place)
        raise
    os.rename(aside, staged)


def _sweep(parent: str, prefix: str) -> None:
    """Deletes what extractions into the same place left behind when their daemon was killed."""
    own = re.compile(re.escape(bytes_of(prefix)) + rb"[0-9a-f]{16}")
    try:
        names = os.listdir(bytes_of(parent))
    except OSError:
        return  # one may make directories there without seeing others
    for raw in names:
        if not own.fullmatch(raw):
            continue
        path = os.path.join(bytes_of(parent), raw)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_all(text_of(path))
        except (BlockingIOError, RemovalError):
            pass
        finally:
            os.close(descriptor)
