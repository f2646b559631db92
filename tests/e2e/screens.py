"""Terminals that tests look at: panes of a tmux server of their own, with every cell, colour and mode they show.

A pane runs a program, with or without Sterna between them; `differences` compares two panes. Only tmux(1) is asked.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sterna.client.calls import Caller
from sterna.client.endpoint import find
from tests.e2e.rig import Daemon, Rig, wait_for

HERE = Path(__file__).parent
_POLL_SECONDS = 0.03
_CONFIGURATION = """
set -g history-limit 50000
set -g default-terminal xterm-256color
set -g status off
set -g exit-empty off
set -s escape-time 0
set -s set-clipboard off
set -g allow-rename off
set -g automatic-rename off
"""
# Everything that tmux knows about a pane's terminal besides its cells.
MODES = [
    "pane_width",
    "pane_height",
    "pane_title",
    "cursor_x",
    "cursor_y",
    "cursor_flag",
    "cursor_character",
    "alternate_on",
    "insert_flag",
    "keypad_flag",
    "keypad_cursor_flag",
    "mouse_any_flag",
    "mouse_all_flag",
    "mouse_button_flag",
    "mouse_standard_flag",
    "mouse_sgr_flag",
    "mouse_utf8_flag",
    "origin_flag",
    "wrap_flag",
    "scroll_region_upper",
    "scroll_region_lower",
    "pane_tabs",
    "history_size",
]
_SEPARATOR = "=== what follows is no line of the pane ==="
_FORMAT = _SEPARATOR + "".join(f"\n{name}=#{{{name}}}" for name in MODES) + "\n" + _SEPARATOR
_SGR = re.compile(r"\x1b\[([0-9;:]*)m|\x1b[()][0B]|[\x0e\x0f]")
# The first sixteen colours have two names each.
_BASIC = {f"{base}:5:{i}": str(base - 8 + i if i < 8 else base + 44 + i) for base in (38, 48) for i in range(16)}
_OFF = {22: (1, 2), 23: (3,), 24: (4,), 25: (5,), 27: (7,), 28: (8,), 29: (9,), 55: (53,)}
# DEC's line-drawing set; what it draws may as well have been written in Unicode.
_DRAWN = str.maketrans("`afgjklmnopqrstuvwxyz{|}~", "◆▒°±┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·")

Style = tuple[object, ...]
Cell = tuple[str, Style]


class _Pen:
    """The rendition that SGR sequences select."""

    def __init__(self) -> None:
        self.flags: set[int] = set()
        self.colours: dict[str, str] = {}
        self.drawing = False

    def style(self) -> Style:
        return (*sorted(self.flags), *sorted(self.colours.items()))

    def take(self, parameters: str) -> None:
        fields = [field or "0" for field in parameters.split(";")]
        while fields:
            field = fields.pop(0)
            number = int(field.partition(":")[0])
            if number == 0:
                self.flags, self.colours = set(), {}
            elif number in (38, 48, 58):
                if ":" not in field:
                    count = 2 if fields[0] == "5" else 4
                    field += ":" + ":".join(fields[:count])
                    del fields[:count]
                self.colours[str(number)] = _BASIC.get(field, field)
            elif number in (39, 49, 59):
                self.colours.pop(str(number - 1), None)
            elif 30 <= number <= 37 or 90 <= number <= 97:
                self.colours["38"] = field
            elif 40 <= number <= 47 or 100 <= number <= 107:
                self.colours["48"] = field
            elif number in _OFF:
                self.flags.difference_update(_OFF[number])
            else:
                self.flags.add(number)


def parse(lines: Sequence[str]) -> list[list[Cell]]:
    """The cells of lines as `tmux capture-pane -e` prints them; blanks that nobody can see are left out at the end."""
    pen = _Pen()
    rows: list[list[Cell]] = []
    for line in lines:
        row: list[Cell] = []
        at = 0
        for found in [*_SGR.finditer(line), None]:
            style = pen.style()
            text = line[at : found.start() if found else len(line)]
            row += [(char, style) for char in (text.translate(_DRAWN) if pen.drawing else text)]
            if found is None:
                break
            at = found.end()
            if found[0] in ("\x0e", "\x1b(0", "\x0f", "\x1b(B"):
                pen.drawing = found[0] in ("\x0e", "\x1b(0")
            elif found[1] is not None:
                pen.take(found[1])
        while row and row[-1][0] == " " and not _seen_on_blanks(row[-1][1]):
            row.pop()
        rows.append(row)
    while rows and not rows[-1]:
        rows.pop()
    return rows


def _seen_on_blanks(style: Style) -> bool:
    return any(part in (4, 7, 9, 53) or (isinstance(part, tuple) and part[0] == "48") for part in style)


class View:
    """What a pane shows now: the cells of screen and scroll-back, the lines as text, the modes."""

    def __init__(self, answer: str) -> None:
        cells, modes, text = answer.split(_SEPARATOR)
        self.cells = cells.rstrip("\n")
        self.modes = dict(line.partition("=")[::2] for line in modes.strip("\n").split("\n"))
        # Soft-wrapped lines are one line here; whether the column that a wide character leaves empty is a blank or
        # nothing at all cannot be seen.
        self.lines = [line.replace(" ", "").translate(_DRAWN) for line in text.rstrip("\n").split("\n")]

    @functools.cached_property
    def rows(self) -> list[list[Cell]]:
        """The cells, row by row."""
        return parse(self.cells.split("\n"))

    def differences(self, other: View) -> list[str]:
        """What is not the same, in words; [] if nothing."""
        found = [
            f"{name}: {self.modes[name]!r} is not {other.modes[name]!r}"
            for name in self.modes
            if self.modes[name] != other.modes[name]
        ]
        lines, other_lines = self.lines, other.lines
        if self.modes["alternate_on"] == "1":
            # Nothing there is ever wrapped anew, and terminals differ in what scrolling does to a wrapped line.
            lines = other_lines = []
        if self.cells != other.cells:
            found += self._different_rows(other)
        if lines != other_lines and not found:
            pairs = [pair for pair in zip(lines, other_lines, strict=False) if pair[0] != pair[1]]
            found.append(f"soft-wrapped lines are joined differently: {pairs[:1]!r}")
        return found[:20]

    def _different_rows(self, other: View) -> list[str]:
        mine, others = self.rows, other.rows
        found = [f"{len(mine)} rows, not {len(others)}"] if len(mine) != len(others) else []
        for number, (row, wanted) in enumerate(zip(mine, others, strict=False)):
            if row != wanted:
                found.append(f"row {number}: {_text(row)!r} is not {_text(wanted)!r}")
                if _text(row) == _text(wanted):
                    found += [f"  {a} is not {b}" for a, b in zip(row, wanted, strict=True) if a != b][:3]
        return found


def _text(row: list[Cell]) -> str:
    return "".join(char for char, _ in row)


def _whole(text: str) -> str:
    """Keeps tmux from taking a semicolon at the end for the end of the command."""
    return text[:-1] + "\\;" if text.endswith(";") else text


class Pane:
    """One terminal and the program in it."""

    def __init__(self, tmux: Tmux, name: str) -> None:
        self._tmux = tmux
        self.name = name

    def run(self, command: str, *args: str) -> str:
        """Runs a tmux command on this pane."""
        return self._tmux.run(command, "-t", f"={self.name}:", *args)

    def type(self, text: str) -> None:
        """Types text as it is."""
        self.run("send-keys", "-l", "--", _whole(text))

    def line(self, text: str) -> None:
        """Types a line and Enter."""
        self.type(text)
        self.keys("Enter")

    def keys(self, *names: str) -> None:
        """Types keys by their tmux names; what they send depends on the terminal's modes."""
        self.run("send-keys", *names)

    def paste(self, text: str) -> None:
        """Pastes, in brackets if the program has asked for that."""
        self._tmux.run("set-buffer", "-b", "pasted", "--", _whole(text))
        self.run("paste-buffer", "-p", "-b", "pasted")

    def resize(self, cols: int, rows: int) -> None:
        """Changes the terminal's size; tmux takes up to 250 ms to tell the program, see `resized`."""
        self.run("resize-window", "-x", str(cols), "-y", str(rows))

    def resized(self) -> None:
        """Waits until the program's terminal has the pane's size."""
        wanted = tuple(int(word) for word in self.about("pane_height,pane_width".replace(",", "} #{")).split())
        tty = os.open(self.about("pane_tty"), os.O_RDWR | os.O_NOCTTY)
        try:
            wait_for(lambda: os.get_terminal_size(tty)[::-1] == wanted, name="the terminal's size")
        finally:
            os.close(tty)

    def about(self, name: str) -> str:
        """The value of one of tmux's format variables."""
        return self.run("display-message", "-p", f"#{{{name}}}").rstrip("\n")

    @property
    def pid(self) -> int:
        """The process in it."""
        return int(self.about("pane_pid"))

    def record(self, path: Path) -> None:
        """Writes all that the program sends to the terminal from now on into a file."""
        self.run("pipe-pane", "-o", f"cat > {path}")
        wait_for(path.exists, name="the recording")

    def text(self) -> str:
        """The lines of the screen."""
        return self.run("capture-pane", "-p")

    def history(self) -> str:
        """The lines of scroll-back and screen; soft-wrapped ones are one."""
        return self.run("capture-pane", "-p", "-J", "-S", "-")

    def view(self, since: str = "-") -> View:
        """All that there is to see, from the line `since` on; 0 is the screen's first."""
        target = f"={self.name}:"
        return View(
            self._tmux.run(
                "capture-pane", "-t", target, "-e", "-N", "-p", "-S", since, ";",
                "display-message", "-t", target, "-p", _FORMAT, ";",
                "capture-pane", "-t", target, "-p", "-J", "-S", since,
            )
        )  # fmt: skip

    def screen(self) -> View:
        """The same without what a picture that was made for a larger terminal leaves outside of the screen."""
        view = self.view("0")
        del view.modes["history_size"], view.modes["pane_tabs"]
        return view

    def expect(self, pattern: str, seconds: float = 15.0) -> str:
        """Waits until the screen's text matches; returns it."""
        wanted = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + seconds
        while True:
            text = self.text()
            if wanted.search(text):
                return text
            if time.monotonic() >= deadline:
                raise AssertionError(f"{pattern!r} did not come to {self.name}; it shows:\n{text}")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Closes the terminal."""
        self._tmux.run("kill-session", "-t", f"={self.name}")


class Tmux:
    """A tmux server of our own, as a context manager."""

    def __init__(self, rig: Rig) -> None:
        self._socket = os.fspath(rig.directory / "tmux")
        self._configuration = rig.directory / "tmux.conf"
        self._configuration.write_text(_CONFIGURATION)
        self._env = {**rig.env, "HISTFILE": "/dev/null"}
        self._directory = rig.directory
        self._count = 0

    def __enter__(self) -> Tmux:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True, check=False, timeout=10)

    def run(self, *args: str) -> str:
        """Runs a tmux command that must succeed; returns what it prints."""
        done = subprocess.run(
            ["tmux", "-S", self._socket, "-f", os.fspath(self._configuration), *args],
            env=self._env, cwd=self._directory, capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        assert done.returncode == 0, f"tmux {args!r}: {done.stderr}"
        return done.stdout

    def pane(
        self, words: Sequence[str], *, cols: int = 80, rows: int = 24, env: dict[str, str] | None = None, name: str = ""
    ) -> Pane:
        """Runs a program in a new terminal, which nothing tells that it is tmux's."""
        self._count += 1
        name = f"{name or 'pane'}-{self._count}"
        extra = [f"{key}={value}" for key, value in (env or {}).items()]
        clean = ["env", "-u", "TMUX", "-u", "TMUX_PANE", "-u", "COLUMNS", "-u", "LINES", *extra]
        self.run("new-session", "-d", "-s", name, "-x", str(cols), "-y", str(rows), "--", *clean, *words)
        return Pane(self, name)


