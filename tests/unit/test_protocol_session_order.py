"""What goes first and what is refused: the journal before anybody, old connections, windows, watchers, lost input."""

from __future__ import annotations

import pytest

from sterna import limits
from sterna.client.attach import Attach
from sterna.errors import Code, ProtocolError, StorageError
from sterna.ids import AttachmentId, DeviceId, SessionUid
from sterna.journal.memory import MemoryLog
from sterna.protocol import client as machine_events
from sterna.protocol import messages
from sterna.protocol.attachment import Attachment
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.session import Session
from sterna.protocol.stream import SendStream
from tests.unit import test_protocol_podside as agent_side
from tests.unit.test_protocol_session import NODE, NOW, Port, attachment, kinds, opened, sent, session

PIECE = b"x" * 32_768
Happened = tuple[str, int]
"""Who got something, and the output position up to which it then has it."""


class RecordingLink(Link):
    """Notes the position after each frame of output, or of its acknowledgement, when it is queued."""

    def __init__(self, who: str, happened: list[Happened]) -> None:
        super().__init__()
        self._who = who
        self._happened = happened

    def send(self, kind: int, handle: int, seq: int, payload: bytes = b"") -> None:
        if kind == Type.DATA:
            self._happened.append((self._who, seq + len(payload)))
        elif kind == Type.ACK:
            self._happened.append((self._who, int.from_bytes(payload, "big")))
        super().send(kind, handle, seq, payload)


class RecordingLog(MemoryLog):
    """Notes each piece that it has stored, or fails at all of them."""

    def __init__(self, happened: list[Happened], *, full: bool = False) -> None:
        super().__init__(1)
        self._happened = happened
        self._full = full

    def append(self, data: bytes | bytearray | memoryview) -> None:
        if self._full:
            raise StorageError("The disk is full.")
        super().append(data)
        self._happened.append(("journal", self.end))


def recorded(*, full: bool = False, window: int = limits.WINDOW_BYTES) -> tuple[Session, list[Happened]]:
    """A session with one driver and one watcher, whose journal, clients and pod all note what they get."""
    happened: list[Happened] = []
    log = RecordingLog(happened, full=full)
    target = Session(SessionUid(b"U" * 16), log, log_id=1, kind="pty", tenant="t", agent="a", name="n")
    port = Port()
    port.link = RecordingLink("pod", happened)
    target.pod_opened(port, messages.Opened(0, 0, []), NOW)
    for letter, mode in ((b"d", "drive"), (b"w", "watch")):
        link = RecordingLink(mode, happened)
        who = Attachment(
            AttachmentId(letter * 16), link, 7, DeviceId(b"D" * 32), "drive" if mode == "drive" else "watch", mode
        )
        who.exact = True
        who.window = window
        target.attach(who, NOW, output=0, node=NODE, created=False)
    happened.clear()
    return target, happened


@pytest.mark.parametrize("window", [limits.WINDOW_BYTES, 8], ids=["whole", "in-parts"])
def test_the_journal_has_output_before_any_client_gets_it_and_before_the_pod_may_forget_it(window: int) -> None:
    target, happened = recorded(window=window)
    if window == limits.WINDOW_BYTES:
        for number in range(4):
            target.pod_data(number * len(PIECE), PIECE, NOW)
    else:
        target.pod_data(0, b"more than fits", NOW)
    stored = 0
    for who, position in happened:
        if who == "journal":
            stored = position
        else:
            assert position <= stored, happened
    got = {who for who, _ in happened}
    assert got == ({"journal", "drive", "watch", "pod"} if window == limits.WINDOW_BYTES else got)
    assert {"journal", "drive", "watch"} <= got


def test_the_clients_have_output_before_the_pod_may_forget_it() -> None:
    target, happened = recorded()
    for number in range(4):
        target.pod_data(number * len(PIECE), PIECE, NOW)
    for at, (who, position) in enumerate(happened):
        if who == "pod":
            assert max(p for w, p in happened[:at] if w == "drive") >= position


def test_output_that_cannot_be_stored_reaches_nobody() -> None:
    target, happened = recorded(full=True)
    for _ in range(4):
        with pytest.raises(StorageError):
            target.pod_data(0, PIECE, NOW)
    target.handle_timeout(NOW + 1_000_000_000)
    assert happened == []


# ---- input that may be lost ----------------------------------------------------------------------------------------


def test_a_lost_agent_names_exactly_the_input_that_nobody_can_vouch_for() -> None:
    target, who, idle = session(), attachment(), attachment(b"i")
    port = opened(target)
    for each in (who, idle):
        target.attach(each, NOW, output=None, node=NODE, created=False)
    target.client_input(who, Type.DATA, 0, b"0123456789", NOW)
    target.pod_ack(next(lane for lane in port.lanes.values() if lane.attachment is who), (4).to_bytes(8, "big"))
    for each in (who, idle):
        sent(each.link)
    target.agent_lost(NOW, "The agent is gone.")
    frames = sent(who.link)
    events = [messages.unpack(messages.Event, frame[3]) for frame in frames if frame[0] == Type.EVENT]
    assert [(event.kind, event.start, event.end) for event in events] == [("uncertain", 4, 10)]
    assert frames[-1][0] == Type.CLOSE, "it is named before the end"
    assert kinds(idle.link) == [Type.CLOSE]


