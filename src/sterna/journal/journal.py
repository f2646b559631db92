"""The journal: all logs of a node in one directory, kept by one process at a time."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator

from sterna.clock import SYSTEM_CLOCK, Clock
from sterna.errors import StorageError, UsageError
from sterna.journal.arena import Arena
from sterna.journal.chunks import (
    Chunk,
    Loaded,
    Refs,
    add_ref,
    each_ref,
    load_chunks,
    make_ref,
    make_refs,
    pages_of,
    split_ref,
)
from sterna.journal.format import (
    ARENA_MAX_BYTES,
    ARENA_MIN_BYTES,
    CLASS_PAGES,
    ENTRY_BYTES,
    MARKS,
    NUMBER_MAX,
    unpack_entry,
)
from sterna.journal.interface import JournalFullError
from sterna.journal.log import Log
from sterna.journal.space import Faults, Share, Space
from sterna.limits import ARENA_BYTES, JOURNAL_QUOTA_BYTES, PAGE_BYTES, POSITION_MAX, RING_BYTES, SPILL_BYTES

_ARENA_NAME = re.compile(r"arena-([0-9]{6})\Z")
_LOCK_NAME = "lock"


class Journal:
    """Holds the output of sessions so that it survives `kill -9` of the process, and knows damage after a power cut.

    Every call returns within a bounded time and is meant for one thread (docs/protocol.md, section 3).
    """

    def __init__(
        self,
        directory: str,
        *,
        quota_bytes: int = JOURNAL_QUOTA_BYTES,
        arena_bytes: int = ARENA_BYTES,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Opens or makes the directory, locks it and finds all logs.

        `quota_bytes` bounds the files together, `arena_bytes` is the size of each (128 KiB to 1 GiB, whole pages).
        Raises StorageError if the directory or a file in it is somebody else's, open to others, a link, in use by
        another process, of another version, or if there is no room for the first file; UsageError for impossible sizes.
        """
        if not ARENA_MIN_BYTES <= arena_bytes <= ARENA_MAX_BYTES or arena_bytes % PAGE_BYTES:
            raise UsageError(f"{arena_bytes} bytes is no size for an arena: use whole pages, 128 KiB to 1 GiB.")
        if quota_bytes < ARENA_MIN_BYTES:
            raise UsageError(f"A quota of {quota_bytes} bytes is too small for a journal: use 128 KiB or more.")
        self._logs: dict[int, Refs] = {}
        self._in_use: dict[int, Log] = {}
        self._owners: dict[int, Share] = {}
        self._shares: dict[str, Share] = {}
        self._parked = self._park
        self._closed = False
        self._lock_fd = -1
        self._directory_fd = _open_directory(directory)
        self._space = Space(self._directory_fd, directory, quota_bytes, arena_bytes, clock)
        try:
            self._lock_fd = _lock(self._directory_fd, directory)
            self._scan(directory)
            if not self._space.arenas and not self._space.grow():
                raise JournalFullError(self._space.full_reason)
        except BaseException:
            self.close()
            raise

    @property
    def used_bytes(self) -> int:
        """The bytes of all pages that belong to logs."""
        return self._space.used_bytes

    @property
    def reserved_bytes(self) -> int:
        """The bytes of all arena files."""
        return self._space.reserved_bytes

    @property
    def quota_bytes(self) -> int:
        """The most that the arena files may take."""
        return self._space.quota_bytes

    @property
    def arenas(self) -> int:
        """How many arena files there are."""
        return len(self._space.arenas)

    @property
    def faults(self) -> Faults:
        """Counters of damage and failures."""
        return self._space.faults

    def __len__(self) -> int:
        """Returns how many logs there are."""
        return len(self._logs) + len(self._in_use)

    def __contains__(self, number: object) -> bool:
        """Tells if there is a log of this number."""
        return number in self._logs or number in self._in_use

    def logs(self) -> Iterator[int]:
        """Returns the numbers of all logs, in no order; the journal may be changed meanwhile."""
        return iter([*self._logs, *self._in_use])

    def assign(self, number: int, owner: str) -> None:
        """Counts a log that is not open for an owner from now on, as every start has to say anew."""
        share = self._owners[number] = self._shares.setdefault(owner, Share())
        share.pages += pages_of(self._logs[number])

    def create(
        self, number: int, *, ring_bytes: int = RING_BYTES, spill_bytes: int = SPILL_BYTES, start: int = 0,
        owner: str | None = None,
    ) -> Log:  # fmt: skip
        """Makes an empty log whose first byte will have the position `start`; it is there after a restart.

        It is counted for `owner`, if that is given. Raises StorageError if the number is in use or the disk fails,
        JournalFullError if there is no room, or the owner has its share of it already, UsageError for a number beyond
        64 bits, a position beyond 63 bits or a ring without bytes.
        """
        self._check_open()
        if not 0 <= number <= NUMBER_MAX or not 0 <= start <= POSITION_MAX:
            raise UsageError(f"A log cannot have the number {number} and start at {start}: use 64 and 63 bits.")
        _check_sizes(ring_bytes, spill_bytes)
        if number in self:
            raise StorageError(f"The journal has a log {number} already: open or remove it.")
        share = self._shares.setdefault(owner, Share()) if owner is not None else None
        if share is not None and not self._space.is_fair(share, 1):
            raise JournalFullError("Your sessions' output takes all the room that one tenant may have: close some.")
        place = self._space.take(0)
        if place is None:
            raise JournalFullError(self._space.full_reason)
        birth = self._space.next_generation()
        chunk = Chunk(*place, 0, birth, start)
        try:
            chunk.commit(number, birth)
        except OSError as error:
            self._space.faults.io += 1
            self._space.give(*place, 0)
            raise StorageError(f"The journal in {self._space.path} could not be written ({error.strerror}).") from error
        if share is not None:
            self._owners[number] = share
        return self._start(number, Loaded(birth, [chunk], start, start), ring_bytes, spill_bytes)

    def open(self, number: int, *, ring_bytes: int = RING_BYTES, spill_bytes: int = SPILL_BYTES) -> Log:
        """Returns a log that exists, checking its bytes; `damaged` and `end` of it tell what was lost.

        A log that is open already is returned as it is, with the new sizes. Raises StorageError if there is none.
        """
        self._check_open()
        _check_sizes(ring_bytes, spill_bytes)
        log = self._in_use.get(number)
        if log is not None:
            log.ring_bytes, log.spill_bytes = ring_bytes, spill_bytes
            return log
        refs = self._unpark(number)
        loaded = None if refs is None else load_chunks(self._space, number, refs)
        if loaded is None:
            self._owners.pop(number, None)
            raise StorageError(f"The journal has no log {number}: it was removed, or its entries were damaged.")
        return self._start(number, loaded, ring_bytes, spill_bytes)

    def remove(self, number: int) -> None:
        """Forgets a log and makes its space free; does nothing if there is none.

        A process killed in between leaves a part of it, which the next one finds and may remove.
        """
        self._check_open()
        log = self._in_use.pop(number, None)
        if log is not None:
            refs: Refs | None = make_refs(log.chunks)
            log.detach()
        else:
            refs = self._unpark(number)
        self._owners.pop(number, None)
        for ref in each_ref(refs) if refs is not None else ():
            arena, page, size_class = split_ref(ref)
            self._space.give(self._space.arenas[arena], page, size_class)

    def close(self) -> None:
        """Ends all use of the directory; logs and journal are of no more use, everything written stays."""
        if self._closed:
            return
        self._closed = True
        for log in self._in_use.values():
            log.detach()
        self._in_use.clear()
        self._logs.clear()
        self._space.close()
        for fd in (self._lock_fd, self._directory_fd):
            if fd >= 0:
                os.close(fd)

    def _start(self, number: int, loaded: Loaded, ring_bytes: int, spill_bytes: int) -> Log:
        log = Log(
            self._space, number, loaded, (ring_bytes, spill_bytes), self._parked, self._owners.get(number)
        )  # fmt: skip
        self._in_use[number] = log
        return log

    def _park(self, log: Log) -> None:
        """Keeps of a released log only where its chunks are."""
        del self._in_use[log.number]
        refs = self._logs[log.number] = make_refs(log.chunks)
        share = self._owners.get(log.number)
        if share is not None:
            share.pages += pages_of(refs)

    def _unpark(self, number: int) -> Refs | None:
        """Returns where the chunks of a log are that is not open, and forgets it; None if there is none."""
        refs = self._logs.pop(number, None)
        share = self._owners.get(number)
        if refs is not None and share is not None:
            share.pages -= pages_of(refs)
        return refs

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(f"The journal in {self._space.path} is closed: open it again.")

    def _scan(self, path: str) -> None:
        """Loads all arenas of the directory and finds the logs in them."""
        for name in sorted(os.listdir(self._directory_fd)):
            match = _ARENA_NAME.match(name)
            if match is None:
                continue
            try:
                arena = Arena.load(self._directory_fd, int(match[1]), path)
                directory = b"" if arena is None else arena.directory()
            except OSError as error:
                raise StorageError(f"{path}/{name} cannot be read ({error.strerror}): check the disk.") from error
            if arena is None:
                self._space.faults.files += 1
                os.unlink(name, dir_fd=self._directory_fd)
                continue
            self._space.faults.headers += arena.header_was_damaged
            self._scan_arena(arena, directory)
            arena.sort()
            self._space.add(arena)
        self._space.prune()

    def _scan_arena(self, arena: Arena, directory: bytes) -> None:
        """Claims the pages of all chunks of an arena; of two that want the same ones the newer has them."""
        number = arena.number
        accepted: list[tuple[int, int, int, int]] = []
        reach = 0
        end = len(directory) // ENTRY_BYTES * ENTRY_BYTES
        marks = MARKS.iter_unpack(memoryview(directory)[:end])
        for page, (mark,) in enumerate(marks):
            if not mark:
                continue
            entry = unpack_entry(directory, page * ENTRY_BYTES, page)
            if entry is None or not arena.aligned(page, entry[0]):
                self._space.faults.entries += 1
                self._erase(arena, page)
                continue
            size_class, log, _birth, generation = entry[:4]
            if page < reach:
                # Aligned chunks nest, and accepted ones do not overlap: only the last one can be in the way.
                self._space.faults.overlaps += 1
                if generation <= accepted[-1][3]:
                    self._erase(arena, page)
                    continue
                _, old_page, old_class, _ = accepted.pop()
                arena.unclaim(old_page, old_class)
                self._erase(arena, old_page)
            arena.claim(page, size_class)
            reach = page + CLASS_PAGES[size_class]
            accepted.append((log, page, size_class, generation))
        logs = self._logs
        for log, page, size_class, generation in accepted:
            self._space.seen_generation(generation)
            logs[log] = add_ref(logs.get(log), make_ref(number, page, size_class))

    def _erase(self, arena: Arena, page: int) -> None:
        """Erases an entry that was not taken: left there, it could come back when what covers it is gone."""
        try:
            arena.erase(page)
        except OSError:
            self._space.faults.io += 1


