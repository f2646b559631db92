"""Snapshots of real programs' screens, judged by another terminal (tmux) and by the engine itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.pod.program import program_environment
from sterna.pod.screen_ghostty import GhosttyTerminal
from tests.integration.program_driver import PATIENCE_SECONDS, started

COLS, ROWS = 80, 24
ENV = program_environment(
    os.environ, term="xterm-256color", extra={"LC_ALL": "C.UTF-8", "LESS": "", "VIMINIT": "", "PS1": "$ "}
)
ART = r"""
printf "\xe4\xb8\xad\xe6\x96\x87 e\xcc\x81 \xf0\x9f\x98\x80 \xe2\x95\x94\xe2\x95\x90\xe2\x95\x97\n"
for i in {1..40}; do printf "\xe2\x96\x88%.0s" {1..77}; printf "\xe4\xb8\xad\xe6\x96\x87\n"; done
printf "\e[48;5;22m"; for i in {1..5}; do echo "colour $i"; done
printf "\e[38;2;1;2;3mtrue\e[4:3mcurly\e[0m end\e]2;art\a"
"""
# Name: command, then what must be on the screen before which keys are sent.
PROGRAMS: dict[str, tuple[list[str], list[tuple[str, bytes]]]] = {
    "ls": (["ls", "--color=always", "-la", "/usr/bin"], []),
    "art": (["bash", "-c", ART], []),
    "less": (["less", "text"], [("line 20 ", b" "), ("line 40 ", b"/line 77 \r"), ("line 77 ", b"G"), ("(END)", b"")]),
    "vim": (
        ["vim", "-Nu", "NONE", "-i", "NONE", "-c", "set number hlsearch mouse=a", "text"],
        [
            ("line 20 ", b"G"),
            ("line 200 ", b"/line 1.3\r"),
            ("line 103 ", b":split\r"),
            ("text\n", "Oneu 中文 😀\x1b".encode()),
            ("neu 中文 😀", b""),
        ],
    ),
    "vim-left": (
        ["bash", "-c", "echo before; vim -Nu NONE -i NONE text; echo after"],
        [("line 20 ", b"Gx"), ("ine 200 ", b":q!\r"), ("after", b"")],
    ),
    "bash": (
        ["bash", "--norc", "-i"],
        [
            ("$", b'printf "%s " {1..200}\n'),
            (" 200 $", b'printf "\\e[31mred\\n"\n'),
            ("\nred\n", b"seq 50\n"),
            ("\n50\n", b"echo unfinished"),
            ("echo unfinished", b""),
        ],
    ),
}


def record(name: str, folder: Path) -> bytes:
    """Runs a program, sends its keys as the screen shows what they wait for, and returns its whole output."""
    (folder / "text").write_text("".join(f"line {n} of some text with \t a tab\n" for n in range(1, 201)))
    argv, steps = PROGRAMS[name]
    if shutil.which(argv[0]) is None or ("vim" in name and shutil.which("vim") is None):
        pytest.skip(f"{argv[0]} is not installed")
    model, seen = GhosttyTerminal(COLS, ROWS), 0
    with started(*argv, cwd=str(folder), env=ENV, cols=COLS, rows=ROWS) as driver:
        for wanted, keys in steps:
            end = time.monotonic() + PATIENCE_SECONDS
            while wanted not in model.text():
                assert time.monotonic() < end, f"{wanted!r} never showed:\n{model.text()}"
                driver.read_some(0.05)
                answers = model.feed(bytes(driver.output[seen:]))
                seen = len(driver.output)
                if answers:
                    os.write(driver.program.write_fd, answers)
            os.write(driver.program.write_fd, keys)
        if not steps:
            driver.read_to_end()
        return bytes(driver.output)


class Tmux:
    """A tmux server of its own, each of whose panes shows some bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.run("new-session", "-d", "-x", str(COLS), "-y", str(ROWS), "sleep 600", ";", "set", "-g", "status", "off")
        self.run("set", "-g", "history-limit", "20000")

    def run(self, *arguments: str) -> str:
        """Runs one tmux command and returns what it prints."""
        command = ["tmux", "-S", str(self.folder / "socket"), "-f", "/dev/null", *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True, env=ENV, timeout=20).stdout

    def show(self, data: bytes) -> tuple[list[list[tuple[str, bytes, bytes]]], str]:
        """Shows the bytes in a fresh pane; returns all its lines as cells, and its cursor and modes."""
        self.count += 1
        path, done = self.folder / f"bytes-{self.count}", f"done-{self.count}"
        path.write_bytes(data)
        script = f"stty raw -echo; cat {path}; tmux -S {self.folder}/socket wait-for -S {done}; exec sleep 600"
        pane = self.run("new-window", "-P", "-F", "#{pane_id}", "bash", "-c", script).strip()
        self.run("wait-for", done)
        fields = (
            "cursor_x cursor_y alternate_on mouse_any_flag mouse_sgr_flag keypad_cursor_flag keypad_flag insert_flag"
        )
        fields += " scroll_region_upper scroll_region_lower origin_flag wrap_flag cursor_flag pane_title pane_tabs"
        style = " ".join(f"{field}=#{{{field}}}" for field in (*fields.split(), "history_size"))
        before = None
        while True:
            # `cat` has ended, but tmux may still be reading: it is done when two looks agree.
            now = (
                self.run("capture-pane", "-t", pane, "-e", "-p", "-S", "-"),
                self.run("display", "-t", pane, "-p", style),
            )
            if now == before:
                break
            before = now
            time.sleep(0.05)
        self.run("kill-window", "-t", pane)
        return cells(now[0].encode()), now[1]


