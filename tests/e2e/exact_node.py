"""Runs a node that keeps notes, dies at a chosen point, or is broken on purpose; for the tests of exactness only.

Usage: exact_node.py STATE SOCKETS PORT. EXACT_NODE_NOTES names a file that gets a line for each attachment that ends:
how many bytes of output were sent to it and not acknowledged. EXACT_DIE is `POINT:N`: the process kills itself when it
reaches that point for the N-th time. EXACT_BREAK is one of BREAKS.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sterna.journal.log import Log
from sterna.node.config import NodeConfig
from sterna.node.table import SessionTable
from sterna.protocol.attachment import Attachment
from sterna.protocol.frame import Type
from sterna.protocol.session import Session
from sterna.protocol.states import Cause, State
from sterna.transport.pump import Pump

_ACK = int(Type.ACK)


class Countdown:
    """Kills this process when it is called for the n-th time."""

    def __init__(self, n: int) -> None:
        self._left = n

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: type, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def wrapped(self: Any, *args: Any, **more: Any) -> Any:
        before(self, *args)
        result = original(self, *args, **more)
        after(self, *args)
        return result

    setattr(owner, name, wrapped)


def _nothing(*_args: object) -> None:
    """Stands for a hook that is not needed."""


def die_at(point: str, count: int) -> None:
    """Arms one point: `append` before output is journalled, `journalled` right after; `write` before bytes leave for
    clients or pods (after the journal, before the acknowledgement), `written` right after; `input` after input was
    passed on.
    """
    tick = Countdown(count)
    if point == "append":
        _wrap(Log, "append", lambda *_: tick(), _nothing)
    elif point == "journalled":
        _wrap(Log, "append", _nothing, lambda *_: tick())
    elif point == "write":
        _wrap(Pump, "_send", lambda *_: tick(), _nothing)
    elif point == "written":
        _wrap(Pump, "_send", _nothing, lambda *_: tick())
    else:
        assert point == "input"
        _wrap(Session, "client_input", _nothing, lambda *_: tick())


def note_ends(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(_self: Session, attachment: Attachment, *_: object) -> None:
        os.write(fd, f"{attachment.cursor - attachment.acked}\n".encode())

    _wrap(Session, "_forget", note, _nothing)


def acknowledge_first() -> None:
    """Breaks the order of journal and acknowledgement: the pod may forget output before it is journalled."""

    def before(self: Session, _seq: int, payload: bytes, *_: object) -> None:
        port = self.port
        assert port is not None
        end = self.intake.next + len(payload)
        port.link.send(_ACK, port.handle, end, end.to_bytes(8, "big"))
        pump: Pump = port.connection.pump  # type: ignore[attr-defined]  # the node's port has one
        pump.flush()

    _wrap(Session, "pod_data", before, _nothing)


def overwrite_unread() -> None:
    """Breaks the hold: the agent runs on while its exact reader has lost the connection."""
    pace = Session.pace

    def careless(self: Session, now: int) -> None:
        self.holding = False
        self._away.clear()
        pace(self, now)

    Session.pace = careless  # type: ignore[method-assign]  # that is the point


def nobody_paces() -> None:
    """Breaks the pace: the agent runs as fast as the journal takes it, whoever is attached."""
    Session.pacer = lambda self: None  # type: ignore[method-assign]  # that is the point


def no_snapshot() -> None:
    """Breaks what stands for lost output: a gap is named, but nothing repaints the screen."""
    Session._can_capture = lambda self: False  # type: ignore[method-assign]  # that is the point


def pretend_handled() -> None:
    """Breaks the report: input that was on its way to a lost agent counts as handled."""

    def before(self: Session, *_: object) -> None:
        for lane in self.lanes.values():
            self.pod_ack(lane, lane.next.to_bytes(8, "big"))

    _wrap(Session, "agent_lost", before, _nothing)


def forget_ends() -> None:
    """Breaks the memory of ends: a session that nobody is attached to when its program ends is closed at once."""

    def after(self: SessionTable, session: Session, *_: object) -> None:
        if session.ended is not None and not session.attachments and session.state is not State.CLOSED:
            session.close(Cause.RETENTION, 0)
            self.settle(session)

    _wrap(SessionTable, "settle", _nothing, after)


BREAKS = {
    "acknowledge-first": acknowledge_first,
    "forget-ends": forget_ends,
    "no-snapshot": no_snapshot,
    "nobody-paces": nobody_paces,
    "overwrite": overwrite_unread,
    "pretend-handled": pretend_handled,
}


def main() -> None:
    from sterna.cli.loop import run
    from sterna.cli.serve import serve_node

    state, sockets, port = sys.argv[1:4]
    environ = os.environ
    if notes := environ.get("EXACT_NODE_NOTES"):
        note_ends(notes)
    if broken := environ.get("EXACT_BREAK"):
        BREAKS[broken]()
    if point := environ.get("EXACT_DIE"):
        name, _, count = point.partition(":")
        die_at(name, int(count))
    config = NodeConfig(port=int(port), quic_port=0, state=os.path.join(state, "node"), sockets=sockets)
    os.makedirs(config.state, 0o700, exist_ok=True)
    run(serve_node(config, lambda about: print(f"listening on {about.port}", flush=True)))


if __name__ == "__main__":
    main()
