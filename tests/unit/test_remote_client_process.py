"""The client's process: frames in any order, and input whose confirmation is looked at."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from sterna.remote import Exit, Output, Process, ProcessLostError
from sterna.remote.client import Client
from sterna.remote.clientcalls import Reattached
from sterna.remote.clientwire import Message


class Quiet:
    """What a process needs of its client; requests are kept and never answered."""

    def __init__(self) -> None:
        self.posted: list[dict[str, object]] = []
        self.asked = self.over = 0

    def post(self, _method: str, params: dict[str, object]) -> asyncio.Future[Any]:
        self.posted.append(params)
        return asyncio.get_running_loop().create_future()

    def reattach(self, process: Process) -> None:
        self.asked += 1
        process.attaching()

    def ended(self, _process: Process) -> None:
        self.over += 1

    def level(self, _process: Process, *, full: bool, overfull: bool) -> None:
        pass


def made() -> tuple[Quiet, Process]:
    client = Quiet()
    process = Process(cast("Client", client), "p")
    process.begun(5, 1.5)
    return client, process


def frame(seq: int, data: bytes = b"") -> Message:
    return Message(type="stream", process_id="p", stream="stdout" if data else "exit", seq=seq, data=data, exit_code=0)


def found(applied: int, last: int = 0) -> Reattached:
    return Reattached(
        found=True, running=True, first_seq=min(1, last), last_seq=last, stdin_applied=applied, pid=5, start_time=1.5
    )


async def test_early_frames_count_once() -> None:
    client, process = made()
    for seq, data in ((3, b"c"), (3, b"c"), (4, b""), (2, b"b"), (3, b"c")):
        process.frame(frame(seq, data))
    assert client.asked == 1, "what is missing is asked for"
    assert process.duplicates == 2
    process.frame(frame(1, b"a"))
    for seq in (1, 3, 4):
        process.frame(frame(seq, b"x"))
    assert process.duplicates == 5
    events = [event async for event in process]
    assert [event.data for event in events if isinstance(event, Output)] == [b"a", b"b", b"c"]
    assert events[-1] == Exit(0, 4)
    assert process._queued == 0


async def test_input_that_was_confirmed_and_is_gone_is_noticed() -> None:
    client, process = made()
    process._input_start = 7  # confirmed
    await process.write(b"abc")
    process.lost()
    process.attaching()
    process.reattached(found(6))
    with pytest.raises(ProcessLostError, match="lost input"):
        await process.drain()
    with pytest.raises(ProcessLostError, match="lost input"):
        await process.write(b"more")
    assert [params["offset"] for params in client.posted] == [7], "nothing is sent to who knows where"


async def test_what_a_new_connection_confirms_is_not_sent_again() -> None:
    client, process = made()
    await process.write(b"abc")
    await process.write(b"def")
    process.lost()
    process.attaching()
    process.reattached(found(4))
    assert [(params["data"], params["offset"]) for params in client.posted] == [
        (b"abc", 0), (b"def", 3), (b"ef", 4),
    ]  # fmt: skip
    assert process.applied == 4
