"""Commands as the user can type them from here."""

from __future__ import annotations

import os
import shlex
import sys


def program() -> list[str]:
    """Returns the words by which `sterna` can be called from here, also where it is not in the PATH."""
    if any(os.access(os.path.join(directory, "sterna"), os.X_OK) for directory in os.get_exec_path()):
        return ["sterna"]
    own = sys.argv[0]
    return [own] if os.path.basename(own) == "sterna" else [sys.executable, "-m", "sterna"]


def in_state(state: str | None) -> list[str]:
    """Returns the words that name a state directory which the user chose; without them a command means another node."""
    return [] if state is None else ["--state", os.path.abspath(state)]


def spoken(*words: str, state: str | None) -> str:
    """Returns a command as the user can type it from here, for the same node."""
    return shlex.join([*program(), *words, *in_state(state)])
