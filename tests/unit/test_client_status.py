"""The status line: when it shows, where, and that the terminal afterwards is exactly as the session left it.

The user's terminal is played by the engine that pods use, the model by a second one; both know every cell and mode.
"""

from __future__ import annotations

import random

import pytest

from sterna.cli.screenmodel import EngineModel
from sterna.client.status import OutputTail, StatusLine, cells, cut, unfinished
from sterna.client.terminal import ModeTracker
from sterna.limits import CLIENT_TAIL_BYTES
from sterna.pod.screen_ghostty import GhosttyTerminal
from sterna.units import SECOND

COLS, ROWS = 60, 10
ABSENT = "sterna: no node answers on host … 12 s  (~. and `again`)"
TEXT = "sterna: reconnecting to host … {} s  (~. to give up)"


class Session:
    """A terminal on which a session's output and the status line appear, and one with the output alone."""

    def __init__(self, *, model: bool = True, color: bool = True, unicode: bool = True, before: bytes = b"") -> None:
        self.terminal = GhosttyTerminal(COLS, ROWS)
        self.untouched = GhosttyTerminal(COLS, ROWS)
        for terminal in (self.terminal, self.untouched):
            terminal.feed(before)
        self.tail = OutputTail()
        self.modes = ModeTracker()
        make = EngineModel if model else None
        self.status = StatusLine("host", self.tail, self.modes, make, color=color, unicode=unicode)
        self.now = 0

    def output(self, data: bytes) -> None:
        self.tail.append(data, self.modes.replay)
        self.untouched.feed(data)
        self._write(data)

    def _write(self, data: bytes) -> None:
        self.modes.feed(data)
        self.terminal.feed(data)

    def trouble(self, seconds: int = 1) -> bytes:
        self.status.begin(self.now)
        written = b""
        for _ in range(seconds):
            self.now += SECOND
            written += self.status.handle_timeout(self.now, COLS, ROWS)
        self._write(written)
        return written

    def over(self) -> bytes:
        written = self.status.end()
        self._write(written)
        return written

    def assert_same(self) -> None:
        assert self.terminal.text() == self.untouched.text()
        # And so it stays when the program goes on: the cursor that waits to wrap, the saved cursor, the parser. REP
        # comes after a character, because in the engine, unlike in xterm, it reaches back over control sequences.
        for more in (b"mX", b"\x1b[3b", b"\xe2\x82\xac", b"\x1b8saved\x1b[m", b"\r\n" * ROWS + b"end"):
            self.output(more)
            assert self.terminal.text() == self.untouched.text()
            assert self.terminal.snapshot() == self.untouched.snapshot()

    def lines(self) -> list[str]:
        return (self.terminal.text() + "\n" * ROWS).split("\n")[:ROWS]


