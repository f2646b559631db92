from __future__ import annotations

import base64
import json
import os

import pytest

from sterna.limits import REMOTE_REPLAY_BYTES
from sterna.remote.child import STDERR, STDOUT
from sterna.remote.replay import EXIT, Replay


def test_lines_are_frames() -> None:
    replay = Replay("a<b>\u2028")
    assert (replay.first, replay.last) == (0, 0)
    assert [replay.add(STDOUT, b"hi"), replay.add(STDERR, b"oops"), replay.add(EXIT, b"-1")] == [1, 2, 3]
    name = b'{"type":"stream","processId":"a\\u003cb\\u003e\\u2028","stream":'
    lines = list(replay.after(0))
    assert lines == [
        name + b'"stdout","seq":1,"data":"aGk="}\n',
        name + b'"stderr","seq":2,"data":"b29wcw=="}\n',
        name + b'"exit","seq":3,"exitCode":-1}\n',
    ]
    assert replay.size == sum(map(len, lines)) == replay.bytes_after(0)
    assert list(replay.after(2)) == lines[2:]
    assert list(replay.after(3)) == list(replay.after(2**64 - 1)) == []
    assert (replay.first, replay.last) == (1, 3)


def test_a_list_of_lines_is_of_the_moment_it_was_asked_for() -> None:
    replay = Replay("p")
    replay.add(STDOUT, b"1")
    lines = replay.after(0)
    replay.add(STDOUT, b"2")
    assert len(list(lines)) == 1


@pytest.mark.parametrize("size", [1, 100, 32_768])
def test_the_oldest_frames_go_when_their_lines_exceed_the_bound(size: int) -> None:
    replay, chunk = Replay("p"), os.urandom(size)
    count = REMOTE_REPLAY_BYTES // (size * 4 // 3 + 60) + 2_000
    for _ in range(count):
        replay.add(STDOUT, chunk)
    lines = list(replay.after(0))
    assert sum(map(len, lines)) == replay.size <= REMOTE_REPLAY_BYTES
    assert replay.size + max(map(len, lines)) > REMOTE_REPLAY_BYTES, "not one frame more than needed goes"
    assert (replay.first, replay.last) == (count - len(lines) + 1, count)
    for line, seq in ((0, replay.first), (-1, replay.last)):
        message = json.loads(lines[line])
        assert (message["seq"], base64.b64decode(message["data"])) == (seq, chunk)
    assert len(list(replay.after(replay.last - 5))) == 5


def test_a_bound_that_is_met_exactly_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay("p")
    replay.add(STDOUT, b"abc")
    monkeypatch.setattr("sterna.remote.replay.REMOTE_REPLAY_BYTES", 2 * replay.size)
    replay.add(STDERR, b"def")
    assert (replay.first, replay.last) == (1, 2)
    replay.add(EXIT, b"0")
    assert (replay.first, replay.last) == (2, 3)


def test_one_frame_is_kept_whatever_its_size() -> None:
    replay = Replay("p" * (REMOTE_REPLAY_BYTES + 1))
    replay.add(STDOUT, b"1")
    replay.add(STDOUT, b"2")
    assert (replay.first, replay.last) == (2, 2)
