"""Terminal programs through `sterna attach` show, cell by cell and mode by mode, what they show without Sterna.

Each program runs twice in terminals of the same size, once on a session that two devices are attached to and once by
itself, and gets the same input. Compared are scroll-back, screen, colours and all modes, also with a network that is
cut at random moments, after a fresh attach (a snapshot), and on the second device.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.client.calls import Caller
from sterna.client.endpoint import find
from tests.e2e.proxy import CutProxy
from tests.e2e.rig import Rig, wait_for
from tests.e2e.screens import (
    HERE,
    Pane,
    Tmux,
    assert_never_same,
    assert_same,
    attach_words,
    second_device,
)

pytestmark = [
    pytest.mark.xdist_group("terminal-programs"),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]

BASH = ["bash", "--norc", "--noprofile"]


class Stage:
    """A node, a tmux server and a second device, shared by the tests of this file."""

    def __init__(self, rig: Rig, tmux: Tmux) -> None:
        self.rig = rig
        self.tmux = tmux
        self.other = second_device(rig)
        self.count = 0
        self._caller = Caller(find(state=os.fspath(rig.state)))

    def size(self, name: str) -> tuple[int, int]:
        """The size that the node has told the session's program."""
        uid = next(session["uid"] for session in self._caller.listing()[0] if session["name"] == name)
        about = self._caller.call("info", session=uid)
        return about["cols"], about["rows"]

    def close(self) -> None:
        self._caller.close()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Rig() as rig:
        rig.env["HISTFILE"] = "/dev/null"
        rig.start_node()
        with Tmux(rig) as tmux, contextlib.closing(Stage(rig, tmux)) as made:
            yield made


class Twins:
    """One session on two devices, and the same program without Sterna."""

    def __init__(self, stage: Stage, seed: int, proxy: CutProxy | None = None, *, broken: str = "") -> None:
        self.stage = stage
        self.rng = random.Random(seed)
        stage.count += 1
        self.name = f"s{stage.count}"
        self.port = proxy.port if proxy else stage.rig.port
        self.plain = stage.tmux.pane(BASH, name="plain")
        self.attached = [self.attach(broken=broken)]
        self.attached[0].expect(r"^\$ *$")
        self.attached.append(self.attach(second=True))
        self.expect(r"^\$ *$")
        # What it says about a node that it meets for the first time.
        self.attached[1].run("clear-history")
        # Another device types only once everything typed before has been seen: nothing orders their input but time.
        self.typist = self.attached[0]

    def attach(self, *, second: bool = False, broken: str = "") -> Pane:
        words = attach_words(self.stage.rig, self.name, self.port, broken=broken)
        return self.stage.tmux.pane(words, env=self.stage.other if second else None, name=self.name)

    def type(self, text: str) -> None:
        for pane in (self.plain, self.typist):
            pane.type(text)

    def line(self, text: str) -> None:
        for pane in (self.plain, self.typist):
            pane.line(text)

    def keys(self, *names: str) -> None:
        for pane in (self.plain, self.typist):
            pane.keys(*names)

    def paste(self, text: str) -> None:
        for pane in (self.plain, self.typist):
            pane.paste(text)

    def resize(self) -> None:
        """Changes the terminal's size some times; at last it is as before, as tmux else shifts its other screen."""
        sizes = [(self.rng.randrange(60, 140), self.rng.randrange(12, 50)) for _ in range(2)]
        for cols, rows in (*sizes, (80, 24)):
            for pane in (self.plain, *self.attached):
                pane.resize(cols, rows)
            for pane in (self.plain, *self.attached):
                pane.resized()
            # A session takes a new size at most every 50 ms; keys typed before that would be for the old one.
            self.told(cols, rows)

    def expect(self, pattern: str) -> None:
        for pane in (self.plain, *self.attached):
            pane.expect(pattern)

    def same(self) -> None:
        assert_same(*self.attached, self.plain)
        self.typist = self.rng.choice(self.attached)

    def told(self, cols: int, rows: int) -> None:
        wait_for(lambda: self.stage.size(self.name) == (cols, rows), name="the session's size")

    def alone(self) -> None:
        """Leaves one device: the other one would get pictures of its own while their sizes differ."""
        for pane in self.attached[1:]:
            pane.close()
        self.attached[1:] = []
        self.typist = self.attached[0]

    def ready(self) -> None:
        """Waits for the shell's prompt."""
        self.expect(r"^\$ *\n*\Z")

    def fresh(self) -> None:
        """Closes all terminals of the session and attaches new ones, which a snapshot paints."""
        for pane in self.attached:
            pane.close()
        self.attached = [self.attach(), self.attach(second=True)]
        self.typist = self.attached[0]

    def close(self) -> None:
        for pane in (self.plain, *self.attached):
            pane.close()


