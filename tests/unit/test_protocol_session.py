"""The node's session machine, one situation at a time: what its simulation found, and what a user would notice."""

from __future__ import annotations

import msgspec
import pytest

from sterna import limits
from sterna.errors import Code, LostBytesError, ProtocolError, StorageError
from sterna.ids import AttachmentId, DeviceId, SessionUid
from sterna.journal.memory import MemoryLog
from sterna.protocol import messages
from sterna.protocol.attachment import Attachment, Lane
from sterna.protocol.codec import Decoder, Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.messages import LaneState, Lost
from sterna.protocol.session import Session
from sterna.protocol.states import TRANSITIONS, Cause, State, step

NOW = 5_000_000_000
SECOND = 1_000_000_000
NODE = b"N" * 32


class Port:
    """A place on a pod's connection that keeps what is sent there."""

    def __init__(self, *features: str) -> None:
        self.link = Link()
        self.handle = 1
        self.features = frozenset(features)
        self.lanes: dict[int, Lane] = {}
        self.released = False

    def lane_handle(self, session: Session, lane: Lane) -> int:
        self.lanes[len(self.lanes) + 2] = lane
        return len(self.lanes) + 1

    def release(self, session: Session) -> None:
        self.released = True


def sent(link: Link) -> list[Frame]:
    decoder = Decoder()
    frames = decoder.feed(b"".join(link.data_to_send()))
    assert decoder.fault is None
    return frames


def kinds(link: Link) -> list[Type]:
    return [Type(kind) for kind, _, _, _ in sent(link)]


def opened(
    session: Session, *lanes: tuple[bytes, int], features: tuple[str, ...] = (), base: int | None = None
) -> Port:
    port = Port(*features)
    end = session.log.end
    states = [LaneState(attachment, position) for attachment, position in lanes]
    session.pod_opened(port, messages.Opened(end, end if base is None else base, states), NOW)
    return port


def session(ring_bytes: int = limits.RING_BYTES) -> Session:
    log = MemoryLog(1, ring_bytes=ring_bytes)
    return Session(SessionUid(b"U" * 16), log, log_id=1, kind="pty", tenant="t", agent="a", name="n")


def state(of: Session) -> State:
    """Reads the state anew: a type checker does not see that calls change it."""
    return of.state


def attachment(letter: bytes = b"a", *, exact: bool = True, mode: messages.Mode = "drive") -> Attachment:
    made = Attachment(AttachmentId(letter * 16), Link(), 7, DeviceId(b"D" * 32), mode, letter.decode())
    made.exact = exact
    return made


def attach(target: Session, who: Attachment, output: int | None = None, now: int = NOW) -> None:
    target.attach(who, now, output=output, node=NODE, created=False)


def resume(target: Session, who: Attachment, output: int, log: int = 1) -> messages.Resumed:
    body = messages.ResumeBody(messages.CONTEXT_RESUME, NODE, target.uid, b"d", who.id, b"r", 1, 1, log, output)
    target.resume(who, body, NOW)
    return messages.unpack(messages.Resumed, next(f[3] for f in sent(who.link) if f[0] == Type.RESUMED))


def test_input_that_comes_while_the_pod_is_away_is_asked_for_again_later_not_refused() -> None:
    target, who = session(), attachment()
    opened(target)
    attach(target, who)
    target.pod_gone()
    target.client_input(who, Type.DATA, 0, b"first", NOW)
    target.client_input(who, Type.DATA, 5, b"second", NOW)
    assert Type.ERROR not in kinds(who.link)
    opened(target, (who.id, 0))
    error = messages.unpack(messages.Error, next(f[3] for f in sent(who.link) if f[0] == Type.ERROR))
    assert error.code == Code.RESYNC


def test_input_after_the_end_does_not_keep_the_last_output_from_arriving() -> None:
    target, who = session(), attachment()
    opened(target)
    attach(target, who)
    target.pod_exit(messages.Exit(0, 0), NOW)
    target.client_input(who, Type.DATA, 0, b"first", NOW)
    target.client_input(who, Type.DATA, 5, b"second", NOW)
    assert kinds(who.link)[-1] == Type.CLOSE
    assert who.session is target


