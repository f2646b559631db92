from __future__ import annotations

import pytest

from sterna.client.notify import BellFinder

CASES = [
    (b"plain text", 0),
    (b"ding\a", 1),
    (b"\x1b]0;a title\a$ ", 0),
    (b"\x1b]0;a title\x1b\\$ \a", 1),
    (b"\x1bPq#0\x1b\\x", 0),
    (b"\x1b[31mred\x1b[0m\a", 1),
]


@pytest.mark.parametrize(("output", "rings"), CASES, ids=[str(n) for n in range(len(CASES))])
def test_only_real_bells_count_however_the_output_is_split(output: bytes, rings: int) -> None:
    for cut in range(len(output) + 1):
        finder = BellFinder()
        heard = [finder.feed(output[:cut]), finder.feed(output[cut:])]
        assert sum(heard) == rings, (cut, heard)


def test_an_endless_string_is_not_kept() -> None:
    finder = BellFinder()
    assert not finder.feed(b"\x1b]0;" + b"x" * 100_000)
    assert len(finder._open) <= 2
    assert not finder.feed(b"yyy\a")
    assert finder.feed(b"\a")
