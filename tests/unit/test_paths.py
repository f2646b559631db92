"""sterna.paths: directories and files nobody else can read or plant; locks that hold between processes."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from sterna import paths
from sterna.errors import StorageError, TrustError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
NOBODY = 65534


def mode(path: Path | str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_bases_follow_xdg(tmp_path: Path) -> None:
    home = {"HOME": "/a/b"}
    assert paths.state_path(home) == "/a/b/.local/state/sterna"
    assert paths.config_path(home) == "/a/b/.config/sterna"
    assert paths.state_path({**home, "XDG_STATE_HOME": "/s"}) == "/s/sterna"
    assert paths.config_path({**home, "XDG_CONFIG_HOME": "/c"}) == "/c/sterna"
    # The specification: relative paths are invalid and ignored.
    assert paths.state_path({**home, "XDG_STATE_HOME": "s"}) == "/a/b/.local/state/sterna"
    assert paths.state_path({}).startswith("/")


def test_directories_are_made_private(tmp_path: Path, umask: None) -> None:
    made = paths.state_dir(None, {"XDG_STATE_HOME": str(tmp_path / "x" / "y")})
    assert made == str(tmp_path / "x" / "y" / "sterna")
    assert [mode(tmp_path / "x"), mode(tmp_path / "x" / "y"), mode(made)] == [0o700] * 3
    assert paths.state_dir(str(tmp_path / "own")) == str(tmp_path / "own")
    assert paths.config_dir(None, {"XDG_CONFIG_HOME": str(tmp_path)}) == str(tmp_path / "sterna")
    assert paths.state_dir(made) == made


def test_directory_with_a_strange_umask(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        made = paths.private_dir(str(tmp_path / "a" / "b"))
    finally:
        os.umask(before)
    assert [mode(tmp_path / "a"), mode(made)] == [0o700] * 2


@pytest.mark.parametrize("bits", [0o770, 0o702, 0o777, 0o1777])
def test_directory_writable_by_others_is_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "d"
    path.mkdir()
    path.chmod(bits)
    with pytest.raises(StorageError, match="chmod go-w"):
        paths.private_dir(str(path))
    path.chmod(0o755)
    assert paths.private_dir(str(path)) == str(path)


@pytest.mark.parametrize("ending", ["", "/", "//", "/.", "/../link"])
def test_symlink_is_refused(tmp_path: Path, ending: str) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(StorageError, match="symbolic link"):
        paths.private_dir(f"{tmp_path}/link{ending}")


def test_dangling_symlink_and_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="symbolic link"):
        paths.private_dir(str(tmp_path / "link"))
    with pytest.raises(StorageError, match="not a directory"):
        paths.private_dir(str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be made"):
        paths.private_dir(str(tmp_path / "file" / "below"))
    assert not (tmp_path / "nowhere").exists()


@ROOT_ONLY
def test_foreign_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.mkdir(mode=0o700)
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(StorageError, match=f"user {NOBODY}"):
        paths.private_dir(str(path))


def test_sockets_in_the_users_runtime_directory(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": "/nowhere"}
    assert paths.runtime_dir(None, environ) == str(tmp_path / "sterna")
    assert mode(tmp_path / "sterna") == 0o700


def test_sockets_fall_back_to_the_state_directory(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "gone")}
    absent = str(tmp_path / "absent")
    assert paths.runtime_dir(None, environ, absent) == str(tmp_path / "sterna" / "sockets")
    assert paths.runtime_dir(str(tmp_path / "own"), environ, absent) == str(tmp_path / "own" / "sockets")
    assert mode(tmp_path / "sterna") == 0o700


@ROOT_ONLY
def test_sockets_of_the_system_are_for_root(tmp_path: Path) -> None:
    system = tmp_path / "claw"
    system.mkdir()
    system.chmod(0o1777)
    assert paths.runtime_dir(str(tmp_path / "s"), {}, str(system)) == str(system)
    system.chmod(0o777)
    with pytest.raises(StorageError, match=r"chmod \+t"):
        paths.runtime_dir(str(tmp_path / "s"), {}, str(system))
    system.chmod(0o755)
    os.chown(system, NOBODY, NOBODY)
    with pytest.raises(StorageError, match="not a directory of root"):
        paths.runtime_dir(str(tmp_path / "s"), {}, str(system))


@ROOT_ONLY
def test_runtime_directory_of_another_user_is_not_taken(tmp_path: Path) -> None:
    # After `su` the variable still names the directory of the user before.
    other = tmp_path / "1000"
    other.mkdir()
    os.chown(other, NOBODY, NOBODY)
    environ = {"XDG_RUNTIME_DIR": str(other)}
    assert paths.runtime_path("/s", environ, str(tmp_path / "absent")) == "/s/sockets"


def test_socket_path_is_bounded_by_the_kernel(tmp_path: Path) -> None:
    directory = "/" + "d" * 60
    longest = "n" * (paths.SOCKET_PATH_MAX_BYTES - len(directory) - 1)
    assert len(paths.socket_path(directory, longest)) == paths.SOCKET_PATH_MAX_BYTES
    with pytest.raises(UsageError, match="107 bytes"):
        paths.socket_path(directory, longest + "n")
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match="too long"):
        probe.bind(f"{directory}/{longest}n")


def test_atomic_write_replaces_and_sets_the_mode(tmp_path: Path, umask: None) -> None:
    path = tmp_path / "f"
    paths.atomic_write(str(path), b"one")
    assert (path.read_bytes(), mode(path)) == (b"one", 0o600)
    os.umask(0o777)
    paths.atomic_write(str(path), b"two" * 1_000_000, 0o640, sync=True)
    assert (path.read_bytes(), mode(path)) == (b"two" * 1_000_000, 0o640)
    assert os.listdir(tmp_path) == ["f"]


def test_atomic_write_replaces_a_symlink_and_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "f").symlink_to("target")
    paths.atomic_write(str(tmp_path / "f"), b"new")
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "f").is_symlink()


def test_atomic_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        paths.atomic_write(str(tmp_path / "d"), b"x")
    with pytest.raises(StorageError, match="cannot be written"):
        paths.atomic_write(str(tmp_path / "absent" / "f"), b"x")
    assert os.listdir(tmp_path) == ["d"]


def test_readers_see_whole_files_only(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    contents = [bytes([value]) * 100_000 for value in range(20)]
    paths.atomic_write(path, contents[0])
    done = threading.Event()

    def write() -> None:
        for content in contents:
            paths.atomic_write(path, content)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(paths.read_private(path, 100_000))
    writer.join()
    assert seen <= set(contents)


def test_read_private(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert paths.read_private(str(path), 10) is None
    paths.atomic_write(str(path), b"0123456789")
    assert paths.read_private(str(path), 10) == b"0123456789"
    with pytest.raises(StorageError, match="larger than 9 bytes"):
        paths.read_private(str(path), 9)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666])
def test_read_private_refuses_files_open_to_others(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"secret")
    path.chmod(bits)
    with pytest.raises(TrustError, match="chmod 600"):
        paths.read_private(str(path), 10)
    path.chmod(0o400)
    assert paths.read_private(str(path), 10) == b"secret"


def test_read_private_refuses_what_is_no_file(tmp_path: Path) -> None:
    paths.atomic_write(str(tmp_path / "f"), b"x")
    (tmp_path / "link").symlink_to("f")
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "d").mkdir(mode=0o700)
    with pytest.raises(TrustError, match="symbolic link"):
        paths.read_private(str(tmp_path / "link"), 10)
    assert paths.read_private(str(tmp_path / "link"), 10, follow=True) == b"x"
    for name in ("fifo", "d"):
        with pytest.raises(TrustError, match="not a regular file"):
            paths.read_private(str(tmp_path / name), 10)
    with pytest.raises(StorageError, match="cannot be read"):
        paths.read_private(str(tmp_path / "f" / "below"), 10)


@ROOT_ONLY
def test_read_private_refuses_foreign_files(tmp_path: Path) -> None:
    paths.atomic_write(str(tmp_path / "f"), b"x")
    os.chown(tmp_path / "f", NOBODY, NOBODY)
    with pytest.raises(TrustError, match=f"user {NOBODY}"):
        paths.read_private(str(tmp_path / "f"), 10)


HOLD = """
import sys
from sterna import paths
with paths.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_holds_between_processes_and_goes_with_a_killed_one(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(paths.__file__))}
    command = [sys.executable, "-c", HOLD, path]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StorageError, match="Another process holds"), paths.locked(path, 0):
            pytest.fail("two holders")
        with pytest.raises(StorageError, match="Another process holds"), paths.locked(path, 30):
            pytest.fail("two holders")
        holder.kill()
        holder.wait()
        with paths.locked(path, 0):
            assert mode(path) == 0o600


def test_lock_waits_and_is_released_by_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with pytest.raises(KeyError), paths.locked(path):
        raise KeyError
    held, order = threading.Event(), []

    def wait() -> None:
        held.wait()
        with paths.locked(path):
            order.append("second")

    thread = threading.Thread(target=wait)
    thread.start()
    with paths.locked(path):
        held.set()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_lock_refuses_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(StorageError, match="cannot be opened"), paths.locked(str(tmp_path / "lock")):
        pytest.fail("followed")
    assert not (tmp_path / "elsewhere").exists()
