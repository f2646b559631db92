"""`-install`: puts one version of the CLI where the caller wants it and prints what became of that."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import subprocess
from typing import TYPE_CHECKING, Final

from sterna.errors import SternaError
from sterna.remote import build
from sterna.remote.directories import make_directories, remove
from sterna.remote.gotext import errno_text, failure, join, quote
from sterna.remote.unzstd import UnzstdError, unzstd
from sterna.remote.wire import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from sterna.remote.flags import Flags

_MARK: Final = "__INSTALL_RESULT__"
_FETCH: Final = ".fetch-"
_BLOB: Final = ".blob-"
_PACKED: Final = ".zst"
_COPY_BYTES = 256 * 1024


class InstallError(SternaError):
    """The version was not installed; the text is the contract's."""


def install(flags: Flags) -> str:
    """Returns the line that -install prints. The exit status is 0 whatever happened."""
    directory, version = flags.texts["cli-dir"], flags.texts["cli-version"]
    path = join(directory, version) if directory and version else ""
    result: dict[str, object] = {
        "serverVersion": build.version(), "os": build.PLATFORM, "arch": build.arch(),
        "libc": libc(flags.seconds("libc-probe-timeout")), "cliPath": path, "cliWasPresent": False,
    }  # fmt: skip
    if path:
        try:
            result["cliWasPresent"] = _Install(flags, path).run()
        except InstallError as error:
            result["cliError"] = str(error)
    return _MARK + encode(result)


