"""Which node and which session a command means."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, overload

from sterna.client import endpoint as endpoints
from sterna.client.endpoint import Endpoint, find
from sterna.client.session import Wish
from sterna.errors import Code, RefusedError, UsageError
from sterna.ids import check_name
from sterna.trust.links import LINK_MAX_CHARS, is_link

if TYPE_CHECKING:
    from sterna.client.calls import Caller

DEFAULT_AGENT = "main"
endpoints.notice = lambda text: print(f"sterna: {text}", file=sys.stderr)
_LISTED_MAX = 50
_ANSWER_BYTES = 1024


@overload
def without_trace(target: str) -> str: ...
@overload
def without_trace(target: str | None) -> str | None: ...
def without_trace(target: str | None) -> str | None:
    """Returns a target; for `-`, the share link that the user types unseen, or the first line of standard input.

    Other users of a machine can read the words of every command there (proc(5), cmdline). Raises UsageError.
    """
    if target != "-":
        return target
    link = read_secret("Share link", LINK_MAX_CHARS)
    if not is_link(link):
        raise UsageError("This is no share link: paste the whole link that `sterna share` printed.")
    return link


def read_secret(what: str, limit: int) -> str:
    """Asks on the terminal without echo, or reads the first line of standard input; at most `limit` characters.

    Not a byte beyond the line's end is taken: it may be what a command reads next.
    """
    if sys.stdin.isatty():
        from getpass import getpass

        try:
            text = getpass(f"{what}: ")
        except EOFError:
            raise KeyboardInterrupt from None
        if len(text) > limit:
            raise UsageError(f"The {what.lower()} is longer than {limit} characters.")
        return text.strip()
    line = b""
    while (byte := os.read(sys.stdin.fileno(), 1)) not in (b"", b"\n"):
        line += byte
        if len(line) > limit:
            raise UsageError(f"The {what.lower()} is longer than {limit} characters.")
    return line.decode(errors="replace").strip()


def choose(
    target: str | None,
    *,
    name: str | None,
    fresh: bool,
    state: str | None,
    host: str | None,
    port: int | None,
    interactive: bool | None = None,
) -> tuple[Endpoint, Wish]:
    """Returns the node and the wish for `attach` and its kin; raises SternaError with what to do.

    A target is a share link, `-` (see `without_trace`), `user@host` for ssh, an agent's name (its latest session) or a
    session's. Without target and name, and with several sessions that go on, the user picks one if `interactive` (by
    default: on a terminal).
    """
    target = without_trace(target)
    if name is not None and fresh:
        raise UsageError("Choose either --name, which finds or makes a session, or --new.")
    if name is not None:
        check_name(name)
    if target is not None and is_link(target):
        endpoint, target = find(state=state, link=target), None
        if endpoint.session is not None:
            if name is not None or fresh:
                raise UsageError("A share link names its session: leave --name and --new out.")
            return endpoint, Wish("join")
    elif target is not None and ("@" in target or target.startswith("ssh://")):
        from sterna.cli import ssh

        endpoint, target = ssh.reach(target, state=state, port=port)
    else:
        endpoint = find(state=state, host=host, port=port)
    if target is not None and (name is not None or fresh):
        return endpoint, Wish("new" if fresh else "named", agent=target, name=name)
    from sterna.client.calls import Caller

    with Caller(endpoint, state=state) as caller:
        sessions, agents = caller.listing()
    if target is not None:
        return endpoint, _meant(target, sessions, agents)
    if name is not None or fresh:
        return endpoint, Wish("new" if fresh else "named", agent=_default_agent(agents), name=name)
    if interactive is None:
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
    # A session cannot show itself.
    others = [session for session in sessions if session["uid"] != os.environ.get("STERNA_SESSION_UID")]
    if interactive and sum(session["state"] != "exited" for session in others) > (len(others) == len(sessions)):
        return endpoint, _ask(others, agents)
    agent = _default_agent(agents)
    tell_ended(sessions, agent)
    return endpoint, Wish("latest", agent=agent)


def tell_ended(sessions: list[dict[str, Any]], agent: str) -> None:
    """Mentions on standard error the sessions of an agent that ended and whose last output nobody has read."""
    count = sum(session["state"] == "exited" and session["agent"] == agent for session in sessions)
    if count:
        kept = "1 ended session kept its" if count == 1 else f"{count} ended sessions kept their"
        sys.stderr.write(f"sterna: {kept} last output: `sterna ls`\n")


def _meant(target: str, sessions: list[dict[str, Any]], agents: list[dict[str, Any]]) -> Wish:
    """Returns the wish for a uid or a name: an agent's name comes before a session's, as an agent's first session is
    called after it.
    """
    if any(session["uid"] == target for session in sessions):
        return Wish("join", uid=bytes.fromhex(target))
    if any(agent["name"] == target for agent in agents):
        tell_ended(sessions, target)
        return Wish("latest", agent=target)
    for session in sessions:
        if target == session["name"]:
            return Wish("join", uid=bytes.fromhex(session["uid"]))
    raise RefusedError(
        Code.NOT_FOUND, f"There is no agent or session {target[:80]!r}: `sterna ls` shows what there is."
    )


def _default_agent(agents: list[dict[str, Any]]) -> str:
    """Returns the agent that is meant when none is named: `main`, or the only one there is."""
    names = sorted(agent["name"] for agent in agents)
    if DEFAULT_AGENT in names or not names:
        return DEFAULT_AGENT
    if len(names) == 1:
        return str(names[0])
    raise UsageError(
        f"The agent {DEFAULT_AGENT} is not running: `sterna up` starts it; else name one of {', '.join(names)}."
    )


def _ask(sessions: list[dict[str, Any]], agents: list[dict[str, Any]]) -> Wish:
    """Lets the user pick a session from a numbered list; the first is the one that changed last."""
    from sterna.cli.output import ending, when
    from sterna.ids import clean_label

    order = sorted(sessions, key=lambda session: (session["state"] == "exited", -session["changed"]))[:_LISTED_MAX]
    width = max(len(session["name"]) for session in order)
    for number, session in enumerate(order, 1):
        said = ending(session) or ("attached elsewhere" if session["attached"] else "")
        line = f"{number:3}  {session['name']:<{width}}  {session['state']:<9}  {when(session['changed'])}  {said}"
        sys.stderr.write(clean_label(line, 200).rstrip() + "\n")
    while True:
        sys.stderr.write("Which session (a number or name, n for a new one, q to leave)? [1] ")
        sys.stderr.flush()
        # A terminal gives one line per read; what is typed ahead after it belongs to the session.
        data = os.read(sys.stdin.fileno(), _ANSWER_BYTES)
        if not data:
            raise KeyboardInterrupt
        answer = data.decode(errors="replace").strip() or "1"
        if answer == "q":
            raise KeyboardInterrupt
        if answer == "n":
            return Wish("new", agent=_default_agent(agents))
        # A session may be called "2", and is not the second one for that.
        lines = {session["name"]: session for session in order} | {str(n): each for n, each in enumerate(order, 1)}
        if answer in lines:
            return Wish("join", uid=bytes.fromhex(lines[answer]["uid"]))
        sys.stderr.write("There is no such line: type a number or a name from the list, n or q.\n")


def reach(*, state: str | None, host: str | None, port: int | None) -> Caller:
    """Returns a connection for CALLs to the node that is meant; raises SternaError with what to do."""
    from sterna.client.calls import Caller

    return Caller(find(state=state, host=host, port=port), state=state)


def named_session(
    which: str, *, state: str | None, host: str | None, port: int | None
) -> tuple[Endpoint, Wish, dict[str, Any]]:
    """Returns the node, the wish to join, and what the node tells (`info`) of the session that a script names.

    It is meant by a share link, `-` (see `without_trace`), its name or uid, or its agent's name (the latest session).
    Raises SternaError.
    """
    from sterna.client.calls import Caller, pick

    which = without_trace(which)
    link = which if is_link(which) else None
    endpoint = find(state=state, link=link) if link is not None else find(state=state, host=host, port=port)
    with Caller(endpoint, state=state) as caller:
        sessions, agents = caller.listing()
        if link is not None and endpoint.session is None:
            raise UsageError("This link is for all sessions and names none: `sterna attach` takes it.")
        if link is not None and len(sessions) != 1:
            raise RefusedError(Code.NOT_FOUND, "The session of this link is over.")
        about = caller.call("info", session=(sessions[0] if link is not None else pick(sessions, which, agents))["uid"])
    return endpoint, Wish("join", uid=bytes.fromhex(about["uid"])), about
