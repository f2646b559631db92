"""The WebSocket's bytes: RFC 6455's own examples, any split of them, every bound, and messages of whole frames."""

from __future__ import annotations

import os
import random

import pytest

from sterna import limits
from sterna.protocol.codec import Decoder
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.transport.websocket import (
    BINARY,
    CLOSE,
    EMPTIES_MAX,
    MESSAGE_MAX_BYTES,
    PING,
    PONG,
    STRANGER_MAX_BYTES,
    Reader,
    Wire,
    accept_key,
    head,
    unmask,
)

MASK = bytes((0x37, 0xFA, 0x21, 0x3D))


def frame(opcode: int, data: bytes, *, first: int = 0x80) -> bytes:
    """A client's frame."""
    return (
        bytes((first | opcode, 0x80 | head(opcode, len(data))[1])) + head(opcode, len(data))[2:] + MASK
        + unmask(data, MASK)
    )  # fmt: skip


def test_the_examples_of_the_standard() -> None:
    assert accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert unmask(bytes((0x7F, 0x9F, 0x4D, 0x51, 0x58)), MASK) == b"Hello"
    assert head(BINARY, 256) == bytes((0x82, 0x7E, 0x01, 0x00))
    assert head(BINARY, 65536) == bytes((0x82, 0x7F)) + (65536).to_bytes(8, "big")
    for key in ("", "x", "dGhlIHNhbXBsZSBub25jZQ", "*" * 24, "dGhlIHNhbXBsZSBub25jZQ===", "ä" * 24):
        assert accept_key(key) is None


@pytest.mark.parametrize("size", [0, 1, 3, 4, 127, 128, 129, 130, 131, 4097, 65_536])
def test_both_ways_to_unmask_are_one(size: int) -> None:
    data, mask = os.urandom(size), os.urandom(4)
    clear = unmask(data, mask)
    assert clear == bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    assert unmask(memoryview(clear), mask) == data


def messages_of(data: bytes, pieces: list[int]) -> tuple[list[tuple[int, bytes]], int]:
    """What a reader finds in these bytes when they come in pieces of these sizes, and its fault."""
    reader, found, at = Reader(), [], 0
    for size in pieces:
        found += reader.feed(memoryview(data)[at : at + size])
        at += size
    found += reader.feed(data[at:])
    return found, reader.fault


def test_the_same_bytes_in_any_pieces_are_the_same_messages() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(60):
        data, expected = b"", []
        for _ in range(rng.randrange(1, 8)):
            content = rng.randbytes(rng.choice((0, 1, 125, 126, 300, 65_535, 65_536, 70_000)))
            cut = rng.randrange(len(content) + 1)
            if rng.random() < 0.5:
                data += frame(BINARY, content)
            else:
                data += frame(BINARY, content[:cut], first=0) + frame(PING, b"p") + frame(0, content[cut:])
                expected.append((PING, b"p"))
            expected.append((BINARY, content))
        broken = rng.random() < 0.3
        if broken:
            data += frame(1, b"text") + frame(BINARY, b"never seen")
        pieces = [rng.choice((1, 2, 5, 100, 5000, 100_000)) for _ in range(40)]
        assert messages_of(data, pieces) == (expected, 1003 if broken else 0)
        assert messages_of(data, []) == (expected, 1003 if broken else 0)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        pytest.param(frame(1, b""), 1003, id="text"),
        pytest.param(frame(BINARY, bytes(MESSAGE_MAX_BYTES)), 0, id="largest"),
        pytest.param(frame(BINARY, bytes(MESSAGE_MAX_BYTES + 1))[:14], 1009, id="too-large-by-its-header"),
        pytest.param(frame(BINARY, bytes(MESSAGE_MAX_BYTES), first=0) + frame(0, b"x"), 1009, id="too-large-in-pieces"),
        pytest.param(frame(BINARY, b"", first=0) + frame(BINARY, b""), 1002, id="a-new-message-inside"),
        pytest.param(frame(0, b""), 1002, id="a-stray-piece"),
        pytest.param(frame(BINARY, b"", first=0xC0), 1002, id="reserved-bit"),
        pytest.param(frame(CLOSE, bytes(126)), 1002, id="long-close"),
        pytest.param(frame(PING, b"", first=0), 1002, id="ping-in-pieces"),
        pytest.param(bytes((0x82, 0x05)) + b"hello", 1002, id="unmasked"),
        pytest.param(bytes((0x82, 0xFE, 0, 125)) + bytes(129), 1002, id="length-longer-than-need-be"),
        pytest.param(bytes((0x82, 0xFF)) + bytes(6) + b"\xff\xff" + bytes(4), 1002, id="length-longer-than-need-be-8"),
        pytest.param(bytes((0x82, 0xFF)) + b"\xff" * 8 + bytes(4), 1009, id="negative-length"),
        pytest.param(frame(11, b""), 1002, id="unknown-opcode"),
        pytest.param(frame(PING, b"") * EMPTIES_MAX, 0, id="pings"),
    ],
)
def test_faults_have_their_codes_and_nothing_is_taken_after_one(data: bytes, fault: int) -> None:
    for pieces in ([], [1] * min(len(data), 300)):
        found, code = messages_of(data + (frame(BINARY, b"later") if fault else b""), pieces)
        assert code == fault
        assert not fault or (BINARY, b"later") not in found


