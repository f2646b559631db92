"""The client's side of one attachment: connect, resume, race, and notice trouble (docs/protocol.md, section 4).

Sans-IO: a driver dials when `next_action` says so, passes bytes and time in, and deals with events. Several
connections may be open at once; at most one is active.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sterna import limits
from sterna.errors import Code, ProtocolError, RefusedError
from sterna.protocol import messages
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.messages import Accept, Close, ConnectBody, Lost, ResumeBody, Resumed, Signed
from sterna.protocol.race import Race, Vitals
from sterna.protocol.stream import Intake, SendStream
from sterna.units import SECOND

_DATA, _ACK, _EOF, _SIGNAL = int(Type.DATA), int(Type.ACK), int(Type.EOF), int(Type.SIGNAL)
_ANSWER = 2 * SECOND
_GIVE_UP = limits.HANDSHAKE_SECONDS * SECOND
_PARTS_MAX = limits.SNAPSHOT_MAX_BYTES // limits.SNAPSHOT_PART_BYTES + 1
_FATAL = frozenset(
    (
        Code.DENIED, Code.EXPIRED, Code.REVOKED, Code.NOT_FOUND, Code.NO_AGENT, Code.ENDED, Code.VERSION,
        Code.TOO_LARGE, Code.BAD_PAYLOAD, Code.BAD_REQUEST, Code.UNSUPPORTED, Code.EXISTS, Code.READ_ONLY,
        Code.DISPLACED, Code.LIMIT, Code.MOVED,
    )
)  # fmt: skip
_FATAL_AT_FIRST = frozenset((Code.STORAGE, Code.RATE_LIMITED))


class Dial:
    """The driver shall open a connection and report it under this number."""

    __slots__ = ("connection",)

    def __init__(self, connection: int) -> None:
        self.connection = connection


class Drop:
    """The driver shall close this connection once what is queued on it was sent."""

    __slots__ = ("connection",)

    def __init__(self, connection: int) -> None:
        self.connection = connection


class Opened:
    """The session is there: the ACCEPT that says what it is."""

    __slots__ = ("accept",)

    def __init__(self, accept: Accept) -> None:
        self.accept = accept


class Rejoined:
    """An attachment of an earlier process is back: the RESUMED that says where its input goes on."""

    __slots__ = ("resumed",)

    def __init__(self, resumed: Resumed) -> None:
        self.resumed = resumed


class Output:
    """Output bytes; `end` is to be reported by `handled` once they are written. `replayed` bytes were sent before a
    cut.
    """

    __slots__ = ("data", "end", "replayed")

    def __init__(self, data: bytes, end: int, replayed: bool) -> None:
        self.data = data
        self.end = end
        self.replayed = replayed


class Screen:
    """What repaints the screen as it is at output position `position`; `data` is compressed if `zstd`."""

    __slots__ = ("data", "position", "zstd")

    def __init__(self, data: bytes, position: int, zstd: bool) -> None:
        self.data = data
        self.position = position
        self.zstd = zstd


class Gap:
    """Output that will never come, from `start` to before `end`."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


