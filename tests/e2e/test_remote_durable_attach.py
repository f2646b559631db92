"""`sterna remote attach` when the daemon there is killed: it is started again and finds the command going on."""

from __future__ import annotations

import hashlib
import os
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import test_remote_ssh as over_ssh
from tests.e2e.test_ssh_attach import Machines
from tests.integration.durable_rig import holders
from tests.integration.remote_rig import alive, until

machines = over_ssh.machines
pytestmark = over_ssh.pytestmark


def daemon_of(directory: Path) -> int:
    """Returns the process id of the daemon that listens in a directory, 0 when none does."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(directory / "rpc.sock"))
        except OSError:
            return 0
        return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def started_daemon(directory: Path) -> int:
    """Returns the daemon that listens in a directory, 0 while who started it still looks whether it does."""
    daemon = daemon_of(directory)
    try:
        parent = re.findall(r"^PPid:\t(\d+)$", Path(f"/proc/{daemon}/status").read_text(), re.MULTILINE)[0]
        words = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (daemon, parent)]
    except OSError:
        return 0
    return 0 if words[0] == words[1] else daemon


@pytest.mark.timeout(90)
def test_attach_is_exact_through_the_end_of_the_daemon(machines: Machines) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    data = rng.randbytes(8 << 20)
    source, there = machines.place / "data", machines.there / ".claude/remote"
    source.write_bytes(data)
    words = over_ssh.attach_words(machines, "--id", "exact", "--", "sh", "-c", "cat; exit 7")
    with source.open("rb") as stdin:
        client = subprocess.Popen(
            words, env=machines.env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
    assert client.stdout is not None
    assert client.stderr is not None
    cuts = sorted(rng.randrange(len(data) * 3 // 4) for _ in range(3))
    digest, size, killed = hashlib.sha256(), 0, {0}
    while piece := client.stdout.read(1 << 16):
        digest.update(piece)
        size += len(piece)
        while cuts and size >= cuts[0]:
            cuts.pop(0)
            until(lambda: started_daemon(there) not in killed, "no daemon comes")
            killed.add(daemon := daemon_of(there))
            os.kill(daemon, signal.SIGKILL)
    assert client.wait(10) == 7, client.stderr.read()
    client.stdout.close()
    client.stderr.close()
    assert size == len(data)
    assert digest.digest() == hashlib.sha256(data).digest()
    (holder,) = holders(there)
    subprocess.run(
        over_ssh.ssh(machines, f"{machines.place}/sterna-remote -stop"), env=machines.env, timeout=30, check=True
    )
    until(lambda: not alive(holder), "the holder outlives -stop")


def test_where_files_are_limited_the_daemon_is_started_without_a_holder(tmp_path: Path) -> None:
    script = 'ulimit -f 100000; exec "$@"'
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SHELL": "/bin/sh"}
    try:
        said = subprocess.run(
            ["sh", "-c", script, "sh", sys.executable, "-m", "sterna", "remote", "meet"],
            env=env, input=b'{"version":1,"token":"proposed"}\n', capture_output=True, timeout=30, check=True,
        )  # fmt: skip
        assert said.stdout == b'STERNA-REMOTE {"token":"proposed"}\n'
        directory = tmp_path / ".claude/remote"
        assert daemon_of(directory)
        assert holders(directory) == []
    finally:
        subprocess.run([sys.executable, "-m", "sterna.remote", "-stop"], env=env, timeout=30, check=True)
