"""The methods `process.*`: a registry of processes that every connection may address by the ids clients chose."""

from __future__ import annotations

import signal
import time
from base64 import b64decode
from binascii import Error as Base64Error
from typing import TYPE_CHECKING, Final

from sterna.limits import (
    REMOTE_KILL_WAIT_MAX_MS,
    REMOTE_KILL_WAIT_MS,
    REMOTE_REAP_SECONDS,
    REMOTE_RETENTION_SECONDS,
    REMOTE_SWEEP_SECONDS,
)
from sterna.remote.calls import BAD_PARAMS, FAILED, NO_PARAMS, STDIN_GAP, SUCCESS, CallError
from sterna.remote.child import Child, PipeError
from sterna.remote.environment import check_directory, child_environment, find_command, search_path
from sterna.remote.fields import TEXT, Flag, Integer, Kind, TextMap, Texts
from sterna.remote.gotext import bytes_of, errno_text, expand
from sterna.remote.log import clipped
from sterna.remote.process import Process
from sterna.remote.spawn import trim_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sterna.remote.calls import Call, Params, Result
    from sterna.remote.connection import Connection
    from sterna.remote.keeper import Keeper
    from sterna.remote.log import Log
    from sterna.remote.loginpath import LoginPath
    from sterna.remote.loop import Loop
    from sterna.remote.metrics import Metrics

FIELDS: Final[Mapping[str, Mapping[str, Kind]]] = {
    "process.spawn": {
        "id": TEXT, "command": TEXT, "args": Texts(), "cwd": TEXT, "env": TextMap(), "wantPid": Flag(),
    },
    "process.stdin": {"id": TEXT, "data": TEXT, "offset": Integer(signed=False, optional=True)},
    "process.kill": {"id": TEXT, "signal": TEXT},
    "process.killAndWait": {
        "id": TEXT, "signal": TEXT, "timeoutMs": Integer(signed=True), "escalate": Flag(absent=True),
    },
    "process.reattach": {"id": TEXT, "fromSeq": Integer(signed=False), "wantPid": Flag()},
}  # fmt: skip

_SIGNALS: Final = {"KILL": signal.SIGKILL, "INT": signal.SIGINT, "HUP": signal.SIGHUP, "TERM": signal.SIGTERM}
_TERM: Final = "xterm-256color"  # of a terminal whose client does not say what it is
_NO_ID: Final = "Process ID is required"


def signal_of(name: str) -> signal.Signals:
    """Returns the signal of a name with or without SIG; whatever is unknown means SIGTERM."""
    return _SIGNALS.get(name.removeprefix("SIG"), signal.SIGTERM)


def decode_base64(text: str) -> bytes:
    """Returns the bytes of padded standard base64; line breaks count for nothing. Raises `CallError`."""
    try:
        plain = text.translate({10: None, 13: None}) if "\n" in text or "\r" in text else text
        if len(plain) % 4:  # Python takes padding after complete groups
            raise ValueError
        return b64decode(plain, validate=True)
    except (Base64Error, ValueError) as error:
        raise CallError(BAD_PARAMS, "Invalid base64 data") from error


