from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from sterna.remote.extract import extract
from sterna.remote.gzipped import GzipError, GzipReader
from sterna.remote.removal import RemovalError, holds_home, remove_all
from sterna.remote.tarball import TarError, TarReader
from sterna.remote.unzstd import UnzstdError, unzstd

Add = Callable[[tarfile.TarFile], None]


def reader(data: bytes, step: int = 7) -> Callable[[int], bytes]:
    """Gives little at a time, so that every boundary is met."""
    source = io.BytesIO(data)
    return lambda size: source.read(min(size, step))


def everything(data: bytes, step: int = 7) -> tuple[bytes, str]:
    """Returns what can be unpacked byte by byte, and what then goes wrong."""
    got = b""
    try:
        unpacked = GzipReader(reader(data, step))
        while True:
            got += unpacked.read_full(1)
    except GzipError as error:
        return got, str(error)


PACKED = gzip.compress(b"hello, " * 50, mtime=0)


@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_members_of_a_gzip_stream_follow_each_other(step: int) -> None:
    assert everything(PACKED, step) == (b"hello, " * 50, "EOF")
    assert everything(PACKED + gzip.compress(b"more"), step) == (b"hello, " * 50 + b"more", "EOF")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "EOF"), (b"junk", "unexpected EOF"), (b"0123456789abc", "gzip: invalid header"),
        (PACKED[:9], "unexpected EOF"),
        (PACKED[:-9], "unexpected EOF"), (PACKED[:-1], "unexpected EOF"),
        (PACKED[:-5] + b"x" + PACKED[-4:], "gzip: invalid checksum"),
        (PACKED[:-1] + b"x", "gzip: invalid checksum"),
        (PACKED + b"trailing garbage", "gzip: invalid header"), (PACKED + b"short", "unexpected EOF"),
        (PACKED[:3] + b"\x02" + PACKED[4:10] + b"\0\0" + PACKED[10:], "gzip: invalid header"),
        (PACKED[:3] + b"\x08" + PACKED[4:10] + b"n" * 600 + PACKED[10:], "gzip: invalid header"),
        (PACKED[:10] + b"\xff" + PACKED[11:], "flate: corrupt input before offset 11"),
    ],
)  # fmt: skip
def test_broken_gzip_streams(data: bytes, problem: str) -> None:
    for step in (1, 64, 100_000):
        assert everything(data, step)[1] == problem


def test_a_bomb_is_unpacked_piece_by_piece() -> None:
    bomb = gzip.compress(bytes(32 << 20), 1)
    assert len(bomb) < 1 << 18, "one read takes all of it"
    tracemalloc.start()
    try:
        unpacked = GzipReader(io.BytesIO(bomb).read)
        assert sum(len(unpacked.read_full(1 << 16)) for _ in range(512)) == 32 << 20
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_optional_parts_of_a_gzip_header() -> None:
    head = b"\x1f\x8b\x08\x1e" + b"\0" * 6 + b"\x03\0abc" + b"name\0" + b"comment\0"
    head += (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little")
    assert everything(head + PACKED[10:]) == (b"hello, " * 50, "EOF")


def test_what_comes_before_broken_data_is_unpacked() -> None:
    data = gzip.compress(os.urandom(50_000))
    broken = data[:30_000] + b"\0" * 2_000 + data[32_000:]
    got, problem = everything(broken, 100_000)
    assert problem.startswith(("flate: corrupt input before offset", "gzip: invalid checksum"))
    assert len(got) > 29_000


def tarball(*adds: Add, kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=kind) as tar:
        for add in adds:
            add(tar)
    return buffer.getvalue()


def file(name: str, data: bytes = b"data", kind: bytes = tarfile.REGTYPE, **more: object) -> Add:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data)
        for key, value in more.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(data))

    return add


