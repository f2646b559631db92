"""Programs without a PTY: 8-bit clean both ways, with end of file."""

from __future__ import annotations

import hashlib
import os
import random
import signal

import pytest

from sterna.pod.program import ExitStatus, Program, program_environment
from tests.integration.program_driver import started


def test_ten_megabytes_of_every_byte_come_back() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    data = bytes(range(256)) * 8 + random.Random(seed).randbytes(10 * 1024 * 1024)
    with started("cat", kind="stream") as driver:
        driver.write(data)
        assert driver.program.eof() == b""
        assert driver.program.write_fd == -1
        answer = driver.read_to_end()
        assert driver.wait() == ExitStatus(0, None)
    assert hashlib.sha256(answer).digest() == hashlib.sha256(data).digest()


def test_end_of_file_is_possible_while_output_goes_on() -> None:
    with started("bash", "-c", "cat; echo after", kind="stream") as driver:
        driver.write(b"\0\x04\r\n")
        driver.program.eof()
        assert driver.read_to_end() == b"\0\x04\r\nafter\n"


@pytest.mark.parametrize(
    ("stderr", "expected"), [("merge", b"out\nerr\n"), ("discard", b"out\n"), ("inherit", b"out\n")]
)
def test_standard_error_goes_where_it_is_told(stderr: str, expected: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    env = program_environment(os.environ, term="dumb")
    program = Program.start(
        ["bash", "-c", "echo out; echo err >&2"],
        kind="stream",
        cwd="/",
        env=env,
        stderr=stderr,  # type: ignore[arg-type]  # parametrised
    )
    os.set_blocking(program.read_fd, True)
    output = b""
    while data := os.read(program.read_fd, 4096):
        output += data
    os.waitid(os.P_PIDFD, program.pidfd, os.WEXITED | os.WNOWAIT)
    assert program.poll_exit() == ExitStatus(0, None)
    program.close()
    assert output == expected
    assert capfd.readouterr().err == ("err\n" if stderr == "inherit" else "")


def test_has_its_own_session_and_no_terminal() -> None:
    script = "ps -o pid=,pgid=,sid= -p $$; (: </dev/tty) 2>/dev/null || echo no-tty"
    with started("bash", "-c", script, kind="stream") as driver:
        words = driver.read_to_end().decode().split()
    assert words[0] == words[1] == words[2] == str(driver.program.pid)
    assert words[3] == "no-tty"


def test_signals_go_to_the_whole_group() -> None:
    with started("bash", "-c", "sleep 100 & echo $!; wait; echo woke", kind="stream") as driver:
        child = int(driver.read_until(b"\n"))
        assert driver.program.signal("TERM")
        assert driver.wait() == ExitStatus(None, signal.SIGTERM)
        driver.read_to_end()
    state = ""
    if os.path.exists(f"/proc/{child}"):
        with open(f"/proc/{child}/stat") as file:
            state = file.read().rsplit(")", 1)[1].split()[0]
    assert state in ("", "Z", "X"), "the child is gone too"


def test_a_grandchild_holds_the_output_open() -> None:
    with started("bash", "-c", "sleep 30 & echo $!; exit 0", kind="stream") as driver:
        assert driver.wait() == ExitStatus(0, None)
        sleeper = int(driver.read_until(b"\n"))
        assert not driver.read_some(0.2)
        assert not driver.ended, "no end of file: this is why the rule has a quiet time"
    os.kill(sleeper, signal.SIGKILL)


def test_resize_means_nothing() -> None:
    with started("cat", kind="stream") as driver:
        driver.program.resize(10, 10)
        driver.program.eof()
        driver.program.eof()
        assert driver.wait() == ExitStatus(0, None)


def test_writing_to_a_program_that_ended_is_an_error_not_a_signal() -> None:
    with started("true", kind="stream") as driver:
        driver.wait()
        with pytest.raises(BrokenPipeError):
            os.write(driver.program.write_fd, b"x")
