"""The terminal engine: answers, and what a snapshot has to bring over, one by one."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from sterna.client.queries import REPLAY, QueryFilter
from sterna.pod import libghostty
from sterna.pod.screen_ghostty import GhosttyTerminal
from sterna.pod.snapshot import MODES


def repainted(
    stream: bytes, later: bytes = b"", cols: int = 20, rows: int = 5
) -> tuple[GhosttyTerminal, GhosttyTerminal]:
    """Feeds one terminal, another one from its snapshot, and both with what comes later."""
    one, other = GhosttyTerminal(cols, rows, 100), GhosttyTerminal(cols, rows, 100)
    one.feed(stream)
    snapshot = one.snapshot()
    assert not one.at_ground() or QueryFilter(REPLAY).feed(snapshot) == snapshot, "a client takes nothing from it"
    other.feed(snapshot)
    assert one.feed(later) == other.feed(later)
    assert one.cells(scrollback=True) == other.cells(scrollback=True)
    assert one.cursor() == other.cursor()
    assert one.snapshot() == other.snapshot()
    return one, other


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        (b"\x1b[c", b"\x1b[?62;22c"),
        (b"\x1b[>c", b"\x1b[>1;0;0c"),
        (b"\x1b[5n", b"\x1b[0n"),
        (b"ab\r\n\x1b[6n", b"\x1b[2;1R"),
        (b"\x1b[?2004h\x1b[?2004$p", b"\x1b[?2004;1$y"),
        (b"\x1b[1;31m\x1bP$qm\x1b\\", b"\x1bP1$r0;1;31m\x1b\\"),
        (b"\x1b[18t", b"\x1b[8;5;20t"),
        (b"\x1b[?u", b"\x1b[?0u"),
        (b"plain", b""),
    ],
)
def test_answers(query: bytes, answer: bytes) -> None:
    assert GhosttyTerminal(20, 5).feed(query) == answer


def test_names_itself() -> None:
    assert GhosttyTerminal(20, 5).feed(b"\x1b[>q").startswith(b"\x1bP>|")


@pytest.mark.parametrize(
    ("stream", "later"),
    [
        pytest.param(b"\x1b[3;4H\x1b[31m\x1b7\x1b[H\x1b[m", b"\x1b8x", id="saved-cursor"),
        pytest.param(b"\x1b[2;4r\x1b[?6h\x1b7\x1b[?6l", b"\x1b8x\x1b[H\n\n\ny", id="saved-origin-mode"),
        pytest.param(b"\x1b[2;4r\x1b[?6h\x1b[2;3H", b"x\x1b[9;9Hy", id="origin-mode"),
        pytest.param(b"main\r\n\x1b[?1049halt", b"!\x1b[?1049l$", id="main-below-alternate"),
        pytest.param(b"main\x1b[3;3H\x1b[?47h\x1b[Halt", b"!\x1b[?47l$", id="old-alternate"),
        pytest.param(b"x" * 20, b"y", id="pending-wrap"),
        pytest.param(b"\x1b[3;1H" + b"x" * 20 + b"\x1b7\x1b[H", b"\x1b8y", id="saved-pending-wrap"),
        pytest.param("x" * 18 + "中", "文", id="pending-wrap-wide"),
        pytest.param("x" * 19 + "中", "文", id="spacer-before-wide"),
        pytest.param(b"\x1b[44m" + b"x" * 50 + b"\x1b[m", b"\x1b[K", id="background-over-a-wrap"),
        pytest.param(b"x" * 30 + b"\x1b[1;15H\x1b[1J", b"y", id="wrapped-line-with-erased-begin"),
        pytest.param(b"x" * 30 + b"\x1b[1;10H\x1b[9@", b"y", id="wrapped-line-with-erased-end"),
        pytest.param(b"\x1b[44m\x1b[2J\x1b[41m\x1b[2;2H\x1b[3X\x1b[m", b"", id="erased-with-background"),
        pytest.param(b"\x1b[4:3;58;5;9;38;5;100;48;2;1;2;3;53mx\x1b[m\x1b[21my\x1b[2;5;7;8;9mz", b"w", id="styles"),
        pytest.param(b"\x1b]8;;http://a/b\x07link\x1b]8;;\x07 no \x1b]8;;http://c\x07", b"x", id="hyperlinks"),
        pytest.param(b"\x1b(0qqq\x1b(B\x1b)0", b"\x0eqqq\x0f", id="designated-set"),
        pytest.param(b"\x1b)0\x0e", b"lqk", id="shifted-set"),
        pytest.param(b"\x1b[3g\x1b[5G\x1bH\x1b[11G\x1bH\r", b"\ta\tb", id="tab-stops"),
        pytest.param(b"\x1b[?69h\x1b[5;10s\x1b[2;6H", b"hello world", id="left-and-right-margins"),
        pytest.param(b"abc\x1b[4h\x1b[1;2H", b"XY", id="insert-mode"),
        pytest.param(b"\x1b[?7l", b"y" * 30, id="no-autowrap"),
        pytest.param(b"\x1b[?1000;1006;2004;1004h\x1b[?1h\x1b=\x1b[?25l", b"", id="input-modes"),
        pytest.param(b"\x1b[?2004h\x1b[?2004s\x1b[?2004l", b"\x1b[?2004r\x1b[?2004$p", id="xtsave"),
        pytest.param(b"\x1b[5 q", b"", id="cursor-shape"),
        pytest.param(b"\x1b[5 q\x1b[?1049h\x1b[3 q", b"\x1b[?1049l", id="cursor-shape-of-each-screen"),
        pytest.param(b"\x1b]4;3;#112233\x07\x1b]10;#445566\x07", b"\x1b]4;3;?\x07\x1b]10;?\x07", id="colours"),
        pytest.param(b"\x1b[=3;1u\x1b[>5u", b"\x1b[?u\x1b[<u\x1b[?u", id="keyboard-stack"),
        pytest.param(b"\x1b[>4;2m", b"", id="modify-other-keys"),
        pytest.param(b'\x1b[1"qsafe\x1b[0"q not', b"\x1b[?2J", id="protected"),
        pytest.param(b"ab-\x1b[3;3H", b"\x1b[5b", id="repeat"),
        pytest.param(b"Z\x1b[2J\x1b[3;3H", b"\x1b[5b", id="repeat-of-an-erased-one"),
        pytest.param(b"\x1b]7;file://host/dir\x07\x1b]2;a title\x07", b"", id="title-and-directory"),
        pytest.param("\x1b[?2027he\u0301 👍🏽 👩\u200d💻".encode(), b"x", id="clusters"),
        pytest.param(b"one\r\n" * 30, b"two\r\n", id="scroll-back"),
        pytest.param(b"\x1b[5;1H\x1b[45m\n\n\x1b[m", b"x", id="scrolled-background"),
    ],
)
def test_a_snapshot_brings_it_over(stream: bytes | str, later: bytes | str) -> None:
    repainted(
        stream if isinstance(stream, bytes) else stream.encode(), later if isinstance(later, bytes) else later.encode()
    )


def test_a_snapshot_cleans_a_terminal_in_any_state() -> None:
    one = GhosttyTerminal(20, 5, 100)
    one.feed(b"clean\r\n$ ")
    dirty = GhosttyTerminal(20, 5, 100)
    dirty.feed(
        b"x\r\n" * 30 + b"\x1b[?1049h\x1b[2;3r\x1b[?6h\x1b[4h\x1b(0\x1b[41m\x1b[?1003;1006h\x1b[?7l\x1b]2;unfinis"
    )
    dirty.feed(one.snapshot())
    assert dirty.cells(scrollback=True) == one.cells(scrollback=True)
    assert dirty.snapshot() == one.snapshot()


def test_without_scroll_back_the_lines_above_stay() -> None:
    one, other = GhosttyTerminal(20, 5, 100), GhosttyTerminal(20, 5, 100)
    one.feed(b"session\r\n" * 9)
    other.feed(b"mine\r\n" * 9)
    other.feed(one.snapshot(scrollback=False))
    assert other.cells() == one.cells()
    assert "mine" in other.text(scrollback=True)


@pytest.mark.parametrize("entered", [b"", b"\x1b[?1049h\x1b[Halt"], ids=["main", "alternate"])
def test_a_lower_terminal_gets_no_lines_into_its_scroll_back(entered: bytes) -> None:
    one, other = GhosttyTerminal(20, 9, 100), GhosttyTerminal(20, 5, 100)
    one.feed(b"a line that is wrapped\r\n" + b"".join(b"%d\r\n" % line for line in range(6)) + b"$ " + entered)
    other.feed(b"mine\r\n" * 9)
    above = other.text(scrollback=True).split("\n")[:-5]
    for _ in range(3):
        other.feed(one.snapshot(scrollback=False))
        assert other.state().margins == b""
    other.feed(b"\x1b[?1049l")
    shown = ["a line that is wrapp", "ed", "4", "5", "$"]
    assert other.text(scrollback=True).split("\n") == above + shown


@pytest.mark.parametrize("cols", [80, 81], ids=["none in the last column", "one there"])
def test_tab_stops_of_a_wider_terminal_leave_none_in_the_last_column(cols: int) -> None:
    one, other, same = (GhosttyTerminal(columns, 5, 100) for columns in (cols, 33, cols))
    one.feed(b"\x1b[81G\x1bH\r" if cols == 81 else b"")
    for each in (other, same):
        each.feed(one.snapshot())
    assert same.state().tab_stops == one.state().tab_stops
    stops = [b"\x1b[%dG\x1bH" % column for column in (9, 17, 25, 33)]
    assert other.state().tab_stops == b"\x1b[3g" + b"".join(stops[: 4 if cols == 81 else 3])
    other.feed(b"\r\t\t\t\tx")
    assert other.cursor() == (32, 0), "a tab goes there without a stop, too"


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (b"\xe4\xb8", b"\xad"),
        (b"\x1b", b"[31m"),
        (b"\x1b[38;5", b";9m"),
        (b"\x1b]2;half a ti", b"tle\x07"),
        (b"\x1bP$q", b"m\x1b\\"),
        (b"\x1b_G", b"a=q;\x1b\\"),
    ],
)
def test_a_snapshot_within_a_sequence_goes_on_with_it(begin: bytes, end: bytes) -> None:
    terminal = GhosttyTerminal(20, 5)
    terminal.feed(b"text" + begin)
    assert not terminal.at_ground()
    one, _ = repainted(b"text" + begin, end + b"x")
    assert one.at_ground()
    packed = GhosttyTerminal(20, 5, 100, packed=terminal.pack())
    packed.feed(end + b"x")
    assert packed.cells() == one.cells()
    assert packed.title() == one.title()


def test_soft_wraps_survive_so_that_resizing_reflows() -> None:
    one, other = repainted(b"a line longer than twenty cells is wrapped\r\nnext")
    one.resize(50, 5)
    other.resize(50, 5)
    assert one.text().startswith("a line longer than twenty cells is wrapped\nnext")
    assert one.cells() == other.cells()


@pytest.mark.parametrize("size", [(110, 40), (90, 30), (80, 24), (60, 40), (80, 7)])
@pytest.mark.parametrize("last", ["abcdefghijklmnopqrs\r\n", "a" * 80, "x" * 80 + "\x1b7\r\n", "cut\x1b[3"])
def test_a_last_snapshot_is_right_in_another_size_too(last: str, size: tuple[int, int]) -> None:
    one, seen = GhosttyTerminal(80, 24), GhosttyTerminal(*size)
    one.feed(f"{'wraps':<83}\r\nabcdefghij\r\n{last}".encode())
    seen.feed(one.snapshot(final=True))
    one.resize(*size)
    assert seen.text() == one.text()
    row = seen.cursor()[1]
    assert not any(seen.text().splitlines()[row + 1 :]), "what is said next stands below"
    seen.feed(b"\r\n!")
    assert "!" in seen.text().splitlines()[row + 1], "no sequence goes on"


def test_a_last_snapshot_of_the_alternate_screen_has_its_text_and_cursor() -> None:
    one, seen = GhosttyTerminal(80, 24), GhosttyTerminal(80, 24)
    one.feed(b"main\x1b[?1049h\x1b[2;20r\x1b[?6h\x1b[3;5Hhere" + b"\x1b[1;80Hx")
    seen.feed(one.snapshot(final=True))
    assert (seen.text(), seen.cursor()) == (one.text(), one.cursor())
    seen.feed(b"\x1b[?1049l")
    assert seen.text().rstrip() == "main"


@pytest.mark.parametrize("lines", [3, 100])
def test_a_last_snapshot_after_a_clear_leaves_what_scrolled_out_above(lines: int) -> None:
    one, seen = GhosttyTerminal(80, 24), GhosttyTerminal(80, 24)
    one.feed(b"line\r\n" * lines + b"\x1b[H\x1b[2Jtop\r\n\r\n\x1b[44m \x1b[m\x1b[1;2H")
    seen.feed(one.snapshot(final=True))
    assert (seen.text(scrollback=True), seen.cursor()) == (one.text(scrollback=True), one.cursor())
    assert seen.cells() == one.cells()


def test_titles_lose_control_characters_in_a_snapshot() -> None:
    terminal = GhosttyTerminal(20, 5)
    terminal.feed(b"\x1b]2;good\x07")
    assert terminal.title() == "good"
    assert b"\x1b]2;good\x1b\\" in terminal.snapshot()


@pytest.mark.parametrize(
    "hidden", ["\x9d52;c;eA==\x9c".encode(), b"\xc2\xc2\x9d\x9d52;c;eA==", b"\xc2\x00\x9d52;c;eA=="], ids=repr
)
@pytest.mark.parametrize("where", [b"\x1b]2;", b"\x1b]7;file://host/", b"\x1b]8;;http://example.org/"], ids=repr)
def test_nothing_is_planted_for_whoever_attaches_later(where: bytes, hidden: bytes) -> None:
    terminal = GhosttyTerminal(20, 5)
    terminal.feed(b"text" + where + hidden + b"\x1b\\more")
    snapshot = terminal.snapshot()
    assert QueryFilter(REPLAY).feed(snapshot) == snapshot
    assert not any(b"\xc2%c" % byte in snapshot for byte in range(0x80, 0xA0))


def test_terminals_in_several_threads_keep_their_answers_apart() -> None:
    def ask(rows: int) -> set[bytes]:
        terminal = GhosttyTerminal(20, rows)
        return {terminal.feed(b"x" * 50_000 + b"\x1b[18t") for _ in range(300)}

    with ThreadPoolExecutor(4) as pool:
        for rows, answers in zip(range(5, 9), pool.map(ask, range(5, 9)), strict=True):
            assert answers == {b"\x1b[8;%d;20t" % rows}


def test_bells_are_counted() -> None:
    terminal = GhosttyTerminal(20, 5)
    terminal.feed(b"\a\a x \a")
    assert terminal.bells == 3


def test_defaults_are_the_ones_a_snapshot_takes_for_granted() -> None:
    terminal = GhosttyTerminal(20, 5)
    assert {number: terminal.mode(number) for number in MODES} == MODES


def test_scroll_back_is_bounded_by_lines() -> None:
    terminal = GhosttyTerminal(20, 5, 50)
    for number in range(5000):
        terminal.feed(b"line %d\r\n" % number)
    rows = terminal.cells(scrollback=True)
    assert len(rows) == 55
    assert rows[0].text().startswith("line 4946")
    assert len(terminal.pack()) < 100_000, "the library drops whole pages of lines"


def test_garbage_is_no_packed_terminal() -> None:
    good = GhosttyTerminal(20, 5).pack()
    for bad in (b"", b"GHOSTSNP", good[:-5], good[:40] + bytes([good[40] ^ 0xFF]) + good[41:]):
        with pytest.raises(ValueError, match="packed"):
            GhosttyTerminal(20, 5, packed=bad)


def test_a_missing_or_foreign_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    with pytest.raises(libghostty.EngineMissingError, match="cannot be used"):
        libghostty.Library(f"{tmp_path}/nothing.so")
    monkeypatch.setattr(libghostty, "_CELL_BITS", {"wide": (40, 2)})
    with pytest.raises(libghostty.EngineMissingError, match=r"GhosttyCell\.wide"):
        libghostty.load.__wrapped__()


@pytest.mark.parametrize("cols", [60, 80, 128])
def test_new_rows_come_from_what_has_scrolled_out(cols: int) -> None:
    terminal = GhosttyTerminal(cols, 15)
    terminal.feed(b"".join(b"line %d\r\n" % number for number in range(100)) + b"$ ")
    terminal.resize(80, 24)
    assert terminal.text().split("\n") == [*(f"line {number}" for number in range(77, 100)), "$"]


# ---- lines above the screen, through rests -------------------------------------------------------------------------


def colorful(number: int, count: int) -> bytes:
    """A line of `count` characters, each of a colour of its own."""
    r = random.Random(number)
    cells = b"".join(b"\x1b[38;2;%d;%d;%dmx" % (*r.randbytes(3),) for _ in range(count))
    return b"%05d %b\x1b[m\r\n" % (number, cells)


def kept(terminal: GhosttyTerminal) -> list[int]:
    """The numbers of the lines that the terminal still has."""
    return [int(line[:5]) for line in terminal.text(scrollback=True).split("\n") if line]


@pytest.mark.parametrize(("colors", "lines", "rests"), [(0, 5, 100), (8, 5, 100), (70, 8, 60), (70, 50, 20)])
def test_a_program_that_rests_often_keeps_its_lines(colors: int, lines: int, rests: int) -> None:
    terminal = GhosttyTerminal(80, 24)
    for number in range(lines * rests):
        terminal.feed(colorful(number, colors))
        if number % lines == 0:
            packed = terminal.pack()
            terminal.close()
            terminal = GhosttyTerminal(80, 24, packed=packed)
    assert kept(terminal) == list(range(lines * rests))


@pytest.mark.parametrize("alternate", [False, True])
def test_what_is_packed_and_drawn_has_all_lines_and_takes_none(alternate: bool) -> None:
    """Also where they take all the memory that they may: some 2,000 lines full of colours."""
    terminal = GhosttyTerminal(80, 24)
    for number in range(3_000):
        terminal.feed(colorful(number, 70))
    lines = kept(terminal)
    assert 1_500 < len(lines) < 3_000
    if alternate:
        terminal.feed(b"\x1b[?1049h")
    copy, painted = GhosttyTerminal(80, 24, packed=terminal.pack()), GhosttyTerminal(80, 24)
    painted.feed(terminal.snapshot())
    for one in (terminal, copy, painted):
        one.feed(b"\x1b[?1049l")
        assert kept(one) == lines


def test_pieces_do_not_let_a_flood_keep_more_than_it_may() -> None:
    terminal = GhosttyTerminal(80, 24, 2_000)
    for number in range(600):
        terminal.feed(b"\x1b[?1049h\x1b[?1049l" if number % 3 else b"line\r\n")
        if number % 3 == 1:
            terminal.feed(b"\x1b[?1049h")
        terminal = GhosttyTerminal(80, 24, 2_000, packed=terminal.pack())
    fresh = GhosttyTerminal(80, 24, 2_000)
    for _ in range(40):
        for one in (terminal, fresh):
            one.feed(b"%05d\r\n" % 7 * 10_000)
    assert 0 < len(kept(terminal)) <= 2_023
    assert len(terminal.pack()) < 3 * len(fresh.pack())
