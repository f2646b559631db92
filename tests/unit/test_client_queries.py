"""Which control sequences are queries or touch the clipboard, and that nothing else is taken from the output."""

from __future__ import annotations

import re
import time

import pytest

from sterna.client.queries import LIVE, PASSIVE, REPLAY, SEQUENCE_HELD_MAX_BYTES, QueryFilter

QUERIES = {
    "DA1": b"\x1b[c", "DA1 0": b"\x1b[0c", "DA2": b"\x1b[>c", "DA2 0": b"\x1b[>0c", "DA3": b"\x1b[=c",
    "DECID": b"\x1bZ", "DSR": b"\x1b[5n", "CPR": b"\x1b[6n", "DECXCPR": b"\x1b[?6n", "colour scheme": b"\x1b[?996n",
    "DECRQM": b"\x1b[?2026$p", "DECRQM ANSI": b"\x1b[4$p", "XTVERSION": b"\x1b[>q", "XTVERSION 0": b"\x1b[>0q",
    "DECREQTPARM": b"\x1b[x", "size in cells": b"\x1b[18t", "size in pixels": b"\x1b[14;2t", "title": b"\x1b[21t",
    "kitty keyboard": b"\x1b[?u", "XTQMODKEYS": b"\x1b[?4m", "XTSMGRAPHICS": b"\x1b[?1;1;0S", "DECRQCRA":
    b"\x1b[1;1;1;1;24;80*y", "DECRQPSR": b"\x1b[1$w", "DECRQLP": b"\x1b[1'|", "DECRQSS": b"\x1bP$qm\x1b\\",
    "XTGETTCAP": b"\x1bP+q544e\x1b\\", "background": b"\x1b]11;?\x07", "palette": b"\x1b]4;1;?\x1b\\",
    "some of the palette": b"\x1b]4;1;rgb:00/00/00;2;?\x1b\\", "cursor colour": b"\x1b]12;?\x1b\\",
    "kitty colours": b"\x1b]21;foreground=?;cursor=?\x1b\\", "pointer": b"\x1b]22;?__current__\x1b\\",
    "clipboard": b"\x1b]52;c;?\x07", "kitty clipboard": b"\x1b]5522;type=read;dGV4dA==\x1b\\",
    "iTerm2 cell size": b"\x1b]1337;ReportCellSize\x07", "kitty graphics": b"\x1b_Gi=31,s=1,v=1,a=q;AAAA\x1b\\",
    "notifications": b"\x1b]99;i=1:p=?;\x1b\\", "font": b"\x1b]50;?\x07", "enquiry": b"\x05",
    "C1 CPR": "\x9b6n".encode(), "C1 background": "\x9d11;?\x9c".encode(), "C1 DECRQSS": "\x90$qm\x9c".encode(),
    "leading zeros": b"\x1b]0011;?\x07", "NUL inside": b"\x1b\x00]1\x001;\x00?\x07", "no end but ESC": b"\x1b]11;?",
}  # fmt: skip
CLIPBOARD = {
    "OSC 52": b"\x1b]52;c;aGVsbG8=\x07", "OSC 52 ST": b"\x1b]52;;aGVsbG8=\x1b\\", "zeros": b"\x1b]052;c;eA==\x07",
    "C1": "\x9d52;c;eA==\x9c".encode(), "NUL inside": b"\x1b]5\x002;c;eA==\x07", "kitty": b"\x1b]5522;type=write\x1b\\",
    "iTerm2": b"\x1b]1337;Copy=:eA==\x07", "long": b"\x1b]52;c;" + b"QUJD" * 100_000 + b"\x07",
    "in a tmux passthrough": b"\x1bPtmux;\x1b\x1b]52;c;eA==\x07\x1b\\",
    "ST in a tmux passthrough": b"\x1bPtmux;\x1b\x1b]52;c;eA==\x1b\x1b\\\x1b\\",
}  # fmt: skip
OTHERS = {
    "text": "Größe 5 °C «€» 你好\r\n".encode(), "SGR": b"\x1b[1;38;5;4mx\x1b[m", "cursor style": b"\x1b[4 q",
    "cursor": b"\x1b[5;6H\x1b[2K\x1b[J\x1b[3X\x1b[2@\x1b[2S\x1b[1T", "modes": b"\x1b[?1049h\x1b[?25l\x1b[4h",
    "restore cursor": b"\x1b[u\x1b[s\x1b7\x1b8", "kitty keyboard": b"\x1b[>1u\x1b[<u\x1b[=1;1u",
    "modifyOtherKeys": b"\x1b[>4;2m\x1b[>4n", "title stack": b"\x1b[22;0t\x1b[23;0t", "resize": b"\x1b[8;24;80t",
    "title": b"\x1b]0;what?\x07\x1b]2;?\x1b\\", "set colour": b"\x1b]11;rgb:00/00/00\x07", "link":
    b"\x1b]8;;http://example.org/?a=1\x1b\\x\x1b]8;;\x1b\\", "soft reset": b"\x1b[!p\x1b[62;1\"p", "DECFRA":
    b"\x1b[65;1;1;2;2$x", "DECCRA": b"\x1b[1;1;2;2;1;1;1;1$v", "DECSCA": b'\x1b[1"q', "sixel": b"\x1bPq#0~~\x1b\\",
    "sixel with numbers": b"\x1bP0;1;0q#0~~\x1b\\", "kitty image": b"\x1b_Gi=1,a=T;AAAA\x1b\\", "prompt mark":
    b"\x1b]133;A\x07", "iTerm2 image": b"\x1b]1337;File=inline=1:" + b"QUJD" * 3_000 + b"\x07", "linux cursor":
    b"\x1b[?6c", "pop SGR": b"\x1b[#}\x1b[#{", "reset": b"\x1bc\x1b=\x1b>\x1b(0\x1b(B",
    "lone controls": b"\x18\x1a\x07",
    "DECRC, then n": b"\x1b8n\x1b[1n",
}  # fmt: skip
AROUND = (b"before\x1b[1m", b"\x1b[mafter")


