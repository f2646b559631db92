"""What `-strict` does when its socket is removed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from sterna.remote import inotify
from sterna.remote.directories import remove, socket_identity
from sterna.remote.gotext import bytes_of, failure
from sterna.remote.loop import READ

if TYPE_CHECKING:
    from sterna.remote.log import Log
    from sterna.remote.loop import Loop, Timer

_EVENTS_BYTES: Final = 65_536
_BACK_SECONDS: Final = 0.5  # so that a start without -strict, which removes the socket first, still takes its place


class SocketKeeper:
    """Puts a daemon's socket back when somebody has removed it, as `-stop` without `-strict` does.

    A second name for it stands beside it, so that what comes back is the same socket. Where the file system has no
    such names or the system no inotify, nothing is done.
    """

    def __init__(self, loop: Loop, log: Log, path: str) -> None:
        self._loop, self._log, self._path, self._kept = loop, log, path, path + ".kept"
        self._queue: inotify.Inotify | None = None
        self._timer: Timer | None = None
        if socket_identity(self._kept) is not None:
            remove(self._kept)  # of a daemon that was killed
        try:
            os.link(bytes_of(path), bytes_of(self._kept), follow_symlinks=False)
            directory = os.open(os.path.dirname(bytes_of(path)) or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._queue = inotify.Inotify()
                self._queue.add(directory, inotify.DELETE | inotify.MOVED_FROM)
            finally:
                os.close(directory)
        except OSError as error:
            self._log.warn(f"[Server] The socket is not kept: {failure('watch', path, error)}")
        else:
            loop.watch(self._queue.descriptor, READ, self._changed)

    def _changed(self, _events: int) -> None:
        assert self._queue is not None
        name = os.path.basename(bytes_of(self._path))
        if any(name == gone for _, _, gone in self._queue.read(_EVENTS_BYTES)) and self._timer is None:
            self._timer = self._loop.later(_BACK_SECONDS, self._put_back)

    def _put_back(self) -> None:
        self._timer = None
        try:
            os.link(bytes_of(self._kept), bytes_of(self._path), follow_symlinks=False)
        except OSError:
            return  # another daemon has taken its place, or there is no directory any more
        self._log.warn(f"[Server] {self._path} was removed and is back: stop this daemon with -stop -strict")

    def close(self) -> None:
        """Lets the socket go."""
        if self._timer is not None:
            self._timer.cancel()
        if self._queue is not None:
            self._loop.forget(self._queue.descriptor)
            os.close(self._queue.descriptor)
            self._queue = None
        remove(self._kept)