def unpack(tmp_path: Path, data: bytes, limit: int = 0) -> tuple[int, str]:
    (tmp_path / "a.tgz").write_bytes(data)
    count, problem = extract(str(tmp_path / "a.tgz"), str(tmp_path / "out"), str(tmp_path / "home"), limit)
    assert not (tmp_path / "a.tgz").exists(), "the archive is consumed"
    return count, problem


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_replaces_the_directory(tmp_path: Path, kind: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    long = "/".join(["d" * 40] * 3)
    names = ["a", "b/c", "./d", "/abs/x", "e/../f", long + "/end"]
    adds = [file(name, name.encode()) for name in names]
    assert unpack(tmp_path, tarball(*adds, file("dir", b"", tarfile.DIRTYPE, mode=0o777), kind=kind)) == (6, "")
    out = tmp_path / "out"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(
        [".synced", "a", "b/c", "d", "abs/x", "f", long + "/end"]
    )
    assert (out / long / "end").read_text() == long + "/end"
    assert oct((out / "a").stat().st_mode) == "0o100600"
    assert oct((out / "dir").stat().st_mode) == oct((out / "b").stat().st_mode) == "0o40700"


@pytest.mark.parametrize("name", ["n" * 150, "é" * 120, "d/" * 60 + "x"])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path: Path, name: str, kind: int) -> None:
    assert unpack(tmp_path, tarball(file(name), kind=kind)) == (1, "")
    assert (tmp_path / "out" / name).read_bytes() == b"data"


@pytest.mark.parametrize(
    ("adds", "count", "problem"),
    [
        ([file("ok"), file("../evil")], 0, "unsafe path in archive: ../evil"),
        ([file("../out-x/y")], 0, "unsafe path in archive: ../out-x/y"),
        ([file("ok"), file("l", b"", tarfile.SYMTYPE, linkname="ok")], 0, "unsupported tar entry type 2: l"),
        ([file("h", b"", tarfile.LNKTYPE, linkname="ok")], 0, "unsupported tar entry type 1: h"),
        ([file("p", b"", tarfile.FIFOTYPE)], 0, "unsupported tar entry type 6: p"),
        ([file("c", b"", tarfile.CHRTYPE)], 0, "unsupported tar entry type 3: c"),
        ([file("f"), file("f/x")], 0, "mkdir parent f/x: mkdir OUT/f: not a directory"),
        ([file("f"), file("f/x/y")], 0, "mkdir parent f/x/y: mkdir OUT/f: not a directory"),
        ([file("d", b"", tarfile.DIRTYPE), file("d")], 0, "create d: open OUT/d: is a directory"),
        ([file("twice"), file("twice")], 2, ""),
    ],
)  # fmt: skip
def test_what_an_archive_may_not_hold(tmp_path: Path, adds: list[Add], count: int, problem: str) -> None:
    assert unpack(tmp_path, tarball(*adds)) == (count, problem.replace("OUT", str(tmp_path / "out")))
    assert (tmp_path / "out" / ".synced").exists() == (not problem)
    assert not (tmp_path / "evil").exists()


def test_a_broken_archive_counts_what_came_before(tmp_path: Path) -> None:
    plain = gzip.decompress(tarball(file("a"), file("b"), file("c")))
    broken = plain[: 2 * 1024] + b"x" * 512 + plain[2 * 1024 + 512 :]
    assert unpack(tmp_path, gzip.compress(broken)) == (2, "gzip: archive/tar: invalid tar header")
    assert (tmp_path / "out" / "b").read_bytes() == b"data"
    assert unpack(tmp_path, gzip.compress(plain[:1024])) == (1, "")
    assert unpack(tmp_path, gzip.compress(plain[:1536])) == (1, "gzip: unexpected EOF")
    assert unpack(tmp_path, gzip.compress(plain[:700])) == (1, "")
    assert unpack(tmp_path, gzip.compress(plain[:514])) == (0, "gzip: unexpected EOF")
    assert unpack(tmp_path, gzip.compress(plain[:511])) == (0, "gzip: unexpected EOF")


def test_the_size_of_what_is_unpacked_can_be_bounded(tmp_path: Path) -> None:
    assert unpack(tmp_path, tarball(file("a", b"x" * 100), file("b", b"x" * 100)), 200) == (2, "")
    assert unpack(tmp_path, tarball(file("a", b"x" * 100), file("b", b"x" * 101)), 200) == (
        1,
        "extraction size limit exceeded",
    )


