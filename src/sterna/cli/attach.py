"""`sterna attach` and `sterna new`."""

from __future__ import annotations

from typing import Any

import click

from sterna.cli.attaching import Arguments, run
from sterna.cli.options import node_options
from sterna.cli.ssh import ssh_options


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
def attach(**told: Any) -> int:
    """A terminal on a session: your latest with an AGENT, one by NAME, or the one of a share LINK (`-` asks for it).

    `sterna attach user@host` sets the other machine up over your own ssh, then connects directly.

    After a newline, `~d` detaches, `~.` drops the connection and `~?` shows help.
    """
    return run(Arguments(told))
