"""`sterna` with a client that is broken on purpose, for the tests' controls: broken_attach.py HOW ARGUMENTS…"""

from __future__ import annotations

import sys
from typing import Any

from sterna.cli.main import main
from sterna.client import attach
from sterna.client.attach import Attach
from sterna.client.queries import LIVE, QueryFilter
from sterna.client.status import StatusLine
from sterna.protocol import compress
from sterna.protocol.client import ClientMachine, Output, Screen
from sterna.protocol.compress import decompress

MARK = b"broken here"


def _break_output(how: str) -> None:
    original = Attach._output

    def output(self: Attach, event: Output) -> None:
        data = event.data
        at = data.find(MARK)
        if at >= 0 and how == "drop":
            data = data[:at] + data[at + 1 :]
        elif at >= 0 and how == "swap":
            data = data[at:] + data[:at]
        original(self, Output(data, event.end, event.replayed))

    attach.Attach._output = output  # type: ignore[method-assign]  # breaking it is the purpose


def _break_snapshot(without: bytes) -> None:
    original = Attach._screen

    def screen(self: Attach, event: Screen) -> None:
        data = decompress(event.data) if event.zstd else event.data
        original(self, Screen(data.replace(without, b""), event.position, False))

    attach.Attach._screen = screen  # type: ignore[method-assign]  # breaking it is the purpose


def _skip_snapshots() -> None:
    original = Attach._screen
    first = iter((True,))

    def screen(self: Attach, event: Screen) -> None:
        if next(first, False):
            original(self, event)
            return
        self._queue.append((b"", event.position))
        self._flush(0)

    attach.Attach._screen = screen  # type: ignore[method-assign]  # breaking it is the purpose


def _answer_everything() -> None:
    def feed(self: QueryFilter, data: bytes) -> bytes:
        return data

    QueryFilter.feed = feed  # type: ignore[method-assign]  # breaking it is the purpose
    assert LIVE


def _leave_status() -> None:
    def end(self: StatusLine) -> bytes:
        self._since_ns = None
        self._forget()
        return b""

    StatusLine.end = end  # type: ignore[method-assign]  # breaking it is the purpose


def _swallow_bombs() -> None:
    """Breaks the bound on what a picture unpacks to."""
    names = vars(compress)
    names["decompress"] = lambda data, *_: names["zstd"].decompress(data)


def _drop_resizes() -> None:
    original = ClientMachine.resize

    def resize(self: ClientMachine, cols: int, rows: int) -> None:
        if (cols, rows) != (80, 24):
            original(self, cols, rows)

    ClientMachine.resize = resize  # type: ignore[method-assign]  # breaking it is the purpose


def break_(how: str) -> None:
    """Breaks the client.

    `drop` and `swap` bytes where the output says MARK; `answers` lets every query pass; `status` leaves the status
    line; `blind` skips all snapshots but the first; `bombs` lets them unpack to any size; `size` keeps back
    that the terminal is 80 x 24 cells again; anything else are bytes, in hexadecimal, that snapshots then lack.
    """
    ways: dict[str, Any] = {
        "answers": _answer_everything,
        "status": _leave_status,
        "blind": _skip_snapshots,
        "bombs": _swallow_bombs,
        "size": _drop_resizes,
    }
    if how in ("drop", "swap"):
        _break_output(how)
    elif how in ways:
        ways[how]()
    else:
        _break_snapshot(bytes.fromhex(how))


if __name__ == "__main__":
    break_(sys.argv.pop(1))
    main()
