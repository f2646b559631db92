"""What `sterna attach` does to the user's terminal besides passing bytes on: questions, own keys, leaving, trouble.

Real processes throughout: a node with TLS, agents, clients in panes of tmux or in terminals of their own.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.limits import WINDOW_BYTES
from tests.e2e.rig import Rig, wait_for
from tests.e2e.screens import (
    HERE,
    Pane,
    Tmux,
    assert_never_same,
    assert_same,
    assert_shows,
    attach_words,
    child_of,
    second_device,
)  # fmt: skip

pytestmark = [
    pytest.mark.xdist_group("terminal-attach"),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]

PROMPT = r"^\$ *$"
STALL_SECONDS = 0.3
ASK = f"{sys.executable} {HERE / 'ask.py'}"


class Stage:
    def __init__(self, rig: Rig, tmux: Tmux) -> None:
        self.rig = rig
        self.tmux = tmux
        self.other = second_device(rig)
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"s{self.count}"

    def attach(
        self, name: str, *options: str, port: int | None = None, broken: str = "", second: bool = False,
        cols: int = 80, rows: int = 24,
    ) -> Pane:  # fmt: skip
        words = attach_words(self.rig, name, port, *options, broken=broken)
        # tmux itself does not always tell how a program ended.
        words = ["sh", "-c", '"$@"; echo "status $?"; read -r _', "sh", *words]
        return self.tmux.pane(words, env=self.other if second else None, cols=cols, rows=rows, name=name)

    def attached(self, name: str) -> int:
        found = [session for session in self.rig.json("ls")["sessions"] if session["name"] == name]
        count: int = found[0]["attached"]
        return count


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Rig() as rig:
        rig.env["HISTFILE"] = "/dev/null"
        rig.start_node()
        with Tmux(rig) as tmux:
            yield Stage(rig, tmux)


# ---- questions ---------------------------------------------------------------------------------------------------


def ask(pane: Pane, query: str, told: Path) -> str:
    """Has a program ask the terminal; returns what it was answered."""
    told.unlink(missing_ok=True)
    pane.line(f"{ASK} '{query}' {told}")
    wait_for(told.exists, name="the answer")
    pane.expect("^answer")
    return told.read_text()


def test_only_the_last_typist_answers(stage: Stage) -> None:
    name = stage.name()
    one = stage.attach(name)
    one.expect(PROMPT)
    two = stage.attach(name, second=True, cols=100, rows=30)
    two.expect(PROMPT)
    for pane, size in ((one, "80;24"), (two, "100;30"), (one, "80;24")):
        assert ask(pane, "\\x1b[18t", stage.rig.directory / name) == rf"b'\x1b[8;{size}t'"
    one.close()
    two.close()


def test_control_a_terminal_that_answers_everything_is_noticed(stage: Stage) -> None:
    name = stage.name()
    one = stage.attach(name)
    one.expect(PROMPT)
    two = stage.attach(name, second=True, cols=100, rows=30, broken="answers")
    two.expect(PROMPT)
    answer = ask(one, "\\x1b[18t", stage.rig.directory / name)
    assert sorted(re.findall(r"8;\d+;\d+t", answer)) == ["8;100;30t", "8;80;24t"]
    one.close()
    two.close()


@pytest.mark.parametrize("broken", ["", "answers"])
def test_nobody_is_there_so_the_agent_answers_and_no_replay_does(stage: Stage, broken: str) -> None:
    name, go, told = stage.name(), stage.rig.directory / "go", stage.rig.directory / "told"
    for path in (go, told):
        path.unlink(missing_ok=True)
    proxy = stage.rig.proxy()
    pane = stage.attach(name, port=proxy.port, broken=broken)
    pane.expect(PROMPT)
    pane.line(f"clear; printf 'abc'; while [ ! -e {go} ]; do sleep 0.02; done; {ASK} '\\x1b[c\\x1b[6n' {told}")
    pane.expect("^abc")
    proxy.refuse()
    proxy.cut()
    wait_for(lambda: stage.attached(name) == 0, name="the session to be alone")
    go.touch()
    wait_for(told.exists, name="the agent's answer")
    assert re.fullmatch(r"b'\\x1b\[\?[\d;]+c\\x1b\[1;4R'", told.read_text())
    proxy.accept()
    pane.expect("abcanswer")
    pane.line("echo lat''er")
    pane.expect(r"echo lat''er *\n(.*\n)+\$ *$")
    # An answer to what was replayed would be typed at the prompt.
    clean = bool(re.search(r"^\$ echo lat''er *$", pane.text(), re.MULTILINE))
    assert clean is not bool(broken), pane.text()
    pane.close()


# ---- the keys of the client --------------------------------------------------------------------------------------


def test_detach_and_attach_restores(stage: Stage) -> None:
    name = stage.name()
    shell = stage.tmux.pane(["bash", "--norc", "--noprofile"])
    words = " ".join(attach_words(stage.rig, name))
    shell.line(f"clear; {words}; echo status $?")
    shell.expect(PROMPT)
    shell.line(r"for i in $(seq 40); do printf '\e[3%dmline %d\e[m\n' $((i % 8)) $i; done; printf '\e]2;mine\a\e[?1h'")
    shell.expect(r"line 40\n\$ *$")
    before = shell.view()
    shell.type("\r~d")
    assert f"Detached from {name}; `" in shell.expect(r"attach (.*\n)*.*comes back\.\nstatus 0")
    assert (shell.about("keypad_cursor_flag"), shell.about("pane_title")) != ("1", "mine")
    shell.line(words)
    shell.expect(r"line 40\n\$ *\n\$ *$")
    wait_for(lambda: shell.view().rows[-1:] == before.rows[-1:], name="the same screen")
    after = shell.view()
    assert after.rows[: len(before.rows)] == before.rows
    assert [after.modes[mode] for mode in ("keypad_cursor_flag", "pane_title")] == ["1", "mine"]
    shell.close()


def test_help_escape_and_drop(stage: Stage) -> None:
    name = stage.name()
    pane = stage.attach(name)
    pane.expect(PROMPT)
    pane.type("\r~?")
    pane.expect("~d  detach")
    pane.type("\r~~x")
    pane.expect(r"~x")
    assert "~~" not in pane.text().split("this help")[-1].partition("\n")[2].replace("~~  send", "")
    pane.keys("C-c")
    pane.type("\r~.")
    pane.expect("^status 0")
    pane.close()
    again = stage.attach(name)
    again.expect("~x")
    again.close()


def test_displaced(stage: Stage) -> None:
    name = stage.name()
    one = stage.attach(name)
    one.expect(PROMPT)
    two = stage.attach(name, "-d", second=True)
    two.expect(PROMPT)
    one.expect("^status 1")
    two.line("echo still''here")
    two.expect("^stillhere")
    assert stage.attached(name) == 1
    one.close()
    two.close()


def test_watching(stage: Stage) -> None:
    name = stage.name()
    one = stage.attach(name)
    one.expect(PROMPT)
    two = stage.attach(name, "--watch", second=True)
    two.expect(PROMPT)
    two.line("echo not''typed")
    one.line("echo ty''ped")
    two.expect("^typed")
    assert "not''typed" not in one.text()
    assert_same(one, two)
    one.close()
    two.close()


# ---- leaving -----------------------------------------------------------------------------------------------------

LEFT_ON = (
    r"\e[?1049h\e[2J\e[?1h\e=\e[?1000;1003;1006h\e[?2004h\e[?1004h\e[?25l\e[4h\e[5;10r\e[?6h\e(0\e[?7l\e[41;1m"
    r"\e]2;left\a"
)


def stty(pane: Pane) -> str:
    """The terminal's settings."""
    words = ["stty", "-a", "-F", pane.about("pane_tty")]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout


