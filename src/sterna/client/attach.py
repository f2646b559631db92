"""`sterna attach`: a terminal on a session, through any failure of the network."""

from __future__ import annotations

import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable

from sterna import limits
from sterna.client.driver import PollDriver
from sterna.client.endpoint import Endpoint
from sterna.client.escape import Action, EscapeKeys, help_text
from sterna.client.notify import BellFinder, Notifier
from sterna.client.queries import LIVE, PASSIVE, REPLAY, QueryFilter
from sterna.client.session import Wish, make_machine
from sterna.client.status import OutputTail, ScreenModel, StatusLine, unfinished
from sterna.client.terminal import Terminal
from sterna.errors import DRAINING_TEXT, Code, RefusedError
from sterna.protocol import client as machine_events
from sterna.protocol.client import ClientMachine, Event
from sterna.protocol.messages import Accept, Close
from sterna.units import SECOND

_ERASE_BACK = b"\x1b[3J"
_ERASE_ALL = b"\x1b[H\x1b[J" + _ERASE_BACK
_IN, _OUT = select.POLLIN, select.POLLOUT
_ABSENT_NS = 10 * SECOND

_TITLE_SAVED, _TITLE_BACK = b"\x1b[22;0t", b"\x1b[23;0t"


class AttachOptions:
    """What the user chose for `attach`; `make_screen` builds the screen model for the status line.

    `again` is the command that comes back, with NAME for the session's name; "" if there is none. `starts` says that it
    also starts a node where none runs.
    """

    __slots__ = ("again", "clipboard", "displace", "escape", "make_screen", "mode", "notify", "starts", "state")

    def __init__(self) -> None:
        self.state: str | None = None
        self.displace = False
        self.escape: str | None = "~"
        self.clipboard = False
        self.notify = False
        self.mode: str = "drive"
        self.again = ""
        self.starts = False
        self.make_screen: Callable[[int, int], ScreenModel] | None = None


