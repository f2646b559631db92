"""Beyond the ring: who has fallen too far behind is told what is lost, and then has the same screen as everybody else.

One terminal is frozen in the middle of a control sequence or a character while the session's output overwrites the
ring; another one sees everything. Afterwards both are compared: cells, colours, scroll-back, modes, what the keys send.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna import limits
from tests.e2e.proxy import CutProxy
from tests.e2e.rig import Rig, wait_for
from tests.e2e.screens import HERE, Pane, Tmux, assert_never_same, assert_same, attach_words, child_of, start_node

pytestmark = [
    pytest.mark.xdist_group("terminal-ring"),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]

# Where the gap begins: what is still sent before it, and what would have followed.
CUTS = {
    "nowhere special": (b"", b""),
    "after ESC": (b"\x1b", b"[31mred"),
    "in CSI": (b"\x1b[1;38;2;10", b"0;20;30mdeep"),
    "in a private mode": (b"\x1b[?100", b"2h\x1b[?1002l"),
    "in OSC": (b"\x1b]2;half a ti", b"tle\x07"),
    "in a DCS": (b"\x1bP1$r", b"0m\x1b\\"),
    "in a designation": (b"\x1b(", b"0lqk\x1b(B"),
    "in two bytes": ("é".encode()[:1], "é".encode()[1:]),
    "in three bytes": ("数".encode()[:2], "数".encode()[2:]),
    "in four bytes": ("😀".encode()[:3], "😀".encode()[3:]),
}
# How the session's output ends: what the terminal is left with.
ENDS = {
    "plain": b"\x1b[m\r\n$ ",
    "modes": b"\x1b[?1h\x1b=\x1b[?1002;1006h\x1b[?2004h\x1b[3;20r\x1b[?25l\x1b]2;a title\x07\x1b[4h\x1b[7;9H\x1b[35m",
    "alternate": b"\x1b[?1049h\x1b[2J\x1b[7;7H\x1b7\x1b[H\x1b[42m full \x1b[m\x1b[12;30H\x1b[7mscreen\x1b[?1003h\x1b[m",
}
RING_BYTES = 2 * limits.WINDOW_BYTES
_PREFIX = b"\x18\x1b\\"


class Stage:
    def __init__(self, rig: Rig, tmux: Tmux) -> None:
        self.rig = rig
        self.tmux = tmux
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"s{self.count}"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Rig() as rig:
        rig.start_pod("main", sys.executable, os.fspath(HERE / "emitter.py"))
        start_node(rig, ring_bytes=RING_BYTES)
        with Tmux(rig) as tmux:
            yield Stage(rig, tmux)


def styled_lines(rng: random.Random, size: int) -> bytes:
    """Lines with everything in them, `size` bytes of them to the byte."""
    words = ["word", "naïve", "数据", "cafe\u0301", "😀", "한국", "────", "x" * 30]
    out = bytearray()
    while len(out) < size - 1_200:
        out += b"\x1b[%d;3%dm" % (rng.randrange(5), rng.randrange(8))
        # A background only where no line wraps: terminals differ in whether the line they wrap into takes it.
        short = not rng.randrange(4)
        out += b"\x1b[48;5;%dm" % rng.randrange(256) if short else b""
        for _ in range(2 if short else rng.randrange(9, 13)):
            out += b"\x1b[38;2;%d;%d;%dm" % tuple(rng.randrange(256) for _ in range(3))
            out += rng.choice(words).encode() + b" "
        # Long but few, so that all of them fit into the scroll-back that a session keeps.
        out += b"\x1b[m" * 60 + b"%d\r\n" % rng.randrange(10_000)
    return bytes(out) + b"." * (size - len(out) - 2) + b"\r\n"


class Laggard:
    """A terminal that can be frozen, and its record."""

    def __init__(self, stage: Stage, name: str, *, broken: str = "") -> None:
        self.proxy: CutProxy = stage.rig.proxy()
        words = attach_words(stage.rig, name, self.proxy.port, broken=broken)
        # tmux wakes its own child when that is stopped, so it must not be the client itself.
        self.pane: Pane = stage.tmux.pane(["sh", "-c", '"$@"; echo status $?; read -r _', "sh", *words], name="lag")
        self.path = stage.rig.directory / f"record-{name}"
        self.pane.record(self.path)
        self.pid = child_of(self.pane.pid, lambda line: " attach " in line and not line.startswith("sh "))

    def seen(self) -> bytes:
        return self.path.read_bytes()

    def passed(self) -> int:
        """How many bytes the network has taken for it."""
        return self.proxy.in_flight + self.proxy.bytes_down

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        state = re.compile(r"\) T ")
        wait_for(lambda: state.search(Path(f"/proc/{self.pid}/stat").read_text()), name="the client to stand still")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class Scene:
    """A session with a terminal that sees everything, and one that lags."""

    def __init__(self, stage: Stage, *, broken: str = "") -> None:
        self.stage = stage
        self.name = stage.name()
        self.pane = stage.tmux.pane(attach_words(stage.rig, self.name), name="all")
        self.written = 0
        self.pane.expect("^ready")
        self.emit(b"first\r\n")
        self.pane.expect("^first")
        self.laggard = Laggard(stage, self.name, broken=broken)
        self.laggard.pane.expect("^first")

    def emit(self, data: bytes) -> None:
        """Has the agent write these bytes."""
        path = self.stage.rig.directory / f"{self.name}-{self.written}"
        path.write_bytes(data)
        self.pane.line(os.fspath(path))
        self.written += len(data)

    def gap(self) -> int:
        """Detaches the laggard; returns how many bytes it says that it lost."""
        self.laggard.pane.type("\r~d")
        said = self.laggard.pane.expect("^status 0")
        found = re.search(r"(\d+) bytes of output were overwritten", said, re.MULTILINE)
        assert found is not None, said
        return int(found[1])

    def wait_painted(self) -> None:
        """Waits until the laggard has its snapshot."""
        wait_for(lambda: _PREFIX in self.laggard.seen()[len(b"first") + 200 :], name="the snapshot")

    def check(self, half: bytes, lost: int) -> None:
        """Compares the two, also a third terminal that comes late, and what is said about the gap."""
        lag = self.laggard
        self.wait_painted()
        assert_same(lag.pane, self.pane)
        # The client holds a sequence back that may turn out to be a question.
        before = lag.seen().rpartition(_PREFIX)[0]
        assert before.endswith((b"here", b"here" + half)), before[-40:]
        late = self.stage.tmux.pane(attach_words(self.stage.rig, self.name), name="late")
        assert_same(late, self.pane)
        # And so it stays with what comes after.
        self.emit("\x1b[Kmore 数据 e\u0301\x1b[31m\n\r\n\x1b8after\x1b[mwards\r\n".encode())
        wait_for(lambda: "wards" in self.pane.text(), name="later output")
        assert_same(lag.pane, late, self.pane)
        late.close()
        assert self.gap() == lost
        lag.pane.close()
        self.pane.close()


@pytest.mark.parametrize("cut", list(CUTS))
def test_it_resumes_beyond_the_ring(stage: Stage, cut: str) -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print("seed", seed)
    rng = random.Random(seed)
    half, rest = CUTS[cut]
    end = ENDS[rng.choice(list(ENDS))]
    scene = Scene(stage)
    scene.emit(styled_lines(rng, 5_000) + b"\x1b[4;33mhere" + half)
    lag = scene.laggard
    wait_for(lambda: lag.seen().endswith((b"here", b"here" + half)), name="the cut")
    lag.freeze()
    lag.proxy.refuse()
    lag.proxy.cut()
    flood = rest + b"\r\n" + styled_lines(rng, RING_BYTES + rng.randrange(150_000, 200_000)) + b"\x1b[mEND" + end
    scene.emit(flood)
    wait_for(lambda: "END" in scene.pane.history() or "full" in scene.pane.text(), name="the flood's end")
    lag.proxy.accept()
    lag.go_on()
    scene.check(half, len(flood))


@pytest.mark.parametrize("cut", ["in CSI", "in OSC", "in three bytes"])
def test_it_stands_still_and_falls_behind(stage: Stage, cut: str) -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print("seed", seed)
    rng = random.Random(seed)
    half, rest = CUTS[cut]
    end = ENDS[rng.choice(list(ENDS))]
    scene = Scene(stage)
    scene.emit(styled_lines(rng, 3_000) + b"here")
    lag = scene.laggard
    wait_for(lambda: lag.seen().endswith(b"here"), name="the cut")
    time.sleep(4 * limits.ACK_DELAY_MS / 1000)  # the node knows by then; what it sends without, `check` sees
    lag.freeze()
    # The node sends as much as the window has room for, to the byte.
    head = styled_lines(rng, limits.WINDOW_BYTES - 4 - len(half)) + b"here" + half
    assert len(head) == limits.WINDOW_BYTES
    flood = rest + b"\r\n" + styled_lines(rng, RING_BYTES + rng.randrange(150_000, 200_000)) + b"\x1b[mEND" + end
    passed = lag.passed()
    scene.emit(head)
    # On a busy machine the network may take it so slowly that the ring is overwritten before.
    wait_for(lambda: lag.passed() >= passed + len(head), name="the window to be used up")
    scene.emit(flood)
    wait_for(lambda: "END" in scene.pane.history() or "full" in scene.pane.text(), name="the flood's end")
    # What is on its way must be read before the client, which has slept, may go on on another connection.
    lag.proxy.refuse()
    lag.go_on()
    scene.wait_painted()
    lag.proxy.accept()
    scene.check(half, len(flood))


def test_control_without_the_snapshot_it_is_noticed(stage: Stage) -> None:
    rng = random.Random(1)
    scene = Scene(stage, broken="blind")
    scene.emit(b"here")
    lag = scene.laggard
    lag.freeze()
    lag.proxy.refuse()
    lag.proxy.cut()
    scene.emit(styled_lines(rng, RING_BYTES + 100_000) + b"END")
    scene.pane.expect("^END")
    lag.proxy.accept()
    lag.go_on()

    def there() -> bool:
        scene.emit(b"\r\nlater")
        return "later" in lag.pane.text()

    wait_for(there, name="output after the snapshot")
    assert_never_same(lag.pane, scene.pane, 0.5)
    lag.pane.close()
    scene.pane.close()
