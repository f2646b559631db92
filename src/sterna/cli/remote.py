"""`sterna remote …`: the remote daemon's own command line, and `sterna remote attach`, a command on another machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sterna.errors import UsageError

if TYPE_CHECKING:
    from typing import Any

_ATTACH = "`sterna remote attach HOST -- COMMAND…`"
_HELP = frozenset({"-h", "--h", "-help", "--help"})


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
    if words == ("meet",):  # what `attach` runs on the other machine
        from sterna.remote.rendezvous import meet

        meet()
    if words and not words[0].startswith("-"):
        raise UsageError(
            f"There is no `sterna remote {words[0][:40]}`: {_ATTACH} runs a command on another machine, and everything "
            "else is the daemon's flags (`sterna remote -help`)."
        )
    from sterna.remote.app import main

    try:
        main(words)
    finally:
        if not words or words[0] in _HELP:
            sys.stderr.write(f"sterna: {_ATTACH} runs a command on another machine (`sterna remote attach --help`).\n")


class _Attach(click.Command):
    """Says of an option that it does not know that it may be the command's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes the words; only what comes after -- is left to the command."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            said = error.format_message().rstrip(".")
            raise click.UsageError(f"{said}: if it belongs to the command, put -- before the command.", ctx) from None


@click.command(
    cls=_Attach,
    epilog="\b\nA build that goes on when the network does not:\n  sterna remote attach host --id build -- make -j8\n",
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