def test_pieces_without_content_cost_nothing() -> None:
    reader = Reader()
    reader.feed(frame(BINARY, b"", first=0))
    for _ in range(10_000):
        assert reader.feed(frame(0, b"", first=0)) == []
    assert reader.feed(frame(0, b"x")) == [(BINARY, b"x")]


@pytest.mark.parametrize("data", [frame(PING, b""), frame(BINARY, b""), frame(PONG, b"0123456789")])
def test_too_many_messages_with_nothing_in_them_are_a_fault(data: bytes) -> None:
    found, fault = messages_of(data * (EMPTIES_MAX + 10), [])
    assert fault == 1008
    assert len(found) == EMPTIES_MAX + 1


def test_a_stranger_may_say_less() -> None:
    reader = Reader(STRANGER_MAX_BYTES)
    assert reader.feed(frame(BINARY, bytes(STRANGER_MAX_BYTES))) == [(BINARY, bytes(STRANGER_MAX_BYTES))]
    reader.feed(frame(BINARY, bytes(STRANGER_MAX_BYTES + 1))[:14])
    assert reader.fault == 1009


def carried() -> tuple[Wire, Link]:
    wire, link = Wire(), Link()
    wire.carried = link
    return wire, link


def split(data: bytes) -> list[tuple[int, bytes]]:
    """The messages in a server's bytes."""
    found, at = [], 0
    while at < len(data):
        size, start = data[at + 1], at + 2
        if size >= 126:
            more = 2 if size == 126 else 8
            size, start = int.from_bytes(data[start : start + more], "big"), start + more
        found.append((data[at] & 15, data[start : start + size]))
        at = start + size
    assert at == len(data)
    return found


def test_all_frames_of_one_event_are_one_message() -> None:
    wire, link = carried()
    wire.push(b"")
    for key in range(5):
        link.send(Type.DATA, 1, key, b"k")
    [(opcode, content)] = split(b"".join(wire.data_to_send()))
    assert opcode == BINARY
    assert [payload for _, _, _, payload in Decoder().feed(content)] == [b"k"] * 5
    assert wire.data_to_send() == []


def test_bytes_of_http_are_counted_until_they_are_sent() -> None:
    wire = Wire()
    for data in (b"abc", b"", b"de"):
        wire.push(data)
    assert wire.out_bytes == 5
    assert wire.data_to_send() == [b"abc", b"de"]
    assert wire.out_bytes == 0
    wire.closing = True
    wire.push(b"later")
    assert (wire.out_bytes, wire.data_to_send()) == (0, [])


def test_what_is_too_much_for_one_message_is_split_between_frames() -> None:
    wire, link = carried()
    sizes = [65_535] * 9 + [10] * 300 + [5_000] * 100 + [0, 15, 4_096]
    for size in sizes:
        link.send(Type.DATA, 1, 0, bytes(size))
    found = split(b"".join(wire.data_to_send()))
    assert len(found) > 3
    seen: list[int] = []
    for opcode, content in found:
        assert opcode == BINARY
        assert 0 < len(content) <= MESSAGE_MAX_BYTES
        decoder = Decoder()
        seen += [len(payload) for _, _, _, payload in decoder.feed(content)]
        assert decoder.fault is None
        assert decoder.waiting == 0
    assert seen == sizes


def test_the_last_word_and_then_the_close() -> None:
    wire, link = carried()
    wire.pong = b"x"
    link.send(Type.DATA, 1, 0, b"last")
    link.closing = True
    kinds = split(b"".join(wire.data_to_send()))
    assert [opcode for opcode, _ in kinds] == [PONG, BINARY, CLOSE]
    assert kinds[-1][1] == (1000).to_bytes(2, "big")
    assert wire.closing
    assert wire.data_to_send() == []


def test_a_window_fits_into_a_message() -> None:
    assert MESSAGE_MAX_BYTES >= limits.WINDOW_BYTES + 4 * limits.HEADER_BYTES - 4


def test_one_byte_behind_a_message_that_was_held_is_no_reason_to_wait_for_more() -> None:
    reader, big, small = Reader(1 << 20), bytes(60_000), b"key"
    first, second = frame(BINARY, big), frame(BINARY, small)
    assert reader.feed(first[:30_000]) == []
    assert reader.feed(first[30_000:] + second[:1]) == [(BINARY, big)]
    assert reader.feed(second[1:]) == [(BINARY, small)]
