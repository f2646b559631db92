"""Drives a `Program` in tests: reads until something is seen, writes everything, waits for the end by its pidfd."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sterna.pod.program import ExitStatus, Kind, Program, program_environment

PATIENCE_SECONDS = 20.0


class Driver:
    """One program with everything it has printed so far."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.output = bytearray()
        self.ended = ""

    def read_some(self, seconds: float) -> bool:
        """Waits at most `seconds` for output and keeps it; False at its end or if nothing came."""
        if self.ended or not select.select([self.program.read_fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.program.read_fd, 65536)
        except OSError as error:
            self.ended = f"errno {error.errno}"
            return False
        if not data:
            self.ended = "eof"
            return False
        self.output += data
        return True

    def read_until(self, wanted: bytes) -> bytes:
        """Reads until `wanted` has been printed and returns everything so far."""
        end = time.monotonic() + PATIENCE_SECONDS
        while wanted not in self.output:
            if not self.read_some(0.2) and (self.ended or time.monotonic() > end):
                state = self.ended or "still open"
                raise AssertionError(f"{wanted!r} never came, {state}: {bytes(self.output[-2000:])!r}")
        return bytes(self.output)

    def read_to_end(self) -> bytes:
        """Reads until the output has ended and returns all of it."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.ended:
            self.read_some(0.2)
            if time.monotonic() > end:
                raise AssertionError(f"the output never ended: {bytes(self.output[-2000:])!r}")
        return bytes(self.output)

    def write(self, data: bytes) -> None:
        """Writes all of `data`, reading meanwhile so that neither side can block the other."""
        view = memoryview(data)
        while view:
            readable, writable, _ = select.select([self.program.read_fd], [self.program.write_fd], [], PATIENCE_SECONDS)
            if readable:
                self.read_some(0)
            if writable:
                view = view[os.write(self.program.write_fd, view) :]
            elif not readable:
                raise AssertionError("the program took no input")

    def wait(self) -> ExitStatus:
        """Waits for the program's end through its pidfd and returns how it ended."""
        assert select.select([self.program.pidfd], [], [], PATIENCE_SECONDS)[0], "the program did not end"
        status = self.program.poll_exit()
        assert status is not None
        return status


@contextmanager
def started(
    *argv: str, kind: Kind = "pty", cwd: str = "/", env: dict[str, str] | None = None, cols: int = 80, rows: int = 24
) -> Iterator[Driver]:
    """Starts a program and makes sure that it is gone, reaped and closed at the end."""
    extra = {"LC_ALL": "C.UTF-8", "PS1": "$ "}
    environment = env or program_environment(os.environ, term="xterm-256color", extra=extra)
    program = Program.start(argv, kind=kind, cwd=cwd, env=environment, cols=cols, rows=rows)
    driver = Driver(program)
    try:
        yield driver
    finally:
        while program.poll_exit() is None:
            program.terminate()
            select.select([program.pidfd], [], [], 0.5)
        program.close()
