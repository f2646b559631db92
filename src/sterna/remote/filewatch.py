"""The methods `files.watch` and `files.unwatch`: changes in directories, gathered for a moment and told in lines."""

from __future__ import annotations

import os
import re
import stat
from errno import ENOSPC, ENOTDIR
from itertools import count
from typing import TYPE_CHECKING, Final

from sterna.limits import (
    REMOTE_FILE_WATCH_GATHER_MS,
    REMOTE_FILE_WATCH_NAMES_MAX,
    REMOTE_FILE_WATCH_READ_BYTES,
    REMOTE_FILE_WATCHES_CLIENT_MAX,
    REMOTE_FILE_WATCHES_MAX,
)
from sterna.remote import inotify
from sterna.remote.calls import FAILED, SUCCESS, CallError
from sterna.remote.gotext import bytes_of, expand, failure, join, text_of
from sterna.remote.loop import READ
from sterna.remote.wire import encode, utf8

if TYPE_CHECKING:
    from collections.abc import Callable

    from sterna.remote.calls import Call, Result
    from sterna.remote.connection import Connection
    from sterna.remote.loop import Loop
    from sterna.remote.workers import Workers

_CREATED: Final = inotify.CREATE | inotify.MOVED_TO
_DELETED: Final = inotify.DELETE | inotify.MOVED_FROM
_CHANGED: Final = inotify.MODIFY | inotify.ATTRIB | inotify.CLOSE_WRITE
# what files.write and -strict put beside a file or directory until it is complete
_OWN_NAME: Final = re.compile(rb"\.(?:sterna|.*\.staged)-[0-9a-f]{16}(?:\.old)?", re.DOTALL)
_OVER: Final = inotify.DELETE_SELF | inotify.MOVE_SELF | inotify.UNMOUNT | inotify.IGNORED


class FileWatches:
    """All watches of the daemon, over one inotify queue that is made for the first of them.

    The queue is read once in a while, not whenever it has something: the kernel gathers, and a flood of changes costs
    the daemon no more than one read each time.

    Parameters: `home`, what `~` stands for.
    """

    def __init__(self, loop: Loop, workers: Workers, home: str) -> None:
        self._loop, self._workers, self._home = loop, workers, home
        self._queue: inotify.Inotify | None = None
        self._numbers = count(1)
        self._watches: dict[int, _Watch] = {}
        self._by_directory: dict[int, set[_Watch]] = {}

    # -------------------------------------------------------------------------------------------------------- methods

    def watch(self, call: Call) -> None:
        """Starts a watch; the directory is looked up by a worker."""
        path = expand(call.params.text("path"), self._home)
        self._workers.submit(lambda: self._look_up(call, path))

    def _look_up(self, call: Call, path: str) -> Callable[[], None]:
        try:
            directory, only = _opened(path)
        except (OSError, ValueError) as error:
            problem = CallError(FAILED, failure("watch", path, error))
            return lambda: call.fail(problem)
        return lambda: self._begin(call, path, directory, only)

    def _begin(self, call: Call, path: str, directory: int, only: bytes | None) -> None:
        try:
            watch = self._added(call.connection, path, directory, only)
        except CallError as error:
            call.fail(error)
        else:
            call.succeed({"watch": watch.number})
        finally:
            os.close(directory)

    def _added(self, connection: Connection, path: str, directory: int, only: bytes | None) -> _Watch:
        own = sum(watch.connection is connection for watch in self._watches.values())
        if own >= REMOTE_FILE_WATCHES_CLIENT_MAX or len(self._watches) >= REMOTE_FILE_WATCHES_MAX:
            raise CallError(FAILED, f"watch {path}: too many watches; end some with files.unwatch")
        try:
            if self._queue is None:
                self._queue = inotify.Inotify()
                self._loop.watch(self._queue.descriptor, READ, self._changed)
            key = self._queue.add(directory)
        except OSError as error:
            if error.errno == ENOSPC:
                text = f"watch {path}: the system has no more watches; raise fs.inotify.max_user_watches"
                raise CallError(FAILED, text) from error
            raise CallError(FAILED, failure("watch", path, error)) from error
        watch = _Watch(self, next(self._numbers), connection, path, key, only)
        self._by_directory.setdefault(key, set()).add(watch)
        self._watches[watch.number] = watch
        connection.processes.add(watch)
        if connection.closed:
            self.end(watch)
        return watch

    def unwatch(self, call: Call) -> None:
        """Ends a watch of the same connection."""
        watch = self._watches.get(call.params.number("watch"))
        if watch is not None and watch.connection is call.connection:
            self.end(watch)
        call.succeed(SUCCESS)

    def end(self, watch: _Watch) -> None:
        """Forgets a watch, and its directory when no other one looks at it."""
        watch.connection.processes.discard(watch)
        watch.connection.paused.discard(watch)
        self._watches.pop(watch.number, None)
        beside = self._by_directory.get(watch.key)
        if beside is not None:
            beside.discard(watch)
            if not beside:
                del self._by_directory[watch.key]
                if self._queue is not None:
                    self._queue.remove(watch.key)

    # --------------------------------------------------------------------------------------------------------- events

    def _changed(self, _events: int) -> None:
        if self._queue is not None:
            self._loop.forget(self._queue.descriptor)
            self._loop.later(REMOTE_FILE_WATCH_GATHER_MS / 1000, self._take)

    def _take(self) -> None:
        assert self._queue is not None
        touched: set[_Watch] = set()
        for key, mask, name in self._queue.read(REMOTE_FILE_WATCH_READ_BYTES):
            watches = self._watches.values() if mask & inotify.OVERFLOW else self._by_directory.get(key, ())
            for watch in watches:
                watch.note(mask, name)
            touched.update(watches)
        self._loop.watch(self._queue.descriptor, READ, self._changed)
        for watch in touched:
            watch.tell()