def test_what_the_pod_handled_on_a_lost_connection_is_acknowledged_after_it() -> None:
    target, who = session(), attachment()
    opened(target)
    attach(target, who)
    target.client_input(who, Type.DATA, 0, b"12345", NOW)
    target.pod_gone()
    sent(who.link)
    opened(target, (who.id, 5))
    assert [(f[0], f[3]) for f in sent(who.link)] == [(Type.ACK, (5).to_bytes(8, "big"))]


def test_what_the_pod_had_in_hand_when_its_connection_was_lost_is_acknowledged_later() -> None:
    target, who = session(), attachment()
    opened(target)
    attach(target, who)
    target.client_input(who, Type.DATA, 0, b"12345", NOW)
    target.pod_gone()
    port = opened(target, (who.id, 0))
    again = attachment()
    assert resume(target, again, 0).input == 0
    lane = next(lane for lane in port.lanes.values() if lane.attachment is again)
    target.pod_ack(lane, (5).to_bytes(8, "big"))
    assert (Type.ACK, 5) in [(f[0], f[2]) for f in sent(again.link)]
    assert resume(target, attachment(), 0).input == 5


def test_a_watcher_takes_no_lane_at_the_pod() -> None:
    target = session()
    first = opened(target)
    attach(target, attachment(b"w", mode="watch"))
    target.pod_gone()
    second = opened(target)
    assert first.lanes == {}
    assert second.lanes == {}


def test_a_session_whose_attachments_must_all_resume_is_suspended() -> None:
    target, who = session(), attachment()
    opened(target)
    attach(target, who)
    target.client_input(who, Type.DATA, 0, b"12345", NOW)
    assert state(target) is State.ACTIVE
    target.pod_gone()
    opened(target, (who.id, 2))
    assert not target.attachments
    assert state(target) is State.SUSPENDED


def test_a_repeated_connect_displaces_the_first_connection() -> None:
    target, first, second = session(), attachment(), attachment()
    opened(target)
    attach(target, first)
    attach(target, second)
    assert kinds(first.link)[-1] == Type.ERROR
    assert first.session is None
    assert target.lanes[second.id].attachment is second


def test_a_snapshot_that_was_promised_is_asked_for_again_when_the_pod_is_back() -> None:
    target, who = session(), attachment(exact=False)
    target.log.append(b"history")
    opened(target, features=("snapshot",))
    attach(target, who)
    assert kinds(who.link) == [Type.ACCEPT]
    target.pod_gone()
    port = opened(target, features=("snapshot",))
    assert Type.CAPTURE in kinds(port.link)
    assert kinds(who.link) == []


def test_a_snapshot_that_cannot_come_any_more_is_replaced_by_an_empty_one() -> None:
    target, who = session(), attachment(exact=False)
    target.log.append(b"history")
    opened(target, features=("snapshot",))
    attach(target, who)
    target.pod_gone()
    target.agent_lost(NOW, "The agent is gone.")
    assert kinds(who.link) == [Type.ACCEPT, Type.SNAPSHOT, Type.DATA, Type.CLOSE]


def test_output_is_never_acknowledged_beyond_the_journal() -> None:
    """A pod whose snapshot is ahead of its output is refused, and the node acknowledges nothing that it has not got."""
    target, who = session(), attachment(exact=False)
    target.log.append(b"history")
    port = opened(target, features=("snapshot",))
    attach(target, who)
    with pytest.raises(ProtocolError):
        target.pod_snapshot(messages.Snapshot(5000, token=1), NOW)
    target.pace(NOW + SECOND)
    target.handle_timeout(NOW + 2 * SECOND)
    assert all(f[2] <= target.log.end for f in sent(port.link) if f[0] == Type.ACK)


def test_the_first_reader_of_an_ended_session_does_not_take_the_rest_from_the_others() -> None:
    target, fast, slow = session(), attachment(b"f"), attachment(b"s")
    slow.window = 10
    opened(target)
    attach(target, fast)
    attach(target, slow)
    target.pod_data(0, b"x" * 30, NOW)
    target.pod_exit(messages.Exit(30, 0), NOW)
    target.client_close(fast, NOW)
    assert state(target) is State.EXITED
    for position in (10, 20, 30):
        target.client_ack(slow, position.to_bytes(8, "big"), NOW)
    frames = sent(slow.link)
    assert b"".join(f[3] for f in frames if f[0] == Type.DATA) == b"x" * 30
    assert frames[-1][0] == Type.CLOSE
    target.client_close(slow, NOW)
    assert state(target) is State.CLOSED


