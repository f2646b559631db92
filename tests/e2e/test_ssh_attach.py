"""`sterna attach user@host` against a real sshd: one ssh call, then a direct connection; and what failures say."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sterna.cli.invite import server_address
from sterna.cli.ssh import remote_command
from sterna.client.remote import Target
from sterna.errors import UsageError
from tests.e2e.rig import SOURCE, PtyClient, free_port, running, wait_for

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None,
    reason="OpenSSH's client and server are not installed",
)

SSHD_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {place}/hostkey
AuthorizedKeysFile {place}/id.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
SetEnv HOME={place}/there XDG_STATE_HOME={place}/there/s XDG_RUNTIME_DIR={place}/there/r PYTHONPATH={source}
"""
SSH_CONFIG = """
Host dev
  HostName 127.0.0.1
  Port {port}
  IdentityFile {place}/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  # What a user may have configured for logins and what must not disturb.
  RemoteCommand echo a command of its own
  RequestTTY yes
  LocalForward 127.0.0.1:{port} 127.0.0.1:9
  ExitOnForwardFailure yes
Host nobody
  HostName 127.0.0.1
  Port {closed}
"""


class Machines:
    """Two machines on one: "here" with a client, "there" with an sshd, each with state of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.here = place / "here"
        self.there = place / "there"
        self.there.mkdir(mode=0o700)
        self.sterna = place / "sterna"
        self.sterna.write_text(f'#!/bin/sh\nexec {sys.executable} -m sterna "$@"\n')
        self.sterna.chmod(0o755)
        (self.there / ".bashrc").write_text("echo noise of a start-up file\necho 'STERNA noise' >&2\n")
        self.calls = place / "calls"
        self.port = free_port()
        self.node_port = free_port()
        self._write(place)
        assert SSHD is not None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.log = (place / "sshd.log").open("wb")
        words = [SSHD, "-D", "-e", "-f", str(place / "sshd_config")]
        self.sshd = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        wait_for(self._listens, name="sshd")
        self.clients: list[PtyClient] = []
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("STERNA_", "XDG_", "SSH_"))}
        self.env = {
            **keep,
            "HOME": str(self.here),
            "PYTHONPATH": str(SOURCE),
            "TERM": "xterm-256color",
            "LC_ALL": "C.UTF-8",
        }

    def _write(self, place: Path) -> None:
        for name in ("hostkey", "id"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)]
            subprocess.run(words, check=True, timeout=30)
        known = {"place": place, "port": self.port, "closed": free_port(), "source": SOURCE}
        (place / "sshd_config").write_text(SSHD_CONFIG.format(**known))
        (place / "ssh_config").write_text(SSH_CONFIG.format(**known))
        # Counts its calls and notes its arguments, then is ssh.
        self.ssh("exec ssh")

    def ssh(self, last: str) -> None:
        """Says what the ssh command does after it noted its call."""
        path = self.place / "ssh"
        text = f'printf "%s\\n" "$*" >> {self.calls}\nset -- -F {self.place}/ssh_config "$@"\n'
        path.write_text(f'#!/bin/sh\n{text}{last} "$@"\n' if last.endswith("ssh") else f"#!/bin/sh\n{text}{last}\n")
        path.chmod(0o755)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def called(self) -> list[str]:
        """The arguments of every ssh call so far."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def attach(self, *options: str, target: str = "", sterna: str = "") -> PtyClient:
        """`sterna attach user@dev` in a terminal."""
        words = [
            sys.executable, "-m", "sterna", "attach", target or f"{getpass.getuser()}@dev",
            "--ssh", f"{self.place}/ssh",
            "--remote-sterna", sterna or str(self.sterna), "--port", str(self.node_port), *options,
        ]  # fmt: skip
        client = PtyClient(words, self.env)
        self.clients.append(client)
        return client

    def works(self, client: PtyClient) -> None:
        """Types a command that only a shell answers so."""
        client.type("echo x$((40+2))y $HOME\n")
        client.expect(f"x42y {self.there}")

    def leave(self, client: PtyClient) -> None:
        client.type("\n~d")
        assert client.wait() == 0

    def record(self) -> tuple[Path, dict[str, Any]]:
        """What the client remembers, and where."""
        (path,) = (self.here / ".local/state/sterna/client/remotes").iterdir()
        return path, json.loads(path.read_text())

    def node(self) -> int:
        """The process that is the node there."""
        words = [line for line in (self.there / "s/sterna/up.log").read_text().splitlines() if '"fingerprint"' in line]
        pid = json.loads(words[-1])["pid"]
        assert isinstance(pid, int)
        return pid

    def close(self) -> None:
        for client in self.clients:
            client.close()
        env = {
            **self.env,
            "HOME": str(self.there),
            "XDG_STATE_HOME": f"{self.there}/s",
            "XDG_RUNTIME_DIR": f"{self.there}/r",
        }
        words = [sys.executable, "-m", "sterna", "down"]
        subprocess.run(words, env=env, capture_output=True, timeout=30, check=False)
        self.sshd.terminate()
        self.sshd.wait(10)
        self.log.close()