class Processes:
    """All processes of the daemon.

    Parameters: `environment`, the daemon's own entries `NAME=value`; `home`, what `~` stands for.
    """

    def __init__(
        self, loop: Loop, log: Log, metrics: Metrics, login_path: LoginPath, environment: list[bytes], home: str
    ) -> None:
        self._loop, self._log, self._metrics, self._login_path = loop, log, metrics, login_path
        self._environment, self._home = environment, home
        self._path = search_path(environment)
        self._known: dict[str, Process] = {}
        self._keeper: Keeper | None = None  # with -durable
        self._replaced: set[Process] = set()  # still to be reaped, though their id belongs to another one
        self.methods: Mapping[str, Callable[[Call], None]] = {
            "process.spawn": self._spawn,
            "process.stdin": self._stdin,
            "process.kill": self._kill,
            "process.killAndWait": self._kill_and_wait,
            "process.reattach": self._reattach,
        }
        loop.later(REMOTE_SWEEP_SECONDS, self._sweep_again)

    # ---------------------------------------------------------------------------------------------------------- spawn

    def _spawn(self, call: Call) -> None:
        if not call.params.text("id"):
            raise CallError(BAD_PARAMS, _NO_ID)
        if not call.params.text("command"):
            raise CallError(BAD_PARAMS, "Command is required")
        self._login_path.when_known(lambda: self._spawn_now(call))

    def _spawn_now(self, call: Call) -> None:
        try:
            call.succeed(self._started(call))
        except CallError as error:
            call.fail(error)

    def _started(self, call: Call) -> Result:
        self._sweep()
        process_id, command = call.params.text("id"), call.params.text("command")
        child = self._child(call, command)
        process = Process(self._loop, self._metrics, process_id, child, self._ended, command)
        self._replace(process)
        self._metrics.process_spawns += 1
        shown = clipped(process_id)
        self._log.info(f"[process.Manager] Process {shown} started, PID={child.pid}, command={clipped(command)}")
        self._log.debug(f"[process.Manager] Starting stdout streaming for process {shown}")
        process.subscribe(call.connection)
        process.begin()
        return SUCCESS | self._identity(process, call)

    def _child(self, call: Call, command: str) -> Child:
        """Starts the child that a call asks for. Raises `CallError` with the contract's text for each step."""
        cwd = expand(call.params.text("cwd"), self._home)
        path, extra = command, call.params.map("env")
        terminal = call.params.group("pty")
        size = terminal_size(terminal) if terminal is not None else None
        if terminal is not None:
            extra = {"TERM": terminal.text("term") or _TERM, **extra}
        try:
            if cwd:
                check_directory(cwd)
            path = find_command(command, self._path)
            entries = child_environment(self._environment, self._login_path.value, extra)
            argv = [bytes_of(word) for word in (command, *call.params.texts("args"))]
            if self._keeper is not None:
                process_id = call.params.text("id")
                return self._keeper.start(bytes_of(path), argv, entries, bytes_of(cwd), process_id, command, size)
            if size is not None:
                from sterna.remote.ptychild import PtyChild

                return PtyChild.open(bytes_of(path), argv, entries, bytes_of(cwd), size)
            return Child.start(bytes_of(path), argv, entries, bytes_of(cwd))
        except (LookupError, ValueError) as error:
            raise CallError(FAILED, str(error)) from error
        except PipeError as error:
            raise CallError(FAILED, f"pipe2: {errno_text(error.errno or 0)}") from error
        except OSError as error:
            raise CallError(FAILED, f"fork/exec {path}: {errno_text(error.errno or 0)}") from error

    def _replace(self, process: Process) -> None:
        old = self._known.get(process.id)
        self._known[process.id] = process
        if old is not None:
            old.unsubscribe()
            old.unwatch_all()
            old.child.forget()
            if old.running:
                self._replaced.add(old)
                old.child.kill_group()
                old.resume()

    def _ended(self, process: Process) -> None:
        self._replaced.discard(process)
        self._metrics.process_exits += 1
        self._log.info(f"[process.Manager] Process {clipped(process.id)} exited with code {process.child.exit_code}")

    @staticmethod
    def _identity(process: Process, call: Call) -> Result:
        if not call.params.flag("wantPid"):
            return {}
        return {"pid": process.child.pid, "startTime": process.started_at}

    def take_up(self, keeper: Keeper) -> None:
        """Has processes started by `keeper` from now on, and goes on with those that it has. Raises `StartError`."""
        self._keeper = keeper
        children = keeper.open()
        if children:
            self._log.info(f"[durable] Took {len(children)} processes up")
        for child in children:
            about = child.about
            process = Process(self._loop, self._metrics, about.id, child, self._ended, about.command)
            self._replace(process)
            process.take_up(child)

    # ---------------------------------------------------------------------------------------------------------- stdin

    def _stdin(self, call: Call) -> None:
        """Admits input in the order of its connection: while one request is blocked, those after it wait."""
        waiting, feeding = call.connection.stdin, _Feeding(self._known, call)
        if waiting or not feeding.admit():
            waiting.append(feeding.admit)

    # ----------------------------------------------------------------------------------------------------------- kill

    def _kill(self, call: Call) -> None:
        process = self._known.get(call.params.text("id"))
        if process is not None:
            self._signal(process, signal_of(call.params.text("signal")))
        call.succeed(SUCCESS)

    @staticmethod
    def _signal(process: Process, number: signal.Signals) -> None:
        if process.running and not process.child.look():
            if number == signal.SIGKILL:
                process.child.kill_group()
            else:
                process.child.kill(number)

    def _kill_and_wait(self, call: Call) -> None:
        process_id = call.params.text("id")
        if not process_id:
            raise CallError(BAD_PARAMS, _NO_ID)
        process = self._known.get(process_id)
        if process is None:
            call.succeed({"found": False, "died": False})
        elif not process.running:
            call.succeed({"found": True, "died": True, "alreadyExited": True})
        else:
            _Killing(self._loop, process, call).begin()

    # ------------------------------------------------------------------------------------------------------- reattach

    def _reattach(self, call: Call) -> None:
        process_id = call.params.text("id")
        if not process_id:
            raise CallError(BAD_PARAMS, _NO_ID)
        process = self._known.get(process_id)
        if process is None:
            call.succeed({"found": False, "running": False, "firstSeq": 0, "lastSeq": 0, "stdinApplied": 0})
            return
        self._metrics.reattaches += 1
        process.attach(call.connection, call.params.number("fromSeq"))
        replay = process.replay
        result: Result = {
            "found": True, "running": process.running, "firstSeq": replay.first, "lastSeq": replay.last,
            "stdinApplied": process.applied,
        }  # fmt: skip
        result |= self._identity(process, call)
        expected = call.params.number("fromSeq") + 1
        if call.params.flag("wantGap") and expected < replay.first:
            result["gap"] = {"from": expected, "to": replay.first - 1}
        call.succeed(result)

    # ------------------------------------------------------------------------------------------------------- the end

    def _sweep_again(self) -> None:
        self._sweep()
        self._loop.later(REMOTE_SWEEP_SECONDS, self._sweep_again)

    def _sweep(self) -> None:
        """Forgets processes that exited long ago."""
        limit = time.monotonic() - REMOTE_RETENTION_SECONDS
        old = [process for process in self._known.values() if not process.running and process.ended_at < limit]
        for process in old:
            process.unsubscribe()
            process.unwatch_all()
            process.child.forget()
            del self._known[process.id]
            self._log.info(f"[process.Manager] Pruned exited process {clipped(process.id)}")
        if old:
            trim_memory()

    def get(self, process_id: str) -> Process | None:
        """Returns the process that an id belongs to."""
        return self._known.get(process_id)

    def all(self) -> list[Process]:
        """Returns the processes that can be addressed, in the order of their start."""
        return sorted(self._known.values(), key=lambda process: process.started_at)

    def alive(self) -> int:
        """Returns how many processes run."""
        return len(self._replaced) + sum(process.running for process in self._known.values())

    def kill_all(self) -> None:
        """Sends SIGKILL to the group of every process that runs."""
        for process in (*self._known.values(), *self._replaced):
            if process.running:
                process.child.kill_group()


