from __future__ import annotations

import pytest

from sterna.remote.dispatch import decode_request
from sterna.remote.gonumber import INT64_MAX, INT64_MIN, UINT64_MAX, integer, text_of, through_double
from sterna.remote.wire import (
    Members,
    Number,
    Value,
    WireError,
    _check_depth,
    decode,
    decode_deep,
    encode,
    encode_echo,
    encode_text,
    scalar,
)


@pytest.mark.parametrize(
    ("literal", "printed"),
    [
        ("0", "0"), ("-0", "-0"), ("1.0", "1"), ("1e2", "100"), ("-1", "-1"), ("0.1", "0.1"), ("123.456e3", "123456"),
        ("9007199254740993", "9007199254740992"), ("12345678901234567890", "12345678901234567000"),
        ("1e20", "100000000000000000000"), ("999999999999999999999", "1e+21"), ("1e21", "1e+21"), ("1.5e21", "1.5e+21"),
        ("-2.5e-7", "-2.5e-7"), ("1e-6", "0.000001"), ("1.25e-6", "0.00000125"), ("9.99e-7", "9.99e-7"),
        ("1e-7", "1e-7"),
        ("5e-324", "5e-324"), ("1e-400", "0"), ("-1e-400", "-0"), ("1.7976931348623157e308", "1.7976931348623157e+308"),
        ("1e100", "1e+100"), ("1e-10", "1e-10"), ("999999999999999", "999999999999999"),
        ("100000000000000000", "100000000000000000"),
        ("0.30000000000000004", "0.30000000000000004"), ("1.0000000000000002", "1.0000000000000002"),
    ],
)  # fmt: skip
def test_numbers_are_printed_as_the_shortest_text_of_their_double(literal: str, printed: str) -> None:
    assert through_double(literal) == printed


def test_a_number_beyond_a_double_is_refused() -> None:
    with pytest.raises(WireError):
        encode_echo(Number("1e400"))
    with pytest.raises(WireError):
        encode_echo(decode(b'[{"a":-1e400,"a":1}]'))
    with pytest.raises(WireError):
        decode_request(b'{"id":1e999}')
    assert decode_request(b'{"params":1e999,"other":1e999}').id_text == "null"


def test_times_are_printed_by_the_same_rule() -> None:
    assert text_of(1700000000.25) == "1700000000.25"
    assert encode(1700000000.0) == "1700000000"


@pytest.mark.parametrize(
    ("literal", "low", "high", "value"),
    [
        ("4", INT64_MIN, INT64_MAX, 4), ("-0", INT64_MIN, INT64_MAX, 0), ("-0", 0, UINT64_MAX, None),
        ("4.0", INT64_MIN, INT64_MAX, None),
        ("1e2", INT64_MIN, INT64_MAX, None), ("9223372036854775807", INT64_MIN, INT64_MAX, INT64_MAX),
        ("9223372036854775808", INT64_MIN, INT64_MAX, None), ("-9223372036854775808", INT64_MIN, INT64_MAX, INT64_MIN),
        ("18446744073709551615", 0, UINT64_MAX, UINT64_MAX), ("18446744073709551616", 0, UINT64_MAX, None),
        ("-1", 0, UINT64_MAX, None),
        ("9" * 5000, 0, UINT64_MAX, None),
    ],
)  # fmt: skip
def test_integers_are_integer_literals(literal: str, low: int, high: int, value: int | None) -> None:
    assert integer(literal, low, high) == value


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ('a"\\/', r'"a\"\\/"'), ("\b\f\n\r\t\x00\x1f\x7f", '"\\b\\f\\n\\r\\t\\u0000\\u001f\x7f"'),
        ("<>&", r'"\u003c\u003e\u0026"'), ("\u2028\u2029", r'"\u2028\u2029"'), ("é€😀\ufffd", '"é€😀\ufffd"'),
        (b"\xff\xc3(\xed\xa0\x80".decode("utf-8", "surrogateescape"), r'"\ufffd\ufffd(\ufffd\ufffd\ufffd"'),
    ],
)  # fmt: skip
def test_text_is_escaped(text: str, encoded: str) -> None:
    assert encode_text(text) == encoded


@pytest.mark.parametrize(
    ("raw", "echo"),
    [
        (b'"\xff"', "\ufffd"), (b'"\xe2\x82"', "\ufffd\ufffd"), (b'"\xf0\x9f\x98"', "\ufffd" * 3),
        (b'"\xc0\xaf"', "\ufffd\ufffd"),
        (b'"\\ud800"', "\ufffd"), (b'"\\ud800x\\udc00"', "\ufffdx\ufffd"), (b'"\\ud83d\\ude00"', "😀"),
        (b'"\\ud800\\u0041"', "\ufffdA"),
        (b'"\\ud800\\ud83d\\ude00"', "\ufffd😀"), (b'"\\udc80"', "\ufffd"), ('"é\ufffd"'.encode(), "é\ufffd"),
    ],
)  # fmt: skip
def test_what_is_no_text_becomes_one_replacement_for_each_byte(raw: bytes, echo: str) -> None:
    value = decode(raw)
    assert isinstance(value, str)
    assert scalar(value) == echo
    assert encode_echo(value) == f'"{echo}"'


