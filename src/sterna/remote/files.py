"""The methods `files.*`; all of them run in worker threads."""

from __future__ import annotations

import os
import stat
from collections import deque
from errno import EFBIG, ENOENT, ENOTDIR
from heapq import merge
from typing import TYPE_CHECKING, Final

from sterna.limits import REMOTE_READ_DEFAULT_BYTES, REMOTE_READ_DEVICE_MAX_BYTES
from sterna.remote.calls import BAD_PARAMS, FAILED, CallError, LargeReplyError, MayWaitError
from sterna.remote.extract import extract
from sterna.remote.fields import TEXT, Integer, Kind
from sterna.remote.gotext import bytes_of, expand, failure, join, number_of, text_of
from sterna.remote.wire import Raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sterna.remote.calls import Params, Result

_PATH: Final[Mapping[str, Kind]] = {"path": TEXT, "maxBytes": Integer(signed=True)}
FIELDS: Final[Mapping[str, Mapping[str, Kind]]] = {
    "files.list": _PATH,
    "files.validate": _PATH,
    "files.stat": _PATH,
    "files.read": _PATH,
    "files.extract_tar": {"archivePath": TEXT, "destDir": TEXT},
}

_TYPES: Final = {
    stat.S_IFDIR: "d", stat.S_IFIFO: "p", stat.S_IFSOCK: "S", stat.S_IFBLK: "D", stat.S_IFCHR: "Dc", stat.S_IFLNK: "L",
}  # fmt: skip
_READ_BYTES = 1024 * 1024
_SMALL_BYTES = 16 * 1024  # up to here a reply is made whatever its client has to read
_LISTED_RATIO = 8  # of what is told of a directory to its size on the disk, about
_SORTED = 8_192


def mode_text(mode: int) -> str:
    """Returns type letters, which add up, and nine permission characters (os.FileMode.String)."""
    letters = _TYPES.get(stat.S_IFMT(mode), "")
    letters += "u" * bool(mode & stat.S_ISUID) + "g" * bool(mode & stat.S_ISGID) + "t" * bool(mode & stat.S_ISVTX)
    bits = "".join(char if mode >> (8 - place) & 1 else "-" for place, char in enumerate("rwxrwxrwx"))
    return (letters or "-") + bits


