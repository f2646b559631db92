"""Archives and trees that are made to harm: depth, names, pipes, others at work in the same place."""

from __future__ import annotations

import gc
import gzip
import io
import os
import resource
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EMFILE, ENOTEMPTY, ESTALE
from pathlib import Path

import pytest

from sterna.remote import extract as extract_module
from sterna.remote import staging
from sterna.remote.directories import make_directories
from sterna.remote.extract import extract
from sterna.remote.removal import RemovalError, remove_all
from sterna.remote.tarball import TarError, TarReader
from tests.unit.test_remote_archives import file, tarball, unpack


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory for trees that are too deep for the one that clears up after all tests."""
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path], check=True)


def descriptors() -> set[str]:
    gc.collect()  # what earlier tests left is not closed in between
    return set(os.listdir("/proc/self/fd"))


def deep(top: Path, levels: int) -> None:
    """Makes directories named `d` in each other, more than a path can name."""
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, descriptors())) + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_deep_trees_are_deleted_with_few_descriptors(place: Path) -> None:
    deep(place / "tree", 3_000)
    before = descriptors()
    with few_descriptors(130):
        remove_all(str(place / "tree"))
    assert not (place / "tree").exists()
    assert descriptors() == before


def test_a_directory_that_is_moved_away_meanwhile_leads_nowhere_else(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep(place / "tree", 200)
    outside = place / "outside"
    outside.mkdir()
    for number in range(20):
        (outside / str(number)).touch()
        (place / "tree" / "d" / str(number)).touch()
    unlink = os.unlink

    def move(name: bytes, *, dir_fd: int | None = None) -> None:
        unlink(name, dir_fd=dir_fd)
        if name == b"leaf":
            (place / "tree" / "d" / "d").rename(outside / "d")

    monkeypatch.setattr(os, "unlink", move)
    before = descriptors()
    with pytest.raises(RemovalError) as caught:
        remove_all(str(place / "tree"))
    assert caught.value.errno == ESTALE
    assert {path.name for path in outside.iterdir()} >= set(map(str, range(20)))
    assert descriptors() == before


def test_a_directory_that_cannot_be_listed_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d" / "full" / "x").mkdir(parents=True)
    (tmp_path / "d" / "other" / "y").mkdir(parents=True)
    listdir, full = os.listdir, os.stat(tmp_path / "d" / "full").st_ino

    def fail(descriptor: int) -> list[str]:
        if os.fstat(descriptor).st_ino == full:
            raise OSError(EMFILE, os.strerror(EMFILE))
        return listdir(descriptor)

    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", fail)
        with pytest.raises(RemovalError) as caught:
            remove_all(str(tmp_path / "d"))
    assert (caught.value.operation, caught.value.path) == ("readdirnames", f"{tmp_path}/d/full")
    assert not (tmp_path / "d" / "other").exists()
    assert descriptors() == before
    assert caught.value.errno != ENOTEMPTY


@pytest.mark.parametrize("path", ["D/link/..", "D/link/../", "D/link/.././", "D/full/./"])
def test_nothing_is_deleted_by_a_name_that_is_a_direction(tmp_path: Path, path: str) -> None:
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "keep").touch()
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/sub")
    with pytest.raises(RemovalError, match="Invalid argument"):
        remove_all(path.replace("D", str(tmp_path)))
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["full", "keep", "link", "real", "sub", "x"]


def test_names_have_the_length_of_a_path(place: Path) -> None:
    part = "n" * 249 + "/"
    assert unpack(place, tarball(file(part * 16 + "x"), kind=tarfile.PAX_FORMAT)) == (1, "")
    for name, kind, problem in (
        (part * 17, tarfile.DIRTYPE, "mkdir"),
        (part * 17 + "x", tarfile.REGTYPE, "mkdir parent"),
    ):
        text = f"{problem} {name}: mkdir {place}/out/{part * 16}{part[:-1]}: file name too long"
        assert unpack(place, tarball(file(name, b"", kind), kind=tarfile.PAX_FORMAT)) == (0, text)


def test_a_pipe_is_no_archive_where_a_thread_would_wait_for_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "out").mkdir()
    got: list[tuple[int, str]] = []
    words = str(fifo), str(tmp_path / "out"), "", 0, True
    thread = threading.Thread(target=lambda: got.append(extract(*words)), daemon=True)
    thread.start()
    thread.join(10)
    assert got == [(0, f"open archive: open {fifo}: not a regular file")]
    assert fifo.exists()


# ------------------------------------------------------------------------------------------------------------ headers


def header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(kind: bytes, data: bytes) -> bytes:
    return header(kind, len(data)) + data + bytes(-len(data) % 512)


def test_many_small_records_cost_no_more_than_their_bytes() -> None:
    def seconds(parts: int) -> float:
        extra = padded(b"x", b"5 a=\n" * (208_000 // parts) + b"10 path=f\n") * parts
        tar = TarReader(io.BytesIO(extra + header(b"0", 0) + bytes(1024)).read)
        started = time.process_time()
        entry = tar.next()
        assert entry is not None
        assert entry.name == "f"
        return time.process_time() - started

    whole, eighths = (min(seconds(parts) for _ in range(2)) for parts in (1, 8))
    assert whole < 3 * eighths


def test_headers_before_an_entry_are_few_and_their_numbers_short(tmp_path: Path) -> None:
    extra = padded(b"x", b"10 path=f\n")
    assert unpack(tmp_path, gzip.compress(extra * 16 + header(b"0", 0) + bytes(1024))) == (1, "")
    problem = (0, "gzip: archive/tar: invalid tar header")
    assert unpack(tmp_path, gzip.compress(extra * 17 + header(b"0", 0) + bytes(1024))) == problem
    for record in (b"5010 size=" + b"1" * 4_999 + b"\n", b"0 a=\n", b"9999999999 a=b\n", b"6 a=b"):
        data = padded(b"x", record) + header(b"0", 0) + bytes(1024)
        assert unpack(tmp_path, gzip.compress(data)) == problem, record[:20]
    with pytest.raises(TarError):
        TarReader(lambda size: b"x" * size).next()


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_what_precedes_an_entry_is_bounded(tmp_path: Path, kind: bytes) -> None:
    for size, problem in ((1 << 20, "unexpected EOF"), ((1 << 20) + 1, "archive/tar: header field too long")):
        assert unpack(tmp_path, gzip.compress(header(kind, size) + b"cut")) == (0, f"gzip: {problem}")


# -------------------------------------------------------------------------------------------------- others in the place


def test_an_archive_goes_even_if_another_one_came_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    data = tarball(file("a.tgz", b"unpacked"), file("b"))
    for staged, left in ((False, [".synced", "b"]), (True, [".synced", "a.tgz", "b"])):
        archive = tmp_path / "out" / "a.tgz"
        archive.write_bytes(data)
        assert extract(str(archive), str(tmp_path / "out"), "", 0, staged) == (2, "")
        assert sorted(os.listdir(tmp_path / "out")) == left


def test_a_link_in_the_place_of_a_file_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    make = make_directories

    def meanwhile(path: str) -> None:
        make(path)
        for name in ("f", ".synced"):
            (Path(path) / name).symlink_to(outside)

    monkeypatch.setattr(extract_module, "make_directories", meanwhile)
    for name in ("f", ".synced"):
        count, problem = unpack(tmp_path, tarball(file("f")) if name == "f" else tarball())
        place = tmp_path / "out" / name
        assert (count, problem) == (0, f"create {name}: open {place}: too many levels of symbolic links")
        assert outside.read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------ staging


@pytest.mark.parametrize("moment", ["mkdir", "open"])
def test_a_directory_swept_away_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another extraction into the same place looks for leftovers at the worst moment."""
    real = getattr(os, moment)
    swept: list[bytes] = []

    def meanwhile(path: bytes, *more: int) -> object:
        result = real(path, *more)
        if b".staged-" in path and not swept:
            swept.append(path)
            monkeypatch.setattr(os, moment, real)
            staging._sweep(str(tmp_path), ".out.staged-")
        return result

    monkeypatch.setattr(os, moment, meanwhile)
    staged = staging.Staging(str(tmp_path / "out"))
    assert swept
    assert staged.path.encode() != swept[0]
    (Path(staged.path) / "new").touch()
    staging._sweep(str(tmp_path), ".out.staged-")  # in use by now
    staged.swap()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/new"]


def test_only_own_leftovers_are_swept(tmp_path: Path) -> None:
    names = [".out.staged-notes", ".out.staged-0123456789abcdef.old", ".out.staged-0123456789ABCDEF"]
    for name in (*names, ".out.staged-0123456789abcdef"):
        (tmp_path / name).mkdir()
    staging.Staging(str(tmp_path / "out")).swap()
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "out"])


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: (path / "x").mkdir(parents=True)])
def test_what_appears_at_the_place_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    place, rename, times = tmp_path / "out", os.rename, list[int]()

    def meanwhile(source: bytes, target: bytes) -> None:
        if not times:
            make(place)
        times.append(1)
        rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    staged = staging.Staging(str(place))
    (Path(staged.path) / "new").touch()
    staged.swap()
    assert times == [1]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/new"]
