"""`sterna remote attach`: a process of the daemon on another machine behind this one's standard streams."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import msgspec

from sterna.cli.ssh import INSTALL, MISSING, PLAIN, remote_command
from sterna.errors import ConnectionLostError, SternaError, UsageError
from sterna.remote import Client, Exit, Gap, Process, RemoteError
from sterna.remote.clientwire import CommandDialer, Link
from sterna.remote.rendezvous import MARK, PREFIX, Answer, Request

_QUIET_SECONDS = 1.0
_TWICE_SECONDS = 1.0
_READ_BYTES = 65_536
_BY_A_SIGNAL = 255
_NO_METHOD = -32601
_OPTIONS = ("-o", "ClearAllForwardings=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_AGAIN = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_NOT_FOUND = 127
# Ctrl-C is for the command there, but the terminal sends it to ssh as well, which has to stay with the terminal, as it
# may ask for a password. A signal that is ignored stays ignored in ssh; whoever leaves ends it by another one.
_DEAF = ("/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh")


class SshDialer(CommandDialer):
    """The bridge on another machine, behind the user's own ssh; the daemon there is started if there is none.

    Secrets travel through ssh's pipes only.
    """

    def __init__(self, host: str, ssh: str, sterna: str | None) -> None:
        self._host = host
        there = remote_command(sterna, "remote meet")
        given = shlex.split(ssh)
        if not given or shutil.which(given[0]) is None:
            raise UsageError(f"{ssh!r} cannot be started: install OpenSSH or say what your ssh is with --ssh.")
        words = [*_DEAF, *given, *PLAIN, *_OPTIONS]
        super().__init__([*words, "--", host, there], "", again=[*words, *_AGAIN, "--", host, there])

    async def greet(self, link: Link) -> str:
        """Returns the token, which the other side says first."""
        request = Request(1, secrets.token_hex(32))
        link.send(msgspec.json.encode(request) + b"\n")
        try:
            said = await link.expect(PREFIX)
        except ConnectionLostError:
            if await link.status() == _NOT_FOUND:
                raise UsageError(f"{self._host} does not find the program that runs sterna: {INSTALL}.") from None
            raise ConnectionLostError(
                f"ssh could not reach {self._host}, or not run sterna there: what it said is above (`ssh {self._host}` "
                "has to work by itself)."
            ) from None
        if PREFIX + said == MISSING.encode():
            raise UsageError(f"There is no sterna on {self._host}: {INSTALL}.")
        try:
            if not said.startswith(MARK):
                raise msgspec.DecodeError
            answer = msgspec.json.decode(said[len(MARK) :], type=Answer)
        except msgspec.MsgspecError:
            raise UsageError(f"The answer of {self._host} makes no sense: update sterna there.") from None
        if answer.error:
            raise SternaError(f"{self._host}: {answer.error}")
        return answer.token


class _Hand:
    """Calls that may block, one after another in a thread that nobody waits for at the end."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], None], asyncio.Future[None]]] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    async def do(self, call: Callable[[], None]) -> None:
        """Returns when `call` has returned; raises what it raises."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._calls.put((call, done))
        await done

    def _run(self) -> None:
        while True:
            call, done = self._calls.get()
            error: Exception | None = None
            try:
                call()
            except Exception as raised:  # noqa: BLE001 # it is raised where it is waited for
                error = raised
            try:
                self._loop.call_soon_threadsafe(self._tell, done, error)
            except RuntimeError:
                return  # the loop has ended and nobody waits

    @staticmethod
    def _tell(done: asyncio.Future[None], error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)


def run(
    host: str, command: Sequence[str], *, name: str | None, cwd: str, ssh: str, sterna: str | None
) -> int:  # fmt: skip
    """Runs or finds the process and returns the exit status. Raises `SternaError`."""
    if not command and name is None:
        raise UsageError("Say what to run: sterna remote attach HOST -- COMMAND…, or --id for what runs already.")
    return asyncio.run(_Attached(host, SshDialer(host, ssh, sterna)).run(command, name, cwd))


class _Attached:
    def __init__(self, host: str, dialer: SshDialer) -> None:
        self._host, self._dialer = host, dialer
        self._timer: asyncio.TimerHandle | None = None
        self._said = False
        self._interrupted = -_TWICE_SECONDS
        self._leave: asyncio.Future[int] | None = None

    async def run(self, command: Sequence[str], name: str | None, cwd: str) -> int:
        async with await Client.open(self._dialer, changed=self._changed) as client:
            process = await client.attach(name) if name is not None else None
            if process is None:
                if not command:
                    raise UsageError(f"There is no process {name} on {self._host}: say what to run after --.")
                process = await client.spawn(command[0], command[1:], cwd=cwd, id=name)
            return await self._relayed(process, named=name is not None)

    async def _relayed(self, process: Process, *, named: bool) -> int:
        loop = asyncio.get_running_loop()
        self._leave = loop.create_future()
        loop.add_signal_handler(signal.SIGINT, self._interrupt, process)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._go, 128 + number)
        threading.Thread(target=_feed, args=(process, loop), daemon=True).start()
        output = asyncio.ensure_future(self._output(process))
        either: list[asyncio.Future[Any]] = [output, self._leave]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if output.done():
            try:
                return output.result()
            except BrokenPipeError:
                if not named:  # nobody reads it and nobody knows its name
                    await process.kill("TERM")
                raise
        output.cancel()
        await asyncio.gather(output, return_exceptions=True)
        self._say(f"the process goes on: sterna remote attach {self._host} --id {process.id}")
        return self._leave.result()

    async def _output(self, process: Process) -> int:
        hand = _Hand()
        async for event in process:
            if isinstance(event, Exit):
                return event.code if event.code >= 0 else _BY_A_SIGNAL
            if isinstance(event, Gap):
                self._say(f"{event.last - event.first + 1} pieces of output were lost: nobody read them in time.")
            else:
                target, data = (2 if event.stream == "stderr" else 1), event.data
                await hand.do(lambda target=target, data=data: _put(target, data))  # type: ignore[misc] # bound now
        return 1

    def _interrupt(self, process: Process) -> None:
        now = time.monotonic()
        if now - self._interrupted < _TWICE_SECONDS:
            self._go(128 + signal.SIGINT)
            return
        self._interrupted = now
        task = asyncio.ensure_future(process.kill("INT", again=True))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _go(self, status: int) -> None:
        if self._leave is not None and not self._leave.done():
            self._leave.set_result(status)

    def _changed(self, connected: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not connected:
            self._timer = asyncio.get_running_loop().call_later(_QUIET_SECONDS, self._complain)
        elif self._said:
            self._said = False
            self._say(f"{self._host} is back.")

    def _complain(self) -> None:
        self._said = True
        self._say(f"the connection to {self._host} is lost; the process goes on, and so does this once it is back.")

    @staticmethod
    def _say(text: str) -> None:
        sys.stderr.write(f"sterna: {text}\n")
        sys.stderr.flush()


def _put(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def _feed(process: Process, loop: asyncio.AbstractEventLoop) -> None:
    """Gives standard input to the process, no faster than it takes it."""
    try:
        while data := os.read(0, _READ_BYTES):
            asyncio.run_coroutine_threadsafe(process.write(data), loop).result()
        asyncio.run_coroutine_threadsafe(process.close_input(), loop).result()
    except RemoteError as error:
        if error.number == _NO_METHOD:
            sys.stderr.write("sterna: this daemon cannot end a process's input: start it with -extensions.\n")
    except (OSError, RuntimeError, SternaError):
        pass  # the process has ended, or all of this does