def test_output_that_could_not_be_stored_is_not_counted_as_received() -> None:
    class Full(MemoryLog):
        def append(self, data: bytes | bytearray | memoryview) -> None:
            raise StorageError("full")

    target = Session(SessionUid(b"U" * 16), Full(1), log_id=1, kind="pty", tenant="t", agent="a", name="n")
    opened(target)
    with pytest.raises(StorageError):
        target.pod_data(0, b"bytes", NOW)
    with pytest.raises(ProtocolError):
        target.pod_data(5, b"more", NOW)
    assert target.log.end == 0


def test_a_frozen_attachment_does_not_collect_notices_about_others() -> None:
    target, frozen = session(), attachment(b"f")
    opened(target)
    attach(target, frozen)
    sent(frozen.link)
    frozen.link.blocked = True
    for number in range(1000):
        who = attachment(b"o")
        attach(target, who)
        target.detach(who, NOW + number)
    assert frozen.link.out_bytes < 1000


def test_lanes_are_bounded_and_the_pod_is_told_which_ones_are_forgotten() -> None:
    target = session()
    port = opened(target)
    for number in range(limits.LANES_MAX + 1):
        who = attachment()
        who.id = AttachmentId(number.to_bytes(16, "big"))
        attach(target, who)
        target.detach(who, NOW + number)
    assert len(target.lanes) == limits.LANES_MAX
    forgotten = [f[1] for f in sent(port.link) if f[0] == Type.CLOSE]
    assert [port.lanes[handle].id for handle in forgotten] == [bytes(16)]


