"""What `sterna remote attach HOST` runs on HOST: finds or starts the daemon, says its token, and becomes the bridge."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import subprocess
import sys
import time
from typing import NoReturn

import msgspec

from sterna.errors import SternaError, UsageError
from sterna.limits import REMOTE_MEETING_LINE_MAX_BYTES, REMOTE_MEETING_SECONDS, REMOTE_START_SECONDS
from sterna.remote.bridge import bridge
from sterna.remote.clientwire import SOCKET, encode_request, read_token
from sterna.remote.directories import make_directories
from sterna.remote.launcher import LOG_NAME

PREFIX = b"STERNA-"
MARK = b"REMOTE "
_LOCK = "attach.lock"
_TOKEN_SECONDS, _POLL_SECONDS = 1.0, 0.05
# Variables that mean this ssh login, which ends; the daemon lives longer.
_OF_THE_LOGIN = frozenset(
    {
        "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "SSH_AUTH_SOCK", "SSH_ORIGINAL_COMMAND", "DISPLAY", "TERM",
        "XDG_SESSION_ID",
    }
)  # fmt: skip


class Request(msgspec.Struct):
    """What the client says first: the token of a daemon that is started, and the socket if not the usual one."""

    version: int
    token: str
    socket: str = ""


class Answer(msgspec.Struct, omit_defaults=True):
    """The daemon's token, or why there is none."""

    token: str = ""
    error: str = ""


def meet() -> NoReturn:
    """Reads a request from standard input, answers it on standard output, and relays both to the daemon."""
    path = ""
    try:
        request = _request()
        path = request.socket or os.path.join(os.path.expanduser("~"), SOCKET)
        answer = Answer(token=token_of(path, request.token))
    except SternaError as error:
        answer = Answer(error=str(error))
    except OSError as error:
        answer = Answer(error=f"The daemon's directory cannot be used: {error}.")
    _write(PREFIX + MARK + msgspec.json.encode(answer) + b"\n")
    if answer.error:
        sys.exit(1)
    bridge(path)


def _write(line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[os.write(1, view) :]


def _request() -> Request:
    """Reads one line, and nothing behind it: that is for the daemon."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte or len(line) > REMOTE_MEETING_LINE_MAX_BYTES:
            raise UsageError("No request came: this is what `sterna remote attach HOST` runs on HOST.")
        line += byte
    try:
        return msgspec.json.decode(line, type=Request)
    except msgspec.MsgspecError:
        raise UsageError("The request makes no sense: use the same version of sterna on both machines.") from None


def token_of(path: str, token: str) -> str:
    """Returns the token of the daemon at `path`; if none answers there, one is started with `token`.

    Of several that come at the same time one starts it and the others find it. Raises `SternaError`, `OSError`.
    """
    directory = os.path.dirname(path) or "."
    make_directories(directory)
    lock = os.open(os.path.join(directory, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _found(path)
        if found is not None:
            return found
        _start(path, token)
        return token
    finally:
        os.close(lock)


def _found(path: str) -> str | None:
    """Returns the token of a daemon that answers, None if there is no daemon. Raises `SternaError`.

    A daemon listens a moment before its token lies there.
    """
    deadline = time.monotonic() + _TOKEN_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(REMOTE_MEETING_SECONDS)
            try:
                probe.connect(path)
            except OSError:
                return None
            token = _accepted(probe, path)
        if token is not None:
            return token
        if time.monotonic() > deadline:
            raise UsageError(
                f"A daemon listens at {path}, but it does not take the token beside it: end it (SIGTERM), then try "
                "again."
            )
        time.sleep(_POLL_SECONDS)


def _accepted(probe: socket.socket, path: str) -> str | None:
    """Returns the token that lies beside the socket, if the daemon takes it."""
    try:
        token = read_token(path)
        probe.sendall(encode_request(1, "server.ping", {}, token))
        reply = probe.makefile("rb").readline(REMOTE_MEETING_LINE_MAX_BYTES)
    except OSError:
        return None
    return token if b'"pong":true' in reply else None


def _start(path: str, token: str) -> None:
    words = [sys.executable, "-m", "sterna.remote", "-serve", "-extensions", "-socket", path, "-token-fd", "0"]
    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY:  # else the processes last as long as it
        words.append("-durable")
    env = {name: value for name, value in os.environ.items() if name not in _OF_THE_LOGIN}
    try:
        done = subprocess.run(
            words, input=token.encode(), env=env, cwd=os.path.expanduser("~"), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
            timeout=REMOTE_START_SECONDS + REMOTE_MEETING_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UsageError(f"The daemon does not start: see {LOG_NAME} beside {path}.") from None
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip()
        raise UsageError(f"The daemon does not start: {said}")