def terminal_size(params: Params) -> tuple[int, int]:
    """Returns columns and rows, 80 and 24 where they are missing. Raises `CallError`."""
    columns, rows = params.number("cols") or 80, params.number("rows") or 24
    if not (0 < columns < 65_536 and 0 < rows < 65_536):
        raise CallError(BAD_PARAMS, "cols and rows must be numbers from 1 to 65535")
    return columns, rows


class _Feeding:
    """One stdin request; once it is blocked it belongs to the process it was blocked by, whoever takes the id over."""

    __slots__ = ("_call", "_data", "_known", "_process")

    def __init__(self, known: Mapping[str, Process], call: Call) -> None:
        self._known, self._call = known, call
        self._data = b""
        self._process: Process | None = None

    def admit(self) -> bool:
        """Returns whether the request was answered; otherwise its connection is tried again when there is room."""
        try:
            result = self._fed()
        except CallError as error:
            self._call.fail(error)
            return True
        if result is None:
            assert self._process is not None
            self._process.when_taking(self._retry)
            self._call.connection.processes.add(self)
            return False
        self._call.succeed(result)
        return True

    def resume(self) -> None:
        """The client has caught up; input does not wait for that."""

    def detach(self, connection: Connection) -> None:
        """The client is gone, and what it wanted to say with it."""
        connection.processes.discard(self)
        if self._process is not None:
            self._process.stop_waiting(self._retry)

    def _retry(self) -> None:
        self._call.connection.processes.discard(self)
        waiting = self._call.connection.stdin
        while waiting and waiting[0]():
            waiting.popleft()

    def _fed(self) -> Result | None:
        params = self._call.params
        if self._process is None:
            self._data = decode_base64(params.text("data"))
            self._process = self._known.get(params.text("id"))
        process, data = self._process, self._data
        if process is None:
            raise CallError(BAD_PARAMS, "Process not found")
        if not process.running:
            raise CallError(BAD_PARAMS, "Process not running")
        offset = params.optional("offset")
        skip = 0 if offset is None else process.applied - offset
        if skip < 0:
            raise CallError(STDIN_GAP, "stdin offset gap: offset ahead of applied bytes")
        if skip and skip >= len(data):
            return {"success": True, "applied": process.applied, "duplicate": True}
        data = data[skip:]
        if process.stdin_closed:
            raise CallError(BAD_PARAMS, "Process stdin is closed")
        if not process.takes(len(data)):
            return None
        process.feed(data)
        return {"success": True, "applied": process.applied}