@pytest.mark.parametrize("how", ["detach", "drop", "kill", "exit", "hangup of the node"])
def test_the_terminal_is_as_before(stage: Stage, how: str) -> None:
    name = stage.name()
    proxy = stage.rig.proxy()
    shell = stage.tmux.pane(["bash", "--norc", "--noprofile"])
    shell.line("clear; echo be''gin")
    shell.expect(r"\Abegin\n\$ *$")
    before = shell.view()
    settings = stty(shell)
    shell.line(" ".join(attach_words(stage.rig, name, proxy.port)) + "; clear; echo be''gin")
    shell.expect(PROMPT)
    shell.line(f"printf '{LEFT_ON}'")
    wait_for(lambda: shell.about("pane_title") == "left", name="the modes")
    assert stty(shell) != settings
    if how == "detach":
        shell.type("\r~d")
    elif how == "exit":
        shell.line("exit 3")
    elif how == "kill":
        os.kill(child_of(shell.pid, lambda line: " attach " in line), signal.SIGTERM)
    else:
        if how == "hangup of the node":
            proxy.refuse()
            proxy.cut()
        shell.type("\r~.")
    assert_shows(shell, before)
    assert stty(shell) == settings
    shell.close()


def test_control_a_terminal_left_as_it_is_is_noticed(stage: Stage) -> None:
    shell = stage.tmux.pane(["bash", "--norc", "--noprofile"])
    shell.expect(PROMPT)
    before = shell.view()
    shell.line(f"printf '{LEFT_ON}'")
    wait_for(lambda: shell.about("pane_title") == "left", name="the modes")
    names = {line.partition(":")[0] for line in shell.view().differences(before)}
    assert names >= {"pane_title", "alternate_on", "keypad_flag", "mouse_all_flag", "insert_flag", "origin_flag"}
    shell.close()


