"""Ctrl-C in `sterna remote attach` in a real terminal, whose foreground group ssh belongs to as well."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import test_remote_ssh as over_ssh
from tests.e2e.rig import PtyClient, wait_for
from tests.e2e.test_ssh_attach import Machines, children

machines = over_ssh.machines
pytestmark = over_ssh.pytestmark

CTRL_C = "\x03"
COUNTS = "n=0; trap 'n=$((n+1)); echo caught $n.' INT; echo ready; while :; do sleep 0.02; done"


@contextlib.contextmanager
def attached(machines: Machines, *words: str) -> Iterator[PtyClient]:
    client = PtyClient(over_ssh.attach_words(machines, *words), machines.env)
    try:
        yield client
    finally:
        client.close()


def ssh_of(client: PtyClient) -> list[int]:
    return [pid for pid in children(client.process.pid) if b"\0-T\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_each_control_c_arrives_once(machines: Machines) -> None:
    with attached(machines, "--", "sh", "-c", COUNTS) as client:
        client.expect("ready")
        for number in (1, 2):
            client.type(CTRL_C)
            client.expect(f"caught {number}.", 5)
            time.sleep(1.05)  # else the next one would be the second
        client.type(CTRL_C)
        client.expect("caught 3.", 5)
        client.type(CTRL_C)
        client.expect("the process goes on")
        assert client.wait() == 130
        assert len(machines.called()) == 1, "ssh lives through it"
        assert b"Traceback" not in client.seen


def test_a_control_c_without_a_connection_arrives_when_it_is_back(machines: Machines) -> None:
    with attached(machines, "--", "sh", "-c", COUNTS) as client:
        client.expect("ready")
        machines.ssh("exit 255")
        for pid in ssh_of(client):
            os.kill(pid, signal.SIGKILL)
        client.expect("is lost; the process goes on")
        client.type(CTRL_C)
        machines.ssh("exec ssh")
        client.expect("caught 1.")
        wait_for(lambda: client.read(0.1) or b"is back" in client.seen, name="the return is said")
        time.sleep(1.05)
        client.type(CTRL_C)
        client.expect("caught 2.")
        os.kill(client.process.pid, signal.SIGTERM)
        assert client.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize("stubborn", [False, True])
def test_control_c_while_ssh_hangs_ends_without_a_traceback(machines: Machines, stubborn: bool) -> None:
    machines.ssh("trap '' TERM; exec sleep 1000" if stubborn else "exec sleep 1000")
    with attached(machines, "--", "true") as client:
        wait_for(machines.called, name="ssh is called")
        (hanging,) = children(client.process.pid)
        wait_for(lambda: Path(f"/proc/{hanging}/comm").read_text() == "sleep\n", name="ssh hangs")
        try:
            client.type(CTRL_C)
            if stubborn:
                time.sleep(0.3)  # the first one waits up to three seconds for the end of ssh
                client.type(CTRL_C)
            assert client.wait(2) == 130
            assert client.seen.replace(b"^C", b"").strip() == b""
            assert stubborn or not Path(f"/proc/{hanging}").exists()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(hanging, signal.SIGKILL)
    machines.ssh("exec ssh")


def test_control_c_at_a_prompt_of_ssh_ends_it(machines: Machines) -> None:
    key = machines.place / "id"
    shutil.copy(key, machines.place / "plain")
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)], check=True, timeout=30)
    with attached(machines, "--", "echo", "hi") as client:
        client.expect("Enter passphrase")
        client.type("secret\n")  # as ssh may read the terminal
        client.expect("hi\r\n")
        assert client.wait() == 0
    with attached(machines, "--", "true") as client:
        client.expect("Enter passphrase")
        client.type(CTRL_C)
        assert client.wait(5) == 130
        assert b"Traceback" not in client.seen
        assert termios.tcgetattr(client.master)[3] & termios.ECHO, "the terminal is as it was"
    shutil.copy(machines.place / "plain", key)