class Uncertain:
    """Input from `start` to before `end` may or may not have reached the agent, which is gone; it is not repeated."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


class Trouble:
    """The connection is gone or suspect (`since`, monotonic nanoseconds), or well again (None)."""

    __slots__ = ("reason", "since")

    def __init__(self, since: int | None, reason: str) -> None:
        self.since = since
        self.reason = reason


class Notice:
    """Something the node tells: who joined or left, storage trouble."""

    __slots__ = ("event",)

    def __init__(self, event: messages.Event) -> None:
        self.event = event


class Roomy:
    """Input finds room in the window again."""

    __slots__ = ()


class Ended:
    """The session ended: its CLOSE. After all output is handled, call `confirm_end`."""

    __slots__ = ("close",)

    def __init__(self, close: Close) -> None:
        self.close = close


class Suspended:
    """The node knows that we leave; it keeps the session."""

    __slots__ = ()


class Failed:
    """It cannot go on: the reason, as an error to raise."""

    __slots__ = ("error",)

    def __init__(self, error: RefusedError) -> None:
        self.error = error


Event = Opened | Rejoined | Output | Screen | Gap | Uncertain | Trouble | Notice | Roomy | Ended | Suspended | Failed


class Saved:
    """What an attachment needs to be resumed by another process: who it is and where it stood.

    Without a `uid` its CONNECT was never seen to be accepted; `request` (16 bytes) then makes its repetition harmless.

    `input` is a position up to which input is known to be handled; the node's RESUMED says how far it really was.
    """

    __slots__ = ("attachment", "epoch", "input", "log", "output", "request", "uid")

    def __init__(
        self,
        uid: bytes,
        attachment: bytes,
        *,
        request: bytes,
        epoch: int = 1,
        log: int = 0,
        output: int = 0,
        input: int = 0,  # noqa: A002  # the protocol's word
    ) -> None:
        self.request = request
        self.uid = uid
        self.attachment = attachment
        self.epoch = epoch
        self.log = log
        self.output = output
        self.input = input


class _Connection:
    """One connection: its link, what was asked on it (`asked` is when, -1 before), and the `size` that was told."""

    __slots__ = ("asked", "established", "handle", "link", "number", "size")

    def __init__(self, number: int) -> None:
        self.number = number
        self.link = Link()
        self.handle = 0
        self.asked = -1
        self.established = False
        self.size = (0, 0)


class ClientMachine:
    """One attachment to one session, through any number of connections.

    `connect` is the CONNECT body to be sent (its `attachment` names us), `device` the device id, `sign(context, body)`
    its signature, `counter()` the next RESUME counter, `raise_counter(value)` what follows ERROR `stale`, `random(n)` n
    random bytes. `saved` resumes an attachment of an earlier process. All times are monotonic nanoseconds.
    """

    def __init__(
        self,
        connect: ConnectBody,
        *,
        device: bytes,
        sign: Callable[[str, bytes], bytes],
        counter: Callable[[], int],
        raise_counter: Callable[[int], None],
        random: Callable[[int], bytes],
        now: int,
        saved: Saved | None = None,
    ) -> None:
        self._connect_body = connect
        self._device = device
        self._sign = sign
        self._counter = counter
        self._raise_counter = raise_counter
        self._random = random
        self.attachment = saved.attachment if saved is not None else connect.attachment
        self.uid = saved.uid if saved is not None else b""
        self.log = saved.log if saved is not None else 0
        self._rejoining = bool(self.uid)
        self.epoch = saved.epoch if saved is not None else 1
        self.input = SendStream(saved.input if saved is not None else 0)
        self.intake = Intake(saved.output if saved is not None else 0)
        self.cols, self.rows = connect.cols, connect.rows
        self._connections: dict[int, _Connection] = {}
        self._numbers = 0
        self._active: _Connection | None = None
        self._race_id = b""
        self._actions: deque[Dial | Drop] = deque()
        self._events: deque[Event] = deque()
        self._farewells: dict[int, list[bytes]] = {}
        self._parts: list[bytes] = []
        self._parts_bytes = self._replay_until = self._suspected = 0
        self._lost: Lost | None = None  # what the picture that comes stands for
        self._next_log = self.log  # the node's; ours is another one until we know where we are in it
        self._started = now
        self._leaving = False
        self._resuming = False  # a RESUME went out that may still displace the active connection
        self._ended = False
        self._full = False
        self._vitals = Vitals(now)
        self._race = Race(random)
        self._race.begin(now)
        self._dial_due(now)

    # ---- for the driver ----------------------------------------------------------------------------------------

    def next_action(self) -> Dial | Drop | None:
        """Returns what to do with connections next."""
        return self._actions.popleft() if self._actions else None

    def next_event(self) -> Event | None:
        """Returns what happened next."""
        return self._events.popleft() if self._events else None

    def data_to_send(self) -> list[tuple[int, list[bytes]]]:
        """Returns (connection, bytes) for all connections that have something to send."""
        return [
            (c.number, c.link.data_to_send()) for c in self._connections.values() if c.established and c.link.out_bytes
        ]

    def farewell(self, number: int) -> list[bytes]:
        """Returns the last bytes of a connection that `Drop` named; they go out before it is closed."""
        return self._farewells.pop(number, [])

    @property
    def active(self) -> int | None:
        """The number of the connection that carries the session now."""
        return self._active.number if self._active is not None else None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self._ended

    def connected(self, number: int, now: int) -> None:
        """A connection reached the node's machine; who is there, TLS has still to prove."""
        if number in self._connections:
            self._race.connected(now)

    def established(self, number: int, now: int) -> None:
        """A connection is open and, with TLS, the other side is proved to be the node."""
        connection = self._connections.get(number)
        if connection is None or self._ended:
            return
        connection.established = True
        self._race.established(now)
        if not any(c.asked >= 0 for c in self._connections.values() if c is not self._active):
            self._ask(connection, now)

    def dial_failed(self, number: int, now: int, *, refused: bool, again: bool = False, reason: str = "") -> None:
        """A connection could not be opened; `refused` says that nobody listens there (or the network said no).

        That ends a first attempt, unless `again` says that the next one may well succeed.
        """
        if self._connections.pop(number, None) is None or self._ended:
            return
        self._race.failed(now, refused)
        if not self.uid and ((refused and not again) or now - self._started > _GIVE_UP):
            self._fail(RefusedError(Code.TIMEOUT, reason or "The node cannot be reached."))

    def lost(self, number: int, now: int, reason: str = "") -> None:
        """A connection is gone."""
        connection = self._connections.pop(number, None)
        if connection is None or self._ended:
            return
        was_asked = connection.asked >= 0
        if connection is self._active:
            self._active = None
            if self._leaving:
                self._finish(Suspended())
                return
            self._suspect(now, reason or "connection lost")
        elif was_asked:
            self._race_id = b""
            if not self.uid and now - self._started > _GIVE_UP:
                self._fail(RefusedError(Code.TIMEOUT, "The node ends every connection."))
                return
            self._race.failed(now, True)
            self._ask_next(now)
            self._look_on(now)

    def receive(self, number: int, data: bytes | memoryview, now: int) -> None:
        """Takes bytes of a connection."""
        connection = self._connections.get(number)
        if connection is None or self._ended:
            return
        if connection is self._active:
            self._vitals.received(now)
        link = connection.link
        try:
            for frame in link.receive(data):
                self._frame(connection, frame, now)
        except ProtocolError as error:
            self._break(connection, error, now)
            return
        link.check()
        if link.closing:
            self._break(connection, ProtocolError(Code.PROTOCOL, "the node sent broken bytes"), now)

    def _break(self, connection: _Connection, error: ProtocolError, now: int) -> None:
        """Ends a connection whose peer broke the protocol; the session resumes on another."""
        connection.link.fail(error.code, str(error))
        self._drop(connection)
        if connection is self._active:
            self._active = None
            self._suspect(now, str(error))

    def suspect(self, now: int, reason: str) -> None:
        """The driver saw trouble: an address change, the machine's sleep, bytes that are not acknowledged."""
        if not self._ended and self.uid:
            self._suspect(now, reason)

    # ---- for the user ------------------------------------------------------------------------------------------

    def write(self, data: bytes, now: int) -> int:
        """Takes input, as much as the window has room for; returns how many bytes."""
        taken = self.input.write(data)
        self._full = taken < len(data)
        self._send_input(now)
        return taken

    def eof(self, now: int) -> bool:
        """Ends the input; False when the window has no room for it yet."""
        done = self.input.mark(_EOF)
        self._full = not done
        self._send_input(now)
        return done

    def signal(self, name: str, now: int) -> bool:
        """Sends a signal by name (INT, TERM, …), in order with the input; False when there is no room yet."""
        done = self.input.mark(_SIGNAL, messages.pack(messages.Signal(name)))
        self._send_input(now)
        return done

    def resize(self, cols: int, rows: int) -> None:
        """Tells the terminal's size in cells."""
        self.cols, self.rows = cols, rows
        if self._active is not None:
            self._active.link.send_message(Type.RESIZE, self._active.handle, messages.Resize(cols, rows))

    def handled(self, position: int, now: int) -> None:
        """Notes that all output before `position` is written."""
        self.intake.handle(position, now)
        self._acknowledge(now, False)

    def suspend(self, now: int) -> None:
        """Leaves politely; `Suspended` follows, at once when there is no connection."""
        self._leaving = True
        connection = self._active
        if connection is None:
            self._finish(Suspended())
            return
        for other in [c for c in self._connections.values() if c is not connection]:
            self._drop(other)
        self._race.end()
        self._acknowledge(now, True)
        connection.link.send_message(Type.SUSPEND, connection.handle, messages.Suspend(self.intake.handled))
        connection.asked = now

    def close(self, now: int) -> bool:
        """Asks to end the session for good; False without a connection."""
        if self._active is None:
            return False
        self._active.link.send_message(Type.CLOSE, self._active.handle, Close())
        return True

    def confirm_end(self, now: int) -> None:
        """Tells the node that the final output and status were read; it may forget the session."""
        connection = self._active
        if connection is not None:
            handled = self.intake.handled
            connection.link.send(_ACK, connection.handle, handled, handled.to_bytes(8, "big"))
            connection.link.send_message(Type.CLOSE, connection.handle, Close())
            self._drop(connection)
        self._ended = True

    def saved(self) -> Saved:
        """Returns what another process needs to resume this attachment."""
        return Saved(
            self.uid, self.attachment, request=self._connect_body.request, epoch=self.epoch, log=self.log,
            output=self.intake.handled, input=self.input.base,
        )  # fmt: skip

    # ---- time --------------------------------------------------------------------------------------------------

    def next_timeout(self) -> int | None:
        """Returns when `handle_timeout` is to be called, in monotonic nanoseconds, or None."""
        if self._ended:
            return None
        times = [t for t in (self._race.due(), self._asked_due()) if t is not None]
        if self._active is not None:
            times.append(self._vitals.due(bool(self.input.end - self.input.base)))
            ack = self.intake.timeout()
            if ack is not None:
                times.append(ack)
        return min(times) if times else None

    def _asked_due(self) -> int | None:
        asked = [
            c.asked + _ANSWER
            for c in self._connections.values()
            if c.asked >= 0 and (c is not self._active or self._leaving)
        ]
        return min(asked) if asked else None

    def handle_timeout(self, now: int) -> None:
        """Does what is due: acknowledge, ping, suspect, dial, give up on an unanswered question."""
        if self._ended:
            return
        self._acknowledge(now, False)
        active = self._active
        if active is not None:
            what = self._vitals.check(now, bool(self.input.end - self.input.base))
            if what == "ping":
                self._ping(active, now)
            elif what:
                self._suspect(now, what)
        for connection in list(self._connections.values()):
            if connection.asked >= 0 and now - connection.asked >= _ANSWER:
                self._unanswered(connection, now)
        self._dial_due(now)
        if not self.uid and now - self._started > _GIVE_UP and not self._ended:
            self._fail(RefusedError(Code.TIMEOUT, "The node does not answer."))

    def _unanswered(self, connection: _Connection, now: int) -> None:
        if connection is self._active:
            if self._leaving:
                self._drop(connection)
                self._finish(Suspended())
            return
        self._drop(connection)
        self._race_id = b""
        self._ask_next(now)
        self._look_on(now)

    def _look_on(self, now: int) -> None:
        """Begins to race if an answer did not come outside of a race (a RESUME that followed `resync`)."""
        if self.uid and self._active is None and not self._race.running and not self._asking():
            self._suspect(now, "no answer")

    def _dial_due(self, now: int) -> None:
        """Begins the connections that the race wants now; the oldest unestablished one makes room."""
        while self._race.take(now):
            open_ = [c for c in self._connections.values() if c is not self._active]
            if len(open_) >= limits.RACE_OPEN_MAX:
                waiting = [c for c in open_ if not c.established]
                if not waiting:
                    return
                self._drop(waiting[0])
            self._numbers += 1
            self._connections[self._numbers] = _Connection(self._numbers)
            self._actions.append(Dial(self._numbers))

    # ---- connecting --------------------------------------------------------------------------------------------

    def _ask_next(self, now: int) -> None:
        """Asks on another established connection, if there is one that nothing was asked on."""
        for connection in self._connections.values():
            if connection.established and connection.asked < 0 and connection is not self._active:
                self._ask(connection, now)
                return

    def _ask(self, connection: _Connection, now: int) -> None:
        """Sends CONNECT, or RESUME once there is a session."""
        connection.handle += 1
        connection.asked = now
        body = self._connect_body
        connection.size = (self.cols, self.rows) if self.uid else (body.cols, body.rows)
        if not self.uid:
            self._send_signed(connection, Type.CONNECT, messages.CONTEXT_CONNECT, messages.pack(body))
            return
        self._resuming = True
        if not self._race_id:
            self._race_id = self._random(16)
        resume = ResumeBody(
            context=messages.CONTEXT_RESUME, node=body.node, uid=self.uid, device=self._device,
            attachment=self.attachment, race=self._race_id, counter=self._counter(), epoch=self.epoch, log=self.log,
            output=self.intake.next, sent=self.input.sent,
            handled=self.intake.handled if self.intake.handled < self.intake.next else None,
            cols=self.cols if body.term and not body.exact else 0, rows=self.rows, features=body.features,
        )  # fmt: skip
        self._send_signed(connection, Type.RESUME, messages.CONTEXT_RESUME, messages.pack(resume))

    def _send_signed(self, connection: _Connection, kind: Type, context: str, body: bytes) -> None:
        connection.link.send_message(kind, connection.handle, Signed(body, self._sign(context, body)))

    def _take_over(self, connection: _Connection, now: int) -> None:
        """Makes a connection the active one; all others end."""
        connection.asked = -1
        self._active = connection
        self._resuming = False
        self._race_id = b""
        for other in list(self._connections.values()):
            if other is not connection:
                self._drop(other)
        if (self.cols, self.rows) != connection.size:
            # Changed since it was asked: what was said of that on the connection before may never arrive.
            self.resize(self.cols, self.rows)
        self._vitals.renewed(now)
        if self._race.running:
            self._race.end()
            self._events.append(Trouble(None, ""))

    def _suspect(self, now: int, reason: str) -> None:
        """Begins to race new connections; the old one, if there is one, stays until another is RESUMED."""
        if self._leaving:
            if self._active is None:
                self._finish(Suspended())
            return
        if not self._race.running:
            self._race_id = b""
            self._suspected = now
            self._race.begin(now)
            self._events.append(Trouble(now, reason))
            if self._active is not None:
                self._ping(self._active, now)
            self._dial_due(now)
        else:
            self._race.hurry(now)
            self._dial_due(now)

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(connection.number, None) is not None:
            self._actions.append(Drop(connection.number))
            self._farewells[connection.number] = connection.link.data_to_send() if connection.established else []

    # ---- frames ------------------------------------------------------------------------------------------------

    def _frame(self, connection: _Connection, frame: Frame, now: int) -> None:
        kind, handle, seq, payload = frame
        if connection is self._active and handle == connection.handle:
            self._session_frame(connection, kind, seq, payload, now)
        elif handle == connection.handle and handle:
            if kind == Type.ACCEPT:
                self._accepted(connection, messages.unpack_shown(Accept, payload), now)
            elif kind == Type.RESUMED:
                self._resumed(connection, messages.unpack(Resumed, payload), now)
            elif kind == Type.CLOSE:
                self._take_over(connection, now)
                self._events.append(Ended(messages.unpack_shown(Close, payload)))
            elif kind == Type.ERROR:
                self._refused(connection, messages.unpack_shown(messages.Error, payload), now)
        elif handle == 0:
            self._connection_frame(connection, kind, payload, now)

    def _connection_frame(self, connection: _Connection, kind: int, payload: bytes, now: int) -> None:
        if kind == Type.PING:
            connection.link.send(Type.PONG, 0, 0, payload)
        elif kind == Type.PONG:
            if len(payload) == 8:
                self._vitals.answered(int.from_bytes(payload, "big"), now)
                if connection is self._active and self._race.running and not self._asking():
                    self._well(int.from_bytes(payload, "big"))
        elif kind == Type.ERROR:
            error = messages.unpack_shown(messages.Error, payload)
            self._drop(connection)
            if connection is self._active:
                self._active = None
                self._suspect(now, error.message)
            else:
                self._refused(connection, error, now)
            if error.retry_after is not None:
                self._race.wait(now, error.retry_after)

    def _asking(self) -> bool:
        return any(c.asked >= 0 for c in self._connections.values() if c is not self._active)

    def _ping(self, connection: _Connection, now: int) -> None:
        connection.link.send(Type.PING, 0, 0, now.to_bytes(8, "big"))
        self._vitals.asked(now)

    def _well(self, stamp: int) -> None:
        """The suspect connection answered a PING sent since, before another one was asked for: it stays."""
        if stamp < self._suspected:
            return
        for other in list(self._connections.values()):
            if other is not self._active:
                self._drop(other)
        self._race.end()
        self._events.append(Trouble(None, ""))

    def _session_frame(self, connection: _Connection, kind: int, seq: int, payload: bytes, now: int) -> None:
        if kind == _DATA:
            self._vitals.traffic(now)
            new = self.intake.receive(kind, seq, payload)
            if new is not None:
                end = self.intake.next
                self._events.append(Output(new, end, end <= self._replay_until))
        elif kind == _ACK:
            if len(payload) == 8 and self.input.acknowledge(int.from_bytes(payload, "big")) and self._full:
                self._full = False
                self._events.append(Roomy())
        elif kind == Type.SNAPSHOT:
            self._snapshot(messages.unpack(messages.Snapshot, payload))
        elif kind == Type.CLOSE:
            self._events.append(Ended(messages.unpack_shown(Close, payload)))
        elif kind == Type.SUSPEND:
            if self._leaving:
                self._drop(connection)
                self._finish(Suspended())
        elif kind == Type.EVENT:
            event = messages.unpack_shown(messages.Event, payload)
            if event.kind == "uncertain" and event.start is not None and event.end is not None:
                self._events.append(Uncertain(event.start, event.end))
            else:
                self._events.append(Notice(event))
        elif kind == Type.ERROR:
            self._active = None
            connection.asked = -1
            self._refused(connection, messages.unpack_shown(messages.Error, payload), now)

    def _accepted(self, connection: _Connection, accept: Accept, now: int) -> None:
        self.uid, self.log, self.epoch = accept.uid, accept.log, accept.epoch
        self._next_log = accept.log
        self.intake.skip(accept.output)
        self._replay_until = accept.head
        self._take_over(connection, now)
        self._events.append(Opened(accept))
        self._send_input(now)

    def _resumed(self, connection: _Connection, resumed: Resumed, now: int) -> None:
        self._take_over(connection, now)
        # The connection that was left may have brought output since RESUME was sent: that is neither lost nor new.
        ahead = resumed.log == self.log and resumed.output <= self.intake.next <= resumed.head
        self.epoch, self._next_log, self._replay_until = resumed.epoch, resumed.log, resumed.head
        # Until a picture that is promised is there, what it stands for may have to be asked for, and named, again.
        if not ahead and not resumed.snapshot:
            self._go_on(resumed.lost, resumed.output)
        self.intake.told(self.intake.handled)
        if self._rejoining:
            # What the earlier process had sent beyond its last note is handled as well, or will be sent again by us.
            self._rejoining = False
            if resumed.input is not None:
                self.input = SendStream(resumed.input)
            self._events.append(Rejoined(resumed))
        if resumed.forgotten and resumed.input is not None and resumed.input > self.input.base:
            self._events.append(Uncertain(self.input.base, resumed.input))
        if resumed.input is None:
            if self.input.end > self.input.base:
                self._events.append(Uncertain(self.input.base, self.input.end))
        else:
            self.input.rewind(resumed.input)
            if self._full and self.input.room:
                self._full = False
                self._events.append(Roomy())
            self._send_input(now)

    def _go_on(self, lost: Lost | None, position: int) -> None:
        """Moves to `position` of the node's log; what an earlier connection brought meanwhile is not lost."""
        if lost is not None:
            got = self.intake.next if self.log == self._next_log else 0
            self._events.append(Gap(min(max(lost.start, got), lost.end), lost.end))
        self.log = self._next_log
        self.intake.skip(position)

    def _snapshot(self, part: messages.Snapshot) -> None:
        """Collects what repaints the screen; it moves our place in the output."""
        if part.part == 0:
            self._parts, self._parts_bytes, self._lost = [], 0, part.lost
        self._parts.append(part.data)
        self._parts_bytes += len(part.data)
        if self._parts_bytes > limits.SNAPSHOT_MAX_BYTES or len(self._parts) > _PARTS_MAX:
            raise ProtocolError(Code.TOO_LARGE, "a snapshot is too large, or has too many parts")
        if part.last:
            data, self._parts, self._parts_bytes = b"".join(self._parts), [], 0
            self._go_on(self._lost, part.position)
            if data:
                self._events.append(Screen(data, part.position, part.zstd))

    def _refused(self, connection: _Connection, error: messages.Error, now: int) -> None:
        """Deals with an ERROR: again with better numbers, again later, or never."""
        code = Code(error.code) if error.code in Code._value2member_map_ else Code.INTERNAL
        if code == Code.STALE and error.value is not None:
            self._raise_counter(error.value)
            self._race_id = b""
            self._ask(connection, now)
        elif code == Code.RESYNC and self.uid and connection.asked < 0 and self._asking():
            self._drop(connection)  # what was asked on another connection is a RESUME already: two displace each other
        elif code == Code.RESYNC and self.uid:
            self._race_id = b""
            self._ask(connection, now)
        elif code == Code.DISPLACED and (self._race.running or self._resuming):
            # Our own RESUME on another connection did that; its answer comes there, perhaps later than this.
            self._drop(connection)
            if not self._race.running:
                self._suspect(now, error.message)
            elif not self._asking():
                self._ask_next(now)
        elif code == Code.SUPERSEDED:
            self._drop(connection)
            if not self._asking():
                self._race_id = b""
                self._suspect(now, error.message)
        elif code in _FATAL or (not self.uid and code in _FATAL_AT_FIRST):
            self._drop(connection)
            self._fail(
                RefusedError(
                    code, error.message, retry_after=error.retry_after, address=error.address, value=error.value
                )
            )
        else:
            self._drop(connection)
            self._suspect(now, error.message)
            self._race.wait(now, error.retry_after or 1.0)

    def _fail(self, error: RefusedError) -> None:
        self._finish(Failed(error))

    def _finish(self, event: Event) -> None:
        self._events.append(event)
        self._ended = True
        self._active = None
        for connection in list(self._connections.values()):
            self._drop(connection)

    # ---- streams -----------------------------------------------------------------------------------------------

    def _send_input(self, now: int) -> None:
        connection = self._active
        if connection is None:
            return
        items = self.input.take()
        if items:
            self._vitals.traffic(now)
        for kind, position, payload in items:
            connection.link.send(kind, connection.handle, position, payload)
        if items:
            self._acknowledge(now, True)

    def _acknowledge(self, now: int, joining: bool) -> None:
        connection = self._active
        if connection is None:
            return
        ack = self.intake.acknowledgement(now, joining)
        if ack is not None and self.log == self._next_log:
            connection.link.send(_ACK, connection.handle, ack, ack.to_bytes(8, "big"))
