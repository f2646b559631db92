"""One arena: a file of reserved pages, and which of them are free."""

from __future__ import annotations

import os
import stat
from array import array

from sterna.errors import StorageError
from sterna.journal.format import (
    ARENA_MAX_BYTES,
    ARENA_MIN_BYTES,
    CLASS_PAGES,
    GROUP_PAGES,
    NO_ENTRY,
    VERSION,
    entry_offset,
    first_data_page,
    pack_header,
    unpack_header,
)
from sterna.limits import PAGE_BYTES

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WHOLE = (1 << GROUP_PAGES) - 1
_MASKS = tuple((1 << pages) - 1 for pages in CLASS_PAGES)


def arena_name(number: int) -> str:
    """Returns the name of an arena's file."""
    return f"arena-{number:06d}"


def size_class_free(mask: int) -> int:
    """Returns the largest size class that a group with these free pages (one bit each) has room for; -1 for none."""
    if mask == _WHOLE:
        return 2
    pairs = mask & (mask >> 1)
    if pairs & (pairs >> 2) & 0x1111:
        return 1
    return 0 if mask else -1


class Arena:
    """One open arena file.

    Data pages are handed out in groups of 16, each with a mask of its free pages; chunks of 1, 4 and 16 pages are
    aligned to their own size, so neighbours that become free join by themselves. `bins[c]` holds the groups whose
    largest free run is of size class `c`.
    """

    __slots__ = ("bins", "fd", "file_bytes", "first", "header_was_damaged", "masks", "number", "pages", "used")

    def __init__(self, number: int, fd: int, pages: int, usable: int) -> None:
        """Takes the file's descriptor, the pages its layout was made for, and those the file really has."""
        self.number = number
        self.fd = fd
        self.first = first_data_page(pages)
        self.pages = usable
        self.file_bytes = usable * PAGE_BYTES
        self.used = 0
        self.header_was_damaged = False
        data = max(0, usable - self.first)
        self.masks = array("H", [_WHOLE]) * (data // GROUP_PAGES)
        if data % GROUP_PAGES:
            self.masks.append((1 << data % GROUP_PAGES) - 1)
        self.bins: tuple[set[int], set[int], set[int]] = (set(), set(), set())

    @classmethod
    def create(cls, directory: int, number: int, size: int) -> Arena:
        """Makes a file of `size` bytes with all its blocks reserved; raises OSError, and leaves no file then."""
        name = arena_name(number)
        fd = os.open(name, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        try:
            # Reserved now, so that a full disk is met here and not in the middle of a session's output.
            os.posix_fallocate(fd, 0, size)
            pages = size // PAGE_BYTES
            os.pwrite(fd, pack_header(pages), 0)
            arena = cls(number, fd, pages, pages)
            arena.sort()
            return arena
        except OSError:
            os.close(fd)
            os.unlink(name, dir_fd=directory)
            raise

    @classmethod
    def load(cls, directory: int, number: int, path: str) -> Arena | None:
        """Opens an existing file, all pages free until they are claimed; None if it is too short to hold anything.

        `path` is for messages. Raises StorageError if the file is a link, somebody else's, open to others, or written
        by another version; OSError if it cannot be read.
        """
        name = arena_name(number)
        try:
            fd = os.open(name, _FLAGS, dir_fd=directory)
        except OSError as error:
            said = f"{path}/{name} cannot be opened ({error.strerror})"
            raise StorageError(f"{said}: it must be a plain file of this user; move it away.") from error
        try:
            _check_file(os.fstat(fd), f"{path}/{name}")
            present = min(os.fstat(fd).st_size, ARENA_MAX_BYTES) // PAGE_BYTES
            header = unpack_header(os.pread(fd, PAGE_BYTES, 0))
            if header and (header[0] != VERSION or header[1] != PAGE_BYTES):
                said = f"{path}/{name} was written by another version of Sterna (format {header[0]}, not {VERSION})"
                raise StorageError(f"{said}: use that version or another state directory.")
            # Without a header the file's own size says the same, and entries carry their own CRC.
            pages = header[2] if header and header[2] <= ARENA_MAX_BYTES // PAGE_BYTES else present
            if present <= first_data_page(pages) or pages * PAGE_BYTES < ARENA_MIN_BYTES:
                os.close(fd)
                return None
            arena = cls(number, fd, pages, min(pages, present))
            if header is None:
                arena.header_was_damaged = True
                os.pwrite(fd, pack_header(pages), 0)
            return arena
        except BaseException:
            os.close(fd)
            raise

    def directory(self) -> bytes:
        """Returns the directory area, one entry for each page (less if the file is cut short); raises OSError."""
        return os.pread(self.fd, entry_offset(self.pages) - PAGE_BYTES, PAGE_BYTES)

    def sort(self) -> None:
        """Fills the bins from the masks, after pages were claimed one by one."""
        for bin_ in self.bins:
            bin_.clear()
        for group, mask in enumerate(self.masks):
            if mask:
                self.bins[size_class_free(mask)].add(group)

    def aligned(self, page: int, size_class: int) -> bool:
        """Tells if a chunk of this class can begin at this page."""
        pages = CLASS_PAGES[size_class]
        return page >= self.first and page + pages <= self.pages and (page - self.first) % pages == 0

    def claim(self, page: int, size_class: int) -> None:
        """Marks a chunk's pages as used; for the scan, before `sort`."""
        group, bit = divmod(page - self.first, GROUP_PAGES)
        self.masks[group] &= ~(_MASKS[size_class] << bit)
        self.used += CLASS_PAGES[size_class]

    def unclaim(self, page: int, size_class: int) -> None:
        """Takes a claim back; for the scan, before `sort`."""
        group, bit = divmod(page - self.first, GROUP_PAGES)
        self.masks[group] |= _MASKS[size_class] << bit
        self.used -= CLASS_PAGES[size_class]

    def take(self, size_class: int, bin_: int) -> int:
        """Returns the first page of a chunk taken from a group of a bin that is not empty."""
        group = next(iter(self.bins[bin_]))
        mask = self.masks[group]
        bit = _find(mask, size_class)
        self._set(group, mask & ~(_MASKS[size_class] << bit))
        self.used += CLASS_PAGES[size_class]
        return self.first + group * GROUP_PAGES + bit

    def give(self, page: int, size_class: int) -> None:
        """Makes a chunk's pages free again."""
        group, bit = divmod(page - self.first, GROUP_PAGES)
        self._set(group, self.masks[group] | (_MASKS[size_class] << bit))
        self.used -= CLASS_PAGES[size_class]

    def erase(self, page: int) -> None:
        """Overwrites a page's entry with zeros, so that no later start finds it; raises OSError."""
        os.pwrite(self.fd, NO_ENTRY, entry_offset(page))

    def _set(self, group: int, mask: int) -> None:
        old = size_class_free(self.masks[group])
        new = size_class_free(mask)
        self.masks[group] = mask
        if old != new:
            if old >= 0:
                self.bins[old].discard(group)
            if new >= 0:
                self.bins[new].add(group)


def _find(mask: int, size_class: int) -> int:
    """Returns the lowest fitting bit; single pages come from quarters that are broken already, where there are any."""
    if size_class == 2:
        return 0
    quarters = [(mask >> bit) & 0xF for bit in (0, 4, 8, 12)]
    if size_class == 1:
        return quarters.index(0xF) * 4
    for index, quarter in enumerate(quarters):
        if 0 < quarter < 0xF:
            return index * 4 + (quarter & -quarter).bit_length() - 1
    return (mask & -mask).bit_length() - 1


def _check_file(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise StorageError(f"{path} is not a plain file with one name: move it away.")
    if status.st_uid != os.geteuid():
        raise StorageError(f"{path} belongs to user {status.st_uid}: it must belong to the user that runs the node.")
    if status.st_mode & 0o077:
        raise StorageError(f"{path} can be used by others: set its mode with `chmod 600`.")
