"""What is read and written in pieces is what it would be in one."""

from __future__ import annotations

import json
import os
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.remote.calls import CallError, LargeReplyError, Params, reply_pieces
from sterna.remote.child import STDOUT
from sterna.remote.files import Files
from sterna.remote.gotext import text_of
from sterna.remote.log import Log, clipped
from sterna.remote.replay import Replay
from sterna.remote.wire import Raw, Value, WireError, decode, decode_apart, encode


def outcome(line: bytes, *, apart: bool) -> Value:
    try:
        return (decode_apart if apart else decode)(line)
    except WireError:
        return "no JSON"


def test_a_line_read_apart_is_what_it_is_elsewhere() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)

    def value(depth: int) -> object:
        kind = dice.randrange(9) if depth else 0
        if kind < 5:
            return dice.choice([1, -2.5, "a", 'x\\"[{,', "ä\U0001f600", True, None, "", "0" * dice.randrange(30)])
        items = [value(depth - 1) for _ in range(dice.randrange(6))]
        return items if kind < 7 else {f"{dice.choice('abc,')}{at}": item for at, item in enumerate(items)}

    good = 0
    for _ in range(1_500):
        text = bytearray(json.dumps(value(5), indent=dice.choice([None, 1]), ensure_ascii=dice.random() < 0.5).encode())
        for _ in range(3):
            assert outcome(bytes(text), apart=True) == outcome(bytes(text), apart=False), bytes(text)
            good += outcome(bytes(text), apart=True) != "no JSON"
            at = dice.randrange(len(text) + 1)
            text[at : at + dice.randrange(2)] = bytes([dice.choice(b'[]{},:" \\1e.\xff\n')])
    assert good > 1_500


@pytest.mark.parametrize("line", [b"[ ,1]", b"{ ,}", b'{"a":1,}', b"[1,,2]", b'["a":1,2]', b"{1,2}", b"[NaN,1]"])
def test_a_line_read_apart_is_no_json(line: bytes) -> None:
    assert outcome(line, apart=True) == outcome(line, apart=False) == "no JSON"


def test_replies_in_pieces() -> None:
    big: dict[str, object] = {
        "a": ["<\u2028\udcff" * 60_000, 1.5, None],
        "b": {},
        "c": [],
        "d": [{"x": True}] * 30_000,
        "e": iter([1, "f"]),
    }
    pieces = list(reply_pieces("7", big))
    assert b"".join(pieces).decode() == (f'{{"jsonrpc":"2.0","id":7,"result":{encode({**big, "e": [1, "f"]})}}}\n')
    assert len(pieces) > 5


def test_files_in_pieces() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)
    data = b"".join(
        dice.choice(["ä", "€", "\U0001f600", "x", "<"]).encode()[: dice.randrange(1, 5)] for _ in range(200_000)
    )
    cuts = sorted(dice.randrange(len(data)) for _ in range(5))
    raw = Raw(deque(data[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)))
    assert b"".join(reply_pieces("1", {"content": raw})).decode() == (
        f'{{"jsonrpc":"2.0","id":1,"result":{{"content":{encode(text_of(data))}}}}}\n'
    )
    assert not raw.pieces


def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plain = tmp_path / "pipe", tmp_path / "plain"
    os.mkfifo(pipe)
    plain.write_bytes(b"x" * 20_000)
    before = plain.stat()
    read = Files("/", regular_only=True).methods["files.read"]
    with pytest.raises(LargeReplyError) as asked:
        read(Params({"path": str(plain), "maxBytes": 0}))
    assert asked.value.size == 20_000
    assert b"".join(reply_pieces("1", asked.value.rest())).count(b"x" * 20_000) == 1
    os.rename(pipe, plain)
    with pytest.raises(CallError, match="not a regular file"):
        asked.value.rest()
    monkeypatch.setattr("sterna.remote.files._SMALL_BYTES", 1 << 20)
    with monkeypatch.context() as swapped:
        swapped.setattr("sterna.remote.files.os.stat", lambda _path: before)
        with pytest.raises(CallError, match="not a regular file"):
            read(Params({"path": str(plain), "maxBytes": 0}))


def test_a_directory_of_very_many_names_is_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sterna.remote.files._SORTED", 10)
    names = [f"{number * 7 % 101:03d}" for number in range(101)]
    for name in names:
        (tmp_path / name).touch()
    files = Files("/")
    try:
        result = files.methods["files.list"](Params({"path": str(tmp_path)}))
    except LargeReplyError as large:
        result = large.rest()
    line = json.loads(b"".join(reply_pieces("1", result)))
    assert [entry["name"] for entry in line["result"]["entries"]] == sorted(names)


class Ends(deque[bytes]):
    """May be looked at from its end only."""

    def __iter__(self) -> Iterator[bytes]:
        raise AssertionError("walked over from the start")


def test_the_end_of_the_frames_is_found_at_once() -> None:
    replay = Replay("p")
    for _ in range(100):
        replay.add(STDOUT, b"x")
    replay._chunks = Ends(replay._chunks)
    assert [line.partition(b'"seq":')[2][:3] for line in replay.after(97)] == [b"98,", b"99,", b"100"]
    assert list(replay.after(10**6)) == []


def test_log_lines_of_what_others_chose(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        log = Log("debug", file.fileno())
        text = f"a\n\x1b]0;x\x07 \u2028 ä \x9b{clipped('i' * 5_000)}"
        log.info(text)
        for number in range(3_000):
            log.refusal(f"refused {number}")
    first, *others = path.read_text().splitlines()
    assert first[20:] == "INFO  a\\x0a\\x1b]0;x\\x07 \\u2028 ä \\x9b" + "i" * 200 + "… (5000 characters)"
    assert others[0].endswith("WARN  refused 0")
    assert 1_000 <= len(others) < 1_200, "those of a flood are counted"