@pytest.fixture
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    # Unix sockets and ssh's own files need short paths.
    place = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    found = Machines(place)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(place, ignore_errors=True)


def processes_with(secret: str) -> list[str]:
    """The processes that have a text in their arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            for name in ("cmdline", "environ"):
                try:
                    content = (entry / name).read_bytes()
                except OSError:
                    continue
                if secret.encode() in content:
                    found.append(f"{entry.name}/{name}")
    return found


def test_one_call_of_ssh_starts_a_node_there_and_the_next_attach_needs_none(machines: Machines) -> None:
    client = machines.attach()
    machines.works(client)
    assert len(machines.called()) == 1
    path, record = machines.record()
    assert record["port"] == machines.node_port
    assert record["addresses"] == ["127.0.0.1"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert record["token"] not in machines.called()[0]
    assert processes_with(record["token"]) == []
    assert processes_with("sterna-marker-of-this-test") == [], "the control below would mean nothing"
    # The control: the same look does find a secret that is on a command line.
    sleeper = subprocess.Popen(["sh", "-c", "read x; : sterna-marker-of-this-test"], stdin=subprocess.PIPE)
    wait_for(lambda: processes_with("sterna-marker-of-this-test") == [f"{sleeper.pid}/cmdline"], name="the control")
    sleeper.communicate(b"\n", timeout=10)
    machines.leave(client)

    # The login is over and the node lives in a session of its own.
    node = machines.node()
    assert os.getsid(node) == node
    assert not any(line.startswith("SSH_") for line in Path(f"/proc/{node}/environ").read_text().split("\0"))
    again = machines.attach()
    machines.works(again)
    machines.leave(again)
    assert len(machines.called()) == 1, "known and valid: no ssh is needed"
    assert machines.node() == node


def test_without_the_record_or_with_a_stale_one_ssh_is_asked_again(machines: Machines) -> None:
    machines.leave(attached(machines))
    path, record = machines.record()
    path.write_text(json.dumps({**record, "token": record["token"][:-6] + "AAAAAA"}))
    machines.leave(attached(machines))
    assert len(machines.called()) == 2, "the token was not valid any more"
    path.write_text(json.dumps({**record, "expires": int(time.time()) - 1}))
    machines.leave(attached(machines))
    assert len(machines.called()) == 3
    path.write_text("{")
    machines.leave(attached(machines))
    assert len(machines.called()) == 4
    os.kill(machines.node(), signal.SIGTERM)
    wait_for(
        lambda: not Path(f"/proc/{machines.node()}/cmdline").exists() or not reaped(machines.node()), name="its end"
    )
    machines.leave(attached(machines))
    assert len(machines.called()) == 5, "the node was started again; its agent had gone on"


def reaped(pid: int) -> bool:
    """Whether a process still runs; one that nobody waited for has no arguments any more."""
    return bool(Path(f"/proc/{pid}/cmdline").read_bytes())


def attached(machines: Machines) -> PtyClient:
    client = machines.attach()
    machines.works(client)
    return client


def test_another_node_at_the_address_is_not_talked_to(machines: Machines) -> None:
    machines.leave(attached(machines))
    path, record = machines.record()
    path.unlink()
    with running() as other:
        # What ssh brings back names the right node, but another one answers at that port.
        machines.ssh(f'ssh "$@" | sed s/:{machines.node_port},/:{other.port},/')
        client = machines.attach()
        assert client.wait() == 1
        assert b"not the one known there" in client.seen
        assert not path.exists()
    assert record["port"] != other.port


def test_a_blocked_port_is_named_with_the_ways_out(machines: Machines) -> None:
    closed = free_port()
    machines.ssh(f'ssh "$@" | sed s/:{machines.node_port},/:{closed},/')
    client = machines.attach()
    assert client.wait() == 1
    said = bytes(client.seen).decode().replace("\r\n", "")
    assert f"TCP port {closed} of 127.0.0.1 does not answer" in said
    assert "firewall" in said
    assert "--via-ssh" in said


def test_via_ssh_needs_no_other_port_and_survives_the_death_of_its_ssh(machines: Machines) -> None:
    client = machines.attach("--via-ssh")
    machines.works(client)
    calls = machines.called()
    assert len(calls) == 2
    assert "-N" in calls[1]
    (tunnel,) = [pid for pid in children(client.process.pid) if b"-N" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(tunnel, signal.SIGKILL)
    client.type("echo a$((1+1))b\n")
    client.expect("a2b")
    assert len(machines.called()) == 3
    machines.leave(client)
    assert children(client.process.pid) == []


def children(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    # Tasks other than the first may have started one as well.
    for task in Path(f"/proc/{pid}/task").iterdir():
        words += (task / "children").read_text().split()
    return sorted({int(word) for word in words})


@pytest.mark.parametrize(
    ("target", "sterna", "status", "said"),
    [
        ("dev", "/nowhere/sterna", 2, "There is no sterna on dev: install it there"),
        ("dev", "/bin/false", 1, "sterna on dev could not prepare the connection (status 1)"),
        ("dev", "/bin/true", 1, "sterna on dev could not prepare the connection (status 0)"),
        ("dev", "/bin/ls", 1, "if it does not know `invite`, update it there"),
        ("dev", "a'; touch x '", 2, "--remote-sterna takes a path of letters"),
        ("nobody", "sterna", 1, "ssh could not reach"),
    ],
    ids=["missing", "fails", "says nothing", "too old", "injected", "no login"],
)
def test_every_failure_says_what_to_do(machines: Machines, target: str, sterna: str, status: int, said: str) -> None:
    client = machines.attach(
        target=f"ssh://{target}" if target == "nobody" else f"{getpass.getuser()}@{target}", sterna=sterna
    )
    assert client.wait() == status
    assert said in bytes(client.seen).decode().replace("\r\n", "")


def test_sterna_is_found_in_the_path_of_a_login_shell(machines: Machines, tmp_path: Path) -> None:
    (machines.there / "own").mkdir()
    shutil.copy(machines.sterna, machines.there / "own" / "sterna")
    (machines.there / ".bash_profile").write_text(f"echo noise; PATH={machines.there}/own:$PATH\n")
    for shell in ("sh", "bash", "dash", "zsh", "fish", "csh", "tcsh"):
        if shutil.which(shell):
            env = {
                "HOME": str(machines.there),
                "PATH": "/usr/bin:/bin",
                "SHELL": shutil.which("bash") or "",
                "PYTHONPATH": str(SOURCE),
            }
            words = [shell, "-c", remote_command(None)]
            done = subprocess.run(words, env=env, input="{}", capture_output=True, text=True, timeout=30, check=False)
            assert "sends it one line of JSON" in done.stderr, f"{shell}: {done}"


def test_targets_are_read_and_nothing_in_them_becomes_an_option_of_ssh() -> None:
    target = Target("ssh://me@[fe80::1%eth0]:2222/claude")
    assert (target.user, target.host, target.port, target.agent) == ("me", "fe80::1%eth0", 2222, "claude")
    assert Target("me@dev").login == "me@dev"
    assert Target("ssh://dev").login == "dev"
    for bad in (
        "-oProxyCommand=x@dev", "ssh://-oProxyCommand=x", "me@-dev", "me@", "@dev", "me@dev:22", "ssh://dev:0",
        "me@a b", "ssh://dev:70000", "me@$(x)", "me@a;b", "ssh://dev/a/b", "me@dev\n",
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Target(bad)


def test_the_address_on_which_ssh_came_in() -> None:
    assert server_address({"SSH_CONNECTION": "192.0.2.9 5000 192.0.2.1 22"}) == "192.0.2.1"
    assert server_address({"SSH_CONNECTION": "::ffff:192.0.2.9 5000 ::ffff:192.0.2.1 22"}) == "192.0.2.1"
    assert server_address({"SSH_CONNECTION": "UNKNOWN 65535 UNKNOWN 65535"}) is None
    assert server_address({}) is None