def leaving(*events: machine_events.Event) -> str:
    """What `attach` says at its end after these events; without a terminal, which none of them touches."""
    run = Attach.__new__(Attach)
    run._inside, run._lost, run._uncertain, run._left = False, 0, 0, ""
    run._name, run._error, run._close = "work", None, None
    for event in events:
        run._event(event)
    return run.farewell()


def test_attach_names_the_input_that_may_be_lost_when_it_leaves() -> None:
    assert leaving() == ""
    said = leaving(machine_events.Uncertain(4, 10))
    assert said == "sterna: 6 bytes of input may not have reached the program.\n"


# ---- what is refused -----------------------------------------------------------------------------------------------


def holder(who: Attachment) -> Session | None:
    """Reads the session anew: a type checker does not see that calls change it."""
    return who.session


def test_a_client_that_sends_more_than_its_window_is_dropped_and_the_agent_gets_none_of_that() -> None:
    target, who = session(), attachment()
    port = opened(target)
    target.attach(who, NOW, output=None, node=NODE, created=False)
    for at in range(0, limits.WINDOW_BYTES, len(PIECE)):
        target.client_input(who, Type.DATA, at, PIECE, NOW)
    assert holder(who) is target, "a full window is allowed"
    sent(who.link), sent(port.link)
    target.client_input(who, Type.DATA, limits.WINDOW_BYTES, b"!", NOW)
    errors = [messages.unpack(messages.Error, frame[3]) for frame in sent(who.link) if frame[0] == Type.ERROR]
    assert [error.code for error in errors] == [Code.LIMIT]
    assert holder(who) is None
    assert Type.DATA not in kinds(port.link)


def test_what_the_program_handled_opens_the_window_again() -> None:
    target, who = session(), attachment()
    port = opened(target)
    target.attach(who, NOW, output=None, node=NODE, created=False)
    for at in range(0, limits.WINDOW_BYTES, len(PIECE)):
        target.client_input(who, Type.DATA, at, PIECE, NOW)
    target.pod_ack(next(iter(port.lanes.values())), (1).to_bytes(8, "big"))
    target.client_input(who, Type.DATA, limits.WINDOW_BYTES, b"!", NOW)
    assert Type.ERROR not in kinds(who.link)
    assert who.session is target


@pytest.mark.parametrize("typist", [True, False], ids=["beside-a-driver", "alone"])
def test_a_watchers_size_changes_nothing(typist: bool) -> None:
    target, driver, watcher = session(), attachment(exact=False), attachment(b"w", mode="watch", exact=False)
    port = opened(target)
    if typist:
        driver.answers = True
        driver.cols, driver.rows = 90, 30
        target.attach(driver, NOW, output=None, node=NODE, created=False)
    watcher.answers = True
    watcher.cols, watcher.rows = 40, 10
    target.attach(watcher, NOW, output=None, node=NODE, created=False)
    size = target.cols, target.rows
    assert size == ((90, 30) if typist else size)
    sent(port.link)
    target.client_resize(watcher, 41, 11, NOW)
    assert (target.cols, target.rows) == size
    assert target.typist is (driver if typist else None)
    assert Type.RESIZE not in kinds(port.link)


@pytest.mark.parametrize("taken", [False, True], ids=["unsent", "sent"])
def test_nothing_can_be_acknowledged_that_was_not_sent(taken: bool) -> None:
    stream = SendStream(0)
    assert stream.write(b"hello") == 5
    if taken:
        stream.take()
    limit = 5 if taken else 0
    with pytest.raises(ProtocolError) as refused:
        stream.acknowledge(limit + 1)
    assert refused.value.code == Code.PROTOCOL
    assert (stream.base, stream.end) == (0, 5)
    assert stream.acknowledge(limit) == limit


def test_a_lane_from_a_connection_that_was_fenced_off_changes_nothing() -> None:
    pod = agent_side.machine()
    old = agent_side.connect(pod)
    held = agent_side.start(pod, old)
    new = agent_side.connect(pod)
    agent_side.give(pod, new, Type.OPEN, 1, messages.Open(agent_side.UID, 0))
    agent_side.lane(pod, new, 2)
    agent_side.sent(old), agent_side.sent(new)
    # The old node is slow, not dead: its LANEs come after the new one's.
    agent_side.lane(pod, old, 3)
    agent_side.lane(pod, old, 5, letter=b"z")
    assert list(held.lanes) == [b"a" * 16]
    item = agent_side.type_(pod, new, 2, 0, b"typed")
    pod.handled(item, NOW)
    pod.acknowledge_due(held, NOW + agent_side.SECOND, True)
    assert [(frame[0], frame[1], frame[2]) for frame in agent_side.sent(new)] == [(Type.ACK, 2, 5)]
    assert agent_side.sent(old) == []
