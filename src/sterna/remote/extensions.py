"""What `-extensions` adds to the contract: further methods and parameters (docs/remote.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sterna.remote.calls import BAD_PARAMS, FAILED, SUCCESS, Additions, CallError
from sterna.remote.fields import TEXT, Flag, Group, Integer, Kind
from sterna.remote.files import FIELDS as FILES_FIELDS
from sterna.remote.gotext import failure
from sterna.remote.processes import FIELDS as PROCESS_FIELDS
from sterna.remote.processes import terminal_size
from sterna.remote.terminal import set_size
from sterna.remote.write import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sterna.remote.calls import Call, Result
    from sterna.remote.filewatch import FileWatches
    from sterna.remote.process import Process
    from sterna.remote.processes import Processes

METHODS: Final = (
    "process.list", "process.watch", "process.unwatch", "process.closeStdin", "process.resize",
    "files.write", "files.watch", "files.unwatch",
)  # fmt: skip
FEATURES: Final = (
    "process.list", "process.watch", "process.closeStdin", "process.spawn.pty", "process.reattach.wantGap",
    "files.write", "files.watch",
)  # fmt: skip

_LISTED_BYTES: Final = 512  # what a listed process takes beside its id, about

_SIZE: Final = {"cols": Integer(signed=True), "rows": Integer(signed=True)}
FIELDS: Final[Mapping[str, Mapping[str, Kind]]] = {
    "process.list": {},
    "process.watch": {"id": TEXT, "fromSeq": Integer(signed=False)},
    "process.unwatch": {"id": TEXT},
    "process.closeStdin": {"id": TEXT},
    "process.resize": {"id": TEXT, **_SIZE},
    "process.spawn": {**PROCESS_FIELDS["process.spawn"], "pty": Group(**_SIZE, term=TEXT)},
    "process.reattach": {**PROCESS_FIELDS["process.reattach"], "wantGap": Flag()},
    "files.stat": {**FILES_FIELDS["files.stat"], "wantMtime": Flag()},
    "files.write": {
        "path": TEXT, "content": TEXT, "mode": Integer(signed=False, optional=True),
        "ifSize": Integer(signed=True, optional=True), "ifMtime": TEXT,
    },
    "files.watch": {"path": TEXT},
    "files.unwatch": {"watch": Integer(signed=True)},
}  # fmt: skip


def additions(processes: Processes, watches: FileWatches, home: str) -> Additions:
    """Returns all of them; `home` is what `~` stands for."""
    added = Additions()
    added.methods, added.features, added.fields = METHODS, FEATURES, FIELDS
    added.inline = {
        **_ProcessMethods(processes).methods, "files.watch": watches.watch, "files.unwatch": watches.unwatch
    }  # fmt: skip
    added.threaded = {"files.write": Writer(home).write}
    return added


class _ProcessMethods:
    """The further methods of processes."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.methods: Mapping[str, Callable[[Call], None]] = {
            "process.list": self._list,
            "process.watch": self._watch,
            "process.unwatch": self._unwatch,
            "process.closeStdin": self._close_stdin,
            "process.resize": self._resize,
        }

    def _list(self, call: Call) -> None:
        processes = [_described(process) for process in self._processes.all()]
        size = _LISTED_BYTES + sum(_LISTED_BYTES + 6 * len(str(one["id"])) for one in processes)
        call.succeed_by_and_by({"processes": processes}, size)

    def _watch(self, call: Call) -> None:
        process = self._processes.get(_id_of(call))
        if process is None:
            call.succeed({"found": False, "running": False, "firstSeq": 0, "lastSeq": 0, "stdinApplied": 0})
            return
        if process.subscriber is call.connection:
            raise CallError(BAD_PARAMS, "Process is already streamed to this connection")
        call.succeed({"found": True, "running": process.running, **_ends(process)})
        process.watch(call.connection, call.params.number("fromSeq"))

    def _unwatch(self, call: Call) -> None:
        process = self._processes.get(_id_of(call))
        if process is not None:
            process.unwatch(call.connection)
        call.succeed(SUCCESS)

    def _running(self, call: Call) -> Process:
        process = self._processes.get(_id_of(call))
        if process is None:
            raise CallError(BAD_PARAMS, "Process not found")
        if not process.running:
            raise CallError(BAD_PARAMS, "Process not running")
        return process

    def _close_stdin(self, call: Call) -> None:
        """Takes its turn behind the input of its connection that is still blocked."""
        waiting = call.connection.stdin
        if waiting:
            waiting.append(lambda: self._closed_stdin(call))
        else:
            self._closed_stdin(call)

    def _closed_stdin(self, call: Call) -> bool:
        try:
            process = self._running(call)
            if process.child.has_terminal:
                raise CallError(BAD_PARAMS, "Process has a terminal: send its end-of-file character instead")
            process.close_stdin()
        except CallError as error:
            call.fail(error)
        else:
            call.succeed({"success": True, "applied": process.applied})
        return True

    def _resize(self, call: Call) -> None:
        process = self._running(call)
        if not process.child.has_terminal:
            raise CallError(BAD_PARAMS, "Process has no terminal")
        try:
            set_size(process.child.stdin, *terminal_size(call.params))
        except OSError as error:
            raise CallError(FAILED, failure("resize", process.id, error)) from error
        call.succeed(SUCCESS)


def _id_of(call: Call) -> str:
    process_id = call.params.text("id")
    if not process_id:
        raise CallError(BAD_PARAMS, "Process ID is required")
    return process_id


def _ends(process: Process) -> Result:
    replay = process.replay
    return {"firstSeq": replay.first, "lastSeq": replay.last, "stdinApplied": process.applied}


def _described(process: Process) -> Result:
    result: Result = {"id": process.id, "pid": process.child.pid, "running": process.running}
    if not process.running:
        result["exitCode"] = process.child.exit_code
    return result | {"startTime": process.started_at} | _ends(process) | {"command": process.command}