@pytest.mark.parametrize(
    "line",
    [
        b"", b"   ", b"{not json", b"{}{}", b"[1,]", b'{"a":1,}', b"{'a':1}", b"01", b"-", b"+1", b".5", b"1.",
        b"1e", b"NaN", b"-Infinity",
        b"Infinity", b'"\t"', b'"\\x41"', b'"\\u12g4"', b'"open', b"\xef\xbb\xbf{}", b"{}\x00", b"\x0c{}",
        b"{}\xa0", b"nul", b"True", b"[1 2]",
        b'{"a"}', b'{"a":}', b'{1:2}', b"{,}", b"[,]", b'"a" "b"', b"\xff", b"{}\xff", b"/**/{}",
    ],
)  # fmt: skip
def test_what_the_grammar_forbids_is_refused_by_both_decoders(line: bytes) -> None:
    with pytest.raises(WireError):
        decode(line)
    with pytest.raises(WireError):
        decode_deep(line.decode("utf-8", "surrogateescape"))


def test_white_space_is_only_what_the_grammar_says() -> None:
    assert decode(b" \t\r\n[ 1 , 2 ] \t\r\n") == [Number("1"), Number("2")]
    assert decode_deep(' \t[ { "a" : [ ] , "b" : { } } , null ]\r') == [Members([("a", []), ("b", Members())]), None]


def test_ten_thousand_levels_are_read_and_one_more_is_not() -> None:
    deep = b"[" * 10_000 + b"]" * 10_000
    assert encode_echo(decode(deep)).encode() == deep
    objects = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    assert encode_echo(decode(objects)).encode() == objects
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        with pytest.raises(WireError):
            decode(opening * 10_001 + (b"1" if closing == b"}" else b"") + closing * 10_001)
    assert decode_request(b'{"id":%b}' % (b"[" * 9_999 + b"]" * 9_999)).id_text == "[" * 9_999 + "]" * 9_999
    with pytest.raises(WireError):
        decode_request(b'{"id":%b}' % deep)


def test_an_id_is_printed_anew_with_sorted_keys_and_the_last_of_equal_ones() -> None:
    line = '{"id":{"a":{"z":1e3,"y":[{"d":1,"c":2}]},"A":0,"é":1,"b":1,"b":{"x":2.50}}}'
    assert decode_request(line.encode()).id_text == '{"A":0,"a":{"y":[{"c":2,"d":1}],"z":1000},"b":{"x":2.5},"é":1}'
    assert decode_request(b'{"id":{"\\ud800":1,"\\udfff":2}}').id_text == '{"\ufffd":2}'
    # By bytes of UTF-8, as code points are; 16-bit units would put the last one in the middle.
    line = '{"id":{"\U00010000":3,"\uffff":2,"\ud7ff":1}}'
    assert decode_request(line.encode()).id_text == '{"\ud7ff":1,"\uffff":2,"\U00010000":3}'


def test_members_of_a_request_are_found_without_case_and_null_leaves_them_alone() -> None:
    request = decode_request(
        b'{"JSONRPC":"2.0","Method":"a.b","METHOD":null,"AUTH":"x","auth":"y","id":1,"ID":null,"parameters":2}'
    )
    assert (request.jsonrpc, request.method, request.auth, request.id_text) == ("2.0", "a.b", "y", "null")
    assert decode_request('{"param\u017f":[]}'.encode()).params == []
    assert decode_request(b"null").id_text == "null"


@pytest.mark.parametrize(
    "line", [b'{"method":5}', b'{"jsonrpc":2.0}', b'{"auth":[]}', b'{"auth":true}', b"[1]", b'"x"', b"1", b"true"]
)
def test_a_member_of_the_wrong_type_makes_the_line_no_request(line: bytes) -> None:
    with pytest.raises(WireError):
        decode_request(line)


def test_depth_is_bounded_whatever_the_scanner_takes() -> None:
    value: Value = []
    for level in range(9_999):
        value = [None, value] if level % 2 else Members([("a", None), ("b", value)])
    _check_depth(value)
    with pytest.raises(WireError):
        _check_depth([value])
    many = b"[" + b",".join([b'[{"a":[]}]'] * 9_000) + b"]"
    assert encode_echo(decode(many)).encode() == many
