"""`sterna send`, `capture` and `wait`: sessions for scripts."""

from __future__ import annotations

import codecs
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from sterna.cli.duration import DURATION, in_words
from sterna.cli.options import node_options
from sterna.errors import Code, RefusedError, UsageError

if TYPE_CHECKING:
    from sterna.client.blocking import BlockingSession
    from sterna.client.endpoint import Endpoint
    from sterna.client.session import Wish
    from sterna.pod.screen import Terminal
    from sterna.protocol.messages import Mode

_TAIL_CHARS = 64 * 1024
_CHUNK_BYTES = 64 * 1024
_SETTLE_SECONDS = 0.05
_AT_THE_END = 1 << 62  # output from here on: none of what there was
_CONTROLS = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]P^_X][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]"
)
_UNFINISHED = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[\]P^_X][^\x07\x1b]*\x1b?|[ -/]*)?\Z")
_SEQUENCE_MAX_CHARS = 4_096
# RIS and every OSC (titles, colours, links); what _SKIPPED is, terminals skip within a sequence.
_SKIPPED = rb"[\x00-\x17\x19\x1c-\x1f\x7f]*+"
_RESETS_AND_TITLES = re.compile(
    rb"\x1b" + _SKIPPED + rb"c|(?:\x1b" + _SKIPPED + rb"\]|\xc2\x9d)[^\x07\x18\x1a\x1b\xc2]*+"
    rb"(?:\xc2(?!\x9c)[^\x07\x18\x1a\x1b\xc2]*+)*+(?:\x07|\x1b\\|\xc2\x9c)?"
)


def _join(endpoint: Endpoint, wish: Wish, state: str | None, mode: Mode, **more: Any) -> BlockingSession:
    """Returns the session, opened."""
    from sterna.client.blocking import BlockingSession
    from sterna.client.session import make_machine

    session = BlockingSession(make_machine(endpoint, wish, state=state, mode=mode, **more), endpoint)
    try:
        session.open(None)
    except BaseException:
        session.abort()
        raise
    return session


@click.command()
@click.argument("session")
@click.argument("text")
@click.option("--enter", is_flag=True, help="Press Enter after it.")
@click.option(
    "--timeout", type=DURATION, default="30s", show_default=True, help="How long the program may take to take it."
)
@node_options
def send(
    session: str, text: str, enter: bool, timeout: float, state: str | None, host: str | None, port: int | None
) -> None:
    """Type TEXT into SESSION (`-` reads it from standard input); returns when the program's terminal has it."""
    from sterna.cli.target import named_session

    endpoint, wish, about = named_session(session, state=state, host=host, port=port)
    if about["state"] == "exited":
        raise RefusedError(
            Code.ENDED, f"The program of {about['name']} has ended; `sterna capture` shows what it left."
        )
    deadline = time.monotonic() + timeout
    line = _join(endpoint, wish, state, "drive", exact=True, output=_AT_THE_END)
    try:
        if text == "-":
            while chunk := os.read(0, _CHUNK_BYTES):
                line.write(chunk, timeout=timeout)
                deadline = time.monotonic() + timeout
        else:
            line.write(text.encode("utf-8", "surrogateescape"), timeout=timeout)
        if enter:
            line.write(b"\r" if line.accept.kind == "pty" else b"\n", timeout=timeout)
        line.drain(timeout=max(deadline - time.monotonic(), 0.1))
    except TimeoutError:
        text = (
            f"The program of {about['name']} did not take the text within {in_words(timeout)}; part of it may be there."
        )
        raise RefusedError(Code.TIMEOUT, text) from None
    finally:
        line.leave_unread()


# ---- what a terminal shows -------------------------------------------------------------------------------------


def _open_screen(about: dict[str, Any]) -> Terminal:
    """Returns a terminal of the session's size: the node's word, else its first terminal's, else 80 x 24."""
    from sterna.pod.screen import open_terminal

    cols, rows = about.get("cols", 0), about.get("rows", 0)
    for attachment in about.get("attachments", []):
        if not cols and attachment["mode"] == "drive":
            cols, rows = attachment["cols"], attachment["rows"]
    return open_terminal(cols or 80, rows or 24)


def _catch_up(session: BlockingSession, timeout: float | None) -> bytes:
    """Returns what repaints the screen, or the output that is kept, up to where it was when we came."""
    head, parts = session.accept.head, []
    while session.unread or session.position < head:
        data = session.read(timeout=timeout)
        if not data:
            break
        parts.append(data)
    return b"".join(parts)


@click.command()
@click.argument("session")
@click.option("--scrollback", is_flag=True, help="Also the lines above the screen.")
@click.option("--ansi", is_flag=True, help="With colours and other attributes.")
@click.option("--timeout", type=DURATION, default="10s", show_default=True, help="How long it may take.")
@node_options
def capture(
    session: str, scrollback: bool, ansi: bool, timeout: float, state: str | None, host: str | None, port: int | None
) -> None:
    """Print what the screen of SESSION shows; without a terminal, the output that is kept."""
    from sterna.cli.target import named_session

    endpoint, wish, about = named_session(session, state=state, host=host, port=port)
    with _join(endpoint, wish, state, "watch") as view:
        try:
            data = _catch_up(view, timeout)
        except TimeoutError:
            raise RefusedError(Code.TIMEOUT, f"The screen did not come within {in_words(timeout)}.") from None
    out = sys.stdout.buffer
    if about["kind"] != "pty":
        out.write(_harmless(data) if out.isatty() else data)
    else:
        screen = _open_screen(about)
        screen.feed(data)
        lines = _painted(screen, scrollback) if ansi else screen.text(scrollback=scrollback).split("\n")
        while lines and not lines[-1]:
            lines.pop()
        out.write("".join(line + "\n" for line in lines).encode("utf-8", "replace"))
        screen.close()
    out.flush()


