"""Watchers that are behind, and sizes of terminals."""

from __future__ import annotations

import pytest

from sterna.remote import watching
from sterna.remote.calls import CallError, Params
from sterna.remote.child import STDOUT
from sterna.remote.connection import Connection
from sterna.remote.processes import terminal_size
from sterna.remote.replay import EXIT, Replay
from sterna.remote.watching import Watcher, show
from tests.unit.test_remote_connection import Rig


def test_a_watcher_that_is_behind_gets_frames_in_their_order_a_share_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "REMOTE_WATCH_TURN_BYTES", 100)
    rig, replay, watchers = Rig(), Replay("p"), dict[Connection, Watcher]()
    for number in range(5):
        replay.add(STDOUT, b"%d" % number)
    watcher = Watcher(rig.loop, watchers, replay, rig.connection, 0)
    watcher.pump()
    assert rig.peer.recv(1 << 16).count(b"\n") == 2, "so many take more than a share"
    for number in range(5, 7):
        show(watchers, replay, STDOUT, replay.add(STDOUT, b"%d" % number), b"%d" % number)
    rig.peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        rig.peer.recv(1)
    rig.turn(lambda: watcher.next == 8)
    show(watchers, replay, EXIT, replay.add(EXIT, b"0"), b"0")
    assert rig.peer.recv(1 << 16) == b"".join(list(replay.after(0))[2:])
    assert not watchers
    rig.close()


@pytest.mark.parametrize(
    ("cols", "rows", "size"),
    [(0, 0, (80, 24)), (1, 1, (1, 1)), (65_535, 65_535, (65_535, 65_535)), (65_536, 24, None), (80, 65_536, None),
     (-1, 24, None), (80, -1, None)],
)  # fmt: skip
def test_sizes_of_terminals(cols: int, rows: int, size: tuple[int, int] | None) -> None:
    params = Params({"cols": cols, "rows": rows})
    if size is not None:
        assert terminal_size(params) == size
        return
    with pytest.raises(CallError, match="from 1 to 65535"):
        terminal_size(params)
