"""The simpler engine: what it knows arrives on a real terminal model."""

from __future__ import annotations

import pytest

from sterna.pod.screen_ghostty import GhosttyTerminal
from sterna.pod.screen_pyte import PyteTerminal


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"hello\r\n\x1b[1;31mred\x1b[0m \x1b[44mon blue\x1b[0m", id="styles"),
        pytest.param(b"\x1b[38;2;9;8;7m\x1b[48;2;1;2;3mcolours\x1b[95mbright", id="colours"),
        pytest.param("中文 wide".encode(), id="wide"),
        pytest.param(b"\x1b[?2004h\x1b[?25l\x1b[5;5Hx", id="modes"),
        pytest.param(b"\x1b[2;4r\x1b[3;3Hmargin", id="margins"),
        pytest.param(b"".join(b"line %d\r\n" % n for n in range(20)), id="scroll-back"),
    ],
)
def test_its_snapshot_shows_the_same_elsewhere(stream: bytes) -> None:
    simple, real, repainted = PyteTerminal(40, 6, 100), GhosttyTerminal(40, 6, 100), GhosttyTerminal(40, 6, 100)
    for terminal in (simple, real):
        terminal.feed(stream)
    repainted.feed(simple.snapshot())
    assert repainted.text(scrollback=True) == real.text(scrollback=True)
    assert repainted.cursor() == real.cursor()
    for mode in (25, 2004):
        assert repainted.mode(mode) == real.mode(mode)
    for mine, theirs in zip(repainted.cells(), real.cells(), strict=True):
        for x in range(40):
            a, b = mine.at(x), theirs.at(x)
            if b is not None and b[1].text != " ":
                assert a is not None
                assert a[1] == b[1]


def test_answers_titles_bells_and_ground() -> None:
    terminal = PyteTerminal(40, 6)
    assert terminal.feed(b"ab\x1b[6n") == b"\x1b[1;3R"
    terminal.feed(b"\x1b]2;named\x07\a\a")
    assert terminal.title() == "named"
    assert terminal.bells == 2
    terminal.feed(b"\x1b[3")
    assert not terminal.at_ground()
    terminal.feed(b"1m\xe4")
    assert not terminal.at_ground()
    terminal.feed(b"\xb8\xad")
    assert terminal.at_ground()
    assert terminal.pack() is None


def test_unknown_sequences_cost_only_themselves() -> None:
    terminal = PyteTerminal(40, 6)
    terminal.feed(b"a\x1b[>4;2m\x1b[?1;2;3z\x1bP$qm\x1b\\\x1b[5;5\x1b[Hb\x1b[99999999Cc")
    assert "c" in terminal.text()


def test_resize_keeps_the_text() -> None:
    terminal = PyteTerminal(40, 6)
    terminal.feed(b"kept")
    terminal.resize(20, 4)
    assert (terminal.cols, terminal.rows) == (20, 4)
    assert len(terminal.cells()) == 4
    assert terminal.text().startswith("kept")
    terminal.close()
