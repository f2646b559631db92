"""`sterna up` and `sterna down`: a node and an agent on this machine."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Literal

import click

from sterna.cli.options import WithCommand
from sterna.cli.spoken import in_state, spoken
from sterna.errors import AgentError, SternaError, UsageError

if TYPE_CHECKING:
    from sterna.cli.serve import Ready

_POD_SECONDS = 10.0
_STOP_SECONDS = 5.0
_ASK_SECONDS = 3.0
_POLL_SECONDS = 0.01
_LOG = "node.log"
_LINK_SECONDS = 3600
_LOOPBACK = "127.0.0.1"


@click.command(cls=WithCommand)
@click.option("--host", default=_LOOPBACK, show_default=True, help="Address to listen on.")
@click.option("--port", default=7220, show_default=True, type=click.IntRange(0, 65535), help="TCP port.")
@click.option("--web-port", type=click.IntRange(0, 65535), help="Port of the web page (7222); 0: none.")
@click.option(
    "--quic-port", default=7221, show_default=True, type=click.IntRange(0, 65535), help="UDP port of QUIC; 0: none."
)  # fmt: skip
@click.option("--no-web", is_flag=True, help="No web page.")
@click.option("--web-name", "web_names", multiple=True, help="A further name for the web page's address; repeatable.")
@click.option("--state", type=click.Path(file_okay=False), envvar="STERNA_STATE", help="Directory of keys and state.")
@click.option("--agent", default="main", show_default=True, help="The agent's name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]),
    help="What is logged (info); on a terminal, this sends the log to standard error.",
)  # fmt: skip
@click.argument("command", nargs=-1)
def up(
    host: str, port: int, web_port: int | None, no_web: bool, web_names: tuple[str, ...], state: str | None,
    agent: str, as_json: bool, quic_port: int,
    log_level: Literal["debug", "info", "warning", "error"] | None, command: tuple[str, ...],
) -> None:  # fmt: skip
    """Start everything on this machine: a node, and one agent that runs COMMAND (default: your shell).

    Ctrl-C stops the node; the agent's programs go on, and `sterna up` finds them again. `sterna down` stops all. Where
    a node runs already, only the agent is started.
    """
    from sterna import paths
    from sterna.cli.loop import run
    from sterna.cli.serve import serve_node
    from sterna.ids import check_agent
    from sterna.node.config import WEB_PORT, NodeConfig
    from sterna.pod.spawn import check_command

    if no_web and web_port:
        raise UsageError("--no-web and --web-port contradict each other: leave one out.")
    base = paths.state_dir(state)
    sockets = paths.private_dir(os.path.join(base, "sockets")) if state is not None else paths.runtime_dir()
    config = NodeConfig(
        host=host, port=port, web_port=0 if no_web else WEB_PORT if web_port is None else web_port,
        web_names=list(web_names), state=os.path.join(base, "node"), sockets=sockets, log_level=log_level or "info",
        quic_port=quic_port,
    )  # fmt: skip
    words = list(command) or [os.environ.get("SHELL") or "/bin/sh"]
    if not _answers(os.path.join(sockets, f"local_{check_agent(agent)}")):
        check_command(words, os.path.expanduser("~"), os.environ)
    paths.private_dir(config.state)
    if running_pid(config.state):
        _beside(base, sockets, agent, words, as_json, state, host)
        return
    _tell_listable(base)
    again = spoken("up", "--host", "0.0.0.0", *_given(), state=state)  # noqa: S104 -- told, not bound to
    log_path = os.path.join(base, _LOG) if sys.stderr.isatty() and log_level is None else None

    def ready(about: Ready) -> None:
        found = start_pod(base, sockets, agent, words)
        _announce(about, base, agent, as_json, state, again)
        if not as_json:
            if found:
                _tell_found(about, agent, list(command), state)
            if log_path is not None:
                print(f"The log is in {log_path}.", flush=True)

    interrupted = run(serve_node(config, ready, log_path, web_asked=bool(web_port)))
    if interrupted and sys.stdout.isatty() and not as_json:
        print(f"\nThe node has stopped, the programs go on; `{spoken('down', state=state)}` ends them.", flush=True)
    elif sys.stdout.isatty() and not as_json:
        again = spoken("up", *_given("--host"), state=state)
        print(f"\nThe node was stopped from elsewhere, as by `sterna down`; `{again}` starts it again.", flush=True)


def _given(*more: str) -> list[str]:
    """Returns the options as the user gave them that say which node is started, and `more` of them."""
    context = click.get_current_context()
    wanted = ("--port", "--web-port", "--quic-port", "--no-web", "--web-name", "--agent", *more)
    words: list[str] = []
    for parameter in context.command.params:
        value, option = context.params.get(parameter.name or ""), parameter.opts[0]
        if option in wanted and _typed(context, parameter.name or ""):
            for each in value if isinstance(value, tuple) else (value,):
                words += [option] if each is True else [option, str(each)]
    return words


def _typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _tell_listable(base: str) -> None:
    """Says that others may look into a directory that is not of our making; to change it is left to whose it is."""
    if os.stat(base).st_mode & 0o077:
        print(f"sterna: {base} can be listed by others: `chmod 700 {shlex.quote(base)}`.", file=sys.stderr, flush=True)


def start_pod(base: str, sockets: str, agent: str, command: list[str]) -> bool:
    """Starts an agent's process unless it runs already, and returns whether it did; raises AgentError when it does not
    come up in time.
    """
    path = os.path.join(sockets, f"local_{agent}")
    if _answers(path):
        return True
    log_path = os.path.join(base, f"agent-{agent}.log")
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "wb") as log:
        words = [sys.executable, "-m", "sterna", "pod", "--agent", agent, "--sockets", sockets, "--", *command]
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + _POD_SECONDS
    while not _answers(path):
        if child.poll() is not None or time.monotonic() > deadline:
            raise AgentError(f"The agent {agent!r} did not start; {log_path} says why.")
        time.sleep(_POLL_SECONDS)
    return False


def _answers(path: str) -> int:
    """Returns the pid of who serves a socket, 0 if nobody does."""
    from sterna.transport.listen import peer_uid

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
            return peer_uid(probe)[0]
        except OSError:
            return 0


def running_pid(directory: str) -> int:
    """Returns the pid of the node that runs with this state directory, 0 if none does."""
    from sterna.client.endpoint import LOCAL_SOCKET

    return _answers(os.path.join(directory, LOCAL_SOCKET))


def runs_already(directory: str, pid: int, state: str | None, *, chosen: str | None, elsewhere: bool) -> UsageError:
    """Returns the error for a second node with the state of one that runs; `state` is the client's own.

    `chosen` is the state that the user named, if any; `elsewhere` says that the second one was to listen somewhere
    else: then the first has to stop, but not its programs.
    """
    from sterna.client.calls import Caller
    from sterna.client.endpoint import find

    try:
        with Caller(find(state=directory), state=state, timeout=_ASK_SECONDS) as caller:
            place = f", port {caller.call('node')['port']}"
    except SternaError:
        place = ""
    if elsewhere:
        do = f"stop it with Ctrl-C where it runs, or with `kill {pid}` (the programs go on), then start this one again"
    else:
        here = "".join(f" {shlex.quote(word)}" for word in in_state(chosen))
        do = f"`sterna attach{here}`, or stop it with `sterna down{here}`, which ends its programs too"
    return UsageError(f"A node runs here already (pid {pid}{place}): {do}.")


def _beside(
    base: str, sockets: str, agent: str, command: list[str], as_json: bool, state: str | None, host: str
) -> None:  # fmt: skip
    """Starts only an agent, as the node runs already; raises UsageError if the agent does, too."""
    directory = os.path.join(base, "node")
    pid = running_pid(directory)
    if _answers(os.path.join(sockets, f"local_{agent}")):
        raise runs_already(directory, pid, base, chosen=state, elsewhere=host != _LOOPBACK)
    _tell_unused(directory, base)
    start_pod(base, sockets, agent, command)
    if as_json:
        print(json.dumps({"pid": pid, "state": base, "agent": agent}), flush=True)
        return
    print(f"The node runs already (pid {pid}).")
    print(f"The agent {agent!r} is ready:  {_attach(agent, state)}", flush=True)


def _tell_unused(directory: str, base: str) -> None:
    """Says which options a node that runs already takes no notice of."""
    context = click.get_current_context()
    if not any(_typed(context, name) for name in ("host", "port", "web_port", "quic_port")):
        return
    from sterna.client.calls import Caller
    from sterna.client.endpoint import find

    with Caller(find(state=directory), state=base, timeout=_ASK_SECONDS) as caller:
        about = caller.call("node")
    told = [name for name in ("host", "port") if _typed(context, name)]
    unused = [f"--{name}" for name in told if context.params[name] not in (about[name], 0)]
    unused += [f"--{name.replace('_', '-')}" for name in ("web_port", "quic_port") if _typed(context, name)]
    if unused:
        place, verb = f"{about['host']} port {about['port']}", "is" if len(unused) == 1 else "are"
        text = f"sterna: The node runs already on {place}; {', '.join(unused)} {verb} not used."
        print(text, file=sys.stderr, flush=True)


def _attach(agent: str, state: str | None) -> str:
    return spoken("attach", *([] if agent == "main" else [agent]), state=state)


def _tell_found(about: Ready, agent: str, command: list[str], state: str | None) -> None:
    """Says what an agent that ran already goes on with."""
    label, sessions = about.agent(agent, _ASK_SECONDS)
    if command and label and label != " ".join(command)[: len(label)]:
        print(f"The agent {agent!r} goes on with `{label}`; `{spoken('down', state=state)}` first to change it.")
    if label is not None:
        print(f"{sessions} session{'' if sessions == 1 else 's'} found again.", flush=True)


def _announce(about: Ready, base: str, agent: str, as_json: bool, state: str | None, again: str) -> None:
    from sterna.cli.service import logout_hint

    about.opened.wait()
    hint = logout_hint()
    if hint is not None:
        print(hint, file=sys.stderr, flush=True)
    # Where nobody reads along, the log says it of QUIC, which sessions do without.
    for line in (about.no_quic if sys.stderr.isatty() else "", about.without):
        if line:
            print(f"sterna: {line}", file=sys.stderr, flush=True)
    if as_json:
        text = json.dumps(
            {
                "pid": os.getpid(),
                "host": about.host,
                "port": about.port,
                "url": about.url,
                "state": base,
                "agent": agent,
                "fingerprint": about.fingerprint,
            }
        )
        print(text, flush=True)
        return
    place = f"{about.host} port {about.port}"
    print(f"The node listens on {place} (pid {os.getpid()}, fingerprint {about.fingerprint}).")
    if about.url is not None:
        _tell_page(about, about.url, state, again)
    print(f"The agent {agent!r} is ready:  {_attach(agent, state)}")
    print(f"Ctrl-C stops the node, the programs go on; `{spoken('down', state=state)}` stops all.", flush=True)


def _tell_page(about: Ready, url: str, state: str | None, again: str) -> None:
    """Says where the web page is; on a terminal with a link that opens it: a secret, which logs must not have."""
    host, away = _page_host(about.host)
    link = None
    if sys.stdout.isatty():
        try:
            link = about.invitation(host, _LINK_SECONDS)
        except SternaError as error:
            print(f"sterna: there is no link to the web page now: {error}", file=sys.stderr)
    if link is None:
        print(f"The web page is at {url}; `{spoken('share', state=state)}` makes a link for another device.")
    elif away:
        from sterna.cli.access import print_qr

        print_qr(link)
        print("The code above opens all sessions on your phone, as does this link in the browser of another device:")
        print(f"    {link}")
        print("It is good for an hour and for the first that uses it; browsers warn first, as no public authority made")
        print(f"the node's certificate. `{spoken('share', '--all', state=state)}` makes another one.")
    else:
        print("In a browser on this machine, within an hour, this opens all sessions for the first that uses it:")
        print(f"    {link}")
        print(f"For your phone the node has to listen where that can reach it: Ctrl-C here, then `{again}`.")


def _page_host(listening: str) -> tuple[str, bool]:
    """Returns the host for a link to the web page, and whether another device can reach it."""
    from sterna.cli.access import own_address
    from sterna.trust.links import unreachable_reason

    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listening)  # noqa: S104 -- compared with, not bound to
    host = listening if here is None else own_address() or here
    return host, unreachable_reason(host) is None


@click.command()
@click.option("--state", type=click.Path(file_okay=False), envvar="STERNA_STATE", help="Directory of keys and state.")
def down(state: str | None) -> None:
    """Stop the node and all agents that run on this machine for you, with their programs."""
    from sterna import paths
    from sterna.client.endpoint import LOCAL_SOCKET, state_of_node

    base = paths.state_dir(state)
    sockets = os.path.join(base, "sockets") if state is not None else paths.runtime_path()
    agents: list[str] = []
    if os.path.isdir(sockets):
        agents = [os.path.join(sockets, name) for name in sorted(os.listdir(sockets)) if "_" in name]
    # The agents first: while the node runs it learns from them that their sessions ended, and how.
    silent: list[str] = []
    deadline = time.monotonic() + _STOP_SECONDS
    stopping = [path for path in agents if _stop(path, deadline, silent)]
    deadline = time.monotonic() + _STOP_SECONDS
    while any(map(os.path.exists, stopping)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    node = os.path.join(state_of_node(base), LOCAL_SOCKET)
    stopped = len(stopping) + _stop(node, time.monotonic() + _STOP_SECONDS, silent)
    if not stopped and not silent:
        raise UsageError("Nothing runs here.")
    if stopped:
        print(f"Stopped {stopped} process{'es' if stopped > 1 else ''}.")
    if silent:
        raise AgentError(f"What serves {silent[0]} hangs: find its process with `ss -xlp` and end it with `kill -9`.")


def _stop(path: str, deadline: float, silent: list[str]) -> bool:
    """Asks who serves a socket to end, if that is one of our processes, and returns whether it was.

    Who takes no connection until `deadline` (time.monotonic()) is added to `silent`.
    """
    from sterna.transport.listen import peer_uid

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.setblocking(False)
            while (failed := probe.connect_ex(path)) == errno.EAGAIN:  # its queue is full (connect(2))
                if time.monotonic() > deadline:
                    silent.append(path)
                    return False
                time.sleep(_POLL_SECONDS)
            if failed:
                return False
            pid, uid = peer_uid(probe)
            if uid != os.geteuid() or pid <= 1:
                return False
            os.kill(pid, signal.SIGTERM)
        except OSError:
            return False
        return True
