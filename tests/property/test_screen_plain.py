"""A flood of plain text shows what it would show had the engine got all of it, and the engine gets little of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.pod import plain, screen
from sterna.pod.screen import LazyScreen, Terminal, engine_name, open_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

COLS, ROWS, ABOVE = 20, 5, 30
LINES = [
    b"x", b"", b"a line of its own", b"one that is longer than the screen is wide", b"tab\tstop", b"over\rwritten",
    "\u4e2d\u6587 wide".encode(), "e\u0301 combined".encode(), b"back\b\bspace", b"down\vthere", b"\xff\xfe no text",
    b"\xe4\xb8", b"caf\xc3\xa9", b"lqk x", b"\x05\x18\x1a\0\x7f",
]  # fmt: skip
# What stays in force while lines pass by, or says something that they do not.
OTHERS = [
    b"\x1b[31m", b"\x1b[0m", b"\x1b[2;4r", b"\x1b[r", b"\x1b[?69h\x1b[3;9s", b"\x1b[?69l", b"\x1b[4h", b"\x1b[4l",
    b"\x1b[?7l", b"\x1b[?7h", b"\x1b[20h", b"\x1b[20l", b"\x1b[?6h", b"\x1b[3;3H", b"\x1b[?1049h", b"\x1b[?1049l",
    b"\x1b(0", b"\x1b)0\x0e", b"\x0e", b"\x0f", b"\x07", b"\x1b[", b"\x1b]0;title", b"\x1b\\", b"\xc2\x9b3;3r", b"\xc2",
    b"\x1b7", b"\x1b8", b"\x18", b"\x1b[?2027h", b"\x1b[3g", b"\x1b]8;;http://a\x07", b"\x1b[J", b"\x1bM", b"\x1b[5;1H",
    b"\x1b[5n", b"\x1b[6n", b"\x1bP", b"\x1b_",
]  # fmt: skip
ENDS = [b"\r\n", b"\r\n", b"\r\n", b"\n"]

pieces = st.one_of(st.sampled_from(OTHERS), st.sampled_from(LINES))
floods = st.builds(
    lambda lines, end, size: (b"".join(line + end for line in lines) * size)[:size],
    st.lists(st.sampled_from(LINES), min_size=1, max_size=6),
    st.sampled_from(ENDS),
    st.integers(500, 4_000),
)
rounds = st.builds(lambda before, flood: [*before, flood], st.lists(pieces, max_size=3), floods)
streams = st.builds(
    lambda rounds, end: [piece for one in rounds for piece in one] + end,
    st.lists(rounds, min_size=1, max_size=3),
    st.lists(pieces, max_size=2),
)
sizes = st.lists(st.integers(60, 500), min_size=1, max_size=5)


@pytest.fixture(autouse=True, scope="module")
def little_is_much() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "LEAST_BYTES", 50)
        yield


@pytest.fixture(params=["ghostty", "pyte"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "ghostty" != engine_name():
        pytest.skip("libghostty-vt is not there")
    monkeypatch.setattr(screen, "engine_name", lambda: request.param)


# pyte loses what comes with a sequence that it does not know, so that its screen depends on how a stream is split.
ghostty = pytest.mark.skipif(engine_name() != "ghostty", reason="libghostty-vt is not there")


def fed(stream: list[bytes], steps: list[int]) -> tuple[LazyScreen, Terminal]:
    """Returns the stream's screen, brought up to date after pieces of some sizes, and one that got all as it came."""
    lazy, whole = LazyScreen(COLS, ROWS, ABOVE), open_terminal(COLS, ROWS, ABOVE)
    data, at, number = b"".join(stream), 0, 0
    while at < len(data):
        step = steps[number % len(steps)]
        lazy.feed(data[at : at + step])
        lazy.catch_up()
        at, number = at + step, number + 1
    whole.feed(data)
    return lazy, whole


@ghostty
@given(stream=streams, steps=sizes)
def test_shows_what_it_would_had_the_engine_got_all(stream: list[bytes], steps: list[int]) -> None:
    lazy, whole = fed(stream, steps)
    assert lazy.text(scrollback=True) == whole.text(scrollback=True)
    assert lazy.snapshot() == whole.snapshot()


@ghostty
@given(stream=streams, steps=sizes)
def test_what_is_answered_and_rung_is_the_same(stream: list[bytes], steps: list[int]) -> None:
    lazy, whole = LazyScreen(COLS, ROWS, ABOVE), open_terminal(COLS, ROWS, ABOVE)
    data, at, number = b"".join(stream), 0, 0
    answers = expected = b""
    while at < len(data):
        piece = data[at : at + steps[number % len(steps)]]
        lazy.feed(piece)
        answers += lazy.replies()
        lazy.catch_up()
        expected += whole.feed(piece)
        at, number = at + len(piece), number + 1
    assert answers == expected
    assert lazy.bells() == whole.bells


