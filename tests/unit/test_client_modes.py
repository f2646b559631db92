"""Modes that a session leaves on are undone, also those set by sequences that only some terminals understand."""

from __future__ import annotations

import time

import pytest

from sterna.client.terminal import ModeTracker

ALWAYS = (b"\x1b[?1000l", b"\x1b[?1002l", b"\x1b[?1003l", b"\x1b[?1006l", b"\x1b[2l", b"\x1b[12h")
LEFT_ON = {
    "leading zeros": (b"\x1b[?002004h", b"\x1b[?2004l"), "many zeros": (b"\x1b[?" + b"0" * 5_000 + b"1004h",
    b"\x1b[?1004l"), "zeros and the screen": (b"\x1b[?0001049h", b"\x1b[?1049l"), "NUL in the number":
    (b"\x1b[?20\x0004h", b"\x1b[?2004l"), "NUL behind ESC": (b"\x1b\x00[?2004h", b"\x1b[?2004l"), "bell":
    (b"\x1b[?1049\x07h", b"\x1b[?1049l"), "DEL": (b"\x1b[?2004\x7fh", b"\x1b[?2004l"), "newline": (b"\x1b[\n4h",
    b"\x1b[4l"), "C1": (b"\xc2\x9b?2004h", b"\x1b[?2004l"), "C1 and NUL": (b"\xc2\x9b?20\x0004h", b"\x1b[?2004l"),
    "padded": (b"\x1b" + b"\x00" * 9_000 + b"[?2004h", b"\x1b[?2004l"), "win32 input": (b"\x1b[?9001h",
    b"\x1b[?9001l"), "no repeat": (b"\x1b[?8l", b"\x1b[?8h"), "VT52": (b"\x1b[?2l", b"\x1b<"),
    "restored": (b"\x1b[?2004h\x1b[?2004s\x1b[?2004l\x1b[?2004r", b"\x1b[?2004l"),
    "all restored": (b"\x1b[?1049h\x1b[?s\x1b[?1049l\x1b[?r", b"\x1b[?1049l"),
    "restored after a reset": (b"\x1b[?2004h\x1b[?2004s\x1bc\x1b[?2004r", b"\x1b[?2004l"),
    "never stored": (b"\x1b[?25r", b"\x1b[?25h"), "colour": (b"\x1b]00\x0011;red\x07", b"\x1b]111\x1b\\"),
    "colour with zeros": (b"\x1b]0011;red\x07", b"\x1b]111\x1b\\"), "C1 colour": (b"\xc2\x9d11;red\xc2\x9c",
    b"\x1b]111\x1b\\"), "link": (b"\x1b]\x008;;http://a\x07", b"\x1b]8;;\x07"), "charset": (b"\x1b(\x000",
    b"\x1b(B"), "keypad": (b"\x1b\x00=", b"\x1b>"), "region": (b"\x1b[2;\x005r", b"\x1b[r"), "kitty":
    (b"\x1b[>\x001u", b"\x1b[<1u"), "cursor": (b"\x1b[4\x00 q", b"\x1b[ q"), "keys": (b"\x1b[>04;2m", b"\x1b[>4m"),
    "shift inside": (b"\x1b[?2\x0e5h", b"\x0f"), "off for some": (b"\x1b[?2004h\xc2\x9b?2004l", b"\x1b[?2004l"),
    "reset for some": (b"\x1b[?2004h\x1b\x00c", b"\x1b[?2004l"),
}  # fmt: skip


@pytest.mark.parametrize(("output", "undone"), LEFT_ON.values(), ids=LEFT_ON)
@pytest.mark.parametrize("step", [0, 1, 3, 4_096])
def test_what_was_left_on_is_undone(output: bytes, undone: bytes, step: int) -> None:
    modes, around = ModeTracker(), b"before" + output + b"after"
    for start in range(0, len(around), step or len(around)):
        modes.feed(around[start : start + (step or len(around))])
    assert undone in modes.undo()


def test_what_does_no_harm_is_always_undone() -> None:
    modes = ModeTracker()
    modes.feed("plain text, 5 °C, cut: Â".encode()[:-1])
    assert modes.undo() == b""
    modes.feed(b"\xa7\x1b[1m")
    assert all(each in modes.undo() for each in ALWAYS)
    assert b"?2004" not in modes.undo()
    assert not modes.noisy


def test_what_was_undone_by_the_program_is_not_undone_again() -> None:
    modes = ModeTracker()
    modes.feed(b"\x1b[?2004h\x1b[?002004l\x1b[?25l\x1b[?25h\x1b[?1001s\x1b[?1049h\x1b[?1049l\x1b[?1001r\x1b]0;x\x07")
    assert modes.undo() == b"\x1b\\" + b"".join(ALWAYS) + b"\x1b[m"


@pytest.mark.parametrize("piece", [b"\x1b[?" + b"0" * 4_097, b"\x1b\x00" * 2_048, b"\xc2\x9b" + b"\x00" * 4_097])
def test_hostile_output_takes_linear_time(piece: bytes) -> None:
    def takes(size: int) -> float:
        data, best = (piece * (size // len(piece) + 1))[:size], 1e9
        for _ in range(3):
            modes, start = ModeTracker(), time.process_time()
            modes.feed(data)
            best = min(best, time.process_time() - start)
        return best

    assert takes(1024 * 1024) < max(40 * takes(64 * 1024), 0.05)
