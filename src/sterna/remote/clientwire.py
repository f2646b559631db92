"""The client's end of a connection to the remote daemon: messages, lines, and the ways to get one."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, cast

import msgspec

from sterna.errors import Code, ConnectionLostError, ProtocolError, SternaError, UsageError
from sterna.limits import REMOTE_CLIENT_LINE_MAX_BYTES, REMOTE_LINE_MAX_BYTES, REMOTE_TOKEN_MAX_BYTES
from sterna.remote.token import FILE_NAME

T = TypeVar("T")

_END_SECONDS = 3.0
_POLL_SECONDS = 0.01
_STATUS_SECONDS = 0.5
_TOKEN_SECONDS = 1.0

SOCKET = ".claude/remote/rpc.sock"
"""Where the daemon listens, below the home directory."""


class RemoteError(SternaError):
    """The daemon refused a call; `number` is its code (docs/remote.md), the text is the daemon's."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Fault(msgspec.Struct):
    """An error as it stands in a reply."""

    code: int
    message: str


class Message(msgspec.Struct, rename="camel"):
    """A line of the daemon: a reply, or a frame of a process (`type` is then `stream`)."""

    id: int | None = None
    result: msgspec.Raw = msgspec.Raw()
    error: Fault | None = None
    type: str = ""
    process_id: str = ""
    stream: str = ""
    seq: int = 0
    data: bytes = b""
    exit_code: int | None = None


_decode = msgspec.json.Decoder(Message).decode
_encode = msgspec.json.Encoder().encode


def encode_request(number: int, method: str, params: dict[str, object], token: str) -> bytes:
    """Returns a request's line. Raises `UsageError` when it is longer than what the daemon takes."""
    message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params, "auth": token}
    line = _encode(message) + b"\n"
    if len(line) > REMOTE_LINE_MAX_BYTES:
        raise UsageError(f"The call of {method} takes more than the 1 MiB of a line: pass less at once.")
    return line


class Link(asyncio.Protocol):
    """One connection: whole messages in, lines out.

    Parameters: `received(message)`; `lost(link, reason)`, called once.
    """

    def __init__(self, received: Callable[[Message], None], lost: Callable[[Link, str], None]) -> None:
        self._received, self._lost = received, lost
        self._transport: asyncio.Transport | None = None
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._begun = self._paused = self._over = False
        self._expected: tuple[bytes, asyncio.Future[bytes]] | None = None
        self._problem = ""
        self.carrier: subprocess.Popen[bytes] | None = None
        """The command that carries the connection, if one does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        lines = data.split(b"\n")
        if len(lines) > 1:
            lines[0] = b"".join((*self._rest, lines[0]))
            self._rest, self._rest_bytes = [], 0
        rest = lines.pop()
        if rest:
            self._rest.append(rest)
            self._rest_bytes += len(rest)
            if self._rest_bytes > REMOTE_CLIENT_LINE_MAX_BYTES:
                self.close("The daemon sent a line of more than 64 MiB.")
        for line in lines:
            if self._over:
                return
            self._line(line)

    def _line(self, line: bytes) -> None:
        if not self._begun and self.carrier is not None and not line.startswith(b"{"):
            # What start-up files of a login shell print comes before the daemon's first line, and an answer may, too.
            if self._expected is not None and line.startswith(self._expected[0]):
                prefix, answer = self._expected
                self._expected = None
                if not answer.done():
                    answer.set_result(line[len(prefix) :])
            return
        self._begun = True
        try:
            message = _decode(line)
        except (msgspec.MsgspecError, RecursionError):
            self.close("What answers there is no daemon of this kind.")
            return
        self._received(message)

    async def expect(self, prefix: bytes) -> bytes:
        """Returns the rest of the line that begins so; of a carrier only, and before the first message."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._expected = (prefix, answer)
        return await answer

    async def status(self) -> int | None:
        """Returns the carrier's exit status after the connection's end, None when there is none or it goes on."""
        deadline = time.monotonic() + _STATUS_SECONDS
        while self.carrier is not None:
            status = self.carrier.poll()
            if status is not None or time.monotonic() > deadline:
                return status
            await asyncio.sleep(_POLL_SECONDS)
        return None

    def send(self, line: bytes) -> None:
        """Sends a line; after the end it is dropped, as the end is told to whoever waits for a reply."""
        if self._transport is not None and not self._over:
            self._transport.write(line)

    @property
    def over(self) -> bool:
        """Whether the connection has ended."""
        return self._over

    def hold(self, paused: bool) -> None:
        """Stops reading, or reads on."""
        if paused == self._paused or self._transport is None or self._over:
            return
        self._paused = paused
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def close(self, problem: str = "") -> None:
        """Ends the connection at once."""
        self._problem = self._problem or problem
        if self._transport is not None:
            self._transport.abort()
        if self.carrier is not None:
            self.carrier.terminate()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._over = True
        reason = self._problem or (str(exc) if exc is not None else "") or "The other side closed the connection."
        if self._expected is not None:
            if not self._expected[1].done():  # who waited may have been told to end
                self._expected[1].set_exception(ConnectionLostError(reason))
            self._expected = None
        if self._begun:  # before that whoever dials asks for the exit status first
            self.close()
        self._lost(self, reason)


