"""Directories reached one name at a time from an open one, so that no link leads out of it."""

from __future__ import annotations

import os


def step(here: int, name: bytes, mode: int) -> int:
    """Returns the descriptor of the directory `name` in the open directory `here`, made with `mode` if it is missing.

    `here` is closed in any case. Raises `OSError`, for a link too, and `ValueError` for a NUL.
    """
    try:
        try:
            os.mkdir(name, mode, dir_fd=here)
        except FileExistsError:
            pass
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
    finally:
        os.close(here)
