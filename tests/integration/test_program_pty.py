"""Programs under a PTY: real bash, vim, cat, sleep and true."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import time
from pathlib import Path

import pytest

from sterna.errors import AgentError, UsageError
from sterna.pod.program import ExitStatus, Kind, Program, program_environment, without_secrets
from tests.integration.program_driver import started

KINDS: tuple[Kind, ...] = ("pty", "stream")
ENV = program_environment(os.environ, term="xterm-256color", extra={"LC_ALL": "C.UTF-8"})


def open_descriptors() -> set[str]:
    """The numbers of this process's open descriptors."""
    return set(os.listdir("/proc/self/fd"))


def children() -> set[str]:
    """The process ids of this process's children, zombies included."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_exit_code_and_output_to_the_end() -> None:
    with started("bash", "-c", "echo one; echo two >&2; exit 3") as driver:
        assert driver.read_to_end() == b"one\r\ntwo\r\n"
        assert driver.wait() == ExitStatus(3, None)
        assert driver.program.poll_exit() == ExitStatus(3, None), "the answer stays"


def test_death_by_signal_is_told_from_a_code() -> None:
    with started("bash", "-c", "kill -9 $$") as driver:
        assert driver.wait() == ExitStatus(None, 9)


def test_output_written_just_before_the_end_is_not_lost() -> None:
    for _ in range(20):
        with started("bash", "-c", "printf 'x%.0s' {1..3000}; echo end") as driver:
            assert driver.wait() == ExitStatus(0, None)
            assert driver.read_to_end() == b"x" * 3000 + b"end\r\n"
            assert driver.ended == "errno 5"


def test_is_leader_of_its_own_session_group_and_terminal() -> None:
    with started("bash", "-c", "tty; ps -o pid=,pgid=,sid=,tpgid= -p $$; : </dev/tty && echo has-tty") as driver:
        lines = driver.read_to_end().decode().split()
    assert lines[0].startswith("/dev/pts/")
    assert lines[1] == lines[2] == lines[3] == str(driver.program.pid)
    assert lines[-1] == "has-tty"
    assert int(lines[3]) != os.getsid(0)


def test_size_is_set_before_the_start_and_resize_is_seen() -> None:
    script = "stty size; trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    with started("bash", "-c", script, cols=101, rows=37) as driver:
        driver.read_until(b"ready")
        driver.program.resize(60, 20)
        assert driver.read_to_end() == b"37 101\r\nready\r\n20 60\r\n"


def test_size_is_bounded() -> None:
    with started("bash", "-c", "stty size; read line; stty size") as driver:
        driver.read_until(b"24 80")
        driver.program.resize(0, 10**6)
        driver.write(b"\n")
        driver.read_until(b"1000 1\r\n")


def test_signals_go_to_the_foreground_group() -> None:
    with started("bash", "--norc", "-i") as driver:
        driver.write(b"bash -c 'echo re\"\"ady; exec sleep 1000'\n")
        driver.read_until(b"ready")
        assert os.tcgetpgrp(driver.program.read_fd) != driver.program.pid, "sleep is in the foreground"
        assert driver.program.signal("SIGINT")
        driver.write(b"echo still=here\n")
        driver.read_until(b"\rstill=here")
        assert driver.program.poll_exit() is None, "the shell itself was not hit"


def test_unknown_signals_are_refused() -> None:
    with started("sleep", "100") as driver:
        with pytest.raises(UsageError, match="no signal"):
            driver.program.signal("SEGV")
        assert driver.program.signal("term")
        assert driver.wait() == ExitStatus(None, signal.SIGTERM)
        assert not driver.program.signal("TERM"), "nobody is left"


def test_terminate_escalates() -> None:
    with started("bash", "-c", "trap '' HUP TERM; echo ready; while :; do read -t 1 x; done") as driver:
        driver.read_until(b"ready")
        assert driver.program.terminate() == "SIGHUP"
        assert driver.program.terminate() == "SIGTERM"
        assert driver.program.poll_exit() is None
        assert driver.program.terminate() == "SIGKILL"
        assert driver.wait() == ExitStatus(None, 9)
        assert driver.program.terminate() is None


def test_terminate_reaches_a_stopped_program() -> None:
    with started("sleep", "100") as driver:
        driver.program.signal("STOP")
        driver.program.terminate()
        assert driver.wait() == ExitStatus(None, signal.SIGHUP)


def test_signal_mask_and_dispositions_are_reset() -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    try:
        with started("cat", "/proc/self/status") as driver:
            status = driver.read_to_end().decode()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    fields = dict(re.findall(r"^(Sig\w+):\s+([0-9a-f]+)", status, re.MULTILINE))
    assert int(fields["SigBlk"], 16) == 0
    # Signals 32 and 33 are the C library's own and never sent.
    assert int(fields["SigIgn"], 16) & 0x7FFFFFFF == 0, "SIGPIPE is ignored in Python but not in its programs"


def test_eof_in_canonical_mode() -> None:
    with started("cat") as driver:
        driver.write(b"line\n")
        driver.read_until(b"line\r\nline\r\n")
        driver.write(driver.program.eof())
        assert driver.wait() == ExitStatus(0, None)


def test_eof_after_an_unfinished_line() -> None:
    with started("cat") as driver:
        driver.write(b"part")
        driver.write(driver.program.eof(at_line_start=False))
        assert driver.wait() == ExitStatus(0, None)
        assert driver.read_to_end() == b"partpart"


def test_eof_ends_an_interactive_shell() -> None:
    with started("bash", "--norc", "-i") as driver:
        driver.read_until(b"$ ")
        driver.write(driver.program.eof())
        assert driver.wait() == ExitStatus(0, None)


def test_erasing_takes_a_whole_character() -> None:
    with started("bash", "-c", "read -r line; printf '[%s]' \"$line\"", env={**ENV}) as driver:
        driver.write("aé\x7fb\n".encode())
        driver.read_until(b"[ab]")


def test_output_is_eight_bit_clean_in_raw_mode() -> None:
    everything = bytes(range(256)) * 40
    with started("bash", "-c", "stty raw -echo; echo ready; exec head -c 10240") as driver:
        driver.read_until(b"ready\n")
        driver.write(everything)
        assert driver.read_to_end() == b"ready\n" + everything


@pytest.mark.skipif(shutil.which("vim") is None, reason="vim is not installed")
def test_vim_edits_a_file(tmp_path: Path) -> None:
    target = tmp_path / "text"
    with started("vim", "-Nu", "NONE", "-i", "NONE", str(target), cwd=str(tmp_path)) as driver:
        driver.read_until(b"\x1b[?1049h")
        driver.write(b"ihello\x1b:wq\r")
        assert driver.wait() == ExitStatus(0, None)
        assert b"\x1b[?1049l" in driver.read_to_end()
    assert target.read_text() == "hello\n"


def test_an_ordinary_background_job_ends_with_the_shell() -> None:
    with started("bash", "-c", "sleep 30 & exit 0") as driver:
        assert driver.wait() == ExitStatus(0, None)
        driver.read_to_end()
        assert driver.ended == "errno 5", "the kernel hangs the foreground group up when its leader ends"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("trap '' HUP; sleep 30 & echo $!; read go; exit 4", id="ignores"),
        pytest.param("setsid bash -c 'echo $$; exec sleep 30' & read go; exit 4", id="other-session"),
    ],
)
def test_a_grandchild_beyond_the_hangup_holds_it_until_closed(script: str) -> None:
    with started("bash", "-c", script) as driver:
        sleeper = int(driver.read_until(b"\n"))
        driver.write(b"\n")
        assert driver.wait() == ExitStatus(4, None)
        while driver.read_some(0.3):
            pass
        assert not driver.ended, "yet no end either: this is why the rule has a quiet time"
    os.kill(sleeper, signal.SIGKILL)


def test_environment_is_what_was_given_without_secrets() -> None:
    base = {
        "PATH": os.environ["PATH"],
        "STERNA_TOKEN": "top-secret",
        "STERNA_KEEPER_URL": "https://user:pw@x",
        "STERNA_SESSION": "work",
        "TMUX": "/tmp/x,1,0",
        "COLUMNS": "80",
    }
    env = program_environment(base, term="screen-256color", extra={"EXTRA": "1", "STERNA_TICKET": "t"})
    assert set(env) == {"PATH", "STERNA_SESSION", "TERM", "EXTRA"}
    os.environ["STERNA_LEAK"] = "leak"
    try:
        with started("env", env={**env, "STERNA_TOKEN": "again"}) as driver:
            seen = driver.read_to_end().decode().split()
    finally:
        del os.environ["STERNA_LEAK"]
    assert sorted(seen) == sorted(f"{k}={v}" for k, v in env.items())
    assert without_secrets({"STERNA_X": "1", "A": "b"}) == {"A": "b"}


def test_no_descriptor_of_ours_reaches_the_program() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        with started("bash", "-c", "ls /proc/$$/fd; :") as driver:
            seen = driver.read_to_end().split()
    finally:
        os.close(reader)
        os.close(writer)
    assert set(seen) <= {b"0", b"1", b"2", b"255"}, "255 is bash's own"


def test_cwd_and_path_are_the_programs_own(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "own-tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\npwd\n")
    tool.chmod(0o755)
    for env, name in (({**ENV, "PATH": str(tool.parent)}, "own-tool"), ({**ENV}, "bin/own-tool")):
        with started(name, cwd=str(tmp_path), env=env) as driver:
            assert driver.read_to_end().decode().strip() == str(tmp_path)


def test_failing_starts_say_why_and_leave_nothing(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    orphan = tmp_path / "orphan"
    orphan.write_text("#!/no/such/interpreter\n")
    orphan.chmod(0o755)
    before, born = open_descriptors(), children()
    for argv, cwd, reason in (
        (["no-such-command-here"], "/", "not found"),
        (["true"], str(tmp_path / "missing"), "does not exist"),
        ([str(plain)], "/", "permissions"),
        ([str(tmp_path)], "/", "no program"),
        ([str(orphan)], "/", "interpreter"),
    ):
        for kind in KINDS:
            with pytest.raises(AgentError, match=reason):
                Program.start(argv, kind=kind, cwd=cwd, env=ENV)
    assert open_descriptors() == before
    assert children() == born


@pytest.mark.parametrize("argv", [[], [""], ["a\0b"], ["x"] * 257, ["x" * 20_000]])
def test_impossible_commands_are_refused(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        Program.start(argv, cwd="/", env=ENV)


def test_a_relative_directory_is_refused() -> None:
    with pytest.raises(UsageError, match="absolute"):
        Program.start(["true"], cwd="here", env=ENV)


def test_many_starts_leak_neither_descriptors_nor_zombies() -> None:
    def once() -> None:
        with started("true") as driver:
            assert driver.wait() == ExitStatus(0, None)

    once()
    before, born = open_descriptors(), children()
    for _ in range(50):
        once()
    assert open_descriptors() == before
    assert children() == born


def test_a_stolen_status_is_told_as_unknown() -> None:
    with started("true") as driver:
        assert select.select([driver.program.pidfd], [], [], 10)[0]
        os.waitpid(driver.program.pid, 0)
        assert driver.program.poll_exit() == ExitStatus(None, None)
        assert not driver.program.signal("TERM"), "its number may be somebody else's now"


def test_starting_costs_little() -> None:
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        with started("true") as driver:
            times.append(time.perf_counter() - begin)
            driver.wait()
    assert sorted(times)[len(times) // 2] < 0.005, "5 ms beyond the program itself is the bound"
