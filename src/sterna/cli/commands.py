"""The commands of `sterna`: a lazy group, so that each command imports only what it needs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from sterna import __version__

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS: dict[str, tuple[str, str]] = {
    "attach": ("attach", "A terminal on a session; it survives any loss of the network."),
    "capture": ("script", "Print what a session's screen shows."),
    "close": ("sessions", "End a session for good."),
    "completion": ("completion", "Print the shell's completion script."),
    "devices": ("access", "List the devices that have been here."),
    "doctor": ("doctor", "Check this machine and say what to do."),
    "down": ("up", "Stop what `sterna up` started: the node and its agents."),
    "invite": ("ssh", ""),
    "info": ("sessions", "Show one session in detail."),
    "ls": ("sessions", "List sessions and agents."),
    "new": ("sessions", "Begin a new session and print its name."),
    "node": ("node", "The node daemon."),
    "pipe": ("pipe", "Connect standard input and output to a session, exactly."),
    "play": ("record", "Play a recording."),
    "pod": ("pod", "Serve a command as an agent."),
    "record": ("record", "Record a session as asciicast v3."),
    "remote": ("remote", "The remote daemon (sterna-remote); `remote attach HOST`: a command there."),
    "rename": ("sessions", "Give a session another name."),
    "revoke": ("access", "Refuse a device or an access token from now on."),
    "send": ("script", "Type text into a session."),
    "service": ("service", "Run the node as a service of your systemd."),
    "share": ("access", "Print a link and a QR code for another device."),
    "token": ("access", "Issue an access token."),
    "up": ("up", "Everything on this machine: node and agent."),
    "wait": ("script", "Wait for a session's end, a text, or quiet."),
}
"""Every command: its module in this package, and its line in the overview ("": not shown)."""


class LazyGroup(click.Group):
    """Knows its commands by name and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns all names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports a command."""
        found = COMMANDS.get(cmd_name)
        if found is None:
            return None
        command: click.Command = getattr(import_module(f"sterna.cli.{found[0]}"), cmd_name)
        if "_STERNA_COMPLETE" in os.environ:
            from sterna.cli.completion import add_names

            add_names(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command that is meant; a name that is close to one is named in the error."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            close = get_close_matches(name, [known for known, (_, line) in COMMANDS.items() if line], 1)
            ctx.fail(f"There is no command {name[:40]!r}" + (f": did you mean `sterna {close[0]}`?" if close else "."))
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Returns the commands and options that begin so, without importing commands."""
        from sterna.cli.completion import complete_commands

        return complete_commands(COMMANDS, incomplete) + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in sorted(COMMANDS.items()) if line])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=False)
@click.version_option(__version__, prog_name="sterna")
@click.option("--debug", is_flag=True, envvar="STERNA_DEBUG", help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Terminal and agent sessions that survive everything."""
    if debug:
        os.environ["STERNA_DEBUG"] = "1"


def _one_sentence(error: click.ClickException) -> str:
    """Returns what click found wrong, and where the right way stands."""
    text = " ".join(error.format_message().split())
    text += "" if text.endswith((".", "?", "!")) else "."
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{text} Try `{context.command_path} --help`." if context is not None else text


def run() -> int:
    """Runs the command line that this process was started with; returns its exit status. Raises SternaError."""
    try:
        result = cli.main(prog_name="sterna", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        sys.stderr.write(f"sterna: {_one_sentence(error)}\n")
        return 2 if isinstance(error, click.UsageError) else 1
    except click.Abort:
        return 130
    return result if isinstance(result, int) else 0