CLEAR = b"\x1b[H\x1b[2J\x1b[m"
FULL = CLEAR + b"".join(b"\x1b[%d;1H\x1b[3%dmrow %d %s" % (row + 1, row % 8, row, b"x" * 40) for row in range(ROWS))
SCREENS = {
    "a prompt": CLEAR + b"$ ls\r\na b c\r\n$ ",
    "a prompt after a flood": b"line\r\n" * 200 + b"$ ",
    "all rows used": FULL + b"\x1b[m\x1b[5;3H",
    "alternate screen": b"$ vi\r\n\x1b[?1049h" + FULL + b"\x1b[?25l\x1b[2;2H",
    "saved cursor with a style": CLEAR + b"\x1b[4;4H\x1b[1;35m\x1b7\x1b[m\x1b[2;2Habc",
    "a style at the cursor": CLEAR + b"text \x1b[1;4;38;5;200;48;2;1;2;3m",
    "waiting to wrap": CLEAR + b"$ " + b"\x1b[32m" + b"w" * (COLS - 2),
    "waiting to wrap, all rows used": FULL + b"\x1b[4;1H\x1b[7m" + b"w" * COLS,
    "line drawing": CLEAR + b"\x1b(0lqqk",
    "shifted to line drawing": CLEAR + b"\x1b)0\x0elqqk",
    "insert mode": CLEAR + b"abcdef\x1b[4h\x1b[1;3H",
    "scroll region": CLEAR + b"\x1b[2;5r\x1b[3;3Hin it",
    "a background in every blank row": CLEAR + b"\x1b[44m\x1b[2J\x1b[3;3H",
    "wide characters": CLEAR + "\x1b[1;1H你好\x1b[2;1H".encode() + "宽".encode() * (COLS // 2),
    "combining characters": FULL + "\x1b[1;1He\u0301e\u0301\x1b[7;1H".encode(),
    "a link": CLEAR + b"\x1b]8;;http://example.org\x1b\\link",
    "no wrapping": CLEAR + b"\x1b[?7l" + b"n" * 200,
    "cut before REP": CLEAR + b"abc-\x1b[5",
    "cut before REP, wide": CLEAR + b"\x1b[44m" + "ab你".encode() + b"\x1b[",
    "cut in CSI": CLEAR + b"abc\x1b[3",
    "cut after ESC": CLEAR + b"abc\x1b",
    "cut in a title": CLEAR + b"abc\x1b]0;new ti",
}


@pytest.mark.parametrize("output", SCREENS.values(), ids=SCREENS)
def test_it_is_shown_and_leaves_no_trace(output: bytes) -> None:
    session = Session()
    session.output(output)
    session.trouble(11)
    # Text is printed in a charset of its own only while the program prints.
    assert any(TEXT.format(11) in line for line in session.lines())
    session.status.absent = "~. and `again`"
    session.trouble()
    assert any(line.rstrip() == ABSENT for line in session.lines())
    session.over()
    assert not session.status.visible
    if output == SCREENS["cut in a title"]:
        session.output(b"tle\x07")
        assert session.terminal.title() == "new title"
    if output in (SCREENS["cut before REP"], SCREENS["cut before REP, wide"]):
        session.output(b"b")
        assert session.terminal.text() == session.untouched.text()
        assert session.untouched.text().split("\n")[0] in ("abc------", "ab你你")
    session.assert_same()


def test_the_control_without_erasing_the_screens_differ() -> None:
    session = Session()
    session.output(SCREENS["a prompt"])
    session.trouble()
    with pytest.raises(AssertionError):
        session.assert_same()


def test_nothing_is_written_in_the_first_second() -> None:
    session = Session()
    session.output(SCREENS["a prompt"])
    session.status.begin(100)
    assert session.status.next_timeout() == 100 + SECOND
    assert session.status.handle_timeout(99 + SECOND, COLS, ROWS) == b""
    assert session.over() == b""
    assert session.status.next_timeout() is None
    session.assert_same()


def test_it_is_updated_once_a_second_and_begins_afresh() -> None:
    session = Session()
    session.output(SCREENS["a prompt"])
    session.trouble()
    session.status.begin(session.now)  # no second beginning
    assert session.status.next_timeout() == 2 * SECOND
    assert session.status.handle_timeout(2 * SECOND - 1, COLS, ROWS) == b""
    assert b" 7 s" in session.status.handle_timeout(7 * SECOND + 5, COLS, ROWS)
    assert session.status.next_timeout() == 8 * SECOND
    session.over()
    session.now = 50 * SECOND
    assert b" 1 s" in session.trouble()


def test_the_lowest_blank_row_is_taken_else_the_first() -> None:
    session = Session()
    session.output(SCREENS["a prompt"])
    session.trouble()
    assert session.lines()[ROWS - 1] == TEXT.format(1)
    session = Session()
    session.output(FULL)
    session.trouble()
    assert session.lines()[0].startswith(TEXT.format(1))
    session = Session()
    session.output(FULL + b"\x1b[1;1H")  # not the cursor's row where that is not blank
    session.trouble()
    assert session.lines()[1].startswith(TEXT.format(1))


def test_where_lines_roll_by_the_cursors_own_blank_row_is_taken_and_no_line_appears_twice() -> None:
    session = Session()
    session.output(CLEAR + b"".join(b"line %d\r\n" % number for number in range(3 * ROWS)))
    assert b"line" not in session.trouble(3)
    assert session.lines()[ROWS - 1].startswith(TEXT.format(3))
    assert b"line" not in session.over()
    session.assert_same()


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(b"", id="nothing was written yet"),
        pytest.param(b"abc", id="the cursor is somewhere"),
        pytest.param(b"\x1b[3;1H", id="only the cursor is known"),
        pytest.param(CLEAR + b"\x1b[2;5r\x1b[?6h\x1b[1;1Hx", id="origin mode"),
        pytest.param(CLEAR + b"\x1b[?69h\x1b[5;20sx", id="left and right margins"),
    ],
)
def test_an_unknown_screen_is_not_touched_but_the_title_is(output: bytes) -> None:
    before = b"\x1b]0;old\x07\x1b[2;3H" + b"what was there before" * 10
    session = Session(before=before)
    session.output(output)
    written = session.trouble(2)
    assert written.startswith(b"\x1b[22;0t\x1b]0;sterna: reconnecting to host")
    assert written.count(b"\x1b[22;0t") == 1
    assert session.terminal.title().startswith("sterna: reconnecting")
    assert session.terminal.text() == session.untouched.text()
    assert session.over() == b"\x1b[23;0t"


