"""The remote daemon behind a real sshd: its bridge through lost connections, and `sterna remote attach`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.e2e.rig import wait_for
from tests.e2e.test_ssh_attach import SSHD, Machines, children, processes_with

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None,
    reason="OpenSSH's client and server are not installed",
)

TOKEN = "tok-of-ssh-tests"
STALL_SECONDS = 2.0
RECORD = 1 << 20
WINDOW = 8 << 20

# Without a subscriber the daemon reads on and keeps the last 16 MiB of lines, which are 12 MiB of output: whoever is
# away while more is printed loses what is older. So the producer stays at most 8 MiB ahead of what the client has
# confirmed on its standard input: then whatever is missing after a cut is still there, if `fromSeq` asks for it.
PRODUCER = """
import hashlib, os, random, sys
seed, total, window = map(int, sys.argv[1:])
block, digest = random.Random(seed).randbytes(1 << 16), hashlib.sha256()
sent = confirmed = number = 0
while sent < total:
    while sent - confirmed > window:
        record = b""
        while len(record) < 8:
            record += os.read(0, 8 - len(record))
        confirmed = int.from_bytes(record, "big")
    piece = (number.to_bytes(8, "big") + block[8:])[: total - sent]
    digest.update(piece)
    number += 1
    sent += len(piece)
    while piece:
        piece = piece[os.write(1, piece) :]