class Dialer(Protocol):
    """A way to the daemon that can be gone again and again."""

    async def dial(self, link: Link) -> str:
        """Connects `link` and returns the token. Raises `ConnectionLostError`, which is tried again, `SternaError`."""


class SocketDialer:
    """The daemon's own socket; without a token, the one that lies beside it is taken."""

    def __init__(self, path: str | None = None, token: str | None = None) -> None:
        self._path = path or os.path.join(os.path.expanduser("~"), SOCKET)
        self._token = token

    async def dial(self, link: Link) -> str:
        """Connects `link` and returns the token."""
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: link, self._path)
        except OSError as error:
            raise ConnectionLostError(
                f"No daemon answers at {self._path} ({error.strerror}): start one with `{self._start()}`."
            ) from None
        if self._token is not None:
            return self._token
        try:
            return await self._beside()
        except OSError as error:
            raise ConnectionLostError(
                f"The token beside {self._path} cannot be read ({error.strerror}): pass it, or start the daemon again."
            ) from None

    async def _beside(self) -> str:
        """Returns the token that lies beside the socket, which a daemon writes a moment after it listens."""
        deadline = time.monotonic() + _TOKEN_SECONDS
        while time.monotonic() < deadline:
            try:
                if os.stat(_token_file(self._path)).st_mtime_ns >= os.stat(self._path).st_mtime_ns:
                    break  # otherwise it is that of the daemon before
            except FileNotFoundError:
                pass
            await asyncio.sleep(_POLL_SECONDS)
        return read_token(self._path)

    def _start(self) -> str:
        """Returns a command that starts the daemon here."""
        usual = self._path == os.path.join(os.path.expanduser("~"), SOCKET)
        where = "" if usual else f" -socket {shlex.quote(os.path.abspath(self._path))}"
        said = "head -c 32 /dev/urandom | base64" if self._token is None else "printf %s TOKEN"
        return f"{said} | sterna-remote -serve -token-fd 0{where}"


def _token_file(path: str) -> str:
    return os.path.join(os.path.dirname(path) or ".", FILE_NAME)


def read_token(path: str) -> str:
    """Returns the token of the daemon that listens at `path`. Raises `OSError`."""
    with open(_token_file(path), "rb") as file:
        return file.read(REMOTE_TOKEN_MAX_BYTES).decode("utf-8", "replace")


class CommandDialer:
    """A command whose standard input and output are the connection, such as `ssh HOST sterna-remote -bridge`.

    Parameters: `again`, the command from the second time on, whose standard error nobody sees.
    """

    def __init__(
        self, words: Sequence[str], token: str, *, again: Sequence[str] | None = None, env: dict[str, str] | None = None
    ) -> None:
        self._words, self._token, self._again, self._env = list(words), token, list(again or words), env
        self._dialled = False

    async def dial(self, link: Link) -> str:
        """Starts the command as the carrier of `link` and returns the token."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                link.carrier = await self._started(theirs.fileno())
            ours.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        except BaseException:
            ours.close()
            raise
        token = await self.greet(link)
        self._dialled = True
        return token

    async def _started(self, stream: int) -> subprocess.Popen[bytes]:
        """Starts the command in a thread, as that waits until the program is loaded.

        asyncio's own way may lose an exit status when the program is told to end just as it does.
        """
        words, quiet = (self._again, subprocess.DEVNULL) if self._dialled else (self._words, None)

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(words, stdin=stream, stdout=stream, stderr=quiet, env=self._env)

        starting = asyncio.ensure_future(asyncio.to_thread(start))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            carrier = await starting
            carrier.terminate()
            await ended(carrier)
            raise
        except OSError as error:
            raise UsageError(f"{words[0]!r} cannot be started: {error.strerror}.") from None

    async def greet(self, link: Link) -> str:
        """Returns the token, after whatever has to be said first."""
        return self._token


async def ended(carrier: subprocess.Popen[bytes]) -> None:
    """Returns when a carrier that was told to end has ended."""
    deadline = time.monotonic() + _END_SECONDS
    while carrier.poll() is None:
        if time.monotonic() > deadline:
            carrier.kill()
        await asyncio.sleep(_POLL_SECONDS)


def decoded(raw: msgspec.Raw, kind: type[T]) -> T:
    """Returns a result as its type. Raises `ProtocolError`."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProtocolError(Code.BAD_PAYLOAD, f"The daemon's answer makes no sense: {error}.") from None