def test_without_a_model_the_title_is_used() -> None:
    session = Session(model=False)
    session.output(FULL)
    assert session.trouble().startswith(b"\x1b[22;0t\x1b]0;")
    assert session.over() == b"\x1b[23;0t"


def test_a_model_that_fails_is_no_failure() -> None:
    def broken(cols: int, rows: int) -> EngineModel:
        raise ImportError("no engine")

    status = StatusLine("host", OutputTail(), ModeTracker(), broken)
    status.begin(0)
    assert status.handle_timeout(SECOND, COLS, ROWS).startswith(b"\x1b[22;0t")


def test_only_rows_that_are_known_are_touched() -> None:
    session = Session(before=b"\x1b[7mbefore" * 100)
    session.output(b"\x1b[m\x1b[4;1H\x1b[2K\x1b[6;1Hhere")
    session.trouble()
    assert session.lines()[3] == TEXT.format(1)
    session.over()
    session.assert_same()


def test_in_the_middle_of_a_character_nothing_is_written() -> None:
    session = Session()
    session.output(CLEAR + "x€".encode()[:-1])
    assert session.trouble(3) == b""
    session.output("€".encode()[-1:])
    assert TEXT.format(4).encode() in session.trouble()
    session.over()
    session.assert_same()


def test_no_color_and_no_unicode() -> None:
    session = Session(color=False, unicode=False)
    session.output(SCREENS["a prompt"])
    written = session.trouble()
    assert b"sterna: reconnecting to host ... 1 s" in written
    assert b"\x1b[0;2;7m" not in written
    coloured = Session()
    coloured.output(SCREENS["a prompt"])
    assert b"\x1b[0;2;7msterna: reconnecting to host \xe2\x80\xa6 1 s" in coloured.trouble()


@pytest.mark.parametrize("cols", [2, 3, 20, 49, 50], ids=str)
def test_it_is_cut_and_never_wraps_or_scrolls(cols: int) -> None:
    terminal, untouched = GhosttyTerminal(cols, 3), GhosttyTerminal(cols, 3)
    tail, modes = OutputTail(), ModeTracker()
    status = StatusLine("主机主机", tail, modes, EngineModel)
    for known in (terminal, untouched):
        known.feed(CLEAR)
    tail.append(CLEAR, b"")
    status.begin(0)
    terminal.feed(status.handle_timeout(SECOND, cols, 3))
    lines = terminal.text(scrollback=True).split("\n")
    assert len(lines) == 3
    assert lines[:2] == ["", ""]
    assert lines[2]
    assert "sterna: reconnecting to 主机主机 …".startswith(lines[2][:20].rstrip())
    terminal.feed(status.end() + b".")
    untouched.feed(b".")
    assert terminal.snapshot() == untouched.snapshot()


