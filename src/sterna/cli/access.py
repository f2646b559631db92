"""`sterna share`, `devices`, `revoke` and `token`: who may come in."""

from __future__ import annotations

import re
import socket
import sys
from typing import TYPE_CHECKING, Any

import click

from sterna.cli.duration import DURATION
from sterna.cli.options import node_options
from sterna.errors import UsageError

if TYPE_CHECKING:
    from sterna.client.calls import Caller
    from sterna.trust.links import ShareLink

_TTL_MAX_SECONDS = 30 * 86_400
_SHARE_ID = re.compile("[0-9a-f]{8,16}")
_TOKEN_ID = re.compile("[0-9a-f]{32}|file-[0-9a-f]{16}")
_ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104  # compared with, not listened on


@click.command()
@click.argument("session", required=False)
@click.option("--all", "every", is_flag=True, help="The link opens all sessions and agents, and may begin new ones.")
@click.option("--watch", is_flag=True, help="The link allows looking on, not typing.")
@click.option("--ttl", type=DURATION, default="10m", show_default=True, help="How long the link can be opened.")
@click.option("--host", help="Host in the link: how the other device reaches this node.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port in the link (default: the node's).")
@click.option("--web-port", type=click.IntRange(1, 65535), help="Port of the web page in its link, as 443 of a proxy.")
@click.option("--local", is_flag=True, help="The link is for this machine only.")
@click.option("--list", "listed", is_flag=True, help="List the links that are out instead, never the links themselves.")
@click.option("--end", metavar="ID", help="End the link with this id (from --list), and what came in by it.")
@click.option("--state", type=click.Path(file_okay=False), envvar="STERNA_STATE", help="Directory of keys and state.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def share(
    session: str | None, every: bool, watch: bool, ttl: float, host: str | None, port: int | None,
    web_port: int | None, local: bool, listed: bool, end: str | None, state: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Print a link and a QR code that open SESSION (or --all) on one other device: in its browser, or in a terminal.

    Where no node runs on this machine, and with --list and --end, --host and --port say which node is asked.
    """
    from sterna.cli.output import print_json
    from sterna.client.calls import pick

    if listed or end is not None:
        if session is not None or every or watch or local or web_port or (listed and end is not None):
            raise UsageError("--list and --end make no link: leave everything else out but --json and the node.")
        with _asked(state, host, port, end) as caller:
            if end is None:
                _print_shares(list(caller.pages("shares", "shares")), as_json=as_json)
            else:
                _print_ended(caller.call("unshare", id=end), as_json=as_json)
        return
    if not 1 <= ttl <= _TTL_MAX_SECONDS:
        raise UsageError(f"A link lives for 1 second to {_TTL_MAX_SECONDS // 86_400} days: choose another --ttl.")
    if local and host is not None:
        raise UsageError("--local and --host contradict each other: leave one out.")
    if every and session is not None:
        raise UsageError("--all is for all sessions: leave the session's name out.")
    with _sharing_node(state, host, port) as caller:
        about = caller.call("node")
        address = _local_host(about["host"]) if local else _link_host(host, about["host"])
        which: dict[str, Any] = {"all": True}
        if not every:
            sessions, agents = caller.listing()
            found = pick(sessions, session, agents) if session is not None else _only(sessions, agents)
            which = {"session": found["uid"]}
        shared = caller.call("share", mode="watch" if watch else "drive", ttl=int(ttl), **which)
    page = web_port or about["web_port"]
    link = _link(shared, address, port or about["port"], page)
    if page and not (local or web_port):
        _check_page(about)
    web = link.web() if page else None
    if as_json:
        keys = ("name", "session", "agent", "mode", "expires")
        place = {"link": link.terminal(), "web": web, "host": link.host, "port": link.session_port}
        print_json({**place, **{k: shared[k] for k in keys}})
        return
    if sys.stdout.isatty():
        _explain(link.terminal(), web, ttl, shared["name"], watch=watch, local=local)
    else:
        print(link.terminal())


def _asked(state: str | None, host: str | None, port: int | None, end: str | None) -> Caller:
    """Returns a connection to the node whose links are meant, if what is to be ended can be an id."""
    from sterna.cli.target import reach

    if end is not None and _SHARE_ID.fullmatch(end) is None:
        raise UsageError(
            "That is no link's id (16 hex digits, or the first 8 or more): `sterna share --list` has it, and the link "
            "itself is never given."
        )
    return reach(state=state, host=host, port=port)


def _print_shares(shares: list[dict[str, Any]], *, as_json: bool) -> None:
    from sterna.cli.output import print_json, print_table, until

    if as_json:
        print_json({"shares": shares})
        return
    rows = [
        (
            each["id"],
            each["name"] if each["session"] is not None else "all",
            each["agent"] or "",
            each["mode"],
            each["issuer"],
            until(each["expires"]),
            each["device"] or "",
            each["label"] or "",
        )
        for each in shares
    ]
    print_table(("LINK", "SESSION", "AGENT", "MODE", "MADE BY", "EXPIRES", "USED BY", "LABEL"), rows)


def _print_ended(share: dict[str, Any], *, as_json: bool) -> None:
    from sterna.cli.output import print_json
    from sterna.ids import clean_label

    if as_json:
        print_json(share)
        return
    what = clean_label(share["name"]) if share["session"] is not None else "all sessions"
    used = f"the device {share['device']} is out" if share["device"] is not None else "nobody had used it"
    print(f"Ended the link {share['id']} to {what}: {used}.")


def _link(shared: dict[str, Any], host: str, port: int, page: int) -> ShareLink:
    """Returns the link to what a node shared; `page` is its web page's port, 0 if it has none."""
    from sterna.ids import NodeId, SessionUid
    from sterna.trust.links import ShareLink

    uid = shared["session"]
    return ShareLink(
        host, page or port, session_port=port, ticket=shared["ticket"], node_id=NodeId(bytes.fromhex(shared["node"])),
        session=SessionUid(bytes.fromhex(uid)) if uid is not None else None, agent=shared["agent"],
        mode=shared["mode"],
    )  # fmt: skip


def _explain(terminal: str, web: str | None, ttl: float, name: str | None, *, watch: bool, local: bool) -> None:
    """Says on a terminal what to do with a link; what it draws for a phone's camera comes last, and is seen whole."""
    from sterna.cli.duration import in_words

    can = "looks on at" if watch else "opens"
    what = f"the session {name}" if name is not None else "all sessions"
    print(f"On {'this machine' if local else 'another device'}, within {in_words(ttl)}, this {can} {what}:")
    if web is not None:
        print(f"    {web}")
        print("in a browser. If the node has no certificate of a public authority (`sterna node --tls-cert`, or a")
        print("reverse proxy), browsers warn first.")
    else:
        print("(in a browser only if the node has a web page: `sterna up` has one, `sterna node` with --web-port 7222)")
    print("In a terminal type `sterna attach -`, and paste the sterna:// link, which nobody else sees then:")
    print(f"    {terminal}")
    print("It is for the first device that uses it. That one may come back with it for 30 days after each use: a")
    print("browser remembers it, in a terminal it is pasted again.")
    if not local:
        print_qr(web or terminal)


def _sharing_node(state: str | None, host: str | None, port: int | None) -> Caller:
    """Returns a connection to this machine's node, or where none runs, to the one at `host`."""
    from sterna.cli.target import reach

    try:
        return reach(state=state, host=None, port=None)
    except UsageError:
        if host is None:
            raise
    return reach(state=state, host=host, port=port)


def _local_host(listening: str) -> str:
    """Returns the host for a link that is opened on this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listening, listening)  # noqa: S104 -- compared with


def _link_host(host: str | None, listening: str) -> str:
    """Returns the host for the link; raises UsageError if another device cannot reach it."""
    from sterna.trust.links import unreachable_reason

    if host is not None:
        reason = unreachable_reason(host)
        if reason is not None:
            raise UsageError(
                f"Another device cannot reach {host}: {reason}. Give --host as that device would name this machine."
            )
        if listening not in _ANY_ADDRESS and unreachable_reason(listening) is not None:
            sys.stderr.write(
                f"sterna: the node itself listens on {listening} only, so the link works if something forwards to it.\n"
            )
        return host
    if listening in _ANY_ADDRESS:
        found = own_address()
        if found is None:
            raise UsageError("This machine has no address that other devices could reach: give --host.")
        return found
    reason = unreachable_reason(listening)
    if reason is not None:
        raise UsageError(
            f"The node listens on {listening}, which another device cannot reach: {reason}. "
            "Start it with `sterna up --host 0.0.0.0` (or `sterna node --tls-cert`, which browsers trust), or give "
            "--host if something forwards to it, as a reverse proxy (docs/operations.md has the words for nginx and "
            "Caddy); --local makes a link for this machine itself."
        )
    return listening


def _check_page(about: dict[str, Any]) -> None:
    """Says what to do where the web page listens for this machine only, although the node does not."""
    from sterna.trust.links import unreachable_reason

    listening = about["web_host"]
    if listening != about["host"] and listening not in _ANY_ADDRESS and unreachable_reason(listening) is not None:
        sys.stderr.write(
            f"sterna: the web page listens on {listening} only, so its link works if a reverse proxy forwards to it: "
            "give its port with --web-port 443.\n"
        )


def own_address() -> str | None:
    """Returns the address that this machine has towards the rest of the world; nothing is sent (RFC 5737, 3849)."""
    from sterna.trust.links import unreachable_reason

    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
            except OSError:
                continue
            address = str(probe.getsockname()[0])
            if unreachable_reason(address) is None:
                return address
    return None


def _only(sessions: list[dict[str, Any]], agents: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the session that goes on, if it is one; raises UsageError."""
    going = [session for session in sessions if session["state"] != "exited"]
    if len(going) == 1:
        return going[0]
    if not going:
        names = sorted(agent["name"] for agent in agents)
        if not names:
            raise UsageError("There is no session to share, and no agent to begin one: start one with `sterna up`.")
        begin = "sterna attach" if "main" in names or len(names) == 1 else f"sterna attach {names[0]}"
        text = f"There is no session to share: `{begin}` begins one; `sterna share --all` shares those to come."
        raise UsageError(text)
    raise UsageError(f"There are several sessions ({', '.join(s['name'] for s in going[:10])}): name one.")


def print_qr(text: str) -> None:
    """Draws a QR code with half blocks, light on dark whatever the terminal's colours are."""
    import io
    import os
    import shutil

    import segno

    code = segno.make(text, error="l", micro=False)
    drawing = io.StringIO()
    code.terminal(drawing, border=2, compact=True)
    lines = drawing.getvalue().splitlines()
    if shutil.get_terminal_size().columns < max(map(len, lines)):
        sys.stderr.write("sterna: this terminal is too narrow for the QR code.\n")
        return
    color = "NO_COLOR" not in os.environ
    for line in lines:
        print(f"\x1b[97;40m{line}\x1b[0m" if color else line)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@node_options
def devices(as_json: bool, state: str | None, host: str | None, port: int | None) -> None:
    """List the devices that have been on this node."""
    from sterna.cli.output import print_json, print_table, when
    from sterna.cli.target import reach

    with reach(state=state, host=host, port=port) as caller:
        found = list(caller.pages("devices", "devices"))
    if as_json:
        print_json({"devices": found})
        return
    rows = []
    for device in found:
        note = "revoked" if device["revoked"] else "this device" if device["self"] else ""
        rows.append(
            (
                device["id"][:16],
                device["label"],
                when(device["created"]),
                when(device["seen"]),
                device["sessions"],
                note,
            )
        )
    print_table(("DEVICE", "LABEL", "FIRST SEEN", "LAST SEEN", "SESSIONS", "NOTE"), rows)


@click.command()
@click.argument("device", required=False)
@click.option("--this-device", is_flag=True, help="Yes, even if DEVICE is the one that I type this on.")
@click.option("--token", "token_", metavar="ID", help="Refuse the access token with this id instead of a device.")
@node_options
def revoke(
    device: str | None, token_: str | None, this_device: bool, state: str | None, host: str | None, port: int | None
) -> None:
    """Refuse DEVICE (its id, or the first 8 digits or more), or an access token, from now on."""
    from sterna.cli.target import reach

    if (device is None) == (token_ is None):
        raise UsageError("Name a device (`sterna devices` lists them), or a token with --token.")
    if token_ is not None and _TOKEN_ID.fullmatch(token_) is None:
        raise UsageError(
            "That is no token's id (32 hex digits): give its id, which `sterna token` printed, never the token itself."
        )
    with reach(state=state, host=host, port=port) as caller:
        if token_ is not None:
            # The node keeps no list of the tokens it issued, so nobody can tell whether there ever was this one.
            print(f"The token {caller.call('revoke', token=token_)['token']} is refused from now on.")
        else:
            revoked = caller.call("revoke", device=device, this_device=this_device)["device"]
            print(f"Revoked the device {revoked[:16]}.")


@click.command()
@click.option("--tenant", help="Whose agents it opens (default: yours).")
@click.option(
    "--agents", "globs", multiple=True, default=("*",), show_default=True, help="Agents or globs; may be repeated."
)
@click.option("--modes", default="drive,watch", show_default=True, help="drive, watch, or both.")
@click.option("--ttl", type=DURATION, default=0.0, help="How long it is valid (default: for ever).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@node_options
def token(
    tenant: str | None, globs: tuple[str, ...], modes: str, ttl: float, as_json: bool, state: str | None, host: str |
    None, port: int | None,
) -> None:  # fmt: skip
    """Issue an access token: what STERNA_TOKEN holds on another machine."""
    import time

    from sterna.cli.output import print_json
    from sterna.cli.target import reach

    wanted = [mode.strip() for mode in modes.split(",") if mode.strip()]
    if not wanted or set(wanted) - {"drive", "watch"}:
        raise UsageError("--modes takes drive, watch, or both with a comma.")
    agents = [glob for word in globs for glob in word.split(",") if glob]
    with reach(state=state, host=host, port=port) as caller:
        issued = caller.call("token", tenant=tenant or "", agents=agents, modes=wanted, ttl=int(ttl))["token"]
    if as_json:
        expires = int(time.time() + ttl) if ttl else 0
        print_json({"token": issued, "id": _token_id(issued), "agents": agents, "modes": wanted, "expires": expires})
    else:
        print(issued)
        sys.stderr.write(f"sterna: its id is {_token_id(issued)}: `sterna revoke --token` takes it.\n")


def _token_id(text: str) -> str:
    """Returns the id of a token that the node issued (docs/protocol.md, section 4)."""
    import msgspec

    from sterna.limits import TOKEN_MAX_BYTES
    from sterna.trust import base64url

    payload = base64url.decode(text.split(".")[1], TOKEN_MAX_BYTES)
    return msgspec.msgpack.decode(payload or b"", type=tuple[str, list[str], list[str], int, str, int])[4]
