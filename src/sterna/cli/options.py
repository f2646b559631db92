"""Options that many commands share: which node, which state, JSON or text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def node_options(command: F) -> F:
    """Adds --state, --host and --port, which say where the node is."""
    for option in (
        click.option("--port", type=click.IntRange(1, 65535), help="Its TCP port (7220)."),
        click.option("--host", help="The node's host; without it, this machine's node."),
        click.option(
            "--state", type=click.Path(file_okay=False), envvar="STERNA_STATE", help="Directory of keys and state."
        ),
    ):
        command = option(command)
    return command


class WithCommand(click.Command):
    """A command that ends in COMMAND…, whose own options are left to it; what stands before it must be known."""

    ignore_unknown_options = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises NoSuchOption for a COMMAND that begins with what looks like an option of ours, unless after `--`."""
        after = args[args.index("--") + 1 :] if "--" in args else []
        rest = super().parse_args(ctx, args)
        words: tuple[str, ...] = ctx.params.get("command", ())
        if len(words) > len(after) and words[0].startswith("-") and words[0] != "-" and not ctx.resilient_parsing:
            from difflib import get_close_matches

            option = words[0].split("=")[0]
            known = [each for parameter in self.params for each in parameter.opts if each.startswith("--")]
            raise click.NoSuchOption(option, possibilities=get_close_matches(option, known), ctx=ctx)
        return rest
