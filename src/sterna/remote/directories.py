"""Directories made together with those above them, and the removal of one name."""

from __future__ import annotations

import os
import stat
from errno import ENOTDIR

from sterna.remote.gotext import bytes_of, errno_text


class MkdirError(OSError):
    """A directory could not be made; the text names the one that it failed at (os.MkdirAll)."""

    def __init__(self, path: str, number: int) -> None:
        super().__init__(f"mkdir {path}: {errno_text(number)}")


def make_directories(path: str, mode: int = 0o700) -> None:
    """Makes a directory and all that are missing above it, every one with `mode`. Raises `MkdirError`, `ValueError`."""
    missing: list[str] = []
    here = path
    while here:
        try:
            status = os.stat(bytes_of(here))
        except OSError:
            missing.append(here)
            here = here.rstrip("/").rpartition("/")[0]
            continue
        if not stat.S_ISDIR(status.st_mode):
            raise MkdirError(here, ENOTDIR)
        break
    for name in reversed(missing):
        try:
            os.mkdir(bytes_of(name), mode)
        except FileExistsError:
            pass
        except OSError as error:
            raise MkdirError(name, error.errno or 0) from error


def remove(path: str) -> bool:
    """Deletes one name, a file or an empty directory; returns whether it is gone (os.Remove)."""
    for attempt in (os.unlink, os.rmdir):
        try:
            attempt(bytes_of(path))
        except FileNotFoundError:
            pass
        except (OSError, ValueError):
            continue
        return True
    return False


def socket_identity(path: str) -> tuple[int, int] | None:
    """Returns what tells the socket at `path` from every other one, None when there is none."""
    try:
        status = os.lstat(bytes_of(path))
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None
