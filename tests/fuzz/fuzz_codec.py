"""Fuzzes the frame decoder and the link: any bytes in any pieces; neither ever raises.

Run as `python -m tests.fuzz.fuzz_codec [CORPUS] [-runs=N] [-max_total_time=SECONDS]`.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["sterna"]):
    from sterna.limits import HEADER_BYTES, PAYLOAD_MAX_BYTES
    from sterna.protocol.codec import Decoder, Frame
    from sterna.protocol.frame import OPTIONAL_FROM, Type, encode
    from sterna.protocol.link import Link


def repaired(data: bytes) -> bytes:
    """Returns frames with the right magic and checksum and what the input says of the rest: noise rarely has both."""
    out, at = b"", 0
    while at + 11 <= len(data) and len(out) < 4096:
        kind, size = data[at], data[at + 1] % 80
        handle, seq = int.from_bytes(data[at + 2 : at + 6], "big"), int.from_bytes(data[at + 6 : at + 10], "big")
        frame = encode(kind, handle, seq, data[at + 11 : at + 11 + size])
        out += frame if data[at + 10] != 0xFF else frame[:-1] + b"!"
        at += 11 + size
    return out


def pieces(data: bytes, cuts: bytes) -> list[bytes]:
    found = []
    for cut in cuts:
        found.append(data[: cut % 40])
        data = data[cut % 40 :]
    return [*found, data]


def decode(parts: list[bytes]) -> tuple[list[Frame], object]:
    decoder = Decoder()
    frames: list[Frame] = []
    for part in parts:
        frames += decoder.feed(part)
        assert decoder.waiting < HEADER_BYTES + PAYLOAD_MAX_BYTES
    decoder.eof()
    return frames, decoder.fault


def one(data: bytes) -> None:
    """Checks one input; no exception is allowed here."""
    cuts, data = data[:8], data[8:]
    for stream in (data, repaired(data)):
        whole = decode([stream])
        assert decode(pieces(stream, cuts)) == whole
        again = b"".join(encode(*frame) for frame in whole[0])
        if whole[1] is None and not any(kind >= OPTIONAL_FROM and kind != Type.EVENT for kind in stream[2:3]):
            assert len(again) <= len(stream)
        link = Link()
        got: list[Frame] = []
        for part in pieces(stream, cuts):
            got += link.receive(part)
            link.check()
        link.receive_eof()
        assert got == whole[0]
        reply = Decoder().feed(b"".join(link.data_to_send()))
        assert [kind for kind, _, _, _ in reply] == [Type.ERROR] * link.closing


def main() -> None:
    """Fuzzes until a limit of the command line is reached."""
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
