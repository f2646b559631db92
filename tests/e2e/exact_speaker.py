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
READY, DONE = b"READY\r\n", b"DONE\r\n"
HEADER = b"\x1b[2J\x1b[1;1HTHE HEADER STAYS\x1b[2;24r\x1b[24;1H"
"""Drawn once, at the top; the text scrolls below it, so that who missed it and sees only text has a wrong screen."""


def text(seed: str, size: int) -> bytes:
    """Lines of 64 letters that belong to a seed."""
    letters = bytes(97 + value % 26 for value in range(256))
    body = b"".join(stream(seed, size)).translate(letters)
    return b"".join(body[at : at + 64] + b"\r\n" for at in range(0, size, 64))


def speech(seed: str, size: int) -> bytes:
    """What is said between READY and DONE: the header comes in the middle."""
    body = text(seed, size)
    half = len(body) // 2
    return body[:half] + HEADER + body[half:]


def main() -> None:
    seed, size = sys.argv[1], int(sys.argv[2])
    with contextlib.suppress(termios.error):
        tty.setraw(0)
    data = memoryview(speech(seed, size))
    os.write(1, READY)
    os.read(0, 1)
    while data:
        data = data[os.write(1, data[:65536]) :]
    os.write(1, DONE)
    os.read(0, 1)
    sys.exit(STATUS)


if __name__ == "__main__":
    main()