os.write(2, digest.hexdigest().encode())
"""


@pytest.fixture
def machines() -> Iterator[Machines]:
    place = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    found = Machines(place)
    remote = place / "sterna-remote"
    remote.write_text(f'#!/bin/sh\nexec {sys.executable} -m sterna.remote "$@"\n')
    remote.chmod(0o755)
    try:
        yield found
    finally:
        found.ssh("exec ssh")
        subprocess.run(ssh(found, f"{remote} -stop"), env=found.env, timeout=30, check=False)
        found.close()
        shutil.rmtree(place, ignore_errors=True)


def ssh(machines: Machines, command: str) -> list[str]:
    options = ["-T", "-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes"]
    return [f"{machines.place}/ssh", *options, "dev", command]


def serve(machines: Machines) -> None:
    words = ssh(machines, f"{machines.place}/sterna-remote -serve -token-fd 0")
    subprocess.run(words, input=TOKEN.encode(), env=machines.env, capture_output=True, timeout=30, check=True)


class Bridge:
    """One `ssh host sterna-remote -bridge`."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        words = ssh(machines, f"exec {machines.place}/sterna-remote -bridge")
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=machines.env, bufsize=0
        )
        self._rest = b""

    def send(self, method: str, number: int, **params: object) -> None:
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params, "auth": TOKEN}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def messages(self, seconds: float) -> list[Any] | None:
        """What came; None after a silence of `seconds`. What start-up files print is skipped."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            return None
        data = self.process.stdout.read(1 << 20)
        *lines, self._rest = (self._rest + (data or b"")).split(b"\n")
        return [msgspec.json.decode(line) for line in lines if line.startswith(b"{")]

    def kill(self, rng: random.Random) -> None:
        """The end of the client or of the server's half, without a word."""
        servers = children(self._machines.sshd.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice([self.process.pid, *servers]), signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


class Transfer:
    """The output of one process over one connection after another."""

    def __init__(self, machines: Machines, seed: int, total: int, cuts: int, *, from_seq: bool = True) -> None:
        self._machines, self._rng, self._total, self._from_seq = machines, random.Random(seed), total, from_seq
        self._cuts = sorted(self._rng.randrange(total) for _ in range(cuts))
        self._arguments = ["-c", PRODUCER, str(seed), str(total), str(WINDOW)]
        self.received, self.digest, self.said = 0, hashlib.sha256(), b""
        self.seqs: list[int] = []
        self.code: int | None = None
        self.cut = 0
        self._input = bytearray()
        self._ready = False

    def run(self) -> None:
        first = True
        while self.code is None:
            bridge = Bridge(self._machines)
            try:
                self._one(bridge, first)
            finally:
                bridge.kill(self._rng)
            first = False

    def _one(self, bridge: Bridge, first: bool) -> None:
        self._ready = first
        if first:
            words = {"id": "p", "command": sys.executable, "args": self._arguments}
            bridge.send("process.spawn", 1, **words)
        else:
            self._reattach(bridge)
        # Some connections end while they begin, the others where the draw has put the cut.
        early = not first and bool(self._cuts) and self._rng.random() < 0.2
        soon = time.monotonic() + self._rng.uniform(0.0, 0.3) if early else None
        while self.code is None:
            seconds = STALL_SECONDS if soon is None else min(STALL_SECONDS, soon - time.monotonic())
            messages = bridge.messages(seconds)
            if soon is not None and time.monotonic() >= soon:
                del self._cuts[self._rng.randrange(len(self._cuts))]
                self.cut += 1
                return
            if messages is None:
                if self._ready:
                    self._reattach(bridge)  # one that was on its way when its connection ended may have come later
            elif not messages and bridge.process.poll() is not None:
                return
            for message in messages or ():
                self._take(bridge, message)
                if self._cuts and self.received >= self._cuts[0]:
                    del self._cuts[0]
                    self.cut += 1
                    return

    def _reattach(self, bridge: Bridge) -> None:
        more = {"fromSeq": self.seqs[-1] if self.seqs else 0} if self._from_seq else {}
        bridge.send("process.reattach", 2, id="p", **more)

    def _take(self, bridge: Bridge, message: Any) -> None:
        if "type" not in message:
            error = message.get("error")
            assert error is None or error["message"] == "Process not running", "only its input may come too late"
            if message["id"] == 2:
                applied = message["result"]["stdinApplied"]
                bridge.send("process.stdin", 3, id="p", data=b64encode(self._input[applied:]).decode(), offset=applied)
                self._ready = True
            return
        self.seqs.append(message["seq"])
        if message["stream"] == "exit":
            self.code = message["exitCode"]
            return
        data = b64decode(message["data"])
        if message["stream"] == "stderr":
            self.said += data
            return
        self.digest.update(data)
        before, self.received = self.received, self.received + len(data)
        if before // RECORD < self.received // RECORD:
            record = min(self.received, self._total).to_bytes(8, "big")
            if self._ready:
                data = b64encode(record)
                bridge.send("process.stdin", 4, id="p", data=data.decode(), offset=len(self._input))
            self._input += record


@pytest.mark.timeout(120)
def test_two_hundred_megabytes_through_fifty_kills(machines: Machines) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    serve(machines)
    began = time.monotonic()
    transfer = Transfer(machines, seed, 200_000_000, 50)
    transfer.run()
    print(f"{transfer.cut} cuts, {time.monotonic() - began:.1f} s")
    assert transfer.cut == 50
    assert transfer.code == 0
    assert transfer.seqs == list(range(1, len(transfer.seqs) + 1)), "every frame once and in order"
    assert transfer.received == 200_000_000
    assert transfer.digest.hexdigest() == transfer.said.decode()


def test_without_the_last_number_seen_it_would_not_be_exact(machines: Machines) -> None:
    serve(machines)
    transfer = Transfer(machines, 1, 24_000_000, 3, from_seq=False)
    transfer.run()
    assert transfer.code == 0
    assert transfer.received > 24_000_000
    assert transfer.digest.hexdigest() != transfer.said[:64].decode()


# ---- sterna remote attach --------------------------------------------------------------------------------------------


def attach_words(machines: Machines, *words: str, sterna: str = "", host: str = "dev") -> list[str]:
    options = ["--ssh", f"{machines.place}/ssh", "--remote-sterna", sterna or str(machines.sterna)]
    return [sys.executable, "-m", "sterna", "remote", "attach", host, *options, *words]


def attach(machines: Machines, *words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        attach_words(machines, *words, **more.pop("where", {})), env=machines.env, capture_output=True, timeout=40,
        check=False, **more,
    )  # fmt: skip


def test_a_command_there_has_our_streams_and_gives_its_status(machines: Machines) -> None:
    data = random.Random(5).randbytes(3_000_000)
    done = attach(machines, "--", "sh", "-c", "cat; pwd >&2; exit 5", input=data)
    assert done.stdout == data
    assert done.stderr.decode().splitlines()[-1] == str(machines.there)
    assert done.returncode == 5
    token = (machines.there / ".claude/remote/daemon.token").read_text()
    assert not any(token in call for call in machines.called())
    assert processes_with(token) == []
    again = attach(machines, "--", "sh", "-c", "kill -9 $$", stdin=subprocess.DEVNULL)
    assert (again.returncode, again.stdout) == (255, b"")
    assert (machines.there / ".claude/remote/daemon.token").read_text() == token, "the daemon that ran was found"


def ssh_of(client: subprocess.Popen[bytes]) -> list[int]:
    return [pid for pid in children(client.pid) if b"-T" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


@pytest.mark.timeout(90)
def test_attach_is_exact_through_the_loss_of_its_ssh(machines: Machines) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    data = rng.randbytes(24 << 20)
    source = machines.place / "data"
    source.write_bytes(data)
    words = attach_words(machines, "--id", "exact", "--", "cat")
    with source.open("rb") as stdin:
        client = subprocess.Popen(
            words, env=machines.env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
    assert client.stdout is not None
    assert client.stderr is not None
    cuts = sorted(rng.randrange(len(data)) for _ in range(6))
    digest, size = hashlib.sha256(), 0
    while piece := client.stdout.read(1 << 16):
        digest.update(piece)
        size += len(piece)
        while cuts and size >= cuts[0]:
            cuts.pop(0)
            for pid in ssh_of(client):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert client.wait(10) == 0, client.stderr.read()
    client.stdout.close()
    client.stderr.close()
    assert size == len(data)
    assert digest.digest() == hashlib.sha256(data).digest()
    assert len(machines.called()) > 2


def test_a_longer_loss_is_said_and_the_same_id_comes_back(machines: Machines) -> None:
    script = "echo ready; read x; echo got $x; read y; exit 4"
    client = subprocess.Popen(
        attach_words(machines, "--id", "job", "--", "sh", "-c", script), env=machines.env, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert client.stdin is not None
    assert client.stdout is not None
    assert client.stderr is not None
    with client:
        assert client.stdout.readline() == b"ready\n"
        machines.ssh("exit 255")
        for pid in ssh_of(client):
            os.kill(pid, signal.SIGKILL)
        client.stdin.write(b"while it was away\n")
        said = b""
        while b"is lost; the process goes on" not in said:
            said += client.stderr.readline()
        machines.ssh("exec ssh")
        assert client.stdout.readline() == b"got while it was away\n"
        assert b"dev is back" in client.stderr.readline()
        client.send_signal(signal.SIGTERM)
        assert b"the process goes on: sterna remote attach dev --id job" in client.stderr.readline()
        assert client.wait(10) == 128 + signal.SIGTERM
    back = attach(machines, "--id", "job", input=b"end\n")
    assert back.stdout == b"ready\ngot while it was away\n"
    assert back.returncode == 4


def test_control_c_goes_to_the_command_and_twice_leaves(machines: Machines) -> None:
    script = "trap 'echo caught' INT; echo ready; while :; do sleep 0.05; done"
    client = subprocess.Popen(
        attach_words(machines, "--", "sh", "-c", script), env=machines.env, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert client.stdout is not None
    assert client.stderr is not None
    with client:
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(signal.SIGINT)
        assert client.stdout.readline() == b"caught\n"
        time.sleep(1.1)  # else the next one would be the second
        client.send_signal(signal.SIGINT)
        assert client.stdout.readline() == b"caught\n"
        client.send_signal(signal.SIGINT)
        assert b"the process goes on" in client.stderr.read()
        assert client.wait(10) == 130


def test_a_program_that_is_not_there_is_named(machines: Machines) -> None:
    machines.sterna.write_text("#!/nowhere/python\n")  # as after an upgrade of Python
    done = attach(machines, "--", "true", stdin=subprocess.DEVNULL)
    assert "dev does not find the program that runs sterna: install it there" in done.stderr.decode()
    assert done.returncode == 2
    done = attach(machines, "--ssh", "/nowhere/ssh -v", "--", "true", stdin=subprocess.DEVNULL)
    assert "'/nowhere/ssh -v' cannot be started: install OpenSSH or say" in done.stderr.decode()
    assert done.returncode == 2


def test_a_closed_pipe_ends_a_command_without_a_name(machines: Machines) -> None:
    words = " ".join(attach_words(machines, "--", "yes", "marker-of-this-test"))
    done = subprocess.run(
        ["sh", "-c", f"{words} | head -n 1"], env=machines.env, stdin=subprocess.DEVNULL, capture_output=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert done.stdout == b"marker-of-this-test\n"
    wait_for(lambda: not processes_with("yes\0marker-of-this-test"), name="the end of the command")


@pytest.mark.parametrize(
    ("where", "words", "status", "said"),
    [
        ({"sterna": "/nowhere/sterna"}, ("--", "true"), 2, "There is no sterna on dev: install it there"),
        ({"sterna": "/bin/true"}, ("--", "true"), 1, "ssh could not reach dev, or not run sterna there"),
        ({"host": "nobody"}, ("--", "true"), 1, "ssh could not reach nobody"),
        ({}, ("--", "no-such-program"), 1, "executable file not found in $PATH"),
        ({}, ("--id", "nothing"), 2, "There is no process nothing on dev"),
        ({}, (), 2, "Say what to run"),
    ],
    ids=["missing", "says nothing", "no login", "no program", "no process", "no command"],
)
def test_every_failure_says_what_to_do(
    machines: Machines, where: dict[str, str], words: tuple[str, ...], status: int, said: str
) -> None:
    done = attach(machines, *words, where=where, stdin=subprocess.DEVNULL)
    assert said in done.stderr.decode()
    assert done.returncode == status