class _Killing:
    """One killAndWait: signal, wait, and if it may, escalate and wait once more."""

    def __init__(self, loop: Loop, process: Process, call: Call) -> None:
        self._loop, self._process, self._call = loop, process, call
        self._signal = signal_of(call.params.text("signal"))
        self._escalate = call.params.flag("escalate")
        self._escalated = False
        wait = call.params.number("timeoutMs")
        self._seconds = (min(wait, REMOTE_KILL_WAIT_MAX_MS) if wait > 0 else REMOTE_KILL_WAIT_MS) / 1000

    def begin(self) -> None:
        """Sends the signal."""
        self._call.params = NO_PARAMS
        self._call.connection.processes.add(self)
        self._process.exit_waiters[self._exited] = None
        self._timer = self._loop.later(self._seconds, self._late)
        process, number = self._process, self._signal
        if process.child.look():
            return  # only its outputs are still open
        if number == signal.SIGKILL:
            process.child.kill_group()
        else:
            process.child.kill(number)

    def _exited(self) -> None:
        if self._escalate:
            self._process.child.kill_group()  # what its children left behind
        self._timer.cancel()
        self._answer(died=True)

    def _late(self) -> None:
        if self._escalate and not self._escalated:
            self._escalated = True
            self._process.child.kill_group()
            self._process.resume()
            self._timer = self._loop.later(REMOTE_REAP_SECONDS, self._late)
        else:
            self._answer(died=False)

    def _answer(self, *, died: bool) -> None:
        waiters = self._process.exit_waiters
        if waiters.pop(self._exited, 0) is None and self._escalate:
            waiters[self._process.child.kill_group] = None  # as `_exited` does, and holds no request
        self._call.connection.processes.discard(self)
        result: Result = {"found": True, "died": died}
        if self._escalated:
            result["escalated"] = True
        self._call.succeed(result)

    def resume(self) -> None:
        """The client has caught up; an end does not wait for that."""

    def detach(self, connection: Connection) -> None:
        """The client is gone: what it asked for is done, and nobody is told."""
        connection.processes.discard(self)
        self._call.id_text = "null"
