"""Log lines on standard error, in the format that readers of the log know."""

from __future__ import annotations

import os
import re
import time
from typing import Final

DEBUG, INFO, WARN, ERROR = range(4)

_TAGS: Final = ("DEBUG", "INFO ", "WARN ", "ERROR")
_NAMES: Final = {"debug": DEBUG, "info": INFO, "warn": WARN, "warning": WARN, "error": ERROR}

_REFUSALS: Final = 1_000  # lines of a flood of refusals
_REFUSALS_PER_SECOND: Final = 10
_CLIPPED: Final = 200  # characters
_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def clipped(text: str) -> str:
    """Returns the beginning of what others chose, if it is longer than anything sensible."""
    return text if len(text) <= _CLIPPED else f"{text[:_CLIPPED]}… ({len(text)} characters)"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class Log:
    """Writes lines of `level` and above to a descriptor; a full disk costs lines, never the daemon."""

    def __init__(self, level: str = "debug", descriptor: int = 2) -> None:
        self.level = _NAMES.get(level.lower(), DEBUG)
        self._descriptor = descriptor
        self._allowed, self._refused, self._unsaid = float(_REFUSALS), 0.0, 0

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

    def refusal(self, text: str) -> None:
        """Writes a line of level warn about somebody who may not; those of a flood are only counted."""
        now = time.monotonic()
        self._allowed = min(_REFUSALS, self._allowed + (now - self._refused) * _REFUSALS_PER_SECOND)
        self._refused = now
        if self._allowed < 1:
            self._unsaid += 1
            return
        self._allowed -= 1
        if self._unsaid:
            self.warn(f"[Server] {self._unsaid} more were refused")
            self._unsaid = 0
        self.warn(text)

    def error(self, text: str) -> None:
        """Writes a line of level error."""
        self._write(ERROR, text)

    def plain(self, text: str) -> None:
        """Writes `text` as a line of its own, without time and level."""
        self._put(text)

    def _write(self, level: int, text: str) -> None:
        if _CONTROLS.search(text):
            text = _CONTROLS.sub(_escaped, text)
        self._put(f"{time.strftime('%Y/%m/%d %H:%M:%S')} {_TAGS[level]} {text}")

    def _put(self, line: str) -> None:
        try:
            os.write(self._descriptor, line.encode("utf-8", "surrogateescape") + b"\n")
        except OSError:
            pass
