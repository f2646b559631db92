"""The daemon itself, put together out of its parts."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from sterna.limits import REMOTE_GIT_STRICT_SECONDS
from sterna.remote import build, files, git, processes
from sterna.remote.calls import Additions
from sterna.remote.directories import remove, socket_identity
from sterna.remote.dispatch import FEATURES, METHODS, WAITING, Dispatcher
from sterna.remote.environment import TOKEN_PIPE, own_environment
from sterna.remote.failure import StartError
from sterna.remote.flags import duration_text
from sterna.remote.gotext import text_of
from sterna.remote.log import Log
from sterna.remote.loginpath import LoginPath
from sterna.remote.loop import Loop
from sterna.remote.metrics import Metrics, MetricsServer
from sterna.remote.server import Server
from sterna.remote.spawn import raise_descriptor_limit
from sterna.remote.token import FILE_NAME, checked, persist, read_descriptor, read_file
from sterna.remote.workers import Workers

if TYPE_CHECKING:
    from sterna.remote.calls import Result
    from sterna.remote.flags import Flags
    from sterna.remote.keeper import Keeper

_SWITCH_SECONDS = 0.0005  # for so long a busy worker may keep the loop from running


def serve(flags: Flags, path: str) -> NoReturn:
    """Serves at `path` until it is told to stop, then ends the process. Raises `StartError` when it cannot start."""
    Daemon(flags, path).run()


def _entry(environment: list[bytes], name: bytes) -> str:
    return next(
        (text_of(entry[len(name) + 1 :]) for entry in reversed(environment) if entry.startswith(name + b"=")), ""
    )


def git_seconds(flags: Flags) -> float:
    """Returns after how long git is killed, 0 for never; -strict has a bound of its own where none is given."""
    if flags.bools["strict"] and not flags.ints["git-timeout"] and "git-timeout" not in flags.given:
        return REMOTE_GIT_STRICT_SECONDS
    return flags.seconds("git-timeout")


class Daemon:
    """All parts of a running daemon."""

    def __init__(self, flags: Flags, path: str) -> None:
        self._flags, self._path = flags, path
        self._environment = own_environment()
        self._log = Log(_entry(self._environment, b"CLAUSTRUM_LOG_LEVEL"))
        self._keeper: Keeper | None = None  # with -durable
        self._token = self._read_token()
        _keep_descriptors()
        raise_descriptor_limit()
        home = _entry(self._environment, b"HOME")
        self._loop = loop = Loop(self._failed)
        metrics = Metrics()
        self._metrics_server = MetricsServer(loop, metrics, self._log)
        self._login_path = LoginPath(loop, self._log)
        self._processes = processes.Processes(loop, self._log, metrics, self._login_path, self._environment, home)
        strict, seconds = flags.bools["strict"], git_seconds(flags)
        methods = files.Files(
            home,
            regular_only=flags.bools["files-read-regular-only"] or strict,
            extract_max_bytes=flags.ints["max-extract-bytes"],
            staged=strict,
        ).methods
        self._git = git.Git(self._environment, home, seconds, duration_text(round(seconds * 1e9)), strict=strict)
        workers = {kind: Workers(loop.post) for kind in ("files", "git", WAITING)}
        more = self._extensions(workers["files"], home) if flags.bools["extensions"] else Additions()
        self._dispatcher = Dispatcher(
            self._log,
            workers,
            Workers(loop.post, 1),
            self._token,
            inline={**self._processes.methods, **more.inline},
            threaded={**methods, **self._git.methods, **more.threaded},
            fields={**files.FIELDS, **git.FIELDS, **processes.FIELDS, **more.fields},
            server=_server_results(more),
            shut_down=self._stop,
            guarded=strict,
        )
        self._server = Server(loop, self._log, metrics, self._dispatcher.handle, strict=strict)
        self._lock = -1  # with -strict: held as long as this process lives

    def _extensions(self, workers: Workers, home: str) -> Additions:
        from sterna.remote.extensions import additions
        from sterna.remote.filewatch import FileWatches

        return additions(self._processes, FileWatches(self._loop, workers, home), home)

    def _read_token(self) -> bytes:
        pipe = os.environ.pop(TOKEN_PIPE, "")
        if pipe.isdigit():
            raw = read_descriptor(int(pipe))
            os.close(int(pipe))
        elif self._flags.ints["token-fd"] >= 0:
            raw = read_descriptor(self._flags.ints["token-fd"])
        elif self._flags.texts["token-file"]:
            raw, problem = read_file(self._flags.texts["token-file"])
            if problem:
                self._log.warn(f"[daemon] failed to remove token file: {problem}")
        else:
            raise StartError("daemonized child requires --token-file or --token-fd")
        return checked(raw)

    def run(self) -> NoReturn:
        """Listens, serves, and ends the process."""
        if self._flags.bools["strict"]:
            from sterna.remote import strict

            self._lock = strict.inherited_lock(self._path)
            strict.sign(self._lock)
        self._login_path.start(_entry(self._environment, b"SHELL"), self._environment)
        if self._flags.bools["durable"]:
            self._keep_processes()
        try:
            self._server.listen(self._path)
        except OSError as error:
            raise StartError(f"listen unix: {error}") from error
        self._socket = socket_identity(self._path)
        directory = os.path.dirname(self._path) or "."
        problem = persist(self._token, directory)
        if problem:
            self._log.warn(f"[daemon] failed to persist token: {problem}")
        if self._flags.texts["metrics-addr"]:
            self._metrics_server.listen(self._flags.texts["metrics-addr"])
        if self._flags.bools["listen-pipe"]:
            self._log.warn("[daemon] -listen-pipe is only for Windows and ignored here")
        self._loop.when_signalled((signal.SIGTERM, signal.SIGINT), self._stop)
        self._log.plain(f"Claustrum remote server listening on {self._path}")
        sys.setswitchinterval(_SWITCH_SECONDS)
        gc.collect()
        gc.freeze()
        self._loop.run()
        self._close()
        os._exit(0)  # workers may wait for a pipe or a slow disk

    def _keep_processes(self) -> None:
        from sterna.remote.keeper import Keeper

        self._keeper = Keeper(self._loop, self._log, self._path, self._environment)
        self._processes.take_up(self._keeper)

    def _failed(self, error: BaseException) -> None:
        self._log.error(f"[Server] recovered panic: {error!r}")

    def _stop(self) -> None:
        self._loop.stop()

    def _close(self) -> None:
        self._server.close_listener()
        self._metrics_server.close()
        self._git.close()
        if self._lock < 0 or socket_identity(self._path) == self._socket:  # else it is another daemon's by now
            for name in (self._path, os.path.join(os.path.dirname(self._path) or ".", FILE_NAME)):
                remove(name)
        if self._flags.bools["keep-children"]:
            alive = self._processes.alive()
            self._log.info(f"[Server] -keep-children: leaving {alive} running child process(es) alive across shutdown")
        else:
            self._processes.kill_all()
            if self._keeper is not None:
                self._keeper.end()
        self._server.close_connections()


def _keep_descriptors() -> None:
    """Keeps what was inherited from children, and the numbers 0 to 2 from pipes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass


def _server_results(more: Additions) -> dict[str, Result]:
    version = build.version()
    return {
        "server.version": {"version": version, "platform": build.PLATFORM, "arch": build.arch()},
        "server.capabilities": {
            "version": version,
            "methods": [*METHODS, *more.methods],
            "features": [*FEATURES, *more.features],
        },
    }
