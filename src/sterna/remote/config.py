"""`claustrum.conf` beside the executable: defaults for flags that were not given."""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final

from sterna.limits import REMOTE_CONFIG_MAX_BYTES
from sterna.remote.flags import duration, integer

if TYPE_CHECKING:
    from sterna.remote.flags import Flags

NAME: Final = "claustrum.conf"

_TRUE: Final = frozenset({"true", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "0", "no", "off"})
_BOOLS: Final = frozenset(
    {"keep-children", "listen-pipe", "files-read-regular-only", "durable", "strict", "extensions"}
)
_SIZES: Final = frozenset({"max-extract-bytes", "max-cli-bytes"})
_TIMES: Final = frozenset({"git-timeout", "cli-probe-timeout", "cli-download-timeout", "libc-probe-timeout"})
_PRINTABLE: Final = re.compile(r"[\x20-\x7e]+")
_SHA: Final = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")


def read(path: str) -> list[tuple[str, str]]:
    """Returns the lines of a file, keys in small letters; none unless it is a regular file and no link to one."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return []
        with open(path, "rb") as file:
            text = file.read(REMOTE_CONFIG_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    settings = []
    for line in text.split("\n"):
        key, equals, value = line.partition("=")
        if equals and not key.lstrip().startswith("#"):
            settings.append((key.strip().lower(), value.strip()))
    return settings


def apply(settings: list[tuple[str, str]], flags: Flags) -> str:
    """Sets the flags that were not given; whatever is unknown or invalid is ignored, of the rest the last one counts.

    Returns the version override.
    """
    override = ""
    for key, value in settings:
        if key == "version-override":
            override = value.lower() if _SHA.fullmatch(value) else override
        elif key in flags.given:
            continue
        elif key in _BOOLS:
            if value.lower() in _TRUE | _FALSE:
                flags.bools[key] = value.lower() in _TRUE
        elif key == "metrics-addr":
            if _PRINTABLE.fullmatch(value):
                flags.texts[key] = value
        elif key in _SIZES | _TIMES:
            try:
                number = duration(value) if key in _TIMES else integer(value)
            except ValueError:
                continue
            if number >= 0:
                flags.ints[key] = number
    return override