def filtered(data: bytes, mode: str, *, clipboard: bool = False, step: int = 0) -> bytes:
    filter_ = QueryFilter(mode, clipboard=clipboard)
    step = step or max(1, len(data))
    return b"".join(filter_.feed(data[i : i + step]) for i in range(0, len(data), step)) + filter_.flush()


@pytest.mark.parametrize("mode", [REPLAY, PASSIVE], ids=["replay", "passive"])
@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_queries_are_dropped_from_what_this_terminal_must_not_answer(query: bytes, mode: str) -> None:
    data = AROUND[0] + query + AROUND[1]
    assert filtered(data, mode) == AROUND[0] + AROUND[1]
    assert filtered(data, mode, step=1) == AROUND[0] + AROUND[1]
    assert filtered(data, mode, clipboard=True) == AROUND[0] + AROUND[1]


@pytest.mark.parametrize("query", [query for name, query in QUERIES.items() if "clipboard" not in name])
def test_live_queries_reach_the_terminal(query: bytes) -> None:
    data = AROUND[0] + query + AROUND[1]
    assert filtered(data, LIVE) == data
    assert filtered(data, LIVE, step=1) == data


@pytest.mark.parametrize("mode", [REPLAY, PASSIVE, LIVE], ids=["replay", "passive", "live"])
@pytest.mark.parametrize("sequence", CLIPBOARD.values(), ids=CLIPBOARD)
def test_the_clipboard_is_opt_in(sequence: bytes, mode: str) -> None:
    data = AROUND[0] + sequence + AROUND[1]
    assert filtered(data, mode) == AROUND[0] + AROUND[1]
    assert filtered(data, mode, step=7) == AROUND[0] + AROUND[1]
    assert filtered(data, LIVE, clipboard=True) == data


@pytest.mark.parametrize("mode", [REPLAY, PASSIVE, LIVE], ids=["replay", "passive", "live"])
@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_everything_else_is_exact(data: bytes, mode: str) -> None:
    assert filtered(data, mode) == data
    assert filtered(data, mode, step=1) == data


def test_an_opted_in_write_is_replayed() -> None:
    assert filtered(CLIPBOARD["OSC 52"], REPLAY, clipboard=True) == CLIPBOARD["OSC 52"]


def test_controls_within_a_dropped_sequence_are_carried_out() -> None:
    assert filtered(b"a\x1b[\r\n6nb", REPLAY) == b"a\r\nb"


@pytest.mark.parametrize("mode", [REPLAY, LIVE], ids=["replay", "live"])
def test_output_without_sequences_is_the_same_object(mode: str) -> None:
    data = "ordinary output, 5 €\r\n".encode() * 100
    assert QueryFilter(mode).feed(data) is data


