"""The method `files.extract_tar`: an archive replaces a directory."""

from __future__ import annotations

import os
import stat
from errno import ENAMETOOLONG
from typing import TYPE_CHECKING

from sterna.errors import SternaError
from sterna.remote.beneath import step
from sterna.remote.directories import MkdirError, make_directories, remove
from sterna.remote.gotext import bytes_of, clean, errno_text, failure, join, quote, text_of
from sterna.remote.gzipped import GzipError, GzipReader
from sterna.remote.removal import RemovalError, holds_home, remove_all
from sterna.remote.tarball import DIRECTORY, REGULAR, Entry, TarError, TarReader

if TYPE_CHECKING:
    from collections.abc import Callable

_MARKER = b".synced"
_NAME_MAX_BYTES = 4_096  # PATH_MAX: nothing deeper could be opened by its path afterwards


class ExtractError(SternaError):
    """Unpacking stops; the text is the contract's, `count` how many files it says were unpacked."""

    def __init__(self, text: str, count: int = 0) -> None:
        super().__init__(text)
        self.count = count


def extract(archive: str, target: str, home: str, max_bytes: int, staged: bool = False) -> tuple[int, str]:
    """Replaces the directory `target` by what `archive` holds; returns how many files, and what went wrong if anything.

    Parameters: `home`, the directory that is never deleted; `max_bytes`, of all files together, 0 for no bound.
    The archive is deleted on every outcome once it could be opened. With `staged` the directory is replaced in one
    step, when everything is unpacked, and stays as it is if that fails.
    """
    try:
        place = _checked(target, home)
        try:
            source = _opened(archive, staged)
        except (OSError, ValueError) as error:
            raise ExtractError(f"open archive: {failure('open', archive, error)}") from error
        try:
            return _unpack(lambda size: _read(source, archive, size), place, max_bytes, staged), ""
        finally:
            if not staged or _is(source, archive):  # not a file of the same name that came out of the archive
                remove(archive)
            os.close(source)
    except ExtractError as error:
        return error.count, str(error)


def _opened(archive: str, only_regular: bool) -> int:
    """Returns the descriptor of an archive. Raises `ExtractError`, `OSError`, `ValueError`."""
    waiting = os.O_NONBLOCK if only_regular else 0  # a pipe without a writer would keep a thread for ever
    source = os.open(bytes_of(archive), os.O_RDONLY | os.O_NOCTTY | waiting)
    if only_regular and not stat.S_ISREG(os.fstat(source).st_mode):
        os.close(source)
        raise ExtractError(f"open archive: open {archive}: not a regular file")
    return source


def _is(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(bytes_of(path)))
    except OSError:
        return False


def _checked(target: str, home: str) -> str:
    """Returns the cleaned directory if it may be replaced. Raises `ExtractError`."""
    place = clean(target)
    if not target.startswith("/") or place == "/":
        raise ExtractError(f"destDir must be an absolute, non-root path: {quote(target)}")
    if holds_home(place, home):
        raise ExtractError(f"destDir must not be or contain the home directory: {quote(target)}")
    return place


def _read(source: int, path: str, size: int) -> bytes:
    try:
        return os.read(source, size)
    except OSError as error:
        raise GzipError(failure("read", path, error)) from error


def _unpack(read: Callable[[int], bytes], place: str, max_bytes: int, staged: bool) -> int:
    try:
        unpacked = GzipReader(read)
    except GzipError as error:
        raise ExtractError(f"gzip: {error}") from error
    if staged:
        return _unpack_staged(unpacked, place, max_bytes)
    try:
        remove_all(place)
    except RemovalError as error:
        raise ExtractError(f"clean destDir: {error.operation} {error.path}: {errno_text(error.errno or 0)}") from error
    try:
        make_directories(place)
        tree = _Tree(place)
    except MkdirError as error:
        raise ExtractError(f"mkdir destDir: {error}") from error
    except (OSError, ValueError) as error:
        raise ExtractError(f"mkdir destDir: {failure('mkdir', place, error)}") from error
    return _fill(unpacked, tree, max_bytes)


