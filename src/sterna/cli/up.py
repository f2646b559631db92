"""`sterna up` and `sterna down`: a node and an agent on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import click

from sterna.errors import AgentError, UsageError

_POD_SECONDS = 10.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=7220, show_default=True, type=click.IntRange(0, 65535), help="TCP port.")
@click.option("--web-port", default=7222, hidden=True, type=click.IntRange(0, 65535))
@click.option("--quic-port", default=7221, hidden=True, expose_value=False, type=click.IntRange(0, 65535))
@click.option("--no-web", is_flag=True, hidden=True, expose_value=False)
@click.option("--state", type=click.Path(file_okay=False), envvar="STERNA_STATE", help="Directory of keys and state.")
@click.option("--agent", default="main", show_default=True, help="The agent's name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.argument("command", nargs=-1)
def up(
    host: str, port: int, web_port: int, state: str | None, agent: str, as_json: bool,
    command: tuple[str, ...],
) -> None:  # fmt: skip
    """Start everything on this machine: a node, and one agent that runs COMMAND (default: your shell).

    Ctrl-C stops the node; the agent's programs go on, and `sterna up` finds them again. `sterna down` stops all.
    """
    from sterna import paths
    from sterna.cli.loop import run
    from sterna.cli.serve import Ready, serve_node
    from sterna.node.config import NodeConfig

    base = paths.state_dir(state)
    sockets = paths.private_dir(os.path.join(base, "sockets")) if state is not None else paths.runtime_dir()
    config = NodeConfig(host=host, port=port, web_port=web_port, state=os.path.join(base, "node"), sockets=sockets)
    words = list(command) or [os.environ.get("SHELL") or "/bin/sh"]
    paths.private_dir(config.state)

    def ready(about: Ready) -> None:
        start_pod(base, sockets, agent, words)
        _announce(about, base, agent, as_json)

    run(serve_node(config, ready))


def start_pod(base: str, sockets: str, agent: str, command: list[str]) -> None:
    """Starts an agent's process unless it runs already; raises AgentError when it does not come up in time."""
    path = os.path.join(sockets, f"local_{agent}")
    if _answers(path):
        return
    log_path = os.path.join(base, f"agent-{agent}.log")
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "wb") as log:
        words = [sys.executable, "-m", "sterna", "pod", "--agent", agent, "--sockets", sockets, "--", *command]
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + _POD_SECONDS
    while not _answers(path):
        if child.poll() is not None or time.monotonic() > deadline:
            raise AgentError(f"The agent {agent!r} did not start; {log_path} says why.")
        time.sleep(0.01)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _announce(about: object, base: str, agent: str, as_json: bool) -> None:
    from sterna.cli.serve import Ready
    from sterna.cli.service import logout_hint

    assert isinstance(about, Ready)
    hint = logout_hint()
    if hint is not None:
        print(hint, file=sys.stderr, flush=True)
    if as_json:
        text = json.dumps(
            {
                "pid": os.getpid(),
                "host": about.host,
                "port": about.port,
                "state": base,
                "agent": agent,
                "fingerprint": about.fingerprint,
            }
        )
        print(text, flush=True)
        return
    print(f"The node listens on {about.host} port {about.port} (fingerprint {about.fingerprint}).")
    print(f"The agent {agent!r} is ready:  sterna attach" + ("" if agent == "main" else f" {agent}"))
    print("Ctrl-C stops the node, the programs go on; `sterna down` stops all.", flush=True)


@click.command()
@click.option("--state", type=click.Path(file_okay=False), envvar="STERNA_STATE", help="Directory of keys and state.")
def down(state: str | None) -> None:
    """Stop the node and all agents that run on this machine for you, with their programs."""
    from sterna import paths
    from sterna.client.endpoint import state_of_node
    from sterna.transport.listen import peer_uid

    base = paths.state_dir(state)
    sockets = os.path.join(base, "sockets") if state is not None else paths.runtime_path()
    targets = [os.path.join(state_of_node(base), "node.sock")]
    if os.path.isdir(sockets):
        targets += [os.path.join(sockets, name) for name in sorted(os.listdir(sockets)) if "_" in name]
    stopped = 0
    for path in targets:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
                pid, uid = peer_uid(probe)
            except OSError:
                continue
            if uid == os.geteuid() and pid > 1:
                os.kill(pid, signal.SIGTERM)
                stopped += 1
    if not stopped:
        raise UsageError("Nothing runs here.")
    print(f"Stopped {stopped} process{'es' if stopped > 1 else ''}.")
