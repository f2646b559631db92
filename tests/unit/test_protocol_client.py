"""The client's machine, one situation at a time: what a hostile node or an unlucky order of packets must not do."""

from __future__ import annotations

import pytest

from sterna.errors import Code
from sterna.limits import SNAPSHOT_MAX_BYTES, SNAPSHOT_PART_BYTES, TEXT_SHOWN_MAX_CHARS
from sterna.protocol import messages
from sterna.protocol.client import ClientMachine, Dial, Ended, Failed, Notice, Opened, Screen, Trouble
from sterna.protocol.frame import Type, encode

SECOND = 1_000_000_000
UID = b"U" * 16


def machine(name: str = "n") -> tuple[ClientMachine, int]:
    """A client whose first connection carries its session."""
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
