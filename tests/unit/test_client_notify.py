"""Notifications: which sequence, clean text, and not too many."""

from __future__ import annotations

import pytest

from sterna.client.notify import NOTIFY_EVERY_MS, NOTIFY_TEXT_MAX_CHARS, Notifier, cleaned, passthrough, uses_osc_777
from sterna.units import MILLISECOND


def test_a_bell_becomes_osc_9() -> None:
    assert Notifier("work", {"TERM": "xterm-256color"}).bell(0) == b"\x1b]9;sterna work: The bell rang.\x1b\\"


@pytest.mark.parametrize(
    ("environ", "osc_777"),
    [
        pytest.param({"TERM": "foot"}, True, id="foot"),
        pytest.param({"TERM": "rxvt-unicode-256color"}, True, id="urxvt"),
        pytest.param({"TERM": "xterm-256color", "VTE_VERSION": "7600"}, True, id="VTE"),
        pytest.param({"TERM": "xterm-kitty"}, False, id="kitty"),
        pytest.param({}, False, id="unknown"),
    ],
)
def test_the_kind_of_terminal_decides(environ: dict[str, str], osc_777: bool) -> None:
    assert uses_osc_777(environ) is osc_777
    sequence = Notifier("a;b", environ).exited("exit status 1")
    if osc_777:
        assert sequence == b"\x1b]777;notify;sterna a,b;The program ended: exit status 1.\x1b\\"
    else:
        assert sequence == b"\x1b]9;sterna a,b: The program ended: exit status 1.\x1b\\"


def test_in_tmux_it_is_passed_through() -> None:
    plain = Notifier("work", {"TERM": "xterm"}).bell(0)
    wrapped = Notifier("work", {"TERM": "tmux-256color", "TMUX": "/tmp/tmux-0/default,1,0"}).bell(0)
    assert wrapped == passthrough(plain) == b"\x1bPtmux;\x1b\x1b]9;sterna work: The bell rang.\x1b\x1b\\\x1b\\"


def test_bells_are_rate_limited_but_the_end_is_always_told() -> None:
    notifier = Notifier("work", {})
    every = NOTIFY_EVERY_MS * MILLISECOND
    assert [bool(notifier.bell(now)) for now in (0, 1, every - 1, every, every + 1, 2 * every)] == [
        True, False, False, True, False, True,
    ]  # fmt: skip
    assert notifier.exited("signal TERM")


def test_text_cannot_leave_the_sequence() -> None:
    sequence = Notifier("a\x1b\\\x07b\u202ec\x9c\n\ud800", {}).exited("\x1b]52;c;eA==\x07")
    body = sequence.removeprefix(b"\x1b]").removesuffix(b"\x1b\\")
    assert not any(byte < 0x20 or byte == 0x7F for byte in body)
    assert "\x9c" not in body.decode()
    assert "\u202e" not in body.decode()


def test_text_is_bounded() -> None:
    assert len(cleaned("x" * 10_000_000)) == NOTIFY_TEXT_MAX_CHARS
    assert cleaned("  a \r\n b  ") == "a b"
