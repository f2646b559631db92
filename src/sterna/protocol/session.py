"""The node's side of one session: attachments, pace, replay and the way to the pod (docs/protocol.md, sections 2 to 5).

Sans-IO: bytes go to `Link`s, output goes to an output log that is handed in, time is passed in. What the node has to do
beyond that (store, announce, forget) stands in `events`.
"""

from __future__ import annotations

from collections.abc import Callable

from sterna import limits
from sterna.errors import Code, LostBytesError, ProtocolError, StorageError
from sterna.ids import AttachmentId, SessionUid
from sterna.protocol import messages
from sterna.protocol.attachment import Attachment, Capture, Ended, Lane, OutputLog, PodPort
from sterna.protocol.frame import Type, expand
from sterna.protocol.messages import Kind, LaneState, Lost
from sterna.protocol.states import Cause, State, step
from sterna.protocol.stream import Intake
from sterna.protocol.typist import Answering
from sterna.units import MILLISECOND, SECOND

_DATA = int(Type.DATA)
_ACK = int(Type.ACK)
_SIGNAL = int(Type.SIGNAL)
_STILL = limits.STILL_SECONDS * SECOND
_HELD_BYTES = limits.RING_BYTES // 2
_NEVER = 1 << 63
_RESIZE_EVERY = limits.RESIZE_EVERY_MS * MILLISECOND
_REPAINT_EVERY = limits.REPAINT_EVERY_MS * MILLISECOND
_PARTS_MAX = limits.SNAPSHOT_MAX_BYTES // limits.SNAPSHOT_PART_BYTES + 1