def bash(twins: Twins, work: Path) -> None:
    twins.line(r"printf '\e[31mred \e[1;4;38;5;208mbold\e[48;2;10;20;30m deep \e[0;7;9mback\e[m end\n'")
    twins.expect("^red bold deep back end")
    twins.ready()
    twins.line("echo 数据库 cafe\u0301 n\u0303 한국어 😀 " + "宽" * 8)
    twins.expect("^数据库.*宽$")
    twins.ready()
    twins.line(
        "for i in $(seq 120); do printf '\\e[3%dmline %d %*s\\e[m\\n' $((i % 8)) $i $((i % 90)) x; done; echo do''ne"
    )
    twins.expect("^done")
    twins.same()
    twins.type("echo abcdef")
    twins.keys("Left", "Left", "Left")
    twins.type("数")
    twins.keys("Home", "M-f", "Delete", "C-e", "C-w", "C-y")
    twins.expect("数def *$")
    twins.keys("Enter")
    twins.ready()
    twins.line(f"cat {work}/utf8.txt; echo file''end")
    twins.expect("^fileend")
    twins.same()
    # Modes that only a program sets; what the keys then send shows that they count.
    twins.line(r"printf '\e[?1h\e=\e[?1000;1006h\e[?2004h\e]2;a title — 标题\e\\\e[2;20r\e[5;7H\e[4h'; cat -v")
    wait_for(lambda: all(pane.about("keypad_flag") == "1" for pane in (twins.plain, *twins.attached)), name="the modes")
    twins.keys("Up", "F5")
    twins.paste("pasted")
    twins.expect(r"\^\[OA.*\^\[\[200~pasted\^\[\[201~")
    twins.same()
    twins.fresh()
    twins.same()
    twins.keys("Down")
    twins.expect(r"\^\[OB")
    twins.keys("C-c")
    twins.expect(r"^\$ xxx")
    twins.line(r"printf '\e[?1l\e>\e[?1000;1006l\e[r\e[4l\e[20;1H'; clear; echo re''set")
    twins.expect("^reset")
    twins.same()
    # Lines by the thousand while the terminals change their size.
    twins.alone()
    twins.line("for i in $(seq 25000); do echo $i-$((i*i)); done; echo loa''ded")
    twins.resize()
    twins.expect("^loaded")
    twins.ready()
    twins.line("echo $COLUMNS $LINES")
    twins.expect("^80 24")
    twins.same()
    twins.attached.append(twins.attach(second=True))
    wait_for(lambda: twins.attached[1].text() == twins.plain.text(), name="the second device")


def vim(twins: Twins, work: Path) -> None:
    twins.line(f"vim -u NONE -i NONE -N -n {work}/utf8.txt")
    twins.expect("utf8.txt")
    twins.line(":set number mouse=a ttymouse=sgr title laststatus=2 termguicolors notimeout")
    twins.line(":syntax on")
    twins.keys("G", "g", "g", "j", "C-d", "C-e")
    twins.type("o新しい行 e\u0301 inserted")
    twins.keys("Escape", "Up", "Up", "0")
    twins.type("vjj")
    twins.expect("VISUAL")
    twins.same()
    twins.keys("d", "u")
    twins.line(":split")
    twins.line(":set cursorline hlsearch")
    twins.line("/line 4")
    twins.expect("line 4")
    twins.type("i")
    twins.expect("INSERT")
    twins.paste("in brackets;")
    twins.expect("in brackets;")
    twins.same()
    twins.fresh()
    twins.same()
    twins.type("typed later")
    twins.keys("Escape", "C-w", "j")
    twins.expect("typed later")
    twins.same()
    twins.alone()
    twins.line(
        ":for i in range(200) | execute 'normal! ' . (i % 30 + 1) . 'G' | redraw | endfor | echo 'ready ' . 40 * 2"
    )
    twins.resize()
    twins.keys("g", "g", "C-l")
    twins.line(":call setline(1, 'lines ' . &lines . ' columns ' . &columns)")
    twins.expect("lines 24 columns 80")
    twins.same()
    twins.line(":qa!")
    twins.ready()
    twins.same()


