"""What comes again after a cut: input that overlaps, a client whose log is another one, and lanes that make room."""

from __future__ import annotations

import pytest

from sterna import limits
from sterna.errors import Code, ProtocolError
from sterna.ids import AttachmentId
from sterna.protocol import messages
from sterna.protocol.attachment import Attachment
from sterna.protocol.frame import Type
from sterna.protocol.messages import Lost
from sterna.protocol.session import Session
from tests.unit.test_protocol_session import NODE, NOW, attach, attachment, opened, sent, session


@pytest.mark.parametrize("base", [0, 2**31 - 3, 2**32 - 3])
def test_of_input_that_overlaps_what_was_taken_the_pod_gets_the_new_part_once(base: int) -> None:
    target, who = session(), attachment()
    port = opened(target, (who.id, base))
    attach(target, who)
    sent(port.link)
    for at, data in ((0, b"01234"), (2, b"234567"), (0, b"0123"), (7, b"789"), (10, b"ab")):
        target.client_input(who, Type.DATA, base + at & 0xFFFF_FFFF, data, NOW)
    forwarded = [(frame[2], frame[3]) for frame in sent(port.link) if frame[0] == Type.DATA]
    assert forwarded == [
        (base + at & 0xFFFF_FFFF, data) for at, data in ((0, b"01234"), (5, b"567"), (8, b"89"), (10, b"ab"))
    ]
    assert who.session is target


def test_a_mark_that_comes_again_is_dropped_and_data_before_and_after_it_stays_whole() -> None:
    target, who = session(), attachment()
    port = opened(target)
    attach(target, who)
    sent(port.link)
    for _ in range(2):
        target.client_input(who, Type.DATA, 0, b"typed", NOW)
        target.client_input(who, Type.EOF, 5, b"", NOW)
    assert [frame[0] for frame in sent(port.link)] == [Type.DATA, Type.EOF]


def back(target: Session, output: int, log: int = 1) -> tuple[messages.Resumed, list[tuple[int, bytes]]]:
    """Resumes a new attachment; returns what it is told, and the output that comes with that."""
    who = attachment()
    body = messages.ResumeBody(messages.CONTEXT_RESUME, NODE, target.uid, b"d", who.id, b"r", 1, 1, log, output)
    target.resume(who, body, NOW)
    frames = sent(who.link)
    resumed = messages.unpack(messages.Resumed, next(frame[3] for frame in frames if frame[0] == Type.RESUMED))
    return resumed, [(frame[2], frame[3]) for frame in frames if frame[0] == Type.DATA]


@pytest.mark.parametrize("output", [3, 8, 20])
def test_a_client_of_another_log_starts_at_its_oldest_byte_and_is_told_so(output: int) -> None:
    target = session()
    opened(target)
    target.pod_data(0, b"new numbers", NOW)
    resumed, data = back(target, output, log=7)
    assert (resumed.log, resumed.output, resumed.lost) == (1, 0, Lost(output, output))
    assert data == [(0, b"new numbers")]
    resumed, data = back(target, 3)
    assert (resumed.output, resumed.lost, data) == (3, None, [(3, b" numbers")]), "the control: it is the same log"


@pytest.mark.parametrize("beyond", [1, 5, 2**32])
def test_a_client_that_is_ahead_of_the_log_starts_again_and_is_told_so(beyond: int) -> None:
    target = session()
    opened(target)
    target.pod_data(0, b"new numbers", NOW)
    resumed, data = back(target, 11 + beyond)
    assert (resumed.output, resumed.lost) == (0, Lost(11 + beyond, 11 + beyond))
    assert data == [(0, b"new numbers")]
    resumed, data = back(target, 11)
    assert (resumed.output, resumed.lost, data) == (11, None, []), "the control: it has everything"


