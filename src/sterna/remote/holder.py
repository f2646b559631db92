"""The process that owns the children of a durable daemon: their pipes, the records of them, their exit statuses.

It never reads a pipe itself. It lends its descriptors to one daemon at a time, and to the next one when that is gone.
Whatever it imports stays in memory as long as the processes live, so that is little.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from errno import EMFILE
from typing import Final

from sterna.limits import (
    REMOTE_HOLDER_END_SECONDS,
    REMOTE_HOLDER_GREETING_SECONDS,
    REMOTE_HOLDER_IDLE_SECONDS,
    REMOTE_RETENTION_SECONDS,
)
from sterna.remote import holding
from sterna.remote.holding import DESCRIPTORS, PIDFD, PIPES, STDIN, HoldingError
from sterna.remote.spawn import descriptor_limit, raise_descriptor_limit, spawn_followed

_POLL_SECONDS: Final = 1.0
_RECORDS: Final = ("stdout", "stderr", "index", "stdin")


class Held:
    """A process; `descriptors` are −1 when they are closed. It is a zombie from its end until `reap`."""

    __slots__ = ("about", "descriptors", "ended_at", "open", "pid", "reaped")

    def __init__(self, pid: int, about: bytes, descriptors: list[int]) -> None:
        self.pid, self.about, self.descriptors = pid, about, descriptors
        self.open = sum(descriptor >= 0 for descriptor in descriptors)
        self.reaped = False
        self.ended_at: float | None = None  # when this was noticed while no daemon was there

    def status(self) -> int | None:
        """Returns the exit code, −1 for a death by signal, None while the process runs."""
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -1

    def close(self, which: int) -> None:
        """Closes one descriptor; closing it again does nothing."""
        if self.descriptors[which] >= 0:
            os.close(self.descriptors[which])
            self.descriptors[which] = -1
            self.open -= 1

    def reap(self) -> None:
        """Takes the process, which must have ended, out of the process table, and closes its pipes."""
        if not self.reaped:
            self.reaped = True
            os.waitpid(self.pid, 0)
            for which in range(PIPES):
                self.close(which)

    def kill(self) -> None:
        """Sends SIGKILL to everything in the process's group. Only valid before `reap`."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has become another user's


