"""The last frames of a process, as raw bytes: a frame's line is made anew whenever one is sent."""

from __future__ import annotations

from binascii import b2a_base64
from collections import deque
from itertools import count, islice
from typing import TYPE_CHECKING, Final, TypeVar

from sterna.limits import REMOTE_REPLAY_BYTES
from sterna.remote.wire import encode_text

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

EXIT: Final = 2  # after child.STDOUT and child.STDERR
_NAMES: Final = ("stdout", "stderr", "exit")
_NEAR_END: Final = 8
_DATA, _CODE = b',"data":"', b',"exitCode":'


def _end_of(items: deque[T], wanted: int) -> list[T]:
    """Returns the last items; what is not wanted is not walked over, as a deque is quick at both ends only."""
    done = list(islice(reversed(items), wanted))
    done.reverse()
    return done


class Replay:
    """Frames `first` to `last` of a process; `size` counts the bytes of their lines, newlines included."""

    __slots__ = ("_chunks", "_heads", "_kinds", "_overheads", "first", "last", "size")

    def __init__(self, process_id: str) -> None:
        name = encode_text(process_id)
        self._heads = tuple(
            f'{{"type":"stream","processId":{name},"stream":"{stream}","seq":'.encode() for stream in _NAMES
        )
        tails = (len(_DATA) + 3, len(_DATA) + 3, len(_CODE) + 2)
        self._overheads = tuple(len(head) + tail for head, tail in zip(self._heads, tails, strict=True))
        self._chunks: deque[bytes] = deque()
        self._kinds: deque[int] = deque()
        self.first = self.last = self.size = 0

    def add(self, kind: int, chunk: bytes) -> int:
        """Records one frame, dropping the oldest ones beyond the bound; returns its sequence number.

        Parameters: `kind`, STDOUT, STDERR or EXIT; `chunk`, what was read, or the digits of the exit code.
        """
        self.last += 1
        self._chunks.append(chunk)
        self._kinds.append(kind)
        self.size += self._line_bytes(kind, self.last, chunk)
        if self.first == 0:
            self.first = 1
        while self.size > REMOTE_REPLAY_BYTES and len(self._chunks) > 1:
            self.size -= self._line_bytes(self._kinds.popleft(), self.first, self._chunks.popleft())
            self.first += 1
        return self.last

    def _line_bytes(self, kind: int, seq: int, chunk: bytes) -> int:
        data = len(chunk) if kind == EXIT else (len(chunk) + 2) // 3 * 4
        return self._overheads[kind] + len(str(seq)) + data

    def start(self, kind: int, seq: int) -> bytes:
        """Returns a data frame's line up to the quote in which its base64 begins."""
        return b'%b%d,"data":' % (self._heads[kind], seq)

    def line(self, kind: int, seq: int, chunk: bytes) -> bytes:
        """Returns the whole line of a frame."""
        if kind == EXIT:
            return b"%b%d%b%b}\n" % (self._heads[kind], seq, _CODE, chunk)
        return b'%b%d%b%b"}\n' % (self._heads[kind], seq, _DATA, b2a_base64(chunk, newline=False))

    def after(self, seq: int) -> Iterator[bytes]:
        """Returns the lines of all frames recorded by now with a number above `seq`, made as they are taken."""
        skip = min(max(0, seq + 1 - self.first), len(self._chunks))
        kinds, chunks = (_end_of(frames, len(frames) - skip) for frames in (self._kinds, self._chunks))
        return map(self.line, kinds, count(self.first + skip), chunks)

    def lines_from(self, seq: int) -> Iterator[tuple[int, bytes]]:
        """Returns the kinds and lines of the kept frames from `seq` on, made as they are taken, while none is added."""
        skip = max(0, seq - self.first)
        if len(self._chunks) - skip < _NEAR_END:  # deques are quick at both ends only
            for at in range(skip, len(self._chunks)):
                yield self._kinds[at], self.line(self._kinds[at], self.first + at, self._chunks[at])
            return
        frames = zip(count(self.first + skip), islice(self._kinds, skip, None), islice(self._chunks, skip, None))
        for number, kind, chunk in frames:
            yield kind, self.line(kind, number, chunk)

    def notice(self, stream: str, members: bytes = b"") -> bytes:
        """Returns a line about the process that is no frame; `members` are added to it."""
        return b'%b"%b"%b}\n' % (self._heads[EXIT].removesuffix(b'"exit","seq":'), stream.encode(), members)

    def bytes_after(self, seq: int) -> int:
        """Returns a bound of the length of all lines above `seq`, in bytes."""
        return self.size if seq < self.last else 0
