"""Logs as JSON, one object on a line, on standard error or in a file."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

from sterna.errors import StorageError

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
