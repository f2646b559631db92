"""What `sterna pipe --in F --out F` leaves on disk, so that another process goes on exactly where a killed one stood.

The input's position is its file offset, the output's is the size of the file it is appended to; beside that file a
small private record says whose attachment it is. Order: data into the file, then the acknowledgement.
"""

from __future__ import annotations

import fcntl
import os
import stat
from hashlib import sha256

import msgspec

from sterna.errors import StorageError, UsageError
from sterna.paths import atomic_write, read_private
from sterna.protocol.client import Saved

_RECORD_MAX_BYTES = 65_536


class Record(msgspec.Struct, omit_defaults=True):
    """Who transfers what: `asked` (hash of the words for the session), `source` (path of the input file), `node` (id).

    `request` and `attachment` are chosen before the first byte goes out; `uid` to `input` are as in `Saved`. `base` is
    the output position of the file's first byte, `eof` the input position of the end mark once it was sent, `status`
    the exit status once everything was written.
    """

    asked: bytes
    source: str
    request: bytes
    attachment: bytes
    node: bytes = b""
    uid: bytes = b""
    log: int = 0
    epoch: int = 1
    input: int = 0
    base: int = 0
    eof: int | None = None
    status: int | None = None


class Transfer:
    """The two open files of an exact transfer and its record; `source` and `target` are descriptors.

    `asked` are the user's words for the session. Raises UsageError or StorageError when the files cannot be used.
    """

    __slots__ = ("_path", "_target_path", "record", "source", "target")

    def __init__(self, source: str, target: str, asked: str) -> None:
        self._target_path = target
        directory, base = os.path.split(os.path.realpath(target))
        self._path = os.path.join(directory, f".{base}.sterna")
        self.source = open_source(source)
        try:
            self.target = _open_target(target)
            try:
                self._check(source, target)
                digest = sha256(asked.encode()).digest()  # a share link in it is a secret
                self.record = Record(digest, os.path.realpath(source), os.urandom(16), os.urandom(16))
                self._load()
            except BaseException:
                os.close(self.target)
                raise
        except BaseException:
            os.close(self.source)
            raise

    def _check(self, source: str, target: str) -> None:
        status = os.fstat(self.source)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{source} is no regular file and cannot be read again: use `--in` without `--out`.")
        if os.path.sameopenfile(self.source, self.target):
            raise UsageError(f"{source} and {target} are the same file.")
        try:
            fcntl.flock(self.target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"Another process is writing to {target}.") from None

    def _load(self) -> None:
        """Takes up the record of an earlier process, if there is one."""
        raw = read_private(self._path, _RECORD_MAX_BYTES)
        if raw is None:
            if self.size:
                raise UsageError(f"{self._target_path} is not empty and no transfer into it was begun: remove it.")
            return
        try:
            old = msgspec.msgpack.decode(raw, type=Record)
        except msgspec.DecodeError:
            raise StorageError(f"{self._path} is damaged: remove it and the output file to begin anew.") from None
        new = self.record
        if (old.asked, old.source) != (new.asked, new.source):
            raise UsageError(
                f"{self._target_path} belongs to another transfer, from {old.source}: give the same options as then, "
                f"or remove it and {self._path}."
            )
        self.record = old

    def bind(self, node: bytes) -> None:
        """Notes before the first byte which node it is (its id); UsageError if it was begun at another one."""
        if self.record.node not in (b"", node):
            raise UsageError(f"The transfer into {self._target_path} was begun at another node: go on there.")
        self.record.node = node
        self.store()

    @property
    def size(self) -> int:
        """The size of the output file: everything before it is safely written."""
        return os.fstat(self.target).st_size

    def saved(self) -> Saved:
        """Returns the attachment to go on with; one without a uid repeats its CONNECT."""
        record = self.record
        return Saved(
            record.uid, record.attachment, request=record.request, epoch=record.epoch, log=record.log,
            output=record.base + self.size, input=record.input,
        )  # fmt: skip

    def store(self) -> None:
        """Writes the record; StorageError."""
        atomic_write(self._path, msgspec.msgpack.encode(self.record))

    def forget(self) -> None:
        """Removes the record: the transfer is complete, or was refused before it began."""
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass

    def close(self) -> None:
        """Closes both files."""
        os.close(self.source)
        os.close(self.target)


def open_source(path: str) -> int:
    """Returns a descriptor to read a file; UsageError when it cannot be opened."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None


def open_target(path: str) -> int:
    """Returns a descriptor to append to a file, made if it is absent; UsageError when it cannot be, or is not empty."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        os.close(fd)
        raise UsageError(f"{path} is not empty: remove it, or name another file.")
    return fd


def _open_target(path: str) -> int:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is no regular file, whose size says what was written: use `--out` without `--in`.")
    return fd
