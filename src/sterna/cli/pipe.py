"""`sterna pipe`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from sterna.cli.options import node_options
from sterna.errors import UsageError

if TYPE_CHECKING:
    from sterna.client.endpoint import Endpoint
    from sterna.client.session import Wish

_GREETING_SECONDS = 3.0
_POLL_SECONDS = 0.05


@click.command(
    epilog="\b\nAn agent on pipes, which sees the input's end:\n  sterna pod --agent sort --kind stream -- sort &\n"
    "  sterna pipe sort --new < in.txt > out.txt"
)
@click.argument("target", metavar="[AGENT|SESSION|LINK]", required=False)
@click.option("--name", help="The session with this name, made if there is none.")
@click.option("--new", "fresh", is_flag=True, help="A new session.")
@click.option("--pty", is_flag=True, help="Yes, type the input into a terminal's program, such as a shell.")
@click.option("--in", "source", type=click.Path(), help="Read this file instead of standard input.")
@click.option("--out", "sink", type=click.Path(), help="Write this file instead of standard output.")
@click.option("--from-output", "output", type=click.IntRange(0), help="Begin at this byte of the output.")
@node_options
def pipe(
    target: str | None, name: str | None, fresh: bool, source: str | None, sink: str | None, output: int | None,
    pty: bool, state: str | None, host: str | None, port: int | None,
) -> int:  # fmt: skip
    """Connect standard input and output to a session, exactly: every byte once, through any loss of the network.

    The exit status is the program's. With --in and --out both regular files, the same command goes on where a killed
    one stood; a small file beside --out keeps its place.

    A terminal's program gets no input by surprise: that needs --pty, or --name, or AGENT with --new.
    """
    from sterna.cli.target import choose, without_trace
    from sterna.client import pipe as client
    from sterna.client.endpoint import find
    from sterna.trust.links import is_link

    target = without_trace(target)
    link = target if target is not None and is_link(target) else None
    options = client.PipeOptions(f"{target or ''} {name or ''} {fresh}")
    options.state = state
    options.source = source
    options.target = sink
    options.output = output
    explicit = pty or name is not None or (target is not None and fresh)

    def begin() -> tuple[Endpoint, Wish]:
        endpoint, wish = choose(target, name=name, fresh=fresh, state=state, host=host, port=port, interactive=False)
        if not explicit and endpoint.session is None:
            _refuse_terminal(endpoint, wish, state)
        return endpoint, wish

    return client.pipe(
        options,
        begin,
        lambda: find(state=state, link=link) if link is not None else find(state=state, host=host, port=port),
    )


def _refuse_terminal(endpoint: Endpoint, wish: Wish, state: str | None) -> None:
    """Raises UsageError if what is meant runs under a terminal: a shell there would take the input for commands."""
    from sterna.client.calls import Caller

    deadline = time.monotonic() + _GREETING_SECONDS
    with Caller(endpoint, state=state) as caller:
        sessions, agents = caller.listing()
        # Of what kind an agent is the node knows once it has greeted.
        while time.monotonic() < deadline and not all(a["ready"] for a in agents if a["name"] == wish.agent):
            time.sleep(_POLL_SECONDS)
            sessions, agents = caller.listing()
    if wish.uid is not None:
        kinds = [session["kind"] for session in sessions if session["uid"] == wish.uid.hex()]
        what = next((session["name"] for session in sessions if session["uid"] == wish.uid.hex()), "")
    else:
        kinds = [agent["kind"] for agent in agents if agent["name"] == wish.agent]
        what = wish.agent
    if "pty" in kinds:
        raise UsageError(
            f"{what!r} runs under a terminal, so its program would take the input for what somebody types: start an "
            "agent on pipes (`sterna pod --agent sort --kind stream -- sort`) and name it, or add --pty."
        )
