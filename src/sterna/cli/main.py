"""The `sterna` program: what is called, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from sterna import limits
from sterna.cli import attaching
from sterna.errors import SternaError, UsageError
from sterna.ids import clean_label


def main() -> NoReturn:
    """Runs the command line: errors become one sentence on standard error; exit status 0, 1 (failed) or 2 (wrong
    use).
    """
    try:
        status = _run()
    except SternaError as error:
        if os.environ.get("STERNA_DEBUG"):
            raise
        # What a node said was cleaned when it came; this is the last line of defence for the user's terminal.
        lines = (clean_label(line, limits.TEXT_SHOWN_MAX_CHARS) for line in str(error).split("\n"))
        sys.stderr.write("sterna: " + "\n".join(lines) + "\n")
        status = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    sys.exit(status)


def _run() -> int:
    told = attaching.plain(sys.argv[1:])
    if told is not None:
        return attaching.run_plain(told)
    from sterna.cli import commands

    return commands.run()
