"""Properties of the client's incremental filters: any split of the input gives the same result."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from sterna.client.escape import Action, EscapeKeys
from sterna.client.queries import LIVE, PASSIVE, REPLAY, SEQUENCE_HELD_MAX_BYTES, QueryFilter
from sterna.client.status import OutputTail, unfinished
from sterna.client.terminal import ModeTracker

KEYS = (b"~", b"\r", b"\n", b"d", b".", b"?", b"x", b"\x1b[200~", b"\x1b[201~", b"\x1b", b"[20", b"0~", b"1~")
TYPED = st.lists(st.sampled_from(KEYS) | st.binary(max_size=3), max_size=30).map(b"".join)

PIECES = (
    b"\x1b", b"\x1b[", b"\x1b]", b"\x1bP", b"\x1b_G", b"\xc2\x9d", b"\xc2\x9b", b"\xc2", b"\x9c", b"\\", b"\x07",
    b"52;c;", b"?", b"10;", b"11;?", b"6n", b"c", b">q", b"0", b";", b"a=q", b"tmux;", b"\x1b\x1b", b"$q", b"+q", b"m",
    b"x", b"\x18", b"\x05", b"\n", b"hello", b"1337;", b"Copy=:", b"u", b"\xe2\x82\xac", b"\x00", b"18t", b"21;a=?",
    b"\x1b[?1049", b"h", b"l", b"25", b"\x1b[>1u", b"\x1b[<u", b"\x1b(0", b"\x0e", b"\x1bc", b"2;5r", b"z" * 2_000,
    b"0" * 2_100, b"\x00" * 4_090, b"\x07" * 4_100, b"\xc2\x9b?1049", b"\x1b[?25s", b"\x1b[?r", b"@kitty-", b"cmd",
)  # fmt: skip
OUTPUT = st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=30).map(b"".join)
PLAIN = st.lists(
    st.sampled_from((b"\x1b[1;31m", b"\x1b[2J", b"\x1b[?25l", b"\r\n", b"\x1b]0;title\x07", b"\x1b7", b"\x1b[3;4H"))
    | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=5).map(str.encode),
    max_size=30,
).map(b"".join)
CUTS = st.lists(st.integers(0, 100), max_size=12)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in cuts:
        pieces.append(data[start : start + size])
        start += size
    return [*pieces, data[start:]]


def typed(pieces: list[bytes], char: str) -> tuple[bytes, list[Action]]:
    keys = EscapeKeys(enabled=True, char=char)
    sent, actions = b"", []
    for piece in pieces:
        more, asked = keys.feed(piece)
        sent += more
        actions += asked
    return sent + keys.flush(), actions


def filtered(pieces: list[bytes], mode: str, *, clipboard: bool) -> bytes:
    filter_ = QueryFilter(mode, clipboard=clipboard)
    out = b""
    for piece in pieces:
        out += filter_.feed(piece)
        assert filter_.held_bytes <= SEQUENCE_HELD_MAX_BYTES + 1
    return out + filter_.flush()


@given(data=TYPED, cuts=CUTS, char=st.sampled_from("~%0d"))
@example(data=b"\r~?~d", cuts=[3], char="~")
def test_escape_keys(data: bytes, cuts: list[int], char: str) -> None:
    whole = typed([data], char)
    assert typed(split(data, cuts), char) == whole
    assert typed([bytes((byte,)) for byte in data], char) == whole


@given(data=OUTPUT, cuts=CUTS, mode=st.sampled_from((REPLAY, LIVE, PASSIVE)), clipboard=st.booleans())
@example(data=b"\x1b]10;\xc2\x9b6nfoo\x07", cuts=[5, 1], mode=REPLAY, clipboard=False)
@example(data=b"\x1b\x1b]52;c;x\x07]52;c;eA==\x07", cuts=[1], mode=LIVE, clipboard=False)
@example(data=b"\xc2\x90\xc2\xc2x\xc2\x9a", cuts=[3], mode=REPLAY, clipboard=False)
def test_query_filter(data: bytes, cuts: list[int], mode: str, clipboard: bool) -> None:
    whole = filtered([data], mode, clipboard=clipboard)
    assert filtered(split(data, cuts), mode, clipboard=clipboard) == whole
    assert filtered([bytes((byte,)) for byte in data], mode, clipboard=clipboard) == whole
    # What was let through once is let through again, and nothing is ever added.
    assert filtered([whole], mode, clipboard=clipboard) == whole
    assert len(whole) <= len(data)


@given(data=PLAIN, cuts=CUTS, mode=st.sampled_from((REPLAY, LIVE, PASSIVE)))
def test_output_without_queries_is_exact(data: bytes, cuts: list[int], mode: str) -> None:
    assert filtered(split(data, cuts), mode, clipboard=False) == data


@given(data=OUTPUT, cuts=CUTS)
@example(data=b"\x1b[>1u\x0e", cuts=[6])
@example(data=b"\x1b]10;\xc2\x9a", cuts=[6])
@example(data=b"\x1b]11;?\x07", cuts=[6])
def test_mode_tracker(data: bytes, cuts: list[int]) -> None:
    whole, parts = ModeTracker(), ModeTracker()
    whole.feed(data)
    for piece in split(data, cuts):
        parts.feed(piece)
    assert (parts.undo(), parts.plain, parts.as_was) == (whole.undo(), whole.plain, whole.as_was)


@given(data=OUTPUT, cuts=CUTS)
def test_undoing_leaves_nothing_to_undo(data: bytes, cuts: list[int]) -> None:
    modes = ModeTracker()
    modes.feed(data)
    modes.feed(modes.undo())
    assert not modes.changed
    assert not modes.region
    assert not modes.plain.removesuffix(b"\x1b]8;;\x07")


@given(data=OUTPUT, cuts=CUTS, limit=st.integers(1, 200))
def test_the_tail_is_the_end(data: bytes, cuts: list[int], limit: int) -> None:
    tail, modes = OutputTail(limit), ModeTracker()
    for piece in split(data, cuts):
        tail.append(piece, modes.replay)
        modes.feed(piece)
    assert data.endswith(tail.data())
    longest = max(map(len, split(data, cuts)), default=0)
    assert min(limit, len(data)) <= len(tail.data()) < limit + max(longest, 1)
    dropped = ModeTracker()
    dropped.feed(data[: len(data) - len(tail.data())])
    assert not data or tail.before == dropped.replay


@given(data=st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")), missing=st.integers(1, 3))
def test_a_cut_character_is_noticed(data: bytes, missing: int) -> None:
    last = "€😀é"[missing % 3].encode()
    assert unfinished(data + last[:-1]) is None
    assert unfinished(data + last) is not None
