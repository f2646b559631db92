"""Who holds the agent: exact readers with and without a connection, so that a cut or a slow pipe costs them no byte."""

from __future__ import annotations

from sterna import limits
from sterna.protocol import messages
from sterna.protocol.attachment import Attachment
from sterna.protocol.frame import Type
from sterna.protocol.session import Session
from tests.unit.test_protocol_session import NODE, NOW, SECOND, Port, attach, attachment, opened, resume, sent, session

PIECE = 32 * 1024
WINDOW = limits.WINDOW_BYTES
HELD = limits.RING_BYTES // 2


def produce(target: Session, port: Port, *, at: int = NOW) -> int:
    """Lets the agent write until its window is used up; returns how far the output then reaches."""
    acked = target.intake.acked
    for turn in range(400):
        now = at + turn * SECOND // 1000
        target.handle_timeout(now + SECOND)
        for kind, handle, _, payload in sent(port.link):
            if kind == Type.ACK and handle == port.handle:
                acked = max(acked, int.from_bytes(payload, "big"))
        if target.log.end + PIECE > acked + WINDOW:
            break
        target.pod_data(target.log.end & 0xFFFF_FFFF, bytes(PIECE), now)
    return target.log.end


def start(*attachments: Attachment) -> tuple[Session, Port]:
    target = session()
    port = opened(target)
    for who in attachments:
        attach(target, who)
    return target, port


def test_an_exact_driver_that_lost_its_connection_holds_the_agent_before_the_ring_is_full() -> None:
    who = attachment()
    target, port = start(who)
    target.detach(who, NOW)
    end = produce(target, port)
    assert who.acked + HELD <= end <= who.acked + HELD + WINDOW
    assert target.log.tail == 0
    assert produce(target, port, at=NOW + 3600 * SECOND) == end


def test_a_terminal_that_left_does_not_hold_the_agent() -> None:
    who = attachment(exact=False)
    target, port = start(who)
    target.detach(who, NOW)
    assert produce(target, port) > 4 * limits.RING_BYTES


def test_an_exact_driver_that_said_goodbye_holds_the_agent_until_somebody_else_drives() -> None:
    who, terminal = attachment(), attachment(b"b", exact=False)
    target, port = start(who)
    target.detach(who, NOW, polite=True)
    end = produce(target, port)
    assert end <= HELD + WINDOW
    attach(target, terminal)
    terminal.acked = terminal.cursor
    target.detach(terminal, NOW)
    assert produce(target, port) > end + 4 * limits.RING_BYTES


def test_an_exact_driver_without_a_connection_counts_ten_seconds_beside_others() -> None:
    who, terminal = attachment(), attachment(b"b", exact=False)
    target, port = start(who, terminal)
    terminal.window = 1 << 40
    target.detach(who, NOW)
    end = produce(target, port)
    assert end <= HELD + WINDOW
    assert target.next_timeout() == NOW + limits.STILL_SECONDS * SECOND
    assert produce(target, port, at=NOW + limits.STILL_SECONDS * SECOND) > end + limits.RING_BYTES


def test_a_watcher_alone_does_not_free_the_agent_of_an_exact_driver() -> None:
    who, watcher = attachment(), attachment(b"w", mode="watch")
    target, port = start(who, watcher)
    target.detach(who, NOW)
    assert produce(target, port) <= HELD + WINDOW


def test_the_slowest_exact_driver_paces() -> None:
    fast, slow = attachment(), attachment(b"s")
    target, port = start(fast, slow)
    fast.window = 1 << 40
    end = produce(target, port)
    assert fast.cursor == end
    assert end <= slow.acked + 2 * WINDOW
    assert target.pacer() is slow


def test_what_was_received_but_not_written_still_counts_against_the_window_after_a_resume() -> None:
    who = attachment()
    target, port = start(who)
    produce(target, port)
    assert who.cursor == WINDOW
    target.detach(who, NOW)
    again = attachment()
    body = messages.ResumeBody(
        messages.CONTEXT_RESUME, NODE, target.uid, b"d", again.id, b"r", 1, 1, 1, WINDOW, handled=1000
    )
    target.resume(again, body, NOW)
    assert (again.acked, again.cursor) == (1000, WINDOW + 1000)
    control = attachment()
    assert resume(target, control, WINDOW).output == WINDOW
    assert control.acked == WINDOW
    assert control.cursor > WINDOW + 1000
