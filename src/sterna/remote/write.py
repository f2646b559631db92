"""The method `files.write`: a file is replaced as a whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING, Final

from sterna.remote.calls import BAD_PARAMS, FAILED, CallError
from sterna.remote.directories import remove
from sterna.remote.gotext import bytes_of, expand, failure, text_of
from sterna.remote.processes import decode_base64

if TYPE_CHECKING:
    from sterna.remote.calls import Params, Result

_MODE_MAX: Final = 0o777
_NEW_MODE: Final = 0o666  # less the umask


class Writer:
    """Writes files.

    Parameters: `home`, what `~` stands for.
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self._turn = threading.Lock()  # two requests never both find the file as they want it

    def write(self, params: Params) -> Result:
        """Replaces a file's content; runs in a worker. Raises `CallError`."""
        content, mode = decode_base64(params.text("content")), params.optional("mode")
        if not params.text("path"):
            raise CallError(BAD_PARAMS, "files.write: path is required")
        if mode is not None and mode > _MODE_MAX:
            raise CallError(BAD_PARAMS, "files.write: mode is at most 511, which is 0777")
        asked = expand(params.text("path"), self._home)
        try:
            path = text_of(os.path.realpath(bytes_of(asked)))
        except (OSError, ValueError) as error:
            raise CallError(FAILED, failure("open", asked, error)) from error
        if asked.endswith("/"):
            raise CallError(BAD_PARAMS, "files.write: path is a directory")
        temporary = f"{os.path.dirname(path)}/.sterna-{os.urandom(8).hex()}"
        try:
            return self._replaced(path, temporary, content, mode, params)
        except BaseException:
            remove(temporary)
            raise

    def _replaced(self, path: str, temporary: str, content: bytes, mode: int | None, params: Params) -> Result:
        try:
            _fill(temporary, content, mode, _found(path))
            with self._turn:
                old = _found(path)
                if _changed(old, params):
                    remove(temporary)
                    return {"success": False, **_state(old), "conflict": True}
                os.rename(bytes_of(temporary), bytes_of(path))
                new = os.stat(bytes_of(path))
            _sync(os.path.dirname(path))
        except OSError as error:
            raise CallError(FAILED, failure("write", path, error)) from error
        return {"success": True, **_state(new)}


def _found(path: str) -> os.stat_result | None:
    """Returns the status of a regular file, None when there is nothing. Raises `CallError` and `OSError`."""
    try:
        status = os.stat(bytes_of(path))
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise CallError(BAD_PARAMS, "files.write: path is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise CallError(BAD_PARAMS, "files.write: not a regular file")
    return status


def _fill(path: str, content: bytes, mode: int | None, old: os.stat_result | None) -> None:
    """Makes a file that nobody else can read before it has its mode, and brings it to the disk. Raises `OSError`."""
    wanted = stat.S_IMODE(old.st_mode) if mode is None and old is not None else mode
    descriptor = os.open(
        bytes_of(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _NEW_MODE if wanted is None else 0o600
    )
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        if old is not None:
            try:
                os.fchown(descriptor, old.st_uid, old.st_gid)
            except PermissionError:
                pass  # it becomes the daemon's user's, as with every editor
        if wanted is not None:
            os.fchmod(descriptor, wanted)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: str) -> None:
    descriptor = os.open(bytes_of(directory), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _changed(status: os.stat_result | None, params: Params) -> bool:
    """Returns whether the file is another one than the request expects."""
    size, mtime = params.optional("ifSize"), params.text("ifMtime")
    if size is not None and size != (status.st_size if status is not None else -1):
        return True
    return bool(mtime) and mtime != (str(status.st_mtime_ns) if status is not None else "")


def _state(status: os.stat_result | None) -> Result:
    return {"size": status.st_size, "mtime": str(status.st_mtime_ns)} if status is not None else {}
