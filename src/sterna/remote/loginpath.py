"""The PATH of the user's login shell, which the daemon's own start may not have gone through."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from sterna.limits import REMOTE_LOGIN_PATH_MAX_BYTES, REMOTE_LOGIN_PATH_SECONDS
from sterna.remote.child import STDERR, STDOUT, Child
from sterna.remote.gotext import bytes_of
from sterna.remote.loop import READ

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sterna.remote.log import Log
    from sterna.remote.loop import Loop

_SENTINEL: Final = "___CLAUDE_SSH_PATH_EXTRACT___"
_COMMAND: Final = f"""/bin/sh -c 'printf "%s%s\\n" "{_SENTINEL}" "$PATH"'"""
_QUIET: Final = (b"DISABLE_AUTO_UPDATE=true", b"ZSH_DISABLE_COMPFIX=true")
_FALLBACKS: Final = ("/bin/zsh", "/bin/bash", "/bin/sh")


def login_shell(chosen: str) -> str:
    """Returns `chosen` if it is an executable file, else the first usual shell that is there, else an empty string."""
    for path in (chosen, *_FALLBACKS):
        try:
            if path and stat.S_ISREG(os.stat(bytes_of(path)).st_mode) and os.access(bytes_of(path), os.X_OK):
                return path
        except (OSError, ValueError):
            pass
    return ""


class LoginPath:
    """Asks the login shell for its PATH in the background; `value` is empty while and when it is not known."""

    def __init__(self, loop: Loop, log: Log) -> None:
        self._loop, self._log = loop, log
        self.value = b""
        self._known = False
        self._waiting: list[Callable[[], None]] = []
        self._child: Child | None = None
        self._output = b""
        self._watched: set[int] = set()

    def start(self, shell: str, environment: Sequence[bytes]) -> None:
        """Starts the shell. Parameters: `shell`, what SHELL says; `environment`, entries `NAME=value`."""
        path = login_shell(shell)
        argv = [path.encode(), b"-l", b"-i", b"-c", _COMMAND.encode()]
        try:
            if not path:
                raise FileNotFoundError
            self._child = child = Child.start(bytes_of(path), argv, [*environment, *_QUIET], b"")
        except OSError as error:
            self._log.warn(f"[shellenv] cannot run the login shell: {error}")
            self._settle(b"")
            return
        child.close_stdin()
        self._timer = self._loop.later(REMOTE_LOGIN_PATH_SECONDS, self._expired)
        self._loop.watch(child.pidfd, READ, self._exited)
        for stream in (STDOUT, STDERR):
            self._watched.add(stream)
            self._loop.watch(child.output(stream), READ, lambda _events, stream=stream: self._read(stream))  # type: ignore[misc] # bound now

    def when_known(self, callback: Callable[[], None]) -> None:
        """Calls back when the shell has answered or will not any more, at once if that is so already."""
        if self._known:
            callback()
        else:
            self._waiting.append(callback)

    def _read(self, stream: int) -> None:
        assert self._child is not None
        chunk = self._child.read(stream)
        if chunk is None:
            return
        if not chunk:
            self._close(stream)
            if stream == STDOUT:
                self._search(self._output + b"\n")
                self._settle(b"")
            if not self._watched and self._child.look():
                self._end()
        elif stream == STDOUT and len(self._output) <= REMOTE_LOGIN_PATH_MAX_BYTES:
            self._output += chunk
            self._search(self._output)

    def _search(self, output: bytes) -> None:
        at = output.find(_SENTINEL.encode())
        end = output.find(b"\n", at)
        if at >= 0 and end >= 0 and not self._known:
            self._settle(output[at + len(_SENTINEL) : end].rstrip(b"\r"))

    def _settle(self, value: bytes) -> None:
        if self._known:
            return
        self._known, self.value = True, value
        if value:
            self._log.info(f"[shellenv] Extracted shell PATH ({len(value)} chars)")
        else:
            self._log.warn("[shellenv] Could not extract shell PATH")
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()

    def _expired(self) -> None:
        if self._child is not None:
            if not self._known:
                self._child.kill_group()
            self._settle(b"")
            self._end()

    def _exited(self, _events: int) -> None:
        assert self._child is not None
        if self._child.look():
            self._loop.forget(self._child.pidfd)
            if self._known or not self._watched:
                self._end()

    def _end(self) -> None:
        for stream in sorted(self._watched):
            self._close(stream)
        if self._child is not None and self._child.look():
            self._timer.cancel()
            self._loop.forget(self._child.pidfd)
            self._child.reap()
            self._child = None

    def _close(self, stream: int) -> None:
        if self._child is not None and stream in self._watched:
            self._watched.discard(stream)
            self._loop.forget(self._child.output(stream))
            self._child.close_output(stream)
