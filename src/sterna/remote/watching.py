"""Read-only watchers of a process: beside its subscriber, served out of the replay, and never waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sterna.limits import REMOTE_WATCH_TURN_BYTES
from sterna.remote.replay import EXIT

if TYPE_CHECKING:
    from sterna.remote.connection import Connection
    from sterna.remote.loop import Loop
    from sterna.remote.replay import Replay

GAP = b',"from":%d,"to":%d'


def show(watchers: dict[Connection, Watcher], replay: Replay, kind: int, seq: int, chunk: bytes) -> None:
    """Sends a new frame to all watchers that have everything before it; its line is made once for all."""
    line = b""
    for watcher in list(watchers.values()):
        if watcher.connection.full:
            watcher.connection.paused.add(watcher)
        elif watcher.next == seq:
            line = line or replay.line(kind, seq, chunk)
            watcher.give(kind, line)


class Watcher:
    """One connection's watch of one process; `next` is the frame that it gets next.

    It has no queue of its own: while the connection has enough to read, frames wait in the replay, and those that were
    dropped there are told as a gap.
    """

    __slots__ = ("_loop", "_replay", "_watchers", "connection", "next")

    def __init__(
        self, loop: Loop, watchers: dict[Connection, Watcher], replay: Replay, connection: Connection, seq: int
    ) -> None:
        self._loop, self._watchers, self._replay, self.connection = loop, watchers, replay, connection
        self.next = min(seq, replay.last) + 1
        watchers[connection] = self
        connection.processes.add(self)

    def pump(self) -> None:
        """Sends what the replay has for this watcher, until its connection has enough or a turn's share is done."""
        connection, replay = self.connection, self._replay
        if not self._live():
            return
        if connection.full:
            connection.paused.add(self)
            return
        if self.next < replay.first:
            connection.write(replay.notice("gap", GAP % (self.next, replay.first - 1)))
            self.next = replay.first
        given = 0
        for kind, line in replay.lines_from(self.next):
            self.give(kind, line)
            if not self._live() or self.connection.full:
                return
            given += len(line)
            if given > REMOTE_WATCH_TURN_BYTES:
                self._loop.post(self.pump)
                return

    def _live(self) -> bool:
        return self._watchers.get(self.connection) is self

    def give(self, kind: int, line: bytes) -> None:
        """Sends the next frame; the watch ends with the exit frame."""
        self.next += 1
        connection = self.connection
        connection.write(line)
        if connection.full:
            connection.paused.add(self)
        if kind == EXIT:
            self.detach(connection)

    def resume(self) -> None:
        """The connection has caught up; it goes on in the next turn, as this is called in the midst of sending."""
        self._loop.post(self.pump)

    def end(self) -> None:
        """Ends the watch from the daemon's side, and says so."""
        connection = self.connection
        self.detach(connection)
        connection.write(self._replay.notice("unwatched"))

    def detach(self, connection: Connection) -> None:
        """Ends the watch."""
        connection.processes.discard(self)
        connection.paused.discard(self)
        if self._live():
            del self._watchers[connection]