def _unpack_staged(unpacked: GzipReader, place: str, max_bytes: int) -> int:
    from sterna.remote.staging import Staging

    try:
        staging = Staging(place)
    except MkdirError as error:
        raise ExtractError(f"mkdir destDir: {error}") from error
    except (OSError, ValueError) as error:
        raise ExtractError(f"mkdir destDir: {failure('mkdir', place, error)}") from error
    try:
        count = _fill(unpacked, _Tree(place, staging.path), max_bytes)
    except OSError as error:
        staging.drop()
        raise ExtractError(f"mkdir destDir: {failure('open', place, error)}") from error
    except BaseException:
        staging.drop()
        raise
    try:
        staging.swap()
    except OSError as error:
        staging.drop()
        raise ExtractError(f"swap destDir: {failure('rename', place, error)}", count) from error
    return count


def _fill(unpacked: GzipReader, tree: _Tree, max_bytes: int) -> int:
    try:
        count = _entries(TarReader(unpacked.read_full), tree, max_bytes)
        os.close(tree.create([], _MARKER))
        return count
    except OSError as error:
        name = text_of(_MARKER)
        raise ExtractError(f"create {name}: {failure('open', join(tree.path, name), error)}") from error
    finally:
        tree.close()


def _entries(tar: TarReader, tree: _Tree, max_bytes: int) -> int:
    count = total = 0
    while True:
        try:
            entry = tar.next()
        except (GzipError, TarError) as error:
            raise ExtractError(f"gzip: {error}", count) from error
        if entry is None:
            return count
        target = join(tree.path, entry.name)
        if target != tree.path and not target.startswith(tree.path + "/"):
            raise ExtractError(f"unsafe path in archive: {entry.name}")
        parts = [bytes_of(part) for part in target[len(tree.path) + 1 :].split("/") if part]
        if entry.kind == DIRECTORY:
            try:
                os.close(tree.enter(parts))
            except _MkdirError as error:
                raise ExtractError(f"mkdir {entry.name}: {error}") from error
        elif entry.kind == REGULAR:
            total += entry.size
            if max_bytes and total > max_bytes:
                raise ExtractError("extraction size limit exceeded", count)
            _unpack_file(tar, entry, tree, parts, count)
            count += 1
        else:
            raise ExtractError(f"unsupported tar entry type {entry.kind}: {entry.name}")


def _unpack_file(tar: TarReader, entry: Entry, tree: _Tree, parts: list[bytes], count: int) -> None:
    target = join(tree.path, entry.name)
    try:
        file = tree.create(parts[:-1], parts[-1] if parts else b".")
    except _MkdirError as error:
        raise ExtractError(f"mkdir parent {entry.name}: {error}") from error
    except (OSError, ValueError) as error:
        raise ExtractError(f"create {entry.name}: {failure('open', target, error)}") from error
    try:
        for piece in tar.data():
            view = memoryview(piece)
            while view:
                view = view[os.write(file, view) :]
    except OSError as error:
        raise ExtractError(f"write {entry.name}: {failure('write', target, error)}", count) from error
    except GzipError as error:
        raise ExtractError(f"gzip: {error}", count) from error
    finally:
        os.close(file)


class _MkdirError(SternaError):
    """A directory could not be made; the text names the one that it failed at."""


class _Tree:
    """The new directory; everything is reached from its descriptor without following links, whoever swaps them in.

    Parameters: `path`, what it is called; `staged`, where it is until it is complete, if not there.
    """

    def __init__(self, path: str, staged: str = "") -> None:
        self.path = path
        self._root = os.open(bytes_of(staged or path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def close(self) -> None:
        os.close(self._root)

    def enter(self, parts: list[bytes]) -> int:
        """Returns the descriptor of a directory below, made if it is missing. Raises `_MkdirError`."""
        here = os.dup(self._root)
        length = 0
        for depth, part in enumerate(parts, 1):
            length += len(part) + 1
            try:
                if length > _NAME_MAX_BYTES:
                    os.close(here)
                    raise OSError(ENAMETOOLONG, os.strerror(ENAMETOOLONG))
                here = step(here, part, 0o700)
            except (OSError, ValueError) as error:
                path = join(self.path, text_of(b"/".join(parts[:depth])))
                raise _MkdirError(failure("mkdir", path, error)) from error
        return here

    def create(self, parts: list[bytes], name: bytes) -> int:
        """Returns the descriptor of an empty file below. Raises `_MkdirError`, `OSError`, `ValueError`."""
        directory = self.enter(parts)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            return os.open(name, flags, 0o600, dir_fd=directory)
        finally:
            os.close(directory)
