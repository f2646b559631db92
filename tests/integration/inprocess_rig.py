"""The daemon's processes in the test's own process: bounds can be patched, and long times end when the test says so."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sterna.remote.dispatch import WAITING, Dispatcher
from sterna.remote.environment import own_environment
from sterna.remote.extensions import additions
from sterna.remote.filewatch import FileWatches
from sterna.remote.log import Log
from sterna.remote.loginpath import LoginPath
from sterna.remote.loop import Loop, Timer
from sterna.remote.metrics import Metrics
from sterna.remote.processes import FIELDS, Processes
from sterna.remote.server import Server
from sterna.remote.workers import Workers
from tests.integration.remote_rig import TOKEN, Client, until

T = TypeVar("T")
_LONG_SECONDS = 1.0


class SlowLoop(Loop):
    """A loop whose timers of a second and more ring when they are told to."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        super().__init__(failed)
        self.long: list[tuple[float, Timer]] = []

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        if seconds < _LONG_SECONDS:
            return super().later(seconds, callback)
        timer = Timer(callback)
        self.long.append((seconds, timer))
        return timer


class Inside:
    """Processes, extensions and a socket, served by a thread."""

    def __init__(self, directory: Path) -> None:
        self.errors: list[BaseException] = []
        self.loop = SlowLoop(self.errors.append)
        self.path, self.log = str(directory / "inside.sock"), directory / "inside.log"
        self._log_file = open(self.log, "ab")  # noqa: SIM115 # closed with the rig
        log, metrics = Log("debug", self._log_file.fileno()), Metrics()
        login_path = LoginPath(self.loop, log)
        login_path._settle(b"")  # no shell is asked
        self.processes = Processes(self.loop, log, metrics, login_path, own_environment(), str(directory))
        workers = {kind: Workers(self.loop.post) for kind in ("files", "git", WAITING)}
        more = additions(self.processes, FileWatches(self.loop, workers["files"], "/"), "/")
        dispatcher = Dispatcher(
            log, workers, Workers(self.loop.post, 1), TOKEN.encode(), inline={**self.processes.methods, **more.inline},
            threaded=more.threaded, fields={**FIELDS, **more.fields}, server={"server.ping": {}}, shut_down=print,
        )  # fmt: skip
        self._server = Server(self.loop, log, metrics, dispatcher.handle)
        self._server.listen(self.path)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self.processes.kill_all)
        until(lambda: self.do(self.processes.alive) == 0, "all processes are reaped")
        self.do(self._server.close_listener)
        self.do(self._server.close_connections)
        self.loop.post(self.loop.stop)
        self._thread.join()
        self.loop._epoll.close()
        os.close(self.loop._bell)
        os.close(self.loop._button)
        self._log_file.close()
        assert not self.errors

    def connect(self) -> Client:
        return Client(self.path)

    def do(self, call: Callable[[], T]) -> T:
        """Returns what `call` returns in the loop."""
        done, results = threading.Event(), list[T]()

        def run() -> None:
            try:
                results.append(call())
            finally:
                done.set()

        self.loop.post(run)
        assert done.wait(20)
        return results[0]

    def waits(self, seconds: float) -> bool:
        """Returns whether something is to happen in so many seconds."""
        return any(wait == seconds and timer.callback is not None for wait, timer in self.loop.long)

    def ring(self, seconds: float) -> None:
        """Lets so many seconds pass for what waits for just that long; it waits for it to begin."""
        until(lambda: self.waits(seconds), f"nothing waits for {seconds} seconds")
        self.do(lambda: self._ring(seconds))

    def _ring(self, seconds: float) -> None:
        due = [timer for wait, timer in self.loop.long if wait == seconds]
        self.loop.long = [(wait, timer) for wait, timer in self.loop.long if wait != seconds]
        for timer in due:
            if timer.callback is not None:
                timer.callback()
