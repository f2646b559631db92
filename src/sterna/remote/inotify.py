"""inotify(7) by its system calls."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200
DELETE_SELF, MOVE_SELF, UNMOUNT, OVERFLOW, IGNORED = 0x400, 0x800, 0x2000, 0x4000, 0x8000
ONLYDIR, EXCL_UNLINK = 0x0100_0000, 0x0400_0000
_CHANGES: Final = (
    MODIFY | ATTRIB | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE
    | DELETE_SELF | MOVE_SELF | ONLYDIR | EXCL_UNLINK
)  # fmt: skip

_HEAD: Final = struct.Struct("iIII")
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """One queue of events; raises `OSError` when the system gives none."""

    def __init__(self) -> None:
        self.descriptor = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def add(self, directory: int, mask: int = _CHANGES) -> int:
        """Watches a directory given by a descriptor; returns the watch's number, the same for the same directory."""
        path = b"/proc/self/fd/%d" % directory
        return _checked(_libc.inotify_add_watch(self.descriptor, path, ctypes.c_uint32(mask)))

    def remove(self, watch: int) -> None:
        """Ends a watch, which may be over."""
        _libc.inotify_rm_watch(self.descriptor, watch)

    def read(self, size: int) -> Iterator[tuple[int, int, bytes]]:
        """Returns the number, the mask and the name of events, as many as `size` bytes hold."""
        try:
            data = os.read(self.descriptor, size)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            watch, mask, _cookie, length = _HEAD.unpack_from(data, at)
            at += _HEAD.size + length
            yield watch, mask, data[at - length : at].rstrip(b"\0")


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
