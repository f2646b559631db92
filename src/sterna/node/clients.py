"""One client's connection: CONNECT, RESUME, and the frames of its attachments."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from sterna import limits
from sterna.clock import SYSTEM_CLOCK
from sterna.errors import Code, ProtocolError, RefusedError, SternaError, StorageError
from sterna.ids import AttachmentId, DeviceId, SessionUid, check_name, clean_label
from sterna.node.doorkeeper import Visitor
from sterna.node.pods import RESTARTED_TEXT
from sterna.node.store import REVOKED_TEXT, AttachmentRow, SessionRow
from sterna.node.tickets import ENDED_TEXT
from sterna.protocol import messages
from sterna.protocol.attachment import Attachment
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.messages import ConnectBody, ResumeBody, Signed
from sterna.protocol.session import Session
from sterna.protocol.states import State

if TYPE_CHECKING:
    from asyncio import TimerHandle
    from collections.abc import Callable, Iterator

    from sterna.node.app import Node
    from sterna.transport.pump import Conduit, Owner

_DATA, _ACK, _SIGNAL, _EOF = int(Type.DATA), int(Type.ACK), int(Type.SIGNAL), int(Type.EOF)
_INPUT = frozenset((_DATA, _SIGNAL, _EOF))
_FAILURES = (Code.DENIED, Code.REVOKED, Code.EXPIRED)
_RETRY_SECONDS = 0.2
_UNUSED_SECONDS = 10.0
_CROWDED_SECONDS = 5.0
# What a frame takes of a turn's share: a signature, the database, or every device of a session have to do with these.
_COSTS = {
    int(Type.CONNECT): 32, int(Type.RESUME): 32, int(Type.CALL): 4,
    int(Type.RESIZE): 8, int(Type.SUSPEND): 8, int(Type.CLOSE): 8, int(Type.ERROR): 8,
}  # fmt: skip


class ClientConnection:
    """A connection from clients: any number of attachments, each on a handle that the client chose.

    `last` is when bytes last came and `since` when it began, in monotonic nanoseconds; `proved` says that somebody
    on it proved who they are, `who` is the last that did, a tenant's device; `visitor` may make CALLs; `frames` wait
    for this connection's next turn.
    """

    __slots__ = (
        "attachments", "calls", "early", "frames", "highest", "last", "link", "local", "node", "pending", "pinged",
        "proved", "pump", "since", "timer", "visitor", "who",
    )  # fmt: skip

    def __init__(self, node: Node, carry: Callable[[Link, Owner], Conduit], *, local: bool) -> None:
        """Begins with what carries the link it is given, and brings what comes to its owner."""
        self.node = node
        self.link = Link()
        self.attachments: dict[int, Attachment] = {}
        self.frames: Iterator[Frame] | None = None
        self.pending = self.calls = self.early = 0
        self.highest = 0
        self.since = self.last = SYSTEM_CLOCK.monotonic()
        self.proved = self.pinged = False
        self.timer: TimerHandle | None = None
        self.who: tuple[str, DeviceId] | None = None
        self.local = local
        self.visitor: Visitor | None = None
        self.pump = carry(self.link, self)

    # ---- the pump's owner --------------------------------------------------------------------------------------

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Takes the client's bytes."""
        self.pinged = False
        if self.frames is None:
            self.frames = iter(self.link.receive(data, limits.FRAMES_PER_TURN_MAX))
            self._deal()
            return
        self.last = SYSTEM_CLOCK.monotonic()
        self.link.keep(data)
        if self.link.waiting > limits.HELD_MAX_BYTES:
            self.pump.abort("it sends more than can be dealt with")

    def _go_on(self) -> None:
        """Takes this connection's next turn."""
        if not self.link.closing:
            self._deal()

    def _deal(self) -> None:
        """Deals with frames until this turn's share is used up; the rest waits for its turn, and nothing is read."""
        link, share = self.link, limits.FRAMES_PER_TURN_MAX
        while True:
            share = self._some(self.frames or iter(()), share)
            if link.closing or (share > 0 and not link.more):
                break
            if share <= 0:
                self.pump.hold(True)
                self.node.turns.wait(self._go_on)
                return
            self.frames = iter(link.receive(b"", share))
        self.frames = None
        self.pump.hold(False)
        link.check()
        if link.blocked and not self.proved:
            self.pump.abort("a stranger does not read what it is answered")

    def _some(self, frames: Iterator[Frame], share: int) -> int:
        """Deals with frames that cost no more than a share; returns what is left of it."""
        now = self.last = SYSTEM_CLOCK.monotonic()
        link = self.link
        try:
            for frame in frames:
                if link.closing:
                    break  # what comes behind a refusal does not count
                if link.out_bytes > limits.OUTBOUND_MAX_BYTES:
                    self.pump.abort("it asks for more than may wait for it")
                    break
                attachment = self.attachments.get(frame[1])
                if attachment is not None:
                    self._attached(attachment, frame, now)
                else:
                    self._frame(frame, now)
                share -= _COSTS.get(frame[0], 1)
                if share <= 0:
                    break
        except ProtocolError as error:
            link.fail(error.code, f"{error}.")
        return share

    def drained(self, pump: Conduit) -> None:
        """Goes on with bulk data."""
        now = SYSTEM_CLOCK.monotonic()
        for attachment in list(self.attachments.values()):
            if attachment.session is not None:
                attachment.session.push(attachment, now)
                attachment.session.pace(now)

    def ended(self, pump: Conduit, reason: str) -> None:
        """Detaches everything on this connection; the sessions stay."""
        now = SYSTEM_CLOCK.monotonic()
        for attachment in list(self.attachments.values()):
            self._detach(attachment, now)
        self.attachments.clear()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.node.gone(self, reason)

    # ---- frames of an attachment -------------------------------------------------------------------------------

    def _attached(self, attachment: Attachment, frame: Frame, now: int) -> None:
        """Deals with a frame of an attachment; late frames of a displaced one are dropped."""
        kind, handle, seq, payload = frame
        session = attachment.session
        if session is None:
            del self.attachments[handle]
            return
        if kind in _INPUT:
            session.client_input(attachment, kind, seq, payload, now)
        elif kind == _ACK:
            if len(payload) == 8:
                session.client_ack(attachment, payload, now)
        elif kind == Type.RESIZE:
            size = messages.unpack(messages.Resize, payload)
            session.client_resize(attachment, *_cells(size.cols, size.rows), now)
        elif kind == Type.SUSPEND:
            lane = attachment.lane
            position = lane.handled if lane is not None else 0
            self._detach(attachment, now, polite=True)
            self.link.send_message(Type.SUSPEND, handle, messages.Suspend(position))
        elif kind == Type.CLOSE:
            session.client_close(attachment, now)
        elif kind == Type.ERROR:
            self._detach(attachment, now)
        elif kind in (Type.CONNECT, Type.RESUME):
            raise ProtocolError(Code.BAD_HANDLE, f"handle {handle} is in use")
        if session.events:
            self.node.table.settle(session)
        if attachment.session is None:
            self.node.table.store_state(session)
        self.node.ticker.watch(session)

    def _detach(self, attachment: Attachment, now: int, *, polite: bool = False) -> None:
        session = attachment.session
        if session is not None:
            session.detach(attachment, now, polite=polite)
            if session.events:
                self.node.table.settle(session)
            self.node.table.store_state(session)
            self.node.ticker.watch(session)

    # ---- frames of the connection ------------------------------------------------------------------------------

    def _frame(self, frame: Frame, now: int) -> None:
        kind, handle, _, payload = frame
        if not self.proved:
            self.early += 1
            if self.early > limits.FRAMES_BEFORE_PROOF_MAX:
                raise ProtocolError(Code.RATE_LIMITED, "too many frames without a proof")
        if kind in (Type.CONNECT, Type.RESUME):
            self._begin(kind, handle, messages.unpack(Signed, payload), now)
        elif handle:
            if handle > self.highest:
                self.link.refuse(handle, Code.BAD_HANDLE, "There is nothing on this handle.")
        elif kind == Type.PING:
            self.link.send(Type.PONG, 0, 0, payload)
        elif kind == Type.CALL:
            self._call(messages.unpack(messages.Call, payload), len(payload))
        elif kind == Type.ERROR:
            self.pump.abort("the client reported an error")
        elif kind != Type.PONG:
            raise ProtocolError(Code.PROTOCOL, f"frame type 0x{kind:02x} makes no sense on session 0")

    def _begin(self, kind: int, handle: int, signed: Signed, now: int) -> None:
        """Checks a CONNECT or RESUME; a refusal ends only its handle, and a stranger's connection."""
        if handle <= self.highest:
            raise ProtocolError(Code.BAD_HANDLE, f"handle {handle} was used before")
        self.highest = handle
        if len(self.attachments) + self.pending >= limits.HANDLES_PER_CONNECTION_MAX:
            # Of those that ended here some are kept, for frames that are on their way still.
            self.attachments = {key: each for key, each in self.attachments.items() if each.session is not None}
        if len(self.attachments) + self.pending >= limits.HANDLES_PER_CONNECTION_MAX:
            self.link.refuse(handle, Code.LIMIT, "Too many sessions on one connection.")
            return
        door, address = self.node.doorkeeper, self.pump.peer
        braked = RefusedError(Code.RATE_LIMITED, "Too many failures from your address.", retry_after=60.0)
        blocked = door.blocked(address, now)
        if blocked and not door.admits(address, now):
            self._refuse(handle, braked, now)
            return
        try:
            if kind == Type.CONNECT:
                body = messages.unpack(ConnectBody, signed.body)
                visitor = door.connect(signed, body)
                self._admit(visitor.tenant, visitor.device if visitor.guest else None)
                self._prove(visitor.tenant, visitor.device)
                self.visitor = visitor
                self._connect(handle, visitor, body, now)
            else:
                resume = messages.unpack(ResumeBody, signed.body)
                row = door.resume(signed, resume)
                self._admit_back(row)
                self._prove(row.tenant, row.device)
                self.watch()
                self._resume(handle, row, resume)
        except ProtocolError:
            raise
        except SternaError as error:
            # The brake is for who fails: others behind the same address have proved themselves above.
            self._refuse(handle, braked if blocked and error.code in _FAILURES else error, now)

    def _admit(self, tenant: str, guest: DeviceId | None) -> None:
        if not self.local:  # those have places of their own
            self.node.crowd.admit(self, tenant, guest)

    def _admit_back(self, row: AttachmentRow) -> None:
        """Admits who RESUMEs; a guest with all the connections that it may have gets the place of the one it left."""
        guest = row.device if row.guest else None
        try:
            self._admit(row.tenant, guest)
        except RefusedError as error:
            session = self.node.table.loaded(row.number)
            old = session.attachments.get(row.id) if session is not None and guest is not None else None
            left = next((each for each in self.node.connections if old is not None and each.link is old.link), None)
            others = left.pending + len(left.living) - 1 if left is not None else 0
            if left is None or others:
                # Those that it lost count until that is noticed: it is to come again, not to give up.
                raise RefusedError(Code.BUSY, str(error), retry_after=_CROWDED_SECONDS) from None
            left.pump.abort("its device came back on another connection")
            self._admit(row.tenant, guest)

    @property
    def living(self) -> list[Attachment]:
        """The attachments that have not ended."""
        return [each for each in self.attachments.values() if each.session is not None]

    def _prove(self, tenant: str, device: DeviceId) -> None:
        self.who = tenant, device
        if not self.proved:
            self.proved = True
            self.node.proved(self)

    def watch(self) -> None:
        """Sees to it that the connection ends when it is of no use: nothing attached, and nobody who may make CALLs."""
        if self.timer is None:
            self._look_later(unused=False)

    def _look_later(self, *, unused: bool) -> None:
        loop, run = self.node.reactor.loop, self.node.reactor.run
        self.timer = loop.call_later(_UNUSED_SECONDS, run, functools.partial(self._look, unused=unused))

    def _look(self, *, unused: bool) -> None:
        """Ends it if it is unused, and was so when it was looked at before."""
        if self.pump.closed or self.link.closing or self.visitor is not None:
            self.timer = None
        elif self.pending or self.living:
            self._look_later(unused=False)
        elif not unused:
            self._look_later(unused=True)
        else:
            self.link.fail(Code.TIMEOUT, "Nothing is attached on this connection: connect again when you need it.")

    def _refuse(self, handle: int, error: SternaError, now: int) -> None:
        more: dict[str, float | int | str | None] = {}
        if isinstance(error, RefusedError):
            more = {"retry_after": error.retry_after, "address": error.address, "value": error.value}
        if error.code in _FAILURES:
            self.node.doorkeeper.failed(self.pump.peer, now, error.code)
        if self.proved or error.code in (Code.STALE, Code.SUPERSEDED):
            self.link.refuse(handle, error.code, str(error), **more)
        else:
            self.link.refuse(handle, error.code, str(error), **more)
            self.link.closing = True

    # ---- CONNECT -----------------------------------------------------------------------------------------------

    def _connect(self, handle: int, visitor: Visitor, body: ConnectBody, now: int) -> None:
        if body.want == "call":
            self.link.send_message(Type.ACCEPT, handle, self._bare_accept(body))
            return
        if self.node.draining:
            raise RefusedError(Code.DRAINING, "This node is being drained.", retry_after=5.0)
        attachment_id = AttachmentId(body.attachment)
        session, created = self._entered(visitor, body, attachment_id)
        if session is None:
            raise RefusedError(Code.ENDED, "This session was closed.")
        attachment = self._attachment(handle, attachment_id, visitor.device, body.mode, clean_label(body.label))
        attachment.exact = body.exact
        attachment.answers = bool(body.term) and not body.exact
        attachment.cols, attachment.rows = _cells(body.cols, body.rows)
        self.pending += 1

        def ready(reason: str) -> None:
            self.pending -= 1
            self._connected(session, attachment, body, created, reason, guest=visitor.guest)

        opening = self._fresh_open(session, body) if created else None
        self.node.registry.ensure(session, ready, fresh=opening)

    def _entered(self, visitor: Visitor, body: ConnectBody, attachment_id: AttachmentId) -> tuple[Session | None, bool]:
        """Does `_enter` and loads the session; where the disk fails, nothing of a new one is left."""
        table, begun = self.node.table, 0
        try:
            with self.node.store.transaction():
                row, created = self._enter(visitor, body, attachment_id)
                begun = row.number if created else 0
                session = table.load(row.number)
        except StorageError:
            if begun:
                table.discard(begun)
            raise
        return session, created

    def _enter(self, visitor: Visitor, body: ConnectBody, attachment_id: AttachmentId) -> tuple[SessionRow, bool]:
        """Returns the session that a CONNECT is about and whether it is new, and stores the attachment.

        A CONNECT that was heard before, whose ACCEPT may be lost, gets the session it got then.
        """
        store, wall = self.node.store, SYSTEM_CLOCK.wall()
        known = store.find_request(visitor.device, body.request, wall)
        if known is not None and known.attachment != attachment_id:
            raise RefusedError(Code.BAD_REQUEST, "This request was made for another attachment: use a new one.")
        row, created = (store.session(known.session), False) if known is not None else self._find(visitor, body)
        if row is None or not self._allowed(visitor, row, body.mode):
            raise RefusedError(Code.NOT_FOUND, "There is no such session.")
        if known is None:
            live = self.node.table.loaded(row.number)
            connected = live.attachments if live is not None else ()
            store.add_attachment(
                attachment_id, row.number, visitor.device, body.mode, body.exact, wall, connected, visitor.ticket
            )
            store.remember_request(visitor.device, body.request, row.number, attachment_id, wall)
        return row, created

    def _connected(
        self, session: Session, attachment: Attachment, body: ConnectBody, created: bool, reason: str, *, guest: bool
    ) -> None:
        """Ends a CONNECT once the session is open at its pod, or once it is clear that it will not be."""
        now = SYSTEM_CLOCK.monotonic()
        table = self.node.table
        if reason and created:
            table.refused(session.id, reason, now)
            self.link.refuse(attachment.handle, Code.NO_AGENT, reason)
            return
        if session.state is State.CLOSED:
            self.link.refuse(attachment.handle, Code.ENDED, "This session was closed.")
            return
        if self.pump.closed:
            return
        device = self.node.store.device(attachment.device, session.tenant)
        if device is not None and device.revoked:
            self.link.refuse(attachment.handle, Code.REVOKED, REVOKED_TEXT)
            return
        if guest and self.node.store.attachment(attachment.id) is None:
            self.link.refuse(attachment.handle, Code.DENIED, ENDED_TEXT)
            return
        full = no_place(session, attachment, guest=guest)
        if full:
            self.link.refuse(attachment.handle, Code.LIMIT, full)
            return
        self.attachments[attachment.handle] = attachment
        if body.displace and attachment.mode == "drive":
            session.displace(None, Code.DISPLACED, "Another device took the session over.", now)
        old = session.attachments.get(attachment.id)
        if old is not None:
            session.drop(old, Code.DISPLACED, "This attachment was connected again.", now)
        node, quic = self.node.identity.node_id, self.node.quic_port
        session.attach(attachment, now, output=body.output, node=node, created=created, quic=quic)
        self._settled(session)

    def _find(self, visitor: Visitor, body: ConnectBody) -> tuple[SessionRow | None, bool]:
        """Returns the session that a CONNECT means, made if it asks for that."""
        store = self.node.store
        if visitor.session is not None:
            row = store.session(visitor.session)
            return row if row is None or body.uid in (None, row.uid) else None, False
        if body.want == "join":
            row = store.session_by_uid(SessionUid(body.uid or b"")) if body.uid else None
            if row is None and body.name:
                row = store.session_by_name(visitor.tenant, body.name)
            return row, False
        if body.want == "named" and body.name:
            row = store.session_by_name(visitor.tenant, check_name(body.name))
            if row is not None:
                return row, False
        elif body.want == "latest":
            row = self._latest(visitor, body.agent) if body.agent else None
            if row is not None:
                return row, False
        return self._create(visitor, body), True

    def _latest(self, visitor: Visitor, agent: str) -> SessionRow | None:
        """Returns the latest session that goes on; one of an earlier run of the agent's process is over."""
        pod = self.node.registry.pod(visitor.tenant, agent)
        connection = pod.connection if pod is not None else None
        hello = connection.hello if connection is not None else None
        while (row := self.node.store.latest_session(visitor.tenant, agent, visitor.device)) is not None:
            if hello is None or row.instance in (b"", hello.instance):
                break
            self.node.table.agent_lost(row.number, RESTARTED_TEXT, SYSTEM_CLOCK.monotonic())
            after = self.node.store.session(row.number)
            if after is not None and after.state not in (State.EXITED, State.CLOSED):
                break  # the disk is full: its end could not be stored
        return row

    def _create(self, visitor: Visitor, body: ConnectBody) -> SessionRow:
        if "drive" not in visitor.modes or body.mode != "drive":
            raise RefusedError(Code.NOT_FOUND, "There is no such session, and a watcher cannot begin one.")
        pod = self.node.registry.pod(visitor.tenant, body.agent)
        if pod is None or not body.agent:
            raise RefusedError(
                Code.NO_AGENT, f"There is no agent {body.agent!r} here; `sterna ls` shows what there is."
            )
        _check_start(body)
        cols, rows = _cells(body.cols, body.rows)
        connection = pod.connection
        return self.node.store.create_session(
            uid=SessionUid(os.urandom(16)), log_id=self.node.store.next_log_id(), tenant=visitor.tenant,
            agent=body.agent, name=check_name(body.name) if body.name else None, label="", kind=pod.kind,
            owner=visitor.device, instance=connection.hello.instance if connection is not None and connection.hello is
            not None else b"", cols=cols, rows=rows, cwd=body.cwd, argv=body.argv, boot=self.node.table.boot,
            now=SYSTEM_CLOCK.wall(),
        )  # fmt: skip

    def _fresh_open(self, session: Session, body: ConnectBody) -> messages.Open:
        cols, rows = _cells(body.cols, body.rows)
        term = body.term[: limits.TERM_MAX_CHARS]
        return messages.Open(session.uid, 0, True, cols, rows, term, session.name, body.argv, body.cwd, body.env)

    def _allowed(self, visitor: Visitor, row: SessionRow, mode: str) -> bool:
        if row.tenant != visitor.tenant or (visitor.session is not None and visitor.session != row.number):
            return False
        return visitor.may_use(row.agent, mode)

    def _attachment(
        self, handle: int, attachment_id: AttachmentId, device: DeviceId, mode: str, label: str
    ) -> Attachment:
        return Attachment(attachment_id, self.link, handle, device, "drive" if mode == "drive" else "watch", label)

    def _bare_accept(self, body: ConnectBody) -> messages.Accept:
        return messages.Accept(
            uid=b"", log=0, kind="stream", epoch=0, node=self.node.identity.node_id, name="", agent="", output=0,
            input=0, window=0, keepalive=limits.KEEPALIVE_SECONDS, mode=body.mode,
        )  # fmt: skip

    # ---- RESUME ------------------------------------------------------------------------------------------------

    def _resume(self, handle: int, row: AttachmentRow, body: ResumeBody) -> None:
        session = self.node.table.load(row.number)
        if session is None:
            end = self.node.store.session(row.number)
            if end is None:
                raise RefusedError(Code.DENIED, "Access denied: the token, ticket or key is not valid for this.")
            farewell = messages.Close(end.end_code or int(Code.ENDED), end.end_reason or "", end.status, end.signal)
            self.link.send_message(Type.CLOSE, handle, farewell)
            return
        attachment = self._attachment(handle, row.id, row.device, row.mode, clean_label(row.label))
        attachment.exact = row.exact
        attachment.cols, attachment.rows = _cells(body.cols, body.rows)
        attachment.answers = not row.exact and bool(body.cols)
        self.pending += 1

        def ready(reason: str) -> None:
            self.pending -= 1
            if self.pump.closed:
                return
            if reason and session.ended is None:
                # Only the agent knows how much input it has handled.
                self.link.refuse(handle, Code.BUSY, reason, retry_after=_RETRY_SECONDS)
                return
            if session.state is State.CLOSED:
                self.link.refuse(handle, Code.ENDED, "This session was closed.")
                return
            known = self.node.store.device(row.device, session.tenant)
            if known is not None and known.revoked:  # while the agent was waited for
                self.link.refuse(handle, Code.REVOKED, REVOKED_TEXT)
                return
            if row.guest and self.node.store.attachment(row.id) is None:
                self.link.refuse(handle, Code.DENIED, ENDED_TEXT)
                return
            full = no_place(session, attachment, guest=row.guest)
            if full:
                self.link.refuse(handle, Code.LIMIT, full)
                return
            self.attachments[handle] = attachment
            session.resume(attachment, body, SYSTEM_CLOCK.monotonic())
            self._settled(session)

        self.node.registry.ensure(session, ready)

    def _settled(self, session: Session) -> None:
        if session.events:
            self.node.table.settle(session)
        self.node.table.store_state(session)
        self.node.ticker.watch(session)

    # ---- CALL --------------------------------------------------------------------------------------------------

    def _call(self, call: messages.Call, size: int) -> None:
        visitor = self.visitor
        if visitor is None:
            raise ProtocolError(Code.DENIED, "CALL comes after CONNECT")
        if self.calls >= limits.CALLS_WAITING_MAX:
            raise ProtocolError(Code.LIMIT, "too many CALLs at once")
        if not self.node.call_queue.add(visitor.tenant, visitor.device, size, functools.partial(self._answer, call)):
            raise ProtocolError(Code.LIMIT, "too many CALLs at once from this device or tenant")
        self.calls += 1

    def _answer(self, call: messages.Call) -> None:
        self.calls -= 1
        if self.pump.closed or self.link.closing:
            return
        if self.visitor is None:
            self.link.fail(Code.REVOKED, REVOKED_TEXT)
        elif self.pump.queued > limits.OUTBOUND_MAX_BYTES:
            self.pump.abort("it asks for more than may wait for it")
        else:
            result = self.node.calls.answer(self, self.visitor, call, SYSTEM_CLOCK.monotonic())
            self.link.send_message(Type.RESULT, 0, result)


