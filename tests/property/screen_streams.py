"""Random streams of terminal output, as lists of whole pieces, and the comparison that a snapshot has to stand."""

from __future__ import annotations

import random
import re

from sterna.pod.screen_ghostty import GhosttyTerminal
from sterna.pod.snapshot import write_snapshot

_WORDS = ("a", "b", "word ", "中文", "e\u0301", "😀", "─│", "xyzxyzxyzxyzxyz", " ", "é")
_SGR = (0, 1, 2, 3, 4, 7, 9, 22, 24, 31, 32, 39, 44, 45, 49, 53, 97, 100)
_MODES = (1, 5, 6, 7, 9, 25, 45, 66, 1000, 1002, 1003, 1004, 1005, 1006, 1015, 1016, 1045, 2004, 2031)


def _fixed(r: random.Random, cols: int, rows: int) -> list[bytes]:
    """One of each kind of piece that needs no loop to be made."""
    top, bottom = sorted((r.randint(1, rows), r.randint(1, rows)))
    letter = r.choice(b"ABCDEFGLMPST@Zabde`")
    return [
        b"\r\n" * r.randint(1, 3),
        b"\x1b[%d;%dH" % (r.randint(1, rows), r.randint(1, cols)),
        b"\x1b[%dm" % r.choice(_SGR),
        b"\x1b[38;5;%dm" % r.randrange(256),
        b"\x1b[48;2;%d;%d;%dm" % (r.randrange(256), r.randrange(256), r.randrange(256)),
        r.choice([b"\x1b[4:3m", b"\x1b[58;5;9m", b"\x1b[0m"]),
        r.choice([b"\x1b[J", b"\x1b[1J", b"\x1b[2J", b"\x1b[K", b"\x1b[1K", b"\x1b[2K", b"\x1b[5X", b"\x1b[3J"]),
        b"\x1b[%d%c" % (r.randint(1, 4), letter),
        b"\x1b7",
        b"\x1b8",
        b"\x1b[%d;%dr" % (top, bottom),
        b"\x1b[r",
        b"\x1b[?%d%c" % (r.choice(_MODES), r.choice(b"hl")),
        r.choice([b"\x1b(0lqqk\x1b(B", b"\x1b)0\x0elqqk\x0f"]),
        r.choice([b"\x1b[4h", b"\x1b[4l", b"\x1b[20h", b"\x1b[20l"]),
        r.choice([b"\x1bH", b"\x1b[g", b"\x1b[3g", b"\t", b"\t\t"]),
        r.choice([b"\x1b]8;;http://a/1\x1b\\", b"\x1b]8;id=q;http://b\x1b\\", b"\x1b]8;;\x1b\\"]),
        r.choice([b'\x1b[1"q', b'\x1b[0"q']),
        b"\x1b[%d q" % r.randrange(7),
        b"\x1b]2;title %d\x07" % r.randrange(9),
        r.choice([b"\x1b[>5u", b"\x1b[<u", b"\x1b[=3;1u", b"\x1b[>4;2m", b"\x1b[>4m"]),
        r.choice([b"\x1bM", b"\x1bD", b"\x1bE", b"\n", b"\x08", b"\x0b"]),
        r.choice(
            [b"\x1b]4;%d;#a1b2c3\x07" % r.randrange(256), b"\x1b]10;#123456\x07", b"\x1b]104\x07", b"\x1b]110\x07"]
        ),
        r.choice([b"\x1b[?1000s", b"\x1b[?2004r", b"\x1b[?25s", b"\x1b[?25r", b"\x1b[?7s", b"\x1b[?6s", b"\x1b[?6r"]),
        b"line of text %d\r\n" % r.randrange(99) * r.randint(1, 6),
        r.choice([b"\x1b[6n", b"\x1b[c", b"\x1bP$qm\x1b\\", b"\x1b[?2004$p"]),
    ]


def pieces(r: random.Random, cols: int, rows: int, count: int, *, alternate: bool) -> list[bytes]:
    """Makes `count` pieces of output for a terminal of `cols` x `rows` cells."""
    made = []
    for _ in range(count):
        kind = r.random()
        if kind < 0.25:
            made.append("".join(r.choice(_WORDS) for _ in range(r.randint(1, 12))).encode())
        elif kind < 0.28 and alternate:
            # Programs enter and leave with a plain pen; what the hidden screen keeps is beyond a snapshot.
            made.append(b"\x1b[m\x1b[?1049%c" % r.choice(b"hl"))
        else:
            made.append(r.choice(_fixed(r, cols, rows)))
    return made


def beyond(terminal: GhosttyTerminal) -> bool:
    """Says whether a terminal is in one of the three states that no sequence can make (see sterna.pod.snapshot)."""
    state = terminal.state()
    active = state.alternate or state.main
    if active.cursor.origin:
        for final, place in ((b"r", active.cursor.y), (b"s", active.cursor.x)):
            found = re.search(rb"\x1b\[(\d+);(\d+)" + final, state.margins)
            if found and not int(found[1]) <= place + 1 <= int(found[2]):
                return True
    for screen in (state.main, state.alternate):
        if screen is None:
            continue
        if screen.rows[-1].wrapped:
            return True
        for cursor in (screen.cursor, screen.saved):
            row = screen.rows[len(screen.rows) - terminal.rows + cursor.y]
            if cursor.wrap_pending and row.at(cursor.x) is None:
                return True
    return False


def told(terminal: GhosttyTerminal) -> bytes:
    """Returns a terminal's snapshot without the character for REP, which finds no place on a full screen."""
    state = terminal.state()
    state.written_last = ""
    return write_snapshot(state)


def difference(one: GhosttyTerminal, other: GhosttyTerminal) -> str:
    """Says where two terminals differ: cells, links and styles of all lines, cursor, title; empty if nowhere."""
    if one.cursor() != other.cursor():
        return f"cursor {one.cursor()} {other.cursor()}"
    if one.title() != other.title():
        return f"title {one.title()!r} {other.title()!r}"
    mine, theirs = one.cells(scrollback=True), other.cells(scrollback=True)
    if len(mine) != len(theirs):
        return f"{len(mine)} lines and {len(theirs)} lines"
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a != b:
            return f"line {number}:\n  {a}\n  {b}"
    return ""
