"""What a hostile session, or a trap laid in a shared directory, must not do to the user's terminal and files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.rig import Rig, wait_for

pytestmark = pytest.mark.xdist_group("terminal_hostile")

HOSTILE = (
    b"before\x1b]52;c;eA==\x07\x1b]0;title\x07\x1b\x1b]0;x\x07c\x1bc\x1bP@kitty-cmd{}\x1b\\\x1b[6n\x1b[?2004h"
    b"\x1b[?10\x0002h\x1b[1mbold\x1b[mafter"
)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        rig.start_pod("main")
        (rig.directory / "hostile").write_bytes(HOSTILE)
        # It stays, as long as its input is open.
        rig.start_pod("hostile", "sh", "-c", "cat hostile -", kind="stream")
        rig.start_node()
        wait_for(lambda: len(rig.json("ls")["agents"]) == 2, name="both agents")
        assert rig.sterna("new", "--name", "trap", "--agent", "hostile").returncode == 0
        wait_for(lambda: "after" in rig.sterna("capture", "trap").stdout, name="its output")
        yield rig


def test_a_captured_stream_does_nothing_to_the_terminal(rig: Rig) -> None:
    view = rig.terminal("capture", "trap")
    assert view.wait() == 0, bytes(view.seen)
    seen = bytes(view.seen)
    assert b"before" in seen
    assert b"\x1b[1mbold\x1b[m" in seen
    for harmful in (b"]52;", b"title", b"\x1bc", b"@kitty", b"\x1b[6n"):
        assert harmful not in seen
    assert seen.index(b"after") < seen.index(b"\x1b[?2004l")
    assert b"\x1b[?1002l" in seen


def test_a_captured_stream_is_exact_elsewhere(rig: Rig) -> None:
    assert rig.sterna("capture", "trap").stdout.encode() == HOSTILE


def recorded(rig: Rig, path: Path) -> str:
    """What `record --overwrite` says; it is ended once it records."""
    recorder = rig.terminal("record", "trap", str(path), "--overwrite")
    wait_for(lambda: b"Ctrl-C ends it" in recorder.seen or (recorder.read(0.1), recorder.process.poll())[1] is not None)
    if recorder.process.poll() is None:
        recorder.type(b"\x03")
    recorder.wait()
    return recorder.seen.decode()


def test_an_overwritten_recording_is_private(rig: Rig) -> None:
    path, other = rig.directory / "film.cast", rig.directory / "other.cast"
    path.write_text("old")
    path.chmod(0o644)
    os.link(path, other)
    with path.open() as reader:
        recorded(rig, path)
        assert reader.read() == "old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith('{"version":3')
    assert other.read_text() == "old"


def test_a_symlink_is_not_overwritten(rig: Rig) -> None:
    target, path = rig.directory / "precious", rig.directory / "link.cast"
    target.write_text("precious")
    path.symlink_to(target)
    said = recorded(rig, path)
    assert "is no regular file" in said
    assert said.count("\n") == 1
    assert target.read_text() == "precious"
    assert path.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_of_somebody_else_is_not_overwritten(rig: Rig) -> None:
    path = rig.directory / "foreign.cast"
    path.write_text("foreign")
    os.chown(path, 65_534, 65_534)
    said = recorded(rig, path)
    assert "belongs to user 65534" in said
    assert said.count("\n") == 1
    assert path.read_text() == "foreign"
