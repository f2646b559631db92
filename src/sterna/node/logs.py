"""Logs as JSON, one object on a line, on standard error or in a file."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

from sterna.errors import StorageError
from sterna.units import SECOND

_PLAIN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes time, level, logger, message and the fields given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns one line."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update((k, v) for k, v in vars(record).items() if k not in _PLAIN)
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class Brake:
    """Lets `burst` lines through at once and then `per_second`; what it holds back is counted in `left_out`.

    Whoever can cause lines could fill the disk with them otherwise.
    """

    __slots__ = ("_burst", "_left", "_per_second", "_since", "left_out")

    def __init__(self, burst: int, per_second: int) -> None:
        self._burst = float(burst)
        self._per_second = per_second
        self._left = self._burst
        self._since = 0
        self.left_out = 0

    def admits(self, now: int) -> bool:
        """Tells whether a line may be written; `now` in monotonic nanoseconds."""
        left = min(self._left + (now - self._since) / SECOND * self._per_second, self._burst)
        self._since = now
        self._left = left - 1 if left >= 1 else left
        return left >= 1

    def fields(self) -> dict[str, object]:
        """Returns what a line that is written says about those that were left out since the last one."""
        left_out, self.left_out = self.left_out, 0
        return {"left_out": left_out} if left_out else {}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def configure(level: str, path: str | None = None) -> None:
    """Sends logs of this level (debug, info, warning, error) and above to standard error, or to the end of a file.

    Raises StorageError if the file cannot be written.
    """
    try:
        # Closed with the process: the log is written to its very end.
        stream = sys.stderr if path is None else open(path, "a", encoding="utf-8", opener=_private)  # noqa: SIM115 -- see above
    except OSError as error:
        raise StorageError(f"The log {path} cannot be written: {error.strerror}.") from None
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