class Session:
    """One session as its node sees it.

    `events` collects what the node must act on: "exited", "closed", "storage". `overwrite` False holds the agent when
    nobody is attached and the log is full of unread output; `holding` does so because the last driver was an exact
    one, whose next connection wants every byte. `spare` makes the log that takes over when the disk fails.
    """

    __slots__ = (
        "_answering", "_away", "_captures", "_read", "_repaint", "_repaint_at", "_resize_at", "_token", "_wanted",
        "agent", "attachments", "cols", "ended", "epoch", "events", "final", "holding", "id", "intake", "kind", "lanes",
        "lanes_known", "log", "log_id", "name", "overwrite", "port", "read_to", "rows", "spare", "state", "tenant",
        "typist", "uid",
    )  # fmt: skip

    def __init__(
        self,
        uid: SessionUid,
        log: OutputLog,
        *,
        log_id: int,
        kind: Kind,
        tenant: str,
        agent: str,
        name: str,
        number: int = 0,
    ) -> None:
        self.id = number
        self.uid = uid
        self.log = log
        self.log_id = log_id
        self.kind: Kind = kind
        self.tenant = tenant
        self.agent = agent
        self.name = name
        self.epoch = 1
        self.cols = self.rows = 0
        self.state = State.CONNECTING
        self.overwrite = True
        self.holding = False
        self.spare: Callable[[OutputLog], OutputLog] | None = None
        self.read_to = log.tail
        log.keep_from(self.read_to)
        self.intake = Intake(log.end)
        self.lanes: dict[AttachmentId, Lane] = {}
        self.lanes_known = False
        self.attachments: dict[AttachmentId, Attachment] = {}
        self.port: PodPort | None = None
        self.typist: Attachment | None = None
        self.ended: Ended | None = None
        self.events: list[str] = []
        self.final = b""
        self._answering = Answering()
        self._captures: dict[int, Capture] = {}
        self._away: dict[AttachmentId, tuple[int, int]] = {}  # exact drivers without a connection: position, since when
        self._token = 0
        self._wanted: tuple[int, int] | None = None  # a size that the pod has not been told yet
        self._resize_at = self._repaint_at = 0  # when the next one may be told, and the next extra picture be asked for
        self._repaint = False
        self._read = False  # a driver has had all output and the end

    # ---- the pod -----------------------------------------------------------------------------------------------

    def pod_opened(self, port: PodPort, opened: messages.Opened, now: int) -> None:
        """Takes the session up at a pod that has it: its lanes are the truth about input.

        Raises ProtocolError (`GAP`) when the pod no longer has output that the log lacks; the caller then begins a new
        log.
        """
        if opened.base > self.log.end or opened.next < self.log.end:
            raise ProtocolError(
                Code.GAP, f"the agent has output {opened.base} to {opened.next}, the log ends at {self.log.end}"
            )
        self.port = port
        self.lanes_known = True
        self.cols, self.rows = opened.cols, opened.rows
        known = {AttachmentId(lane.attachment): lane.next for lane in opened.lanes}
        for lane_id, handled in known.items():
            lane = self.lanes.get(lane_id) or self.lanes.setdefault(lane_id, Lane(lane_id))
            self._lane_truth(lane, handled)
        for lane_id in [i for i in self.lanes if i not in known and self.lanes[i].attachment is None]:
            del self.lanes[lane_id]
        self.intake.skip(self.log.end)
        self.state = step(self.state, Cause.OPENED)
        if self.attachments:
            self.state = step(self.state, Cause.ATTACHED)
        self._resize(now)
        for attachment in list(self.attachments.values()):
            if attachment.lane is not None and attachment.lane.id not in known:
                self._lane_truth(attachment.lane, 0)
            if attachment.resync:
                self._end(attachment, Code.RESYNC, "The agent's connection was renewed; resume.")
            elif attachment.waiting and self._can_capture():
                self._capture(attachment)
            elif attachment.waiting:
                self._no_snapshot(attachment, now)
        if not self.attachments:
            self.state = step(self.state, Cause.DETACHED)
        self._audience()
        self.pace(now)

    def _lane_truth(self, lane: Lane, handled: int) -> None:
        """Sets a lane to what the pod has handled; input forwarded beyond that is the client's to send again."""
        attachment = lane.attachment
        if attachment is not None and lane.next != handled:
            attachment.resync = True
        elif attachment is not None and lane.handled != handled:
            # The pod acknowledged this on the connection that was lost.
            attachment.link.send(_ACK, attachment.handle, handled, handled.to_bytes(8, "big"))
        lane.handled = lane.next = handled
        lane.handle = 0
        if attachment is not None:
            self._open_lane(lane)

    def pod_gone(self) -> None:
        """Notes that the connection to the pod is lost; whether the agent is, shows when it comes back or not."""
        self.port = None
        self.lanes_known = False
        for lane in self.lanes.values():
            lane.handle = 0
        # Who waits for a snapshot goes on waiting: it is asked for again when the pod is back.
        self._captures.clear()
        if self._wanted is None and self.cols and self.rows:
            self._wanted = self.cols, self.rows  # the last RESIZE may be lost with the connection

    def pod_data(self, seq: int, payload: bytes, now: int) -> None:
        """Takes output: journal first, then the clients, then the acknowledgement to the pod."""
        new = self.intake.receive(_DATA, seq, payload)
        if new is None:
            return
        log = self.log
        position = log.end
        try:
            log.append(new)
        except StorageError:
            if self.spare is None:
                self.intake.skip(position)  # nothing was taken; the pod sends it again
                raise
            # The disk is full or failing: the session goes on in memory, and says so.
            log = self.log = self.spare(log)
            log.append(new)
            self.events.append("storage")
            self._tell(messages.Event("storage"))
        end = position + len(new)
        for attachment in list(self.attachments.values()):
            if (
                attachment.cursor == position
                and end - attachment.acked <= attachment.window
                and not (attachment.waiting or attachment.link.blocked)
            ):
                attachment.link.send(_DATA, attachment.handle, position, new)
                if attachment.acked == position:
                    attachment.progress = now
                attachment.cursor = end
            else:
                self.push(attachment, now)
        self.pace(now)

    def pod_ack(self, lane: Lane, payload: bytes) -> None:
        """Forwards exactly what the pod has handled of one lane."""
        position = int.from_bytes(payload, "big")
        if position < lane.handled:
            return
        if position > limits.POSITION_MAX:
            raise ProtocolError(Code.PROTOCOL, f"input position {position} was acknowledged, which none can have")
        lane.handled = position
        # What the pod had in hand when its connection was lost is acknowledged on the next one.
        lane.next = max(lane.next, position)
        attachment = lane.attachment
        if attachment is not None:
            attachment.link.send(_ACK, attachment.handle, position, payload)

    def pod_snapshot(self, part: messages.Snapshot, now: int) -> None:
        """Passes one part of a snapshot on to the attachments that wait for it."""
        if part.token == 0:
            self._take_final(part)
            return
        capture = self._captures.get(part.token)
        if capture is None:
            return
        if part.part != capture.parts or part.part >= _PARTS_MAX or part.position > self.log.end:
            raise ProtocolError(Code.BAD_PAYLOAD, "the parts of a snapshot are out of order, too many, or too early")
        capture.parts += 1
        if capture.extra:
            # Who has fallen behind gets a whole one, or sees for itself what the program draws.
            capture.attachments = [a for a in capture.attachments if not a.waiting and a.cursor == part.position]
        for attachment in capture.attachments:
            lost = None
            if part.part == 0 and attachment.lost is not None:
                lost = Lost(attachment.lost.start, max(part.position, attachment.lost.start))
            sent = messages.Snapshot(part.position, part.part, part.last, part.zstd, part.data, lost)
            attachment.link.send_message(Type.SNAPSHOT, attachment.handle, sent)
        if part.last:
            del self._captures[part.token]
            if not capture.extra:
                self._captured(capture.attachments, part.position, now)

    def _captured(self, attachments: list[Attachment], position: int, now: int) -> None:
        """Lets output flow again to who has a whole snapshot."""
        for attachment in attachments:
            attachment.waiting = False
            attachment.lost = None
            attachment.cursor = attachment.acked = position  # also who joined behind it: what the ring lacks is named
            attachment.progress = now
        for attachment in attachments:
            self.push(attachment, now)
        self._capture_waiting()
        self.pace(now)

    def _take_final(self, part: messages.Snapshot) -> None:
        """Collects the last screen of a program that ended, for who attaches later."""
        if part.part == 0:
            self.final = b""
        # One that is too large, or whose beginning was not kept, is of no use.
        if part.part == 0 or self.final:
            self.final += part.data
        if len(self.final) > limits.FINAL_MAX_BYTES:
            self.final = b""

    def pod_exit(self, exit_: messages.Exit, now: int) -> None:
        """Notes that the program ended, after all of its output."""
        for state in exit_.lanes:
            lane = self.lanes.get(AttachmentId(state.attachment))
            if lane is not None and lane.handled < state.next:
                self.pod_ack(lane, state.next.to_bytes(8, "big"))
        self.finish(Ended(Code.ENDED, "The program ended.", exit_.status, exit_.signal), Cause.EXIT, now)

    def agent_lost(self, now: int, reason: str) -> None:
        """Ends the session because its agent is gone: uncertain input is named, nothing is repeated."""
        for lane in self.lanes.values():
            if lane.attachment is not None and lane.next > lane.handled:
                event = messages.Event("uncertain", start=lane.handled, end=lane.next)
                lane.attachment.link.send_message(Type.EVENT, lane.attachment.handle, event)
        self.finish(Ended(Code.AGENT_LOST, reason), Cause.LOST, now)

    def finish(self, ended: Ended, cause: Cause, now: int) -> None:
        """Moves to `exited`: what is left of the output still goes out, then CLOSE."""
        after = step(self.state, cause)
        if after is self.state:
            return
        self.state = after
        self.ended = ended
        self._captures.clear()
        self.events.append("exited")
        for attachment in list(self.attachments.values()):
            if attachment.waiting:
                self._no_snapshot(attachment, now)
            else:
                self.push(attachment, now)

    def release(self) -> None:
        """Tells the pod that it may forget an ended session, once the end is stored."""
        if self.port is not None:
            self.port.link.send_message(Type.CLOSE, self.port.handle, messages.Close(reason="stored"))
            self.port.release(self)
            self.port = None

    # ---- attachments -------------------------------------------------------------------------------------------

    def attach(
        self, attachment: Attachment, now: int, *, output: int | None, node: bytes, created: bool, quic: int = 0
    ) -> None:  # fmt: skip
        """Adds a new attachment: ACCEPT, then history as asked for (`output`, a snapshot, or the oldest kept)."""
        lane = self._join(attachment, now)
        log = self.log
        start = log.tail if output is None else min(max(output, log.tail), log.end)
        # Who began the session gets its few first bytes as they were printed: nothing is cleared, as with ssh.
        fresh = not (attachment.exact or created) and output is None and log.end > 0
        final = self.final if fresh and self.ended is not None else b""
        snapshot = bool(final) or (fresh and self._can_capture())
        attachment.cursor = attachment.acked = start
        accept = messages.Accept(
            uid=self.uid, log=self.log_id, kind=self.kind, epoch=self.epoch, node=node, name=self.name,
            agent=self.agent, output=start, input=lane.handled if lane is not None else 0, window=attachment.window,
            keepalive=limits.KEEPALIVE_SECONDS, created=created, snapshot=snapshot, mode=attachment.mode,
            state=self.state.value, head=log.end, quic=quic,
        )  # fmt: skip
        attachment.link.send_message(Type.ACCEPT, attachment.handle, accept)
        if attachment.mode == "drive" and attachment.answers:
            self._typing(attachment, now)  # before the picture is taken: it has to fit who comes
        if final:
            self._send_final(attachment)
        elif snapshot:
            self._capture(attachment)
        self._settle(attachment, now)

    def _send_final(self, attachment: Attachment) -> None:
        """Paints the last screen of an ended program instead of its history."""
        data, end, step = self.final, self.log.end, limits.SNAPSHOT_PART_BYTES
        for at in range(0, len(data), step):
            part = messages.Snapshot(end, at // step, at + step >= len(data), True, data[at : at + step])
            attachment.link.send_message(Type.SNAPSHOT, attachment.handle, part)
        attachment.cursor = attachment.acked = end

    def resume(self, attachment: Attachment, body: messages.ResumeBody, now: int) -> None:
        """Brings an attachment back after its proof was checked; the connection it had is displaced now."""
        unknown = attachment.mode == "drive" and attachment.id not in self.lanes
        gone = unknown and self.ended is not None
        lane = self._join(attachment, now, body.sent if unknown and not gone else 0)
        log, output = self.log, body.output
        lost: Lost | None = None
        if body.log != self.log_id or output > log.end:
            lost, output = Lost(output, max(log.tail, output)), log.tail
        elif output < log.tail:
            lost, output = Lost(output, log.tail), log.tail
        snapshot = lost is not None and not attachment.exact and self._can_capture()
        attachment.cursor = attachment.acked = output
        if lost is None and body.handled is not None:
            attachment.acked = min(body.handled, output)
        attachment.lost = lost if snapshot else None
        position = None if gone else lane.handled if lane is not None else 0
        resumed = messages.Resumed(
            epoch=self.epoch, log=self.log_id, output=output, input=position, lost=lost,
            snapshot=snapshot, state=self.state.value, head=log.end, forgotten=unknown and not gone,
        )  # fmt: skip
        attachment.link.send_message(Type.RESUMED, attachment.handle, resumed)
        if lane is not None:
            lane.next = max(lane.handled, lane.next)
        if snapshot:
            self._capture(attachment)
        self._settle(attachment, now)

    def _join(self, attachment: Attachment, now: int, start: int = 0) -> Lane | None:
        """Registers an attachment and opens a driver's lane at the pod; the connection it had is displaced.

        A lane that nobody knows begins at input position `start`. A watcher has none: it must not cost a driver its.
        """
        old = self.attachments.get(attachment.id)
        if old is not None:
            self._end(old, Code.DISPLACED, "This attachment was resumed on another connection.", notify=False)
        self.attachments[attachment.id] = attachment
        attachment.session = self
        attachment.progress = now
        self._away.pop(attachment.id, None)
        self.state = step(self.state, Cause.ATTACHED)
        if attachment.mode != "drive":
            return None
        self.holding = attachment.exact
        lane = self.lanes.get(attachment.id)
        if lane is None:
            if len(self.lanes) >= limits.LANES_MAX:
                idle = [known for known in self.lanes.values() if known.attachment is None]
                if idle:
                    gone = min(idle, key=lambda known: known.used)
                    del self.lanes[gone.id]
                    if self.port is not None and gone.handle:
                        self.port.link.send_message(Type.CLOSE, gone.handle, messages.Close(reason="forgotten"))
            lane = self.lanes[attachment.id] = Lane(attachment.id, start)
        lane.used = now
        lane.attachment = attachment
        attachment.lane = lane
        if self.port is not None and not lane.handle:
            self._open_lane(lane)
        return lane

    def _open_lane(self, lane: Lane) -> None:
        port = self.port
        if port is not None:
            lane.handle = port.lane_handle(self, lane)
            port.link.send_message(Type.LANE, lane.handle, messages.Lane(self.uid, lane.id, lane.handled))

    def _settle(self, attachment: Attachment, now: int) -> None:
        """Ends an attach or resume: who arrives counts as the typist, is told of an end if there was one, and is
        fed.
        """
        if attachment.mode == "drive" and attachment.answers and self.typist is not attachment:
            self._typing(attachment, now)
        self._audience()
        self._announce("joined", attachment)
        self.push(attachment, now)
        self.pace(now)

    def detach(self, attachment: Attachment, now: int, *, polite: bool = False) -> None:
        """Removes an attachment whose connection is gone, or that said SUSPEND (`polite`); its lane stays."""
        if self.attachments.get(attachment.id) is not attachment:
            return
        del self.attachments[attachment.id]
        if attachment.lane is not None:
            attachment.lane.used = now
        self._forget(attachment)
        if attachment.mode == "drive" and attachment.exact and not polite:
            self._away[attachment.id] = attachment.acked, now
        if not self.attachments:
            self.state = step(self.state, Cause.DETACHED)
        self._announce("left", attachment)
        self._audience()
        self.pace(now)

    def _forget(self, attachment: Attachment) -> None:
        attachment.session = None
        self._answering.forget(attachment)
        self._note_read(attachment)
        if attachment.lane is not None and attachment.lane.attachment is attachment:
            attachment.lane.attachment = None
        # What is drawn already still comes: it serves who joins until then, or is dropped.
        for capture in self._captures.values():
            if attachment in capture.attachments:
                capture.attachments.remove(attachment)
        if self.typist is attachment:
            self.typist = None

    def _end(self, attachment: Attachment, code: Code, reason: str, *, notify: bool = True) -> None:
        """Ends one attachment from our side; the session goes on."""
        if self.attachments.get(attachment.id) is attachment:
            del self.attachments[attachment.id]
        self._forget(attachment)
        attachment.link.refuse(attachment.handle, code, reason)
        if notify:
            self._announce("left", attachment)

    def displace(self, keep: Attachment | None, code: Code, reason: str, now: int) -> None:
        """Ends all attachments but `keep` (attach -d, a revoked device, a close)."""
        for attachment in list(self.attachments.values()):
            if attachment is not keep:
                self._end(attachment, code, reason)
        if not self.attachments:
            self.state = step(self.state, Cause.DETACHED)
        self._audience()
        self.pace(now)

    def drop(self, attachment: Attachment, code: Code, reason: str, now: int) -> None:
        """Ends one attachment with an ERROR of its own."""
        self._end(attachment, code, reason)
        if not self.attachments:
            self.state = step(self.state, Cause.DETACHED)
        self._audience()
        self.pace(now)

    # ---- what clients send -------------------------------------------------------------------------------------

    def client_input(self, attachment: Attachment, kind: int, seq: int, payload: bytes, now: int) -> None:
        """Forwards DATA, SIGNAL or EOF to the pod; what was forwarded before is dropped, a gap is an error."""
        if attachment.mode != "drive":
            attachment.link.refuse(attachment.handle, Code.READ_ONLY, "This attachment may only watch.")
            self.detach(attachment, now)
            return
        lane, port = attachment.lane, self.port
        assert lane is not None
        if port is None or not lane.handle or self.ended is not None:
            attachment.resync = self.ended is None
            return
        position = expand(seq, lane.next)
        size = len(payload) if kind == _DATA else 1
        if position > lane.next:
            self.drop(attachment, Code.GAP, f"Input {lane.next} to {position} is missing.", now)
            return
        if position + size <= lane.next:
            return
        if position - lane.handled + size > limits.WINDOW_BYTES:
            self.drop(attachment, Code.LIMIT, "More input was sent than the window allows.", now)
            return
        if kind == _SIGNAL and not messages.is_signal(payload):
            # The agent would take it for its node's fault, and end the connection that all its sessions are on.
            self.drop(attachment, Code.BAD_PAYLOAD, "A SIGNAL without a name was refused.", now)
            return
        if position < lane.next:
            payload = payload[lane.next - position :]
            position = lane.next
            size = len(payload)
        if self.typist is not attachment and attachment.answers:
            self._typing(attachment, now)
        lane.next = position + size
        port.link.send(kind, lane.handle, position, payload)
        ack = self.intake.acknowledgement(now, True)
        if ack is not None:
            port.link.send(_ACK, port.handle, ack, ack.to_bytes(8, "big"))

    def client_ack(self, attachment: Attachment, payload: bytes, now: int) -> None:
        """Notes what a client has handled, which opens its window and, if it paces, the agent's."""
        position = int.from_bytes(payload, "big")
        if position > self.log.end:
            self.drop(attachment, Code.PROTOCOL, f"Output {position} was acknowledged before it was sent.", now)
            return
        if position <= attachment.acked:
            return
        # The connection it left may have brought more than this one has: that need not come again.
        attachment.cursor = max(attachment.cursor, position)
        attachment.acked = position
        attachment.progress = now
        attachment.laggard = False
        self._note_read(attachment)
        if attachment.cursor < self.log.end:
            self.push(attachment, now)
        self.pace(now)

    def _note_read(self, attachment: Attachment) -> None:
        """Notes how far the session was read by who may drive it; what nobody has read may spill over the ring."""
        if attachment.mode == "drive" and attachment.acked > self.read_to:
            self.read_to = attachment.acked
            self.log.keep_from(self.read_to)

    def client_resize(self, attachment: Attachment, cols: int, rows: int, now: int) -> None:
        """Notes a terminal's size; the last typist's is the program's."""
        attachment.cols, attachment.rows = cols, rows
        if attachment.mode == "drive" and (self.typist is attachment or self.typist is None):
            self.typist = attachment
            self._size(attachment, now)
            if attachment.answers:
                self._answering.tell(attachment, self.attachments.values())

    def client_close(self, attachment: Attachment, now: int) -> None:
        """Takes CLOSE: the end of a living session, or the receipt for the CLOSE of an ended one."""
        if self.ended is not None:
            self._read |= attachment.mode == "drive" and attachment.cursor >= self.log.end
            if self._read and len(self.attachments) == 1 and not self._away:
                self.close(Cause.READ, now)
            else:
                self.detach(attachment, now, polite=True)  # others still read, or will when they are back
            return
        if attachment.mode != "drive":
            attachment.link.refuse(attachment.handle, Code.READ_ONLY, "This attachment may only watch.")
            self.detach(attachment, now)
            return
        self.close(Cause.CLOSE, now)

    def close(self, cause: Cause, now: int) -> None:
        """Ends the session for good; the pod ends the program, every attachment gets CLOSE."""
        after = step(self.state, cause)
        if after is not State.CLOSED:
            return
        port = self.port
        if port is not None:
            port.link.send_message(Type.CLOSE, port.handle, messages.Close(reason=cause.value))
            port.release(self)
        if self.ended is None:
            self.ended = Ended(Code.ENDED, "The session was closed.")
        self.state = after
        for attachment in list(self.attachments.values()):
            if not attachment.closing:
                attachment.link.send_message(Type.CLOSE, attachment.handle, self._farewell())
            self._forget(attachment)
        self.attachments.clear()
        self.port = None
        self.events.append("closed")

    # ---- output ------------------------------------------------------------------------------------------------

    def push(self, attachment: Attachment, now: int) -> None:
        """Sends what the attachment's window and connection take; a full ring behind costs it a named gap."""
        log, link = self.log, attachment.link
        while not (attachment.waiting or link.blocked):
            cursor, end = attachment.cursor, log.end
            if cursor >= end:
                if self.ended is not None and not attachment.closing:
                    attachment.closing = True
                    link.send_message(Type.CLOSE, attachment.handle, self._farewell())
                return
            room = attachment.acked + attachment.window - cursor
            if room <= 0:
                # Who stands still gets one gap when it goes on, not one for every ring that passes meanwhile.
                return
            if cursor < log.tail:
                self._gap(attachment, now, log.tail)
                continue
            try:
                data = log.read(cursor, min(limits.CHUNK_BYTES, room))
            except LostBytesError as lost:
                self._gap(attachment, now, lost.end)
                continue
            if attachment.acked == cursor:
                attachment.progress = now
            link.send(_DATA, attachment.handle, cursor, data)
            attachment.cursor = cursor + len(data)

    def _gap(self, attachment: Attachment, now: int, position: int) -> None:
        """Names output that is gone before `position`: overwritten before the attachment read it, or damaged on disk.

        A snapshot stands for it where one can be had.
        """
        lost = Lost(attachment.cursor, position)
        if not attachment.exact and self._can_capture():
            attachment.lost = lost
            self._capture(attachment)
            return
        attachment.link.send_message(Type.SNAPSHOT, attachment.handle, messages.Snapshot(position, lost=lost))
        attachment.cursor = attachment.acked = position
        attachment.progress = now

    def _no_snapshot(self, attachment: Attachment, now: int) -> None:
        """Goes on without the snapshot that was promised: an empty one names what is missing."""
        position = max(attachment.cursor, self.log.tail)
        start = attachment.cursor if attachment.lost is None else attachment.lost.start
        lost = Lost(start, position) if start < position else None
        attachment.link.send_message(Type.SNAPSHOT, attachment.handle, messages.Snapshot(position, lost=lost))
        attachment.waiting, attachment.lost = False, None
        attachment.cursor = attachment.acked = position
        attachment.progress = now
        self.push(attachment, now)

    def _can_capture(self) -> bool:
        return self.port is not None and self.ended is None and "snapshot" in self.port.features

    def _capture(self, attachment: Attachment) -> None:
        """Holds an attachment's output back until it has been sent a snapshot."""
        attachment.waiting = True
        self._capture_waiting()

    def _capture_waiting(self) -> None:
        """Asks for the snapshot that attachments wait for: one at a time, which serves all who wait until it comes."""
        if self._wanted is not None or not self._can_capture():
            return  # it will be asked for after the size that it has to fit, or by the next connection to the pod
        waiting = [attachment for attachment in self.attachments.values() if attachment.waiting]
        current = next((capture for capture in self._captures.values() if not capture.extra), None)
        if current is None:
            self._ask(waiting, extra=False)
        elif not current.parts and current.size == (self.cols, self.rows):
            current.attachments = waiting

    def _ask(self, attachments: list[Attachment], *, extra: bool) -> None:
        port = self.port
        if port is not None and attachments:
            self._token += 1
            self._captures[self._token] = Capture(attachments, (self.cols, self.rows), extra=extra)
            port.link.send_message(Type.CAPTURE, port.handle, messages.Capture(self._token, not extra))

    def _farewell(self) -> messages.Close:
        ended = self.ended
        assert ended is not None
        return messages.Close(int(ended.code), ended.reason, ended.status, ended.signal, self.log.end)

    # ---- pace --------------------------------------------------------------------------------------------------

    def pacer(self) -> Attachment | None:
        """Returns who sets the agent's pace: the slowest exact driver, else the last typist, else the fastest
        driver.
        """
        best: Attachment | None = None
        for attachment in self.attachments.values():
            if attachment.mode != "drive" or attachment.laggard or attachment.waiting:
                continue
            if best is None or attachment.rank(self.typist) > best.rank(self.typist):
                best = attachment
        return best

    def pace(self, now: int) -> None:
        """Acknowledges the agent's output as far as whoever paces it has been sent it."""
        port = self.port
        if port is None:
            return
        end = self.log.end
        drivers = self._drivers()
        if drivers:
            leader = self.pacer()
            limit = end if leader is None else min(leader.cursor, end)
            if leader is not None and now >= self._still_at(leader, drivers):
                leader.laggard = True
                self.pace(now)
                return
        elif self.overwrite and not self.holding:
            limit = end
        else:
            limit = min(end, self.read_to + _HELD_BYTES)
        for away, (position, since) in list(self._away.items()):
            if drivers and now - since >= _STILL:
                del self._away[away]
            else:
                limit = min(limit, position + _HELD_BYTES)
        intake = self.intake
        intake.handle(limit, now)
        ack = intake.acknowledgement(now, False)
        if ack is not None:
            port.link.send(_ACK, port.handle, ack, ack.to_bytes(8, "big"))

    def next_timeout(self) -> int | None:
        """Returns when `handle_timeout` wants to be called, in monotonic nanoseconds, or None."""
        if self.port is None:
            return None
        due = self.intake.timeout()
        times = [_NEVER if due is None else due]
        if self._wanted is not None:
            times.append(self._resize_at)
        if self._repaint and self._can_capture():
            times.append(self._repaint_at)
        drivers = self._drivers()
        if drivers:
            leader = self.pacer()
            times += [since + _STILL for _, since in self._away.values()]
            if leader is not None:
                times.append(self._still_at(leader, drivers))
        soonest = min(times)
        return soonest if soonest < _NEVER else None

    def _drivers(self) -> int:
        return sum(1 for attachment in self.attachments.values() if attachment.mode == "drive")

    def _still_at(self, leader: Attachment, drivers: int) -> int:
        """Returns when who paces the agent loses that, if nothing moves until then.

        An exact one that is alone is a pipe whose other end is full: its agent waits as long as it takes.
        """
        if leader.cursor >= self.log.end or (leader.exact and drivers == 1):
            return _NEVER
        return leader.progress + _STILL

    def handle_timeout(self, now: int) -> None:
        """Does what is due: a lazy acknowledgement, a size, or a driver that stands still loses the pace."""
        self._resize(now)
        self.pace(now)

    # ---- presence, size ----------------------------------------------------------------------------------------

    def _typing(self, attachment: Attachment, now: int) -> None:
        self.typist = attachment
        self._size(attachment, now)
        self._answering.tell(attachment, self.attachments.values())

    def _size(self, attachment: Attachment, now: int) -> None:
        if attachment.cols and attachment.rows:
            self._wanted = attachment.cols, attachment.rows
            self._resize(now)

    def _resize(self, now: int) -> None:
        """Tells the pod the last size that was wanted and not yet told, one every RESIZE_EVERY_MS at most."""
        port, wanted = self.port, self._wanted
        if port is None:
            return
        if wanted is not None and (wanted == (self.cols, self.rows) or now >= self._resize_at):
            self._wanted = None
            if wanted != (self.cols, self.rows):
                self.cols, self.rows = wanted
                self._resize_at = now + _RESIZE_EVERY
                self._repaint = True
                port.link.send_message(Type.RESIZE, port.handle, messages.Resize(*wanted))
            self._capture_waiting()
        if self._repaint and now >= self._repaint_at and self._can_capture():
            self._repaint_others(now)

    def _repaint_others(self, now: int) -> None:
        """Repaints terminals of another size: the old picture would stay around, or under, the new one.

        One drawing is under way at most, and one is begun every REPAINT_EVERY_MS: the last size is always shown.
        """
        size = self.cols, self.rows
        others = [
            other for other in self.attachments.values()
            if (other.cols, other.rows) != size and other.answers and not other.waiting
            and other.cursor >= self.log.end
        ]  # fmt: skip
        if any(capture.extra for capture in self._captures.values()):
            self._repaint_at = now + _REPAINT_EVERY
            return
        self._repaint = False
        if others:
            self._repaint_at = now + _REPAINT_EVERY
            self._ask(others, extra=True)

    def _audience(self) -> None:
        port = self.port
        if port is not None and self.kind == "pty":
            terminals = sum(1 for a in self.attachments.values() if a.answers and a.mode == "drive")
            port.link.send_message(Type.AUDIENCE, port.handle, messages.Audience(terminals))

    def _announce(self, what: str, who: Attachment) -> None:
        for attachment in self.attachments.values():
            if attachment is not who and not attachment.link.blocked:
                event = messages.Event(what, label=who.label, device=who.device.hex()[:16], count=len(self.attachments))
                attachment.link.send_message(Type.EVENT, attachment.handle, event)

    def _tell(self, event: messages.Event) -> None:
        for attachment in self.attachments.values():
            attachment.link.send_message(Type.EVENT, attachment.handle, event)

    def lane_states(self) -> list[LaneState]:
        """Returns what the pod has handled of each lane, to be kept with an ended session."""
        return [LaneState(lane.id, lane.handled) for lane in self.lanes.values()]
