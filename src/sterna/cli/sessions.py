"""`sterna ls`, `info`, `new`, `close` and `rename`."""

from __future__ import annotations

import os
import sys

import click

from sterna.cli.options import node_options
from sterna.errors import UsageError


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
    if sys.stdout.isatty():
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


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--agent", help="The agent (default: main, or the only one).")
@click.option("--name", help="The session's name (default: chosen by the node).")
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
    from sterna.client.blocking import BlockingSession
    from sterna.client.session import Wish, make_machine

    endpoint, wish = choose(agent, name=None, fresh=True, state=state, host=host, port=port)
    where = os.path.abspath(cwd) if cwd is not None and host is None else cwd
    wish = Wish("new", agent=wish.agent, name=name, argv=list(command) or None, cwd=where)
    machine = make_machine(
        endpoint, wish, state=state, size=(80, 24), term=os.environ.get("TERM", "xterm-256color"), exact=True
    )
    session = BlockingSession(machine, endpoint)
    try:
        session.open(None)
        accept = session.accept
    finally:
        # Its output and end are left for who attaches, so nothing is confirmed here.
        session.leave_unread()
    if as_json:
        print_json({"name": accept.name, "uid": accept.uid.hex(), "agent": accept.agent, "kind": accept.kind})
    else:
        print(accept.name)


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
        print(f"{old} is now {caller.call('rename', session=old, name=new_name)['name']}.")
