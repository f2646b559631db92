"""The agent's side of the pod socket, one situation at a time."""

from __future__ import annotations

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages, podside
from sterna.protocol.codec import Decoder, Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.podside import Input, Opening, PodMachine, PodSession, Roomy

UID = b"U" * 16
NOW = 5_000_000_000
SECOND = 1_000_000_000


def sent(link: Link) -> list[Frame]:
    return Decoder().feed(b"".join(link.data_to_send()))


def machine() -> PodMachine:
    return PodMachine(b"I" * 16, "pty", ["many"], "pod", 10)


def connect(pod: PodMachine) -> Link:
    link = Link()
    pod.connected(link)
    assert [frame[0] for frame in sent(link)] == [Type.HELLO]
    return link


def give(
    pod: PodMachine, link: Link, kind: Type, handle: int, message: messages.Message | bytes, seq: int = 0
) -> object:
    payload = message if isinstance(message, bytes) else messages.pack(message)
    return pod.receive(link, (int(kind), handle, seq, payload), NOW)


def start(pod: PodMachine, link: Link, handle: int = 1, uid: bytes = UID) -> PodSession:
    opening = give(pod, link, Type.OPEN, handle, messages.Open(uid, 0, fresh=True))
    assert isinstance(opening, Opening)
    pod.opened(opening, NOW)
    return opening.session


def lane(pod: PodMachine, link: Link, handle: int, letter: bytes = b"a", next_: int = 0, uid: bytes = UID) -> None:
    give(pod, link, Type.LANE, handle, messages.Lane(uid, letter * 16, next_))


def type_(pod: PodMachine, link: Link, handle: int, position: int, data: bytes) -> Input:
    item = give(pod, link, Type.DATA, handle, data, position)
    assert isinstance(item, Input)
    return item


def test_a_program_that_waits_for_room_goes_on_when_a_new_node_connection_brings_it() -> None:
    pod = machine()
    first = connect(pod)
    session = start(pod, first)
    session.out.write(bytes(limits.WINDOW_BYTES))
    session.flush(NOW)
    session.starved = True
    pod.disconnected(first)
    second = connect(pod)
    event = give(pod, second, Type.OPEN, 1, messages.Open(UID, limits.WINDOW_BYTES))
    assert isinstance(event, Roomy)
    assert not session.starved


def test_a_lane_that_cannot_be_acknowledged_keeps_no_timer_running() -> None:
    pod = machine()
    first = connect(pod)
    session = start(pod, first)
    lane(pod, first, 2)
    item = type_(pod, first, 2, 0, b"hello")
    pod.disconnected(first)
    second = connect(pod)
    give(pod, second, Type.OPEN, 1, messages.Open(UID, 0))
    pod.handled(item, NOW)
    assert session.next_timeout() is None


def test_what_was_handled_between_two_connections_is_acknowledged_when_the_lane_is_opened() -> None:
    pod = machine()
    first = connect(pod)
    start(pod, first)
    lane(pod, first, 2)
    item = type_(pod, first, 2, 0, b"hello")
    pod.disconnected(first)
    second = connect(pod)
    give(pod, second, Type.OPEN, 1, messages.Open(UID, 0))
    pod.handled(item, NOW)
    sent(second)
    lane(pod, second, 5, next_=0)
    assert sent(second) == [(Type.ACK, 5, 5, (5).to_bytes(8, "big"))]
    assert give(pod, second, Type.DATA, 5, b"hello", 0) is None


def test_a_snapshot_never_overtakes_the_output_it_includes() -> None:
    pod = machine()
    link = connect(pod)
    session = start(pod, link)
    sent(link)
    link.blocked = True
    session.out.write(b"output")
    session.flush(NOW)
    session.send_snapshot(3, session.out.end, b"screen", False)
    assert [frame[0] for frame in sent(link)] == [Type.DATA, Type.SNAPSHOT]


def test_a_closed_session_leaves_nothing_behind_on_a_connection_that_stays() -> None:
    pod = machine()
    link = connect(pod)
    for number in range(50):
        uid = number.to_bytes(16, "big")
        start(pod, link, 2 * number + 1, uid)
        lane(pod, link, 2 * number + 2, uid=uid)
        give(pod, link, Type.CLOSE, 2 * number + 1, messages.Close())
    refused = give(pod, link, Type.OPEN, 999, messages.Open(UID, 0, fresh=True))
    assert isinstance(refused, Opening)
    pod.refused(refused, Code.NO_AGENT, "no")
    assert pod.sessions == {}
    assert pod._handles[link] == {}  # only this shows that memory stays bounded