def test_a_last_screen_that_is_too_large_is_not_kept_in_part() -> None:
    target = session()
    opened(target)
    part = bytes(60_000)
    for number in range(limits.FINAL_MAX_BYTES // len(part) + 2):
        target.pod_snapshot(messages.Snapshot(0, number, False, True, part), NOW)
    target.pod_snapshot(messages.Snapshot(0, 99, True, True, b"end"), NOW)
    assert target.final == b""


def test_a_gap_is_named_exactly() -> None:
    target, who = session(ring_bytes=100_000), attachment()
    opened(target)
    attach(target, who)
    target.detach(who, NOW)
    for _ in range(10):
        target.pod_data(target.log.end, bytes(50_000), NOW)
    resumed = resume(target, attachment(), 7)
    assert resumed.lost == Lost(7, target.log.tail)
    assert resumed.output == target.log.tail


def test_a_driver_that_stands_still_holds_the_agent_ten_seconds() -> None:
    target, still = session(), attachment(exact=False)
    port = opened(target)
    attach(target, still)
    size = limits.WINDOW_BYTES
    target.pod_data(0, bytes(60_000), NOW)
    for _ in range(4):
        target.pod_data(target.log.end, bytes(60_000), NOW)
    assert still.cursor == size < target.log.end
    target.handle_timeout(NOW + SECOND)
    assert max(f[2] for f in sent(port.link) if f[0] == Type.ACK) == size
    due = target.next_timeout()
    assert due == NOW + limits.STILL_SECONDS * SECOND
    target.handle_timeout(due)
    target.handle_timeout(due + SECOND)
    assert max(f[2] for f in sent(port.link) if f[0] == Type.ACK) == target.log.end
    assert target.next_timeout() is None


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("cause", Cause)
def test_what_is_not_in_the_table_does_not_happen(before: State, cause: Cause) -> None:
    assert step(before, cause) is TRANSITIONS.get((before, cause), before)


def test_nothing_comes_back_from_closed_and_everything_can_get_there() -> None:
    assert all(state is not State.CLOSED for state, _ in TRANSITIONS)
    for first in State:
        reached, before = {first}, set[State]()
        while reached != before:
            before = set(reached)
            reached |= {after for (at, _), after in TRANSITIONS.items() if at in reached}
        assert State.CLOSED in reached


def test_an_exact_driver_that_is_alone_holds_the_agent_as_long_as_it_takes() -> None:
    target, still = session(), attachment()
    port = opened(target)
    attach(target, still)
    for _ in range(6):
        target.pod_data(target.log.end, bytes(60_000), NOW)
    target.handle_timeout(NOW + SECOND)
    target.handle_timeout(NOW + 1000 * SECOND)
    assert max(f[2] for f in sent(port.link) if f[0] == Type.ACK) == limits.WINDOW_BYTES < target.log.end
    assert target.next_timeout() is None


class DamagedLog(MemoryLog):
    """Bytes 10 to 30 cannot be read any more."""

    def read(self, position: int, limit: int) -> bytes:
        if 10 <= position < 30:
            raise LostBytesError("damaged", 10, 30)
        return super().read(position, min(limit, 10 - position) if position < 10 else limit)


def test_damaged_bytes_of_the_journal_are_named_and_the_rest_still_comes() -> None:
    log = DamagedLog(1)
    log.append(bytes(range(40)))
    target = Session(SessionUid(b"U" * 16), log, log_id=1, kind="stream", tenant="t", agent="a", name="n")
    opened(target)
    who = attachment()
    attach(target, who, output=0)
    frames = [f for f in sent(who.link) if f[0] in (Type.DATA, Type.SNAPSHOT)]
    assert [f[0] for f in frames] == [Type.DATA, Type.SNAPSHOT, Type.DATA]
    assert messages.unpack(messages.Snapshot, frames[1][3]).lost == Lost(10, 30)
    assert frames[0][3] + frames[2][3] == bytes(range(10)) + bytes(range(30, 40))


def test_an_attachment_whose_lane_nobody_remembers_goes_on_and_is_told_what_is_uncertain() -> None:
    target, who = session(), attachment()
    opened(target)
    body = messages.ResumeBody(messages.CONTEXT_RESUME, NODE, target.uid, b"d", who.id, b"r", 1, 1, 1, 0, sent=70)
    target.resume(who, body, NOW)
    resumed = messages.unpack(messages.Resumed, next(f[3] for f in sent(who.link) if f[0] == Type.RESUMED))
    assert (resumed.input, resumed.forgotten) == (70, True)
    assert who.lane is not None
    target.client_input(who, Type.DATA, 70, b"on", NOW)
    assert who.lane.next == 72


def terminal(letter: bytes, cols: int, rows: int) -> Attachment:
    made = attachment(letter, exact=False)
    made.answers = True
    made.cols, made.rows = cols, rows
    return made


def asked(port: Port) -> list[messages.Capture]:
    """What the pod was asked to draw since the last look."""
    return [messages.unpack(messages.Capture, f[3]) for f in sent(port.link) if f[0] == Type.CAPTURE]


def answer(target: Session, port: Port, now: int = NOW) -> int:
    """Answers everything the pod was asked to draw; returns how many drawings that were."""
    captures = asked(port)
    for capture in captures:
        target.pod_snapshot(messages.Snapshot(target.log.end, data=b"picture", token=capture.token), now)
    return len(captures)


def sizes(port: Port) -> list[tuple[int, int]]:
    """The sizes that the pod was told since the last look."""
    told = [messages.unpack(messages.Resize, f[3]) for f in sent(port.link) if f[0] == Type.RESIZE]
    return [(size.cols, size.rows) for size in told]


def test_sizes_are_told_twenty_times_a_second_at_most_and_the_last_one_wins() -> None:
    target, who = session(), terminal(b"a", 80, 24)
    port = opened(target)
    attach(target, who)
    assert sizes(port) == [(80, 24)]
    every = limits.RESIZE_EVERY_MS * 1_000_000
    for number in range(1000):
        target.client_resize(who, 80 + number % 2, 24, NOW + number)
    assert sizes(port) == []
    target.client_resize(who, 100, 30, NOW + 2000)
    due = target.next_timeout()
    assert due == NOW + every
    target.handle_timeout(due)
    assert sizes(port) == [(100, 30)]
    assert target.next_timeout() is None
    target.client_resize(who, 100, 30, NOW + SECOND)
    assert sizes(port) == []


def test_a_size_that_was_lost_with_the_pods_connection_is_told_again() -> None:
    target, who = session(), terminal(b"a", 80, 24)
    opened(target)
    attach(target, who)
    target.pod_gone()
    target.client_resize(who, 90, 30, NOW)
    port = Port()
    target.pod_opened(port, messages.Opened(0, 0, [LaneState(who.id, 0)], 132, 43), NOW + SECOND)
    assert sizes(port) == [(90, 30)]


def test_pictures_for_other_terminals_are_few_and_one_at_a_time() -> None:
    target, driver = session(), terminal(b"d", 80, 24)
    port = opened(target, features=("snapshot",))
    attach(target, driver)
    watchers = [terminal(bytes([65 + number]), 60, 20) for number in range(limits.WATCHERS_MAX)]
    for watcher in watchers:
        watcher.mode = "watch"
        attach(target, watcher)
    sent(port.link)
    every = limits.RESIZE_EVERY_MS * 1_000_000
    drawings = []
    for number in range(1, 41):  # two seconds
        now = NOW + number * every
        target.client_resize(driver, 80 + number % 2, 24, now)
        target.handle_timeout(now)
        captures = asked(port)
        assert len(captures) <= 1
        drawings += captures
        if number > 20:
            for capture in captures:
                target.pod_snapshot(messages.Snapshot(0, data=b"fits", token=capture.token), now)
        if number == 20:
            assert len(drawings) == 1, "the pod has not answered yet"
            target.pod_snapshot(messages.Snapshot(0, data=b"fits", token=drawings[0].token), now)
    assert len(drawings) == 1 + 1000 // limits.REPAINT_EVERY_MS
    assert all(kinds(watcher.link).count(Type.SNAPSHOT) == len(drawings) for watcher in watchers)


def test_one_drawing_serves_all_who_join_until_it_comes() -> None:
    target = session()
    port = opened(target, features=("snapshot",))
    target.pod_data(0, b"something", NOW)
    joined = [attachment(bytes([65 + number]), exact=False) for number in range(10)]
    for who in joined:
        attach(target, who)
    (capture,) = asked(port)
    target.detach(joined[0], NOW, polite=True)
    target.pod_snapshot(messages.Snapshot(9, 0, False, data=b"first", token=capture.token), NOW)
    late = attachment(b"z", exact=False)
    attach(target, late)
    assert asked(port) == []
    target.pod_snapshot(messages.Snapshot(9, 1, True, data=b"second", token=capture.token), NOW)
    assert kinds(joined[0].link) == [Type.ACCEPT] + [Type.EVENT] * 9
    for who in joined[1:]:
        assert kinds(who.link).count(Type.SNAPSHOT) == 2
        assert (who.waiting, who.cursor) == (False, 9)
    assert late.waiting
    assert answer(target, port) == 1
    assert not late.waiting


def test_joining_and_leaving_in_a_loop_draws_once() -> None:
    target = session()
    port = opened(target, features=("snapshot",))
    target.pod_data(0, b"something", NOW)
    for number in range(100):
        who = attachment(b"l", exact=False, mode="watch")
        attach(target, who, now=NOW + number)
        target.detach(who, NOW + number, polite=True)
    assert answer(target, port) == 1
    assert answer(target, port) == 0
    stays = attachment(b"s", exact=False)
    attach(target, stays)
    assert answer(target, port) == 1
    assert not stays.waiting


def test_a_picture_is_not_shared_with_who_brings_another_size() -> None:
    target = session()
    port = opened(target, features=("snapshot",))
    target.pod_data(0, b"something", NOW)
    first, second = terminal(b"a", 80, 24), terminal(b"b", 110, 40)
    attach(target, first)
    (capture,) = asked(port)
    attach(target, second, now=NOW + 1)
    assert asked(port) == []  # the size has to wait, and the picture for it
    due = target.next_timeout()
    assert due is not None
    target.handle_timeout(due)
    target.pod_snapshot(messages.Snapshot(9, data=b"old size", token=capture.token), due)
    assert (first.waiting, second.waiting) == (False, True)
    (capture,) = [c for c in asked(port) if c.scrollback]
    target.pod_snapshot(messages.Snapshot(9, data=b"new size", token=capture.token), due)
    assert not second.waiting


def test_watchers_take_no_lane_from_a_driver_that_is_away() -> None:
    target, driver = session(), attachment(b"d")
    opened(target)
    attach(target, driver)
    target.client_input(driver, Type.DATA, 0, b"12345", NOW)
    assert driver.lane is not None
    target.pod_ack(driver.lane, (5).to_bytes(8, "big"))
    target.detach(driver, NOW)
    for number in range(limits.LANES_MAX + 1):
        who = attachment(mode="watch")
        who.id = AttachmentId(number.to_bytes(16, "big"))
        attach(target, who, now=NOW + 1 + number)
        assert resume(target, who, 0).input == 0
        assert who.lane is None
    assert list(target.lanes) == [driver.id]
    assert resume(target, attachment(b"d"), 0).input == 5


def test_a_terminal_of_another_size_gets_a_picture_that_fits_and_so_do_the_others() -> None:
    target = session()
    port = opened(target, features=("snapshot",))
    target.pod_data(0, b"something", NOW)
    first, second = terminal(b"a", 110, 40), terminal(b"b", 80, 24)
    attach(target, first)
    picture = messages.Snapshot(9, data=b"picture")
    asked = [messages.unpack(messages.Capture, f[3]) for f in sent(port.link) if f[0] == Type.CAPTURE]
    target.pod_snapshot(msgspec.structs.replace(picture, token=asked[0].token), NOW)
    attach(target, second, now=NOW + SECOND)
    frames = [f for f in sent(port.link) if f[0] in (Type.RESIZE, Type.CAPTURE)]
    assert [f[0] for f in frames] == [Type.RESIZE, Type.CAPTURE, Type.CAPTURE]
    assert messages.unpack(messages.Resize, frames[0][3]) == messages.Resize(80, 24)
    captures = [messages.unpack(messages.Capture, f[3]) for f in frames[1:]]
    assert [c.scrollback for c in captures] == [False, True]
    # What the others see goes on meanwhile: not a line is missing in their scroll-back.
    assert not first.waiting
    assert second.waiting
    sent(first.link)
    target.pod_data(9, b", more", NOW)
    extra = messages.Snapshot(15, data=b"picture that fits", token=captures[0].token)
    target.pod_snapshot(extra, NOW)
    assert [f[0] for f in sent(first.link)] == [Type.DATA, Type.SNAPSHOT]
    assert (first.cursor, first.acked) == (15, 9)


def test_a_picture_that_is_late_for_who_is_behind_is_left_out() -> None:
    target = session()
    port = opened(target, features=("snapshot",))
    first, second = terminal(b"a", 110, 40), terminal(b"b", 80, 24)
    attach(target, first)
    sent(port.link)
    attach(target, second, now=NOW + SECOND)
    (token,) = [messages.unpack(messages.Capture, f[3]).token for f in sent(port.link) if f[0] == Type.CAPTURE]
    first.window = 3
    target.pod_data(0, b"something", NOW)
    sent(first.link)
    target.pod_snapshot(messages.Snapshot(9, data=b"picture", token=token), NOW)
    assert sent(first.link) == []
    target.client_ack(first, (3).to_bytes(8, "big"), NOW)
    assert [(f[2], f[3]) for f in sent(first.link)] == [(3, b"eth")]


def test_a_terminal_of_the_new_size_is_left_alone() -> None:
    target = session()
    port = opened(target, features=("snapshot",))
    first, second, third = terminal(b"a", 80, 24), terminal(b"b", 80, 24), terminal(b"c", 100, 30)
    attach(target, first)
    attach(target, second)
    attach(target, third, now=NOW + SECOND)
    answer(target, port)
    sent(port.link)
    target.client_input(first, Type.DATA, 0, b"x", NOW + 2 * SECOND)
    frames = sent(port.link)
    assert [f[0] for f in frames].count(Type.RESIZE) == 1
    assert [f[0] for f in frames].count(Type.CAPTURE) == 1


def test_the_same_size_again_repaints_nobody() -> None:
    target = session()
    port = opened(target, features=("snapshot",))
    attach(target, terminal(b"a", 80, 24))
    sent(port.link)
    attach(target, terminal(b"b", 80, 24))
    assert Type.CAPTURE not in kinds(port.link)


def test_what_the_connection_before_brought_may_be_acknowledged_on_the_new_one() -> None:
    target = session()
    opened(target)
    target.pod_data(0, bytes(1000), NOW)
    who = attachment()
    attach(target, who, output=0)
    again = attachment()
    again.window = 100
    resume(target, again, 0)
    target.client_ack(again, (700).to_bytes(8, "big"), NOW)
    frames = sent(again.link)
    assert Type.ERROR not in [frame[0] for frame in frames]
    assert [(frame[0], frame[2]) for frame in frames if frame[0] == Type.DATA] == [(Type.DATA, 700)]
