"""The client's machine, one situation at a time: what a hostile node or an unlucky order of packets must not do."""

from __future__ import annotations

import pytest

from sterna.errors import Code
from sterna.limits import ACK_DELAY_MS, SNAPSHOT_MAX_BYTES, SNAPSHOT_PART_BYTES, TEXT_SHOWN_MAX_CHARS
from sterna.protocol import messages
from sterna.protocol.client import (
    ClientMachine,
    Dial,
    Ended,
    Failed,
    Gap,
    Notice,
    Opened,
    Output,
    Screen,
    Trouble,
    Uncertain,
)
from sterna.protocol.codec import Decoder
from sterna.protocol.frame import Type, encode
from sterna.protocol.messages import Lost
from sterna.units import MILLISECOND

SECOND = 1_000_000_000
UID = b"U" * 16


def machine(name: str = "n", head: int = 0) -> tuple[ClientMachine, int]:
    """A client whose first connection carries its session, whose output before `head` is history."""
    body = messages.ConnectBody(
        context=messages.CONTEXT_CONNECT,
        node=b"N" * 32,
        request=b"r" * 16,
        key=b"k",
        attachment=b"a" * 16,
        credential="",
    )
    client = ClientMachine(
        body,
        device=b"d" * 32,
        sign=lambda context, signed: b"s" * 64,
        counter=lambda: 1,
        raise_counter=lambda value: None,
        random=bytes,
        now=SECOND,
    )
    number = dial(client)
    client.established(number, SECOND)
    accept = messages.Accept(
        uid=UID,
        log=1,
        kind="pty",
        epoch=1,
        node=b"N" * 32,
        name=name,
        agent="a",
        output=0,
        input=0,
        window=1000,
        keepalive=15,
        head=head,
    )
    give(client, number, Type.ACCEPT, 1, accept)
    assert client.active == number
    trouble, opened = client.next_event(), client.next_event()
    assert isinstance(trouble, Trouble)
    assert isinstance(opened, Opened)
    assert opened.accept.name.isprintable()
    events(client)
    return client, number


def dial(client: ClientMachine) -> int:
    while (action := client.next_action()) is not None:
        if isinstance(action, Dial):
            return action.connection
    raise AssertionError("the client does not dial")


def give(client: ClientMachine, number: int, kind: Type, handle: int, message: messages.Message) -> None:
    client.receive(number, encode(kind, handle, 0, messages.pack(message)), 2 * SECOND)


def events(client: ClientMachine) -> list[str]:
    found = []
    while (event := client.next_event()) is not None:
        found.append(type(event).__name__)
    return found


def test_displaced_by_its_own_resume_is_not_the_end() -> None:
    """The ERROR on the old connection may be read before RESUMED on the new one."""
    client, old = machine()
    client.suspect(2 * SECOND, "the address changed")
    new = dial(client)
    client.established(new, 2 * SECOND)
    give(client, old, Type.ERROR, 1, messages.error(Code.DISPLACED, "Resumed elsewhere."))
    assert not client.finished
    give(client, new, Type.RESUMED, 1, messages.Resumed(epoch=1, log=1, output=0, input=0))
    assert client.active == new
    assert "Failed" not in events(client)


def test_control_displaced_by_somebody_else_is_the_end() -> None:
    client, number = machine()
    give(client, number, Type.ERROR, 1, messages.error(Code.DISPLACED, "Resumed elsewhere."))
    assert client.finished
    assert events(client) == ["Failed"]


def test_a_wait_that_is_no_number_is_none() -> None:
    for wait in (float("nan"), float("inf"), -1e308):
        client, number = machine()
        give(client, number, Type.ERROR, 0, messages.error(Code.BUSY, "Busy.", retry_after=wait))
        assert not client.finished
        due = client.next_timeout()
        assert due is not None
        assert due <= 13 * SECOND


def test_an_acknowledgement_of_what_an_earlier_connection_carried_is_fine() -> None:
    client, old = machine()
    client.write(b"0123456789", SECOND)
    client.data_to_send()
    client.lost(old, 2 * SECOND)
    new = dial(client)
    client.established(new, 2 * SECOND)
    client.receive(new, encode(Type.RESUMED, 1, 0, messages.pack(messages.Resumed(1, 1, 0, 0)))
                   + encode(Type.ACK, 1, 10, (10).to_bytes(8, "big")), 2 * SECOND)  # fmt: skip
    assert client.active == new
    assert client.input.base == 10


