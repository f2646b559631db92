"""The tree of errors: what a user reads is one sentence, what a peer reads is a code."""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """Codes of ERROR and CLOSE frames (docs/protocol.md, section 6); equality is on the code, never on the prose."""

    OK = 0
    PROTOCOL = 1
    BAD_MAGIC = 2
    BAD_CRC = 3
    UNKNOWN_TYPE = 4
    TOO_LARGE = 5
    TRUNCATED = 6
    BAD_PAYLOAD = 7
    BAD_HANDLE = 8
    GAP = 9
    TIMEOUT = 10
    VERSION = 11
    DENIED = 20
    EXPIRED = 21
    STALE = 22
    SUPERSEDED = 23
    DISPLACED = 24
    REVOKED = 25
    READ_ONLY = 26
    RATE_LIMITED = 27
    NOT_FOUND = 30
    EXISTS = 31
    NO_AGENT = 32
    AGENT_LOST = 33
    ENDED = 34
    RESYNC = 35
    LIMIT = 40
    BUSY = 41
    DRAINING = 42
    STORAGE = 43
    MOVED = 50
    UNSUPPORTED = 51
    BAD_REQUEST = 52
    INTERNAL = 60


DRAINING_TEXT = "This node stops; resume when it is back."
"""What a node that is being stopped says with `DRAINING`; clients show it in words of their own."""


class SternaError(Exception):
    """The root of all errors that Sterna raises on purpose.

    Its text is one sentence that says what happened and what to do; `code` is what a peer is told.
    """

    code: Code = Code.INTERNAL


class UsageError(SternaError):
    """The caller asked for something that makes no sense (local misuse, exit code 2)."""

    code = Code.BAD_REQUEST


class ConfigError(UsageError):
    """A configuration file, variable or flag has a value that cannot be used; names file, key and what was expected."""


class ProtocolError(SternaError):
    """The peer broke the protocol; carries the code of the ERROR frame that answers it."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class RefusedError(SternaError):
    """The other side answered with an ERROR frame.

    `retry_after` is in seconds, `address` is where a moved session lives, `value` is the code's own number
    (for `STALE` the last counter seen).
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        retry_after: float | None = None,
        address: str | None = None,
        value: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after
        self.address = address
        self.value = value


class TrustError(SternaError):
    """A key, certificate, token or pin is missing, wrong, expired or readable by others."""

    code = Code.DENIED


class StorageError(SternaError):
    """The disk or a file on it failed us: full, unwritable, foreign, or damaged."""

    code = Code.STORAGE


class PositionError(StorageError, ValueError):
    """A position outside a log was asked for.

    `start` and `end` name the bytes that cannot be had; both are the log's end where the position lies beyond it.
    """

    def __init__(self, message: str, start: int, end: int) -> None:
        super().__init__(message)
        self.start = start
        self.end = end


class LostBytesError(PositionError):
    """The bytes from `start` to before `end` are gone, overwritten or damaged; reading goes on at `end`."""


class AgentError(SternaError):
    """An agent could not be started or reached."""

    code = Code.NO_AGENT


class ConnectionLostError(SternaError):
    """No connection could be made, or it was given up."""

    code = Code.TIMEOUT
