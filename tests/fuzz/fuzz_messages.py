"""Fuzzes control payloads and compressed payloads: the only exception allowed is ProtocolError.

Run as `python -m tests.fuzz.fuzz_messages [CORPUS] [-runs=N] [-max_total_time=SECONDS]`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sterna"]):
    from sterna.errors import Code, ProtocolError
    from sterna.protocol import compress, messages

VECTORS = json.loads((Path(__file__).parents[2] / "docs/vectors.json").read_text(encoding="utf-8"))
SAMPLES: list[tuple[type[messages.Message], bytes]] = [
    *(
        (messages.MESSAGES[case["type"]], bytes.fromhex(case["payload"]))
        for case in VECTORS["frames"]
        if "message" in case
    ),
    (messages.ConnectBody, bytes.fromhex(VECTORS["signed"][0]["body"])),
    (messages.ResumeBody, bytes.fromhex(VECTORS["signed"][1]["body"])),
]
COMPRESSED = bytes.fromhex(VECTORS["zstd"][0]["compressed"])
SHAPES: list[type[messages.Message]] = sorted(
    {*messages.MESSAGES.values(), messages.ConnectBody, messages.ResumeBody}, key=lambda shape: shape.__name__
)
COMPRESSED_MAX_BYTES = 100_000


def edited(sample: bytes, edits: bytes) -> bytes:
    """Returns a good payload with a few bytes changed, added or taken out: noise never gets past the first key."""
    data = bytearray(sample)
    for at in range(0, len(edits) - 3, 4):
        where, what, value = (
            int.from_bytes(edits[at : at + 2], "big") % (len(data) + 1),
            edits[at + 2] % 3,
            edits[at + 3],
        )
        if what == 0 and where < len(data):
            data[where] = value
        elif what == 1:
            data.insert(where, value)
        elif where < len(data):
            del data[where]
    return bytes(data)


def one(data: bytes) -> None:
    """Checks one input; allowed: ProtocolError with BAD_PAYLOAD, or TOO_LARGE from `decompress`."""
    if len(data) < 2:
        return
    if data[0] & 1:
        shape, payload = SHAPES[data[1] % len(SHAPES)], data[2:]
    else:
        shape, sample = SAMPLES[data[1] % len(SAMPLES)]
        payload = edited(sample, data[2:])
    unpack(shape, payload)
    decompress(data[2:])
    decompress(edited(COMPRESSED, data[2:]))


def unpack(shape: type[messages.Message], payload: bytes) -> None:
    try:
        message = messages.unpack(shape, payload)
    except ProtocolError as error:
        if error.code is not Code.BAD_PAYLOAD:
            raise
        str(error).encode()
    else:
        again = messages.pack(message)
        assert messages.pack(messages.unpack(shape, again)) == again


def decompress(payload: bytes) -> None:
    try:
        assert len(compress.decompress(payload, COMPRESSED_MAX_BYTES)) <= COMPRESSED_MAX_BYTES
    except ProtocolError as error:
        if error.code not in (Code.BAD_PAYLOAD, Code.TOO_LARGE):
            raise


def main() -> None:
    """Fuzzes until a limit of the command line is reached."""
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