def test_a_resize_between_resume_and_its_answer_is_not_lost() -> None:
    for resized in (True, False):
        client, old = machine()
        client.suspect(2 * SECOND, "the address changed")
        new = dial(client)
        client.established(new, 2 * SECOND)
        client.data_to_send()
        if resized:
            client.resize(90, 30)  # goes out on the old connection, which may be dead
        client.data_to_send()
        give(client, new, Type.RESUMED, 1, messages.Resumed(epoch=1, log=1, output=0, input=0))
        assert client.active == new != old
        said = b"".join(part for number, parts in client.data_to_send() if number == new for part in parts)
        assert (encode(Type.RESIZE, 1, 0, messages.pack(messages.Resize(90, 30))) in said) is resized


def test_what_a_node_says_carries_no_escape_sequences() -> None:
    """Names, reasons and errors are shown on the user's terminal."""
    hostile, clean = "a\x1b]52;c;eA==\x07b\n\x9b6nc" + "d" * 9_000, "a]52;c;eA==b6nc"
    client, number = machine()
    give(client, number, Type.EVENT, 1, messages.Event("joined", label=hostile, device=hostile))
    give(client, number, Type.CLOSE, 1, messages.Close(code=int(Code.AGENT_LOST), reason=hostile))
    notice, ended = client.next_event(), client.next_event()
    assert isinstance(notice, Notice)
    assert isinstance(ended, Ended)
    client, number = machine()
    give(client, number, Type.ERROR, 1, messages.error(Code.DISPLACED, hostile, address=hostile))
    failed = client.next_event()
    assert isinstance(failed, Failed)
    client, number = machine()
    give(client, number, Type.ERROR, 0, messages.error(Code.BUSY, hostile))
    trouble = client.next_event()
    assert isinstance(trouble, Trouble)
    client, number = machine(name=hostile)
    assert client.active == number
    said = [notice.event.label, notice.event.device, ended.close.reason, str(failed.error), failed.error.address]
    for text in (*said, trouble.reason):
        assert text is not None
        assert text.startswith(clean), text
        assert text.isprintable()
        assert len(text) <= TEXT_SHOWN_MAX_CHARS


PARTS_MAX = SNAPSHOT_MAX_BYTES // SNAPSHOT_PART_BYTES + 1


def give_parts(client: ClientMachine, number: int, count: int, data: bytes, *, last: bool) -> None:
    for index in range(count):
        part = messages.Snapshot(0, part=index, last=last and index + 1 == count, data=data)
        give(client, number, Type.SNAPSHOT, 1, part)


@pytest.mark.parametrize("size", [0, 1])
def test_a_snapshot_has_so_many_parts_and_no_more(size: int) -> None:
    """Parts of nothing would else be collected for ever."""
    client, number = machine()
    give_parts(client, number, PARTS_MAX + 1, b"x" * size, last=False)
    assert client.active is None
    trouble = client.next_event()
    assert isinstance(trouble, Trouble)
    assert "too many parts" in trouble.reason


def test_a_snapshot_is_so_large_and_no_larger() -> None:
    client, number = machine()
    give_parts(client, number, PARTS_MAX, b"x" * SNAPSHOT_PART_BYTES, last=False)
    assert client.active is None
    trouble = client.next_event()
    assert isinstance(trouble, Trouble)
    assert "too large" in trouble.reason


def test_the_bounds_are_those_of_one_snapshot() -> None:
    client, number = machine()
    for _ in range(2):
        give_parts(client, number, PARTS_MAX - 1, b"x" * SNAPSHOT_PART_BYTES, last=False)
        give_parts(client, number, PARTS_MAX - 1, b"y" * SNAPSHOT_PART_BYTES, last=True)
        screen = client.next_event()
        assert isinstance(screen, Screen)
        assert screen.data == b"y" * SNAPSHOT_PART_BYTES * (PARTS_MAX - 1)
    assert client.active == number


# ---- back on another connection ------------------------------------------------------------------------------------


def back(resumed: messages.Resumed) -> tuple[ClientMachine, int]:
    """A client that has output up to position 10 and is resumed on a new connection."""
    client, old = machine()
    client.receive(old, encode(Type.DATA, 1, 0, b"0123456789"), 2 * SECOND)
    events(client)
    client.lost(old, 2 * SECOND)
    new = dial(client)
    client.established(new, 2 * SECOND)
    give(client, new, Type.RESUMED, 1, resumed)
    assert client.active == new
    return client, new


def output(client: ClientMachine) -> list[tuple[int, bytes]]:
    """The output that the client passes on, each piece with its end."""
    found = []
    while (event := client.next_event()) is not None:
        if isinstance(event, Output):
            found.append((event.end, event.data))
    return found


def test_what_the_old_connection_brought_beyond_resumed_is_neither_lost_nor_doubled() -> None:
    client, number = back(messages.Resumed(epoch=1, log=1, output=4, input=0, head=20))
    client.receive(number, encode(Type.DATA, 1, 4, b"456789abc"), 2 * SECOND)
    assert output(client) == [(13, b"abc")]