def test_headers_with_odd_numbers_are_refused() -> None:
    block = bytearray(gzip.decompress(tarball(file("a")))[:512])
    for field, text in (((124, 136), b"77777777778\0"), ((100, 108), b"9999999\0"), ((124, 136), b"\xff" * 12)):
        odd = bytearray(block)
        odd[slice(*field)] = text
        odd[148:156] = b" " * 8
        odd[148:156] = b"%06o\0 " % sum(odd)
        tar = TarReader(io.BytesIO(bytes(odd) + b"\0" * 2048).read)
        with pytest.raises(TarError):
            tar.next()


def test_home_and_root_are_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "users" / "me"
    home.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "users")
    for path in ("/", "//", "/..", str(home), f"{home}/", f"{home}/x/..", str(home.parent), f"{tmp_path}/link/me"):
        assert holds_home(path, str(home)), path
    for path in (f"{home}/x", f"{home}x", str(home)[:-1], f"{tmp_path}/link", f"{tmp_path}/other"):
        assert not holds_home(path, str(home)), path
    assert not holds_home("/a\0b/c", str(home))
    (tmp_path / "users" / "x" / "deep").mkdir(parents=True)
    (tmp_path / "to").symlink_to(tmp_path / "users" / "x" / "deep")
    for base, path in ((f"{home.parent}/x", "../me"), (f"{tmp_path}/to", "../../me")):
        assert holds_home(path, str(home), base), path
        assert not holds_home(path, str(home), f"{tmp_path}/none/none/none")
    monkeypatch.chdir(tmp_path)
    assert holds_home("to/../../me", str(home), "/nowhere")  # what git refuses is deleted from here
    for path in (f"{tmp_path}/to/../../me", f"{tmp_path}/to/../..", f"{tmp_path}/to/../../"):
        assert holds_home(path, str(home)), path
    assert holds_home("/", "")
    assert holds_home(str(tmp_path / "users"), f"{tmp_path}/link/me")
    for target in ("~", str(home), str(tmp_path)):
        count, problem = extract(str(tmp_path / "none"), target.replace("~", str(home)), str(home), 0)
        assert (count, problem[:45]) == (0, "destDir must not be or contain the home direc")


def test_deletion_does_not_follow_links_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    tree = tmp_path / "tree"
    deep = tree
    for _ in range(300):
        deep /= "d" * 8
    os.makedirs(deep.parents[250])
    descriptor = os.open(deep.parents[250], os.O_RDONLY)
    for _ in range(250):  # longer than a path may be
        os.mkdir("d" * 8, dir_fd=descriptor)
        deeper = os.open("d" * 8, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = deeper
    os.close(descriptor)
    (tree / "link").symlink_to(outside)
    remove_all(f"{tree}/")
    assert not tree.exists()
    (tmp_path / "link").symlink_to(outside)
    remove_all(f"{tmp_path}/link")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "keep").exists()
    remove_all("")
    remove_all(str(tmp_path / "never" / "there"))


@pytest.mark.parametrize(
    ("path", "operation", "shown"),
    [
        ("D/.", "RemoveAll", "D/."),
        (".", "RemoveAll", "."),
        ("D/f/x", "unlinkat", "D/f/x"),
        ("D/f/x/y", "open", "D/f/x"),
        ("/", "RemoveAll", "/"),
    ],
)
def test_what_cannot_be_deleted(tmp_path: Path, path: str, operation: str, shown: str) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(RemovalError) as caught:
        remove_all(path.replace("D", str(tmp_path)))
    assert (caught.value.operation, caught.value.path) == (operation, shown.replace("D", str(tmp_path)))


def zst(data: bytes) -> bytes:
    """Returns one raw block in a frame without checksum (RFC 8878)."""
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(data)]) + (len(data) << 3 | 1).to_bytes(3, "little") + data


@pytest.mark.parametrize("step", [1, 1000])
def test_zstd_streams(step: int) -> None:
    packed = zst(b"hello") + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zst(b" you")
    assert b"".join(unzstd(reader(packed, step))) == b"hello you"
    assert b"".join(unzstd(reader(b"", step))) == b""
    for data, problem in (
        (packed[:-1], "unexpected EOF"), (b"\x28", "unexpected EOF"),
        (b"junk!", "invalid input: magic number mismatch"),
        (zst(b"a") + b"junk", "invalid input: magic number mismatch"),
    ):  # fmt: skip
        with pytest.raises(UnzstdError, match=problem):
            list(unzstd(reader(data, step)))
