"""A zstd stream unpacked piece by piece, with the contract's words for what is wrong with it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sterna.errors import SternaError

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor, ZstdError
else:
    from backports.zstd import ZstdDecompressor, ZstdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAGIC = b"\x28\xb5\x2f\xfd"
_READ_BYTES = 256 * 1024
_PIECE_BYTES = 1024 * 1024


class UnzstdError(SternaError):
    """The stream is broken or ends early."""


def unzstd(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Returns the unpacked data of all frames of a stream, in pieces; nothing for an empty stream.

    Parameters: `read(size)`, gives at most `size` raw bytes, none at the end. Raises `UnzstdError`.
    """
    data = read(_READ_BYTES)
    while data:
        while len(data) < len(_MAGIC):
            more = read(_READ_BYTES)
            if not more:
                raise UnzstdError("unexpected EOF")
            data += more
        skippable = data[1:4] == b"\x2a\x4d\x18" and 0x50 <= data[0] <= 0x5F
        if data[:4] != _MAGIC and not skippable:
            raise UnzstdError("invalid input: magic number mismatch")
        frame = ZstdDecompressor()
        while not frame.eof:
            if frame.needs_input and not data:
                data = read(_READ_BYTES)
                if not data:
                    raise UnzstdError("unexpected EOF")
            try:
                piece = frame.decompress(data, _PIECE_BYTES)
            except ZstdError as error:
                raise UnzstdError("invalid input: corrupt data") from error
            data = b""
            if piece:
                yield piece
        data = frame.unused_data or read(_READ_BYTES)
