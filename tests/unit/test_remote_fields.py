from __future__ import annotations

import pytest

from sterna.remote.calls import CallError
from sterna.remote.fields import TEXT, BindError, Flag, Integer, Kind, TextMap, Texts, bind, fold
from sterna.remote.processes import FIELDS, decode_base64, signal_of
from sterna.remote.wire import decode

KINDS: dict[str, Kind] = {
    "id": TEXT, "args": Texts(), "env": TextMap(), "wantPid": Flag(), "escalate": Flag(absent=True),
    "size": Integer(signed=True), "offset": Integer(signed=False, optional=True), "fromSeq": Integer(signed=False),
}  # fmt: skip
ZERO = {
    "id": "", "args": [], "env": {}, "wantPid": False, "escalate": True, "size": 0, "offset": None, "fromSeq": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("params", "bound"),
    [
        ("null", {}), ("{}", {}), ('{"id":"a","id":null}', {"id": "a"}), ('{"ID":"a","id":"b","Id":"c"}', {"id": "c"}),
        ('{"\u0131d":1,"other":[1]}', {}), ('{"\\u0069d":"x"}', {"id": "x"}), ('{"arg\u017f":["x"]}', {"args": ["x"]}),
        ('{"args":["a",null]}', {"args": ["a", ""]}), ('{"args":["a","b"],"args":[null]}', {"args": ["a"]}),
        ('{"args":["a","b"],"args":["c"],"args":["x",null]}', {"args": ["x", "b"]}),
        ('{"args":["a","b"],"args":[],"args":[null]}', {"args": [""]}), ('{"args":["a"],"args":null}', {}),
        ('{"env":{"A":"1"},"env":{"B":"2","A":null}}', {"env": {"A": "", "B": "2"}}),
        ('{"env":{"A":"1"},"env":null}', {}),
        ('{"wantPid":true,"wantpid":null}', {"wantPid": True}), ('{"escalate":false,"escalate":null}', {}),
        ('{"escalate":false}', {"escalate": False}), ('{"size":-0}', {"size": 0}),
        ('{"size":3,"size":null}', {"size": 3}),
        ('{"offset":0}', {"offset": 0}), ('{"offset":5,"offset":null}', {}),
        ('{"fromSeq":18446744073709551615}', {"fromSeq": 2**64 - 1}),
        ('{"id":"a\\ud800"}', {"id": "a\ufffd"}),
    ],
)  # fmt: skip
def test_parameters_are_bound(params: str, bound: dict[str, object]) -> None:
    assert bind(decode(params.encode()), KINDS) == ZERO | bound


@pytest.mark.parametrize(
    "params",
    [
        "[]", '"x"', "1", "true",
        '{"id":1}', '{"id":1,"id":"a"}', '{"args":"a"}', '{"args":[1]}', '{"args":{}}', '{"env":[]}',
        '{"env":{"A":1}}', '{"wantPid":"true"}', '{"wantPid":1}', '{"size":4.0}', '{"size":"4"}',
        '{"size":1e2}', '{"size":true}',
        '{"offset":-1}', '{"offset":-0}', '{"fromSeq":-0}', '{"fromSeq":18446744073709551616}',
        '{"size":9223372036854775808}', '{"id":[]}',
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused(params: str) -> None:
    with pytest.raises(BindError):
        bind(decode(params.encode()), KINDS)


def test_keys_fold_like_ascii_and_the_two_letters_that_fold_into_it() -> None:
    assert fold("PATH") == fold("path") == "path"
    assert fold("\u017f\u212a") == "sk"
    assert fold("\u0130d") != "id"
    assert fold("É") != fold("é")


def test_every_process_method_has_its_fields() -> None:
    assert {name: list(kinds) for name, kinds in FIELDS.items()} == {
        "process.spawn": ["id", "command", "args", "cwd", "env", "wantPid"],
        "process.stdin": ["id", "data", "offset"],
        "process.kill": ["id", "signal"],
        "process.killAndWait": ["id", "signal", "timeoutMs", "escalate"],
        "process.reattach": ["id", "fromSeq", "wantPid"],
    }


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", b""),
        ("aGk=", b"hi"),
        ("aG\nk=\r\n", b"hi"),
        ("aGk=\n\n", b"hi"),
        ("\r\n", b""),
        ("aGl=", b"hi"),
        ("AB==", b"\x00"),
    ],
)
def test_base64_ignores_line_ends_and_bits_that_do_not_count(text: str, data: bytes) -> None:
    assert decode_base64(text) == data


@pytest.mark.parametrize(
    "text",
    ["!!", "aGk", "aG k=", "aGk==", "aGk=aGk=", "=", "a", "====", "aG=k", "a===", "aG_-", "é", "aGk=\x00", "aGkx="],
)
def test_other_base64_is_refused(text: str) -> None:
    with pytest.raises(CallError, match="Invalid base64 data"):
        decode_base64(text)


def test_signals_have_names_and_everything_else_is_sigterm() -> None:
    names = ["KILL", "SIGKILL", "INT", "SIGHUP", "TERM", "QUIT", "kill", "9", "", "SIGSIGKILL", "SIG"]
    assert [int(signal_of(name)) for name in names] == [9, 9, 2, 1, 15, 15, 15, 15, 15, 15, 15]
