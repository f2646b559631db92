"""The decoder: any split of the bytes gives the same; corruption never yields a frame that was not sent."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.errors import Code
from sterna.limits import HEADER_BYTES, PAYLOAD_MAX_BYTES
from sterna.protocol import codec
from sterna.protocol.codec import Decoder, Frame
from sterna.protocol.crc import crc16
from sterna.protocol.frame import MAGIC, OPTIONAL_FROM, PAYLOAD_LIMITS_BYTES, Type, encode, expand
from sterna.protocol.link import Link

HANDLES = st.integers(0, (1 << 32) - 1)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """A frame that may be sent."""
    kind = draw(st.sampled_from(list(Type)))
    payload = draw(st.binary(max_size=min(PAYLOAD_LIMITS_BYTES[kind], 300)))
    return int(kind), draw(HANDLES), draw(HANDLES), payload


def decode(pieces: list[bytes], *, end: bool = True) -> tuple[list[Frame], Code | None]:
    decoder = Decoder()
    found: list[Frame] = []
    for piece in pieces:
        found += decoder.feed(piece)
        assert decoder.waiting < HEADER_BYTES + PAYLOAD_MAX_BYTES
    if end:
        decoder.eof()
    return found, decoder.fault


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[low:high] for low, high in itertools.pairwise(places)]


@given(st.lists(frames(), max_size=6), st.lists(st.integers(0, 5000), max_size=8), st.integers(0, 40))
def test_any_split_gives_the_same(sent: list[Frame], cuts: list[int], missing: int) -> None:
    data = b"".join(encode(*frame) for frame in sent)
    data = data[: len(data) - missing] if missing else data
    whole = decode([data])
    assert whole == decode(split(data, cuts))
    assert whole == decode([bytes([byte]) for byte in data])
    assert whole[0] == sent[: len(whole[0])]
    if not missing:
        assert whole == (sent, None)


@given(
    st.lists(frames(), min_size=1, max_size=4),
    st.binary(max_size=60),
    st.integers(0, 5000),
    st.lists(st.integers(0, 5000)),
)
def test_any_bytes_give_the_same_for_any_split(sent: list[Frame], junk: bytes, where: int, cuts: list[int]) -> None:
    data = b"".join(encode(*frame) for frame in sent)
    where %= len(data) + 1
    data = data[:where] + junk + data[where:]
    assert decode([data]) == decode(split(data, cuts)) == decode([bytes([byte]) for byte in data])


@given(
    st.lists(frames(), min_size=1, max_size=4),
    st.integers(0, 1 << 30),
    st.integers(1, 16),
    st.integers(1, (1 << 16) - 1),
)
@settings(max_examples=300)
def test_a_burst_of_16_bits_never_yields_a_wrong_frame(sent: list[Frame], place: int, width: int, pattern: int) -> None:
    """A CRC-16 finds every burst of up to 16 bits (Peterson and Brown 1961); a broken length moves the frame's end."""
    data = bytearray(b"".join(encode(*frame) for frame in sent))
    bits = len(data) * 8
    burst = pattern & ((1 << width) - 1) or 1
    at = place % bits
    number = int.from_bytes(data, "big") ^ (burst << max(0, bits - at - width))
    data = bytearray(number.to_bytes(len(data), "big"))
    found, fault = decode([bytes(data)])
    good = 0
    while good < len(found) and good < len(sent) and found[good] == sent[good]:
        good += 1
    # Types from 0x80 up are for whoever knows them: a frame whose type was turned into one fails its CRC all the same.
    assert found == sent[:good], "a frame was decoded that nobody sent"
    assert fault is not None or found == sent