@pytest.mark.parametrize("alternate", [True, False], ids=["alternate", "main"])
def test_after_a_resize_the_title_takes_over(alternate: bool) -> None:
    session = Session()
    session.output((b"\x1b[?1049h" if alternate else b"") + SCREENS["a prompt"])
    session.trouble()
    for terminal in (session.terminal, session.untouched):
        terminal.resize(COLS + 10, ROWS)
    session.tail.resized(b"")
    session.now += SECOND
    session._write(session.status.handle_timeout(session.now, COLS + 10, ROWS))
    assert session.terminal.text() == session.untouched.text()
    assert session.terminal.title().startswith("sterna: reconnecting to host")
    assert session.over() == b"\x1b[23;0t"


def test_random_screens() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    # The engine gives wide characters in line-drawing mode a look of its own.
    wide, drawing = ("你", "😀", "e\u0301"), ("\x1b(0", "\x1b(B", "\x0e", "\x0f", "\x1b)0")
    atoms = (
        "\r\n", "\n", "\b", "\t", "word", "\x1b7", "\x1b8", "\x1b[K", "\x1b[J", "\x1b[2J", "\x1b[H",
        "\x1b[L", "\x1b[M", "\x1b[P", "\x1b[@", "\x1bM", "\x1b[2;7r", "\x1b[r", "\x1b[?7l", "\x1b[?7h",
        "\x1b[s", "\x1b[u", "\x1b[4h", "\x1b[4l", "\x1b[?1049h", "\x1b[?1049l", "\x1b[?6h", "\x1b[?6l", "\x1b[!p",
    )  # fmt: skip
    for _ in range(150):
        session = Session(before=b"\x1b[31mbefore" * rng.randrange(100) + b"\x1b[m")
        extra = rng.choice((wide, drawing))
        if rng.random() < 0.7:
            session.output(CLEAR)
        for _ in range(rng.randrange(60)):
            kind = rng.random()
            if kind < 0.2:
                piece = f"\x1b[{rng.randrange(1, ROWS + 1)};{rng.randrange(1, COLS + 1)}H"
            elif kind < 0.4:
                piece = f"\x1b[{rng.choice(('', '0', '1;4', '7', '31', '48;5;20', '0;2'))}m"
            elif kind < 0.5:
                piece = "w" * rng.randrange(2 * COLS)
            else:
                piece = rng.choice(atoms + extra)
            session.output(piece.encode())
        session.trouble(rng.randrange(1, 3))
        title = session.status._title
        session.over()
        if title:
            assert session.terminal.text() == session.untouched.text()
        else:
            assert _cells(session.terminal) == _cells(session.untouched)
            session.output(b"\x1b[1mX\x1b8Y")
            assert _cells(session.terminal) == _cells(session.untouched)


def test_no_soft_wrapped_line_is_painted_over() -> None:
    wrapped = b"w" * (3 * COLS - 5)
    session = Session()
    session.output(CLEAR + wrapped + b"\r\nits own row\r\n" + wrapped + b"\r\n" + wrapped[: 2 * COLS] + b"\r\n$ ")
    session.trouble()
    assert session.lines()[3].startswith("sterna: ")
    session.over()
    joins = [[row.wrapped for row in terminal.cells()] for terminal in (session.terminal, session.untouched)]
    assert joins[0] == joins[1]
    assert joins[0].count(True) == 5
    # With no row of its own, it is the title's turn.
    session = Session()
    session.output(CLEAR + b"w" * (ROWS * COLS))
    session.trouble()
    assert "sterna: " not in session.terminal.text()
    assert session.terminal.title().startswith("sterna: ")


