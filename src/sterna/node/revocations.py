"""What was revoked, in a file of its own: it outlives a damaged database and a power failure.

The database is fast, but what it was told last is on the disk only after a checkpoint, and a damaged one is begun
anew: neither may let somebody in again. So each revocation is one line here, on the disk (fsync(2)) before it is
answered, and at the start the database learns what it lacks. Each line has a checksum: one that a failure tore was
never answered, and is dropped.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING
from zlib import crc32

from sterna import limits, paths
from sterna.errors import Code, RefusedError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger("sterna.node.store")

FILE = "revocations"
_LINE_MAX_BYTES = 160
_MAX_BYTES = limits.REVOCATIONS_MAX * _LINE_MAX_BYTES
_TOKEN = re.compile(r"token (\S{1,64})")
_DEVICE = re.compile(r"device (\S{1,63}) ([0-9a-f]{64})")
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def token_line(token: str) -> str:
    """Returns what stands for a revoked access token."""
    return f"token {token}"


def device_line(tenant: str, device: bytes) -> str:
    """Returns what stands for a device that a tenant revoked."""
    return f"device {tenant} {device.hex()}"


class Revocations:
    """The file of revocations in the node's state directory, for who holds the lock on its database.

    Raises StorageError or TrustError if there is a file that cannot be read, or that others may use: without it nobody
    knows whom to refuse.
    """

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, FILE)
        self._torn = False
        content = paths.read_private(self.path, _MAX_BYTES) or b""
        lines = content.split(b"\n")
        read = [_read(line) for line in lines[:-1]]
        self._lines = dict.fromkeys(line for line in read if line)
        if None in read:
            log.error(
                "Some lines of the file of revocations are damaged: look at `sterna devices`, and revoke again what is "
                "missing there.", extra={"path": self.path, "lines": read.count(None)},
            )  # fmt: skip
        self._tidy = content == self._content()

    def tokens(self) -> set[str]:
        """Returns the ids of all revoked access tokens."""
        return {found[1] for line in self._lines if (found := _TOKEN.fullmatch(line))}

    def devices(self) -> set[tuple[str, bytes]]:
        """Returns all revoked devices, each with the tenant that revoked it."""
        return {(found[1], bytes.fromhex(found[2])) for line in self._lines if (found := _DEVICE.fullmatch(line))}

    def complete(self, lines: Iterable[str]) -> None:
        """Adds what only the database knows, and writes the file anew if that, or a torn line, makes it necessary."""
        before = len(self._lines)
        self._lines |= dict.fromkeys(lines)
        if self._tidy and len(self._lines) == before:
            return
        try:
            paths.atomic_write(self.path, self._content(), sync=True)
        except StorageError as error:
            # Nothing is lost by that: what the file lacks stands in the database.
            log.error("revocations not written", extra={"reason": str(error)})
            self._torn = True

    def add(self, line: str) -> int:
        """Puts a revocation onto the disk; returns what `take_back` needs.

        Raises StorageError if that fails, and then it does not stand there; RefusedError (`LIMIT`) if there are too
        many.
        """
        if len(self._lines) >= limits.REVOCATIONS_MAX:
            raise RefusedError(
                Code.LIMIT,
                f"{limits.REVOCATIONS_MAX} devices and tokens are revoked: replace the key that signs tokens "
                "(token.key), which ends all tokens at once.",
            )
        try:
            fresh = not os.path.exists(self.path)
            descriptor = os.open(self.path, _FLAGS, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                self._append(descriptor, size, _written(line))
                if fresh:
                    paths.sync_dir(os.path.dirname(self.path))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(
                f"It cannot be revoked: {self.path} cannot be written ({error.strerror}); free some space, try again."
            ) from error
        self._lines[line] = None
        return size

    def _append(self, descriptor: int, size: int, written: bytes) -> None:
        rest = memoryview(b"\n" + written if self._torn else written)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            self._torn = True
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
        self._torn = False

    def take_back(self, line: str, size: int) -> None:
        """Forgets a revocation that the database could not store, so that it is not half done."""
        self._lines.pop(line, None)
        self._torn = True  # what the line was put behind may be, as before
        with suppress(OSError):
            os.truncate(self.path, size)

    def _content(self) -> bytes:
        return b"".join(map(_written, self._lines))


def _written(line: str) -> bytes:
    said = line.encode()
    return b"%08x %s\n" % (crc32(said), said)


def _read(line: bytes) -> str | None:
    """Returns what a line says, "" for an empty one, None for a damaged one."""
    said = line[9:]
    if line and line[:9] != b"%08x " % crc32(said):
        return None
    return said.decode("utf-8", "replace")
