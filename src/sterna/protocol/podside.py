"""The agent's side of the pod socket: sessions, lanes and their streams (docs/protocol.md, section 5).

Sans-IO: whoever composes it feeds frames from `Link`s, runs programs, and calls back when input was really handled.
"""

from __future__ import annotations

from sterna import limits
from sterna.errors import Code, ProtocolError
from sterna.protocol import messages
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.messages import Kind, LaneState
from sterna.protocol.stream import Intake, SendStream

_DATA = int(Type.DATA)
_ACK = int(Type.ACK)
_MARKS = frozenset((int(Type.SIGNAL), int(Type.EOF)))
_SIZE_LIMIT = limits.SIZE_MAX_CELLS


class PodLane:
    """The input of one attachment; `intake.handled` is what the program has really been given."""

    __slots__ = ("handle", "id", "intake", "link", "used")

    def __init__(self, attachment: bytes) -> None:
        self.id = attachment
        self.intake = Intake(0)
        self.link: Link | None = None
        self.handle = 0
        self.used = 0


class PodSession:
    """One session at the pod: its output stream, its lanes, and the node connection that holds it now, if any.

    `payload` belongs to whoever runs the program, who sets `starved` while it has output that finds no room. `exit` is
    set once the program has ended and all its output is written; `final` (zstd) then repaints its last screen.
    """

    __slots__ = (
        "audience", "cols", "exit", "final", "handle", "lanes", "link", "out", "payload", "rows", "said_exit",
        "starved", "uid",
    )  # fmt: skip

    def __init__(self, uid: bytes) -> None:
        self.uid = uid
        self.out = SendStream(0, limits.WINDOW_BYTES, limits.PAYLOAD_MAX_BYTES)
        self.lanes: dict[bytes, PodLane] = {}
        self.link: Link | None = None
        self.handle = 0
        self.cols, self.rows = 80, 24
        self.audience = 0
        self.exit: messages.Exit | None = None
        self.said_exit = self.starved = False
        self.final = b""
        self.payload: object = None

    def flush(self, now: int) -> None:
        """Queues unsent output, due acknowledgements beside it, and EXIT once there is no more output."""
        link = self.link
        if link is None:
            return
        if not link.blocked:
            for kind, position, payload in self.out.take():
                link.send(kind, self.handle, position, payload)
            if self.exit is not None and not self.said_exit and not self.out.unsent:
                self.said_exit = True
                if self.final:
                    self.send_snapshot(0, self.exit.position, self.final, True)
                link.send_message(Type.EXIT, self.handle, self.exit)

    def finish(self, status: int | None, signal: int | None, now: int, final: bytes = b"") -> None:
        """Notes that the program ended after everything written so far; `final` (zstd) repaints its last screen."""
        if self.exit is None:
            self.exit = messages.Exit(self.out.end, status, signal, self.lane_states())
            self.final = final
            self.flush(now)

    def send_snapshot(self, token: int, position: int, data: bytes, zstd: bool) -> None:
        """Answers the CAPTURE with this token (0: the last screen of an ended program) in as many parts as it needs."""
        link = self.link
        if link is None:
            return
        # The output that a snapshot includes goes first, whatever the connection takes (one window at most): a client
        # that
        # were ahead of the journal could not resume.
        for kind, start, payload in self.out.take():
            link.send(kind, self.handle, start, payload)
        step = limits.SNAPSHOT_PART_BYTES
        parts = [data[at : at + step] for at in range(0, len(data), step)] or [b""]
        for number, piece in enumerate(parts):
            part = messages.Snapshot(position, number, number == len(parts) - 1, zstd, piece, None, token)
            link.send_message(Type.SNAPSHOT, self.handle, part)

    def lane_states(self) -> list[LaneState]:
        """Returns what was handled of each lane."""
        return [LaneState(lane.id, lane.intake.handled) for lane in self.lanes.values()]

    def next_timeout(self) -> int | None:
        """Returns when an acknowledgement is due by itself, in monotonic nanoseconds, or None."""
        link = self.link
        if link is None:
            return None
        # A lane that the node has not opened on this connection cannot be acknowledged, so nothing of it is due.
        due = [t for lane in self.lanes.values() if lane.link is link and (t := lane.intake.timeout()) is not None]
        return min(due) if due else None


class Opening:
    """OPEN for a session this pod does not have: the composer starts a program and calls `opened`, or `refused`."""

    __slots__ = ("link", "request", "session")

    def __init__(self, session: PodSession, request: messages.Open, link: Link) -> None:
        self.session = session
        self.request = request
        self.link = link


class Input:
    """Bytes, a signal or an end of input for a program; `end` is to be reported once that is handled."""

    __slots__ = ("data", "end", "kind", "lane", "session")

    def __init__(self, session: PodSession, lane: PodLane, kind: int, data: bytes, end: int) -> None:
        self.session = session
        self.lane = lane
        self.kind = kind
        self.data = data
        self.end = end


