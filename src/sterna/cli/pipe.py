"""`sterna pipe`."""

from __future__ import annotations

import click

from sterna.cli.options import node_options


@click.command()
@click.argument("target", required=False)
@click.option("--name", help="The session with this name, made if there is none.")
@click.option("--new", "fresh", is_flag=True, help="A new session.")
@click.option("--in", "source", type=click.Path(), help="Read this file instead of standard input.")
@click.option("--out", "sink", type=click.Path(), help="Write this file instead of standard output.")
@click.option("--from-output", "output", type=click.IntRange(0), help="Begin at this byte of the output.")
@node_options
def pipe(
    target: str | None, name: str | None, fresh: bool, source: str | None, sink: str | None, output: int | None,
    state: str | None, host: str | None, port: int | None,
) -> int:  # fmt: skip
    """Connect standard input and output to a session, exactly: every byte once, through any loss of the network.

    The exit status is the program's. With --in and --out both regular files, the same command goes on where a killed
    one stood; a small file beside --out keeps its place.
    """
    from sterna.cli.target import choose
    from sterna.client import pipe as client
    from sterna.client.endpoint import find
    from sterna.trust.links import is_link

    link = target if target is not None and is_link(target) else None
    options = client.PipeOptions(f"{target or ''} {name or ''} {fresh}")
    options.state = state
    options.source = source
    options.target = sink
    options.output = output
    return client.pipe(
        options,
        lambda: choose(target, name=name, fresh=fresh, state=state, host=host, port=port),
        lambda: find(state=state, link=link) if link is not None else find(state=state, host=host, port=port),
    )
