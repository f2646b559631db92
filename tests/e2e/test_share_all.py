"""Links for all sessions, and how long a link is good for the device that used it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sterna.client.blocking import connect
from sterna.errors import Code, RefusedError
from sterna.protocol.messages import Error
from sterna.trust.links import parse_link
from tests.e2e.raw_client import Site, new_device
from tests.e2e.rig import Rig, wait_for

pytestmark = pytest.mark.xdist_group("share-all")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        for name in ("first", "second"):
            assert rig.sterna("new", "--name", name).returncode == 0
        yield rig


class Guest:
    """Another device with a link for all sessions."""

    def __init__(self, rig: Rig, name: str, *flags: str) -> None:
        self.rig = rig
        self.shared = rig.json("share", "--all", "--local", *flags)
        self.link = str(self.shared["link"])
        ticket = parse_link(self.link).ticket
        assert ticket is not None
        self.env = {"STERNA_STATE": os.fspath(rig.directory / name)}
        self._reach = {**self.env, "STERNA_TOKEN": ticket}

    def sterna(self, *words: str) -> subprocess.CompletedProcess[str]:
        where = ("--host", "127.0.0.1", "--port", str(self.rig.port))
        return self.rig.sterna(*words, *where, env=self._reach)


def names(rig: Rig) -> set[str]:
    return {session["name"] for session in rig.json("ls")["sessions"]}


def test_a_link_for_all_sessions_lists_attaches_and_begins_new_ones(rig: Rig) -> None:
    guest = Guest(rig, "guest")
    link = parse_link(guest.link)
    assert (link.session, link.agent, link.mode) == (None, None, "drive")
    assert [guest.shared[key] for key in ("session", "name", "agent", "mode")] == [None, None, None, "drive"]
    terminal = rig.terminal("attach", guest.link, env=guest.env)
    terminal.expect("Which session")
    terminal.type("second\n")
    terminal.expect("$ ")
    terminal.type("echo in-$((40+2))\r")
    terminal.expect("in-42")
    assert "in-42" in rig.sterna("capture", "second").stdout
    named = rig.terminal("attach", guest.link, "--name", "third", env=guest.env)
    named.expect("$ ")
    fresh = rig.terminal("attach", guest.link, "--new", env=guest.env)
    fresh.expect("$ ")
    assert {"first", "second", "third"} < names(rig)
    assert len(names(rig)) == 4
    listed = guest.sterna("ls")
    assert {line.split("\t")[0] for line in listed.stdout.splitlines()} == names(rig)
    assert guest.sterna("rename", "third", "fourth").returncode == 0
    assert guest.sterna("close", "fourth").returncode == 0
    assert not {"third", "fourth"} & names(rig)
    state = guest.env["STERNA_STATE"]
    with connect(guest.link, agent="echo", new=True, state=state) as session:
        session.write(b"hello")
        assert session.read(5) == b"hello"


def test_the_holder_of_such_a_link_rules_over_nobody(rig: Rig) -> None:
    guest = Guest(rig, "no-owner")
    assert guest.sterna("ls").returncode == 0
    for words in (("devices",), ("revoke", "0" * 16), ("token",)):
        done = guest.sterna(*words)
        assert done.returncode == 1, words
        assert "needs a token" in done.stderr or "Only the user whose node this is" in done.stderr
    site = Site(rig)
    ticket = parse_link(guest.link).ticket
    with site.client(credential=ticket, device=new_device()) as other:
        assert isinstance(other.ask(want="call"), Error), "it is another device's"
    ticket = parse_link(Guest(rig, "raw").link).ticket
    with site.client(credential=ticket) as raw:
        raw.connect(want="call")
        for params in ({"all": True}, {"session": "first"}):
            assert raw.call("share", **params).message == "A share link cannot be shared on; ask who gave it to you."


def test_a_link_to_watch_all_sessions_begins_and_changes_none(rig: Rig) -> None:
    guest, before = Guest(rig, "watcher", "--watch"), names(rig)
    assert guest.shared["mode"] == "watch"
    assert "first" in guest.sterna("capture", "first").stdout or guest.sterna("info", "first").returncode == 0
    for words in (("send", "first", "x"), ("rename", "first", "other"), ("close", "first"), ("new", "--name", "own")):
        assert guest.sterna(*words).returncode != 0, words
    assert names(rig) == before
    with pytest.raises(RefusedError):
        connect(guest.link, new=True, state=guest.env["STERNA_STATE"])


def test_only_who_may_do_all_may_share_all(rig: Rig) -> None:
    for number, flags in enumerate((["--modes", "watch"], ["--agents", "echo"])):
        token = rig.json("token", *flags)["token"]
        site = Site(rig)
        with site.client(credential=token) as raw:
            raw.connect(want="call", mode="watch", agent="")
            for mode in ("watch", "drive"):
                assert raw.call("share", all=True, mode=mode).code == Code.DENIED, number
    refused = rig.sterna("share", "first", "--all", "--local")
    assert refused.returncode == 2
    assert "leave the session's name out" in refused.stderr
    link = Guest(rig, "scripts").link
    capture = rig.sterna("capture", link, env={"STERNA_STATE": os.fspath(rig.directory / "scripts")})
    assert capture.returncode == 2
    assert "`sterna attach` takes it" in capture.stderr


def test_an_ended_link_puts_its_terminal_out_and_no_other(rig: Rig) -> None:
    before = {link["id"] for link in rig.json("share", "--list")["shares"]}
    ended, other = Guest(rig, "ended", "--watch"), Guest(rig, "goes-on")
    terminals = [rig.terminal("attach", guest.link, "--name", "first", env=guest.env) for guest in (ended, other)]
    terminals.insert(0, rig.terminal("attach", "--name", "first"))
    for terminal in terminals:
        terminal.expect("$ ")
    known = {link["id"]: link for link in rig.json("share", "--list")["shares"]}
    (link,) = (each for each in known.values() if each["mode"] == "watch" and each["id"] not in before)
    assert link["expires"] > time.time() + 86_400, "it was used"
    assert (link["session"], link["agent"], link["name"]) == (None, None, None)
    lines = {line.split("\t")[0]: line.split("\t") for line in rig.sterna("share", "--list").stdout.splitlines()}
    assert lines.keys() == known.keys()
    assert lines[link["id"]][1:5] == ["all", "", "watch", link["issuer"]]
    assert lines[link["id"]][6:] == [link["device"], link["label"]]
    devices = {device["id"][:16]: device for device in rig.json("devices")["devices"]}
    assert devices[link["device"]]["label"] == link["label"]
    assert devices[link["issuer"]]["self"]
    for wrong in (str(parse_link(ended.link).ticket), ended.link, "abc"):
        refused = rig.sterna("share", "--end", wrong)
        assert (refused.returncode, "never given" in refused.stderr) == (2, True)
        assert wrong not in refused.stderr
    for words in (("first", "--list"), ("--end", link["id"], "--all"), ("--list", "--end", link["id"])):
        refused = rig.sterna("share", *words)
        assert (refused.returncode, "make no link" in refused.stderr) == (2, True), words
    refused = other.sterna("share", "--list")
    assert (refused.returncode, "neither shows nor ends links" in refused.stderr) == (1, True)
    done = rig.sterna("share", "--end", link["id"][:8])
    assert done.stdout == f"Ended the link {link['id']} to all sessions: the device {link['device']} is out.\n"
    assert terminals[1].wait() == 1
    terminals[1].expect("link that let you in was ended")
    for number, terminal in ((0, terminals[0]), (2, terminals[2])):
        terminal.type(f"echo still-$((40+{number}))\r")
        terminal.expect(f"still-{40 + number}")
    again = ended.sterna("ls")
    assert (again.returncode, "or it was ended; ask for a new one" in again.stderr) == (1, True)
    assert other.sterna("ls").returncode == 0
    refused = rig.sterna("share", "--end", link["id"])
    assert (refused.returncode, "`sterna share --list` shows them" in refused.stderr) == (1, True)
    unused = Guest(rig, "unused")
    (new,) = (each for each in rig.json("share", "--list")["shares"] if each["id"] not in known)
    assert rig.json("share", "--end", new["id"]) == new
    assert unused.sterna("ls").returncode == 1


def test_a_used_link_is_good_for_its_device_beyond_its_time() -> None:
    with Rig() as rig:
        rig.start_node()
        assert rig.sterna("new", "--name", "kept").returncode == 0
        site = Site(rig)
        device, tickets = new_device(), dict[str, Any]()
        with site.client() as owner:
            owner.connect(want="call")
            for which in ("used", "unused"):
                tickets[which] = owner.call("share", session="kept", ttl=3)
        with site.client(credential=tickets["used"]["ticket"], device=device) as guest:
            uid = guest.connect(want="join").uid
        wait_for(lambda: time.time() > tickets["unused"]["expires"] + 1, name="the time to be over")
        rig.restart_node(kill=True)
        site = Site(rig)
        with site.client(credential=tickets["used"]["ticket"], device=device) as guest:
            assert guest.connect(want="join").uid == uid
        for which, who in (("used", new_device()), ("unused", device)):
            with site.client(credential=tickets[which]["ticket"], device=who) as late:
                answer = late.ask(want="join")
                assert isinstance(answer, Error), which
                assert answer.code == Code.DENIED
        assert rig.sterna("revoke", device.id.hex()).returncode == 0
        with site.client(credential=tickets["used"]["ticket"], device=device) as guest:
            answer = guest.ask(want="join")
            assert isinstance(answer, Error)
            assert answer.code == Code.REVOKED