@pytest.mark.parametrize(
    ("command", "status"), [("exit 7", 7), ("exit", 0), ("kill -9 $$", 137), ("kill -TERM $$; exit 4", 4)]
)
def test_the_exit_status_is_passed_on(stage: Stage, command: str, status: int) -> None:
    pane = stage.attach(stage.name())
    pane.expect(PROMPT)
    pane.line(command)
    pane.expect(f"^status {status}$")
    pane.close()


def test_a_paste_beyond_the_window_arrives_whole_once_the_program_reads(stage: Stage) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    data = random.Random(seed).randbytes(3 * WINDOW_BYTES).replace(b"~", b"-")
    go = stage.rig.directory / f"go-{stage.name()}"
    client = stage.rig.terminal(*attach_words(stage.rig, stage.name(), None)[3:])
    client.expect("$ ")
    wait = f"until [ -e {go} ]; do sleep 0.02; done"
    client.type(f"stty raw -echo; echo rea''dy; {wait}; head -c {len(data)} | sha256sum\n")
    client.expect("ready\n")
    os.set_blocking(client.master, False)
    pasted = 0
    while pasted < len(data):
        if select.select([], [client.master], [], STALL_SECONDS)[1]:
            pasted += os.write(client.master, data[pasted : pasted + 4096])
        elif pasted >= WINDOW_BYTES:
            go.touch()
    assert go.exists(), "the program did not read and nothing held the paste back"
    client.expect(hashlib.sha256(data).hexdigest())


# ---- the terminal's own events -----------------------------------------------------------------------------------


def test_the_bell_notifies(stage: Stage) -> None:
    for options, notified in ((["--notify"], True), ([], False)):
        words = attach_words(stage.rig, stage.name(), None, *options)[3:]
        client = stage.rig.terminal(*words)
        client.expect("$ ")
        client.type("printf '\\e]2;no bell\\a'; echo ti''tle\n")
        client.expect("title\r\n")
        client.expect("$ ")
        assert b"rang" not in client.seen
        client.type("printf 'b\\a'; echo e''nd\n")
        client.expect("end\r\n")
        client.expect("$ ")
        client.type("exit 5\n")
        assert client.wait() == 5
        assert (b"\x1b]9;" in client.seen and b"The bell rang." in client.seen) is notified
        assert (b"exit status 5" in client.seen) is notified


