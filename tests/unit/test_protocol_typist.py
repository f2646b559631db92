"""Who answers the program's questions is told to whom it concerns, each time and to nobody else."""

from __future__ import annotations

import pytest

from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.attachment import Attachment
from sterna.protocol.frame import Type
from tests.unit.test_protocol_session import NOW, attach, attachment, opened, sent, session

TURNS = 1_000


def terminal(letter: bytes) -> Attachment:
    made = attachment(letter, exact=False)
    made.answers = True
    return made


def told(who: Attachment) -> list[int | None]:
    """What a terminal was told since the last time: 1 that it answers, 0 that it does not."""
    events = [messages.unpack(messages.Event, frame[3]) for frame in sent(who.link) if frame[0] == Type.EVENT]
    return [event.count for event in events if event.kind == "typist"]


def test_two_who_type_in_turn_cost_nobody_else_a_frame() -> None:
    target = session()
    first, second, *others = [terminal(letter) for letter in (b"a", b"b", b"c", b"d")]
    opened(target)
    for each in (*others, first, second):
        attach(target, each)
    assert [told(each)[-1] for each in (first, second, *others)] == [0, 1, 0, 0]
    for turn in range(TURNS):
        target.client_input(first, Type.DATA, turn, b"x", NOW)
        target.client_input(second, Type.DATA, turn, b"y", NOW)
        assert (told(first), told(second)) == ([1, 0], [0, 1])
    assert [told(each) for each in others] == [[], []]
    target.client_input(others[0], Type.DATA, 0, b"z", NOW)
    assert [told(each) for each in (first, second, *others)] == [[], [0], [1], []]


@pytest.mark.parametrize("resized", [False, True], ids=["types", "is resized"])
def test_who_is_left_alone_answers_again(resized: bool) -> None:
    target, first, second = session(), terminal(b"a"), terminal(b"b")
    opened(target)
    attach(target, first)
    assert told(first) == [], "who is alone answers anyway"
    attach(target, second)
    assert (told(first), told(second)) == ([0], [1])
    target.detach(second, NOW)
    if resized:
        target.client_resize(first, 90, 30, NOW)
    else:
        target.client_input(first, Type.DATA, 0, b"x", NOW)
    assert told(first) == [1]
    again = terminal(b"b")
    attach(target, again)
    assert (told(first), told(again)) == ([0], [1]), "a new connection knows nothing"


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "is shown out"])
def test_nothing_is_kept_of_who_left(leaves: bool) -> None:
    target, stays = session(), terminal(b"a")
    opened(target)
    attach(target, stays)
    for _ in range(5):
        guest = terminal(b"b")
        attach(target, guest)
        assert guest in target._answering._told
        if leaves:
            target.detach(guest, NOW)
        else:
            target.displace(stays, Code.REVOKED, "Its access was revoked.", NOW)
        assert list(target._answering._told) == [stays]
