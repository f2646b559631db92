"""One child process and the descriptors that belong to it: everything a process needs of the operating system."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from typing import TYPE_CHECKING, ClassVar, Final

from sterna.limits import REMOTE_FRAME_BYTES, REMOTE_PIPE_BYTES
from sterna.remote.spawn import spawn_followed

if TYPE_CHECKING:
    from collections.abc import Sequence

STDOUT: Final = 0
STDERR: Final = 1


class PipeError(OSError):
    """There is no pipe for a child."""


class Child:
    """A started child; it stays a zombie, and so keeps its process group's number, until `reap`."""

    __slots__ = ("_outputs", "exit_code", "pid", "pidfd", "started_at", "stdin")
    has_terminal: ClassVar[bool] = False  # of which `stdin` is a descriptor then

    def __init__(self, pid: int, pidfd: int, stdin: int, stdout: int, stderr: int) -> None:
        self.pid, self.pidfd = pid, pidfd
        self.stdin = stdin
        self._outputs = [stdout, stderr]
        self.exit_code: int | None = None
        self.started_at = time.time()

    @classmethod
    def start(cls, executable: bytes, argv: Sequence[bytes], env: Sequence[bytes], cwd: bytes) -> Child:
        """Starts a child with three pipes. Raises `PipeError` when there are no descriptors for them, and `OSError`."""
        opened: list[int] = []
        try:
            try:
                for _ in range(3):
                    opened += os.pipe()
            except OSError as error:
                raise PipeError(error.errno, error.strerror) from error
            stdin, feed, stdout, out, stderr, err = opened
            pid, pidfd = spawn_followed(executable, argv, env, cwd, (stdin, out, err))
        except OSError:
            for descriptor in opened:
                os.close(descriptor)
            raise
        for descriptor in (stdin, out, err):
            os.close(descriptor)
        for descriptor in (feed, stdout, stderr):
            os.set_blocking(descriptor, False)
        return cls(pid, pidfd, feed, stdout, stderr)

    def output(self, stream: int) -> int:
        """Returns the descriptor of an output, -1 when it is closed."""
        return self._outputs[stream]

    def read(self, stream: int) -> bytes | None:
        """Returns what one read of an output gives: at most one frame, empty at its end, None for nothing yet."""
        try:
            return os.read(self._outputs[stream], REMOTE_FRAME_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def write(self, data: bytes | memoryview) -> int:
        """Returns how much the child's input took: 0 when it is full. Raises `OSError` when the child closed it."""
        try:
            return os.write(self.stdin, data)
        except BlockingIOError:
            return 0

    def keep(self, data: bytes | memoryview) -> None:
        """Called with input before it is acknowledged; this child keeps it nowhere but in its queue."""

    def seal_stdin(self) -> None:
        """Called when the input is to be closed after what is queued."""

    def widen(self, stream: int) -> None:
        """Makes an output's pipe larger; called for floods only, as a user's pipes share a bound."""
        try:
            fcntl.fcntl(self._outputs[stream], fcntl.F_SETPIPE_SZ, REMOTE_PIPE_BYTES)
        except OSError:
            pass

    def close_output(self, stream: int) -> None:
        """Closes an output; closing it again does nothing."""
        if self._outputs[stream] >= 0:
            os.close(self._outputs[stream])
            self._outputs[stream] = -1

    def close_stdin(self) -> None:
        """Closes the child's input; closing it again does nothing."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def look(self) -> bool:
        """Returns whether the child has exited; then `exit_code` is known, -1 for a death by signal."""
        if self.exit_code is None:
            status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if status is None:
                return False
            self.exit_code = status.si_status if status.si_code == os.CLD_EXITED else -1
        return True

    def finish(self) -> None:
        """Called before the exit frame is sent to anybody."""

    def forget(self) -> None:
        """Called when nobody can address the child any more."""

    def reap(self) -> None:
        """Takes the exited child out of the process table, the last thing that happens to it."""
        os.close(self.pidfd)
        os.waitpid(self.pid, 0)

    def kill(self, number: int) -> None:
        """Sends a signal to the child alone."""
        try:
            os.kill(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # gone, or it has become another user's

    def kill_group(self) -> None:
        """Sends SIGKILL to everything in the child's process group. Only valid before `reap`."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # as above