def test_output_of_another_log_is_taken_from_where_the_node_says() -> None:
    """Its positions have nothing to do with those of before, even where both ranges overlap."""
    client, number = back(messages.Resumed(epoch=1, log=2, output=4, input=0, head=20, lost=Lost(10, 10)))
    client.receive(number, encode(Type.DATA, 1, 4, b"another log"), 2 * SECOND)
    assert output(client) == [(15, b"another log")]
    assert client.log == 2


def test_a_client_that_was_ahead_of_the_nodes_log_takes_what_takes_its_place() -> None:
    client, number = back(messages.Resumed(epoch=1, log=1, output=0, input=0, head=8, lost=Lost(10, 10)))
    client.receive(number, encode(Type.DATA, 1, 0, b"new bytes, more"), 2 * SECOND)
    assert output(client) == [(15, b"new bytes, more")]


def replayed(client: ClientMachine, number: int, at: int, *pieces: bytes) -> list[bool]:
    """Which of these pieces of output, the first of them at `at`, count as history."""
    for piece in pieces:
        client.receive(number, encode(Type.DATA, 1, at, piece), 2 * SECOND)
        at += len(piece)
    found = []
    while (event := client.next_event()) is not None:
        if isinstance(event, Output):
            found.append(event.replayed)
    return found


def test_output_is_history_up_to_the_head_that_the_node_named() -> None:
    """A terminal answers no question in it; the byte at the head is new."""
    client, number = machine(head=10)
    assert replayed(client, number, 0, b"01234", b"56789", b"a") == [True, True, False]
    client, number = back(messages.Resumed(epoch=1, log=1, output=4, input=0, head=20))
    assert replayed(client, number, 10, b"0123456789", b"a") == [True, False]
    client, number = machine()
    assert replayed(client, number, 0, b"0") == [False], "nothing was said before"


def acknowledged(client: ClientMachine, position: int) -> list[int]:
    """What a client acknowledges once output is handled up to a position, and all time for that has passed."""
    client.handled(position, 2 * SECOND)
    client.handle_timeout(2 * SECOND + ACK_DELAY_MS * MILLISECOND)
    sent = b"".join(part for _, parts in client.data_to_send() for part in parts)
    return [int.from_bytes(frame[3], "big") for frame in Decoder().feed(sent) if frame[0] == Type.ACK]


@pytest.mark.parametrize("log", [1, 2])
def test_nothing_is_acknowledged_in_a_log_that_the_client_is_not_in_yet(log: int) -> None:
    """A position of the log before would skip output of the new one, which the picture still is to stand for."""
    resumed = messages.Resumed(1, log, 50, 0, lost=Lost(10, 50), snapshot=True, head=80)
    client, number = back(resumed)
    assert acknowledged(client, 10) == ([10] if log == 1 else [])
    give(client, number, Type.SNAPSHOT, 1, messages.Snapshot(80, data=b"picture", lost=Lost(10, 80)))
    client.receive(number, encode(Type.DATA, 1, 80, b"more"), 2 * SECOND)
    assert acknowledged(client, 84) == [84]


@pytest.mark.parametrize(
    ("forgotten", "wanted", "again", "named"),
    [(True, 6, [(6, b"6789")], [(2, 6)]), (False, 6, [(6, b"6789")], []), (False, None, [], [(2, 10)])],
    ids=["a forgotten lane", "a known lane", "an agent that is gone"],
)
def test_exactly_the_input_that_may_be_lost_is_named(
    forgotten: bool, wanted: int | None, again: list[tuple[int, bytes]], named: list[tuple[int, int]]
) -> None:
    """What was acknowledged is not, what the node wants again is sent again."""
    client, old = machine()
    client.write(b"0123456789", SECOND)
    client.data_to_send()
    client.receive(old, encode(Type.ACK, 1, 2, (2).to_bytes(8, "big")), SECOND)
    client.lost(old, 2 * SECOND)
    new = dial(client)
    client.established(new, 2 * SECOND)
    assert asked(client, new).sent == 10
    give(client, new, Type.RESUMED, 1, messages.Resumed(1, 1, 0, wanted, forgotten=forgotten))
    sent = b"".join(part for _, parts in client.data_to_send() for part in parts)
    assert [frame[2:] for frame in Decoder().feed(sent) if frame[0] == Type.DATA] == again
    found = []
    while (event := client.next_event()) is not None:
        if isinstance(event, Uncertain):
            found.append((event.start, event.end))
    assert found == named


