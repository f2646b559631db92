"""`sterna attach` and `sterna new`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from sterna.cli.options import node_options, program
from sterna.cli.ssh import ssh_options

if TYPE_CHECKING:
    from sterna.client.status import ScreenModel


@click.command()
@click.argument("target", metavar="[AGENT|SESSION|LINK|user@host]", required=False)
@click.option("--name", help="The session with this name, made if there is none.")
@click.option("--new", "fresh", is_flag=True, help="A new session.")
@click.option("--watch", is_flag=True, help="Look on without typing.")
@click.option("-d", "--displace", is_flag=True, help="Detach all other terminals.")
@click.option("--escape", default="~", help="The escape character, or `none`.", show_default=True)
@click.option("--clipboard", is_flag=True, help="Let the session write the clipboard (OSC 52).")
@click.option("--notify", is_flag=True, help="Pass bell and exit on as desktop notifications.")
@ssh_options
@node_options
def attach(
    target: str | None, name: str | None, fresh: bool, watch: bool, displace: bool, escape: str, clipboard: bool,
    notify: bool, state: str | None, host: str | None, port: int | None,
) -> int:  # fmt: skip
    """A terminal on a session: your latest with an AGENT, one by NAME, or the one of a share LINK (`-` asks for it).

    `sterna attach user@host` sets the other machine up over your own ssh, then connects directly.

    After a newline, `~d` detaches, `~.` drops the connection and `~?` shows help.
    """
    from sterna.cli.target import choose
    from sterna.client import attach as client

    endpoint, wish = choose(target, name=name, fresh=fresh, state=state, host=host, port=port)
    options = client.AttachOptions()
    options.state = state
    options.displace = displace
    options.escape = None if escape == "none" else escape
    options.clipboard = clipboard
    options.notify = notify
    options.mode = "watch" if watch else "drive"
    options.make_screen = _make_screen
    options.again = _again(target, state, host, port)
    return client.attach(endpoint, wish, options)


def _again(target: str | None, state: str | None, host: str | None, port: int | None) -> str:
    """Returns the command that comes back to a session; a share link's secret is not shown."""
    from sterna.trust.links import is_link

    if target == "-":
        return shlex.join([*program(), "attach", "-"])
    if target is not None and is_link(target):
        return shlex.join([*program(), "attach"]) + " 'LINK'"
    elsewhere = [target] if target is not None and ("@" in target or "://" in target) else []
    flags = [("--state", state), ("--host", host), ("--port", port and str(port))]
    words = [*program(), "attach", *elsewhere, *(word for flag, value in flags if value for word in (flag, value))]
    return shlex.join([*words, "--name"]) + " NAME"


def _make_screen(cols: int, rows: int) -> ScreenModel:
    """Returns the status line's model of the terminal; the engine is loaded when there is trouble to tell of."""
    from sterna.cli.screenmodel import EngineModel

    return EngineModel(cols, rows)