def cells(captured: bytes) -> list[list[tuple[str, bytes, bytes]]]:
    """Reads what capture-pane printed into cells, as it writes the same look in more than one way."""
    lines = captured.rstrip(b"\n").split(b"\n")
    reader = GhosttyTerminal(COLS, max(len(lines), 2))
    reader.feed(b"\x1b[?7l" + b"\r\n".join(lines))
    rows = []
    for row in reader.cells():
        line: list[tuple[str, bytes, bytes]] = []
        for run in row.runs:
            characters = [run.text] if run.cluster else list(run.text or " " * run.width)
            line += [(c, b"" if c == " " else run.style, run.background) for c in characters]
        while line and line[-1] == (" ", b"", b""):
            line.pop()
        rows.append(line)
    return rows


@pytest.fixture(scope="module")
def tmux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    server = Tmux(tmp_path_factory.mktemp("tmux"))
    yield server
    server.run("kill-server")


@pytest.mark.parametrize("name", PROGRAMS)
def test_tmux_shows_the_same_from_a_snapshot(name: str, tmux: Tmux, tmp_path: Path) -> None:
    stream = record(name, tmp_path)
    whole = tmux.show(stream)
    for cut in (len(stream), len(stream) * 2 // 3, len(stream) // 3):
        model = GhosttyTerminal(COLS, ROWS, 20_000)
        model.feed(stream[:cut])
        snapshot = model.snapshot()
        assert tmux.show(snapshot) == (whole if cut == len(stream) else tmux.show(stream[:cut])), f"cut at {cut}"
        assert tmux.show(snapshot + stream[cut:]) == whole, f"cut at {cut}, later input"


@pytest.mark.parametrize("name", PROGRAMS)
def test_any_cut_of_a_real_stream_is_exact(name: str, tmp_path: Path) -> None:
    stream = record(name, tmp_path)[-6000:]
    original = GhosttyTerminal(COLS, ROWS, 200)
    whole = GhosttyTerminal(COLS, ROWS, 200)
    whole.feed(stream)
    step = max(len(stream) // 60, 1)
    for start in range(0, len(stream), step):
        repainted = GhosttyTerminal(COLS, ROWS, 200)
        repainted.feed(original.snapshot())
        repainted.feed(stream[start:])
        assert repainted.cells(scrollback=True) == whole.cells(scrollback=True), f"cut at {start}"
        assert repainted.cursor() == whole.cursor()
        assert repainted.title() == whole.title()
        original.feed(stream[start : start + step])


def test_the_comparison_by_tmux_can_fail(tmux: Tmux) -> None:
    model = GhosttyTerminal(COLS, ROWS)
    model.feed(b"\x1b[31mred\x1b[m\x1b[?1000h")
    snapshot = model.snapshot()
    shown = tmux.show(b"\x1b[31mred\x1b[m\x1b[?1000h")
    assert tmux.show(snapshot) == shown
    assert tmux.show(snapshot.replace(b";31m", b";32m")) != shown
    assert tmux.show(snapshot.replace(b"\x1b[?1000h", b"")) != shown