def assert_same(*panes: Pane, seconds: float = 10.0, look: Callable[[Pane], View] = Pane.view) -> None:
    """Waits until all panes show the same as the last one to who looks at them so."""
    deadline = time.monotonic() + seconds
    for pane in panes[:-1]:
        while found := look(pane).differences(look(panes[-1])):
            assert time.monotonic() < deadline, f"{pane.name} is not as {panes[-1].name}:\n" + "\n".join(found)
            time.sleep(_POLL_SECONDS)


def assert_shows(pane: Pane, view: View, seconds: float = 10.0) -> None:
    """Waits until a pane shows what was seen before."""
    deadline = time.monotonic() + seconds
    while found := pane.view().differences(view):
        assert time.monotonic() < deadline, f"{pane.name} is not as it was:\n" + "\n".join(found)
        time.sleep(_POLL_SECONDS)


def assert_never_same(
    pane: Pane, other: Pane, seconds: float = 1.0, *, look: Callable[[Pane], View] = Pane.view
) -> None:
    """Control: the check for equality has to fail, however long it looks."""
    try:
        assert_same(pane, other, seconds=seconds, look=look)
    except AssertionError:
        return
    raise AssertionError("what is different counts as equal: the check is worth nothing")


def attach_words(rig: Rig, name: str, port: int | None = None, *options: str, broken: str = "") -> list[str]:
    """The words that attach over TCP and TLS to the session of that name; `broken` on purpose, as a control."""
    words = ["attach", "main", "--name", name, "--host", "127.0.0.1", "--port", str(port or rig.port), *options]
    if broken:
        return [sys.executable, os.fspath(HERE / "broken_attach.py"), broken, *words]
    return rig.words(*words)


