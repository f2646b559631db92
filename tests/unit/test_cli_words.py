"""What is said to the user and typed again: names, options that a node has no use for, and where nobody listens."""

from __future__ import annotations

import errno
import os
import pwd
import select
import socket
from typing import Any

import click
import pytest

from sterna.cli import attaching, ssh
from sterna.cli.attach import attach
from sterna.cli.attaching import Arguments
from sterna.cli.target import _default_agent
from sterna.client.attach import Attach, AttachOptions
from sterna.client.dialling import Dialling
from sterna.client.remote import Remote, Target
from sterna.client.session import device_label
from sterna.errors import UsageError
from sterna.units import SECOND


def test_a_device_has_the_users_name_without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    assert device_label().startswith(pwd.getpwuid(os.getuid()).pw_name + "@")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert device_label().startswith(f"{os.getuid()}@"), "who is in no list of users has a number"


def test_without_main_another_agent_is_to_be_named() -> None:
    agents = [{"name": "b"}, {"name": "a"}]
    with pytest.raises(UsageError, match=r"main is not running: `sterna up` starts it; else name one of a, b"):
        _default_agent(agents)
    assert _default_agent(agents[:1]) == "b"
    assert _default_agent([*agents, {"name": "main"}]) == "main"


def test_what_comes_back_over_ssh_repeats_how_it_got_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "program", lambda: ["sterna"])
    monkeypatch.delenv("STERNA_SSH", raising=False)
    options = ["--ssh", "ssh -F x", "--via-ssh", "--remote-sterna", "/opt/s"]
    with attach.make_context("attach", ["me@lab", "--port", "7", *options]) as context, context:
        again = attaching._again(Arguments(context.params))
    assert again == "sterna attach me@lab --via-ssh --remote-sterna /opt/s --ssh 'ssh -F x' --port 7 --name NAME"
    with attach.make_context("attach", ["me@lab"]) as context, context:
        assert attaching._again(Arguments(context.params)) == "sterna attach me@lab --name NAME"
    assert attaching._again(Arguments({"target": "me@lab"})) == "sterna attach me@lab --name NAME"


@pytest.mark.parametrize("started", [False, True])
def test_a_node_that_runs_already_takes_no_port(started: bool, capsys: pytest.CaptureFixture[str]) -> None:
    remote = Remote([], 7220, "", "", "", 0, host="10.0.0.1", started=started)
    target = Target("me@lab")
    ssh._tell_unused(target, remote, {"listen": "10.0.0.1"}, 7220)
    ssh._tell_unused(target, remote, {"listen": None}, None)
    assert capsys.readouterr().err == ""
    ssh._tell_unused(target, remote, {"listen": "0.0.0.0"}, 7)  # noqa: S104 -- nothing is bound
    said = (
        "sterna: The node on lab runs already on port 7220; --port is not used.\n"
        "sterna: The node on lab runs already on 10.0.0.1 port 7220; --listen is not used.\n"
    )
    assert capsys.readouterr().err == ("" if started else said)


class Nothing:
    """A machine and an endpoint of one address where nobody listens."""

    name = "lab:7"

    def __init__(self, address: tuple[int, Any]) -> None:
        self.addresses = [address]
        self.reason = ""

    def dial_failed(self, _number: int, _now: int, *, reason: str, **_: bool) -> None:
        self.reason = reason


def test_where_the_machine_answers_and_no_node_the_time_is_counted() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        nothing: Any = Nothing((socket.AF_INET, server.getsockname()))
        dialling = Dialling(nothing, nothing)

        def dial() -> None:
            sock = dialling.begin(1)
            if sock is not None:
                with sock:
                    assert select.select([], [sock], [], 5)[1]
                    dialling.connected(1, sock)

        assert dialling.refused_since == 0
        dial()
        first = dialling.refused_since
        assert first > 0
        assert "is `sterna up` running there, and is the port right?" in nothing.reason
        dial()
        assert dialling.refused_since == first
        dialling._failed(1, errno.EHOSTUNREACH)
        assert dialling.refused_since == 0, "the machine does not answer any more"
        dial()
        server.listen()
        dial()
        assert dialling.refused_since == 0


@pytest.mark.parametrize(("starts", "hint"), [(True, "~. and `again x`"), (False, "`sterna up` there starts one")])
def test_the_status_line_says_what_to_do_where_no_node_is(starts: bool, hint: str) -> None:
    class Stub:
        absent = ""
        seconds = 9

        def next_timeout(self) -> int:
            return 0

        def size(self) -> tuple[int, int]:
            return 80, 24

        def handle_timeout(self, *_: int) -> bytes:
            return b""

        def refused_for(self, _now: int) -> int:
            return self.seconds * SECOND

    stub = Stub()
    run: Any = Attach.__new__(Attach)
    run._status = run._terminal = run._driver = stub
    run._queue, run._name, run._options = (), "x", AttachOptions()
    run._options.again, run._options.starts = "again NAME", starts
    run._tick()
    assert stub.absent == ""
    stub.seconds = 10
    run._tick()
    assert stub.absent.startswith(hint)
    stub.seconds = 0
    run._tick()
    assert stub.absent == ""


def test_what_looks_like_an_option_is_no_command_but_while_the_shell_completes() -> None:
    from sterna.cli.sessions import new

    with pytest.raises(click.NoSuchOption):
        new.make_context("new", ["--nmae"])
    assert new.make_context("new", ["--nmae"], resilient_parsing=True).params["command"] == ("--nmae",)
    assert new.make_context("new", ["-", "-x"]).params["command"] == ("-", "-x")
