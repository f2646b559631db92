"""The codec of the remote daemon against the model beside it."""

from __future__ import annotations

import json
import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sterna.remote.gonumber import text_of, through_double
from sterna.remote.wire import Members, Number, Value, WireError, decode, decode_deep, encode, encode_echo, scalar
from tests.property.remote_model import Parser, RefusedError, model_echo, model_number, model_string

PIECES = (
    b"\xed", b"\xa0", b"\x80", b"\xf0", b"\x9f", b"\xc3", b"\xff", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xef\xbf\xbd",
    b"<", b">", b"&", b'"', b"\\", b"\x7f", b"\x1f", b"a", b"/",
)  # fmt: skip
raw_text = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join),
)
literals = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.from_regex(r"\A-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?\Z"),
)
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
        raw_text.map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(raw_text.map(lambda raw: raw.decode("utf-8", "surrogateescape")), inner, max_size=4),
    ),
    max_leaves=15,
)  # fmt: skip
# Pieces of which most documents are JSON or nearly so.
soup = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"true", b"false", b"NaN", b"-", b"0",
                b"1.5e3", b"1e400", b" ", b"\t", b"\n",
                b'"a":', b'"b"', b'{"a":1,"a":', b"\\u", b'"\\ud83d\\ude00"', b'"\\ud800"', b"\xff",
                b'"\xe2\x82"', b"\x00", b'"\\x"', b"\xef\xbb\xbf",
            ]
        ),
        literals.map(str.encode),
        raw_text,
    ),
    max_size=12,
).map(b"".join)  # fmt: skip


def model_encode(value: object) -> bytes:
    if isinstance(value, str):
        return model_string(value.encode("utf-8", "surrogateescape"))
    if value is None or isinstance(value, bool):
        return {None: b"null", True: b"true", False: b"false"}[value]
    if isinstance(value, int):
        return b"%d" % value
    if isinstance(value, float):
        return model_number(value)
    if isinstance(value, dict):
        return b"{" + b",".join(model_encode(key) + b":" + model_encode(item) for key, item in value.items()) + b"}"
    assert isinstance(value, list)
    return b"[" + b",".join(map(model_encode, value)) + b"]"


@given(values)
def test_whatever_is_encoded_is_what_the_model_says(value: object) -> None:
    assert encode(value).encode() == model_encode(value)


@given(values)
def test_what_is_encoded_is_json_of_the_same_value(value: object) -> None:
    def plain(item: object) -> object:
        if isinstance(item, str):
            return scalar(item)
        if isinstance(item, dict):
            return {scalar(key): plain(member) for key, member in item.items()}
        if isinstance(item, int) and not isinstance(item, bool):
            return float(item)  # digits of a double beyond 2**53 are those of no integer
        return [plain(member) for member in item] if isinstance(item, list) else item

    assert json.loads(encode(value), parse_int=float) == plain(value)


@example(562949953421312.75)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_double_is_printed_as_the_model_says_and_reads_back(value: float) -> None:
    assert text_of(value).encode() == model_number(value)
    assert float(text_of(value)) == value


@given(literals)
def test_every_number_is_echoed_as_the_model_says(literal: str) -> None:
    try:
        expected = model_echo(("n", literal))
    except RefusedError:
        expected = b""
    try:
        assert through_double(literal).encode() == expected
    except OverflowError:
        assert not expected


def normal(value: Value) -> tuple[str, object]:
    """Returns a decoded value in the form of the model."""
    if isinstance(value, Number):
        return "n", str(value)
    if isinstance(value, str):
        return "s", scalar(value)
    if isinstance(value, Members):
        return "o", [(scalar(key), normal(member)) for key, member in value]
    if isinstance(value, list):
        return "a", [normal(item) for item in value]
    return "w", {None: b"null", True: b"true", False: b"false"}[value]


def compare(line: bytes) -> None:
    try:
        expected: object = Parser(line).document()
    except RefusedError:
        expected = None
    for read in (decode, lambda data: decode_deep(data.decode("utf-8", "surrogateescape"))):
        try:
            value = read(line)
        except WireError:
            assert expected is None
            continue
        assert normal(value) == expected
        try:
            echo = model_echo(expected)
        except RefusedError:
            echo = b""
        try:
            assert encode_echo(value).encode() == echo
        except WireError:
            assert not echo


@settings(max_examples=600)
@given(soup)
def test_every_line_is_decoded_as_the_model_says(line: bytes) -> None:
    compare(line)


@given(values, st.randoms(use_true_random=False), st.integers(0, 3))
def test_a_damaged_document_is_decoded_as_the_model_says(value: object, chance: random.Random, hits: int) -> None:
    line = bytearray(encode(value).encode())
    for _ in range(hits):
        place = chance.randrange(len(line) + 1)
        line[place : place + chance.randrange(2)] = bytes(
            chance.choice([[], [chance.randrange(256)], [*b'\\"'], [*b"{}[],:"]])
        )
    compare(bytes(line))
