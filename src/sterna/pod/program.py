"""One program of a session: under a pseudo-terminal (`pty`) or on two pipes (`stream`).

Reading, writing and waiting belong to the caller, who has the event loop: the descriptors here are non-blocking and
the pidfd is readable once the program has ended.

How a session ends: with its program. What the program wrote stays readable after its end, then comes EIO (PTY) or end
of file (stream); when a PTY's session leader ends, the kernel sends SIGHUP to the foreground group. A grandchild that
ignores it (nohup, setsid), or that holds a stream's pipe, keeps the output open and may still write, perhaps for ever.
So: after `poll_exit` has an answer, go on reading until EIO or end of file, or until `DRAIN_QUIET_SECONDS` have passed
without a byte, or `DRAIN_MAX_SECONDS` in all; then call `close`.
"""

from __future__ import annotations

import fcntl
import os
import signal as signals
import struct
import termios
from typing import TYPE_CHECKING, Literal

from sterna import limits
from sterna.errors import AgentError, UsageError
from sterna.pod import spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Kind = Literal["pty", "stream"]

DRAIN_QUIET_SECONDS = 1.0
DRAIN_MAX_SECONDS = 10.0

SIGNALS = ("HUP", "INT", "QUIT", "KILL", "USR1", "USR2", "TERM", "CONT", "STOP", "TSTP", "WINCH")
"""What SIGNAL frames may name, without `SIG` (signal(7))."""

_ESCALATION = (signals.SIGHUP, signals.SIGTERM, signals.SIGKILL)
# Names that say where the program runs; every other STERNA_ variable may carry a token, a ticket or a key.
_HARMLESS = frozenset({"STERNA_SESSION", "STERNA_SESSION_UID", "STERNA_AGENT", "STERNA_TENANT", "STERNA_NODE"})
_IUTF8 = 0o40000  # termios(3); the module has the name only from Python 3.13
_IFLAG, _LFLAG, _CC = 0, 3, 6


class ExitStatus:
    """How a program ended: `code` is what it returned, or `signal` the number of what killed it.

    Both are None if somebody else took the status away.
    """

    __slots__ = ("code", "signal")

    def __init__(self, code: int | None = None, signal: int | None = None) -> None:
        self.code = code
        self.signal = signal

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExitStatus) and (self.code, self.signal) == (other.code, other.signal)

    def __hash__(self) -> int:
        return hash((self.code, self.signal))

    def __repr__(self) -> str:
        return f"ExitStatus(code={self.code}, signal={self.signal})"