class Files:
    """Reads what the daemon's user may read.

    Parameters: `home`, what `~` stands for; `regular_only`, whether devices and pipes are refused; `extract_max_bytes`,
    a bound of what one archive unpacks to, 0 for none; `staged`, whether an archive is unpacked beside its place.
    """

    def __init__(
        self, home: str, *, regular_only: bool = False, extract_max_bytes: int = 0, staged: bool = False
    ) -> None:
        self._staged = staged
        self._home, self._regular_only, self._extract_max_bytes = home, regular_only, extract_max_bytes
        self.methods: Mapping[str, Callable[[Params], Result]] = {
            "files.list": self._list,
            "files.validate": self._validate,
            "files.stat": self._stat,
            "files.read": self._read,
            "files.extract_tar": self._extract,
        }

    def _path(self, params: Params) -> str:
        return expand(params.text("path"), self._home)

    def _stat(self, params: Params) -> Result:
        path = self._path(params)
        try:
            status = os.stat(bytes_of(path))
        except (OSError, ValueError) as error:
            if number_of(error) != ENOENT:
                raise CallError(FAILED, failure("stat", path, error)) from error
            return {"exists": False, "isDir": False, "size": 0, "mode": ""}
        mode = status.st_mode
        result: Result = {
            "exists": True, "isDir": stat.S_ISDIR(mode), "size": status.st_size, "mode": mode_text(mode)
        }  # fmt: skip
        return result | {"mtime": str(status.st_mtime_ns)} if params.flag("wantMtime") else result

    def _validate(self, params: Params) -> Result:
        path = self._path(params)
        try:
            return {"valid": True, "isDir": stat.S_ISDIR(os.stat(bytes_of(path)).st_mode)}
        except (OSError, ValueError) as error:
            missing = number_of(error) == ENOENT
            text = "Path does not exist" if missing else failure("stat", path, error)
            return {"valid": False, "isDir": False, "error": text}

    def _list(self, params: Params) -> Result:
        path = self._path(params)
        size = _size(path) * _LISTED_RATIO
        if size > _SMALL_BYTES:
            raise LargeReplyError(size, lambda: self._listed(path))
        return self._listed(path)

    def _listed(self, path: str) -> Result:
        try:
            descriptor = os.open(bytes_of(path), os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError) as error:
            raise CallError(FAILED, _why_not_listed(path, error)) from error
        try:
            names = [name for name in map(os.fsencode, os.listdir(descriptor)) if not name.startswith(b".")]
        except OSError as error:
            raise CallError(FAILED, failure("readdirent", path, error)) from error
        finally:
            os.close(descriptor)
        return {"entries": (self._entry(path, text_of(name)) for name in _sorted(names))}

    @staticmethod
    def _entry(path: str, name: str) -> Result:
        full = join(path, name)
        return {"name": name, "path": full, "isDir": os.path.isdir(bytes_of(full))}

    def _read(self, params: Params) -> Result:
        path = self._path(params)
        try:
            status = os.stat(bytes_of(path))
        except (OSError, ValueError) as error:
            if number_of(error) != ENOENT:
                raise CallError(FAILED, failure("stat", path, error)) from error
            return {"content": "", "exists": False}
        regular = stat.S_ISREG(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            raise CallError(BAD_PARAMS, "files.read: path is a directory")
        if self._regular_only and not regular:
            raise CallError(BAD_PARAMS, "files.read: not a regular file")
        wanted = params.number("maxBytes")
        limit = wanted if wanted > 0 else REMOTE_READ_DEFAULT_BYTES
        if status.st_size > limit:
            raise CallError(BAD_PARAMS, "files.read: file exceeds maxBytes")
        # What has no size, or grows, is read to its end; a bound keeps an endless device from taking all memory.
        if not regular:
            raise MayWaitError(lambda: _content(path, REMOTE_READ_DEVICE_MAX_BYTES))
        most = max(limit, REMOTE_READ_DEVICE_MAX_BYTES)
        if status.st_size > _SMALL_BYTES:
            raise LargeReplyError(status.st_size, lambda: self._regular(path, most))
        return self._regular(path, most)

    def _regular(self, path: str, limit: int) -> Result:
        """Reads what was a regular file a moment ago; somebody may have put a pipe in its place."""
        try:
            descriptor = os.open(bytes_of(path), os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        except BlockingIOError:  # somebody has a lease on it
            raise MayWaitError(lambda: _content(path, limit)) from None
        except OSError as error:
            raise CallError(FAILED, failure("open", path, error)) from error
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            return _read_all(path, descriptor, limit)
        os.close(descriptor)
        if self._regular_only:
            raise CallError(BAD_PARAMS, "files.read: not a regular file")
        raise MayWaitError(lambda: _content(path, REMOTE_READ_DEVICE_MAX_BYTES))

    def _extract(self, params: Params) -> Result:
        archive, target = params.text("archivePath"), params.text("destDir")
        if not archive or not target:
            raise CallError(BAD_PARAMS, "archivePath and destDir are required")
        archive, target = expand(archive, self._home), expand(target, self._home)
        if _may_wait(archive):
            raise MayWaitError(lambda: self._extracted(archive, target))
        return self._extracted(archive, target)

    def _extracted(self, archive: str, target: str) -> Result:
        count, problem = extract(archive, target, self._home, self._extract_max_bytes, self._staged)
        result: Result = {"success": not problem, "fileCount": count}
        return result | {"error": problem} if problem else result


def _size(path: str) -> int:
    try:
        return os.stat(bytes_of(path)).st_size
    except (OSError, ValueError):
        return 0  # which is told when it is opened


def _sorted(names: list[bytes]) -> Iterable[bytes]:
    """Returns the names in order; sorting very many at once would hold up the other threads."""
    if len(names) <= _SORTED:
        return sorted(names)
    return merge(*(sorted(names[start : start + _SORTED]) for start in range(0, len(names), _SORTED)))


def _why_not_listed(path: str, error: OSError | ValueError) -> str:
    """Returns what opening says of a path, without waiting for the other end of a pipe, else what listing says."""
    if number_of(error) == ENOTDIR:
        try:
            os.close(os.open(bytes_of(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY))
        except BlockingIOError:  # somebody has a lease on it
            pass
        except OSError as plain:
            return failure("open", path, plain)
        return failure("readdirent", path, error)
    return failure("open", path, error)


def _may_wait(path: str) -> bool:
    """Returns whether whoever opens or reads this may wait for somebody else."""
    try:
        mode = os.stat(bytes_of(path)).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _content(path: str, limit: int) -> Result:
    """Reads a file up to its end. Raises `CallError`."""
    try:
        descriptor = os.open(bytes_of(path), os.O_RDONLY | os.O_NOCTTY)
    except OSError as error:
        raise CallError(FAILED, failure("open", path, error)) from error
    return _read_all(path, descriptor, limit)


def _read_all(path: str, descriptor: int, limit: int) -> Result:
    pieces, size = deque[bytes](), 0
    try:
        while piece := os.read(descriptor, _READ_BYTES):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise OSError(EFBIG, os.strerror(EFBIG))
    except OSError as error:
        raise CallError(FAILED, failure("read", path, error)) from error
    finally:
        os.close(descriptor)
    return {"content": Raw(pieces), "exists": True}