def _harmless(data: bytes) -> bytes:
    """Returns output as a terminal may get it: it asks and changes nothing, and what it turns on is undone."""
    from sterna.client.queries import REPLAY, QueryFilter
    from sterna.client.terminal import ModeTracker

    # ST stands for what is dropped: else the bytes around it could make another sequence.
    queries, modes = QueryFilter(REPLAY), ModeTracker()
    shown = _RESETS_AND_TITLES.sub(b"\x1b\\\\", queries.feed(data) + queries.flush())
    modes.feed(shown)
    return shown + modes.undo()


def _painted(screen: Terminal, scrollback: bool) -> list[str]:
    """Returns the lines with their attributes (SGR), each complete in itself."""
    lines = []
    for row in screen.cells(scrollback=scrollback):
        runs = list(row.runs)
        while runs and not runs[-1].text and not runs[-1].background:
            runs.pop()
        line = ""
        for run in runs:
            look = (run.style + run.background).decode()
            text = run.text or " " * run.width
            line += f"\x1b[0{look}m{text}\x1b[0m" if look else text
        lines.append(line)
    return lines


# ---- wait ------------------------------------------------------------------------------------------------------


class _Text:
    """The plain text of output: without escape sequences, also those cut in two; the last _TAIL_CHARS stay."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self.text = ""

    def feed(self, data: bytes) -> None:
        text = self._rest + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text)
        self._rest = ""
        if unfinished is not None and len(unfinished[0]) <= _SEQUENCE_MAX_CHARS:
            self._rest, text = unfinished[0], text[: unfinished.start()]
        self.text = (self.text + _CONTROLS.sub("", text.replace("\r\n", "\n")))[-_TAIL_CHARS:]


@click.command()
@click.argument("session")
@click.option("--exit", "ending", is_flag=True, help="Until its program ends; prints the exit status. The default.")
@click.option("--match", metavar="RE", help="Until its screen or output matches this regular expression.")
@click.option("--idle", type=DURATION, help="Until it has printed nothing for so long.")
@click.option("--from-now", is_flag=True, help="With --match: ignore what is there already.")
@click.option("--timeout", type=DURATION, help="Give up after this time (default: never).")
@node_options
def wait(
    session: str, ending: bool, match: str | None, idle: float | None, from_now: bool, timeout: float | None,
    state: str | None, host: str | None, port: int | None,
) -> None:  # fmt: skip
    """Wait for the end of SESSION's program, a text, or quiet; exit status 0 if it came, 1 if not."""
    from sterna.cli.target import named_session

    if ending + (match is not None) + (idle is not None) > 1:
        raise UsageError("Wait for one thing at a time: --exit, --match or --idle.")
    try:
        pattern = re.compile(match, re.MULTILINE) if match is not None else None
    except re.error as error:
        raise UsageError(f"{match!r} is no regular expression: {error}.") from None
    endpoint, wish, about = named_session(session, state=state, host=host, port=port)
    deadline = None if timeout is None else time.monotonic() + timeout
    name = about["name"]
    # Only --match needs what is there already.
    start = None if pattern is not None and not from_now else _AT_THE_END
    with _join(endpoint, wish, state, "watch", output=start) as view:
        try:
            if pattern is not None:
                _wait_match(view, pattern, about, deadline)
            elif idle is not None:
                _wait_idle(view, idle, deadline)
            else:
                print(_wait_exit(view, deadline))
        except TimeoutError:
            raise RefusedError(Code.TIMEOUT, f"{name}: it did not happen within {in_words(timeout or 0)}.") from None


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0)


def _wait_exit(view: BlockingSession, deadline: float | None) -> int:
    while view.read(timeout=_left(deadline)):
        pass
    status = view.exit_status
    if status is None:
        raise RefusedError(Code.ENDED, f"The session {view.name} is over, but nobody knows its program's exit status.")
    return status


def _wait_idle(view: BlockingSession, idle: float, deadline: float | None) -> None:
    while True:
        left = _left(deadline)
        try:
            if not view.read(timeout=idle if left is None else min(idle, left)):
                return
        except TimeoutError:
            if left is not None and left < idle:
                raise
            return


def _wait_match(view: BlockingSession, pattern: re.Pattern[str], about: dict[str, Any], deadline: float | None) -> None:
    """Looks at the output as it comes and, whenever it pauses, at the screen."""
    seen = _Text()
    screen = _open_screen(about) if about["kind"] == "pty" else None
    data = _catch_up(view, _left(deadline))
    repainted = view.accept.snapshot
    while True:
        if screen is not None:
            screen.feed(data)
        if not repainted:
            seen.feed(data)
        if pattern.search(screen.text() if repainted and screen is not None else seen.text):
            return
        repainted = False
        try:
            left = _left(deadline)
            data = view.read(timeout=_SETTLE_SECONDS if left is None else min(left, _SETTLE_SECONDS))
        except TimeoutError:
            if screen is not None and pattern.search(screen.text()):
                return
            data = view.read(timeout=_left(deadline))
        if not data:
            raise RefusedError(Code.ENDED, f"The session {view.name} ended before anything matched.")