class Resized:
    """The program's terminal has another size now (in the session's `cols` and `rows`)."""

    __slots__ = ("session",)

    def __init__(self, session: PodSession) -> None:
        self.session = session


class CaptureAsked:
    """The node wants a snapshot; answer with `send_snapshot`."""

    __slots__ = ("request", "session")

    def __init__(self, session: PodSession, request: messages.Capture) -> None:
        self.session = session
        self.request = request


class AudienceChanged:
    """The number of terminals that answer queries changed (in the session's `audience`)."""

    __slots__ = ("session",)

    def __init__(self, session: PodSession) -> None:
        self.session = session


class Roomy:
    """There is room again for the output of a session that was `starved`."""

    __slots__ = ("session",)

    def __init__(self, session: PodSession) -> None:
        self.session = session


class Closed:
    """The node ends the session for good: stop its program, forget it."""

    __slots__ = ("session",)

    def __init__(self, session: PodSession) -> None:
        self.session = session


PodEvent = Opening | Input | Resized | CaptureAsked | AudienceChanged | Roomy | Closed


class PodMachine:
    """All sessions of one pod process and the node connections they are on.

    `instance` is 16 random bytes that name this run; `features` may have "many", "snapshot".
    """

    def __init__(self, instance: bytes, kind: Kind, features: list[str], label: str, sessions_max: int) -> None:
        self.hello = messages.Hello(messages.VERSION, kind, instance, features, label)
        self.sessions: dict[bytes, PodSession] = {}
        self._max = sessions_max
        self._handles: dict[Link, dict[int, PodSession | tuple[PodSession, PodLane]]] = {}

    def connected(self, link: Link) -> None:
        """Greets a node's new connection."""
        self._handles[link] = {}
        link.send_message(Type.HELLO, 0, self.hello)

    def disconnected(self, link: Link) -> None:
        """Forgets a connection; its sessions keep one window of output until a node comes back."""
        self._handles.pop(link, None)
        for session in self.sessions.values():
            if session.link is link:
                session.link = None
                session.audience = 0
            for lane in session.lanes.values():
                if lane.link is link:
                    lane.link = None

    def receive(self, link: Link, frame: Frame, now: int) -> PodEvent | None:
        """Takes one frame; returns what the composer must do.

        Raises ProtocolError when the node breaks the protocol; the connection then has to end.
        """
        kind, handle, _, payload = frame
        target = self._handles[link].get(handle)
        if type(target) is tuple:
            return self._lane_frame(target[0], target[1], frame, link, now)
        if kind == Type.PING and handle == 0:
            link.send(Type.PONG, 0, 0, payload)
        elif kind == Type.OPEN:
            return self._open(link, handle, messages.unpack(messages.Open, payload), now)
        elif kind == Type.LANE:
            self._lane(link, handle, messages.unpack(messages.Lane, payload), now)
        elif isinstance(target, PodSession) and target.link is link:
            return self._session_frame(target, kind, payload, now)
        return None

    def _lane_frame(self, session: PodSession, lane: PodLane, frame: Frame, link: Link, now: int) -> PodEvent | None:
        kind, handle, seq, payload = frame
        if session.link is not link:
            return None
        if kind == Type.CLOSE:
            session.lanes.pop(lane.id, None)
            self._handles[link].pop(handle, None)
        elif session.exit is None and (kind == _DATA or kind in _MARKS):
            lane.used = now
            new = lane.intake.receive(kind, seq, payload)
            if new is None:
                return None
            return Input(session, lane, kind, new, lane.intake.next)
        return None

    def _session_frame(self, session: PodSession, kind: int, payload: bytes, now: int) -> PodEvent | None:
        if kind == _ACK:
            session.out.acknowledge(int.from_bytes(payload, "big"))
            session.flush(now)
            return self._roomy(session)
        if kind == Type.RESIZE:
            size = messages.unpack(messages.Resize, payload)
            session.cols = min(max(size.cols, 1), _SIZE_LIMIT)
            session.rows = min(max(size.rows, 1), _SIZE_LIMIT)
            return Resized(session)
        if kind == Type.CAPTURE:
            return CaptureAsked(session, messages.unpack(messages.Capture, payload))
        if kind == Type.AUDIENCE:
            session.audience = messages.unpack(messages.Audience, payload).terminals
            return AudienceChanged(session)
        if kind == Type.CLOSE:
            self._forget(session)
            return Closed(session)
        return None

    def _roomy(self, session: PodSession) -> Roomy | None:
        if session.starved and session.out.room:
            session.starved = False
            return Roomy(session)
        return None

    def _forget(self, session: PodSession) -> None:
        """Drops a session and its handles: a node's connection outlives thousands of them."""
        self.sessions.pop(session.uid, None)
        handles = self._handles.get(session.link) if session.link is not None else None
        if handles is not None:
            handles.pop(session.handle, None)
            for lane in session.lanes.values():
                if lane.link is session.link:
                    handles.pop(lane.handle, None)
        session.link = None

    def _open(self, link: Link, handle: int, request: messages.Open, now: int) -> PodEvent | None:
        session = self.sessions.get(request.uid)
        if session is None:
            if not request.fresh:
                self._answer(link, handle, messages.error(Code.NOT_FOUND, "This agent has no such session."))
                return None
            if len(self.sessions) >= self._max:
                self._answer(
                    link, handle, messages.error(Code.LIMIT, f"This agent serves at most {self._max} sessions.")
                )
                return None
            session = self.sessions[request.uid] = PodSession(request.uid)
            # Who begins a session without a terminal (pipe) says 0: the program gets the usual size.
            session.cols = min(max(request.cols, 0), _SIZE_LIMIT) or session.cols
            session.rows = min(max(request.rows, 0), _SIZE_LIMIT) or session.rows
            self._hold(session, link, handle)
            return Opening(session, request, link)
        self._hold(session, link, handle)
        try:
            session.out.rewind(request.journalled)
        except ProtocolError:
            session.out.rewind(session.out.base)
        self._opened(session, now)
        return self._roomy(session)

    def _hold(self, session: PodSession, link: Link, handle: int) -> None:
        """Gives a session to a node's connection, which fences the one it was on."""
        session.link, session.handle = link, handle
        session.said_exit = False
        self._handles[link][handle] = session

    def _answer(self, link: Link, handle: int, error: messages.Error) -> None:
        link.send_message(Type.OPENED, handle, messages.Opened(0, 0, error=error))

    def _opened(self, session: PodSession, now: int) -> None:
        link = session.link
        if link is None:
            return
        out = session.out
        opened = messages.Opened(out.end, out.base, session.lane_states(), session.cols, session.rows)
        link.send_message(Type.OPENED, session.handle, opened)
        for lane in session.lanes.values():
            lane.intake.told(lane.intake.handled)
        session.flush(now)

    def opened(self, opening: Opening, now: int) -> None:
        """Reports that the program of a new session runs."""
        self._opened(opening.session, now)

    def refused(self, opening: Opening, code: Code, message: str) -> None:
        """Reports that a new session's program could not be started."""
        session = opening.session
        if session.link is not None:
            self._answer(session.link, session.handle, messages.error(code, message))
        self._forget(session)

    def _lane(self, link: Link, handle: int, request: messages.Lane, now: int) -> None:
        session = self.sessions.get(request.uid)
        if session is None or session.link is not link:
            return
        lane = session.lanes.get(request.attachment)
        if lane is None:
            if len(session.lanes) >= limits.LANES_MAX:
                self._evict(session, link)
            lane = session.lanes[request.attachment] = PodLane(request.attachment)
            # A lane that was given up here to make room goes on where the node knows it was.
            lane.intake.skip(request.next)
        # What was received but not handled yet on an older connection is still in the composer's hands.
        handles = self._handles[link]
        if lane.link is link:
            handles.pop(lane.handle, None)
        lane.used = now
        lane.link, lane.handle = link, handle
        handles[handle] = (session, lane)
        done = lane.intake.handled
        if done > request.next:
            # Handled while no connection could say so: the node learns it now, there may never be more input.
            lane.intake.told(done)
            link.send(_ACK, handle, done, done.to_bytes(8, "big"))

    def _evict(self, session: PodSession, link: Link) -> None:
        """Gives up the lane used least recently, one that the node has not opened on this connection if there is
        any.
        """
        oldest = min(session.lanes.values(), key=lambda known: (known.link is link, known.used))
        del session.lanes[oldest.id]
        if oldest.link is link:
            self._handles[link].pop(oldest.handle, None)

    def handled(self, item: Input, now: int) -> None:
        """Notes that the program really has this input; acknowledges when that is due."""
        item.lane.intake.handle(item.end, now)
        self._acknowledge(item.session, item.lane, now, False)

    def _acknowledge(self, session: PodSession, lane: PodLane, now: int, joining: bool) -> None:
        link = session.link
        if link is None or lane.link is not link:
            return
        ack = lane.intake.acknowledgement(now, joining)
        if ack is not None:
            link.send(_ACK, lane.handle, ack, ack.to_bytes(8, "big"))

    def acknowledge_due(self, session: PodSession, now: int, joining: bool) -> None:
        """Sends the acknowledgements of a session's lanes that are due, or that may join data going out now."""
        for lane in session.lanes.values():
            self._acknowledge(session, lane, now, joining)