def test_the_lane_that_was_left_first_makes_room_not_the_one_that_began_first() -> None:
    target = session()
    port = opened(target)

    def come(number: int, now: int) -> Attachment:
        who = attachment()
        who.id = AttachmentId(number.to_bytes(16, "big"))
        attach(target, who, now=now)
        return who

    def come_and_go(number: int, now: int) -> None:
        target.detach(come(number, now), now)

    first = come(0, NOW)
    for number in range(1, limits.LANES_MAX):
        come_and_go(number, NOW + number)
    target.detach(first, NOW + limits.LANES_MAX)  # the one that began first was there longest
    for number in range(limits.LANES_MAX, limits.LANES_MAX + 2):
        come_and_go(number, NOW + 1 + number)
    forgotten = [port.lanes[frame[1]].id for frame in sent(port.link) if frame[0] == Type.CLOSE]
    assert forgotten == [number.to_bytes(16, "big") for number in (1, 2)]


def test_a_snapshot_of_the_pod_has_so_many_parts_and_no_more() -> None:
    most = limits.SNAPSHOT_MAX_BYTES // limits.SNAPSHOT_PART_BYTES + 1
    target, who = session(), attachment(exact=False)
    target.log.append(b"history")
    port = opened(target, features=("snapshot",))
    attach(target, who)
    token = next(messages.unpack(messages.Capture, f[3]).token for f in sent(port.link) if f[0] == Type.CAPTURE)
    for number in range(most):
        target.pod_snapshot(messages.Snapshot(7, number, False, token=token), NOW)
    with pytest.raises(ProtocolError) as refused:
        target.pod_snapshot(messages.Snapshot(7, most, False, token=token), NOW)
    assert refused.value.code == Code.BAD_PAYLOAD


# ---- a ring smaller than the window --------------------------------------------------------------------------------


class Viewer:
    """Follows what an attachment is sent as a client does: nothing may be missing that was not named."""

    def __init__(self, target: Session, letter: bytes) -> None:
        self.who = attachment(letter, exact=False)
        self.next = -1
        self.pictures = 0
        self.lost: list[tuple[int, int]] = []
        attach(target, self.who)
        self.look()

    def look(self) -> None:
        for kind, _, seq, payload in sent(self.who.link):
            if kind == Type.ACCEPT:
                self.next = messages.unpack(messages.Accept, payload).output
            elif kind == Type.SNAPSHOT:
                part = messages.unpack(messages.Snapshot, payload)
                if part.lost is not None:
                    assert part.lost.start == self.next, "the gap begins where the output ended"
                    self.lost.append((part.lost.start, part.lost.end))
                self.next, self.pictures = part.position, self.pictures + 1
            elif kind == Type.DATA:
                assert seq == self.next, f"{self.next} to {seq} is missing and nobody said so"
                self.next += len(payload)


def test_what_a_picture_leaves_behind_when_the_ring_is_small_is_named() -> None:
    target = session(ring_bytes=64 * 1024)
    port = opened(target, features=("snapshot",))

    def write(size: int) -> None:
        for _ in range(0, size, 32 * 1024):
            target.pod_data(target.log.end, bytes(32 * 1024), NOW)

    def drawn(position: int) -> None:
        tokens = [messages.unpack(messages.Capture, f[3]).token for f in sent(port.link) if f[0] == Type.CAPTURE]
        assert len(tokens) == 1
        target.pod_snapshot(messages.Snapshot(position, data=b"picture", token=tokens[0]), NOW)

    write(512 * 1024)
    viewers = [Viewer(target, b"a")]
    shown = target.log.end
    write(limits.WINDOW_BYTES)  # while the picture is drawn
    assert target.log.tail > shown
    viewers.append(Viewer(target, b"b"))  # joins behind the place that the picture is of
    drawn(shown)
    for viewer in viewers:
        viewer.look()
        assert (viewer.pictures, viewer.next, viewer.who.waiting) == (1, shown, True)
    write(32 * 1024)
    shown, before = target.log.end, shown
    drawn(shown)
    write(32 * 1024)
    for viewer in viewers:
        viewer.look()
        assert (viewer.pictures, viewer.lost, viewer.who.waiting) == (2, [(before, shown)], False)
        assert viewer.next == target.log.end
