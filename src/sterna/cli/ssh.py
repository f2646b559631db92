"""`sterna attach user@host`: one ssh call sets the other machine up, then the connection is direct.

The other machine's side is the hidden `sterna invite`. Secrets travel through ssh's pipe only: never as an argument,
never in an environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sterna.errors import ConnectionLostError, RefusedError, SternaError, TrustError, UsageError

if TYPE_CHECKING:
    import subprocess

    from sterna.client.endpoint import Endpoint
    from sterna.client.remote import Remote, Target

F = TypeVar("F", bound=Callable[..., Any])

_META = "sterna.ssh"
_MARK = "STERNA "
MISSING = "STERNA-MISSING"
_HOSTNAME = "STERNA-HOST "
_OUTPUT_MAX_BYTES = 256 * 1024
_KNOWN_SECONDS = 2.0
_DIRECT_SECONDS = 5.0
_TUNNEL_SECONDS = 20.0
_TOOK_NOTHING = 127
_LOGIN_FAILED = 255
_PATH = re.compile(r"(?:~/)?[A-Za-z0-9._/+@%: -]{1,1024}\Z")
INSTALL = (
    "install it there (`pipx install` of its source directory, Python 3.11 or newer) or say where it is with "
    "--remote-sterna PATH"
)

# What ssh must not do on this call, whatever the user's configuration says for logins: no forwardings that fail or
# linger, no other command, no terminal.
PLAIN = ("-T", "-a", "-x", "-o", "RemoteCommand=none")


def ssh_options(command: F) -> F:
    """Adds the options for `user@host`; `reach` finds them in the context."""

    def keep(ctx: click.Context, option: click.Parameter, value: object) -> object:
        ctx.meta.setdefault(_META, {})[option.name] = value
        return value

    for option in (
        click.option(
            "--via-ssh", is_flag=True, expose_value=False, callback=keep,
            help="With user@host: stay within ssh, where no other port is open (does not roam).",
        ),
        click.option(
            "--listen", metavar="ADDRESS", expose_value=False, callback=keep,
            help="With user@host: where a node started there listens (where ssh came in).",
        ),
        click.option(
            "--remote-sterna", metavar="PATH", expose_value=False, callback=keep,
            help="With user@host: where sterna is there.",
        ),
        click.option(
            "--ssh", "ssh", metavar="COMMAND", envvar="STERNA_SSH", default="ssh", expose_value=False, callback=keep,
            help="With user@host: the ssh command (ssh).",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def given() -> list[str]:
    """Returns the options by which the same node is reached again, as the user gave them."""
    context = click.get_current_context(silent=True)
    options: dict[str, Any] = context.meta.get(_META, {}) if context is not None else {}
    words = ["--via-ssh"] if options.get("via_ssh") else []
    if options.get("remote_sterna"):
        words += ["--remote-sterna", options["remote_sterna"]]
    if options.get("ssh", "ssh") != (os.environ.get("STERNA_SSH") or "ssh"):
        words += ["--ssh", options["ssh"]]
    return words


def reach(text: str, *, state: str | None, port: int | None) -> tuple[Endpoint, str | None]:
    """Returns the node at `user@host` (or `ssh://…`), and the agent that the target names.

    A node known from before is asked directly, without ssh; else one ssh call finds or starts it. `port` is where a
    node started there shall listen. Raises SternaError with what to do.
    """
    import shlex

    from sterna.client.remote import RemoteStore, Target, endpoint_of

    context = click.get_current_context(silent=True)
    options: dict[str, Any] = context.meta.get(_META, {}) if context is not None else {}
    target = Target(text)
    store = RemoteStore(state)
    command = shlex.split(options.get("ssh") or "ssh")
    if options.get("via_ssh"):
        remote = _invited(command, target, options, port)
        _tell_unused(target, remote, options, port)
        return _tunnelled(command, target, remote, context), target.agent
    known = store.get(target, int(time.time()))
    if known is not None and port in (None, known.port):
        with contextlib.suppress(ConnectionLostError, RefusedError, TrustError):
            endpoint = endpoint_of(known, target, seconds=_KNOWN_SECONDS, state=state)
            known.started = False
            _tell_unused(target, known, options, port)
            return endpoint, target.agent
    remote = _invited(command, target, options, port)
    _tell_unused(target, remote, options, port)
    try:
        endpoint = endpoint_of(remote, target, seconds=_DIRECT_SECONDS, state=state)
    except ConnectionLostError as error:
        raise _blocked(target, remote) from error
    store.put(target, remote)
    return endpoint, target.agent


def _tell_unused(target: Target, remote: Remote, options: dict[str, Any], port: int | None) -> None:
    """Says which options a node that runs already takes no notice of."""
    listen = options.get("listen")
    for option, wanted, place in (
        ("--port", port not in (None, remote.port), f"port {remote.port}"),
        ("--listen", listen not in (None, remote.host), f"{remote.host} port {remote.port}"),
    ):
        if wanted and not remote.started:
            sys.stderr.write(f"sterna: The node on {target.host} runs already on {place}; {option} is not used.\n")


def _blocked(target: Target, remote: Remote) -> ConnectionLostError:
    if not remote.addresses:
        return ConnectionLostError(
            f"The node on {target.host} listens on {remote.host} only: stop it there (its programs go on) and attach "
            "again, or use --via-ssh."
        )
    places = ", ".join(dict.fromkeys(remote.addresses))
    return ConnectionLostError(
        f"The node on {target.host} runs, but TCP port {remote.port} of {places} does not answer from here: open that "
        "port in its firewall, choose another with --port, or use --via-ssh."
    )


# ---- ssh --------------------------------------------------------------------------------------------------------


def remote_command(sterna: str | None, words: str = "invite") -> str:
    """Returns what the other machine's login shell shall run: finds sterna and becomes `sterna invite`, or `words`.

    It is made so that sh, bash, zsh, fish and csh read it alike: one line, one pair of single quotes, no exclamation
    mark, no backslash.
    """
    places = ['"$(command -v sterna)"', '"$HOME/.local/bin/sterna"', "/usr/local/bin/sterna"]
    if sterna is not None:
        if not _PATH.match(sterna):
            raise UsageError("--remote-sterna takes a path of letters, digits and . _ - / + @ % : ~ and spaces.")
        chosen = "$HOME/" + sterna[2:] if sterna.startswith("~/") else sterna
        places = [f'"{chosen}"']
    run = f'if [ -x "$s" ] && [ -f "$s" ]; then exec "$s" {words}; fi'
    script = f"for s in {' '.join(places)}; do {run}; done; "
    if sterna is None:
        # A login shell may take a second to start, so it is asked last; its start-up files may print anything.
        script += f's=$("$SHELL" -lc "command -v sterna" </dev/null 2>/dev/null | tail -n 1); {run}; '
    return f"exec sh -c '{script}echo {MISSING}; exit {_TOOK_NOTHING}'"


def _words(command: list[str], target: Target, *options: str) -> list[str]:
    port = ["-p", str(target.port)] if target.port is not None else []
    return [*command, *options, *port, "--", target.login]


def _invited(command: list[str], target: Target, options: dict[str, Any], port: int | None) -> Remote:
    """Makes the ssh call and returns what the other machine answers."""
    import subprocess

    import msgspec

    request = {"version": 1, "port": port, "listen": options.get("listen"), "tunnel": bool(options.get("via_ssh"))}
    words = _words(
        command, target, *PLAIN, "-o", "ClearAllForwardings=yes", "-o", "PermitLocalCommand=yes",
        # ssh says so which name or address it uses, without a second call of it.
        "-o", f"LocalCommand=echo {_HOSTNAME}%h",
    )  # fmt: skip
    words.append(remote_command(options.get("remote_sterna")))
    try:
        ssh = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as error:
        raise UsageError(f"{command[0]!r} cannot be started: {error.strerror}; is OpenSSH installed?") from None
    assert ssh.stdin is not None
    assert ssh.stdout is not None
    with ssh:
        with contextlib.suppress(BrokenPipeError):
            ssh.stdin.write(msgspec.json.encode(request) + b"\n")
            ssh.stdin.close()
        output = ssh.stdout.read(_OUTPUT_MAX_BYTES)
        if len(output) == _OUTPUT_MAX_BYTES:
            ssh.kill()
    return _understood(output.decode("utf-8", "replace"), ssh.returncode, target)


def _understood(output: str, status: int, target: Target) -> Remote:
    """Returns what `sterna invite` printed among what start-up files may have printed."""
    import msgspec

    from sterna.client.remote import Remote

    lines = output.splitlines()
    answer = next((line[len(_MARK) :] for line in lines if line.startswith(_MARK)), None)
    if answer is None:
        if MISSING in lines:
            raise UsageError(f"There is no sterna on {target.host}: {INSTALL}.")
        if status == _LOGIN_FAILED:
            raise ConnectionLostError(
                f"ssh could not reach {target.host}, or not log in there as asked: what it said is above (`ssh "
                f"{target.login}` has to work by itself)."
            )
        raise ConnectionLostError(
            f"sterna on {target.host} could not prepare the connection (status {status}); what it said is above: if it "
            "does not know `invite`, update it there."
        )
    try:
        remote = msgspec.json.decode(answer, type=Remote)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise UsageError(f"The answer of {target.host} makes no sense: update sterna there.") from None
    remote.check()
    if remote.addresses:
        used = next((line[len(_HOSTNAME) :].strip() for line in lines if line.startswith(_HOSTNAME)), target.host)
        # The name the user knows it by first: it is right behind address translation as well.
        remote.addresses = list(dict.fromkeys([used, *remote.addresses]))
    if remote.hint:
        sys.stderr.write(f"sterna: {target.host}: {_printable(remote.hint)}\n")
    return remote


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:300]


class _Tunnel:
    """An ssh process that forwards a Unix socket to the node there; started again when it ends."""

    def __init__(self, words: list[str], path: str) -> None:
        self._words = words
        self._path = path
        self._closing = False
        self._process = self._start(words, quiet=False)

    def _start(self, words: list[str], *, quiet: bool) -> subprocess.Popen[bytes]:
        import subprocess

        nothing = subprocess.DEVNULL
        return subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=nothing if quiet else None)

    def wait(self, target: Target) -> None:
        """Waits until it is there; ConnectionLostError if it does not come."""
        deadline = time.monotonic() + _TUNNEL_SECONDS
        while not os.path.exists(self._path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise ConnectionLostError(f"ssh to {target.login} makes no tunnel; what it said is above.")
            time.sleep(0.02)
        import threading

        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        """Starts ssh again when the network has ended it; without a prompt, for the terminal is the session's."""
        while True:
            self._process.wait()
            if self._closing:
                return
            time.sleep(1.0)
            words = [*self._words[:-2], "-o", "BatchMode=yes", *self._words[-2:]]
            self._process = self._start(words, quiet=True)

    def close(self) -> None:
        """Ends it."""
        self._closing = True
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        self._process.wait()


