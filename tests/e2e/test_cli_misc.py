"""node, doctor, record, play, completion and service as a user meets them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sterna.cli.service import kills, logout_hint, unit_text
from sterna.client.cast import EVENT_MAX_CHARS, LINE_MAX_BYTES, CastReader, CastWriter
from sterna.errors import UsageError
from tests.e2e.proxy import CutProxy
from tests.e2e.rig import Daemon, PtyClient, Rig, free_port, running, wait_for

QUIET_SECONDS, QUIET_BYTES = 1.5, 200
DEPLOY = Path(__file__).parents[2] / "deploy" / "systemd"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as found:
        yield found


def session(rig: Rig, name: str, *, cols: int = 80, rows: int = 24) -> PtyClient:
    """A terminal on a new session of this name, at its prompt."""
    client = rig.terminal("attach", "--name", name, cols=cols, rows=rows)
    client.type("echo x$((40+2))y\n")
    client.expect("x42y")
    return client


# ---- node -------------------------------------------------------------------------------------------------------


def test_the_node_runs_by_itself_takes_the_seeds_flags_and_says_what_is_wrong() -> None:
    with Rig() as rig:
        rig.start_pod()
        token = rig.directory / "token"
        token.write_text("keepers-secret\n")
        token.chmod(0o600)
        state = os.fspath(rig.state / "node")
        flags = ["-p", str(rig.port), "-s", os.fspath(rig.sockets), "-l", "https://keeper.example", "--state", state]
        rig.node = Daemon(rig.words("node", *flags, "-t", f"@{token}"), rig.env, rig.directory / "node.log")
        wait_for((rig.state / "node" / "node.sock").exists, name="the node")
        session(rig, "alone")
        node = Path(f"/proc/{rig.node.pid}")
        assert b"keepers-secret" not in (node / "cmdline").read_bytes() + (node / "environ").read_bytes()
        second = rig.sterna("node", "-p", str(rig.port), "--state", os.fspath(rig.directory / "other"))
        assert second.returncode == 2
        assert f"Port {rig.port} on 127.0.0.1 is in use" in second.stderr
        assert rig.stop_node() == 0
        assert '"node drains"' in rig.node.output()
        typed = rig.sterna("node", "--check", "-t", "-", typed="a-secret\n")
        assert (typed.returncode, typed.stdout, typed.stderr) == (0, "The configuration is good.\n", "")
        plain = rig.sterna("node", "--check", "-t", "a-secret")
        assert plain.returncode == 0
        assert "-t @FILE" in plain.stderr
        wrong = rig.sterna("node", "--check", env={"STERNA_NODE_RING_BYTES": "1"})
        assert wrong.returncode == 2
        assert wrong.stderr.startswith(
            "sterna: STERNA_NODE_RING_BYTES: ring_bytes cannot be '1': expected a whole number"
        )
        help_text = " ".join(rig.sterna("node", "--help").stdout.split())
        assert "without one the node works on its own" in help_text


# ---- doctor -----------------------------------------------------------------------------------------------------


def checks(rig: Rig, *options: str, **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = rig.sterna("doctor", "--json", *options, env=env)
    assert done.stderr == ""
    return done.returncode, {each["name"]: each for each in json.loads(done.stdout)["checks"]}


def test_a_healthy_machine_has_no_failures(rig: Rig) -> None:
    status, found = checks(rig)
    assert status == 0, [each for each in found.values() if each["level"] == "FAIL"]
    assert f"port {rig.port}" in found["node"]["text"]
    assert found["agent"]["text"] == "main answers"
    assert found["certificate"]["level"] == "OK"
    assert {"python", "tls", "libraries", "state", "journal", "disk", "clock", "locale", "files"} <= found.keys()
    text = rig.sterna("doctor").stdout
    assert "\x1b" not in text
    assert text.startswith("OK    python")


def test_what_is_wrong_is_a_failure_with_what_to_do(rig: Rig, tmp_path: Path) -> None:
    state = tmp_path / "open"
    state.mkdir()
    state.chmod(0o770)
    status, found = checks(rig, "--state", str(state))
    assert status == 1
    assert found["state"]["level"] == "FAIL"
    assert found["state"]["do"] == f"chmod go-w {state}"
    assert found["node"]["level"] == "WARN"
    assert found["node"]["do"] == "sterna up"
    config = tmp_path / "node.toml"
    config.write_text("port = -1\n")
    status, found = checks(rig, "--config", str(config))
    assert status == 1
    assert "expected a whole number from 0 to 65535" in found["config"]["text"]
    assert checks(rig, LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")[1]["locale"]["level"] == "WARN"
    assert checks(rig, STERNA_SESSION="other")[1]["nested"]["level"] == "WARN"
    limited = subprocess.run(
        ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *rig.words("doctor", "--json")],
        env=rig.env, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    files = next(each for each in json.loads(limited.stdout)["checks"] if each["name"] == "files")
    assert files["level"] == "WARN"


def test_a_dead_agent_is_found() -> None:
    with running() as rig:
        os.kill(rig.pods["main"].pid, signal.SIGSTOP)
        rig.restart_node(kill=True)
        try:
            status, found = checks(rig)
        finally:
            os.kill(rig.pods["main"].pid, signal.SIGCONT)
        assert status == 1
        assert found["agent"]["text"] == "main does not answer"


# ---- record and play --------------------------------------------------------------------------------------------


def lines(path: Path) -> list[Any]:
    # Not splitlines: a recording may hold other characters that end lines elsewhere.
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def falls_silent(proxy: CutProxy) -> None:
    """Waits until a client has asked nothing for some time: a PONG may come, but no answer."""
    told, since = proxy.bytes_down, time.monotonic()
    deadline = since + 20
    while time.monotonic() < since + QUIET_SECONDS:
        assert time.monotonic() < deadline, "it does not stop asking"
        if proxy.bytes_down >= told + QUIET_BYTES:
            told, since = proxy.bytes_down, time.monotonic()
        time.sleep(0.05)


def sizes(path: Path) -> list[str]:
    """All new sizes in a recording."""
    return [event[2] for event in lines(path)[1:] if event[1] == "r"]


def recorded(path: Path) -> str:
    """All output in a recording."""
    return "".join(event[2] for event in lines(path)[1:] if event[1] == "o")


def test_a_session_is_recorded_with_sizes_and_exit_and_plays_the_same(rig: Rig) -> None:
    client = session(rig, "film", cols=90, rows=20)
    path = rig.directory / "film.cast"
    recorder = rig.terminal("record", "film", str(path))
    recorder.expect("Ctrl-C ends it")
    client.type("printf 'a\\303\\244\\346\\227\\245b\\n'; sleep 0.6; echo d$((1+1))e\n")
    client.expect("d2e")
    fcntl.ioctl(client.master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    client.process.send_signal(signal.SIGWINCH)
    wait_for(lambda: bool(sizes(path)), name="the new size")
    client.type("exit 3\n")
    assert recorder.wait() == 0
    assert client.wait() == 3
    header, *events = lines(path)
    assert header["version"] == 3
    assert header["term"] == {"cols": 90, "rows": 20, "type": "xterm-256color"}
    assert abs(header["timestamp"] - time.time()) < 300
    assert sizes(path) == ["100x30"]
    assert events[-1][1:] == ["x", "3"]
    assert all(event[0] >= 0 for event in events)
    assert 0.5 < sum(event[0] for event in events) < 60
    assert "x42y" in recorded(path), "it begins with the screen as it is"
    assert "aä日b\r\nd2e" in recorded(path)
    assert path.stat().st_mode & 0o777 == 0o600

    player = rig.terminal("play", str(path), "--speed", "20", "--idle-limit", "0.5", cols=90, rows=20)
    assert player.wait() == 0
    assert "aä日b\r\nd2e" in bytes(player.seen).decode()
    smaller = rig.terminal("play", str(path), "--speed", "100", cols=60, rows=10)
    assert smaller.wait() == 0
    assert b"sterna: The recording is 90 x 20 cells large, this terminal 60 x 10.\r\n" in smaller.seen
    assert smaller.seen.index(b"The recording") < smaller.seen.index("aä日b".encode())
    again = rig.sterna("record", "film", str(path))
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_sizes_are_recorded_also_of_a_silent_program_and_nobody_asks_for_them_in_vain(rig: Rig) -> None:
    client = session(rig, "silent", cols=90, rows=20)
    client.type("echo ready; exec sleep 1000\n")
    client.expect("ready\r\n")
    path = rig.directory / "silent.cast"
    proxy = rig.proxy()
    recorder = rig.terminal("record", "silent", str(path), "--host", "127.0.0.1", "--port", str(proxy.port))
    recorder.expect("Ctrl-C ends it")
    wanted = []
    for cols, rows in ((100, 30), (90, 20), (60, 10)):
        falls_silent(proxy)
        fcntl.ioctl(client.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        client.process.send_signal(signal.SIGWINCH)
        wanted.append(f"{cols}x{rows}")
        wait_for(lambda: sizes(path) == wanted, name="the new size")
    falls_silent(proxy)
    recorder.process.send_signal(signal.SIGINT)
    assert recorder.wait() == 0


def test_a_recording_survives_a_cut_and_a_restart_of_the_node_without_a_gap() -> None:
    with running() as rig:
        proxy = rig.proxy()
        client = session(rig, "cut")
        path = rig.directory / "cut.cast"
        recorder = rig.terminal("record", "cut", str(path), "--host", "127.0.0.1", "--port", str(proxy.port))
        recorder.expect("Ctrl-C ends it")
        client.type("for i in $(seq 400); do echo line-$i-; sleep 0.005; done; echo do''ne\n")
        wait_for(lambda: "line-20-" in recorded(path), name="output")
        proxy.cut()
        wait_for(lambda: "line-150-" in recorded(path), name="output after the cut")
        rig.restart_node(kill=True)
        wait_for(lambda: "\r\ndone\r\n" in recorded(path), name="the end")
        recorder.process.send_signal(signal.SIGINT)
        assert recorder.wait() == 0
        text = recorded(path)
        begin = text.rindex("line-1-\r\n")
        assert text[begin:].split("\r\ndone")[0].split() == [f"line-{number}-" for number in range(1, 401)]
        assert not [event for event in lines(path)[1:] if event[1] in ("m", "x")]


def test_what_a_recorder_missed_is_marked(rig: Rig) -> None:
    client = session(rig, "gap")
    proxy = rig.proxy()
    path = rig.directory / "gap.cast"
    recorder = rig.terminal("record", "gap", str(path), "--host", "127.0.0.1", "--port", str(proxy.port))
    recorder.expect("Ctrl-C ends it")
    wait_for(lambda: "x42y" in recorded(path), name="the first screen")
    os.kill(recorder.process.pid, signal.SIGSTOP)
    client.type("seq 500000 | sed 's/$/-----/'; echo do''ne\n")
    client.expect("\r\ndone\r\n", 50)
    os.kill(recorder.process.pid, signal.SIGCONT)
    wait_for(lambda: any(event[1] == "m" for event in lines(path)[1:]), name="the marker")
    wait_for(lambda: "500000-----" in recorded(path), name="the screen after the gap")
    markers = [event[2] for event in lines(path)[1:] if event[1] == "m"]
    assert all(label.endswith(" bytes of output are missing here") for label in markers)
    recorder.process.send_signal(signal.SIGTERM)
    assert recorder.wait() == 0


def test_space_pauses_and_q_quits(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "a.cast"
    events = '[0.1,"o","one"]\n[0.8,"o","two"]\n# a comment\n[0.1,"i","unseen"]\n[900,"o","never"]\n'
    path.write_text('{"version":3,"term":{"cols":80,"rows":24}}\n' + events)
    player = rig.terminal("play", str(path))
    player.expect("one")
    player.type(" ")
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        player.read(0.1)
    assert b"two" not in player.seen
    player.type(" ")
    player.expect("two")
    player.type("q")
    assert player.wait() == 0
    assert b"unseen" not in player.seen
    assert b"never" not in player.seen


def test_questions_and_the_clipboard_are_filtered_out_of_a_recording(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "a.cast"
    data = json.dumps("\x1b[c\x1b]52;c;aGk=\x07plain\x1b[31mred")
    path.write_text('{"version":3,"term":{"cols":80,"rows":24}}\n' + f'[0,"o",{data}]\n')
    player = rig.terminal("play", str(path))
    assert player.wait() == 0
    assert b"plain\x1b[31mred" in player.seen
    assert b"\x1b[c" not in player.seen
    assert b"]52" not in player.seen


HEADER = '{"version":3,"term":{"cols":80,"rows":24}}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1 is no header"),
        ("nonsense", "line 1 is no JSON"),
        ("[]", "line 1 is no header"),
        ('{"version":2,"width":80,"height":24}', "line 1 has the version 2, and only 3 is played"),
        ('{"version":3}', "line 1 has no size of a terminal"),
        ('{"version":3,"term":{"cols":true,"rows":24}}', "line 1 has no size of a terminal"),
        ('{"version":3,"term":{"cols":80,"rows":24},"idle_time_limit":-1}', "impossible idle_time_limit"),
        (HEADER + "{}", "line 2 is no event"),
        (HEADER + '[1,"o"]', "line 2 is no event"),
        (HEADER + '[-1,"o",""]', "line 2 has an impossible interval"),
        (HEADER + '[1e99,"o",""]', "line 2 has an impossible interval"),
        (HEADER + '["1","o",""]', "line 2 has an impossible interval"),
        (HEADER + '[1,"o",1]', "line 2 is no event: expected texts"),
        (HEADER + '# x\n[1,"r","0x1"]', "line 3 has an impossible size"),
        (HEADER + "[" * 100_000, "line 2 is no JSON"),
        (HEADER + '[1,"o","\ud800"]', "line 2 is no JSON"),
        (HEADER + '[1,"o","' + "x" * LINE_MAX_BYTES + '"]', f"line 2 is longer than {LINE_MAX_BYTES} bytes"),
        ("{" + " " * 70_000 + "}", "line 1 is longer than 65536 bytes"),
    ],
    ids=range(18),
)
def test_a_malformed_recording_is_refused_with_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.cast"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with path.open("rb") as file, pytest.raises(UsageError) as caught:
        list(CastReader(file, "a.cast").events())
    assert str(caught.value).startswith("a.cast is no asciicast v3 recording: ")
    assert said in str(caught.value)


def test_what_is_written_is_read_back_and_lines_stay_short(tmp_path: Path) -> None:
    path = tmp_path / "a.cast"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    writer = CastWriter(fd, str(path), 80, 24, now=0, wall_s=1, title="t", term="")
    text = "\x00ä日\U0001f600" * EVENT_MAX_CHARS
    data = text.encode() + b"\xff\xe6"
    for start in range(0, len(data), 7_777):
        writer.output(data[start : start + 7_777], start * 333_333)
    writer.resize(80, 24, 10**12)
    writer.marker("m", 10**12)
    writer.exit(0, 10**12)
    os.close(fd)
    with path.open("rb") as file:
        events = list(CastReader(file, "a").events())
    assert "".join(data for _, code, data in events if code == "o") == text + "\ufffd\ufffd"
    assert [code for _, code, _ in events if code != "o"] == ["m", "x"]
    assert abs(sum(interval for interval, _, _ in events) - 1000) < 0.001, "rounding does not add up"
    assert max(map(len, path.read_bytes().splitlines())) < LINE_MAX_BYTES


# ---- completion -------------------------------------------------------------------------------------------------


def completions(rig: Rig, *words: str, **env: str) -> list[str]:
    variables = {"_STERNA_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = rig.sterna(env={**variables, **env})
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_commands_options_sessions_and_agents_are_completed(rig: Rig) -> None:
    session(rig, "wobble")
    assert completions(rig, "sterna", "rec") == ["record"]
    assert "invite" not in completions(rig, "sterna", "in")
    assert completions(rig, "sterna", "attach", "wo") == ["wobble"]
    assert completions(rig, "sterna", "attach", "ma") == ["main"]
    assert completions(rig, "sterna", "record", "wo") == ["wobble"]
    assert completions(rig, "sterna", "record", "ma") == [], "an agent is no session"
    assert "--watch" in completions(rig, "sterna", "attach", "--w")
    assert rig.sterna("share", "wobble", "--local").returncode == 0
    (link,) = (each for each in rig.json("share", "--list")["shares"] if each["name"] == "wobble")
    assert completions(rig, "sterna", "share", "--end", link["id"][:9]) == [link["id"]]
    assert rig.sterna("share", "--end", link["id"]).returncode == 0
    assert completions(rig, "sterna", "share", "--end", link["id"][:9]) == []


def test_completion_is_quick_and_silent_when_nothing_answers(rig: Rig, tmp_path: Path) -> None:
    assert completions(rig, "sterna", "attach", "wo", STERNA_STATE=str(tmp_path)) == []
    assert completions(rig, "sterna", "share", "--end", "", STERNA_STATE=str(tmp_path)) == []
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        completions(rig, "sterna", "attach", "wo")
        best = min(best, time.perf_counter() - start)
    assert best < 0.3, "the aim is 150 ms on an idle machine"
    assert rig.node is not None
    os.kill(rig.node.pid, signal.SIGSTOP)
    try:
        start = time.perf_counter()
        assert completions(rig, "sterna", "attach", "wo") == []
        assert time.perf_counter() - start < 2
    finally:
        os.kill(rig.node.pid, signal.SIGCONT)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_one_it_can_read(rig: Rig, shell: str) -> None:
    done = rig.sterna("completion", shell)
    assert done.returncode == 0
    assert "_STERNA_COMPLETE" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True, timeout=30)


# ---- service ----------------------------------------------------------------------------------------------------


def test_the_service_is_written_shown_and_removed(rig: Rig) -> None:
    assert rig.sterna("service", "status").returncode == 1
    port = str(free_port())
    done = rig.sterna("service", "install", "--port", port, "--", "bash", "-c", 'echo "100% $HOME"')
    assert done.returncode == 0, done.stderr
    path = rig.directory / "c" / "systemd" / "user" / "sterna.service"
    text = path.read_text()
    assert f'--port {port} --state {rig.state} -- bash -c "echo \\"100%% $$HOME\\""\n' in text
    assert "\nKillMode=process\n" in text
    assert "loginctl enable-linger" in done.stdout
    assert str(path) in rig.sterna("service", "status").stdout
    printed = rig.sterna("service", "install", "--port", port, "--print", "--", "bash", "-c", 'echo "100% $HOME"')
    assert printed.stdout == text
    verified(path)
    assert rig.sterna("service", "uninstall").returncode == 0
    assert not path.exists()
    assert rig.sterna("service", "uninstall").returncode == 2


def verified(path: Path) -> None:
    """Has systemd read a unit, where it is installed."""
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(path)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["sterna.service", "sterna-node.service", "sterna-pod@.service"])
def test_the_units_of_the_project_are_good(tmp_path: Path, name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert ("KillMode=process" in text) == (name == "sterna.service")
    for place in ("/usr/local/bin/sterna", "%h/.local/bin/sterna"):
        text = text.replace(place, sys.executable)
    (tmp_path / name).write_text(text)
    verified(tmp_path / name)


def test_a_unit_takes_no_control_characters() -> None:
    with pytest.raises(UsageError):
        unit_text(["sterna", "a\nExecStartPre=/bin/x"], {})


def test_the_hint_about_logout_comes_only_where_logind_would_end_everything(tmp_path: Path) -> None:
    systemd, linger, etc, lib = (tmp_path / name for name in ("systemd", "linger", "etc", "lib"))
    for each in (systemd, linger, etc, lib):
        each.mkdir()

    def hint(environ: dict[str, str]) -> str | None:
        return logout_hint(environ, systemd=str(systemd), linger=str(linger), logind=[str(lib), str(etc)])

    over_ssh = {"SSH_CONNECTION": "192.0.2.1 1 192.0.2.2 22"}
    assert hint(over_ssh) is None
    (etc / "logind.conf").write_text("[Login]\n#KillUserProcesses=yes\n")
    assert not kills([str(lib), str(etc)])
    (lib / "logind.conf.d").mkdir()
    (lib / "logind.conf.d" / "50-x.conf").write_text("[Login]\nKillUserProcesses=yes\n")
    assert kills([str(lib), str(etc)])
    assert "loginctl enable-linger" in (hint(over_ssh) or "")
    assert hint({}) is None
    (etc / "logind.conf.d").mkdir()
    (etc / "logind.conf.d" / "60-y.conf").write_text("[Login]\nKillUserProcesses=no\n")
    assert not kills([str(lib), str(etc)])