@pytest.mark.usefixtures("engine")
def test_the_engine_gets_only_the_end_of_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_terminal(80, 24, 1_000)
    got: list[int] = []
    feed = engine.feed

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(engine, name)

        def feed(self, data: bytes) -> bytes:
            got.append(len(data))
            return feed(data)

    monkeypatch.setattr(screen, "open_terminal", lambda *_args, **_more: Counting())
    lazy = LazyScreen(80, 24, 1_000)
    lazy.feed(b"\x1b[1mprompt\x1b[0m$ cat\r\n")
    line = b"%07d abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz\r\n"
    total = 0
    for start in range(0, 60_000, 1_000):
        text = b"".join(line % number for number in range(start, start + 1_000))
        total += len(text)
        lazy.feed(text)
        if lazy.due:
            lazy.catch_up()
            assert lazy._tail.size < 2 * 1024 * 1024, "what waits is bounded"
    assert sum(got) < total / 10
    first = int(lazy.text(scrollback=True).split(maxsplit=1)[0])
    # The engine forgets whole pages, be they fed now or long ago.
    assert 0 <= first - (60_000 - lazy.scrollback_lines - 23) < 20
    assert sum(got) < total / 3


@pytest.mark.usefixtures("engine")
def test_who_leaves_in_a_flood_does_not_answer_what_is_asked_after_it() -> None:
    lazy = LazyScreen(COLS, ROWS, ABOVE)
    for _ in range(5):
        lazy.feed(b"line\r\n" * 100)
        lazy.forget_replies()
        lazy.catch_up()
    lazy.feed(b"\x1b[5n")
    assert lazy.replies() == b"\x1b[0n"


@pytest.mark.usefixtures("engine")
def test_lines_too_long_to_wait_go_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_BYTES_MAX", 10_000)
    lazy, whole = LazyScreen(COLS, ROWS, ABOVE), open_terminal(COLS, ROWS, ABOVE)
    for number in range(40):
        data = b"\n" * (number == 0) + b"%02d" % number * 1_000 + b"\r\n" * (number % 5 == 4)
        lazy.feed(data)
        lazy.catch_up()
        whole.feed(data)
        assert lazy._tail.size <= 10_000
    assert lazy.snapshot() == whole.snapshot()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    "between",
    [
        b"\x1b[2;4r\x1b[5;1H", b"\x1b[1;3r\x1b[5;1H", b"\x1b[?69h\x1b[3;9s\x1b[5;12H", b"\x1b]0;", b"\x1b_", b"\x07",
        b"\x1b)0\x0e", b"\x0f", b"\x1b[31m", b"\x1b[", b"\xc2\x9b3;3r\x1b[5;1H", b"\xc2\x9b31m", b"\xe4\xb8", b"\xc2",
    ],
)  # fmt: skip
def test_what_lines_do_not_carry_away(between: bytes) -> None:
    longer = b"".join(b"longer line %d\r\n" % number for number in range(100))
    for after in (b"x\r\n" * 200, b"\r\n" * 200, b"line\n" * 50 + b"x\r\n" * 200):
        lazy, whole = fed([b"\x1b)0\x0e", longer, between, longer, after, b"\x07"], [200])
        assert lazy.snapshot() == whole.snapshot()
        assert (lazy.title(), lazy.bells()) == (whole.title(), whole.bells)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("lines", range(26, 46, 3))
def test_all_lines_that_can_be_seen_are_kept(lines: int) -> None:
    lazy, whole = LazyScreen(80, ROWS, ABOVE), open_terminal(80, ROWS, ABOVE)
    for number in range(60 + lines):
        line = b"%03d " % number + b"-" * 60 + b"\r\n"
        lazy.feed(b"\x1b[3A" if number == 60 else b"")
        lazy.feed(line)
        lazy.catch_up()
        whole.feed(b"\x1b[3A" * (number == 60) + line)
    assert lazy.text(scrollback=True) == whole.text(scrollback=True)


def test_a_tail_forgets_what_enough_lines_came_after() -> None:
    tail = plain.PlainTail()
    for number in range(9):
        tail.add(b"%d\r\n" % number, 3)
    assert (tail.take(), tail.size, bool(tail)) == (b"5\r\n6\r\n7\r\n8\r\n", 0, False)
    for text in (b"a\r\n", b"b\n", b"\r\n", b"c", b"\r\n\r\n", b"d\r\n", b"\r\n", b"\r\n"):
        tail.add(text, 1)
    assert tail.take() == b"d\r\n\r\n\r\n", "a piece of blank lines is no beginning: REP repeats the last character"