def less(twins: Twins, work: Path) -> None:
    twins.line(f"less -R {work}/colours.txt")
    twins.expect("colours.txt")
    twins.keys("Space", "Space", "k", "Down")
    twins.line("/line 7")
    twins.expect("line 7")
    twins.keys("n", "n", "b")
    twins.same()
    twins.fresh()
    twins.same()
    twins.line("?line 3")
    twins.keys("PageDown")
    twins.alone()
    twins.resize()
    twins.keys("PageDown", "Up")
    twins.keys("G")
    twins.expect("END")
    twins.keys("r")
    twins.same()
    twins.keys("q")
    twins.ready()
    twins.line("echo ba''ck")
    twins.expect("^back")
    twins.same()


def full_screen(twins: Twins, work: Path) -> None:
    twins.line(f"{sys.executable} {HERE}/full_screen.py")
    twins.expect("keys 0 last none")
    twins.keys("Down", "Down", "PageDown", "Up")
    twins.type("t")
    twins.expect("keys 5 last t")
    twins.type("\x1b[<0;12;8M\x1b[<0;12;8m")
    twins.expect("last mouse 11,7")
    twins.same()
    twins.type("l")
    twins.expect("frame 300")
    twins.same()
    twins.fresh()
    twins.same()
    twins.keys("Down")
    twins.expect("last KEY_DOWN")
    twins.alone()
    twins.type("l")
    twins.resize()
    twins.type("x")
    twins.expect("last x frame 600")
    twins.same()
    twins.keys("F10")
    twins.ready()
    twins.line("echo ba''ck")
    twins.expect("^back")
    twins.same()


PROGRAMS = {"bash": bash, "vim": vim, "less": less, "full_screen": full_screen}


def _files(work: Path) -> Path:
    lines = [f"line {i} — naïve cafe\u0301 数据 {'宽' * (i % 5)} {'x' * (i * 7 % 90)} 😀" for i in range(60)]
    (work / "utf8.txt").write_text("\n".join(lines) + "\n")
    coloured = [
        f"\x1b[{i % 2};3{i % 8}mline {i}\x1b[m {'word ' * (i % 30)}\x1b[4;48;5;{i % 256}m数\x1b[m" for i in range(200)
    ]
    (work / "colours.txt").write_text("\n".join(coloured) + "\n")
    return work


@pytest.mark.parametrize("network", ["good", "cut"])
@pytest.mark.parametrize("program", list(PROGRAMS))
def test_it_is_as_without_sterna(stage: Stage, program: str, network: str) -> None:
    if program in ("vim", "less") and shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print("seed", seed)
    proxy = stage.rig.proxy() if network == "cut" else None
    twins = Twins(stage, seed, proxy)
    if proxy is not None:
        proxy.chaos(seed, every=(0.01, 0.15), actions=("reset", "close", "reset", "close", "stall", "delay"))
    PROGRAMS[program](twins, _files(stage.rig.directory))
    if proxy is not None:
        print("cuts", proxy.cuts)
        assert proxy.cuts >= 2
        proxy.calm()
    twins.close()


@pytest.mark.parametrize("fault", ["drop", "swap"])
def test_control_a_byte_less_or_a_wrong_order_is_noticed(stage: Stage, fault: str) -> None:
    twins = Twins(stage, 0, broken=fault)
    twins.line("echo ..bro''ken here..")
    twins.plain.expect("^..broken here")
    twins.attached[1].expect("^..broken here")
    assert_never_same(twins.attached[0], twins.plain)
    assert_same(twins.attached[1], twins.plain)
    twins.close()


@pytest.mark.parametrize(
    ("missing", "broken"),
    [
        pytest.param(b"\x1b=", "keypad_flag", id="a mode"),
        pytest.param(b"\x1b[?1002h", "mouse", id="the mouse"),
        pytest.param(b";31", "row", id="a colour"),
        pytest.param("数".encode(), "row", id="a character"),
        pytest.param(b"\x1b[5;20r", "scroll_region", id="the scroll region"),
    ],
)
def test_control_a_snapshot_without_something_is_noticed(stage: Stage, missing: bytes, broken: str) -> None:
    twins = Twins(stage, 0)
    twins.line(r"clear; printf '\e[31m数据\e[m\e[?1002h\e=\e[5;20r\e[8;1H'; cat")
    wait_for(lambda: all(pane.about("keypad_flag") == "1" for pane in (twins.plain, *twins.attached)), name="the modes")
    twins.same()
    bad = twins.attach(broken=missing.hex())
    good = twins.attach(second=True)
    bad.expect("据")
    assert_same(good, twins.plain)
    assert_never_same(bad, twins.plain, 0.3)
    assert any(broken in line for line in bad.view().differences(twins.plain.view()))
    twins.close()
    bad.close()
    good.close()
