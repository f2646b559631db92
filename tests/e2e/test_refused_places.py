"""Directories, sockets, disks and ports that a node cannot trust or use, and what other users can get at."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.frame import Type
from sterna.protocol.messages import Error, Event, Resumed
from tests.e2e.raw_client import Raw, Site, unharmed
from tests.e2e.rig import Rig, _children, free_port, wait_for

pytestmark = pytest.mark.xdist_group("refused-places")

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make other users' files and mount a small disk")
NOBODY = 65_534
DISK_BYTES = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        yield Site(rig)


def agents(site: Site) -> set[str]:
    with site.client() as raw:
        raw.connect(want="call")
        return {agent["name"] for agent in raw.call("list")["agents"]}


def said(site: Site) -> str:
    """The node's log."""
    assert site.rig.node is not None
    return site.rig.node.output()


def has_said(site: Site, text: str) -> bool:
    return text in said(site)


def sentence(text: str) -> str:
    """What a command says when it fails: one line, one sentence, no traceback; beside whom it trusts at first use."""
    lines = [line for line in text.splitlines() if not line.startswith(("{", "sterna: Trusting "))]
    assert len(lines) == 1, text
    assert lines[0].startswith("sterna: ")
    assert lines[0].endswith(".")
    return lines[0]


# ---- the directory of sockets ----------------------------------------------------------------------------------


def test_what_is_no_socket_of_ours_is_no_agent(site: Site) -> None:
    """A symlink to a real agent, a dangling one, a file, a directory, a FIFO, names that are none."""
    sockets = site.rig.sockets
    real = sockets / "local_echo"
    with unharmed(site):
        made = [sockets / name for name in ("local_link", "local_dangling", "local_file", "local_dir", "local_fifo")]
        made[0].symlink_to(real)
        made[1].symlink_to("/nowhere")
        made[2].touch()
        made[3].mkdir()
        os.mkfifo(made[4])
        names = ["noname", "_x", "local_", "UPPER_x", "local_..", "local_\x1b[31m", "local_" + "x" * 200]
        for name in names:
            (sockets / name).symlink_to(real)
        for path in made:
            wait_for(functools.partial(has_said, site, f'"pod": "{path.name}"'), name=f"a word about {path.name}")
        assert agents(site) == {"main", "echo"}
        assert "\x1b" not in said(site)
        for path in (*made, *(sockets / name for name in names)):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        # Control: a socket of that name is one.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(made[0]))
            listener.listen(8)
            wait_for(lambda: agents(site) == {"main", "echo", "link"}, name="the agent")
            made[0].unlink()


@AS_ROOT
def test_another_users_socket_is_no_agent(site: Site) -> None:
    """Owned by somebody else, or made by us and given away: the node does not even connect."""
    path = os.fspath(site.rig.sockets / "local_foreign")
    with unharmed(site), socket.socket(socket.AF_UNIX) as listener:
        made = os.fspath(site.rig.directory / "foreign")  # not where the node looks, before it is another's
        listener.bind(made)
        os.chown(made, NOBODY, NOBODY)
        listener.listen(1)
        listener.setblocking(False)
        os.rename(made, path)
        wait_for(lambda: has_said(site, '"pod": "local_foreign"'), name="a word about it")
        assert has_said(site, "another user owns it")
        assert "foreign" not in agents(site)
        with pytest.raises(BlockingIOError):
            listener.accept()
        os.unlink(path)


@AS_ROOT
def test_a_socket_that_another_user_serves_is_no_agent(site: Site) -> None:
    """The file is ours, but the process behind it is not (SO_PEERCRED): it gets not one byte."""
    path = os.fspath(site.rig.sockets / "local_served")
    made = os.fspath(site.rig.directory / "served")  # not where the node looks, before somebody listens
    program = f"""
import os, socket
s = socket.socket(socket.AF_UNIX); s.bind({made!r}); os.setuid({NOBODY}); s.listen(1)
print("ready", flush=True)
s.settimeout(5); c, _ = s.accept(); c.settimeout(5); print(len(c.recv(100)), flush=True)
"""
    with unharmed(site), subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as thief:
        assert thief.stdout is not None
        assert thief.stdout.readline() == "ready\n"
        os.rename(made, path)
        assert thief.stdout.readline() == "0\n"
        wait_for(lambda: has_said(site, "another user serves it"), name="a word about it")
        assert "served" not in agents(site)
        os.unlink(path)


# ---- the state directory, the port -----------------------------------------------------------------------------


def up(rig: Rig, *options: str) -> subprocess.CompletedProcess[str]:
    return rig.sterna("up", "--no-web", "--port", str(free_port()), "--state", os.fspath(rig.state), *options)


