"""`serve()`: any Python agent becomes a pod in ten lines."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from sterna import limits, paths
from sterna.errors import SternaError
from sterna.pod.server import PodServer, socket_path
from sterna.protocol import messages
from sterna.protocol.frame import Type
from sterna.protocol.messages import Kind
from sterna.protocol.podside import Input, PodSession

_EOF = int(Type.EOF)
_SIGNAL = int(Type.SIGNAL)


class AgentSession:
    """One conversation, as an agent's code sees it.

    Input counts as handled when the next one is asked for (or the handler returns), so a killed agent never makes
    input vanish silently: what it had not finished is reported to the user as uncertain.
    """

    def __init__(self, server: PodServer, session: PodSession, request: messages.Open) -> None:
        self._server = server
        self._session = session
        self._inputs: deque[Input] = deque()
        self._current: Input | None = None
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._closed = False
        self.uid = request.uid
        self.name = request.name
        self.signals: deque[str] = deque(maxlen=limits.LANES_MAX)

    @property
    def size(self) -> tuple[int, int]:
        """The terminal's columns and rows."""
        return self._session.cols, self._session.rows

    @property
    def watched(self) -> bool:
        """Whether a terminal is attached right now."""
        return self._session.audience > 0

    async def read(self) -> bytes:
        r"""Waits for input and returns it; b"" at its end. The input before counts as handled now.

        A signal that came in between stands in `signals` (INT, TERM, …) and also ends the wait, as b"\x03" for INT.
        """
        self._done()
        while True:
            while not self._inputs:
                if self._closed:
                    return b""
                self._arrived.clear()
                await self._arrived.wait()
            item = self._current = self._inputs.popleft()
            if item.kind == _EOF:
                return b""
            if item.kind != _SIGNAL:
                return item.data
            name = messages.unpack(messages.Signal, item.data).name
            self.signals.append(name)
            if name == "INT":
                return b"\x03"
            self._done()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields inputs until their end."""
        while data := await self.read():
            yield data

    async def write(self, data: bytes) -> None:
        """Sends output; waits while the window is full, so a slow reader slows the agent and memory stays bounded."""
        at = 0
        while at < len(data):
            if self._closed:
                raise asyncio.CancelledError
            room = self._session.out.room
            if room <= 0:
                self._session.starved = True
                self._room.clear()
                await self._room.wait()
                continue
            piece = data[at : at + min(room, limits.PAYLOAD_MAX_BYTES)]
            self._server.output(self._session, piece)
            at += len(piece)

    def _done(self) -> None:
        if self._current is not None:
            self._server.handled(self._current)
            self._current = None

    # ---- the runner's side -------------------------------------------------------------------------------------

    def input(self, item: Input) -> None:
        """Queues input; the window bounds how much."""
        self._inputs.append(item)
        self._arrived.set()

    def resized(self) -> None:
        """Nothing to do: `size` says it."""

    def audience(self) -> None:
        """Nothing to do: `watched` says it."""

    def capture(self, token: int, scrollback: bool) -> None:
        """Answers that there is no screen: an empty snapshot, which only names the place."""
        self._session.send_snapshot(token, self._session.out.end, b"", False)

    def roomy(self) -> None:
        """Lets a waiting `write` go on."""
        self._room.set()

    def close(self) -> None:
        """Ends reading and writing."""
        self._closed = True
        self._arrived.set()
        self._room.set()

    def finished(self, status: int) -> None:
        """Notes the end of the agent's code."""
        self._done()
        now = self._server.now()
        self._server.machine.acknowledge_due(self._session, now, True)
        self._session.finish(status, None, now)


Agent = Callable[[AgentSession], Awaitable[int | None]]
"""An agent: a coroutine function for one session; what it returns is the exit status (None: 0)."""


async def serve(
    agent: Agent,
    *,
    name: str,
    tenant: str = "local",
    sockets: str | None = None,
    kind: Kind = "chat",
    label: str = "",
    stop: asyncio.Event | None = None,
) -> None:
    """Serves `agent` as a pod named `name` until SIGTERM, SIGINT or `stop`.

    `sockets` is the directory that nodes watch (default: the user's). Raises UsageError or StorageError when the socket
    cannot be made. An exception in one session ends that session with status 1 and leaves the others alone.
    """
    loop = asyncio.get_running_loop()
    stop = stop or asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    async def run(session: AgentSession) -> None:
        status = 1
        try:
            status = await agent(session) or 0
        except asyncio.CancelledError:
            return
        except Exception as error:  # noqa: BLE001  # whatever the agent's code raises ends only its own session
            loop.call_exception_handler({"message": "an agent's session failed", "exception": error})
        session.finished(status)

    def start(server: PodServer, session: PodSession, request: messages.Open) -> AgentSession:
        made = AgentSession(server, session, request)
        task = loop.create_task(run(made))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return made

    directory = paths.socket_dir(sockets) if sockets else paths.runtime_dir()
    server = PodServer(socket_path(directory, tenant, name), start, kind=kind, features=[], label=label)
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop.set)
        except (RuntimeError, ValueError):
            break  # not in the main thread: `stop` is the only way to end it
    try:
        await stop.wait()
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(agent: Agent, *, name: str, tenant: str = "local", sockets: str | None = None, kind: Kind = "chat") -> None:
    """Serves `agent` and returns when it is told to stop; the same as `serve`, for programs without a loop.

    Errors are those of `serve`.
    """
    try:
        asyncio.run(serve(agent, name=name, tenant=tenant, sockets=sockets, kind=kind))
    except SternaError as error:
        raise SystemExit(f"sterna: {error}") from None