class _Watch:
    """One client's watch of a directory, or of the one name `only` in it."""

    __slots__ = ("_changes", "_lost", "_only", "_over", "_path", "_watches", "connection", "key", "number")

    def __init__(
        self, watches: FileWatches, number: int, connection: Connection, path: str, key: int, only: bytes | None
    ) -> None:
        self._watches, self.number, self.connection, self.key = watches, number, connection, key
        self._path, self._only = path, only
        self._changes: dict[bytes, str] = {}
        self._lost = self._over = False

    def note(self, mask: int, name: bytes) -> None:
        """Remembers an event; the last one of a name counts, but what was created stays created."""
        if mask & inotify.OVERFLOW:
            self._lost = True
        if mask & _OVER:
            self._over = True
        if self._lost:  # a line says so, and nothing of what came before it
            self._changes.clear()
            return
        if not name or (self._only != name if self._only is not None else _OWN_NAME.fullmatch(name)):
            return
        event = "created" if mask & _CREATED else "deleted" if mask & _DELETED else "changed" if mask & _CHANGED else ""
        if not event or (event == "changed" and self._changes.get(name) == "created"):
            return
        self._changes.pop(name, None)  # the order is that of the last events
        self._changes[name] = event
        if len(self._changes) > REMOTE_FILE_WATCH_NAMES_MAX:
            self._changes.clear()
            self._lost = True

    def tell(self) -> None:
        """Sends what has been noted, unless the client has enough to read: then it is gathered on."""
        if self.connection.full:
            self.connection.paused.add(self)
            return
        if self._lost:
            self._line("overflow")
            self._lost = False
        changes, self._changes = self._changes, {}
        for name, event in changes.items():
            self._line(event, name)
        if self._over:
            self._watches.end(self)
            self._line("ended")

    def _line(self, event: str, name: bytes | None = None) -> None:
        line: Result = {"type": "files", "watch": self.number, "event": event}
        if name is not None:
            line["path"] = self._path if self._only is not None else join(self._path, text_of(name))
        self.connection.write(utf8(encode(line) + "\n"))

    def resume(self) -> None:
        """The client has caught up."""
        self.tell()

    def detach(self, _connection: Connection) -> None:
        """The client is gone."""
        self._watches.end(self)


def _opened(path: str) -> tuple[int, bytes | None]:
    """Returns the descriptor of the directory to watch, and the one name that counts, if not all. Raises `OSError`."""
    raw = bytes_of(path)
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        if stat.S_ISDIR(os.stat(raw).st_mode):
            return os.open(raw, flags), None
    except FileNotFoundError:
        pass
    directory, _, name = raw.rpartition(b"/")
    if not name or name in {b".", b".."}:
        raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR))
    return os.open(directory or (b"/" if raw.startswith(b"/") else b"."), flags), name