def test_random_corruption_is_found_as_often_as_sixteen_bits_can() -> None:
    seed = 20_240_601
    print(f"seed {seed}")
    rng = random.Random(seed)
    wrong = 0
    for _ in range(20_000):
        frame = encode(Type.DATA, rng.randrange(1 << 32), rng.randrange(1 << 32), rng.randbytes(40))
        data = bytearray(frame)
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(HEADER_BYTES, len(data))] ^= rng.randrange(1, 256)
        if bytes(data) != frame:
            wrong += bool(decode([bytes(data)])[0])
    assert wrong <= 3, f"{wrong} of 20,000 corrupted frames were taken; chance gives 0.3"


def test_after_a_fault_nothing_is_taken_and_nothing_is_kept() -> None:
    decoder = Decoder()
    good = encode(Type.DATA, 1, 0, b"x")
    assert len(decoder.feed(good + b"CX" + good * 3)) == 1
    assert decoder.fault == Code.BAD_MAGIC
    assert decoder.feed(good) == []
    assert decoder.waiting == 0
    decoder.eof()
    assert decoder.fault == Code.BAD_MAGIC


def test_a_length_is_refused_before_its_payload_is_waited_for() -> None:
    for kind, limit in PAYLOAD_LIMITS_BYTES.items():
        if limit == PAYLOAD_MAX_BYTES:
            continue
        head = encode(kind, 1, 0, bytes(limit + 1))[:HEADER_BYTES]
        decoder = Decoder()
        decoder.feed(head)
        assert decoder.fault == Code.TOO_LARGE, kind
        decoder = Decoder()
        assert decoder.feed(encode(kind, 1, 0, bytes(limit))) == [(kind, 1, 0, bytes(limit))]


@pytest.mark.parametrize("kind", [kind for kind in range(256) if kind not in set(Type)])
def test_unknown_types_below_0x80_end_the_connection_and_others_are_ignored(kind: int) -> None:
    known = encode(Type.PING, 0, 0, b"p")
    found, fault = decode([encode(kind, 0, 0, b"payload") + known])
    if kind < OPTIONAL_FROM:
        assert (found, fault) == ([], Code.UNKNOWN_TYPE)
    else:
        assert (found, fault) == ([(int(Type.PING), 0, 0, b"p")], None)


@given(st.integers(0, 1 << 40), st.integers(-(1 << 30), 1 << 30))
def test_positions_are_found_again_from_their_low_half(near: int, distance: int) -> None:
    position = near + distance
    assert expand(position & 0xFFFF_FFFF, near) == position


@given(st.lists(frames(), max_size=4), st.binary(max_size=40))
def test_a_link_answers_broken_bytes_with_one_error_and_closes(sent: list[Frame], junk: bytes) -> None:
    link = Link()
    found = link.receive(b"".join(encode(*frame) for frame in sent) + b"XX" + bytes(HEADER_BYTES) + junk)
    link.check()
    assert found == sent
    assert link.closing
    reply, fault = decode([b"".join(link.data_to_send())])
    assert fault is None
    assert [(kind, handle) for kind, handle, _, _ in reply] == [(Type.ERROR, 0)]
    link.receive(b"more")
    link.check()
    link.send(Type.DATA, 1, 0, b"x")
    assert link.data_to_send() == []


def test_control_a_decoder_without_its_crc_takes_what_nobody_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = bytearray(encode(Type.DATA, 1, 0, b"hello"))
    frame[-1] ^= 1
    assert decode([bytes(frame)]) == ([], Code.BAD_CRC)
    monkeypatch.setattr(codec, "crc16", lambda data, start=0: int.from_bytes(frame[13:15], "big"))
    assert decode([bytes(frame)])[0] == [(int(Type.DATA), 1, 0, b"helln")]


def test_the_crc_covers_every_byte_of_the_frame() -> None:
    frame = encode(Type.SUSPEND, 0x01020304, 0x05060708, b"\x81\xa8position\x01")
    assert crc16(b"123456789") == 0xFEE8
    assert int.from_bytes(frame[:2], "big") == MAGIC
    for at in range(len(frame)):
        for bit in range(8):
            broken = bytearray(frame)
            broken[at] ^= 1 << bit
            found, fault = decode([bytes(broken)])
            assert found == []
            assert fault is not None
