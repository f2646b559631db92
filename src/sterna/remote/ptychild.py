"""A child with a terminal instead of pipes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sterna.remote.child import STDERR, Child, PipeError
from sterna.remote.spawn import spawn_followed
from sterna.remote.terminal import open_terminal

if TYPE_CHECKING:
    from collections.abc import Sequence


class PtyChild(Child):
    """A child whose session has a controlling terminal; all it prints comes as STDOUT, and there is no STDERR."""

    __slots__ = ()
    has_terminal = True

    @classmethod
    def open(
        cls, executable: bytes, argv: Sequence[bytes], env: Sequence[bytes], cwd: bytes, size: tuple[int, int]
    ) -> PtyChild:
        """Starts a child with a terminal.

        Parameters: those of `spawn`; `size`, columns and rows. Raises `PipeError` when there is no terminal for it, and
        `OSError`. Source: pty(7).
        """
        opened: list[int] = []
        try:
            try:
                terminal = open_terminal(*size, opened)
                master, slave = opened
                opened.append(os.dup(master))  # one descriptor cannot be watched for reading and for writing apart
            except OSError as error:
                raise PipeError(error.errno, error.strerror) from error
            pid, pidfd = spawn_followed(executable, argv, env, cwd, (slave, slave, slave), terminal)
        except OSError:
            for descriptor in opened:
                os.close(descriptor)
            raise
        os.close(slave)
        return cls(pid, pidfd, opened[2], master, -1)

    def read(self, stream: int) -> bytes | None:
        """Returns what one read of the terminal gives, empty once nobody holds it open any more."""
        return b"" if stream == STDERR else super().read(stream)
