"""`sterna pod`: serves a command as an agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import click

from sterna.cli.options import WithCommand


@click.command(cls=WithCommand)
@click.option("--tenant", default="local", show_default=True, help="Whose agent it is.")
@click.option("--agent", required=True, help="The agent's name.")
@click.option("--sockets", type=click.Path(file_okay=False), help="Directory of pod sockets.")
@click.option(
    "--kind",
    type=click.Choice(["pty", "stream"]),
    default="pty",
    show_default=True,
    help="Under a terminal, or on pipes.",
)
@click.option("--cwd", type=click.Path(file_okay=False), help="Where the command runs (default: your home directory).")
@click.argument("command", nargs=-1, required=True)
def pod(tenant: str, agent: str, sockets: str | None, kind: str, cwd: str | None, command: tuple[str, ...]) -> None:
    """Serve COMMAND as an agent: every session gets a program of its own."""
    from sterna import paths
    from sterna.cli.loop import run
    from sterna.pod.runner import ProgramStarter
    from sterna.pod.server import PodServer, socket_path
    from sterna.pod.spawn import check_command

    home = cwd or os.path.expanduser("~")
    check_command(command, home, os.environ)
    directory = paths.socket_dir(sockets) if sockets else paths.runtime_dir()
    starter = ProgramStarter(
        list(command),
        kind="stream" if kind == "stream" else "pty",
        cwd=home,
        env=os.environ,
        agent=agent,
    )

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        with contextlib.suppress(ValueError, OSError):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        server = PodServer(
            socket_path(directory, tenant, agent), starter, kind="stream" if kind == "stream" else "pty",
            features=["snapshot"] if kind == "pty" else [], label=" ".join(command)[:80],
        )  # fmt: skip
        use = f"attach {agent}" if kind == "pty" else f"pipe {agent} --new"
        print(f"The agent {agent!r} is ready:  sterna {use}", flush=True)
        try:
            await stop.wait()
        finally:
            server.close()
            await starter.wait_ended()

    run(serve())
