"""`sterna ls`, `info`, `new`, `close` and `rename`."""

from __future__ import annotations

import itertools
import os
import re
import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from sterna.cli.options import WithCommand, node_options
from sterna.errors import Code, RefusedError, UsageError
from sterna.ids import check_name, uid_of

if TYPE_CHECKING:
    from sterna.client.endpoint import Endpoint
    from sterna.protocol.messages import Accept

# Leaves room for "-" and a number in a session's name.
_STEM_MAX_CHARS = 57


@click.command()
@click.option("--agent", help="Only sessions with this agent.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@node_options
def ls(agent: str | None, as_json: bool, state: str | None, host: str | None, port: int | None) -> None:
    """List the sessions and agents on a node."""
    from sterna.cli.output import ending, print_json, print_table, when
    from sterna.cli.target import reach

    with reach(state=state, host=host, port=port) as caller:
        sessions, agents = caller.listing()
    if agent is not None:
        sessions = [session for session in sessions if session["agent"] == agent]
        agents = [known for known in agents if known["name"] == agent]
        if not (sessions or agents):
            sys.stderr.write(f"sterna: There is no agent {agent[:80]!r}: `sterna ls` shows what there is.\n")
    if as_json:
        print_json({"sessions": sessions, "agents": agents})
        return
    if sessions or not sys.stdout.isatty():
        print_table(
            ("NAME", "AGENT", "KIND", "STATE", "ATTACHED", "CHANGED", "END"),
            (
                (s["name"], s["agent"], s["kind"], s["state"], s["attached"], when(s["changed"]), ending(s))
                for s in sessions
            ),
        )
    if sys.stdout.isatty() and (agents or sessions or agent is None):
        names = ", ".join(known["name"] + ("" if known["ready"] else " (not ready)") for known in agents)
        print(f"Agents: {names}" if names else "No agent is here: start one with `sterna up` or `sterna pod`.")
        if not sessions:
            print("No sessions: `sterna attach` begins one.")


@click.command()
@click.argument("session")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@node_options
def info(session: str, as_json: bool, state: str | None, host: str | None, port: int | None) -> None:
    """Show one SESSION in detail."""
    from sterna.cli.output import ending, print_fields, print_json, when
    from sterna.cli.target import named_session

    _endpoint, _wish, about = named_session(session, state=state, host=host, port=port)
    if as_json:
        print_json(about)
        return
    fields: list[tuple[str, object]] = [(key, about[key]) for key in ("name", "uid", "agent", "kind", "state")]
    fields += [("created", when(about["created"])), ("changed", when(about["changed"]))]
    if ending(about):
        fields.append(("end", ending(about)))
    if "output" in about:
        fields += [("output", f"{about['output']} bytes"), ("kept", f"{about['output'] - about['kept']} bytes")]
    for attachment in about.get("attachments", []):
        size = f", {attachment['cols']}x{attachment['rows']}" if attachment["cols"] else ""
        fields.append(
            ("attached", f"{attachment['label']} ({attachment['mode']}{size}, device {attachment['device']})")
        )
    print_fields(fields)


@click.command(cls=WithCommand)
@click.option("--agent", help="The agent (default: main, or the only one).")
@click.option("--name", help="The session's name (default: COMMAND's, or chosen by the node).")
@click.option("--cwd", help="Where the program runs, on the node's machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@node_options
@click.argument("command", nargs=-1)
def new(
    agent: str | None, name: str | None, cwd: str | None, as_json: bool, state: str | None, host: str | None,
    port: int | None, command: tuple[str, ...],
) -> None:  # fmt: skip
    """Begin a new session, which runs COMMAND or what its agent runs, and print its name."""
    from sterna.cli.output import print_json
    from sterna.cli.target import choose

    if name is not None:
        check_name(name)
    endpoint, wish = choose(agent, name=None, fresh=True, state=state, host=host, port=port)
    where = os.path.abspath(cwd) if cwd is not None and host is None else cwd
    begin = partial(_begin, endpoint, wish.agent, list(command), where, state)
    stem = _stem(command) if name is None else None
    try:
        accept = begin(name or stem)
    except RefusedError as error:
        if error.code != Code.EXISTS or stem is None:
            raise
        accept = begin(_numbered(stem, endpoint, state))
    if as_json:
        print_json({"name": accept.name, "uid": accept.uid.hex(), "agent": accept.agent, "kind": accept.kind})
    else:
        print(accept.name)


def _begin(
    endpoint: Endpoint, agent: str, command: list[str], cwd: str | None, state: str | None, name: str | None
) -> Accept:  # fmt: skip
    """Begins a session and leaves it; without a name the node chooses one."""
    from sterna.client.blocking import BlockingSession
    from sterna.client.session import Wish, make_machine

    wish = Wish("new", agent=agent, name=name, argv=command or None, cwd=cwd)
    machine = make_machine(
        endpoint, wish, state=state, size=(80, 24), term=os.environ.get("TERM", "xterm-256color"), exact=True
    )
    session = BlockingSession(machine, endpoint)
    try:
        session.open(None)
        return session.accept
    finally:
        # Its output and end are left for who attaches, so nothing is confirmed here.
        session.leave_unread()


def _stem(command: tuple[str, ...]) -> str | None:
    """Returns what a session is called after the program that it runs, if that makes a name."""
    base = os.path.basename(command[0]) if command else ""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("._-")[:_STEM_MAX_CHARS]
    return stem if stem and uid_of(stem) is None else None


def _numbered(stem: str, endpoint: Endpoint, state: str | None) -> str:
    """Returns a free name with a number, as far as is known here."""
    from sterna.client.calls import Caller

    with Caller(endpoint, state=state) as caller:
        taken = {each["name"] for each in itertools.chain(*caller.listing())}
    return next(name for number in itertools.count(2) if (name := f"{stem}-{number}") not in taken)


@click.command()
@click.argument("session", required=False)
@click.option("--ended", is_flag=True, help="Close all sessions whose program has ended.")
@node_options
def close(session: str | None, ended: bool, state: str | None, host: str | None, port: int | None) -> None:
    """End a SESSION for good, with its program; what it printed is forgotten."""
    from sterna.cli.target import reach

    if (session is None) == (not ended):
        raise UsageError("Name a session (`sterna ls` lists them), or use --ended alone.")
    with reach(state=state, host=host, port=port) as caller:
        which = [each["uid"] for each in caller.listing()[0] if each["state"] == "exited"] if ended else [session]
        for each in which:
            print(f"Closed {caller.call('close', session=each)['name']}.")
    if not which:
        print("No session has ended.")


@click.command()
@click.argument("old")
@click.argument("new_name", metavar="NEW")
@node_options
def rename(old: str, new_name: str, state: str | None, host: str | None, port: int | None) -> None:
    """Give the session OLD the name NEW."""
    from sterna.cli.target import reach

    with reach(state=state, host=host, port=port) as caller:
        print(f"{old} is now {caller.call('rename', session=old, name=check_name(new_name))['name']}.")
