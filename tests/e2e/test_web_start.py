"""The web page as `sterna up` starts it: its port, the link on a terminal, and what `share` says of it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import sys

import pytest

from sterna.cli.access import own_address
from sterna.node.config import WEB_PORT
from sterna.protocol import messages
from sterna.trust.links import parse_link
from tests.e2e.rig import Daemon, Rig, free_port, wait_for
from tests.e2e.test_web import ANY, Web, answers, started

pytestmark = pytest.mark.xdist_group("web")
# The clients here are started as a module, which only counts where `sterna` is not in the PATH.
PROGRAM = "sterna" if shutil.which("sterna") else shlex.join([sys.executable, "-m", "sterna"])


def test_a_port_in_use_is_said_and_the_usual_one_is_left_to_its_owner() -> None:
    with Rig() as rig, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = rig.sterna("up", "--port", str(rig.port), "--web-port", port)
        assert done.returncode == 2
        assert done.stderr.strip().endswith(
            f"No web page: Port {port} on 127.0.0.1 is in use; stop what listens there or choose another with "
            "--web-port, or leave it out with --web-port 0."
        )
        same = rig.sterna("up", "--port", str(rig.port), "--web-port", str(rig.port))
        assert same.returncode == 2
        assert "cannot share port" in same.stderr
        assert rig.start_node("--no-web")["url"] is None


def test_a_usual_port_that_is_another_ones_is_said_in_one_line() -> None:
    with Rig() as rig, socket.socket() as other:
        rig.start_pod()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody has it: as good
            other.bind(("127.0.0.1", WEB_PORT))
            other.listen()
        log = rig.directory / "node.log"
        words = rig.words("up", "--json", "--port", str(rig.port), "--log-level", "error")
        node = rig.node = Daemon(words, rig.env, log)
        wait_for(node.first_line, name="the node")
        assert json.loads(node.first_line())["url"] is None
        assert node.output().splitlines()[-1] == (
            f"sterna: There is no web page: port {WEB_PORT} on 127.0.0.1 is in use; stop what listens there or choose "
            "another with --web-port."
        )


def test_up_gives_a_terminal_a_link_to_all_sessions_and_a_log_none() -> None:
    with Rig() as rig:
        rig.start_pod()
        port = free_port()
        options = ("--port", str(rig.port), "--web-port", str(port), "--state", os.fspath(rig.state))
        for host in ("127.0.0.1", ANY):
            up = rig.terminal("up", *options, "--host", host, cols=300)
            up.expect("The log is in")
            seen = up.seen.decode()
            link = parse_link(next(line.strip() for line in seen.splitlines() if line.startswith("    https://")))
            away = host == ANY and own_address() is not None
            assert link.host == (own_address() if away else "127.0.0.1")
            assert (link.port, link.session_port, link.session, link.mode) == (port, rig.port, None, "drive")
            assert (seen.count("█") > 200) is away
            ports = f"--port {rig.port} --web-port {port} --state {rig.state}"
            again = f"Ctrl-C here, then `{PROGRAM} up --host 0.0.0.0 {ports}`"
            assert (again in seen) is not away
            assert f"  {PROGRAM} attach --state {rig.state}" in seen, "without the state it would be another node"
            assert f"`{PROGRAM} down --state {rig.state}` stops all" in seen
            web = Web(rig, port)
            assert link.ticket is not None
            with web.client(credential=link.ticket) as raw:
                assert raw.connect(agent="main", cols=80, rows=24).agent == "main"
            with web.client(credential=link.ticket) as raw:
                assert isinstance(raw.ask(want="call"), messages.Error), "it is another device's"
            up.process.send_signal(signal.SIGTERM if host == ANY else signal.SIGINT)
            ended = f"has stopped, the programs go on; `{PROGRAM} down --state {rig.state}` ends them."
            up.expect(
                f"from elsewhere, as by `sterna down`; `{PROGRAM} up --host {ANY} {ports}` starts it again."
                if host == ANY
                else ended
            )
            assert up.wait() == 0
        for more in ((), ("--json",)):
            node = rig.node = Daemon(rig.words("up", *options, *more), rig.env, rig.directory / "plain.log")
            wait_for(node.first_line, name="the node")
            wait_for(functools.partial(answers, port), name="its web port")
            assert node.stop() == 0
            told = node.log.with_suffix(".out").read_text() + node.output()
            assert f"https://127.0.0.1:{port}/" in told
            assert "#t=" not in told


def test_share_gives_a_link_for_browsers_with_the_ticket_in_the_fragment() -> None:
    with started() as web:
        rig = web.rig
        assert rig.about["url"] == f"https://127.0.0.1:{web.port}/"
        name = rig.json("new")["name"]
        shared = rig.json("share", name, "--local")
        assert shared["web"].startswith(f"https://127.0.0.1:{web.port}/#t=")
        terminal, link = parse_link(shared["link"]), parse_link(shared["web"])
        assert (link.port, link.session_port) == (web.port, rig.port)
        for field in ("host", "ticket", "node_id", "session", "agent", "mode", "session_port"):
            assert getattr(link, field) == getattr(terminal, field)
        before = shared["web"].partition("#")[0]
        assert link.ticket is not None
        assert link.ticket not in before
        with web.client(credential=link.ticket) as raw:
            accept = raw.connect(want="join", uid=link.session, agent="main", exact=False, cols=80, rows=24)
            assert accept.uid == link.session
        proxied = rig.sterna("share", name, "--host", "term.example", "--web-port", "443", "--json")
        assert '"https://term.example:443/#t=' in proxied.stdout
        refused = rig.sterna("share", name)
        assert refused.returncode == 2
        assert "another device cannot reach" in refused.stderr
        assert "--tls-cert" in refused.stderr
        seen = rig.terminal("share", name, "--local", cols=160)
        assert seen.wait() == 0
        assert f"    https://127.0.0.1:{web.port}/#t=".encode() in seen.seen
        assert "█".encode() not in seen.seen, "a camera is another device's"
