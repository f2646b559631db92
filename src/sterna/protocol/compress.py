"""One-shot zstd for snapshots, with a bound on what comes out (docs/protocol.md, section 4)."""

from __future__ import annotations

import sys

from sterna import limits
from sterna.errors import Code, ProtocolError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LEVEL = 3


def compress(data: bytes) -> bytes:
    """Returns the data as one zstd frame."""
    return zstd.compress(data, LEVEL)


def decompress(data: bytes, limit: int = limits.DECOMPRESSED_MAX_BYTES) -> bytes:
    """Returns what one zstd frame holds.

    Raises ProtocolError (`TOO_LARGE`) beyond `limit` bytes and (`BAD_PAYLOAD`) for anything that is not exactly one
    frame.
    """
    machine = zstd.ZstdDecompressor()
    try:
        plain = machine.decompress(data, max_length=limit + 1)
    except zstd.ZstdError:
        raise ProtocolError(Code.BAD_PAYLOAD, "a compressed payload is damaged") from None
    if len(plain) > limit:
        raise ProtocolError(Code.TOO_LARGE, f"a payload of more than {limit} bytes was refused")
    if not machine.eof or machine.unused_data:
        raise ProtocolError(Code.BAD_PAYLOAD, "a compressed payload is not one whole frame")
    return plain