def _cells(terminal: GhosttyTerminal) -> list[list[object]]:
    """Every cell with its look. Whether a line that was repainted goes on softly in the next one is lost."""
    return [list(row.runs) for row in terminal.cells()]


def test_the_tail_is_bounded_and_forgets_what_was_for_another_size() -> None:
    tail = OutputTail()
    for size in (*range(1, 1000), CLIENT_TAIL_BYTES, 1):
        tail.append(b"x" * size, b"")
    assert CLIENT_TAIL_BYTES <= len(tail.data()) < 2 * CLIENT_TAIL_BYTES
    tail.append(b"\x1b[3", b"")
    tail.resized(b"")
    assert tail.data() == b"\x1b[3"
    tail.append(b"1m", b"")
    tail.resized(b"")
    assert tail.data() == b""
    tail.append("€".encode()[:2], b"")
    tail.resized(b"")
    assert unfinished(tail.data()) is None


@pytest.mark.parametrize(
    ("output", "styled"),
    [
        pytest.param([b"text"], False, id="none"),
        pytest.param([b"\x1b[31mred"], True, id="set"),
        pytest.param([b"\x1b[31mred\x1b[m\x1b[K"], False, id="set and reset"),
        pytest.param([b"\x1b[31mred\x1b[0m", b"text"], False, id="reset, then text"),
        pytest.param([b"\x1b[31mred", b"text\x1b[K"], True, id="set, then text"),
        pytest.param([b"\x1b[m\x1b8"], True, id="a restored cursor"),
        pytest.param([b"\x1b[m\x1b[3", b"1m"], True, id="cut"),
    ],
)
def test_the_style_where_the_tail_begins(output: list[bytes], styled: bool) -> None:
    tail = OutputTail(100)
    for piece in [*output, b"x" * 100]:
        tail.append(piece, b"")
    assert tail.data() == b"x" * 100
    assert tail.styled is styled


@pytest.mark.parametrize(
    ("data", "rest"),
    [
        pytest.param(b"text", b"", id="text"),
        pytest.param(b"\x1b[31m", b"", id="complete"),
        pytest.param(b"x\x1b", b"\x1b", id="ESC"),
        pytest.param(b"x\x1b[31;", b"\x1b[31;", id="CSI"),
        pytest.param(b"\x1b]0;abc", b"\x1b]0;abc", id="OSC"),
        pytest.param(b"\x1b]0;abc\x07", b"", id="OSC with BEL"),
        pytest.param(b"\x1b]0;abc\x1b\\", b"", id="OSC with ST"),
        pytest.param(b"\x1bP1$r\x07", b"\x1bP1$r\x07", id="BEL does not end DCS"),
        pytest.param(b"\x1b(", b"\x1b(", id="designation"),
        pytest.param(b"\x1bPq" + b"~" * 5000, None, id="a long image"),
        pytest.param("€".encode()[:1], None, id="a third of a character"),
        pytest.param("😀".encode()[:3], None, id="three quarters of one"),
        pytest.param(b"\xff", None, id="no UTF-8 at all"),
    ],
)
def test_unfinished(data: bytes, rest: bytes | None) -> None:
    assert unfinished(data) == rest


def test_widths() -> None:
    assert [cells(text) for text in ("abc", "你好", "e\u0301", "…", "")] == [3, 4, 1, 1, 0]
    assert [cut("你好ab", width) for width in range(7)] == ["", "", "你", "你", "你好", "你好a", "你好ab"]


def test_the_line_says_that_the_node_stops() -> None:
    status = StatusLine("host", OutputTail(), ModeTracker(), EngineModel)
    status.begin(0, "the node stops, ")
    assert "sterna: the node stops, reconnecting to host … 2 s" in status.handle_timeout(2 * 10**9, 80, 24).decode()
    status.end()
    status.begin(0)
    assert "sterna: reconnecting to host … 2 s" in status.handle_timeout(2 * 10**9, 80, 24).decode()
