"""Recursive deletion, and what must never be deleted."""

from __future__ import annotations

import os
from errno import EACCES, EINVAL, EISDIR, ELOOP, ENOTDIR, EPERM

from sterna.remote.directories import remove
from sterna.remote.gotext import absolute, bytes_of, clean, number_of, text_of


class RemovalError(OSError):
    """Something could not be deleted; `text` is the contract's form of it."""

    def __init__(self, operation: str, path: bytes, number: int) -> None:
        super().__init__(number, os.strerror(number))
        self.operation, self.path = operation, text_of(path)


def holds_home(path: str, home: str) -> bool:
    """Returns whether deleting `path` would delete the home directory or the root.

    Besides the lexical rule of the contract this looks at where links in the middle of either path lead to.
    """
    target = absolute(path)
    if target == "/":
        return True
    if not home:
        return False
    places = {absolute(home), _resolved(home)}
    parent, _, name = target.rpartition("/")
    resolved = clean(f"{_resolved(parent or '/')}/{name}")
    return any(place == root or place.startswith(root + "/") for root in (target, resolved) for place in places)


def _resolved(path: str) -> str:
    try:
        return text_of(os.path.realpath(bytes_of(path)))
    except ValueError:  # a NUL, with which no link can be named
        return path


def remove_all(path: str) -> None:
    """Deletes a file or a whole directory; links are deleted, never followed. A missing path is fine.

    What cannot be deleted does not keep the rest from being deleted. Raises `RemovalError` with the first failure, in
    the form of os.RemoveAll.
    """
    if not path:
        return
    raw = bytes_of(path)
    if path == "." or path.endswith("/."):
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


class _Removal:
    """One deletion below an open directory; with a stack of its own, as trees may be deeper than the interpreter's."""

    def __init__(self, directory: int, path: bytes) -> None:
        self._opened: list[tuple[int, bytes, bytes, list[bytes]]] = [(directory, path, b"", [])]
        self._problem: RemovalError | None = None

    def run(self, name: bytes) -> None:
        """Deletes `name`. Raises `RemovalError`."""
        self._opened[0][3].append(name)
        try:
            while len(self._opened) > 1 or self._opened[0][3]:
                directory, path, _name, names = self._opened[-1]
                if names:
                    self._visit(directory, path, names.pop())
                else:
                    self._leave()
        finally:
            for inside, *_ in self._opened[1:]:
                os.close(inside)
        if self._problem is not None:
            raise self._problem

    def _fail(self, operation: str, path: bytes, error: OSError | ValueError) -> None:
        if self._problem is None:
            self._problem = RemovalError(operation, path, number_of(error))

    def _visit(self, directory: int, above: bytes, name: bytes) -> None:
        """Deletes what is no directory, and goes into what is one."""
        path = above + b"/" + name
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            if number_of(error) not in {EISDIR, EPERM, EACCES}:
                self._fail("unlinkat", path, error)
                return
            self._enter(directory, path, name, error)

    def _enter(self, directory: int, path: bytes, name: bytes, why: OSError | ValueError) -> None:
        try:
            inside = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in {ENOTDIR, ELOOP}:
                self._fail("unlinkat", path, why)
            else:
                self._fail("openfdat", path, error)
            return
        self._opened.append((inside, path, name, [*map(os.fsencode, os.listdir(inside))]))

    def _leave(self) -> None:
        """Deletes the directory whose entries have all been visited."""
        inside, path, name, _names = self._opened.pop()
        os.close(inside)
        try:
            os.rmdir(name, dir_fd=self._opened[-1][0])
        except FileNotFoundError:
            pass
        except OSError as error:
            self._fail("unlinkat", path, error)