def test_a_state_directory_that_others_may_write_to() -> None:
    with Rig() as rig:
        for path in (rig.state, rig.state / "node", rig.sockets):
            path.mkdir(mode=0o700, exist_ok=True)
            for mode in (0o770, 0o702):
                path.chmod(mode)
                done = up(rig)
                assert done.returncode == 1, done
                assert f"chmod go-w {path}" in sentence(done.stderr)
            path.chmod(0o700)
        (rig.state / "node").rmdir()
        (rig.directory / "elsewhere").mkdir(mode=0o700)
        (rig.state / "node").symlink_to(rig.directory / "elsewhere")
        assert "symbolic link" in sentence(up(rig).stderr)
        (rig.state / "node").unlink()
        rig.start_node()  # control: nothing else was wrong


@pytest.mark.parametrize("name", ["node-ca.pem", "token.key", "local.token", "node-leaf.pem"])
def test_secrets_that_others_may_read_are_not_used(name: str) -> None:
    with Rig() as rig:
        rig.start_node()
        rig.stop_node()
        (rig.state / "node" / name).chmod(0o640)
        done = up(rig)
        assert done.returncode == 1, done
        assert "chmod 600" in sentence(done.stderr)


@AS_ROOT
def test_another_users_state_directory() -> None:
    with Rig() as rig:
        (rig.state / "node").mkdir(mode=0o700)
        os.chown(rig.state / "node", NOBODY, NOBODY)
        done = up(rig)
        assert done.returncode == 1
        assert f"belongs to user {NOBODY}" in sentence(done.stderr)


def test_a_port_in_use(site: Site) -> None:
    with unharmed(site), Rig() as rig:
        done = rig.sterna("up", "--no-web", "--port", str(site.rig.port), "--state", os.fspath(rig.state))
        assert done.returncode == 2
        assert f"Port {site.rig.port} on 127.0.0.1 is in use" in sentence(done.stderr)
        rig.start_node()  # control: on another port it runs
        # The same state directory belongs to the node that has it.
        done = up(site.rig)
        assert done.returncode == 2
        assert f"A node runs here already (pid {site.pid}, " in sentence(done.stderr)
        assert os.path.exists(site.socket)


# ---- a full disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[Rig]:
    """A rig whose state lies on a disk of 8 MiB."""
    with Rig() as rig:
        words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", os.fspath(rig.state)]
        if subprocess.run(words, check=False, capture_output=True).returncode:
            pytest.skip("a small disk cannot be mounted here")
        try:
            rig.sockets.mkdir(mode=0o700)
            yield rig
        finally:
            # Before the rig removes the directory; whoever still runs there keeps the disk until it ends.
            subprocess.run(["umount", "-l", os.fspath(rig.state)], check=True)


def start_small_node(rig: Rig) -> Site:
    """A node whose journal has 1 MiB of the disk and can get no more, so that there is room for first sessions only."""
    from tests.e2e.test_refused_access import node_without_up

    rig.env["STERNA_NODE_JOURNAL_QUOTA_BYTES"] = str(1024 * 1024)
    rig.start_pod("echo", "cat", kind="stream")
    node_without_up(rig)
    return Site(rig)


def fill(rig: Rig) -> Path:
    """Takes all that is left of the disk."""
    ballast = rig.state / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    return ballast


@AS_ROOT
def test_a_full_disk_stops_no_session(small: Rig) -> None:
    """Sessions go on, also after a lost connection and across the node's own bookkeeping; new ones are refused."""
    site = start_small_node(small)
    attachment, other = os.urandom(16), os.urandom(16)
    with site.client() as raw, site.client() as second:
        accept = raw.connect(attachment=attachment)
        second_accept = second.connect(attachment=other)
        assert raw.echo(b"before", 0) == b"before"
        others = range(2, 18)
        for handle in others:
            second.connect(handle)
        ballast = fill(small)
        # More than the journal's quota has room for, even of the least that each keeps: from somewhere on in memory.
        for handle in others:
            echo_much(second, handle, 0, 4)
        position, told = echo_much(raw, 1, 6, 48)
        assert told == 1
        assert "the session goes on in memory" in said(site)
        assert second.echo(b"also here", 0) == b"also here"
        refuse_new_sessions(site)
        raw.close()
        with site.client(device=raw.device) as again:
            recorded = again.signed(again.resume_body(accept, attachment, output=position))
            again.send(Type.RESUME, 1, 0, recorded)
            answer = again.answer(1)
            assert isinstance(answer, Resumed), answer
            assert again.echo(b"back", position) == b"back"
            # Its counter could not be stored: it is spent all the same.
            wait_for(lambda: has_said(site, "counter not stored"), name="the counter")
            with site.client() as thief:
                thief.send(Type.RESUME, 1, 0, recorded)
                answer = thief.answer(1)
                assert isinstance(answer, Error), answer
                assert answer.code == Code.SUPERSEDED
            assert again.echo(b"still", position + 4) == b"still"
        for handle in (1, *others):
            second.say(Type.CLOSE, handle, messages.Close())
            second.until(Type.CLOSE, handle=handle)
        assert second_accept.uid != accept.uid
        ballast.unlink()
        with site.client() as fresh:
            fresh.connect()
            assert fresh.echo(b"room", 0) == b"room"
    assert small.node is not None
    assert small.node.running
    assert "Traceback" not in said(site)