def test_stopped_resized_and_continued(stage: Stage) -> None:
    name = stage.name()
    shell = stage.tmux.pane(["bash", "--norc", "--noprofile"])
    shell.line("clear; " + " ".join(attach_words(stage.rig, name)))
    shell.expect(PROMPT)
    other = stage.attach(name, second=True)
    other.expect(PROMPT)
    shell.line("echo $LINES $COLUMNS")
    shell.expect("^24 80")
    client = child_of(shell.pid, lambda line: " attach " in line)
    os.kill(client, signal.SIGSTOP)
    shell.expect("Stopped")
    shell.line("stty -a | grep -o -- ' icanon'")
    shell.expect("^ icanon")
    shell.resize(90, 30)
    shell.resized()
    other.line("echo mean''while")
    other.expect("^meanwhile")
    shell.line("fg")
    shell.expect("^meanwhile")
    shell.line("echo $LINES $COLUMNS")
    shell.expect("^30 90")
    shell.line("echo ag''ain")
    shell.expect("^again")
    shell.close()
    other.close()


# ---- trouble -----------------------------------------------------------------------------------------------------

SCREENS = {
    "a prompt": "clear; echo some output",
    "colours everywhere": r"clear; for i in $(seq 22); do printf '\e[4%dm%80s\e[m' $((i % 8)) x; done",
    "a full screen": f"{sys.executable} {HERE}/full_screen.py",
}


@pytest.mark.parametrize("screen", list(SCREENS))
def test_the_status_line_comes_and_goes_without_a_trace(stage: Stage, screen: str) -> None:
    name = stage.name()
    proxy = stage.rig.proxy()
    pane = stage.attach(name, port=proxy.port)
    pane.expect(PROMPT)
    pane.line(SCREENS[screen])
    pane.expect({"a prompt": "^some output", "colours everywhere": "x\n", "a full screen": "keys 0"}[screen])
    other = stage.attach(name, second=True)
    assert_same(pane, other)
    before = pane.view()
    proxy.freeze(existing_only=True)
    proxy.refuse()
    proxy.cut()
    pane.expect(r"sterna: reconnecting to 127\.0\.0\.1:\d+ … [12] s  \(~\. to give up\)")
    assert pane.view().differences(before)
    proxy.accept()
    assert_shows(pane, before)
    # Nor is anything hidden in what follows.
    other.keys("Enter")
    wait_for(lambda: other.view().differences(before), name="later output")
    assert_same(pane, other)
    pane.close()
    other.close()


def test_control_a_status_line_that_stays_is_noticed(stage: Stage) -> None:
    proxy = stage.rig.proxy()
    pane = stage.attach(stage.name(), port=proxy.port, broken="status")
    pane.expect(PROMPT)
    plain = stage.tmux.pane(["bash", "--norc", "--noprofile"])
    assert_same(pane, plain)
    proxy.refuse()
    proxy.cut()
    pane.expect("sterna: reconnecting")
    proxy.accept()
    for one in (pane, plain):
        one.line("echo ba''ck")
        one.expect("^back")
    assert_never_same(pane, plain, 0.3)
    pane.close()
    plain.close()


def test_a_short_cut_shows_nothing(stage: Stage) -> None:
    record = stage.rig.directory / "short"
    proxy = stage.rig.proxy()
    pane = stage.attach(stage.name(), port=proxy.port)
    pane.expect(PROMPT)
    pane.record(record)
    for number in range(5):
        proxy.cut()
        pane.line(f"echo still $(({number}+100))")
        pane.expect(f"^still {number + 100}")
    assert proxy.cuts == 5
    assert b"reconnecting" not in Path(record).read_bytes()
    pane.close()