def test_a_lost_connection_is_not_kept_by_the_lanes_that_were_on_it() -> None:
    pod = machine()
    link = connect(pod)
    session = start(pod, link)
    lane(pod, link, 2)
    other = connect(pod)
    give(pod, other, Type.OPEN, 1, messages.Open(UID, 0))
    pod.disconnected(link)
    assert all(known.link is None for known in session.lanes.values())
    assert session.link is other


def test_a_lane_in_use_outlives_any_number_of_short_ones() -> None:
    pod = machine()
    link = connect(pod)
    session = start(pod, link)
    lane(pod, link, 2)
    type_(pod, link, 2, 0, b"x")
    for number in range(3 * limits.LANES_MAX):
        give(pod, link, Type.LANE, 3 + number, messages.Lane(UID, number.to_bytes(16, "big")))
        give(pod, link, Type.CLOSE, 3 + number, messages.Close(reason="forgotten"))
    assert b"a" * 16 in session.lanes
    assert len(session.lanes) == 1
    assert len(pod._handles[link]) == 2  # only this shows that memory stays bounded


def test_lanes_are_bounded_and_those_of_earlier_connections_go_first() -> None:
    pod = machine()
    first = connect(pod)
    session = start(pod, first)
    for number in range(limits.LANES_MAX):
        give(pod, first, Type.LANE, 3 + number, messages.Lane(UID, number.to_bytes(16, "big")))
    pod.disconnected(first)
    second = connect(pod)
    give(pod, second, Type.OPEN, 1, messages.Open(UID, 0))
    give(pod, second, Type.LANE, 2, messages.Lane(UID, bytes(16)))
    lane(pod, second, 3)
    assert bytes(16) in session.lanes
    assert len(session.lanes) == limits.LANES_MAX


def test_a_lane_that_was_given_up_goes_on_where_the_node_knows_it() -> None:
    pod = machine()
    link = connect(pod)
    start(pod, link)
    lane(pod, link, 2, next_=500)
    item = type_(pod, link, 2, 500, b"go on")
    assert (item.data, item.end) == (b"go on", 505)


def test_an_open_fences_the_connection_that_had_the_session() -> None:
    pod = machine()
    first = connect(pod)
    session = start(pod, first)
    lane(pod, first, 2)
    second = connect(pod)
    give(pod, second, Type.OPEN, 1, messages.Open(UID, 0))
    assert give(pod, first, Type.DATA, 2, b"late", 0) is None
    assert give(pod, first, Type.CLOSE, 1, messages.Close()) is None
    assert session.link is second
    assert UID in pod.sessions


def test_the_end_is_told_again_to_a_node_that_comes_later() -> None:
    pod = machine()
    first = connect(pod)
    session = start(pod, first)
    session.out.write(b"last words")
    session.finish(3, None, NOW)
    pod.disconnected(first)
    second = connect(pod)
    give(pod, second, Type.OPEN, 1, messages.Open(UID, 0))
    frames = sent(second)
    assert [frame[0] for frame in frames] == [Type.OPENED, Type.DATA, Type.EXIT]
    exit_ = messages.unpack(messages.Exit, frames[-1][3])
    assert (exit_.position, exit_.status) == (10, 3)


def test_a_session_nobody_asked_to_make_is_not_made() -> None:
    pod = machine()
    link = connect(pod)
    assert give(pod, link, Type.OPEN, 1, messages.Open(UID, 0)) is None
    answer = messages.unpack(messages.Opened, sent(link)[0][3])
    assert answer.error is not None
    assert answer.error.code == Code.NOT_FOUND
    assert pod.sessions == {}


def test_sizes_are_bounded_from_the_start() -> None:
    pod = machine()
    link = connect(pod)
    opening = give(pod, link, Type.OPEN, 1, messages.Open(UID, 0, fresh=True, cols=1 << 40, rows=0))
    assert isinstance(opening, podside.Opening)
    assert (opening.session.cols, opening.session.rows) == (limits.SIZE_MAX_CELLS, 24)
