"""The commands about sessions, as a user or a script runs them, against a real node with real programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.cli.duration import DURATION, in_words
from sterna.trust.links import parse_link
from tests.e2e.rig import Rig, wait_for

pytestmark = pytest.mark.xdist_group("cli_sessions")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        rig.start_pod("main")
        rig.start_pod("cat", "cat", kind="stream")
        rig.start_node()
        wait_for(lambda: len(rig.json("ls")["agents"]) == 2, name="both agents")
        yield rig


@pytest.fixture(autouse=True)
def _no_sessions_are_left(rig: Rig) -> Iterator[None]:
    yield
    for session in rig.json("ls")["sessions"]:
        rig.sterna("close", session["name"])


def ok(rig: Rig, *args: str, typed: str = "") -> str:
    """What a command prints that must succeed without a word on standard error."""
    done = rig.sterna(*args, typed=typed)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refused(rig: Rig, status: int, *args: str) -> str:
    """The one sentence of a command that must fail with a status."""
    done = rig.sterna(*args)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.startswith("sterna: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def shell(rig: Rig, name: str) -> None:
    """Begins a session with a shell that has shown its prompt; what is typed before that is echoed twice."""
    ok(rig, "new", "--name", name)
    ok(rig, "wait", name, "--match", r"^\$", "--timeout", "20s")


# ---- ls, info, new, close, rename ------------------------------------------------------------------------------


def test_new_prints_a_name_that_ls_and_info_know(rig: Rig) -> None:
    assert ok(rig, "new") == "main\n"
    assert ok(rig, "new") == "main-2\n"
    about = json.loads(ok(rig, "new", "--agent", "cat", "--name", "work", "--json"))
    assert (about["name"], about["agent"], about["kind"], len(about["uid"])) == ("work", "cat", "stream", 32)
    listed = rig.json("ls")
    assert {(s["name"], s["agent"], s["kind"], s["state"], s["attached"]) for s in listed["sessions"]} == {
        ("main", "main", "pty", "suspended", 0),
        ("main-2", "main", "pty", "suspended", 0),
        ("work", "cat", "stream", "suspended", 0),
    }
    assert listed["agents"] == [
        {"name": "cat", "kind": "stream", "ready": True},
        {"name": "main", "kind": "pty", "ready": True},
    ]
    assert [s["name"] for s in json.loads(ok(rig, "ls", "--agent", "cat", "--json"))["sessions"]] == ["work"]
    info = rig.json("info", "work")
    assert (info["uid"], info["output"], info["attachments"]) == (about["uid"], 0, [])
    assert rig.json("info", about["uid"])["name"] == "work"
    assert rig.json("info", "cat")["name"] == "work", "an agent's name means its latest session"


def test_a_pipe_gets_plain_lines(rig: Rig) -> None:
    ok(rig, "new", "--name", "one")
    line = ok(rig, "ls")
    assert re.fullmatch(r"one\tmain\tpty\tsuspended\t0\t\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\t\n", line)
    assert "name: one\n" in ok(rig, "info", "one")
    nobody = rig.sterna("ls", "--agent", "nobody")
    assert (nobody.returncode, nobody.stdout) == (0, "")
    assert nobody.stderr == "sterna: There is no agent 'nobody': `sterna ls` shows what there is.\n"


def test_a_terminal_gets_a_table(rig: Rig) -> None:
    ok(rig, "new", "--name", "one")
    terminal = rig.terminal("ls")
    assert terminal.wait() == 0
    seen = terminal.seen.decode()
    assert "STATE" in seen
    assert "Agents: cat, main" in seen
    plain = rig.terminal("ls", env={"NO_COLOR": "1", "TERM": "dumb"})
    assert plain.wait() == 0
    assert b"\x1b" not in plain.seen


def test_new_runs_a_command_where_it_is_told(rig: Rig, tmp_path: Path) -> None:
    name = ok(rig, "new", "--cwd", os.fspath(tmp_path), "--", "sh", "-c", "pwd > here; exit 4").strip()
    assert ok(rig, "wait", name) == "4\n"
    assert (tmp_path / "here").read_text().strip() == os.fspath(tmp_path)
    assert rig.json("info", name)["status"] == 4
    # A session is called after its program, so that a list says which is which.
    called = [name] + [ok(rig, "new", "--", *words).strip() for words in (["/bin/sh", "-c", ":"], ["true"], ["sh"])]
    assert called == ["sh", "sh-2", "true", "sh-3"]
    assert ok(rig, "new", "--", "cat").strip() == "cat-2", "an agent's name is its own"
    assert rig.sterna("new", "--", f"{tmp_path}/__").returncode == 1, "control: no such program"


def test_names_are_checked_and_unique(rig: Rig) -> None:
    ok(rig, "new", "--name", "one")
    assert "There is a session 'one' already" in refused(rig, 1, "new", "--name", "one")
    for words in (("new", "--name", "a b"), ("attach", "--name", "a b"), ("rename", "one", "a b")):
        assert "'a b' is no session name" in refused(rig, 2, *words)
    assert ok(rig, "rename", "one", "two") == "one is now two.\n"
    assert "There is no session 'one'" in refused(rig, 1, "rename", "one", "three")
    ok(rig, "new", "--name", "one")
    assert "already" in refused(rig, 1, "rename", "one", "two")
    assert ok(rig, "close", "two") == "Closed two.\n"
    assert "There is no session 'two'" in refused(rig, 1, "close", "two")
    assert "There is no session or agent 'two'" in refused(rig, 1, "info", "two")


def test_close_ends_the_program(rig: Rig) -> None:
    ok(rig, "new", "--name", "long", "--", "sh", "-c", "echo $$ > pid; exec sleep 1000")
    path = rig.directory / "pid"
    pid = int(wait_for(lambda: path.exists() and path.read_text().strip(), name="the program") or 0)
    assert Path(f"/proc/{pid}").exists()
    ok(rig, "close", "long")
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), name="its end")


def test_which_agent_is_meant(rig: Rig) -> None:
    assert "There is no agent 'nobody' here" in refused(rig, 1, "new", "--agent", "nobody")
    done = rig.sterna("ls", "--host", "127.0.0.1", "--port", "1")
    refusal = "cannot be reached: Connection refused; is `sterna up` running there, and is the port right?\n"
    assert (done.returncode, done.stderr) == (1, f"sterna: The node at 127.0.0.1:1 {refusal}")
    empty = rig.directory / "empty"
    assert "start one with `sterna up`" in refused(rig, 2, "ls", "--state", os.fspath(empty))


# ---- send, capture, wait ---------------------------------------------------------------------------------------


def test_send_wait_capture(rig: Rig) -> None:
    shell(rig, "sh")
    ok(rig, "send", "sh", "echo $((40 + 2))-answer", "--enter")
    ok(rig, "wait", "sh", "--match", "^42-answer$", "--timeout", "10s")
    assert ok(rig, "capture", "sh").splitlines()[:2] == ["$ echo $((40 + 2))-answer", "42-answer"]
    ok(rig, "send", "sh", r"printf '\033[1;31mred\033[m\n'", "--enter")
    ok(rig, "wait", "sh", "--match", "^red$", "--timeout", "10s")
    assert "\x1b[0;1;31mred\x1b[0m\n" in ok(rig, "capture", "sh", "--ansi")


def test_send_without_enter_only_types(rig: Rig) -> None:
    shell(rig, "sh")
    ok(rig, "send", "sh", "exit 3")
    assert "did not happen within 0.3 s" in refused(rig, 1, "wait", "sh", "--exit", "--timeout", "0.3")
    ok(rig, "send", "sh", "", "--enter")
    assert ok(rig, "wait", "sh", "--exit", "--timeout", "10s") == "3\n"
    assert "has ended" in refused(rig, 1, "send", "sh", "too late")
    assert "exit 3" in ok(rig, "capture", "sh"), "the last screen is kept until it is read"


def test_send_reads_standard_input_of_any_size(rig: Rig) -> None:
    ok(rig, "new", "--agent", "cat", "--name", "pipe")
    text = "".join(f"line {n}\n" for n in range(60_000))
    ok(rig, "send", "pipe", "-", typed=text)
    wait_for(lambda: rig.json("info", "pipe")["output"] == len(text), name="the echo")
    assert ok(rig, "capture", "pipe") == text
    assert ok(rig, "wait", "pipe", "--match", r"line 59999\n", "--timeout", "5s") == ""


def test_capture_with_scrollback(rig: Rig) -> None:
    shell(rig, "sh")
    ok(rig, "send", "sh", "seq 200", "--enter")
    ok(rig, "wait", "sh", "--match", r"^200\n\$", "--timeout", "10s")
    screen = ok(rig, "capture", "sh").splitlines()
    assert screen[-2:] == ["200", "$"]
    assert "100" not in screen
    lines = ok(rig, "capture", "sh", "--scrollback").splitlines()
    assert lines[1:201] == [str(n) for n in range(1, 201)]


def test_wait_for_something_new(rig: Rig) -> None:
    shell(rig, "sh")
    ok(rig, "send", "sh", "echo O''LD", "--enter")
    ok(rig, "wait", "sh", "--match", "OLD", "--timeout", "10s")
    assert "did not happen" in refused(rig, 1, "wait", "sh", "--match", "OLD", "--from-now", "--timeout", "0.3")
    waiting = subprocess.Popen(
        rig.words("wait", "sh", "--match", "N.W", "--from-now", "--timeout", "20s"), env=rig.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: rig.json("info", "sh")["attachments"], name="the watcher")
    ok(rig, "send", "sh", "echo N''EW", "--enter")
    assert (*waiting.communicate(timeout=20), waiting.returncode) == ("", "", 0)


def test_wait_for_quiet_and_for_nothing(rig: Rig) -> None:
    ok(rig, "new", "--name", "noise", "--", "sh", "-c", "while :; do echo x; sleep 0.05; done")
    assert "did not happen within 0.5 s" in refused(rig, 1, "wait", "noise", "--idle", "0.4", "--timeout", "0.5")
    ok(rig, "new", "--name", "quiet")
    start = time.monotonic()
    ok(rig, "wait", "quiet", "--idle", "0.4", "--timeout", "10s")
    assert time.monotonic() - start >= 0.4
    assert "is no regular expression" in refused(rig, 2, "wait", "quiet", "--match", "(")
    assert "one thing at a time" in refused(rig, 2, "wait", "quiet", "--match", "x", "--idle", "1s")
    ok(rig, "new", "--name", "short", "--", "sh", "-c", "sleep 0.3; exit 1")
    assert "ended before anything matched" in refused(rig, 1, "wait", "short", "--match", "never")


def test_wait_goes_on_while_the_node_is_killed(rig: Rig) -> None:
    shell(rig, "sh")
    waiting = subprocess.Popen(
        rig.words("wait", "sh", "--exit"), env=rig.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: rig.json("info", "sh")["attachments"], name="the watcher")
    rig.restart_node(kill=True)
    wait_for(lambda: len(rig.json("ls")["agents"]) == 2, name="both agents")
    ok(rig, "send", "sh", "kill -TERM $$; kill -KILL $$", "--enter")
    assert (*waiting.communicate(timeout=20), waiting.returncode) == (f"{128 + signal.SIGKILL}\n", "", 0)


# ---- attach without a name -------------------------------------------------------------------------------------


def test_attach_lets_the_user_pick(rig: Rig) -> None:
    for name in ("red", "green"):
        shell(rig, name)
        ok(rig, "send", name, f"echo this-is-'{name}'", "--enter")
        ok(rig, "wait", name, "--match", f"this-is-{name}", "--timeout", "10s")
    terminal = rig.terminal("attach")
    terminal.expect("q to leave)? [1] ")
    terminal.type("7\n")
    terminal.expect("There is no such line:")
    terminal.expect("q to leave)? [1] ")
    terminal.type("red\n")
    terminal.expect("this-is-red\r\n")
    terminal.type("\n~d")
    terminal.expect("Detached from red")
    assert terminal.wait() == 0
    terminal = rig.terminal("attach")
    terminal.expect("q to leave)? [1] ")
    terminal.type("q\n")
    assert terminal.wait() == 130


def test_attach_to_the_only_one_asks_nothing(rig: Rig) -> None:
    ok(rig, "new", "--name", "gone", "--", "true")
    wait_for(lambda: rig.json("info", "gone")["state"] == "exited", name="its end")
    ok(rig, "new")
    terminal = rig.terminal("attach")
    terminal.expect("$ ")
    terminal.type("echo in-$((1 + 1))\n")
    terminal.expect("in-2")
    terminal.type("\n~d")
    terminal.expect("Detached from main")
    assert terminal.wait() == 0


# ---- share, devices, revoke, token -----------------------------------------------------------------------------


def test_share_refuses_what_no_other_device_reaches(rig: Rig) -> None:
    ok(rig, "new")
    assert "sterna up --host 0.0.0.0" in refused(rig, 2, "share")
    for host in ("127.0.0.1", "localhost", "0", "::1"):
        assert "Another device cannot reach" in refused(rig, 2, "share", "--host", host)


def test_share_says_how_to_begin_a_session_where_none_is(rig: Rig) -> None:
    begin = "`sterna attach` begins one; `sterna share --all` shares those to come"
    assert begin in refused(rig, 2, "share", "--local")
    assert "'cat' has no session: `sterna attach cat` begins one" in refused(rig, 1, "share", "cat", "--local")
    assert "no session or agent 'nobody'" in refused(rig, 1, "share", "nobody", "--local")
    assert "The agent 'cat' has no session" in refused(rig, 1, "capture", "cat")


def test_share_makes_a_link_that_another_device_opens_once(rig: Rig) -> None:
    shell(rig, "shown")
    ok(rig, "send", "shown", "echo for-'you'", "--enter")
    ok(rig, "wait", "shown", "--match", "for-you", "--timeout", "10s")
    done = rig.sterna("share", "shown", "--host", "node.example", "--watch", "--ttl", "2h", "--json")
    assert done.returncode == 0
    assert "listens on 127.0.0.1 only" in done.stderr
    shared = json.loads(done.stdout)
    assert (shared["name"], shared["mode"], shared["host"], shared["port"]) == (
        "shown", "watch", "node.example", rig.port,
    )  # fmt: skip
    assert abs(shared["expires"] - time.time() - 7200) < 60
    link = parse_link(shared["link"])
    assert (link.host, link.mode, link.agent, link.session) == (
        "node.example", "watch", "main", bytes.fromhex(shared["session"]),
    )  # fmt: skip
    # The name means nothing here, so the other device goes to the address that it would stand for.
    here = shared["link"].replace("node.example", "127.0.0.1")
    for device, status in (("a", 0), ("b", 1)):
        other = {"STERNA_STATE": os.fspath(rig.directory / f"device-{device}")}
        seen = rig.sterna("capture", here, env=other)
        assert seen.returncode == status, seen.stderr
        assert ("for-you" in seen.stdout) is (status == 0)
        assert ("another device used it already, it expired, or it was ended" in seen.stderr) is (status != 0)
    watcher = {"STERNA_STATE": os.fspath(rig.directory / "device-a")}
    typed = rig.sterna("send", here, "x", env=watcher)
    assert typed.returncode != 0, "who may watch may not type"


def test_share_on_a_terminal_draws_a_code(rig: Rig) -> None:
    ok(rig, "new")
    terminal = rig.terminal("share", "--host", "node.example")
    assert terminal.wait() == 0
    seen = terminal.seen.decode()
    assert seen.count("sterna://node.example:") == 1, "it is said once"
    assert seen.count("█") > 200
    assert "On another device, within 10 min" in seen
    assert "type `sterna attach -`, and paste the sterna:// link" in seen
    assert seen.rindex("pasted again.") < seen.index("█"), "what a camera needs is not scrolled off by words"
    narrow = rig.terminal("share", "--host", "node.example", cols=40)
    assert narrow.wait() == 0
    assert "too narrow" in narrow.seen.decode()
    here = rig.terminal("share", "--local")
    assert here.wait() == 0
    assert "On this machine, within 10 min" in here.seen.decode()
    assert "█" not in here.seen.decode(), "no other device reaches what it would say"


def test_devices_tokens_and_their_end(rig: Rig) -> None:
    issued = rig.json("token", "--agents", "ca*", "--modes", "watch", "--ttl", "1h")
    assert (issued["agents"], issued["modes"]) == (["ca*"], ["watch"])
    for modes in ("foo", "drive,foo", ""):
        assert "--modes takes drive, watch, or both" in refused(rig, 2, "token", "--modes", modes)
    assert abs(issued["expires"] - time.time() - 3600) < 60
    done = rig.sterna("token")
    full = done.stdout.strip()
    assert done.stderr.startswith("sterna: its id is ")
    ok(rig, "new", "--name", "one")
    elsewhere = {
        "STERNA_STATE": os.fspath(rig.directory / "elsewhere"),
        "STERNA_TOKEN": full,
    }
    address = ("--host", "127.0.0.1", "--port", str(rig.port))
    assert rig.sterna("ls", *address, env=elsewhere).stdout.startswith("one\t")
    known = rig.json("devices")["devices"]
    assert [device["self"] for device in known].count(True) == 1
    other = next(device for device in known if not device["self"] and not device["revoked"])
    assert ok(rig, "revoke", other["id"][:12]) == f"Revoked the device {other['id'][:16]}.\n"
    assert "No device" in refused(rig, 1, "revoke", "ffffffffffff")
    mine = next(device for device in known if device["self"])
    assert "--this-device" in refused(rig, 1, "revoke", mine["id"][:12])
    assert "no token's id" in refused(rig, 2, "revoke", "--token", "nonsense")
    assert "revoked" in next(line for line in ok(rig, "devices").splitlines() if line.startswith(other["id"][:16]))
    gone = rig.sterna("ls", *address, env=elsewhere)
    assert (gone.returncode, "remove its key" in gone.stderr) == (1, True)
    assert "give its id" in refused(rig, 2, "revoke", "--token", full), "a token in argv can be read by others"
    number = done.stderr.split()[4].rstrip(":")
    assert ok(rig, "revoke", "--token", number) == f"The token {number} is refused from now on.\n"
    third = {**elsewhere, "STERNA_STATE": os.fspath(rig.directory / "third")}
    denied = rig.sterna("ls", *address, env=third)
    assert (denied.returncode, "sterna: Access denied" in denied.stderr) == (1, True)
    assert "Name a device" in refused(rig, 2, "revoke")


# ---- the rest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("7d", 604_800), ("1.5", 1.5)])
def test_durations(text: str, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == seconds


def test_durations_in_words() -> None:
    assert [in_words(n) for n in (0, 0.3, 45, 600, 7200, 86_400 * 7)] == [
        "0 s", "0.3 s", "45 s", "10 min", "2 h", "7 d",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "m", "-1s", "10 m", "1w", "ten", "1e3"])
def test_control_no_durations(rig: Rig, text: str) -> None:
    done = rig.sterna("wait", "x", "--timeout", text)
    assert (done.returncode, "is no length of time" in done.stderr) == (2, True)


def test_help_is_cheap() -> None:
    code = "import sys, time\nfrom sterna.cli.commands import cli\ntry: cli(['--help'])\nexcept SystemExit: pass\n"
    code += "print(time.process_time(), 'asyncio' in sys.modules, 'rich' in sys.modules, file=sys.stderr)"
    times = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, heavy = done.stderr.split(" ", 1)
        times.append(float(seconds))
        assert heavy.split() == ["False", "False"]
    print(f"sterna --help: {min(times) * 1000:.0f} ms CPU")
    assert min(times) < 0.1


def test_the_examples_work(rig: Rig) -> None:
    def run(name: str, *args: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, os.fspath(EXAMPLES / name), *args]
        return subprocess.run(words, env=rig.env, capture_output=True, text=True, timeout=30, check=False)

    done = run("run_command.py", "cat", "sh", "-c", "echo hello; exit 6")
    assert (done.returncode, done.stdout) == (6, "hello\n"), done.stderr
    answer = run("ask_shell.py", "echo $((6 * 7))")
    assert (answer.returncode, "42" in answer.stdout.split()) == (0, True), answer
    shell(rig, "sh")
    watching = subprocess.Popen(
        [sys.executable, os.fspath(EXAMPLES / "watch_for.py"), "sh", "found-it"], env=rig.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: rig.json("info", "sh")["attachments"], name="the watcher")
    ok(rig, "send", "sh", "echo found-'it'", "--enter")
    out, err = watching.communicate(timeout=20)
    assert (watching.returncode, "'found-it' came before position" in out) == (0, True), err
    assert out.startswith("watching the session sh\n")
