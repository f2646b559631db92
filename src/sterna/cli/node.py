"""`sterna node`: the node daemon by itself."""

from __future__ import annotations

import os
import sys

import click

from sterna.errors import ConfigError

_TOKEN_VARIABLE = "STERNA_NODE_TOKEN"  # noqa: S105 -- the name of a variable, not a secret


@click.command(
    epilog="Every flag is also a setting of the TOML file and a variable STERNA_NODE_…; docs/operations.md lists all."
)
@click.option("-p", "--port", type=click.IntRange(0, 65535), help="TCP port (7220).")
@click.option("-s", "--sockets", type=click.Path(file_okay=False), help="Directory of the pods' sockets.")
@click.option("-l", "--keeper", metavar="URL", help="URL of the Keeper; without one the node works on its own.")
@click.option(
    "-t", "--token", metavar="@FILE|-", help="What the Keeper knows the node by; better: STERNA_NODE_TOKEN, or a file."
)  # fmt: skip
@click.option("--config", "path", type=click.Path(dir_okay=False), help="TOML file of settings.")
@click.option("--host", help="Address to listen on (127.0.0.1).")
@click.option("--name", "names", multiple=True, help="A further host name in the node's certificate; repeatable.")
@click.option("--state", type=click.Path(file_okay=False), help="The node's own directory: keys, metadata, journal.")
@click.option("--token-file", type=click.Path(dir_okay=False), help="File of fixed access tokens for clients.")
@click.option("--tls-cert", type=click.Path(dir_okay=False), help="Certificate from a public authority (PEM).")
@click.option("--tls-key", type=click.Path(dir_okay=False), help="Its key (PEM).")
@click.option("--web-port", type=click.IntRange(0, 65535), help="Port of the web page, usually 7222; 0: none (0).")
@click.option("--web-host", help="Address that the web page listens on (--host).")
@click.option("--web-name", "web_names", multiple=True, help="A name of a reverse proxy for the web page; repeatable.")
@click.option("--metrics-host", help="Address of the metrics (127.0.0.1).")
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="Port of the metrics for Prometheus; 0: none.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="What is logged (info).")
@click.option("--check", is_flag=True, help="Only check the configuration.")
def node(
    path: str | None, check: bool, token: str | None, names: tuple[str, ...], web_names: tuple[str, ...],
    **flags: object,
) -> None:  # fmt: skip
    """The node daemon: carries the sessions of this machine's pods, in the foreground.

    SIGTERM drains it (clients come back to the next one), SIGINT stops it at once; sessions and pods stay. Logs go to
    standard error as JSON lines.
    """
    from sterna.node.config import load

    environ = dict(os.environ)
    # Programs that the node's user runs later have no business with it.
    os.environ.pop(_TOKEN_VARIABLE, None)
    lists = {"names": ",".join(names) or None, "web_names": ",".join(web_names) or None}
    config = load({**flags, **lists, "token": _token(token)}, environ, path)
    if check:
        click.echo("The configuration is good.")
        return
    from sterna.cli.up import running_pid, runs_already

    pid = running_pid(config.state)
    if pid:
        raise runs_already(config.state, pid, None, chosen=None, elsewhere=False)
    from sterna.cli.loop import run
    from sterna.cli.serve import serve_node

    run(serve_node(config, lambda _ready: None, web_asked=bool(flags["web_port"])))


def _token(given: str | None) -> str | None:
    """Returns the token that `-t` means; one that stands in clear on the command line is taken, with a warning."""
    if given is None or given.startswith("@"):
        return given
    if given != "-":
        sys.stderr.write("sterna: everybody on this machine can read a token on the command line; use -t @FILE.\n")
        return given
    line = sys.stdin.readline(4_097).strip()
    if not line or line.startswith("@"):
        raise ConfigError("The command line: token is empty: expected it as one line on standard input.")
    return line
