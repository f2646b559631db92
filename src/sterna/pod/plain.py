"""A flood of plain text on its way to a terminal engine: only its last lines can still be seen, so only those go there.

Lines without any control sequence leave nothing behind but themselves. Once a whole screen and all lines that are kept
above it came after them, they are gone, whatever the terminal did with them.
"""

from __future__ import annotations

from collections import deque
from typing import Final

LEAST_BYTES: Final = 64 * 1024
"""Less plain text than this is not worth a look."""
_BYTES_MAX: Final = 4 * 1024 * 1024
_LOOK_BYTES: Final = 4_096
# What leaves more behind than lines: sequences, bells, character sets, and the first byte of C1 controls in UTF-8.
_CONTROLS: Final = (b"\x1b", b"\x07", b"\x0e", b"\x0f", b"\xc2")
_SILENT: Final = bytes((*range(0x20), 0x7F))


def plain_from(data: bytes) -> int:
    """Returns where in `data` plain text begins that goes on to its end; its length if that is too little.

    What is before it may have begun a sequence that is not finished: the terminal knows.
    """
    start = max(data.rfind(control) for control in _CONTROLS) + 1
    return start if len(data) - start >= LEAST_BYTES else len(data)


class PlainTail:
    """The last lines of plain text; `size` is how many bytes wait here."""

    __slots__ = ("_lines", "_pieces", "size")

    def __init__(self) -> None:
        self._pieces: deque[tuple[bytes, int]] = deque()
        self._lines = 0
        self.size = 0

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def full(self) -> bool:
        """Whether so much waits that it has to be taken: its lines are very long."""
        return self.size > _BYTES_MAX

    def add(self, text: bytes, lines_kept: int) -> None:
        """Takes text, and forgets what `lines_kept` lines or more came after."""
        count = text.count(b"\n")
        self._pieces.append((text, count))
        self._lines += count
        self.size += len(text)
        gone, left = 0, self._lines
        for number in range(1, len(self._pieces)):
            left -= self._pieces[number - 1][1]
            if left <= lines_kept:
                break
            if _stands_alone(self._pieces[number][0]):
                gone = number
        for _ in range(gone):
            old, lines = self._pieces.popleft()
            self._lines -= lines
            self.size -= len(old)

    def take(self) -> bytes:
        """Returns what waits, and forgets it; its first line may be the end of one."""
        text = b"".join(piece for piece, _count in self._pieces)
        self._pieces.clear()
        self._lines = self.size = 0
        return text


def _stands_alone(text: bytes) -> bool:
    """Says whether what came before it leaves its second line as it is, and is not what REP repeats after it."""
    end = text.find(b"\n")
    return end > 0 and text[end - 1] == 0x0D and bool(text[:_LOOK_BYTES].strip(_SILENT))
