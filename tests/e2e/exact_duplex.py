"""A program for a `stream` pod: sends its own deterministic stream while it checks the one that it is sent.

Usage: exact_duplex.py SEED BYTES. Its last line of output says what it read: `read N sha256 HEX wrong POSITION`, where
POSITION is the first byte that differs from what was to come, or -1.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from collections.abc import Iterator

BLOCK_BYTES = 65_536


def stream(seed: str, size: int) -> Iterator[bytes]:
    """The bytes that belong to a seed, in blocks."""
    for start in range(0, size, BLOCK_BYTES):
        yield random.Random(f"{seed}:{start}").randbytes(min(BLOCK_BYTES, size - start))


def first_difference(left: bytes, right: bytes) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class Checker:
    """Compares what comes with a seed's stream."""

    def __init__(self, seed: str, size: int) -> None:
        self._expected = stream(seed, size)
        self._rest = b""
        self._hash = hashlib.sha256()
        self.count = 0
        self.wrong = -1

    def feed(self, data: bytes) -> None:
        self._hash.update(data)
        if self.wrong < 0:
            while len(self._rest) < len(data):
                block = next(self._expected, b"")
                if not block:
                    break
                self._rest += block
            if self._rest[: len(data)] != data:
                self.wrong = self.count + first_difference(self._rest, data)
            self._rest = self._rest[len(data) :]
        self.count += len(data)

    def verdict(self) -> str:
        return f"read {self.count} sha256 {self._hash.hexdigest()} wrong {self.wrong}"


def _read_all(checker: Checker) -> None:
    while data := os.read(0, BLOCK_BYTES):
        checker.feed(data)


def main() -> None:
    seed, size = sys.argv[1], int(sys.argv[2])
    checker = Checker(f"{seed}-in", size)
    reader = threading.Thread(target=_read_all, args=(checker,))
    reader.start()
    for block in stream(f"{seed}-out", size):
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(1, rest) :]
    reader.join()
    os.write(1, f"\n{checker.verdict()}\n".encode())


if __name__ == "__main__":
    main()
