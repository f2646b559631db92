"""The session's states and the transitions between them, in one table (docs/protocol.md, section 4)."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a session stands; the value is what the wire, the store and `sterna ls` say."""

    CONNECTING = "connecting"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    EXITED = "exited"
    CLOSED = "closed"


class Cause(StrEnum):
    """What moves a session from one state to the next."""

    OPENED = "the agent opened it"
    REFUSED = "the agent refused it"
    ATTACHED = "a first attachment came"
    DETACHED = "the last attachment left"
    EXIT = "the program ended"
    LOST = "the agent is gone"
    CLOSE = "a driver closed it"
    READ = "the final output was read"
    RETENTION = "the retention time passed"


TRANSITIONS: dict[tuple[State, Cause], State] = {
    (State.CONNECTING, Cause.OPENED): State.SUSPENDED,
    (State.CONNECTING, Cause.REFUSED): State.CLOSED,
    (State.CONNECTING, Cause.LOST): State.EXITED,
    (State.CONNECTING, Cause.CLOSE): State.CLOSED,
    (State.SUSPENDED, Cause.ATTACHED): State.ACTIVE,
    (State.SUSPENDED, Cause.EXIT): State.EXITED,
    (State.SUSPENDED, Cause.LOST): State.EXITED,
    (State.SUSPENDED, Cause.CLOSE): State.CLOSED,
    (State.ACTIVE, Cause.DETACHED): State.SUSPENDED,
    (State.ACTIVE, Cause.EXIT): State.EXITED,
    (State.ACTIVE, Cause.LOST): State.EXITED,
    (State.ACTIVE, Cause.CLOSE): State.CLOSED,
    (State.EXITED, Cause.READ): State.CLOSED,
    (State.EXITED, Cause.RETENTION): State.CLOSED,
    (State.EXITED, Cause.CLOSE): State.CLOSED,
}
"""Every allowed transition; what is not here does not happen."""


def step(state: State, cause: Cause) -> State:
    """Returns the state after `cause`; the same state where the table has no such transition."""
    return TRANSITIONS.get((state, cause), state)