class Attach:
    """One run of `sterna attach`; `run` returns the exit status."""

    def __init__(self, endpoint: Endpoint, wish: Wish, options: AttachOptions, terminal: Terminal) -> None:
        self._terminal = terminal
        self._options = options
        self._endpoint = endpoint
        watching = options.mode == "watch" or endpoint.watch
        self._watching = watching
        self._machine: ClientMachine = make_machine(
            endpoint, wish, state=options.state, size=terminal.size(), term=os.environ.get("TERM", "xterm"),
            mode="watch" if watching else "drive", displace=options.displace,
        )  # fmt: skip
        self._driver = PollDriver(self._machine, endpoint, self._event)
        self._escape = EscapeKeys(options.escape is not None, options.escape or "~")
        self._filter = QueryFilter(PASSIVE if watching else LIVE, clipboard=options.clipboard)
        self._typist = not watching
        self._tail = OutputTail()
        self._status = StatusLine(
            endpoint.name, self._tail, terminal.modes, options.make_screen, color="NO_COLOR" not in os.environ
        )
        self._queue: deque[tuple[bytes, int]] = deque()  # what the terminal has not taken, and the position after it
        self._begun = 0  # how much of the first of it the terminal has taken
        self._draining = False
        self._typed = b""  # what the window has not taken
        self._notifier = Notifier("", os.environ) if options.notify else None
        self._bells = BellFinder()
        self._name = ""
        self._close: Close | None = None
        self._error: RefusedError | None = None
        self._left = ""
        self._painted = self._inside = False
        self._uncertain = 0
        self._lost = 0

    def run(self) -> int:
        """Stays attached until the session ends, the user leaves, or it cannot go on; returns the exit status."""
        driver, terminal = self._driver, self._terminal
        # In this order: a program must know of the new size before it gets the keys typed after the change.
        driver.watch(terminal.wake_fd, _IN, self._woken)
        driver.watch(terminal.in_fd, _IN, self._keys)
        try:
            while not (self._left or self._error or (self._close is not None and not self._queue)):
                # Nothing is drawn while output waits for the terminal: then its time is no reason to wake up.
                self._driver.turn(None if self._queue else self._status.next_timeout())
                self._tick()
            self._write(self._status.end())
            if self._close is not None:
                self._machine.confirm_end(time.monotonic_ns())
        finally:
            driver.close()
        return self._result()

    def _result(self) -> int:
        return 0 if self._close is None and self._error is None and not self._inside else self._exit_status()

    def _exit_status(self) -> int:
        close = self._close
        if close is None:
            return 1
        if close.status is not None:
            return close.status
        return 128 + close.signal if close.signal is not None else 1

    def farewell(self) -> str:
        """Returns what is said on the user's terminal after it was restored; "" if nothing is to be said."""
        lines: list[str] = []
        if self._inside:
            return f"sterna: This terminal is in the session {self._name} already: a session cannot show itself.\n"
        if self._lost:
            lines.append(f"{self._lost} bytes of output were overwritten before this terminal got them.")
        if self._uncertain:
            lines.append(f"{self._uncertain} bytes of input may not have reached the program.")
        if self._error is not None:
            lines.append(str(self._error))
        elif self._close is not None:
            code = self._close.code
            if code not in (int(Code.OK), int(Code.ENDED)):
                lines.append(f"The session {self._name} ended: {self._close.reason}")
            elif self._close.status is None and self._close.signal is None:
                lines.append(f"The session {self._name} was closed.")
            elif self._name and os.isatty(self._terminal.out_fd):
                signal, status = self._close.signal, self._close.status
                how = f" by signal {signal}" if signal is not None else f" with status {status}" if status else ""
                lines.append(f"The session {self._name} ended{how}.")
        elif self._left:
            again = self._options.again.replace("NAME", self._name)
            line = f"Detached from {self._name}; `{again}` comes back."
            lines.append(line if self._name and again else "Detached.")
        return "".join(f"sterna: {line}\n" for line in lines if line)

    def at_line_start(self) -> bool:
        """Tells whether the terminal's cursor is known to stand on an empty line."""
        return not self._name or self._tail.data().endswith(b"\n")

    # ---- the terminal ------------------------------------------------------------------------------------------

    def _keys(self, _events: int) -> None:
        if self._typed:
            self._driver.unwatch(self._terminal.in_fd)  # the window is full: typing waits, as on a slow line
            return
        data = self._terminal.read()
        if data is None:
            return
        if not data:
            self._left = "hangup"
            return
        data, actions = self._escape.feed(data)
        if data and not self._watching:
            taken = self._machine.write(data, time.monotonic_ns())
            self._typed = data[taken:]
        for action in actions:
            self._act(action)

    def _act(self, action: Action) -> None:
        if action is Action.HELP:
            self._write(b"\r\n" + help_text(self._options.escape or "~").encode())
        elif action is Action.DROP:
            self._left = "dropped"
        else:
            self._machine.suspend(time.monotonic_ns())

    def _woken(self, _events: int) -> None:
        if self._terminal.woken():
            self._tail.resized(self._terminal.modes.replay)
            self._machine.resize(*self._terminal.size())

    def _write(self, data: bytes) -> None:
        """Writes something of our own, after what waits."""
        if data:
            self._queue.append((data, -1))
            self._flush(0)

    def _flush(self, _events: int) -> bool:
        """Gives the terminal what it takes; what it took of the session's output is handled.

        Returns whether the machine heard of it.
        """
        queue, terminal = self._queue, self._terminal
        handled = -1
        while queue:
            data, end = queue[0]
            start, before = self._begun, terminal.modes.replay
            written = terminal.write(data, start) if data else 0
            if end >= 0 and written:
                self._tail.append(data if written == len(data) else data[start : start + written], before)
            if start + written < len(data):
                self._begun += written
                break
            queue.popleft()
            self._begun = 0
            handled = max(handled, end)
        if self._draining is not bool(queue):
            self._draining = bool(queue)
            if queue:
                self._driver.watch(terminal.out_fd, _OUT, self._flush)
            else:
                self._driver.unwatch(terminal.out_fd)
        if handled >= 0:
            self._machine.handled(handled, time.monotonic_ns())
        return handled >= 0 or not queue

    def _tick(self) -> None:
        if self._status.next_timeout() is not None and not self._queue:
            cols, rows = self._terminal.size()
            now = time.monotonic_ns()
            self._status.absent = self._absent() if self._driver.refused_for(now) >= _ABSENT_NS else ""
            self._write(self._status.handle_timeout(now, cols, rows))

    def _absent(self) -> str:
        """Returns what to do where the machine answers and no node does."""
        again = self._options.again.replace("NAME", self._name)
        return f"~. and `{again}`" if self._options.starts else "`sterna up` there starts one; ~. to give up"

    # ---- events ------------------------------------------------------------------------------------------------

    def _event(self, event: Event) -> None:
        if isinstance(event, machine_events.Output):
            self._output(event)
        elif isinstance(event, machine_events.Screen):
            self._screen(event)
        elif isinstance(event, machine_events.Trouble):
            if event.since is None:
                self._write(self._status.end())
            else:
                self._status.begin(event.since, "the node stops, " if event.reason == DRAINING_TEXT else "")
        elif isinstance(event, machine_events.Roomy):
            self._roomy()
        elif isinstance(event, machine_events.Opened):
            self._opened(event.accept)
        elif isinstance(event, machine_events.Gap):
            self._lost += event.end - event.start
        elif isinstance(event, machine_events.Uncertain):
            self._uncertain = max(self._uncertain, event.end - event.start)
        elif isinstance(event, machine_events.Notice):
            if event.event.kind == "typist" and not self._watching:
                self._typist = bool(event.event.count)
        elif isinstance(event, machine_events.Ended):
            self._end(event.close)
        elif isinstance(event, machine_events.Suspended):
            self._left = "detached"
        elif isinstance(event, machine_events.Failed):
            self._error = event.error

    def _opened(self, accept: Accept) -> None:
        self._name = accept.name
        if self._notifier is not None:
            self._notifier = Notifier(self._name, os.environ)
        # The title goes back to what it is now when we leave, or when a program that has saved it before ends.
        self._terminal.parting = _TITLE_BACK
        self._write(_TITLE_SAVED)
        if accept.kind == "pty":
            # The session's screen began empty with the cursor at the top, and every terminal on it has to agree on
            # where things are. What this one shows goes into its scroll-back.
            _, rows = self._terminal.size()
            self._queue.append((b"\r\n" * (rows - 1) + b"\x1b[H\x1b[J", accept.output))
            self._flush(0)
        own = os.environ.get("STERNA_SESSION_UID", "")
        if own and own == accept.uid.hex():
            self._inside = True
            self._machine.suspend(time.monotonic_ns())

    def _output(self, event: machine_events.Output) -> None:
        if self._status.visible:
            self._write(self._status.end())
        self._filter.mode = REPLAY if event.replayed else LIVE if self._typist else PASSIVE
        data = self._filter.feed(event.data)
        if self._notifier is not None and self._bells.feed(data) and unfinished(data) == b"":
            data += self._notifier.bell(time.monotonic_ns())
        self._queue.append((data, event.end))
        self._flush(0)

    def _screen(self, event: machine_events.Screen) -> None:
        data = event.data
        if event.zstd:
            from sterna.protocol.compress import decompress

            data = decompress(data)
        if not self._painted:
            # The first picture of a session leaves the scroll-back of whoever came; later ones put it right.
            self._painted = True
            data = data.replace(_ERASE_ALL, _ERASE_ALL[: -len(_ERASE_BACK)], 1)
        self._write(self._status.end())
        # Nobody asks anything in a picture, and it sets no clipboard, whatever the user lets the output do. It may end
        # within a sequence, which the output goes on with: so does its filter.
        self._filter = QueryFilter(REPLAY)
        data = self._filter.feed(data)
        self._filter.clipboard = self._options.clipboard
        last = max(0, len(data) - 1) // limits.CHUNK_BYTES * limits.CHUNK_BYTES
        for start in range(0, last, limits.CHUNK_BYTES):
            self._queue.append((data[start : start + limits.CHUNK_BYTES], 0))
        self._queue.append((data[last:], event.position))
        self._flush(0)

    def _roomy(self) -> None:
        if self._typed:
            taken = self._machine.write(self._typed, time.monotonic_ns())
            self._typed = self._typed[taken:]
        if not self._typed:
            self._driver.watch(self._terminal.in_fd, _IN, self._keys)

    def _end(self, close: Close) -> None:
        self._close = close
        rest = self._filter.flush()
        if rest:
            self._write(rest)
        if self._notifier is not None:
            status = f"signal {close.signal}" if close.signal is not None else f"exit status {close.status or 0}"
            self._write(self._notifier.exited(status))


def attach(endpoint: Endpoint, wish: Wish, options: AttachOptions) -> int:
    """Attaches this process's terminal to a session; returns the exit status: the program's, 0 after leaving, 1 on
    failure.

    Raises UsageError without a terminal, TrustError, StorageError or ConnectionLostError before the session is there.
    """
    with Terminal() as terminal:
        run = Attach(endpoint, wish, options, terminal)
        status = run.run()
    words = run.farewell()
    if words:
        sys.stderr.write(words if run.at_line_start() else f"\n{words}")
    return status