@pytest.mark.parametrize(
    ("start", "passes"),
    [
        (b"\x1b]11;", False), (b"\x1b[", False), (b"\x1b]1337;", True), (b"\x1b_Ga=", False), (b"\x1bP", False),
        (b"\x1b", True),
    ],
    ids=lambda value: repr(value)[1:],
)  # fmt: skip
def test_what_is_held_back_is_bounded(start: bytes, passes: bool) -> None:
    filter_ = QueryFilter(REPLAY)
    data = start + b"1" * (3 * SEQUENCE_HELD_MAX_BYTES)
    out = b""
    for index in range(0, len(data), 100):
        out += filter_.feed(data[index : index + 100])
        assert filter_.held_bytes <= SEQUENCE_HELD_MAX_BYTES + 1
    assert out + filter_.flush() == (data if passes else b"")


PADDED = {
    "zeros before 52": (b"\x1b]", b"0", b"52;c;eA==\x07"), "NUL after ESC": (b"\x1b", b"\0", b"]52;c;eA==\x07"),
    "NUL in 52": (b"\x1b]5", b"\0", b"2;c;eA==\x07"), "C1": (b"\xc2\x9d", b"0", b"52;c;eA==\xc2\x9c"),
    "NUL in Copy": (b"\x1b]1337;", b"\0", b"Copy=:eA==\x07"), "tmux": (b"\x1bP", b"\0",
    b"tmux;\x1b\x1b]52;;eA==\x07\x1b\\"),
    "bells": (b"\x1b", b"\x07", b"]52;c;eA==\x07"),
}  # fmt: skip
PADDED_QUERIES = {
    "CPR": (b"\x1b[", b"0", b"6n"), "C1 CPR": (b"\xc2\x9b", b"0", b"6n"), "NUL before CPR": (b"\x1b", b"\0", b"[6n"),
    "DECID": (b"\x1b", b"\0", b"Z"), "DECRQSS": (b"\x1bP", b"0", b"$qm\x1b\\"), "NUL before DECRQSS": (b"\x1b", b"\0",
    b"P$qm\x1b\\"), "graphics": (b"\x1b_G", b"i", b",a=q;AAAA\x1b\\"), "background": (b"\x1b]11;", b"\0", b"?\x07"),
    "background after colours": (b"\x1b]4;1;red;", b"1;red;", b"2;?\x07"),
    "clipboard": (b"\x1b]52;", b"\0", b"c;?\x07"), "cell size": (b"\x1b]1337;", b"\0", b"ReportCellSize\x07"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("sequence", "mode"),
    [
        *((sequence, mode) for sequence in PADDED.values() for mode in (LIVE, PASSIVE, REPLAY)),
        *((sequence, mode) for sequence in PADDED_QUERIES.values() for mode in (PASSIVE, REPLAY)),
    ],
)
@pytest.mark.parametrize("padding", [1, 60, SEQUENCE_HELD_MAX_BYTES - 8, 4_200, 70_000])
def test_padding_hides_nothing(sequence: tuple[bytes, bytes, bytes], mode: str, padding: int) -> None:
    start, filler, rest = sequence
    data = AROUND[0] + start + filler * (padding // len(filler) + 1) + rest + AROUND[1]
    for step in (0, 1_000, 4_097) if padding > 5_000 else (0, 1, 1_000, 4_097):
        out = filtered(data, mode, step=step)
        # What terminals skip within a control sequence may stay, and so may a string's end: it does nothing.
        out = re.sub(rb"\0|\x1b+\\", b"", out)
        assert out == AROUND[0] + AROUND[1], step


@pytest.mark.parametrize("before", [b"\x1b\x07]52;c;eA==\x07", b"\x1bP\0tmux;\x1b\x1b]52;c;eA==\x07\x1b\\"], ids=repr)
def test_a_control_within_an_introducer_hides_nothing(before: bytes) -> None:
    assert filtered(before + b"x", LIVE) == b"x"


@pytest.mark.parametrize("clipboard", [False, True])
def test_long_strings_that_ask_nothing_pass(clipboard: bool) -> None:
    note = b"\x1b]99;i=1:e=1:p=icon;" + b"QUJD" * 3_000 + b"\x1b\\"
    assert filtered(note, REPLAY, clipboard=clipboard) == note
    assert filtered(CLIPBOARD["long"], REPLAY, clipboard=clipboard) == (CLIPBOARD["long"] if clipboard else b"")


def test_a_dropped_string_holds_nothing_however_long() -> None:
    filter_ = QueryFilter(LIVE)
    assert filter_.feed(b"\x1b]52;c;") == b""
    for _ in range(100):
        assert filter_.feed(b"QUJD" * 10_000) == b""
        assert filter_.held_bytes == 0
    assert filter_.feed(b"\x07x") == b"x"


def test_the_mode_can_change_in_the_middle_of_a_sequence() -> None:
    filter_ = QueryFilter(REPLAY)
    assert filter_.feed(b"a\x1b[6") == b"a"
    filter_.mode = LIVE
    assert filter_.feed(b"n\x1b[6n") == b"\x1b[6n\x1b[6n"


KITTY = b'\x1bP@kitty-cmd{"cmd":"launch","payload":{"args":["sh"]}}\x1b\\'


@pytest.mark.parametrize("mode", [REPLAY, PASSIVE, LIVE], ids=["replay", "passive", "live"])
@pytest.mark.parametrize("clipboard", [False, True])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_remote_control_never_passes(mode: str, clipboard: bool, step: int) -> None:
    for sequence in (KITTY, KITTY.replace(b"\x1bP", b"\xc2\x90"), KITTY.replace(b"\x1bP", b"\x1b\x00P")):
        data = AROUND[0] + sequence + AROUND[1]
        assert filtered(data, mode, clipboard=clipboard, step=step) == AROUND[0] + AROUND[1]


def test_what_kitty_answers_passes_live_only() -> None:
    for name in (b"echo|eA==", b"ssh|eA==", b"c", b"cm", b"cx"):
        data = b"a\x1bP@kitty-" + name + b"\x1b\\b"
        for step in (0, 1):
            assert filtered(data, LIVE, step=step) == data
            assert filtered(data, REPLAY, step=step) == filtered(data, PASSIVE, step=step) == b"ab"


def test_an_enquiry_within_hides_nothing() -> None:
    for sequence in (KITTY.replace(b"kit", b"k\x05it"), b"\x1bPtm\x05ux;\x1b\x1b]52;c;eA==\x07\x1b\\"):
        assert filtered(AROUND[0] + sequence + AROUND[1], REPLAY) == AROUND[0] + AROUND[1]


JOINED = {
    "ESC": b"\x1b\x1b]52;c;x\x07]52;c;eA==\x07", "number": b"\x1b]5\x1b]52;c;x\x072;c;eA==\x07",
    "string": b"\x1b]1337;Co\x1b]52;c;x\x07py=:eA==\x07",
    "DCS": b"\x1bPtm\x1b]52;c;x\x07ux;\x1b\x1b]52;c;eA==\x07\x1b\\",
    "kitty": b"\x1bP@kit" + KITTY + b"ty-cmd{}\x1b\\", "C1": b"\xc2\x9d5\x1b]52;c;x\x072;c;eA==\x07",
}  # fmt: skip
JOINED_QUERIES = {
    "CSI": b"\x1b[\x1b[6n6n", "ESC": b"\x1b\x1b[6n[6n", "half of a C1": b"\xc2\xc2\x9b6n\x9b6n",
    "colour": b"\x1b]10;red\x1b[6n;?\x07", "title": b"\x1b]10;red\x1bZ;?\x07",
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        *((data, mode) for data in JOINED.values() for mode in (LIVE, PASSIVE, REPLAY)),
        *((data, mode) for data in JOINED_QUERIES.values() for mode in (PASSIVE, REPLAY)),
    ],
)
def test_what_stands_around_a_dropped_sequence_makes_no_new_one(data: bytes, mode: str) -> None:
    for step in (0, 1, 3):
        out = filtered(data, mode, step=step)
        assert filtered(out, mode) == out
        assert b"\x1b\\" in out


@pytest.mark.parametrize("mode", [REPLAY, LIVE], ids=["replay", "live"])
@pytest.mark.parametrize(
    "piece",
    [b"\xc2\x9b" + b"0" * 4_097, b"\x1b[" + b"0" * 4_097, b"\x1b[6n\x1b[" + b"0" * 4_097],
    ids=["C1", "ESC", "queries between"],
)
@pytest.mark.parametrize("end", [b"", b"\xc2\x9b"], ids=["as it is", "C1 at the end"])
def test_long_sequences_take_linear_time(piece: bytes, mode: str, end: bytes) -> None:
    data = piece * (1024 * 1024 // len(piece)) + end
    start = time.process_time()
    filtered(data, mode)
    # Before, each of them looked through all that follow: a quarter of this took a second.
    assert time.process_time() - start < 1.0
