"""`sterna remote …`: the remote daemon's own command line, and `sterna remote attach`, a command on another machine."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn


class _Raw(click.Command):
    """Hands every word on as it is: the daemon's flags have a syntax of their own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes all words."""
        ctx.params["words"] = tuple(args)
        return []


@click.command(cls=_Raw, add_help_option=False)
def remote(words: tuple[str, ...]) -> Any:
    """The remote daemon: what `sterna-remote` does, and `sterna remote attach HOST`."""
    if words[:1] == ("attach",):
        return attach.main(args=list(words[1:]), prog_name="sterna remote attach", standalone_mode=False)
    begin: Callable[[], NoReturn]
    if words == ("meet",):  # what `attach` runs on the other machine
        from sterna.remote.rendezvous import meet as begin
    else:
        from sterna.remote.app import main

        begin = partial(main, words)
    return begin()


@click.command(
    epilog="\b\nA build that goes on when the network does not:\n  sterna remote attach host --id build -- make -j8\n"
)
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--id", "name", help="The process with this id, started if there is none (a random one).")
@click.option("--cwd", default="", help="The directory there in which it starts (the home directory).")
@click.option("--ssh", metavar="COMMAND", envvar="STERNA_SSH", default="ssh", help="The ssh command (ssh).")
@click.option("--remote-sterna", metavar="PATH", help="Where sterna is there.")
def attach(host: str, command: tuple[str, ...], name: str | None, cwd: str, ssh: str, remote_sterna: str | None) -> int:
    """Run COMMAND on HOST over your ssh, with standard input and output, through any loss of the connection.

    The exit status is the command's, 255 if a signal ended it. Ctrl-C goes to the command, twice leaves it running; the
    same --id comes back to it.
    """
    from sterna.cli.remote_attach import run

    return run(host, command, name=name, cwd=cwd, ssh=ssh, sterna=remote_sterna)
