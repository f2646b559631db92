"""`sterna remote …` is `sterna-remote …`, word for word; and what `sterna remote attach` runs on the other machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sterna.remote import Client, rendezvous
from sterna.remote.clientwire import read_token
from sterna.remote.dispatch import METHODS
from tests.integration.remote_rig import TOKEN, Daemon

HERE = [sys.executable, "-m", "sterna.remote"]
SAME = [sys.executable, "-m", "sterna", "remote"]
WAY = "`sterna remote attach HOST -- COMMAND…` runs a command on another machine"
HINT = f"sterna: {WAY} (`sterna remote attach --help`)."


def run(words: list[str], home: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "SHELL": "/bin/sh", "LC_ALL": "C.UTF-8"}
    return subprocess.run(words, input=stdin, env=env, cwd=home, capture_output=True, timeout=40, check=False)


@pytest.mark.parametrize(
    "words",
    [
        ["-version"], ["--version"], [], ["-zzz"], ["-socket"], ["-h"], ["--help"], ["--", "-version"],
        ["-stop", "-socket", "none"], ["-bridge", "--socket=none"], ["-version=0", "x", "-version"],
        ["-install", "-cli-version", "a/b", "-cli-dir", "d"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_word_is_the_daemons(words: list[str], tmp_path: Path) -> None:
    mine, same = run([*HERE, *words], tmp_path), run([*SAME, *words], tmp_path)
    program = str(Path(sys.executable).parent)
    assert same.returncode == mine.returncode
    assert same.stdout == mine.stdout

    def without_program(text: bytes) -> list[str]:
        return [line for line in text.decode().splitlines() if program not in line and not line.startswith("Usage of ")]

    more = [] if words and words[0] not in {"-h", "--help"} else [HINT]
    assert without_program(same.stderr) == without_program(mine.stderr) + more
    assert HINT not in mine.stderr.decode()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["atach", "lab"], f"There is no `sterna remote atach`: {WAY}"),
        (["attach", "lab", "ls", "-a"], "No such option '-a': if it belongs to the command, put -- before"),
        (["attach", "lab", "ls", "--all"], "put -- before the command."),
    ],
)
def test_a_word_that_is_not_known(words: list[str], said: str, tmp_path: Path) -> None:
    done = run([*SAME, *words], tmp_path)
    assert said in done.stderr.decode()
    assert (done.stdout, done.returncode) == (b"", 2)


GUIDE = (Path(__file__).parents[2] / "docs" / "remote.md").read_text()


def test_the_first_lines_of_the_guide_work(tmp_path: Path) -> None:
    block = GUIDE.partition("```sh\n")[2].partition("```")[0]
    assert "-bridge" in block
    env = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SHELL": "/bin/sh"}
    done = subprocess.run(["sh", "-c", block], env=env, capture_output=True, timeout=40, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert list(json.loads(done.stdout)["result"]) == ["version", "platform", "arch"]
    assert os.listdir(tmp_path / ".claude/remote") == ["remote-server.log"]


def test_the_guide_says_what_each_method_is_called_in_python() -> None:
    rows = [line.strip("| ").split(" | ") for line in GUIDE.splitlines() if line.startswith("| ")]
    named = {row[0]: row[-1].strip("`") for row in rows if row[0] in METHODS and row[-1].startswith("`")}
    assert set(named) == set(METHODS)
    assert all(callable(getattr(Client, name)) for name in named.values())


def meet(home: Path, **request: object) -> tuple[dict[str, str], bytes, int]:
    """What the other side says first, what it relays then, and its exit status."""
    line = json.dumps({"version": 1, "token": "proposed", **request}).encode() + b"\n"
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "SHELL": "/bin/sh", "SSH_CONNECTION": "1 2 3 4"}
    with subprocess.Popen([*SAME, "meet"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line)
        process.stdin.flush()
        said = process.stdout.readline().removeprefix(b"STERNA-REMOTE ")
        answer: dict[str, str] = json.loads(said)
        relayed = b""
        if "token" in answer:
            ping = {"jsonrpc": "2.0", "id": 7, "method": "server.ping", "auth": answer["token"]}
            process.stdin.write(json.dumps(ping).encode() + b"\n")
            process.stdin.flush()
            relayed = process.stdout.readline()
        process.stdin.close()
        return answer, relayed, process.wait(10)


PONG = b'{"jsonrpc":"2.0","id":7,"result":{"pong":true}}\n'


def test_the_first_starts_the_daemon_and_the_next_finds_it(tmp_path: Path) -> None:
    directory = tmp_path / ".claude/remote"
    try:
        assert meet(tmp_path) == ({"token": "proposed"}, PONG, 0)
        assert meet(tmp_path, token="another") == ({"token": "proposed"}, PONG, 0)
        assert oct(directory.stat().st_mode & 0o777) == "0o700"
    finally:
        run([*HERE, "-stop"], tmp_path)


def test_several_at_the_same_time_start_one_daemon(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SHELL": "/bin/sh"}
    pipes = [
        subprocess.Popen([*SAME, "meet"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)
    ]
    try:
        for number, process in enumerate(pipes):
            assert process.stdin is not None
            process.stdin.write(b'{"version":1,"token":"t%d"}\n' % number)
            process.stdin.flush()
        said = set()
        for process in pipes:
            assert process.stdout is not None
            said.add(process.stdout.readline())
        assert len(said) == 1
    finally:
        for process in pipes:
            process.communicate(timeout=10)
        run([*HERE, "-stop"], tmp_path)


def test_a_daemon_that_runs_is_used_and_one_without_its_token_is_not(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        assert meet(tmp_path, socket=daemon.path) == ({"token": TOKEN}, PONG, 0)
        (tmp_path / "daemon.token").write_text("wrong")
        answer, _, status = meet(tmp_path, socket=daemon.path)
        assert "does not take the token beside it: end it" in answer["error"]
        assert status == 1


def test_a_token_that_comes_a_moment_after_its_daemon_listens_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[str] = []

    def read(path: str) -> str:
        times.append(path)
        if len(times) < 3:
            raise FileNotFoundError
        return read_token(path)

    monkeypatch.setattr(rendezvous, "read_token", read)
    with Daemon(tmp_path) as daemon:
        assert rendezvous._found(daemon.path) == TOKEN


@pytest.mark.parametrize("line", [b"", b"{}\n", b"no json\n", b"x" * 70_000])
def test_no_request(line: bytes, tmp_path: Path) -> None:
    done = run([*SAME, "meet"], tmp_path, line)
    assert done.returncode == 1
    assert b"request" in done.stdout
    assert not (tmp_path / ".claude").exists()


def test_a_daemon_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer, _, status = meet(tmp_path, socket=f"{tmp_path}/file/rpc.sock")
    assert answer["error"].startswith("The daemon's directory cannot be used")
    assert status == 1
