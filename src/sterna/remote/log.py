"""Log lines on standard error, in the format that readers of the log know."""

from __future__ import annotations

import os
import time
from typing import Final

DEBUG, INFO, WARN, ERROR = range(4)

_TAGS: Final = ("DEBUG", "INFO ", "WARN ", "ERROR")
_NAMES: Final = {"debug": DEBUG, "info": INFO, "warn": WARN, "warning": WARN, "error": ERROR}


class Log:
    """Writes lines of `level` and above to a descriptor; a full disk costs lines, never the daemon."""

    def __init__(self, level: str = "debug", descriptor: int = 2) -> None:
        self.level = _NAMES.get(level.lower(), DEBUG)
        self._descriptor = descriptor

    def debug(self, text: str) -> None:
        """Writes a line of level debug."""
        if self.level == DEBUG:
            self._write(DEBUG, text)

    def info(self, text: str) -> None:
        """Writes a line of level info."""
        if self.level <= INFO:
            self._write(INFO, text)

    def warn(self, text: str) -> None:
        """Writes a line of level warn."""
        if self.level <= WARN:
            self._write(WARN, text)

    def error(self, text: str) -> None:
        """Writes a line of level error."""
        self._write(ERROR, text)

    def plain(self, text: str) -> None:
        """Writes `text` as a line of its own, without time and level."""
        self._put(text)

    def _write(self, level: int, text: str) -> None:
        self._put(f"{time.strftime('%Y/%m/%d %H:%M:%S')} {_TAGS[level]} {text}")

    def _put(self, line: str) -> None:
        try:
            os.write(self._descriptor, line.encode("utf-8", "surrogateescape") + b"\n")
        except OSError:
            pass
