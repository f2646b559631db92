"""Recursive deletion, and what must never be deleted."""

from __future__ import annotations

import os
import stat
from errno import EACCES, EINVAL, EISDIR, ELOOP, ENOTDIR, EPERM, ESTALE
from typing import Final

from sterna.remote.directories import remove
from sterna.remote.gotext import absolute, bytes_of, clean, number_of, text_of, working_directory

_PATH_MAX_BYTES: Final = 16 * 1024  # four times what the system takes, for a relative path below a long directory
_OPEN_MAX: Final = 100  # directories of one deletion that are open at once
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class RemovalError(OSError):
    """Something could not be deleted; `text` is the contract's form of it."""

    def __init__(self, operation: str, path: bytes, number: int) -> None:
        super().__init__(number, os.strerror(number))
        self.operation, self.path = operation, text_of(path)


def holds_home(path: str, home: str, base: str = "") -> bool:
    """Returns whether deleting `path` would delete the home directory or the root.

    Besides the lexical rule of the contract this looks at where links in the middle of either path lead to, also with
    a `..` after them, and at `path` seen from the directory `base`.
    """
    target = absolute(path)
    targets = {target, *map(_without_last, (target, _full(path), _full(os.path.join(base, path))))}
    if "/" in targets:
        return True
    if not home:
        return False
    places = {absolute(home), resolved(home)}
    return any(place == root or place.startswith(root + "/") for root in targets for place in places)


def names_home(path: str, home: str, base: str) -> bool:
    """Returns whether git means a worktree that holds the home directory by `path`, seen from the directory `base`.

    git follows a link at the end of a path as well, and takes the last names of a worktree's path for the whole.
    """
    place = resolved(home) if home else "/"
    target, name = resolved(_full(os.path.join(base, path))), path.strip("/")
    while place != "/":
        if target == place or (name and place.endswith("/" + name)):
            try:
                if stat.S_ISREG(os.lstat(bytes_of(place + "/.git")).st_mode):
                    return True
            except OSError:
                pass
        place = place.rpartition("/")[0] or "/"
    return False


def _full(path: str) -> str:
    return path if path.startswith("/") else os.path.join(working_directory(), path)


def _without_last(path: str) -> str:
    """Returns a full path with all links followed but one at its end."""
    parent, _, name = path.rstrip("/").rpartition("/")
    if name in {"", ".", ".."}:
        return resolved(path)
    return clean(f"{resolved(parent or '/')}/{name}")


def resolved(path: str) -> str:
    """Returns a path with all links followed, the path itself when the system would not take it."""
    raw = bytes_of(path)
    if len(raw) > _PATH_MAX_BYTES or b"\0" in raw:
        return path
    return text_of(os.path.realpath(raw))


def remove_all(path: str) -> None:
    """Deletes a file or a whole directory; links are deleted, never followed. A missing path is fine.

    What cannot be deleted does not keep the rest from being deleted. Raises `RemovalError` with the first failure, in
    the form of os.RemoveAll.
    """
    if not path:
        return
    raw = bytes_of(path)
    if path.rstrip("/").rpartition("/")[2] in {".", ".."}:  # with `..` it would be the directory above a link's target
        raise RemovalError("RemoveAll", raw, EINVAL)
    if absolute(path) == "/":
        raise RemovalError("RemoveAll", raw, EINVAL)  # callers have refused it before
    if remove(path):
        return
    parent, name = _split(raw)
    try:
        directory = os.open(parent, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise RemovalError("open", parent, number_of(error)) from error
    try:
        _Removal(directory, parent).run(name)
    finally:
        os.close(directory)


def _split(path: bytes) -> tuple[bytes, bytes]:
    """Returns the directory and the name in it, slashes at the end left out."""
    parent, _, name = path.rstrip(b"/").rpartition(b"/")
    return (parent or (b"/" if path.startswith(b"/") else b".")), name


class _Level:
    """A directory that is being emptied: its name, what is left in it, its descriptor, -1 while it is closed."""

    __slots__ = ("descriptor", "identity", "name", "names")

    def __init__(self, descriptor: int, name: bytes, names: list[bytes]) -> None:
        self.descriptor, self.name, self.names = descriptor, name, names
        status = os.fstat(descriptor)
        self.identity = status.st_dev, status.st_ino


class _Removal:
    """One deletion below an open directory, which it does not close.

    It has a stack of its own, as trees may be deeper than the interpreter's. Of deep trees the directories far above
    are closed; they are found again by `..`, as names lead elsewhere when somebody moves a directory meanwhile.
    """

    def __init__(self, directory: int, path: bytes) -> None:
        self._levels = [_Level(directory, path, [])]
        self._problem: RemovalError | None = None

    def run(self, name: bytes) -> None:
        """Deletes `name`. Raises `RemovalError`."""
        self._levels[0].names.append(name)
        try:
            while len(self._levels) > 1 or self._levels[0].names:
                level = self._levels[-1]
                if level.names:
                    self._visit(level.descriptor, level.names.pop())
                else:
                    self._leave()
        finally:
            for level in self._levels[1:]:
                if level.descriptor >= 0:
                    os.close(level.descriptor)
        if self._problem is not None:
            raise self._problem

    def _fail(self, operation: str, name: bytes, error: OSError | ValueError) -> None:
        if self._problem is None:
            path = b"/".join([*(level.name for level in self._levels), name])
            self._problem = RemovalError(operation, path, number_of(error))

    def _visit(self, directory: int, name: bytes) -> None:
        """Deletes what is no directory, and goes into what is one."""
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            if number_of(error) not in {EISDIR, EPERM, EACCES}:
                self._fail("unlinkat", name, error)
                return
            self._enter(directory, name, error)

    def _enter(self, directory: int, name: bytes, why: OSError | ValueError) -> None:
        try:
            inside = os.open(name, _DIRECTORY, dir_fd=directory)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in {ENOTDIR, ELOOP}:
                self._fail("unlinkat", name, why)
            else:
                self._fail("openfdat", name, error)
            return
        try:
            names = [*map(os.fsencode, os.listdir(inside))]
        except OSError as error:
            self._fail("readdirnames", name, error)
            names = []  # an empty one can be deleted all the same
        self._levels.append(_Level(inside, name, names))
        if len(self._levels) > _OPEN_MAX + 1:  # the first one stays open, it is the caller's
            above = self._levels[-1 - _OPEN_MAX]
            if above.descriptor >= 0:
                os.close(above.descriptor)
                above.descriptor = -1

    def _leave(self) -> None:
        """Deletes the directory whose entries have all been visited. Raises `RemovalError` when there is no way up."""
        inside, above = self._levels[-1], self._levels[-2]
        if above.descriptor < 0:
            try:
                above.descriptor = os.open(b"..", _DIRECTORY, dir_fd=inside.descriptor)
                status = os.fstat(above.descriptor)
                if (status.st_dev, status.st_ino) != above.identity:
                    raise OSError(ESTALE, os.strerror(ESTALE))
            except OSError as error:
                self._fail("openfdat", b"..", error)
                assert self._problem is not None
                raise self._problem from error
        self._levels.pop()
        os.close(inside.descriptor)
        try:
            os.rmdir(inside.name, dir_fd=above.descriptor)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._fail("unlinkat", inside.name, error)