# ---- a gap that a picture stands for -------------------------------------------------------------------------------


def overtaken(resumed: messages.Resumed) -> tuple[ClientMachine, int]:
    """A client at position 4 that resumes, has position 10 from its old connection before that is answered."""
    client, old = machine()
    client.receive(old, encode(Type.DATA, 1, 0, b"0123"), 2 * SECOND)
    client.suspect(2 * SECOND, "the machine slept")
    new = dial(client)
    client.established(new, 2 * SECOND)
    assert asked(client, new).output == 4
    client.receive(old, encode(Type.DATA, 1, 4, b"456789"), 2 * SECOND)
    events(client)
    give(client, new, Type.RESUMED, 1, resumed)
    assert client.active == new
    return client, new


def asked(client: ClientMachine, number: int) -> messages.ResumeBody:
    """The RESUME that the client has sent on a connection."""
    sent = b"".join(part for at, parts in client.data_to_send() if at == number for part in parts)
    (resume,) = [frame[3] for frame in Decoder().feed(sent) if frame[0] == Type.RESUME]
    return messages.unpack(messages.ResumeBody, messages.unpack(messages.Signed, resume).body)


def gaps(client: ClientMachine) -> list[tuple[int, int]]:
    found = []
    while (event := client.next_event()) is not None:
        if isinstance(event, Gap):
            found.append((event.start, event.end))
    return found


@pytest.mark.parametrize("snapshot", [True, False])
def test_what_came_before_the_answer_to_resume_does_not_count_as_lost(snapshot: bool) -> None:
    client, new = overtaken(messages.Resumed(1, 1, 50, 0, lost=Lost(4, 50), snapshot=snapshot, head=80))
    if snapshot:
        assert gaps(client) == []
        give(client, new, Type.SNAPSHOT, 1, messages.Snapshot(80, 0, False, data=b"pic", lost=Lost(4, 80)))
        give(client, new, Type.SNAPSHOT, 1, messages.Snapshot(80, 1, True, data=b"ture"))
    assert gaps(client) == [(10, 80 if snapshot else 50)]
    end = client.intake.next
    client.receive(new, encode(Type.DATA, 1, end, b"more"), 2 * SECOND)
    assert output(client) == [(end + 4, b"more")]


@pytest.mark.parametrize(
    ("log", "lost", "named"), [(1, Lost(4, 50), (10, 50)), (2, Lost(4, 50), (4, 50)), (1, Lost(4, 8), (8, 8))], ids=str
)
def test_a_gap_begins_where_output_of_that_log_ended(log: int, lost: Lost, named: tuple[int, int]) -> None:
    client, _ = back(messages.Resumed(1, log, lost.end, 0, lost=lost, head=lost.end))
    assert gaps(client) == [named]


@pytest.mark.parametrize("log", [1, 2])
@pytest.mark.parametrize("parts", [0, 1])
def test_a_picture_that_did_not_come_leaves_no_silent_hole(log: int, parts: int) -> None:
    """The connection is lost before all of it is there: what it stands for is asked for again, and named once."""
    client, new = overtaken(messages.Resumed(1, log, 50, 0, lost=Lost(4, 50), snapshot=True, head=80))
    for part in range(parts):
        give(client, new, Type.SNAPSHOT, 1, messages.Snapshot(80, part, False, data=b"pic", lost=Lost(4, 80)))
    client.lost(new, 2 * SECOND)
    number = dial(client)
    client.established(number, 2 * SECOND)
    again = asked(client, number)
    assert (again.output, again.log) == (10, 1)
    give(client, number, Type.RESUMED, 1, messages.Resumed(1, log, 60, 0, lost=Lost(10, 60), snapshot=True, head=90))
    give(client, number, Type.SNAPSHOT, 1, messages.Snapshot(90, data=b"picture", lost=Lost(10, 90)))
    assert gaps(client) == [(10, 90)]
    client.lost(number, 2 * SECOND)
    number = dial(client)
    client.established(number, 2 * SECOND)
    again = asked(client, number)
    assert (again.output, again.log) == (90, log)


def test_a_picture_names_only_what_it_stands_for_itself() -> None:
    client, number = machine()
    for part in (
        messages.Snapshot(50, 0, False, data=b"never whole", lost=Lost(0, 50)), messages.Snapshot(60, data=b"whole"),
    ):  # fmt: skip
        give(client, number, Type.SNAPSHOT, 1, part)
    assert gaps(client) == [], "what stood for it never came"
    for part in (messages.Snapshot(90, data=b"one", lost=Lost(60, 90)), messages.Snapshot(95, data=b"next")):
        give(client, number, Type.SNAPSHOT, 1, part)
    assert gaps(client) == [(60, 90)]
