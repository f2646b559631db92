"""What a node that is hostile to its own users can do to their terminals: nothing."""

from __future__ import annotations

import socket
import threading
from collections import deque
from pathlib import Path

import msgspec
import pytest

from sterna.cli import commands, main
from sterna.client.attach import Attach, AttachOptions
from sterna.client.calls import Caller
from sterna.client.endpoint import Endpoint
from sterna.client.queries import LIVE, QueryFilter
from sterna.client.status import OutputTail, StatusLine
from sterna.errors import Code, RefusedError
from sterna.ids import NodeId
from sterna.limits import TEXT_SHOWN_MAX_CHARS
from sterna.protocol import messages
from sterna.protocol.client import Output, Screen
from sterna.protocol.frame import Type
from sterna.protocol.link import Link

HOSTILE, CLEAN = "a\x1b]52;c;eA==\x07b\n\x9b6nc", "a]52;c;eA==b6nc"


def answer(listener: socket.socket, results: deque[messages.Result]) -> None:
    """A node that accepts one client and answers its calls with `results`."""
    sock, _ = listener.accept()
    link = Link()
    with sock:
        while data := sock.recv(65536):
            for kind, handle, _, payload in link.receive(data):
                if kind == Type.CONNECT:
                    link.send_message(
                        Type.ACCEPT, handle, messages.Accept(b"u" * 16, 1, "pty", 1, b"n" * 32, "n", "a", 0, 0, 1, 15)
                    )
                elif kind == Type.CALL:
                    number = messages.unpack(messages.Call, payload).id
                    link.send_message(Type.RESULT, 0, msgspec.structs.replace(results.popleft(), id=number))
            sock.sendall(b"".join(link.data_to_send()))


def test_answers_to_calls_carry_no_escape_sequences(tmp_path: Path) -> None:
    found = {"sessions": [{"name": HOSTILE, HOSTILE: 1, "long": "x" * 9_000}], "bytes": b"\x1b[6n"}
    results = deque(
        (
            messages.Result(0, msgspec.Raw(messages.pack(found))),
            messages.Result(0, error=messages.error(Code.NOT_FOUND, HOSTILE, address=HOSTILE)),
        )
    )
    address = str(tmp_path / "node.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        node = threading.Thread(target=answer, args=(listener, results))
        node.start()
        endpoint = Endpoint("here", [(socket.AF_UNIX, address)], NodeId(b"n" * 32), context=None, credential="")
        with Caller(endpoint, state=str(tmp_path / "state")) as caller:
            value = caller.call("list")
            with pytest.raises(RefusedError) as refused:
                caller.call("info")
        node.join()
    session = {"name": CLEAN, CLEAN: 1, "long": "x" * TEXT_SHOWN_MAX_CHARS}
    assert value == {"sessions": [session], "bytes": b"\x1b[6n"}
    assert (str(refused.value), refused.value.address) == (CLEAN, CLEAN)


def test_errors_keep_only_their_newlines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: object) -> None:
        raise RefusedError(Code.DENIED, HOSTILE)

    monkeypatch.setattr(commands.cli, "main", fail)
    monkeypatch.delenv("STERNA_DEBUG", raising=False)
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == "sterna: a]52;c;eA==b\n6nc\n"


def painting(monkeypatch: pytest.MonkeyPatch, *, clipboard: bool) -> tuple[Attach, deque[tuple[bytes, int]]]:
    """A client whose terminal takes nothing: what it would write stays in the queue."""
    run = Attach.__new__(Attach)
    run._options = AttachOptions()
    run._options.clipboard = clipboard
    run._filter = QueryFilter(LIVE, clipboard=clipboard)
    run._painted, run._typist, run._notifier = False, True, None
    run._status = StatusLine("n", OutputTail(), None, None)  # type: ignore[arg-type]  # it is never shown here
    run._queue = deque()
    monkeypatch.setattr(run, "_flush", lambda _events: None)
    return run, run._queue


@pytest.mark.parametrize("clipboard", [False, True])
def test_a_picture_of_the_screen_asks_nothing_and_sets_no_clipboard(
    monkeypatch: pytest.MonkeyPatch, clipboard: bool
) -> None:
    run, queue = painting(monkeypatch, clipboard=clipboard)
    erase = b"\x1b[0m\x1b[H\x1b[J\x1b[3J"
    harmful = b"\x1b]52;c;eA==\x07\x1b[6n" + "\x9d52;c;eA==\x9c\x9b6n".encode() + b"\x1b]11;?\x07"
    run._screen(Screen(erase + b"text" + harmful + b"\x1b]2;a title\x1b\\\x1b[?2004h", 7, False))
    run._screen(Screen(erase + b"more", 9, False))
    title = b"\x1b]2;a title\x1b\\\x1b[?2004h"
    assert list(queue) == [(b"\x1b[0m\x1b[H\x1b[Jtext" + title, 7), (erase + b"more", 9)]


def test_the_output_goes_on_within_the_sequence_that_a_picture_ends_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for begin, end, out in (
        (b"\x1b]52;c", b";eA==\x07x", b"x"),
        (b"\x1b[38;5", b";9mx", b"\x1b[38;5;9mx"),
        (b"\x1b]2;half a ti", b"tle\x07x", b"\x1b]2;half a title\x07x"),
    ):
        run, queue = painting(monkeypatch, clipboard=False)
        run._screen(Screen(b"text" + begin, 7, False))
        run._output(Output(end, 7 + len(end), False))
        assert b"".join(data for data, _ in queue) == b"text" + out