def libc(seconds: float) -> str:
    """Returns `musl` or `glibc`. Parameters: `seconds`, a bound of asking ldd, 0 for none."""
    if glob.glob("/lib/ld-musl-*.so.*"):
        return "musl"
    try:
        done = subprocess.run(
            ["ldd", "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,  # noqa: S607 # as the user's PATH has it
            timeout=seconds or None, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "glibc"
    return "musl" if done.returncode == 0 and b"musl" in done.stdout else "glibc"


class _Install:
    """One installation."""

    def __init__(self, flags: Flags, path: str) -> None:
        self._flags, self._path = flags, path
        self._directory, self._version = flags.texts["cli-dir"], flags.texts["cli-version"]
        self._max_bytes = flags.ints["max-cli-bytes"]

    def run(self) -> bool:
        """Returns whether the version was there already. Raises `InstallError`."""
        if self._is_file() and self._runs(self._path):
            return True
        self._check_version()
        packed, url = self._flags.texts["cli-zst"], self._flags.texts["cli-url"]
        if not packed and not url:
            raise InstallError(f"cli {self._version} missing and no --cli-url or --cli-zst provided")
        try:
            if packed:
                self._from_file(packed)
            else:
                self._from_url(url)
        finally:
            self._sweep()
        self._prune()
        return False

    def _is_file(self) -> bool:
        try:
            return stat.S_ISREG(os.stat(self._path).st_mode)
        except (OSError, ValueError):
            return False

    def _runs(self, path: str) -> bool:
        try:
            done = subprocess.run(
                [path, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                timeout=self._flags.seconds("cli-probe-timeout") or None, check=False,
            )  # fmt: skip
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def _check_version(self) -> None:
        version = self._version
        if "/" in version or "\\" in version or version in {".", ".."}:
            raise InstallError(f"cli version {quote(version)} must be a single path component")
        if version.startswith(_FETCH) or version.endswith(_PACKED):
            raise InstallError(f"cli version {quote(version)} collides with the install temp sweep")

    # -------------------------------------------------------------------------------------------------------- sources

    def _from_file(self, packed: str) -> None:
        try:
            source = os.open(packed, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise InstallError(f"opening input: {failure('open', packed, error)}") from error
        try:
            if self._flags.texts["cli-checksum"]:
                self._check_sum(source, packed)
            self._place(source, packed, lambda: remove(packed))
        finally:
            os.close(source)

    def _check_sum(self, source: int, path: str) -> None:
        digest = hashlib.sha256()
        read = _reader(source, path)
        while data := read(_COPY_BYTES):
            digest.update(data)
        os.lseek(source, 0, os.SEEK_SET)
        self._compare(digest.hexdigest())

    def _compare(self, actual: str) -> None:
        expected = self._flags.texts["cli-checksum"]
        if expected.lower() != actual:
            raise InstallError(f"checksum mismatch: expected={expected}, actual={actual}")

    def _from_url(self, url: str) -> None:
        from sterna.remote.download import DownloadError, download

        self._make_directory()
        blob = os.path.join(self._directory, _BLOB + os.urandom(8).hex())
        try:
            file = os.open(blob, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise InstallError(failure("open", blob, error)) from error
        try:
            try:
                self._compare(download(url, file, self._flags.seconds("cli-download-timeout"), self._max_bytes))
            except DownloadError as error:
                raise InstallError(str(error)) from error
            os.lseek(file, 0, os.SEEK_SET)
            self._place(file, blob, lambda: None)
        finally:
            os.close(file)
            remove(blob)

    # ---------------------------------------------------------------------------------------------------------- place

    def _make_directory(self) -> None:
        try:
            make_directories(self._directory)
        except (OSError, ValueError) as error:
            raise InstallError(f"mkdir cli dir: {error}") from error

    def _place(self, source: int, path: str, unpacked: Callable[[], object]) -> None:
        """Unpacks, tries and moves the executable to its place; calls `unpacked` in between.

        Should somebody else's sweep take the unpacked file away, it is unpacked once more.
        """
        self._make_directory()
        try:
            self._attempt(source, path, unpacked)
        except FileNotFoundError:
            try:
                self._attempt(source, path, unpacked)
            except FileNotFoundError as error:
                cause = f"rename {error.filename} {self._path}: {errno_text(error.errno or 0)}"
                raise InstallError(f"staging file vanished before install: {cause}") from error

    def _attempt(self, source: int, path: str, unpacked: Callable[[], object]) -> None:
        staged = os.path.join(self._directory, _FETCH + os.urandom(8).hex())
        try:
            self._unpack(_reader(source, path), staged)
            unpacked()
            if not self._runs(staged):
                os.stat(staged)
                raise InstallError(f"installed cli at {self._path} is not runnable")
            self._clear()
            os.rename(staged, self._path)
        except FileNotFoundError:
            os.lseek(source, 0, os.SEEK_SET)
            raise
        except OSError as error:
            raise InstallError(f"rename {staged} {self._path}: {errno_text(error.errno or 0)}") from error
        finally:
            remove(staged)

    def _unpack(self, read: Callable[[int], bytes], staged: str) -> None:
        size = 0
        try:
            with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
                for piece in unzstd(read):
                    size += len(piece)
                    if self._max_bytes and size > self._max_bytes:
                        raise InstallError("decompressing: size limit exceeded")
                    file.write(piece)
            os.chmod(staged, 0o755)  # noqa: S103 # an executable, in a directory of the user's own
        except UnzstdError as error:
            raise InstallError(f"decompressing: {error}") from error
        except OSError as error:
            raise InstallError(f"decompressing: {failure('write', staged, error)}") from error

    def _clear(self) -> None:
        """Removes a directory that is where the executable is to be."""
        from sterna.remote.removal import RemovalError, remove_all

        if os.path.isdir(self._path) and not os.path.islink(self._path):
            try:
                remove_all(self._path)
            except RemovalError as error:
                cause = f"{error.operation} {error.path}: {errno_text(error.errno or 0)}"
                raise InstallError(f"clearing stale dir at {self._path}: {cause}") from error

    # --------------------------------------------------------------------------------------------------------- tidying

    def _sweep(self) -> None:
        """Removes what attempts left behind."""
        for name in _names(self._directory):
            if name.startswith(_FETCH) or name.endswith(_PACKED):
                remove(os.path.join(self._directory, name))

    def _prune(self) -> None:
        """Removes all but the newest versions, of which the one just installed is one whatever times others have."""
        keep = self._flags.ints["cli-keep"]
        if keep <= 0:
            return
        found = []
        for name in _names(self._directory):
            path = os.path.join(self._directory, name)
            try:
                status = os.lstat(path)
            except OSError:
                continue
            if not stat.S_ISDIR(status.st_mode):
                found.append((name == self._version, status.st_mtime_ns, path))
        for _own, _age, path in sorted(found, reverse=True)[keep:]:
            remove(path)


def _reader(source: int, path: str) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        try:
            return os.read(source, size)
        except OSError as error:
            raise UnzstdError(failure("read", path, error)) from error

    return read


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
