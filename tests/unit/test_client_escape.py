"""Escape keys: which bytes are taken from the typed ones, and which never are."""

from __future__ import annotations

import pytest

from sterna.client.escape import Action, EscapeKeys, help_text
from sterna.errors import UsageError


def typed(*pieces: bytes, char: str = "~") -> tuple[bytes, list[Action]]:
    keys = EscapeKeys(enabled=True, char=char)
    sent, actions = b"", []
    for piece in pieces:
        more, asked = keys.feed(piece)
        sent += more
        actions += asked
    return sent + keys.flush(), actions


@pytest.mark.parametrize(
    ("data", "sent", "actions"),
    [
        pytest.param(b"~d", b"", [Action.DETACH], id="detach at the start"),
        pytest.param(b"ls\r~.", b"ls\r", [Action.DROP], id="drop after CR"),
        pytest.param(b"ls\n~?x", b"ls\nx", [Action.HELP], id="help after LF"),
        pytest.param(b"\r~~", b"\r~", [], id="a literal tilde"),
        pytest.param(b"\r~~d", b"\r~d", [], id="a literal tilde ends the line start"),
        pytest.param(b"\r~x", b"\r~x", [], id="anything else passes through"),
        pytest.param(b"\r~\r~d", b"\r~\r", [Action.DETACH], id="the newline after a tilde is one"),
        pytest.param(b"cd ~d", b"cd ~d", [], id="not after other text"),
        pytest.param(b"~?~?~d", b"", [Action.HELP, Action.HELP, Action.DETACH], id="help stays at the line start"),
        pytest.param(b"\r~dmore\r~.", b"\r", [Action.DETACH], id="nothing after detach"),
        pytest.param(b"\r~", b"\r~", [], id="a held tilde comes out at the end"),
        pytest.param(b"\r\x1b[200~\n~d\x1b[201~", b"\r\x1b[200~\n~d\x1b[201~", [], id="pasted"),
        pytest.param(b"\x1b[200~a\r\x1b[201~~d", b"\x1b[200~a\r\x1b[201~~d", [], id="right after a paste"),
        pytest.param(b"\x1b[200~a\r\x1b[201~\r~d", b"\x1b[200~a\r\x1b[201~\r", [Action.DETACH], id="a line after it"),
        pytest.param(b"\r~\x1b[200~\r~d\x1b[201~", b"\r~\x1b[200~\r~d\x1b[201~", [], id="a tilde before a paste"),
    ],
)
def test_keys_whole_and_byte_by_byte(data: bytes, sent: bytes, actions: list[Action]) -> None:
    assert typed(data) == (sent, actions)
    assert typed(*(bytes((byte,)) for byte in data)) == (sent, actions)


def test_another_character_and_its_paste_markers() -> None:
    assert typed(b"\r%d", char="%") == (b"\r", [Action.DETACH])
    assert typed(b"\r~d", char="%") == (b"\r~d", [])
    assert typed(b"\x1b[20", b"0~\r0d\x1b[201", b"~\r0d", char="0") == (b"\x1b[200~\r0d\x1b[201~\r", [Action.DETACH])
    assert "%." in help_text("%")


@pytest.mark.parametrize("char", ["", "ab", "\r", " ", "é"], ids=["none", "two", "CR", "space", "not ASCII"])
def test_a_character_that_cannot_be_typed_after_a_newline_is_refused(char: str) -> None:
    with pytest.raises(UsageError):
        EscapeKeys(enabled=True, char=char)


def test_input_without_tilde_is_passed_on_as_the_same_object() -> None:
    keys = EscapeKeys(enabled=True)
    data = b"x" * 100 + b"\r"
    assert keys.feed(data)[0] is data
    # The control: the newline was seen all the same.
    assert keys.feed(b"~d") == (b"", [Action.DETACH])


def test_disabled_nothing_is_taken() -> None:
    data = b"\r~d\r~.\r~?"
    assert EscapeKeys(enabled=False).feed(data) == (data, [])
