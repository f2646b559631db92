"""What `sterna attach user@host` runs on the other machine: finds or starts the node there, says how to reach it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import msgspec

from sterna import paths
from sterna.client.calls import Caller
from sterna.client.endpoint import DEFAULT_PORT, LOCAL_SOCKET, Endpoint, state_of_node
from sterna.client.remote import Remote
from sterna.errors import AgentError, ConnectionLostError, UsageError
from sterna.trust import base64url
from sterna.trust.fingerprint import fingerprint
from sterna.trust.local import read_local_token
from sterna.trust.pins import local_pin

TOKEN_SECONDS = 30 * 86_400
_START_SECONDS = 20.0
_ASK_SECONDS = 3.0
_POLL_SECONDS = 0.02
_LOG = "up.log"
_LOOPBACK = "127.0.0.1"
# Variables that mean this ssh login, which ends; the programs of the sessions live longer.
_OF_THE_LOGIN = frozenset(
    (
        "SSH_CONNECTION",
        "SSH_CLIENT",
        "SSH_TTY",
        "SSH_AUTH_SOCK",
        "SSH_ORIGINAL_COMMAND",
        "DISPLAY",
        "XDG_SESSION_ID",
        "TERM",
    )
)


class Request(msgspec.Struct):
    """What the client wants: where a new node shall listen (None: where ssh came in), on which port, for a tunnel."""

    version: int
    port: int | None = None
    listen: str | None = None
    tunnel: bool = False


def answer(line: bytes, environ: Mapping[str, str] = os.environ) -> str:
    """Returns one line of JSON (`Remote`) for a request; raises SternaError with what to do on this machine."""
    try:
        request = msgspec.json.decode(line, type=Request)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise UsageError("`sterna invite` is for `sterna attach user@host`, which sends it one line of JSON.") from None
    if request.port is not None and not 0 < request.port <= 65_535:
        raise UsageError(f"{request.port} is no port: use 1 to 65535.")
    base = paths.state_dir(environ.get("STERNA_STATE") or None)
    came_in = server_address(environ)
    started = False
    with paths.locked(os.path.join(base, "invite.lock"), wait_ms=int(_START_SECONDS * 1000)):
        local = _running(base)
        if local is None:
            started = True
            local = _start(base, _listen_on(request, came_in), request.port, environ)
    with Caller(local, state=base, timeout=_ASK_SECONDS) as caller:
        about = caller.call("node")
        token = caller.call("token", ttl=TOKEN_SECONDS)["token"]
    pin = local_pin(state_of_node(base))
    assert pin is not None
    host = str(about["host"])
    remote = Remote(
        addresses=_addresses(host, came_in), port=int(about["port"]), node=fingerprint(pin.node_id),
        ca=base64url.encode(pin.ca), token=token, expires=int(time.time()) + TOKEN_SECONDS - 60,
        host=_LOOPBACK if host in ("0.0.0.0", "::") else host, started=started, hint=_hint(),  # noqa: S104 -- compared with
    )  # fmt: skip
    return msgspec.json.encode(remote).decode("utf-8")


def server_address(environ: Mapping[str, str]) -> str | None:
    """Returns the address of this machine on which ssh came in (ssh(1), SSH_CONNECTION), None if that is not known."""
    fields = environ.get("SSH_CONNECTION", "").split(" ")
    if len(fields) != 4 or fields[2] in ("", "UNKNOWN"):
        return None
    # A mapped address is how a socket for both families shows an IPv4 connection.
    return fields[2].removeprefix("::ffff:")


def _listen_on(request: Request, came_in: str | None) -> str:
    if request.listen:
        return request.listen
    if request.tunnel:
        return _LOOPBACK
    if came_in is None:
        raise UsageError("ssh does not say on which address it came in: use --listen ADDRESS, or --via-ssh.")
    return came_in


def _addresses(host: str, came_in: str | None) -> list[str]:
    """Returns where the client may reach a node that listens on `host`; none if that is this machine only."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 -- compared with, not bound to
        return [came_in] if came_in is not None else [socket.gethostname()]
    away = came_in is not None and not _is_loopback(came_in)
    return [] if _is_loopback(host) and away else [host]


def _is_loopback(host: str) -> bool:
    return host in ("::1", "localhost") or host.startswith("127.")


def _running(base: str) -> Endpoint | None:
    """Returns this user's node if it runs."""
    directory = state_of_node(base)
    path = os.path.join(directory, LOCAL_SOCKET)
    pin, token = (local_pin(directory), read_local_token(directory)) if os.path.exists(path) else (None, None)
    if pin is None or token is None:
        return None
    local = Endpoint("this machine", [(socket.AF_UNIX, path)], pin.node_id, context=None, credential=token)
    try:
        Caller(local, state=base, timeout=_ASK_SECONDS).close()
    except ConnectionLostError:
        return None
    return local


def _start(base: str, host: str, port: int | None, environ: Mapping[str, str]) -> Endpoint:
    """Starts `sterna up` so that it outlives this login, and returns it once it answers."""
    chosen = port if port is not None else DEFAULT_PORT if _is_free(host, DEFAULT_PORT) else 0
    shell = environ.get("SHELL") or "/bin/sh"
    words = [
        sys.executable,
        "-P",
        "-m",
        "sterna",
        "up",
        "--json",
        "--host",
        host,
        "--port",
        str(chosen),
        "--",
        shell,
        "-l",
    ]
    if can_linger(environ):
        # Its own scope in the user's manager: logging out does not end it, even where logind ends a login's processes.
        words = ["systemd-run", "--user", "--scope", "--quiet", "--collect", "--", *words]
    path = os.path.join(base, _LOG)
    env = {k: v for k, v in environ.items() if k not in _OF_THE_LOGIN}
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "wb") as log:
        node = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=env,
            cwd=os.path.expanduser("~"),
        )  # fmt: skip
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        ended = node.poll()
        local = _running(base) if _announced(path) or ended is not None else None
        if local is not None:
            return local
        if ended is not None:
            break
        time.sleep(_POLL_SECONDS)
    raise AgentError(f"The node did not start: {_last_words(path)}")


def _announced(path: str) -> bool:
    """Tells whether `sterna up --json` has said that agent and node are ready."""
    with open(path, "rb") as file:
        return b'"fingerprint"' in file.read(65_536)


def _last_words(path: str) -> str:
    with open(path, "rb") as file:
        lines = file.read(65_536).decode("utf-8", "replace").strip().splitlines()
    said = next((line for line in reversed(lines) if line.startswith("sterna: ")), "")
    return said.removeprefix("sterna: ") or f"{path} says why."


def _is_free(host: str, port: int) -> bool:
    """Tells whether a port can be listened on; other trouble shows when the node tries."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
        return True


def can_linger(environ: Mapping[str, str] = os.environ) -> bool:
    """Tells whether the user's systemd manager runs on after logout and can take a process in."""
    from sterna.cli.service import lingers

    bus = os.path.join(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}", "systemd", "private")
    return lingers() and shutil.which("systemd-run") is not None and os.path.exists(bus)


def _hint() -> str:
    from sterna.cli.service import logout_hint

    return logout_hint() or ""
