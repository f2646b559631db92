"""An asyncio client of the remote daemon, over its socket or over a command that carries its bridge."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import msgspec

from sterna.errors import ConnectionLostError, SternaError, UsageError
from sterna.limits import REMOTE_CLIENT_RETRY_MAX_SECONDS
from sterna.remote.clientcalls import REPEATED, Calls, Reattached, Spawned
from sterna.remote.clientprocess import Process
from sterna.remote.clientwire import (
    CommandDialer,
    Dialer,
    Link,
    Message,
    RemoteError,
    SocketDialer,
    decoded,
    encode_request,
    ended,
)

T = TypeVar("T")

_RETRY_SECONDS = 0.05
_DOUBT_SECONDS = 1.0
_SPAWN_TRIES = 15
_SPAWN_SECONDS = 0.2
_REFUSED_MAX = 5
_CLOSED = "The client was closed."
_NOT_FOUND = 127  # what shells and ssh end with


class Client(Calls):
    """A connection to the remote daemon that comes back by itself; made by `connect`, `over` or `open`.

    `async with` closes it; processes go on without it. A call that changes something and whose connection is lost
    before its reply raises `ConnectionLostError`; others are repeated. `changed(connected)` is called whenever the
    connection is lost and when it is back.
    """

    def __init__(
        self, dialer: Dialer, *, reconnect: bool = True, changed: Callable[[bool], None] | None = None
    ) -> None:
        self._dialer, self._reconnect, self._changed = dialer, reconnect, changed
        self._link: Link | None = None
        self._token = ""
        self._numbers = 0
        self._waiting: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._processes: dict[str, Process] = {}
        self._full: set[Process] = set()
        self._overfull: set[Process] = set()
        self._calls = 0  # that wait for a reply
        self._ready = asyncio.Event()
        self._error: SternaError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._carriers: set[subprocess.Popen[bytes]] = set()  # that have not been seen to end

    @classmethod
    async def connect(
        cls, path: str | None = None, *, token: str | None = None, reconnect: bool = True,
        changed: Callable[[bool], None] | None = None,
    ) -> Client:  # fmt: skip
        """Returns a client of the daemon at a socket, by default `~/.claude/remote/rpc.sock`.

        Without `token` it is read from beside the socket, at every connection. Raises `SternaError`.
        """
        return await cls.open(SocketDialer(path, token), reconnect=reconnect, changed=changed)

    @classmethod
    async def over(
        cls, words: Sequence[str], *, token: str, reconnect: bool = True, again: Sequence[str] | None = None,
        env: dict[str, str] | None = None, changed: Callable[[bool], None] | None = None,
    ) -> Client:  # fmt: skip
        """Returns a client over a command's standard input and output: `["ssh", HOST, "sterna-remote", "-bridge"]`.

        Parameters: `again`, the command from the second connection on. Raises `SternaError`.
        """
        dialer = CommandDialer(words, token, again=again, env=env)
        return await cls.open(dialer, reconnect=reconnect, changed=changed)

    @classmethod
    async def open(
        cls, dialer: Dialer, *, reconnect: bool = True, changed: Callable[[bool], None] | None = None
    ) -> Client:
        """Returns a client over any way of getting a connection. Raises `SternaError`."""
        client = cls(dialer, reconnect=reconnect, changed=changed)
        try:
            await client._dial()
        except BaseException:
            await client.close()
            raise
        return client

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; processes go on without it."""
        self._over(ConnectionLostError(_CLOSED))
        link, self._link = self._link, None
        for task in list(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if link is not None:
            link.close()
        for carrier in list(self._carriers):
            await ended(carrier)

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._link is not None

    # ---- calls ------------------------------------------------------------------------------------------------------

    async def call(self, method: str, params: dict[str, object], kind: type[T], *, again: bool = False) -> T:
        """Returns the result of any method, as `kind`. Raises `RemoteError`, `ConnectionLostError`.

        Parameters: `again`, whether it is called once more when the connection was lost before its reply.
        """
        again = again or method in REPEATED
        while True:
            await self._connected()
            self._calls += 1
            self._regulate()
            try:
                return decoded(await self.post(method, params), kind)
            except ConnectionLostError:
                if not again or not self._reconnect or self._error is not None:
                    raise
            finally:
                self._calls -= 1
                self._regulate()

    def post(self, method: str, params: dict[str, object]) -> asyncio.Future[msgspec.Raw]:
        """Sends a request on the present connection and returns where its result will be."""
        reply: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        if self._link is None:
            reply.set_exception(ConnectionLostError("There is no connection to the daemon."))
            return reply
        self._numbers += 1
        line = encode_request(self._numbers, method, params, self._token)
        self._waiting[self._numbers] = reply
        self._link.send(line)
        return reply

    async def shutdown(self) -> None:
        """Ends the daemon and what it runs, and this client."""
        await self._connected()
        self._reconnect = False
        try:
            await self.post("server.shutdown", {})
        except ConnectionLostError:
            pass
        await self.close()

    async def spawn(
        self, command: str, args: Sequence[str] = (), *, cwd: str = "", env: Mapping[str, str] | None = None,
        id: str | None = None,  # noqa: A002 # what the daemon calls it
    ) -> Process:  # fmt: skip
        """Starts a process and returns it.

        Parameters: `cwd`, by default the daemon's; `env`, added to the daemon's; `id`, by default a random one. A
        process that has the same id already is killed. Raises `RemoteError` with the operating system's text, and
        `ConnectionLostError` when nobody knows whether it was started.
        """
        await self._connected()
        name = os.urandom(12).hex() if id is None else id
        process = self._add(name)
        params: dict[str, object] = {"id": name, "command": command, "args": list(args), "cwd": cwd, "wantPid": True}
        params["env"] = dict(env or {})
        process.starting = True
        self._calls += 1
        self._regulate()
        try:
            spawned = decoded(await self.post("process.spawn", params), Spawned)
            process.begun(spawned.pid, spawned.start_time)
        except ConnectionLostError:
            # It may have arrived or be on its way. Never is it sent twice; an id of the caller may be another process.
            if id is not None or not self._reconnect or not await self._arrived(process):
                self.ended(process)
                raise
        except BaseException:
            self.ended(process)
            raise
        finally:
            process.starting = False
            self._calls -= 1
            self._regulate()
        return process

    async def _arrived(self, process: Process) -> bool:
        for _ in range(_SPAWN_TRIES):
            if await self._attach(process):
                return True
            await asyncio.sleep(_SPAWN_SECONDS)
        return False

    async def attach(self, process_id: str, *, after: int = 0) -> Process | None:
        """Moves a process's output here, from frame `after` + 1 on; returns None when there is no such process.

        Whoever had it before gets nothing more and is not told.
        """
        await self._connected()
        process = self._add(process_id, after)
        process.starting = True
        self._calls += 1
        try:
            if await self._attach(process):
                return process
        except BaseException:
            self.ended(process)
            raise
        finally:
            process.starting = False
            self._calls -= 1
            self._regulate()
        self.ended(process)
        return None

    async def _attach(self, process: Process) -> bool:
        """Asks until there is an answer; returns whether the process is there."""
        while True:
            await self._connected()
            try:
                found = decoded(await self._ask_for(process), Reattached)
            except ConnectionLostError:
                if not self._reconnect or self._error is not None:
                    raise
                continue
            if found.found:
                process.reattached(found)
            return found.found

    def _ask_for(self, process: Process) -> asyncio.Future[msgspec.Raw]:
        return self.post("process.reattach", process.attaching())

    # ---- processes --------------------------------------------------------------------------------------------------

    def _add(self, process_id: str, seen: int = 0) -> Process:
        if process_id in self._processes:
            raise UsageError(f"This client has a process {process_id} already: end it or choose another id.")
        process = self._processes[process_id] = Process(self, process_id, seen)
        return process

    def ended(self, process: Process) -> None:
        """Called by a process that nothing more comes from."""
        if self._processes.get(process.id) is process:
            del self._processes[process.id]
        self.level(process, full=False, overfull=False)

    def level(self, process: Process, *, full: bool, overfull: bool) -> None:
        """Called by a process whose unread output grew or shrank."""
        for wanted, members in ((full, self._full), (overfull, self._overfull)):
            if wanted and process.live:
                members.add(process)
            else:
                members.discard(process)
        self._regulate()

    def _regulate(self) -> None:
        """Reads on while there is room, or while a reply is waited for, as that may be behind output."""
        if self._link is not None:
            self._link.hold(bool(self._overfull or (self._full and not self._calls)))

    def reattach(self, process: Process) -> None:
        """Asks for a process's output on the present connection."""
        self._calls += 1
        self._regulate()
        reply = self._ask_for(process)
        reply.add_done_callback(lambda reply: self._reattached(process, reply))

    def _reattached(self, process: Process, reply: asyncio.Future[msgspec.Raw]) -> None:
        self._calls -= 1
        self._regulate()
        error = reply.exception()
        if isinstance(error, ConnectionLostError):
            return
        if isinstance(error, SternaError):
            process.fail(error)
            return
        try:
            process.reattached(decoded(reply.result(), Reattached))
        except SternaError as bad:
            process.fail(bad)
        if process.doubtful and process.live:
            process.doubtful = False
            asyncio.get_running_loop().call_later(_DOUBT_SECONDS, self._ask_again, process)

    def _ask_again(self, process: Process) -> None:
        """Asks once more, as a request of the connection before may have arrived late and taken the output with it."""
        if process.live and process.attached:
            self.reattach(process)

    # ---- the connection ---------------------------------------------------------------------------------------------

    async def _connected(self) -> None:
        while self._link is None:
            if self._error is not None:
                raise self._error
            await self._ready.wait()

    async def _dial(self) -> None:
        """Connects, and waits until the daemon has answered. Raises `SternaError`."""
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def received(message: Message) -> None:
            if answer.done():
                self._received(message)
            else:
                answer.set_result(message)

        def lost(link: Link, reason: str) -> None:
            if answer.done():
                self._lost(link, reason)
            else:
                answer.set_exception(ConnectionLostError(f"No daemon was reached: {reason}"))

        link = Link(received, lost)
        try:
            token = await self._dialer.dial(link)
            link.send(encode_request(0, "server.ping", {}, token))
            try:
                message = await answer
            except ConnectionLostError:
                if await link.status() != _NOT_FOUND:
                    raise
                raise ConnectionLostError(
                    "No daemon was reached: the command that carries the connection ended with status 127, as its "
                    "program was not found; install sterna on that machine or name sterna-remote by its whole path."
                ) from None
            if message.error is not None:
                raise RemoteError(message.error.code, message.error.message)
            if link.over:
                raise ConnectionLostError("The connection ended as soon as it was made.")
        except BaseException:
            answer.cancel()
            link.close()
            raise
        finally:
            self._carriers = {carrier for carrier in self._carriers if carrier.poll() is None}
            if link.carrier is not None:
                self._carriers.add(link.carrier)
        self._token, self._link = token, link
        self._ready.set()

    def _received(self, message: Message) -> None:
        if message.type:
            process = self._processes.get(message.process_id)
            if process is not None:
                process.frame(message)
            return
        reply = self._waiting.pop(message.id, None) if message.id is not None else None
        if reply is None or reply.done():
            return
        if message.error is not None:
            reply.set_exception(RemoteError(message.error.code, message.error.message))
        else:
            reply.set_result(message.result)

    def _lost(self, link: Link, reason: str) -> None:
        if link is not self._link:
            return
        self._link = None
        self._ready.clear()
        error = ConnectionLostError(f"The connection to the daemon is lost: {reason}")
        waiting, self._waiting = self._waiting, {}
        for process in list(self._processes.values()):
            process.lost()
        for reply in waiting.values():
            if not reply.done():
                reply.set_exception(error)
        if not self._reconnect:
            self._over(error)
        elif self._error is None:
            if self._changed is not None:
                self._changed(False)
            task = asyncio.get_running_loop().create_task(self._return())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _return(self) -> None:
        delay, refused = _RETRY_SECONDS, 0
        while True:
            try:
                await self._dial()
                break
            except ConnectionLostError:
                pass
            except SternaError as error:
                # A daemon that starts listens a moment before its token can be read.
                refused += 1
                if not isinstance(error, RemoteError) or refused == _REFUSED_MAX:
                    self._over(error)
                    return
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 # only so that not all come at once
            delay = min(2 * delay, REMOTE_CLIENT_RETRY_MAX_SECONDS)
        if self._changed is not None:
            self._changed(True)
        for process in list(self._processes.values()):
            if not process.starting:
                self.reattach(process)

    def _over(self, error: SternaError) -> None:
        self._reconnect = False
        self._error = self._error or error
        self._ready.set()
        for process in list(self._processes.values()):
            process.fail(self._error)
        waiting, self._waiting = self._waiting, {}
        for reply in waiting.values():
            if not reply.done():
                reply.set_exception(self._error)