def no_place(session: Session, attachment: Attachment, *, guest: bool) -> str:
    """Returns why a session has no place for one more attachment, "" if it has one.

    Who came by a link gets at most a quarter of the places, and all of them together three quarters: the others are
    for those whose session it is.
    """
    drives = attachment.mode == "drive"
    most = limits.ATTACHMENTS_MAX if drives else limits.WATCHERS_MAX
    there = [
        other.device for other in session.attachments.values()
        if other.mode == attachment.mode and other.id != attachment.id
    ]  # fmt: skip
    if len(there) >= most:
        return f"A session has at most {most} {'attachments' if drives else 'watchers'}."
    quarter = most // 4
    if guest and (there.count(attachment.device) >= quarter or len(there) >= most - quarter):
        return "Links have too many places in this session already: leave it elsewhere, then try again."
    return ""


def _cells(cols: int, rows: int) -> tuple[int, int]:
    """Returns a terminal size within bounds; 0 means that there is no terminal."""
    most = limits.SIZE_MAX_CELLS
    return min(max(cols, 0), most), min(max(rows, 0), most)


def _check_start(body: ConnectBody) -> None:
    """Refuses commands, directories and variables beyond their bounds."""
    argv, cwd = body.argv or [], body.cwd or ""
    if len(argv) > limits.ARGV_MAX or sum(map(len, argv)) > limits.ARGV_MAX_BYTES or len(cwd) > limits.ARGV_MAX_BYTES:
        raise RefusedError(Code.TOO_LARGE, "The command is too long.")
    if len(body.env) > limits.ENV_MAX or sum(len(k) + len(v) for k, v in body.env.items()) > limits.ARGV_MAX_BYTES:
        raise RefusedError(Code.TOO_LARGE, "There are too many variables.")
