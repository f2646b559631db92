"""`sterna completion`, and what completes the names of sessions and agents."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from click.shell_completion import CompletionItem

VARIABLE = "_STERNA_COMPLETE"
"""Set by the shell's script when it asks for completions (click's documentation, "Shell Completion")."""
_ASK_SECONDS = 0.1
_SESSIONS = frozenset(("session", "name", "old"))
_BOTH = frozenset(("target",))
_AGENTS = frozenset(("agent",))
_OWN_NAMES = frozenset(("new", "node", "pod", "up"))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that teaches SHELL to complete sterna's commands, options, sessions and agents.

    bash: `eval "$(sterna completion bash)"` in ~/.bashrc. zsh: the same in ~/.zshrc. fish: `sterna completion fish >
    ~/.config/fish/completions/sterna.fish`.
    """
    from click.shell_completion import get_completion_class

    from sterna.cli.commands import cli

    found = get_completion_class(shell)
    assert found is not None
    if shell == "bash":
        # click's own generator starts a bash only to look at its version.
        click.echo(found.source_template % found(cli, {}, "sterna", VARIABLE).source_vars())
    else:
        click.echo(found(cli, {}, "sterna", VARIABLE).source())


def complete_commands(commands: Mapping[str, tuple[str, str]], incomplete: str) -> list[CompletionItem]:
    """Returns the commands that begin so, without importing them."""
    from click.shell_completion import CompletionItem

    return [
        CompletionItem(name, help=line)
        for name, (_, line) in sorted(commands.items())
        if line and name.startswith(incomplete)
    ]


def add_names(command: click.Command) -> None:
    """Lets a command's arguments and options that mean sessions or agents be completed from this machine's node."""
    for parameter in command.params:
        if parameter.name in _BOTH:
            sessions, agents = True, True
        elif parameter.name in _SESSIONS and command.name not in _OWN_NAMES:
            sessions, agents = True, False
        elif parameter.name in _AGENTS and command.name not in ("pod", "up"):
            sessions, agents = False, True
        elif parameter.name == "end":
            parameter._custom_shell_complete = _completer(_shares)
            continue
        else:
            continue
        parameter._custom_shell_complete = _completer(partial(_names, sessions=sessions, agents=agents))


def _completer(
    ask: Callable[[str | None], list[tuple[str, str]]],
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def complete(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        if ctx.params.get("host"):
            return []
        return [
            CompletionItem(name, help=about)
            for name, about in ask(ctx.params.get("state"))
            if name.startswith(incomplete)
        ]

    return complete


def _names(state: str | None, *, sessions: bool, agents: bool) -> list[tuple[str, str]]:
    """Returns names with a word on each, asked of the node on this machine."""
    found = _called(state, "list")
    names: dict[str, str] = {}
    if sessions:
        names |= {each["name"]: f"session, {each['state']}" for each in found["sessions"]}
    if agents:
        names |= {each["name"]: "agent" for each in found["agents"] if each["name"] not in names}
    return sorted(names.items())


def _shares(state: str | None) -> list[tuple[str, str]]:
    """Returns the ids of links with what each is for."""
    found = _called(state, "shares")["shares"]
    return [(each["id"], f"{each['mode']}, {each['name'] if each['session'] else 'all'}") for each in found]


def _called(state: str | None, method: str) -> Mapping[str, list[dict[str, Any]]]:
    """Returns lists from the node on this machine; empty ones, silently, if it does not answer."""
    import os

    from sterna.client.calls import Caller
    from sterna.client.endpoint import find
    from sterna.errors import SternaError

    try:
        with Caller(find(state=state or os.environ.get("STERNA_STATE")), timeout=_ASK_SECONDS) as caller:
            found: dict[str, Any] = caller.call(method)
    except (SternaError, OSError):
        # A broken completion must not write on the line that is being typed.
        return defaultdict(list)
    return found
