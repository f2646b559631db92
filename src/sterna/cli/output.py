"""What commands print: a table on a terminal, plain lines in a pipe, JSON when asked."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from sterna.cli.duration import in_words
from sterna.ids import clean_label

_CELL_MAX_CHARS = 200


def print_json(value: object) -> None:
    """Prints a value as JSON, indented on a terminal."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows: as a table on a terminal, else one line per row, fields separated by tabs, without headers.

    Whatever came from a node loses control characters.
    """
    cells = [[clean_label(str(cell), _CELL_MAX_CHARS) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            print("\t".join(row))
        return
    # Imported here: rich takes 60 ms, and a pipe does not need it.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, no_wrap=header == headers[0])
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Prints `name: value` lines, aligned on a terminal."""
    pairs = [(name, clean_label(str(value), _CELL_MAX_CHARS)) for name, value in fields]
    width = max((len(name) for name, _ in pairs), default=0) + 1 if sys.stdout.isatty() else 0
    for name, value in pairs:
        print(f"{name + ':':<{width}} {value}")


def when(seconds: int) -> str:
    """Returns a time (Unix seconds): how long ago on a terminal, else in ISO 8601 (UTC)."""
    if sys.stdout.isatty():
        return in_words(int(max(time.time() - seconds, 0))) + " ago"
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def until(seconds: int) -> str:
    """Returns a time to come (Unix seconds): in how long on a terminal, else in ISO 8601 (UTC)."""
    return "in " + in_words(int(max(seconds - time.time(), 0))) if sys.stdout.isatty() else when(seconds)


def ending(session: dict[str, Any]) -> str:
    """Returns how a session's program ended, "" while it runs."""
    if session["signal"] is not None:
        return f"signal {session['signal']}"
    if session["status"] is not None:
        return f"exit {session['status']}"
    return str(session["reason"])