def echo_much(raw: Raw, handle: int, position: int, count: int) -> tuple[int, int]:
    """Has 32 KiB echoed `count` times; returns where that ends, and how often it was said that the disk fails."""
    chunk, told = os.urandom(32 * 1024), 0
    for _ in range(count):
        raw.send(Type.DATA, handle, position, chunk)
        got = b""
        while len(got) < len(chunk):
            kind, _, _, payload = raw.until(Type.DATA, Type.EVENT, handle=handle)
            if kind == Type.EVENT:
                told += messages.unpack(Event, payload).kind == "storage"
            else:
                got += payload
        assert got == chunk
        position += len(chunk)
        raw.send(Type.ACK, handle, position, position.to_bytes(8, "big"))
    return position, told


def refuse_new_sessions(site: Site) -> None:
    """A stranger's device and a known one: a sentence that names the disk, and no session left behind."""
    with site.client() as new:
        answer = new.ask(name="nowhere")
        assert isinstance(answer, Error), answer
        assert answer.code == Code.STORAGE
        assert re.search(r"disk|journal", answer.message), answer
        assert answer.message.endswith(".")
    done = site.rig.sterna("ls", env={"STERNA_STATE": os.fspath(site.rig.state)})
    assert "nowhere" not in done.stdout, done


@AS_ROOT
def test_a_disk_without_room_for_a_journal_is_named_at_once(small: Rig) -> None:
    done = small.sterna("up", "--no-web", "--port", str(small.port), "--state", os.fspath(small.state))
    assert done.returncode == 1
    assert "free some space" in sentence(done.stderr)


@AS_ROOT
def test_the_command_line_says_what_is_wrong_with_the_disk(small: Rig) -> None:
    site = start_small_node(small)
    ballast = fill(small)
    request = os.urandom(16)
    for _ in range(2):
        with site.client() as raw:
            answer = raw.ask(request=request, name="again")
            assert isinstance(answer, Error)
            assert answer.code == Code.STORAGE, answer
    # A client without room for its own key says that; one that has a key passes the node's sentence on.
    done = small.sterna("new", "echo")
    assert done.returncode == 1
    assert "device.key cannot be written: No space left" in sentence(done.stderr)
    start = time.monotonic()
    env = {"STERNA_STATE": "", "STERNA_TOKEN": site.token}
    done = small.sterna("new", "echo", "--host", "127.0.0.1", "--port", str(small.port), env=env)
    assert done.returncode == 1, done
    assert "is full" in sentence(done.stderr)
    assert time.monotonic() - start < 5
    ballast.unlink()
    with site.client() as raw:
        raw.connect(request=request, name="again")  # control: with room it is what it is


# ---- other users of the machine --------------------------------------------------------------------------------


def test_everything_on_disk_is_private(site: Site) -> None:
    """State of node, client and agents, sockets and logs: 0700 and 0600, nothing wider, whatever the umask."""
    done = site.rig.sterna("ls")
    assert done.returncode == 0, done.stderr
    seen = 0
    for root in (site.rig.state, site.rig.directory / "x", site.rig.directory / "c"):
        for folder, names, files in os.walk(root):
            for name in (*names, *files):
                path = os.path.join(folder, name)
                mode = os.lstat(path).st_mode
                assert not stat.S_IMODE(mode) & 0o077, f"{path} has mode {stat.S_IMODE(mode):o}"
                seen += 1
    assert seen > 15


@pytest.mark.parametrize("mask", [0o000, 0o027, 0o077])
def test_the_umask_does_not_matter(mask: int) -> None:
    with Rig() as rig:
        rig.sockets.rmdir()
        rig.state.rmdir()
        start = rig.words("up", "--json", "--no-web", "--port", str(rig.port))
        words = ["sh", "-c", f'umask {mask:o}; exec "$@"', "sh", *start]
        with (rig.directory / "err").open("wb") as err:
            process = subprocess.Popen(
                [*words, "--state", os.fspath(rig.state), "cat"], env=rig.env, stdout=subprocess.PIPE, stderr=err
            )
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith(b"{"), (rig.directory / "err").read_text()
            for folder, names, files in os.walk(rig.state):
                for name in (*names, *files):
                    path = os.path.join(folder, name)
                    mode = stat.S_IMODE(os.lstat(path).st_mode)
                    wanted = 0o700 if stat.S_ISDIR(os.lstat(path).st_mode) else 0o600
                    assert mode == wanted, f"{path} has mode {mode:o}"
        finally:
            rig.sterna("down", env={"STERNA_STATE": os.fspath(rig.state)})
            process.terminate()
            process.wait(10)
            process.stdout.close()


