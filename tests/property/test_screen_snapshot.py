"""A snapshot makes another terminal the same, now and after whatever comes later, wherever it is taken."""

from __future__ import annotations

import random
import re

import pytest

from sterna.pod.screen_ghostty import GhosttyTerminal
from tests.property.screen_streams import beyond, difference, pieces, told

SIZES = ((10, 5), (20, 24), (33, 10), (80, 24))
BASE = random.randrange(1 << 32)


def run(seed: int, *, cut: bool) -> bool:
    """Compares an original with one repainted from its snapshot; False if the state is beyond a snapshot."""
    r = random.Random(seed)
    cols, rows = r.choice(SIZES)
    scrollback = r.choice([0, 50, 1000])
    stream = b"x\x1b]2;t\x07\x1b[?2027%c" % r.choice(b"hl") + b"".join(pieces(r, cols, rows, 60, alternate=True))
    if cut:
        stream = stream[: r.randrange(len(stream) // 2, len(stream))]
    original = GhosttyTerminal(cols, rows, scrollback)
    original.feed(stream)
    if beyond(original):
        return False
    repainted = GhosttyTerminal(cols, rows, scrollback)
    if r.random() < 0.5:
        repainted.feed(b"".join(pieces(r, cols, rows, 20, alternate=False)))
    repainted.feed(original.snapshot())
    assert not difference(original, repainted), f"seed {seed}: {difference(original, repainted)}"
    if not cut:
        assert told(repainted) == told(original), f"seed {seed}: a state that the cells do not show differs"
    later = [b"\x18"] if cut else []
    later += pieces(r, cols, rows, 30, alternate=b"\x1b[?1049" not in stream)
    for piece in later:
        answers = original.feed(piece), repainted.feed(piece)
        assert answers[0] == answers[1], f"seed {seed}: {piece!r} was answered differently"
        assert not difference(original, repainted), f"seed {seed} after {piece!r}: {difference(original, repainted)}"
    return True


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut-anywhere"])
def test_repainted_is_the_same_now_and_later(cut: bool) -> None:
    print("first seed", BASE)
    compared = sum(run(BASE + number, cut=cut) for number in range(80))
    assert compared > 50


def stops(terminal: GhosttyTerminal) -> list[int]:
    """The columns of its tab stops, from 1."""
    return [int(column) for column in re.findall(rb"\[(\d+)G\x1bH", terminal.state().tab_stops)]


def test_a_smaller_terminal_is_left_without_what_it_cannot_show() -> None:
    print("first seed", BASE)
    cut = 0
    for number in range(40):
        r = random.Random(BASE + number)
        cols, rows = r.choice(SIZES)
        original = GhosttyTerminal(cols, rows, 50)
        original.feed(b"".join(pieces(r, cols, rows, 60, alternate=True)) + b"\x18")
        few, low = r.choice([r.randint(2, cols), cols]), r.randint(3, rows)
        smaller = GhosttyTerminal(few, low, 1000)
        smaller.feed(b"".join(b"mine %d\r\n" % line for line in range(3 * low)))
        above = smaller.cells(scrollback=True)[:-low]
        smaller.feed(original.snapshot(scrollback=False))
        kept = [column for column in stops(original) if column < few or column == few == cols]
        wanted = [*kept, few] if cols in stops(original) and few < cols else kept
        assert stops(smaller) == wanted, f"seed {BASE + number}: {cols} x {rows} on {few} x {low}"
        wrapped = original.state(scrollback=False).main.rows
        first = next((y for y, row in enumerate(wrapped, 1) if not row.wrapped), rows)
        # On a narrower one a wide character may not fit in where it stands, and goes to the next row.
        if few == cols and first + 1 < low:
            smaller.feed(b"\x18\x1b[?1049l")
            assert smaller.cells(scrollback=True)[:-low] == above, f"seed {BASE + number}: {few} x {low}"
            cut += low < rows
    assert cut > 5


def test_packing_keeps_everything() -> None:
    print("first seed", BASE)
    for number in range(100):
        r = random.Random(BASE + number)
        cols, rows = r.choice(SIZES)
        stream = b"".join(pieces(r, cols, rows, 60, alternate=True))
        middle = r.randrange(len(stream))
        whole = GhosttyTerminal(cols, rows, 100)
        whole.feed(stream[:middle])
        packed = GhosttyTerminal(cols, rows, 100, packed=whole.pack())
        assert packed.snapshot() == whole.snapshot(), f"seed {BASE + number}"
        assert packed.feed(stream[middle:]) == whole.feed(stream[middle:]), f"seed {BASE + number}"
        assert packed.snapshot() == whole.snapshot(), f"seed {BASE + number}"


def test_the_comparison_can_fail() -> None:
    one, other = GhosttyTerminal(20, 5), GhosttyTerminal(20, 5)
    one.feed(b"\x1b[31mred\x1b[m\x1b[?2004h")
    other.feed(one.snapshot().replace(b"\x1b[0;31m", b"\x1b[0;32m"))
    assert "line 0" in difference(one, other)
    other.feed(one.snapshot().replace(b"\x1b[?2004h", b""))
    assert not difference(one, other)
    assert one.snapshot() != other.snapshot(), "modes are compared by the snapshots"