def second_device(rig: Rig, name: str = "two") -> dict[str, str]:
    """What makes a client another device: a state directory and so a key of its own, and an access token."""
    state = rig.directory / name
    state.mkdir(mode=0o700, exist_ok=True)
    with Caller(find(state=os.fspath(rig.state))) as caller:
        token = caller.call("token", ttl=600)["token"]
    env = {"STERNA_STATE": os.fspath(state), "STERNA_TOKEN": token}
    # The first meeting of device and node is said in a line of its own: not on the screens that are compared.
    assert rig.sterna("ls", "--host", "127.0.0.1", "--port", str(rig.port), env=env).returncode == 0
    return env


def start_node(rig: Rig, **settings: int) -> None:
    """Starts the node with settings that `up` does not offer."""
    path = rig.directory / "node.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    state = rig.state / "node"
    state.mkdir(mode=0o700, exist_ok=True)
    words = rig.words(
        "node", "--port", str(rig.port), "--sockets", os.fspath(rig.sockets), "--state", os.fspath(state),
        "--config", os.fspath(path),
    )  # fmt: skip
    rig.node = node = Daemon(words, rig.env, rig.directory / "node.log")

    def there() -> bool:
        assert node.running, node.output()
        return (state / "node.sock").exists()

    wait_for(there, name="the node")


def child_of(pid: int, matches: Callable[[str], bool]) -> int:
    """Waits for a descendant of a process whose command line matches; returns its process id."""

    def search() -> int:
        waiting = [pid]
        while waiting:
            one = waiting.pop()
            try:
                if one != pid and matches(Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode()):
                    return one
                waiting += [int(word) for word in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
            except OSError:
                continue
        return 0

    return wait_for(search, name="the process")
