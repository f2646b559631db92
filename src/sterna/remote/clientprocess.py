"""A process of the remote daemon as the client sees it: its output once and in order, its input once and in order."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Literal

import msgspec

from sterna.errors import Code, ConnectionLostError, ProtocolError, SternaError, UsageError
from sterna.limits import (
    REMOTE_CLIENT_CHUNK_BYTES,
    REMOTE_CLIENT_QUEUE_BYTES,
    REMOTE_CLIENT_QUEUE_MAX_BYTES,
    REMOTE_CLIENT_WINDOW_BYTES,
)
from sterna.remote.clientcalls import Applied, Done, Reattached
from sterna.remote.clientwire import decoded

if TYPE_CHECKING:
    from sterna.remote.client import Client
    from sterna.remote.clientcalls import Killed
    from sterna.remote.clientwire import Message

_EVENT_BYTES = 256  # what an event takes beside its data
_EARLY_BYTES = 512  # what a frame takes that others come before


class ProcessLostError(SternaError):
    """The daemon does not know the process any more."""


class Output(msgspec.Struct, frozen=True):
    """Bytes that the process wrote."""

    stream: Literal["stdout", "stderr"]
    data: bytes
    seq: int


class Exit(msgspec.Struct, frozen=True):
    """The end, always last; `code` is -1 when a signal ended the process."""

    code: int
    seq: int


class Gap(msgspec.Struct, frozen=True):
    """Frames `first` to `last` are gone: the daemon keeps 16 MiB of each process while nobody reads it."""

    first: int
    last: int


Event = Output | Exit | Gap


class Process:
    """A process that `Client.spawn` started or `Client.attach` found.

    Iterating over it gives every `Output` once and in order, through any number of lost connections, a `Gap` where the
    daemon no longer had what came, and `Exit` at the end. Raises `ProcessLostError` when the daemon was started anew,
    `ConnectionLostError` when the client is closed or does not reconnect. One task iterates and one writes.

    About 1 MiB of unread output is kept here; then nothing more is read from the connection, the process is held up,
    and so are other processes of the same client. While a call waits for its reply, up to 32 MiB are read.
    """

    def __init__(self, client: Client, process_id: str, seen: int = 0) -> None:
        self._client, self.id = client, process_id
        self.pid = 0
        self.start_time = 0.0
        """When it was started, in Unix seconds by the clock there."""
        self.exit_code: int | None = None
        """Known as soon as the exit has come, also if output before it has not been read."""
        self.duplicates = 0
        """Frames that came more than once and were dropped."""
        self.attached = False
        """Whether its output and input go through the present connection."""
        self._seen = seen
        self._events: deque[Event] = deque()
        self._early: dict[int, Message] = {}
        self._early_bytes = 0
        self._queued = 0
        self._finished = False
        self._error: SternaError | None = None
        self._came = asyncio.Event()
        self._attaching = self.doubtful = self.starting = False
        self._input: deque[bytes] = deque()
        self._input_start = self._input_bytes = self._input_sent = 0  # of what the daemon has not confirmed
        self._input_error: SternaError | None = None
        self._undelivered: SternaError | None = None  # the same, if it concerns input that was written
        self._moved = asyncio.Event()

    # ---- output -----------------------------------------------------------------------------------------------------

    def __aiter__(self) -> Process:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._finished:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._came.clear()
            await self._came.wait()
        event = self._events.popleft()
        self._count(-_EVENT_BYTES - (len(event.data) if isinstance(event, Output) else 0))
        self._finished = self._finished or isinstance(event, Exit)
        return event

    async def wait(self) -> int:
        """Returns the exit code; output that has not been read is dropped."""
        async for _event in self:
            pass
        assert self.exit_code is not None
        return self.exit_code

    @property
    def seen(self) -> int:
        """The number of the last frame that came; `Client.attach` goes on after it."""
        return self._seen

    @property
    def live(self) -> bool:
        """Whether more may come."""
        return self.exit_code is None and self._error is None

    def _count(self, size: int) -> None:
        self._queued += size
        self._client.level(
            self, full=self._queued > REMOTE_CLIENT_QUEUE_BYTES, overfull=self._queued > REMOTE_CLIENT_QUEUE_MAX_BYTES
        )

    def _put(self, event: Event, size: int) -> None:
        self._events.append(event)
        self._count(_EVENT_BYTES + size)
        self._came.set()

    def frame(self, message: Message) -> None:
        """Called by the client with every frame that comes."""
        if message.seq <= self._seen or message.seq in self._early:
            self.duplicates += 1
        elif message.seq > self._seen + 1:
            # A reattach may mix live frames into those from before; its reply says whether something is missing.
            self._early[message.seq] = message
            self._count_early(_EARLY_BYTES + len(message.data))
            if self._early_bytes > REMOTE_CLIENT_QUEUE_MAX_BYTES:
                self.fail(ProtocolError(Code.BAD_PAYLOAD, "The daemon sends output and leaves out what is before it."))
            elif not self._attaching:
                self._client.reattach(self)
        else:
            self._deliver(message)
            self._deliver_early()

    def _deliver(self, message: Message) -> None:
        self._seen = message.seq
        if message.stream == "exit":
            self.exit_code = message.exit_code or 0
            self._put(Exit(self.exit_code, message.seq), 0)
            if not self._input:
                self.input_ended()
            elif not self._attaching:
                self._client.reattach(self)  # its reply says whether the process had been given all input
        else:
            stream: Literal["stdout", "stderr"] = "stderr" if message.stream == "stderr" else "stdout"
            self._put(Output(stream, message.data, message.seq), len(message.data))

    def _deliver_early(self) -> None:
        while self._early and (message := self._early.pop(self._seen + 1, None)) is not None:
            self._count_early(-_EARLY_BYTES - len(message.data))
            self._deliver(message)

    def _count_early(self, size: int) -> None:
        self._early_bytes += size
        self._count(size)

    # ---- the connection ---------------------------------------------------------------------------------------------

    def begun(self, pid: int, start_time: float) -> None:
        """Called by the client when the process runs."""
        self.pid, self.start_time, self.attached = pid, start_time, True
        self._send()

    def attaching(self) -> dict[str, object]:
        """Called by the client when it asks for the process's output; returns the parameters."""
        self._attaching = True
        self.attached = False
        return {"id": self.id, "fromSeq": self._seen, "wantPid": True}

    def reattached(self, found: Reattached) -> None:
        """Called by the client with the reply."""
        self._attaching = False
        if not found.found or (self.pid and (found.pid, found.start_time) != (self.pid, self.start_time)):
            if not self.live:
                self.input_ended()
            else:
                self.fail(
                    ProcessLostError(f"The daemon does not know the process {self.id} any more: it was restarted.")
                )
            return
        if self.pid == 0:
            self._input_start = found.stdin_applied
        self.pid, self.start_time, self.attached = found.pid, found.start_time, True
        if found.first_seq > self._seen + 1:
            self._put(Gap(self._seen + 1, found.first_seq - 1), 0)
            self._seen = found.first_seq - 1
        self._deliver_early()
        self._confirm(found.stdin_applied, again=True)
        if not self.live:
            self.input_ended()

    def lost(self) -> None:
        """Called by the client when the connection is gone."""
        # What was asked for there may still arrive, after what will be asked for on the next connection.
        self.doubtful = self.doubtful or self._attaching
        self.attached = self._attaching = False

    def fail(self, error: SternaError) -> None:
        """Called by the client when the process cannot be reached any more."""
        if self.live:
            self._error = error
            self._early.clear()
            self._count_early(-self._early_bytes)
            self._came.set()
            self._input_failed(error)
            self._client.ended(self)

    # ---- input ------------------------------------------------------------------------------------------------------

    async def write(self, data: bytes) -> None:
        """Gives input to the process, exactly once through any number of lost connections.

        Returns when no more than 2 MiB wait here; `drain` waits for all of it. Raises `SternaError` when the process
        has ended or an earlier write failed. There must be no other writer to the process.
        """
        for start in range(0, len(data), REMOTE_CLIENT_CHUNK_BYTES):
            await self._until(REMOTE_CLIENT_WINDOW_BYTES - 1)
            chunk = data[start : start + REMOTE_CLIENT_CHUNK_BYTES]
            self._input.append(chunk)
            self._input_bytes += len(chunk)
            self._send()

    async def close_input(self) -> None:
        """Ends the process's input after all that was written. Raises `RemoteError` without the daemon's extensions."""
        await self.drain()
        await self._client.call("process.closeStdin", {"id": self.id}, Done)

    async def drain(self) -> None:
        """Returns when the daemon has accepted all input."""
        await self._until(0)

    @property
    def applied(self) -> int:
        """How many bytes of input the daemon has confirmed."""
        return self._input_start

    async def _until(self, most: int) -> None:
        while True:
            error = self._input_error if most else self._undelivered
            if error is not None:
                raise error
            if self._input_bytes <= most:
                return
            self._moved.clear()
            await self._moved.wait()

    def _send(self) -> None:
        """Sends what has not been sent on this connection."""
        offset = self._input_start + sum(len(chunk) for chunk in list(self._input)[: self._input_sent])
        while self.attached and self._input_sent < len(self._input):
            chunk = self._input[self._input_sent]
            self._input_sent += 1
            params: dict[str, object] = {"id": self.id, "data": chunk, "offset": offset}
            offset += len(chunk)
            self._client.post("process.stdin", params).add_done_callback(self._accepted)

    def _accepted(self, reply: asyncio.Future[msgspec.Raw]) -> None:
        if reply.cancelled():
            return
        error = reply.exception()
        if isinstance(error, ConnectionLostError):
            return  # the reattach says how far it got
        if error is not None and self.exit_code is not None:
            return  # as above
        if error is not None:
            self._input_failed(error if isinstance(error, SternaError) else SternaError(str(error)))
            return
        try:
            self._confirm(decoded(reply.result(), Applied).applied)
        except SternaError as bad:
            self._input_failed(bad)

    def _confirm(self, applied: int, *, again: bool = False) -> None:
        """Drops input that the daemon has; `again` sends the rest anew, as the connection is another one."""
        if applied < self._input_start and again:
            self._input_failed(ProcessLostError("The daemon has lost input that it had confirmed."))
            return
        done = applied - self._input_start
        while done > 0 and self._input:
            chunk = self._input.popleft()
            if done < len(chunk):
                self._input.appendleft(chunk[done:])
                size = done
            else:
                size = len(chunk)
                self._input_sent = max(0, self._input_sent - 1)
            done -= size
            self._input_start += size
            self._input_bytes -= size
        if again and self.live:
            self._input_sent = 0
            self._send()
        self._moved.set()

    def input_ended(self) -> None:
        """Called when the process has ended and nothing more is known of its input."""
        self._input_failed(UsageError("The process has ended and takes no more input."))
        self._client.ended(self)

    def _input_failed(self, error: SternaError) -> None:
        self._input_error = self._input_error or error
        if self._input:
            self._undelivered = self._undelivered or error
        self._input.clear()
        self._input_bytes = self._input_sent = 0
        self._moved.set()

    # ---- signals ----------------------------------------------------------------------------------------------------

    async def kill(self, signal: str = "TERM", *, again: bool = False) -> None:
        """Sends KILL to the process and its group, or INT, HUP or TERM to the process alone.

        Parameters: `again`, whether it is sent once more when the connection was lost before it was confirmed.
        """
        await self._client.kill(self.id, signal, again=again)

    async def kill_and_wait(self, signal: str = "TERM", *, seconds: float = 3.0, escalate: bool = True) -> Killed:
        """Sends a signal and waits up to `seconds` (30 at most) for the end; then, with `escalate`, sends KILL."""
        return await self._client.kill_and_wait(self.id, signal, seconds=seconds, escalate=escalate)