@AS_ROOT
def test_other_users_get_at_nothing(site: Site) -> None:
    """As `nobody`: neither socket can be connected to, no file read, and the node says so without a word."""
    program = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    try:
        s = socket.socket(socket.AF_UNIX); s.settimeout(3); s.connect(path); s.sendall(b"x"); print("open", path)
    except PermissionError: pass
    try: print("read", path, open(path, "rb").read(1))
    except OSError: pass
"""
    paths = [site.socket, os.fspath(site.rig.sockets / "local_echo")]
    paths += [os.path.join(site.state, name) for name in os.listdir(site.state)]
    # So that not only the parents' modes protect them.
    opened = [site.rig.directory, site.rig.state, site.rig.state / "node", site.rig.sockets]
    modes = [path.stat().st_mode for path in opened]
    try:
        for path in opened:
            path.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    finally:
        for path, mode in zip(opened, modes, strict=True):
            path.chmod(stat.S_IMODE(mode))
    assert done.stdout == ""


@AS_ROOT
def test_the_node_checks_who_is_at_its_own_socket(site: Site) -> None:
    """Even with the socket's mode wide open another user is turned away (SO_PEERCRED)."""
    program = f"""
import os, socket
s = socket.socket(socket.AF_UNIX); s.settimeout(5)
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); s.connect({site.socket!r}); print(len(s.recv(100)))
"""
    opened = [site.rig.directory, site.rig.state, site.rig.state / "node", Path(site.socket)]
    modes = [path.stat().st_mode for path in opened]
    try:
        for path in opened:
            path.chmod(0o777 if path == opened[-1] else 0o755)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    finally:
        for path, mode in zip(opened, modes, strict=True):
            path.chmod(stat.S_IMODE(mode))
    assert done.stdout == "0\n"


def test_no_secret_in_arguments_environment_or_logs(site: Site) -> None:
    """The local token, the keys' seeds, an access token and a ticket that were used stand only in their files."""
    with site.client() as owner:
        owner.connect(want="call")
        session = owner.connect(handle=2)
        ticket = owner.call("share", session=session.name, ttl=60)["ticket"]
        token = owner.call("token", tenant="local")["token"]
        for credential, want in ((ticket, "join"), (token, "new"), (ticket + "x", "new"), (token[:-1], "new")):
            with site.client(credential=credential) as raw:
                raw.ask(want=want)
        site.rig.sterna("attach", "echo", env={"STERNA_TOKEN": token}, typed="")
        secrets = [site.token, ticket, token, token.split(".")[2]]
        for name in ("token.key", "node-ca.pem"):
            secrets += [line for line in Path(site.state, name).read_text().split() if len(line) > 40]
        assert site.rig.node is not None
        pids = [site.rig.node.pid, *(pod.pid for pod in site.rig.pods.values())]
        pids += [child for pid in list(pids) for child in _children(pid)]
        texts = {
            f"{pid}/{name}": Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in ("cmdline", "environ")
        }
        texts |= {path.name: path.read_bytes() for path in site.rig.directory.glob("*.log")}
        texts |= {path.name: path.read_bytes() for path in site.rig.directory.glob("*.out")}
        for where, text in texts.items():
            for secret in secrets:
                assert secret.encode() not in text, f"a secret stands in {where}"
        database = b"".join(path.read_bytes() for path in Path(site.state).glob("node.db*"))
        for secret in (site.token, ticket, token):
            assert secret.encode() not in database, "a secret stands in the database"
        assert len(texts) > 6


def test_no_secret_in_the_metrics() -> None:
    from tests.e2e.test_refused_access import node_without_up

    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        port = free_port()
        node_without_up(rig, "--metrics-port", str(port))
        site = Site(rig)
        with site.client() as raw:
            accept = raw.connect()
            ticket = raw.call("share", session=accept.name, ttl=60)["ticket"]
            assert raw.echo(b"typed text", 0) == b"typed text"
            with site.client(credential=ticket) as guest:
                guest.connect(want="join")
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
        assert "sterna" in text
        for secret in (site.token, ticket, "typed text", accept.uid.hex(), raw.device.id.hex()):
            assert secret not in text
