"""A program for the tests of exactness: waits for a first byte, then sends its stream as text, and ends with status 7.

Usage: exact_speaker.py SEED BYTES. Under a terminal it switches to raw mode first, so that its bytes pass unchanged.
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty

from tests.e2e.exact_duplex import stream

STATUS = 7


def text(seed: str, size: int) -> bytes:
    """Lines of 64 letters that belong to a seed."""
    letters = bytes(97 + value % 26 for value in range(256))
    body = b"".join(stream(seed, size)).translate(letters)
    return b"".join(body[at : at + 64] + b"\r\n" for at in range(0, size, 64))


def main() -> None:
    seed, size = sys.argv[1], int(sys.argv[2])
    with contextlib.suppress(termios.error):
        tty.setraw(0)
    data = memoryview(text(seed, size))
    os.write(1, b"READY\r\n")
    os.read(0, 1)
    while data:
        data = data[os.write(1, data[:65536]) :]
    os.write(1, b"DONE\r\n")
    os.read(0, 1)
    sys.exit(STATUS)


if __name__ == "__main__":
    main()
