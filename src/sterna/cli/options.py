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