def _check_sizes(ring_bytes: int, spill_bytes: int) -> None:
    if ring_bytes < 1 or spill_bytes < 0:
        raise UsageError(f"A log cannot have a ring of {ring_bytes} and a spill of {spill_bytes} bytes.")


def _open_directory(path: str) -> int:
    """Makes the directory if needed and returns its descriptor; raises StorageError if it cannot be trusted."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        message = f"The journal cannot use {path} ({error.strerror}): it must be a directory of this user and no link."
        raise StorageError(message) from error
    status = os.fstat(fd)
    problem = ""
    if status.st_uid != os.geteuid():
        problem = f"it belongs to user {status.st_uid}: choose a directory of the user that runs the node"
    elif stat.S_IMODE(status.st_mode) & 0o022:
        problem = "others can write to it: set its mode with `chmod 700`"
    if problem:
        os.close(fd)
        raise StorageError(f"The journal cannot use {path}, {problem}.")
    return fd


def _lock(directory: int, path: str) -> int:
    """Locks the directory against other processes, returns what holds the lock; raises StorageError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(_LOCK_NAME, flags, 0o600, dir_fd=directory)
    except OSError as error:
        raise StorageError(f"{path}/{_LOCK_NAME} cannot be opened ({error.strerror}): move it away.") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StorageError(f"{path}/{_LOCK_NAME} is not a plain file: move it away.")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 20, 0).strip().decode("ascii", "replace")
            message = f"The journal in {path} is in use by process {holder or '?'}: stop that node first."
            raise StorageError(message) from error
        # Only for that message; a full disk is no reason to refuse.
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        except OSError:
            pass
    except BaseException:
        os.close(fd)
        raise
    return fd