class Holder:
    """Serves one daemon at a time at a listening socket.

    Parameters: `path`, where the socket is.
    """

    def __init__(self, listener: socket.socket, path: str) -> None:
        self._listener, self._path = listener, path
        self._identity = _identity(path)
        self._held: dict[int, Held] = {}
        self._doomed: list[Held] = []  # forgotten before they had ended
        self._next = 1
        self._daemon: socket.socket | None = None
        self._daemon_pidfd = -1
        self._waiting: tuple[socket.socket, int] | None = None
        self._alone_since = time.monotonic()
        self._running = True

    def run(self) -> None:
        """Serves until there is neither a daemon nor a process."""
        while self._running:
            poll = select.poll()
            poll.register(self._listener, select.POLLIN)
            if self._daemon is not None:
                poll.register(self._daemon, select.POLLIN)
            for descriptor, _events in poll.poll(None if self._daemon and not self._doomed else _POLL_SECONDS * 1000):
                if descriptor == self._listener.fileno():
                    self._accept()
                elif self._daemon is not None and descriptor == self._daemon.fileno():
                    self._serve(self._daemon)
            self._reap_doomed()
            if self._daemon is None:
                self._sweep()
        self._leave()

    # -------------------------------------------------------------------------------------------------------- daemons

    def _accept(self) -> None:
        """Takes a new daemon in; it is served when the one before it is dead, which it is without loss."""
        try:
            sock, _address = self._listener.accept()
        except OSError:
            return
        sock.settimeout(REMOTE_HOLDER_GREETING_SECONDS)
        pid, uid = holding.peer(sock)
        try:
            if uid != os.getuid():
                raise PermissionError
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError):
            sock.close()
            return
        if self._waiting is not None:
            self._waiting[0].close()
            os.close(self._waiting[1])
        self._waiting = sock, pidfd
        if self._daemon is None:
            self._change()
        else:
            try:
                signal.pidfd_send_signal(self._daemon_pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # its socket says so next

    def _change(self) -> None:
        """Serves the next daemon, if there is one, instead of the one that is gone."""
        if self._daemon is not None:
            self._daemon.close()
            os.close(self._daemon_pidfd)
            self._daemon = None
        self._alone_since = time.monotonic()
        if self._waiting is not None:
            (self._daemon, self._daemon_pidfd), self._waiting = self._waiting, None

    def _serve(self, daemon: socket.socket) -> None:
        try:
            items, descriptors = holding.receive(daemon)
            for descriptor in descriptors:
                os.close(descriptor)
            self._obey(daemon, items)
        except (OSError, ValueError, LookupError):
            self._change()

    def _obey(self, daemon: socket.socket, items: list[bytes]) -> None:
        what = items[0]
        if what == holding.HELLO:
            self._lend_all(daemon)
        elif what == holding.START:
            self._start(daemon, items)
        elif what == holding.END:
            self._running = False
        else:
            handle = int(items[1])
            held = self._held[handle]
            if what == holding.STATUS:
                code = held.status()
                holding.send(daemon, [b"" if code is None else str(code).encode()])
            elif what == holding.CLOSE:
                held.close(int(items[2]))
            elif what == holding.REAP:
                held.reap()
            elif what == holding.DROP:
                self._drop(handle)
            else:
                raise HoldingError

    def _lend_all(self, daemon: socket.socket) -> None:
        holding.send(daemon, [holding.VERSION, str(len(self._held)).encode()])
        for handle, held in self._held.items():
            held.ended_at = None
            self._lend(daemon, handle, held)

    @staticmethod
    def _lend(daemon: socket.socket, handle: int, held: Held) -> None:
        is_open = b"".join(b"1" if descriptor >= 0 else b"0" for descriptor in held.descriptors)
        items = [holding.OK, str(handle).encode(), str(held.pid).encode(), is_open, held.about]
        holding.send(daemon, items, [descriptor for descriptor in held.descriptors if descriptor >= 0])

    # ------------------------------------------------------------------------------------------------------ processes

    def _start(self, daemon: socket.socket, items: list[bytes]) -> None:
        _, executable, cwd, about, size, count, *words = items
        argv, env = words[: int(count)], words[int(count) :]
        try:
            held = self._started(executable, argv, env, cwd, about, size)
        except _PipeError as error:
            holding.send(daemon, [holding.FAILED, b"pipe", str(error.errno).encode()])
        except OSError as error:
            holding.send(daemon, [holding.FAILED, b"exec", str(error.errno).encode()])
        else:
            handle, self._next = self._next, self._next + 1
            self._held[handle] = held
            self._lend(daemon, handle, held)

    def _started(
        self, executable: bytes, argv: list[bytes], env: list[bytes], cwd: bytes, about: bytes, size: bytes
    ) -> Held:
        kept: list[int] = []
        given: list[int] = []
        try:
            try:
                used = sum(held.open for held in self._held.values())
                if (used + 2 * DESCRIPTORS) * 4 > descriptor_limit() * 3:
                    raise OSError(EMFILE, os.strerror(EMFILE))  # a daemon must be able to borrow all of them
                terminal = _terminal(size, kept, given) if size else _pipes(kept, given)
                kept += [os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for name in _RECORDS]
            except OSError as error:
                raise _PipeError(error.errno, error.strerror) from error
            stdin, out, err = (given * 3)[:3]
            pid, pidfd = spawn_followed(executable, argv, env, cwd, (stdin, out, err), terminal)
        except OSError:
            for descriptor in (*kept, *given):
                if descriptor >= 0:
                    os.close(descriptor)
            raise
        for descriptor in given:
            os.close(descriptor)
        return Held(pid, about, [pidfd, *kept])

    def _drop(self, handle: int) -> None:
        """Forgets a process; one that still runs is killed."""
        held = self._held.pop(handle)
        for which in range(STDIN, DESCRIPTORS):
            held.close(which)
        if not held.reaped:
            held.kill()
            self._doomed.append(held)
        self._reap_doomed()

    def _reap_doomed(self) -> None:
        for held in [held for held in self._doomed if held.status() is not None]:
            held.reap()
            held.close(PIDFD)
            self._doomed.remove(held)

    def _sweep(self) -> None:
        """Forgets what ended long ago, and ends when nothing is left to wait for."""
        now = time.monotonic()
        for handle, held in list(self._held.items()):
            if held.ended_at is None and (held.reaped or held.status() is not None):
                held.ended_at = now
            elif held.ended_at is not None and held.ended_at + REMOTE_RETENTION_SECONDS < now:
                self._drop(handle)
        if not self._held and not self._doomed and self._alone_since + REMOTE_HOLDER_IDLE_SECONDS < now:
            self._running = False

    def _leave(self) -> None:
        """Kills and reaps what is left, and clears the socket away if it is still this holder's."""
        if _identity(self._path) == self._identity:
            os.unlink(self._path)
        self._listener.close()
        for handle in list(self._held):
            self._drop(handle)
        deadline = time.monotonic() + REMOTE_HOLDER_END_SECONDS
        while self._doomed and time.monotonic() < deadline:
            time.sleep(0.01)
            self._reap_doomed()


class _PipeError(OSError):
    """There are no pipes for a child."""


def _pipes(kept: list[int], given: list[int]) -> bytes:
    """Opens the pipes of a child and puts the ends to keep and to give away into the lists, in their order."""
    for keeps_reader in (False, True, True):
        ends = os.pipe()
        kept.append(ends[not keeps_reader])
        given.append(ends[keeps_reader])
        os.set_blocking(kept[-1], False)
    kept += [-1] * (PIPES - 1 - len(kept))
    return b""


def _terminal(size: bytes, kept: list[int], given: list[int]) -> bytes:
    """Opens a terminal instead, and returns its path."""
    from sterna.remote.terminal import open_terminal  # what most holders never need

    columns, rows = map(int, size.split())
    path = open_terminal(columns, rows, kept)
    given.append(kept.pop())
    kept += [os.dup(kept[0]), -1]
    for _ in range(2):
        kept += os.pipe()
    try:
        os.splice(kept[0], kept[-1], 1, flags=os.SPLICE_F_NONBLOCK)  # which some kernels refuse
    except BlockingIOError:
        pass
    return path


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.lstat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def main() -> None:
    """Runs a holder whose listening socket is descriptor 0; the last argument is the socket's path."""
    listener = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for number in (signal.SIGHUP, signal.SIGINT):  # ignored ones would stay so in children, as those of `nohup` shall
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    raise_descriptor_limit()
    listener.setblocking(False)
    Holder(listener, sys.argv[-1]).run()