def _tunnelled(command: list[str], target: Target, remote: Remote, context: click.Context | None) -> Endpoint:
    """Returns the remote node as it is reached through ssh, with TLS to the node inside all the same."""
    import socket
    import tempfile

    from sterna.client.endpoint import Endpoint

    directory = tempfile.TemporaryDirectory(prefix="sterna-")
    path = os.path.join(directory.name, "s")
    host = f"[{remote.host}]" if ":" in remote.host else remote.host
    words = _words(
        command, target, *PLAIN, "-N", "-o", "ExitOnForwardFailure=no", "-o", "StreamLocalBindUnlink=yes",
        "-o", "ServerAliveInterval=5", "-o", "ControlPath=none", "-L", f"{path}:{host}:{remote.port}",
    )  # fmt: skip
    tunnel = _Tunnel(words, path)
    if context is not None:
        context.call_on_close(directory.cleanup)
        context.call_on_close(tunnel.close)
    tunnel.wait(target)
    pin = remote.pin()
    addresses: list[tuple[int, tuple[object, ...] | str]] = [(socket.AF_UNIX, path)]
    return Endpoint(target.host, addresses, pin.node_id, context=pin.context(), credential=remote.token)


# ---- the other machine's side -----------------------------------------------------------------------------------


@click.command(hidden=True)
def invite() -> None:
    """Answer `sterna attach user@host`: find or start the node here and print how to reach it.

    Reads one line of JSON from standard input and prints one line.
    """
    from sterna.cli.invite import answer

    try:
        line = answer(sys.stdin.buffer.readline(65_536))
    except SternaError as error:
        sys.stderr.write(f"sterna: {os.uname().nodename}: {error}\n")
        raise SystemExit(1) from None
    sys.stdout.write(_MARK + line + "\n")
    sys.stdout.flush()