def program_environment(
    base: Mapping[str, str], *, term: str, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Returns the environment of a session's program: `base` with TERM, without the daemon's secrets and terminal.

    `base` is usually os.environ, `extra` is set last. Variables named STERNA_… are left out unless they only say
    where the program runs; so are LINES, COLUMNS and the marks of other multiplexers, which would be wrong here.
    """
    env = {k: v for k, v in base.items() if k not in ("LINES", "COLUMNS", "TMUX", "TMUX_PANE", "STY", "WINDOW")}
    env["TERM"] = term
    env.update(extra or {})
    return without_secrets(env)


def without_secrets(env: Mapping[str, str]) -> dict[str, str]:
    """Returns `env` without variables named STERNA_… that could carry a token, a ticket or a key."""
    return {k: v for k, v in env.items() if not k.startswith("STERNA_") or k in _HARMLESS}


class Program:
    """A running program, its process id, its pidfd and the descriptors that carry its bytes.

    `read_fd` is its output, `write_fd` its input (the same number for a PTY; -1 once closed). Make one with `start`.
    """

    __slots__ = ("_escalated", "_status", "kind", "pid", "pidfd", "read_fd", "write_fd")

    def __init__(self, kind: Kind, pid: int, pidfd: int, read_fd: int, write_fd: int) -> None:
        self.kind: Kind = kind
        self.pid = pid
        self.pidfd = pidfd
        self.read_fd = read_fd
        self.write_fd = write_fd
        self._status: ExitStatus | None = None
        self._escalated = 0

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        kind: Kind = "pty",
        cwd: str,
        env: Mapping[str, str],
        cols: int = 80,
        rows: int = 24,
        stderr: Literal["merge", "inherit", "discard"] = "merge",
    ) -> Program:
        """Starts a command in an own session and process group.

        `cwd` is an absolute path, `env` the whole environment (TERM included; see `program_environment`), `cols` and
        `rows` are in cells and set before the program runs. `stderr` counts for `stream` only: into the output, to
        the daemon's own standard error, or nowhere. Raises UsageError for an impossible command, AgentError with
        the reason if it cannot be started; then no process and no descriptor is left.
        """
        _check(argv, cwd)
        path = spawn.find_command(argv, cwd, env)
        env = without_secrets(env)
        try:
            if kind == "pty":
                return cls._start_pty(path, argv, cwd, env, cols, rows)
            return cls._start_stream(path, argv, cwd, env, stderr)
        except OSError as error:
            hint = "is its interpreter there?" if isinstance(error, FileNotFoundError) else "check it and the limits."
            raise AgentError(f"{argv[0]!r} could not be started ({error.strerror}): {hint}") from error

    @classmethod
    def _start_pty(
        cls, path: str, argv: Sequence[str], cwd: str, env: Mapping[str, str], cols: int, rows: int
    ) -> Program:
        master, slave = os.openpty()
        try:
            attributes = termios.tcgetattr(slave)
            attributes[_IFLAG] |= _IUTF8  # so that erasing in canonical mode takes whole characters
            termios.tcsetattr(slave, termios.TCSANOW, attributes)
            _set_size(master, cols, rows)
            os.set_blocking(master, False)
            pid = spawn.spawn(path, argv, cwd=cwd, env=env, terminal=os.ttyname(slave))
            return cls("pty", pid, _open_pidfd(pid), master, master)
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)

    @classmethod
    def _start_stream(cls, path: str, argv: Sequence[str], cwd: str, env: Mapping[str, str], stderr: str) -> Program:
        opened: list[int] = []
        try:
            stdin, write_fd = os.pipe()
            opened += stdin, write_fd
            read_fd, stdout = os.pipe()
            opened += read_fd, stdout
            error_fd = stdout
            if stderr == "inherit":
                error_fd = os.dup(2)
                opened.append(error_fd)
            elif stderr == "discard":
                error_fd = os.open(os.devnull, os.O_WRONLY)
                opened.append(error_fd)
            os.set_blocking(write_fd, False)
            os.set_blocking(read_fd, False)
            pid = spawn.spawn(path, argv, cwd=cwd, env=env, descriptors=_above_two((stdin, stdout, error_fd), opened))
            program = cls("stream", pid, _open_pidfd(pid), read_fd, write_fd)
            opened = [fd for fd in opened if fd not in (read_fd, write_fd)]
            return program
        finally:
            for fd in opened:
                os.close(fd)

    def resize(self, cols: int, rows: int) -> None:
        """Sets the PTY's size in cells; the kernel sends SIGWINCH to its foreground group. Nothing for a stream."""
        if self.kind == "pty" and self.read_fd >= 0:
            _set_size(self.read_fd, cols, rows)

    def signal(self, name: str) -> bool:
        """Sends a signal to the PTY's foreground process group, or to the program's own group.

        `name` is one of SIGNALS, with or without `SIG`. Returns False if there is nobody to send it to; raises
        UsageError for another name.
        """
        short = name.upper().removeprefix("SIG")
        if short not in SIGNALS:
            raise UsageError(f"{name[:20]!r} is no signal that a session passes on: use one of {', '.join(SIGNALS)}.")
        return self._send(signals.Signals[f"SIG{short}"], foreground=True)

    def terminate(self) -> str | None:
        """Asks the program to end, more firmly with each call: HUP, then TERM, then KILL (as often as it is called).

        Returns the name of what was sent, None if nobody is left. The caller decides on the time between calls.
        """
        number = _ESCALATION[min(self._escalated, len(_ESCALATION) - 1)]
        self._escalated += 1
        sent = self._send(number, foreground=True)
        sent = self._send(number, foreground=False) or sent
        if number != signals.SIGKILL:
            # A stopped program cannot act on a signal before it is continued.
            self._send(signals.SIGCONT, foreground=True)
            self._send(signals.SIGCONT, foreground=False)
        return number.name if sent else None

    def eof(self, *, at_line_start: bool = True) -> bytes:
        """Ends the program's input; returns what the caller has to write for it, after all input before it.

        A stream's write side is closed (nothing to write). To a PTY goes its VEOF character, as if typed: in
        canonical mode it makes read(2) return 0 if the line is empty; after an unfinished line it is sent twice, as
        the first only hands the line over (`at_line_start` says whether the last input byte ended a line). In raw
        mode the program sees the character, which editors of command lines take for end of file (termios(3)).
        """
        if self.kind == "stream":
            self.close_input()
            return b""
        if self.write_fd < 0:
            return b""
        try:
            attributes = termios.tcgetattr(self.write_fd)
        except termios.error:
            return b""
        veof: bytes = attributes[_CC][termios.VEOF]
        if veof == b"\0":
            return b""
        canonical = bool(attributes[_LFLAG] & termios.ICANON)
        return veof if at_line_start or not canonical else veof * 2

    def close_input(self) -> None:
        """Closes a stream's write side; nothing for a PTY, whose one descriptor goes both ways."""
        if self.kind == "stream" and self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def poll_exit(self) -> ExitStatus | None:
        """Returns how the program ended, None while it runs; reaps it, so no zombie stays. Never blocks."""
        if self._status is None and self.pidfd >= 0:
            try:
                result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                # Somebody set SIGCHLD to be ignored: the kernel has thrown the status away.
                self._status = ExitStatus()
            else:
                if result is not None:
                    exited = result.si_code == os.CLD_EXITED
                    self._status = ExitStatus(result.si_status, None) if exited else ExitStatus(None, result.si_status)
        return self._status

    def close(self) -> None:
        """Closes all descriptors; the kernel hangs a PTY up. Call `poll_exit` until it has an answer before."""
        for fd in {self.read_fd, self.write_fd, self.pidfd} - {-1}:
            os.close(fd)
        self.read_fd = self.write_fd = self.pidfd = -1

    def _send(self, number: signals.Signals, *, foreground: bool) -> bool:
        group = self.pid
        if foreground and self.kind == "pty" and self.read_fd >= 0:
            try:
                group = os.tcgetpgrp(self.read_fd)
            except OSError:
                group = self.pid
            if group <= 1:
                group = self.pid
        # Once the leader is reaped its number may belong to another process; a PTY's foreground group stays ours.
        if group == self.pid and self.poll_exit() is not None:
            return False
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def _check(argv: Sequence[str], cwd: str) -> None:
    if not argv or not argv[0]:
        raise UsageError("The command is empty: name a program to start.")
    if len(argv) > limits.ARGV_MAX or sum(len(os.fsencode(a)) + 1 for a in argv) > limits.ARGV_MAX_BYTES:
        bounds = f"{limits.ARGV_MAX_BYTES} bytes or {limits.ARGV_MAX} words"
        raise UsageError(f"The command is longer than {bounds}: shorten it.")
    if any("\0" in text for text in (*argv, cwd)):
        raise UsageError("The command or its directory has a NUL character, which no program can receive.")
    if not os.path.isabs(cwd):
        raise UsageError(f"The directory {cwd!r} is not absolute: name it from the root.")


def _set_size(fd: int, cols: int, rows: int) -> None:
    cols = min(max(cols, 1), limits.SIZE_MAX_CELLS)
    rows = min(max(rows, 1), limits.SIZE_MAX_CELLS)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def _open_pidfd(pid: int) -> int:
    """Opens the pidfd of a fresh child; if that fails the child is ended and reaped."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signals.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _above_two(fds: tuple[int, int, int], opened: list[int]) -> tuple[int, int, int]:
    """Moves descriptors 0 to 2 out of the way, so that setting one of the new three cannot overwrite another."""
    moved: list[int] = []
    for fd in fds:
        moved.append(fd if fd > 2 else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
        if fd <= 2:
            opened.append(moved[-1])
    return moved[0], moved[1], moved[2]
