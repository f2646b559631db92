"""How `sterna pipe` behaves as a command: descriptors, signals, statuses, files, and what it refuses."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.rig import Rig, wait_for


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        rig.start_pod("cat", "cat", kind="stream")
        rig.start_pod("seven", "sh", "-c", "cat; exit 7", kind="stream")
        rig.start_pod("shot", "sh", "-c", "cat; kill -9 $$", kind="stream")
        rig.start_pod("flood", "yes", kind="stream")
        rig.start_node()
        yield rig


def tcp(rig: Rig) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(rig.port)]


@pytest.mark.parametrize("network", [True, False], ids=["tls", "unix"])
def test_input_and_its_end_go_in_and_output_and_status_come_out(rig: Rig, network: bool) -> None:
    for agent, status in (("cat", 0), ("seven", 7), ("shot", 137)):
        done = rig.sterna("pipe", agent, "--new", *(tcp(rig) if network else []), typed="a\n\0b\n")
        assert (done.returncode, done.stdout, done.stderr) == (status, "a\n\0b\n", "")


def test_a_terminal_agent_gets_a_usual_size(rig: Rig) -> None:
    done = rig.sterna("pipe", "main", "--new", typed="stty size; exit 4\n")
    assert (done.returncode, done.stderr) == (4, "")
    assert "24 80" in done.stdout


@pytest.mark.parametrize("typed", ["", "echo said\n"], ids=["nothing", "a line"])
def test_the_end_of_input_ends_a_shell_that_sets_its_terminal_up_meanwhile(rig: Rig, typed: str) -> None:
    """The end comes before, while or after bash changes the terminal's mode, which forgets what was typed before."""
    for _ in range(5):
        done = rig.sterna("pipe", "main", "--new", typed=typed)
        assert (done.returncode, done.stderr) == (0, "")
        assert not typed or "\nsaid" in done.stdout.replace("\r", "")


def test_a_shared_descriptor_stays_blocking(rig: Rig) -> None:
    ours, theirs = os.pipe()
    try:
        words = rig.words("pipe", "cat", "--new")
        with subprocess.Popen(words, env=rig.env, stdin=subprocess.PIPE, stdout=theirs) as run:
            assert run.stdin is not None
            run.stdin.write(b"x" * 100)
            run.stdin.flush()
            assert os.read(ours, 100) == b"x" * 100
            assert not fcntl.fcntl(theirs, fcntl.F_GETFL) & os.O_NONBLOCK
            assert not fcntl.fcntl(run.stdin, fcntl.F_GETFL) & os.O_NONBLOCK
    finally:
        os.close(ours)
        os.close(theirs)


def test_output_goes_on_in_a_file_that_others_write_too(rig: Rig) -> None:
    target = rig.directory / "mixed"
    words = " ".join(rig.words("pipe", "cat", "--new"))
    script = f"(echo before; echo between | {words}; echo after) > {target}"
    subprocess.run(["sh", "-c", script], env=rig.env, check=True, timeout=20)
    assert target.read_text() == "before\nbetween\nafter\n"


def test_a_reader_that_has_enough_ends_the_pipe_but_not_the_session(rig: Rig) -> None:
    with subprocess.Popen(
        rig.words("pipe", "flood", "--name", "much"), env=rig.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.read(1000) == b"y\n" * 500
        run.stdout.close()
        assert run.wait(10) == 1
        assert run.stderr.read() == b""
    assert [s["state"] for s in rig.json("ls")["sessions"] if s["name"] == "much"] == ["suspended"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_the_session_alone(rig: Rig, number: int) -> None:
    name = f"left-{number}"
    with subprocess.Popen(
        rig.words("pipe", "cat", "--name", name), env=rig.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdin.write(b"hello")
        run.stdin.flush()
        assert run.stdout.read(5) == b"hello"
        run.send_signal(number)
        assert run.wait(10) == 128 + number
        said = b"sterna: The session goes on: 5 bytes of input were taken, --from-output 5 goes on.\n"
        assert run.stderr.read() == said
    again = rig.sterna("pipe", "cat", "--name", name, "--from-output", "5", typed=" world")
    assert (again.returncode, again.stdout) == (0, " world")


def test_a_pipe_that_was_begun_in_the_middle_says_what_it_missed(rig: Rig) -> None:
    done = rig.sterna("pipe", "cat", "--new", "--from-output", "100", typed="x")
    assert done.returncode == 1
    assert done.stderr == "sterna: The session's output ends at 0, before position 100.\n"


def test_files_are_refused_where_they_cannot_be_exact(rig: Rig) -> None:
    source, target = rig.directory / "source", rig.directory / "target"
    source.write_bytes(b"data")
    target.write_bytes(b"mine")
    files = ["--in", os.fspath(source), "--out", os.fspath(target)]
    done = rig.sterna("pipe", "cat", *files)
    assert (done.returncode, target.read_bytes()) == (2, b"mine")
    assert "not empty" in done.stderr
    assert rig.sterna("pipe", "cat", "--out", os.fspath(target), typed="x").returncode == 2
    target.unlink()
    assert rig.sterna("pipe", "cat", "--in", os.fspath(source), "--out", os.fspath(source)).returncode == 2
    assert rig.sterna("pipe", "cat", "--in", os.fspath(rig.directory / "absent"), "--out", "x").returncode == 2
    done = rig.sterna("pipe", "cat", "--new", *files)
    assert (done.returncode, target.read_bytes()) == (0, b"data")
    done = rig.sterna("pipe", "cat", "--new", "--in", "/dev/null", "--out", "/dev/null")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_transfer_has_a_private_record_one_process_and_its_own_words(rig: Rig) -> None:
    source, target = rig.directory / "long", rig.directory / "copy"
    source.write_bytes(b"")
    files = ["--in", os.fspath(source), "--out", os.fspath(target)]
    record = rig.directory / ".copy.sterna"
    with subprocess.Popen(rig.words("pipe", "flood", "--name", "f", *files), env=rig.env) as run:
        wait_for(lambda: target.exists() and target.stat().st_size > 100_000, name="output")
        assert record.stat().st_mode & 0o777 == 0o600
        done = rig.sterna("pipe", "flood", "--name", "f", *files)
        assert (done.returncode, "Another process" in done.stderr) == (2, True)
        run.kill()
    done = rig.sterna("pipe", "flood", "--name", "g", *files)
    assert (done.returncode, "another transfer" in done.stderr) == (2, True)
    size = target.stat().st_size
    with subprocess.Popen(rig.words("pipe", "flood", "--name", "f", *files), env=rig.env) as run:
        wait_for(lambda: target.stat().st_size > size + 1_000_000, name="more output")
        run.terminate()
        assert run.wait(10) == 143
    whole = target.read_bytes()
    assert whole == (b"y\n" * len(whole))[: len(whole)]
    assert rig.sterna("close", "f").returncode == 0
    done = rig.sterna("pipe", "flood", "--name", "f", *files)
    assert done.returncode == 1
    assert "closed" in done.stderr
    assert not record.exists()
