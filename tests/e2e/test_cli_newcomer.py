"""What somebody new to it meets: a second start, stopping and coming back, streams, and what is typed wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.rig import SOURCE, Rig, free_port, running, wait_for

# What to type again: the clients here are started as a module, which only counts where `sterna` is not in the PATH.
PROGRAM = "sterna" if shutil.which("sterna") else shlex.join([sys.executable, "-m", "sterna"])


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as found:
        yield found
        found.sterna("down")  # the agent that a second `up` began goes, too


def said(rig: Rig, status: int, *args: str, typed: str = "", env: dict[str, str] | None = None) -> str:
    """The one sentence of a command that must fail with a status."""
    done = rig.sterna(*args, typed=typed, env=env)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.startswith("sterna: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


# ---- starting, stopping, starting again -------------------------------------------------------------------------


def test_a_second_start_names_the_first_and_another_agent_joins_it(rig: Rig) -> None:
    assert rig.node is not None
    first = f"A node runs here already (pid {rig.node.pid}, port {rig.port}): "
    here = f"`sterna attach --state {rig.state}`, or stop it with `sterna down --state {rig.state}`"
    assert first + here in said(rig, 2, "up", "--port", "0")
    again = said(rig, 2, "up", "--port", "0", "--host", "0.0.0.0")  # noqa: S104 -- nothing is bound
    assert first + "stop it with Ctrl-C where it runs" in again
    assert "down" not in again, "that would end the programs, too"
    assert first.split(",", maxsplit=1)[0] in said(rig, 2, "node", "--state", os.fspath(rig.state / "node"), "-p", "0")
    assert rig.sterna("ls").returncode == 0, "the first one was not harmed"
    done = rig.sterna("up", "--agent", "second", "--port", str(free_port()), "--", "cat")
    unused = f"sterna: The node runs already on 127.0.0.1 port {rig.port}; --port is not used.\n"
    assert (done.returncode, done.stderr) == (0, unused)
    assert f"The node runs already (pid {rig.node.pid})." in done.stdout
    assert "sterna attach second" in done.stdout
    wait_for(lambda: "second" in [agent["name"] for agent in rig.json("ls")["agents"]], name="the second agent")


def test_after_down_there_is_a_new_shell_and_the_old_ones_say_why_they_ended() -> None:
    with running() as rig:
        assert rig.sterna("new", "--name", "old").returncode == 0
        assert rig.sterna("new", "--name", "older").returncode == 0
        done = rig.sterna("down")
        assert done.returncode == 0
        wait_for(lambda: rig.node is not None and not rig.node.running, name="the node's end")
        rig.pods["main"].process.wait(20)
        rig.start_node()
        listed = {session["name"]: session for session in rig.json("ls")["sessions"]}
        assert {name: each["state"] for name, each in listed.items()} == {"old": "exited", "older": "exited"}
        assert all("`sterna down`" in each["reason"] for each in listed.values())
        terminal = rig.terminal("attach")
        terminal.expect("2 ended sessions kept their last output: `sterna ls`")
        terminal.expect("$ ")
        terminal.type("echo fresh-$((1 + 1)); exit\n")
        terminal.expect("fresh-2")
        assert terminal.wait() == 0
        assert b"sterna: The session main ended.\r\n" in terminal.seen
        for how, said_, status in (("exit 7", "with status 7", 7), ("kill -9 $$", "by signal 9", 137)):
            terminal = rig.terminal("attach", "--new")
            terminal.expect("$ ")
            terminal.type(how + "\n")
            assert terminal.wait() == status
            assert f"sterna: The session main ended {said_}.\r\n".encode() in terminal.seen
        assert "use --ended alone" in said(rig, 2, "close")
        assert sorted(rig.sterna("close", "--ended").stdout.split()) == ["Closed", "Closed", "old.", "older."]
        assert rig.sterna("close", "--ended").stdout == "No session has ended.\n"


def test_sessions_of_an_agent_that_was_replaced_while_no_node_ran_are_over() -> None:
    with running() as rig:
        assert rig.sterna("new", "--name", "old").returncode == 0
        rig.kill_node()
        rig.kill_pod()
        rig.start_node()
        done = rig.sterna("pipe", "--pty", typed="echo fresh-$((1 + 1)); exit 4\n")
        assert (done.returncode, "fresh-2" in done.stdout) == (4, True), done


def test_up_on_a_terminal_logs_to_a_file_and_says_what_it_found() -> None:
    with running() as rig:
        assert rig.sterna("new", "--name", "found").returncode == 0
        rig.stop_node()
        options = ("--no-web", "--port", str(rig.port), "--state", os.fspath(rig.state))
        up = rig.terminal("up", *options, "--", "cat", cols=200)
        up.expect(f"(pid {up.process.pid}, ")
        up.expect("The agent 'main' goes on with `bash --norc --noprofile`; `")
        up.expect(f"down --state {rig.state}` first to change it.")
        up.expect("1 session found again.")
        log = rig.state / "node.log"
        up.expect(f"The log is in {log}.")
        assert rig.sterna("ls").stdout.startswith("found\t")
        up.process.send_signal(signal.SIGINT)
        assert up.wait() == 0
        assert b'"message"' not in up.seen
        assert json.loads(log.read_text().splitlines()[0])["message"]
        assert log.stat().st_mode & 0o777 == 0o600


def test_up_says_what_cannot_be_before_anything_is_started(rig: Rig) -> None:
    env = {"STERNA_STATE": os.fspath(rig.directory / "never")}
    missing = "sterna: The command 'nosuchprog' was not found: check its spelling and PATH.\n"
    assert said(rig, 1, "up", "--", "nosuchprog", env=env) == missing
    assert said(rig, 1, "up", "--agent", "bad", "--", "nosuchprog") == missing
    assert said(rig, 1, "pod", "--agent", "bad", "--", "nosuchprog") == missing
    assert said(rig, 1, "new", "--", "nosuchprog") == missing
    assert "no agent name" in said(rig, 2, "up", "--agent", "a b", env=env)
    nowhere = said(rig, 2, "up", "--host", "192.0.2.1", "--port", "0", "--web-port", str(free_port()), env=env)
    assert "Cannot listen on 192.0.2.1: " in nowhere
    assert "--host" in nowhere
    assert "--web-port" not in nowhere
    assert not (rig.directory / "never" / "agent-main.log").exists()


def test_make_leaves_nothing_of_its_own_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sterna").write_text('#!/bin/sh\necho "args $*"; env\n')
    (tmp_path / "bin" / "sterna").chmod(0o755)
    for stamp in (".made", ".runtime"):
        (tmp_path / stamp).touch()
    env = {"PATH": os.environ["PATH"], "MINE": "1"}
    words = ["make", "-s", "-C", os.fspath(SOURCE.parent), "run", f"VENV={tmp_path}", "ARGS=--port 1 -- 'a b'"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=30, check=False)
    args, *rest = done.stdout.splitlines()
    assert args == "args up --port 1 -- a b", done
    assert {line.split("=")[0] for line in rest} - {"_", "PWD", "OLDPWD", "SHLVL"} == set(env)


# ---- which node -------------------------------------------------------------------------------------------------


def test_a_port_alone_means_this_machine(rig: Rig) -> None:
    done = rig.sterna("ls", "--port", str(rig.port))
    assert (done.returncode, done.stderr) == (0, "")
    wrong = said(rig, 1, "ls", "--port", str(free_port()))
    assert wrong.startswith("sterna: The node at 127.0.0.1:")
    assert wrong.endswith("Connection refused; is `sterna up` running there, and is the port right?\n")


def test_the_nodes_own_directory_is_a_state_as_well(rig: Rig) -> None:
    done = rig.sterna("ls", "--state", os.fspath(rig.state / "node"))
    assert (done.returncode, done.stderr) == (0, "")


def test_first_use_is_announced_and_another_node_is_named_with_fingerprints(rig: Rig) -> None:
    token = rig.sterna("token").stdout.strip()
    env = {"STERNA_STATE": os.fspath(rig.directory / "abroad"), "STERNA_TOKEN": token}
    address = ["--host", "127.0.0.1", "--port", str(rig.port)]
    fingerprint = rig.about["fingerprint"]
    first = rig.sterna("ls", *address, env=env)
    assert first.stderr == f"sterna: Trusting 127.0.0.1:{rig.port} on first use, fingerprint {fingerprint}.\n"
    assert rig.sterna("ls", *address, env=env).stderr == ""
    with running() as other:
        wrong = said(rig, 1, "ls", "--port", str(other.port))
        assert fingerprint in wrong
        assert other.about["fingerprint"] in wrong
        assert "share link or set STERNA_TOKEN" in wrong


def test_what_is_no_node_is_said_in_one_sentence(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                peer, _ = server.accept()
                with peer:
                    peer.sendall(b"SSH-2.0-none\r\n")
                    peer.recv(4_096)

        thread = threading.Thread(target=answer)
        thread.start()
        port = server.getsockname()[1]
        wanted = f"sterna: What listens at 127.0.0.1:{port} does not answer as a Sterna node: check host and port.\n"
        assert said(rig, 1, "ls", "--port", str(port)) == wanted
        env = {"STERNA_STATE": os.fspath(rig.directory / "nowhere"), "STERNA_TOKEN": "x" * 40}
        assert said(rig, 1, "ls", "--host", "127.0.0.1", "--port", str(port), env=env) == wanted
        thread.join()


def test_a_link_that_the_shell_has_cut_is_to_be_quoted(rig: Rig) -> None:
    assert rig.sterna("new", "--name", "cut").returncode == 0
    shared = json.loads(rig.sterna("share", "cut", "--host", "192.0.2.1", "--json").stdout)
    assert "quote it" in said(rig, 2, "attach", shared["link"].split("&")[0].split("?")[0])


def test_a_link_need_not_stand_where_other_users_read_it(rig: Rig) -> None:
    assert rig.sterna("new", "--name", "unseen").returncode == 0
    shared = json.loads(rig.sterna("share", "unseen", "--host", "192.0.2.1", "--json").stdout)
    link = shared["link"].replace("192.0.2.1", "127.0.0.1")
    env = {"STERNA_STATE": os.fspath(rig.directory / "unseen")}
    guest = rig.terminal("attach", "-", env=env)
    guest.expect("Share link: ")
    guest.type(link + "\n")
    guest.expect("$ ")
    guest.type("\n~d")
    guest.expect(f"sterna: Detached from unseen; `{PROGRAM} attach -` comes back.\r\n")
    assert guest.wait() == 0
    assert link.encode() not in guest.seen
    done = rig.sterna("info", "-", "--json", typed=link + "\n", env=env)
    assert (done.returncode, json.loads(done.stdout)["name"]) == (0, "unseen"), done
    done = rig.sterna("pipe", "-", typed=link + "\necho got-$((1 + 1)); exit 3\n", env=env)
    assert (done.returncode, "got-2" in done.stdout) == (3, True), done
    assert "no share link" in said(rig, 2, "attach", "-", typed="nonsense\n")
    assert "longer than" in said(rig, 2, "info", "-", typed="x" * 5_000)


def test_an_access_for_looking_on_says_so(rig: Rig) -> None:
    token = rig.sterna("token", "--modes", "watch").stdout.strip()
    env = {"STERNA_STATE": os.fspath(rig.directory / "looking"), "STERNA_TOKEN": token}
    assert rig.sterna("ls", "--port", str(rig.port), env=env).returncode == 0
    assert "for looking on only" in said(rig, 1, "new", "--agent", "main", "--port", str(rig.port), env=env)


# ---- pipes ------------------------------------------------------------------------------------------------------


def test_a_pipe_feeds_no_shell_by_surprise(rig: Rig) -> None:
    assert rig.sterna("new", "--name", "main").returncode == 0
    before = rig.json("info", "main")["output"]
    for words in (["pipe"], ["pipe", "main"]):
        error = said(rig, 2, *words, typed="touch surprise\n")
        assert "`sterna pod --agent sort --kind stream -- sort`" in error
    assert not (rig.directory / "surprise").exists()
    assert rig.json("info", "main")["output"] - before < 100
    rig.start_pod("sort", "sort", kind="stream")
    wait_for(lambda: "sort" in [agent["name"] for agent in rig.json("ls")["agents"]], name="the agent")
    done = rig.sterna("pipe", "sort", typed="b\na\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\nb\n", "")
    typed = rig.sterna("pipe", "main", "--new", typed="exit 5\n")
    assert typed.returncode == 5, "an agent and --new are explicit enough"
    assert rig.sterna("pipe", "main", "--name", "other", typed="exit 6\n").returncode == 6


# ---- what is typed wrong ----------------------------------------------------------------------------------------


def test_wrong_use_is_one_sentence_and_a_near_miss_is_named(rig: Rig) -> None:
    assert said(rig, 2, "atach").startswith("sterna: There is no command 'atach': did you mean `sterna attach`?")
    assert "`sterna ls --help`" in said(rig, 2, "ls", "--nonsense")
    assert "Missing argument" in said(rig, 2, "rename", "a")
    assert "'--hots'. (Did you mean one of: '--host'" in said(rig, 2, "up", "--agent", "third", "--hots", "1")
    assert "No such option '--nmae'" in said(rig, 2, "new", "--nmae=x", "--agent", "main", "--", "cat")
    assert "Did you mean '--kind'?" in said(rig, 2, "pod", "--agent", "x", "--knid", "stream", "--", "sort")
    assert "The command '--nmae' was not found" in said(rig, 1, "new", "--", "--nmae"), "that is its name"
    assert "third" not in rig.sterna("ls", "--json").stdout
    assert "nosuchfile cannot be read" in said(rig, 1, "play", "nosuchfile")


def test_the_examples_say_how_they_are_used(rig: Rig) -> None:
    import sys

    from tests.e2e.test_cli_sessions import EXAMPLES

    for name, words in (("run_command.py", ["nobody", "true"]), ("ask_shell.py", []), ("watch_for.py", ["none", "x"])):
        done = subprocess.run(
            [sys.executable, os.fspath(EXAMPLES / name), *words], env=rig.env, capture_output=True, text=True,
            timeout=30, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


def test_a_session_is_not_offered_to_itself() -> None:
    with running() as rig:
        assert rig.sterna("new", "--name", "own").returncode == 0
        env = {"STERNA_SESSION_UID": rig.json("info", "own")["uid"]}
        inside = rig.terminal("attach", "own", env=env)
        assert inside.wait() == 1
        text = b"sterna: This terminal is in the session own already: a session cannot show itself.\r\n"
        assert bytes(inside.seen).endswith(b"\n" + text)
        assert rig.sterna("new", "--name", "other").returncode == 0
        asked = rig.terminal("attach", env=env)
        asked.expect("Which session")
        assert b"other" in asked.seen
        assert b"own " not in asked.seen
        asked.type("q\n")
        assert asked.wait() == 130


def test_a_link_lives_no_longer_than_a_month(rig: Rig) -> None:
    assert "choose another --ttl" in said(rig, 2, "share", "--host", "192.0.2.1", "--ttl", "60d")


def test_leaving_says_how_to_come_back_and_begins_its_own_line_only_where_needed(rig: Rig) -> None:
    failed = rig.terminal("attach", "--name", "x", "nobody")
    assert failed.wait() == 1
    assert bytes(failed.seen).replace(b"\r\n", b"").startswith(b"sterna: There is no agent 'nobody'"), failed.seen
    assert rig.sterna("new", "--name", "left").returncode == 0
    shared = json.loads(rig.sterna("share", "left", "--host", "192.0.2.1", "--json").stdout)
    link = shared["link"].replace("192.0.2.1", "127.0.0.1")
    env = {"STERNA_STATE": os.fspath(rig.directory / "guest")}
    for _ in range(2):
        guest = rig.terminal("attach", link, env=env)
        guest.expect("$ ")
        guest.type("\n~d")
        guest.expect(f"\r\nsterna: Detached from left; `{PROGRAM} attach 'LINK'` comes back.\r\n")
        assert guest.wait() == 0
