"""Asks a shell a question from a plain script, without asyncio: types a line and reads until the answer ends.

python examples/ask_shell.py 'uname -a'
"""

from __future__ import annotations

import sys

import sterna
from sterna.client import blocking

END = "that-was-it"


def main(line: str) -> None:
    """Prints the answer."""
    with blocking.connect(new=True, argv=["sh"], timeout=10) as session:
        # The quotes keep the echo of what we type from looking like the end of the answer.
        session.write(f"{line}; echo that-'was'-it\r".encode())
        seen = b""
        while f"\n{END}".encode() not in seen:
            seen += session.read(timeout=30)
        print(seen.decode(errors="replace"))
        session.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: ask_shell.py COMMAND-LINE")
    try:
        main(sys.argv[1])
    except sterna.SternaError as error:
        sys.exit(f"ask_shell: {error}")
