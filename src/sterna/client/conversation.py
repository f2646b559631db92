"""What a session looks like to a program that uses the library: bytes in order, what happened, how it ended.

No loop: `sterna.client.aio` and `sterna.client.blocking` drive it, each in its own way.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from sterna.client.endpoint import Endpoint, find
from sterna.client.session import Wish
from sterna.errors import Code, RefusedError, SternaError, UsageError
from sterna.protocol.client import (
    ClientMachine,
    Ended,
    Event,
    Failed,
    Gap,
    Notice,
    Opened,
    Output,
    Screen,
    Suspended,
    Trouble,
    Uncertain,
)
from sterna.protocol.messages import Accept, Close
from sterna.trust.links import is_link

HAPPENINGS_MAX = 1_000

Happening = Gap | Uncertain | Trouble | Notice
"""What a program may want to know beside the bytes; see the classes in `sterna.protocol.client`."""


def usual_state(state: str | None) -> str | None:
    """Returns the state directory that is meant: the one given, else $STERNA_STATE, else None for the usual place."""
    return state if state is not None else os.environ.get("STERNA_STATE") or None


class Plan:
    """Where to connect and what to ask for, in this order until one is found."""

    __slots__ = ("endpoint", "target", "wishes")

    def __init__(self, endpoint: Endpoint, wishes: list[Wish], target: str) -> None:
        self.endpoint = endpoint
        self.wishes = wishes
        self.target = target

    def goes_on(self, wish: Wish, error: SternaError) -> bool:
        """Tells whether the next wish is to be tried after `wish` failed with `error`."""
        return wish is not self.wishes[-1] and error.code in (Code.NO_AGENT, Code.NOT_FOUND, Code.DENIED)

    def refusal(self, error: SternaError) -> SternaError:
        """Returns the error to raise after the last wish failed with `error`."""
        if len(self.wishes) > 1 and error.code == Code.NOT_FOUND:
            text = f"There is no agent or session {self.target[:80]!r}: `sterna ls` shows what there is."
            return RefusedError(Code.NOT_FOUND, text)
        return error


def make_plan(  # noqa: PLR0913  # everything that the command line can say, by name
    target: str | None,
    *,
    agent: str,
    name: str | None,
    new: bool,
    state: str | None,
    host: str | None,
    port: int | None,
    link: str | None,
    token: str | None,
    argv: list[str] | None,
    cwd: str | None,
    quic_port: int | None = None,
) -> Plan:
    """Returns what `connect` is to try; raises SternaError when the node is not known. May ask the network and block.

    A target is a share link, an agent's name, or a session's.
    """
    if target is not None and is_link(target):
        link = target
        target = None
    if link is not None:
        endpoint = find(state=state, link=link, quic_port=quic_port)
    else:
        endpoint = find(state=state, host=host, port=port, token=token, quic_port=quic_port)
    if link is not None and endpoint.session is not None:
        if name is not None or new:
            raise UsageError("A share link names its session: leave name and new out.")
        return Plan(endpoint, [Wish("join")], link)
    if name is not None and new:
        raise UsageError("Choose either a name, which finds or makes a session, or a new session.")
    if name is not None:
        return Plan(endpoint, [Wish("named", agent=target or agent, name=name, argv=argv, cwd=cwd)], name)
    if new or argv is not None or cwd is not None:
        return Plan(endpoint, [Wish("new", agent=target or agent, argv=argv, cwd=cwd)], target or agent)
    latest = Wish("latest", agent=target or agent)
    return Plan(endpoint, [latest] if target is None else [latest, Wish("join", name=target)], target or agent)


class Conversation:
    """One attachment's bytes and fate; the driver passes the machine's events to `event`.

    `on_event` is called with every Happening; else they are kept in `happenings`, the newest HAPPENINGS_MAX of them.
    """

    __slots__ = (
        "_confirmed",
        "_given",
        "_on_event",
        "_queue",
        "accept",
        "close",
        "error",
        "happenings",
        "left",
        "machine",
    )

    def __init__(self, machine: ClientMachine, on_event: Callable[[Happening], None] | None) -> None:
        self.machine = machine
        self.accept: Accept | None = None
        self.close: Close | None = None
        self.error: SternaError | None = None
        self.left = False
        self.happenings: deque[Happening] = deque(maxlen=HAPPENINGS_MAX)
        self._on_event = on_event
        self._queue: deque[tuple[bytes, int, bool]] = deque()  # bytes, the position after them, whether they repaint
        self._given = -1
        self._confirmed = False

    def event(self, event: Event) -> None:
        """Takes an event of the machine."""
        if isinstance(event, Output):
            self._queue.append((event.data, event.end, False))
        elif isinstance(event, Screen):
            self._screen(event)
        elif isinstance(event, Gap | Uncertain | Trouble | Notice):
            if self.accept is None:
                return  # that the first connection worked is no news
            if self._on_event is not None:
                self._on_event(event)
            else:
                self.happenings.append(event)
        elif isinstance(event, Opened):
            self.accept = event.accept
        elif isinstance(event, Ended):
            self.close = event.close
        elif isinstance(event, Failed):
            self.error = event.error
        elif isinstance(event, Suspended):
            self.left = True

    def _screen(self, event: Screen) -> None:
        data = event.data
        if event.zstd:
            from sterna.protocol.compress import decompress

            data = decompress(data)
        self._queue.append((data, event.position, True))

    @property
    def over(self) -> bool:
        """Whether nothing more will come than what waits already."""
        return self.close is not None or self.error is not None or self.left

    @property
    def unread(self) -> bool:
        """Whether `take` has something to return now."""
        return bool(self._queue)

    @property
    def position(self) -> int:
        """The output position of the byte that `take` returns next; what repaints a screen has the one after it."""
        if not self._queue:
            return self.machine.intake.next
        data, end, repaints = self._queue[0]
        return end if repaints else end - len(data)

    @property
    def exit_status(self) -> int | None:
        """The program's exit status, 128 + n after signal n, None while it runs and where nobody knows."""
        close = self.close
        if close is None:
            return None
        return 128 + close.signal if close.signal is not None else close.status

    def take(self, limit: int = -1) -> bytes | None:
        """Returns the next output, at most `limit` bytes (-1: all there is), None if there is none yet, b"" at the end.

        Raises what ended the attachment, once, after all output.
        """
        if not limit:
            raise UsageError("Nothing can be read with a limit of 0: use 1 or more, or -1 for all there is.")
        queue = self._queue
        if not queue:
            if self.error is not None:
                raise self.error
            return b"" if self.over else None
        parts: list[bytes] = []
        room = limit
        while queue and room:
            data, end, repaints = queue[0]
            if 0 <= room < len(data):
                queue[0] = (data[room:], end, repaints)
                data = data[:room]
                if not repaints:
                    self._given = end - len(queue[0][0])
            else:
                queue.popleft()
                self._given = end
            parts.append(data)
            room -= len(data) if room > 0 else 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def handled(self, now: int) -> None:
        """Notes that the caller is done with what it was given."""
        if self._given >= 0 and not self._confirmed:
            self.machine.handled(self._given, now)

    def confirm(self, now: int) -> None:
        """Tells the node that the end was read, once, if it was."""
        if self.close is not None and not self._queue and not self._confirmed:
            self._confirmed = True
            self.machine.confirm_end(now)

    def check_open(self) -> None:
        """Raises what ended the attachment before it was there."""
        if self.error is not None:
            raise self.error
        if self.accept is None:
            raise RefusedError(Code.ENDED, "The session was closed.")

    def check_writable(self) -> None:
        """Raises what stands against more input."""
        if self.error is not None:
            raise self.error
        if self.over:
            raise RefusedError(Code.ENDED, "The session takes no more input: it ended, or was left.")
        if self.accept is not None and self.accept.mode != "drive":
            raise UsageError("This attachment only watches: connect with mode drive to type.")


class Attached:
    """What a session tells of itself, whoever drives it."""

    _conversation: Conversation

    @property
    def accept(self) -> Accept:
        """What the node said about the session when it was joined: name, uid, agent, kind, mode, created, …"""
        accept = self._conversation.accept
        assert accept is not None, "connect() returns only once the session is there"
        return accept

    @property
    def name(self) -> str:
        """The session's name when it was joined."""
        return self.accept.name

    @property
    def uid(self) -> bytes:
        """The session's real name, 16 bytes."""
        return self.accept.uid

    @property
    def agent(self) -> str:
        """The agent's name."""
        return self.accept.agent

    @property
    def kind(self) -> str:
        """What is behind it: `pty`, `stream` or `chat`."""
        return self.accept.kind

    @property
    def mode(self) -> str:
        """`drive` or `watch`."""
        return self.accept.mode

    @property
    def created(self) -> bool:
        """Whether this connection made the session."""
        return self.accept.created

    @property
    def position(self) -> int:
        """The output position, in bytes from 0, of the byte that `read` returns next."""
        return self._conversation.position

    @property
    def exit_status(self) -> int | None:
        """The program's exit status, 128 + n after signal n; None while it runs and where nobody knows."""
        return self._conversation.exit_status
