"""The reliable stream against plain bytes: two ends, any losses of connection, duplicates, marks, positions."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sterna.errors import ProtocolError
from sterna.protocol.frame import LOW, Type
from sterna.protocol.stream import Intake, Item, SendStream

STARTS = (0, 1, (1 << 31) - 20, (1 << 32) - 20, (1 << 33) - 20, 3 * (1 << 32) + (1 << 31) - 5)
DATA, SIGNAL, EOF = int(Type.DATA), int(Type.SIGNAL), int(Type.EOF)
WINDOW, CHUNK = 40, 9
MS = 1_000_000


class StreamMachine(RuleBasedStateMachine):
    """The model is the list of single positions: a byte, or a mark with its payload."""

    sender: type[SendStream] = SendStream
    receiver: type[Intake] = Intake

    @initialize(start=st.sampled_from(STARTS), strict=st.booleans())
    def begin(self, start: int, strict: bool) -> None:
        self.start = start
        # After a loss a strict receiver asks for what it has not handled, the other one for what it has not received.
        self.strict = strict
        self.out = self.sender(start, WINDOW, CHUNK)
        self.intake = self.receiver(start)
        self.wire: deque[Item] = deque()
        self.back: deque[int] = deque()
        self.wrote: list[tuple[int, bytes]] = []
        self.got: list[tuple[int, bytes]] = []
        self.now = 0
        self.handled = start

    @rule(data=st.binary(max_size=60))
    def write(self, data: bytes) -> None:
        room = self.out.room
        taken = self.out.write(data)
        assert taken == min(len(data), room)
        self.wrote += [(DATA, bytes([byte])) for byte in data[:taken]]

    @rule(kind=st.sampled_from((SIGNAL, EOF)), payload=st.binary(max_size=3))
    def mark(self, kind: int, payload: bytes) -> None:
        room = self.out.room
        assert self.out.mark(kind, payload) == (room > 0)
        if room > 0:
            self.wrote.append((kind, payload))

    @rule(ahead=st.none() | st.integers(0, 30))
    def send(self, ahead: int | None) -> None:
        up_to = None if ahead is None else self.out.sent + ahead
        before = self.out.sent
        items = self.out.take(up_to)
        for kind, position, payload in items:
            assert position == before
            assert up_to is None or position < up_to
            assert kind != DATA or 0 < len(payload) <= CHUNK
            before = position + (len(payload) if kind == DATA else 1)
        assert before == self.out.sent
        self.wire.extend(items)

    @rule(count=st.integers(1, 4))
    def arrive(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            self._receive(*self.wire.popleft())

    @rule(cut=st.integers(1, 8))
    def arrive_in_other_frames(self, cut: int) -> None:
        """Any hop may frame the bytes anew."""
        if self.wire and self.wire[0][0] == DATA:
            kind, position, payload = self.wire.popleft()
            for at in range(0, len(payload), cut):
                self._receive(kind, position + at, payload[at : at + cut])

    @rule(which=st.integers(0, 20))
    def arrive_twice(self, which: int) -> None:
        """What is on the wire before the first new frame may come again."""
        if self.wire:
            kind, position, payload = self.wire[0]
            self._receive(kind, position, payload)

    def _receive(self, kind: int, position: int, payload: bytes) -> None:
        new = self.intake.receive(kind, position & LOW, payload)
        if new is None:
            return
        if kind == DATA:
            self.got += [(DATA, bytes([byte])) for byte in new]
        else:
            self.got.append((kind, new))

    @rule(count=st.integers(1, 50))
    def handle(self, count: int) -> None:
        self.handled = min(self.handled + count, self.intake.next)
        self.intake.handle(self.handled, self.now)

    @rule(milliseconds=st.sampled_from((0, 50, 120, 300)), joining=st.booleans())
    def acknowledge(self, milliseconds: int, joining: bool) -> None:
        self.now += milliseconds * MS
        due = self.intake.timeout()
        position = self.intake.acknowledgement(self.now, joining)
        if due is not None and due <= self.now:
            assert position is not None
        if position is not None:
            assert position == self.handled
            assert self.intake.timeout() is None
            self.back.append(position)

    @rule()
    def acknowledgement_arrives(self) -> None:
        if self.back:
            self.out.acknowledge(self.back.popleft())

    @rule(late=st.booleans())
    def connection_breaks(self, late: bool) -> None:
        """Everything in flight is gone, but an acknowledgement may come late; the receiver says what it wants next."""
        self.wire.clear()
        if not late:
            self.back.clear()
        self.out.rewind(self.handled if self.strict else self.intake.next)
        self.intake.told(self.handled)

    @invariant()
    def what_arrived_is_what_was_written(self) -> None:
        if not hasattr(self, "out"):
            return
        assert self.got == self.wrote[: len(self.got)]
        assert self.intake.next == self.start + len(self.got)
        assert self.out.end == self.start + len(self.wrote)
        assert self.out.base <= (self.handled if self.strict else self.intake.next)
        assert self.out.base <= self.out.sent <= self.out.end <= self.out.base + WINDOW
        kept = sum(len(payload) if kind == DATA else 1 for kind, _, payload in self.out.unacknowledged())
        assert kept == self.out.end - self.out.base

    def teardown(self) -> None:
        if not hasattr(self, "out"):
            return
        self.connection_breaks(False)
        self.send(None)
        self.arrive(1 << 20)
        assert self.got == self.wrote
        self.handle(1 << 20)
        self.acknowledge(300, False)
        self.acknowledgement_arrives()
        assert self.out.base == self.out.end or self.intake.acked == self.handled
        assert self.intake.timeout() is None


TestStreamMachine = StreamMachine.TestCase
TestStreamMachine.settings = settings(max_examples=150, stateful_step_count=60)


class KeepsDuplicates(Intake):
    """Takes what it had before once more."""

    def receive(self, kind: int, seq: int, payload: bytes) -> bytes | None:
        self.next += len(payload) if kind == DATA else 1
        return payload


class NearestAbove(Intake):
    """Reads every low half as one that lies ahead."""

    def receive(self, kind: int, seq: int, payload: bytes) -> bytes | None:
        if seq < self.next & LOW:
            raise ProtocolError(1, "wrapped")  # type: ignore[arg-type]  # any error will do
        return super().receive(kind, seq, payload)


class NoRewind(SendStream):
    """Counts as received what was only sent."""

    def rewind(self, position: int) -> None:
        self.acknowledge(position)


class ForgetsEarly(SendStream):
    """Forgets the whole frame of which a part was acknowledged."""

    def acknowledge(self, position: int) -> int:
        for kind, start, payload in self.unacknowledged():
            if start < position:
                position = max(position, start + (len(payload) if kind == DATA else 1))
        return super().acknowledge(min(position, self.sent))


@pytest.mark.parametrize(
    "broken",
    [{"receiver": KeepsDuplicates}, {"receiver": NearestAbove}, {"sender": NoRewind}, {"sender": ForgetsEarly}],
    ids=["duplicates", "wrap", "rewind", "forgets"],
)
def test_control_a_broken_end_is_found_out(broken: dict[str, Any]) -> None:
    machine: Any = type("Broken", (StreamMachine,), broken)
    with pytest.raises((AssertionError, ProtocolError, ExceptionGroup)):
        run_state_machine_as_test(
            machine,
            settings=settings(max_examples=2000, stateful_step_count=40, database=None, phases=[Phase.generate]),
        )
