"""A node, a pod and several clients in a box: virtual time, wires that lose and delay, what must hold at any moment.

Nothing here is random: whoever drives the world (hypothesis, or a seeded generator) chooses every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sterna import limits
from sterna.ids import DeviceId
from sterna.protocol import messages, podside
from sterna.protocol.attachment import Attachment, Lane
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.podside import PodSession
from sterna.protocol.session import Session
from sterna.protocol.states import State
from sterna.protocol.stream import Intake, SendStream
from tests.simulation.session_client import Client
from tests.simulation.session_parts import (
    HANDLE,
    MS,
    NODE,
    SECOND,
    STREAM_KINDS,
    UID,
    Config,
    Connection,
    RingLog,
    check,
    true_bytes,
)  # fmt: skip


class Port:
    """The session's place on the node's connection to the pod."""

    def __init__(self, node: Node, link: Link, features: frozenset[str]) -> None:
        self.node, self.link, self.features = node, link, features
        self.handle = 1
        self.lanes: dict[int, Lane] = {}
        self.released = False

    def lane_handle(self, session: Session, lane: Lane) -> int:
        handle = len(self.lanes) + 2
        self.lanes[handle] = lane
        return handle

    def release(self, session: Session) -> None:
        self.released = True


class Node:
    """The least a node must do around a Session."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.attachments: dict[Connection, Attachment] = {}
        self.owners: dict[Connection, Client] = {}
        self.pending: list[tuple[Connection, bytes]] = []
        self.port: Port | None = None
        self.pod_conn: Connection | None = None
        self.opened = False
        self.session = self._session()

    def _session(self) -> Session:
        world = self.world
        session = world.config.session(UID, world.log, log_id=1, kind="pty", tenant="t", agent="a", name="n")
        if world.config.input_start and not self.opened:
            for client in (c for c in world.clients if c.mode == "drive"):
                session.lanes[client.id] = Lane(client.id, world.config.input_start)
        return session

    def restart(self) -> None:
        """The node is killed: what is durable (the log) stays, connections and memory go."""
        self.attachments.clear()
        self.pending.clear()
        self.port = None
        self.session = self._session()

    # The pod's connection.

    def connect_pod(self) -> Connection:
        conn = Connection(self.world.config.capacity)
        self.pod_conn = conn
        features = frozenset(("snapshot",)) if self.world.config.snapshots else frozenset[str]()
        self.port = Port(self, conn.near, features)
        request = messages.Open(UID, self.world.log.end, fresh=not self.opened)
        conn.near.send_message(Type.OPEN, 1, request)
        return conn

    def pod_frame(self, frame: Frame) -> None:
        kind, handle, seq, payload = frame
        session, port, now = self.session, self.port, self.world.now
        assert port is not None
        check(kind != Type.ERROR, f"the pod's connection failed: {payload!r}")
        if kind == Type.OPENED:
            opened = messages.unpack(messages.Opened, payload)
            check(opened.error is None, f"the pod refused: {opened.error}")
            self.opened = True
            session.pod_opened(port, opened, now)
            waiting, self.pending = self.pending, []
            for conn, data in waiting:
                if conn in self.owners:
                    self._connect(conn) if not data else self._resume(conn, data)
        elif session.port is not port:
            return
        elif kind == Type.DATA:
            session.pod_data(seq, payload, now)
        elif kind == Type.ACK:
            session.pod_ack(port.lanes[handle], payload)
        elif kind == Type.SNAPSHOT:
            session.pod_snapshot(messages.unpack(messages.Snapshot, payload), now)
        elif kind == Type.EXIT:
            session.pod_exit(messages.unpack(messages.Exit, payload), now)

    def pod_lost(self) -> None:
        self.port = None
        self.pod_conn = None
        self.session.pod_gone()

    # Clients' connections.

    def client_frame(self, conn: Connection, frame: Frame) -> None:
        kind, _handle, seq, payload = frame
        session, now = self.session, self.world.now
        if kind == Type.CONNECT:
            self._connect(conn)
            return
        if kind == Type.RESUME:
            self._resume(conn, payload)
            return
        attachment_or_none = self.attachments.get(conn)
        if attachment_or_none is None or attachment_or_none.session is None:
            return  # late frames of an attachment that was displaced
        attachment = attachment_or_none
        if kind in STREAM_KINDS:
            session.client_input(attachment, kind, seq, payload, now)
        elif kind == Type.ACK:
            session.client_ack(attachment, payload, now)
        elif kind == Type.RESIZE:
            size = messages.unpack(messages.Resize, payload)
            session.client_resize(attachment, size.cols, size.rows, now)
        elif kind == Type.SUSPEND:
            session.detach(attachment, now)
        elif kind == Type.CLOSE:
            session.client_close(attachment, now)

    def _attachment(self, conn: Connection) -> Attachment:
        client = self.owners[conn]
        attachment = Attachment(
            client.id, conn.far, HANDLE, DeviceId(b"D" * 32), client.mode, f"client {client.number}"
        )
        attachment.exact, attachment.answers = client.exact, not client.exact
        attachment.window = self.world.config.window
        attachment.cols, attachment.rows = 80, 24
        self.attachments[conn] = attachment
        return attachment

    def _connect(self, conn: Connection) -> None:
        session = self.session
        if self.world.config.input_start and session.ended is None and not session.lanes_known:
            self.pending.append((conn, b""))  # lanes that do not begin at 0 are known to the pod only
            return
        session.attach(self._attachment(conn), self.world.now, output=None, node=NODE, created=False)

    def _resume(self, conn: Connection, payload: bytes) -> None:
        session = self.session
        client = self.owners[conn]
        if session.ended is None and client.id not in session.lanes and not session.lanes_known:
            self.pending.append((conn, payload))  # only the pod knows what it has handled
            return
        body = messages.unpack(messages.ResumeBody, messages.unpack(messages.Signed, payload).body)
        session.resume(self._attachment(conn), body, self.world.now)

    def client_lost(self, conn: Connection) -> None:
        self.owners.pop(conn, None)
        attachment = self.attachments.pop(conn, None)
        if attachment is not None and attachment.session is not None:
            self.session.detach(attachment, self.world.now)


class Pod:
    """The agent: a program that handles input when it likes, and writes when there is room."""

    def __init__(self, world: World) -> None:
        self.world = world
        features = ["many", "snapshot"] if world.config.snapshots else ["many"]
        self.machine = world.config.pod(b"I" * 16, "pty", features, "pod", 10)
        self.conns: list[Connection] = []
        self.session: PodSession | None = None
        self.waiting: deque[podside.Input] = deque()
        self.captures: deque[messages.Capture] = deque()
        self.handled_input: dict[bytes, tuple[int, list[tuple[int, bytes]]]] = {}
        self.to_write = 0
        self.closed = False

    def frame(self, conn: Connection, frame: Frame) -> None:
        event = self.machine.receive(conn.far, frame, self.world.now)
        config = self.world.config
        if isinstance(event, podside.Opening):
            session = self.session = event.session
            session.out = SendStream(config.start, config.pod_window, limits.PAYLOAD_MAX_BYTES)
            if config.input_start:
                for client in (c for c in self.world.clients if c.mode == "drive"):
                    lane = session.lanes[client.id] = podside.PodLane(client.id)
                    lane.intake = Intake(config.input_start)
            self.machine.opened(event, self.world.now)
        elif isinstance(event, podside.Input):
            self.waiting.append(event)
        elif isinstance(event, podside.CaptureAsked):
            self.captures.append(event.request)
        elif isinstance(event, podside.Roomy):
            self.write(0)
        elif isinstance(event, podside.Closed):
            self.closed = True
            self.waiting.clear()

    def write(self, size: int) -> None:
        """The program has `size` more bytes to write; what finds no room waits until the machine says `Roomy`."""
        session = self.session
        if session is None or session.exit is not None:
            return
        self.to_write += size
        if session.starved and not size:
            session.starved = False
        if session.starved:
            return
        data = true_bytes(0, session.out.end, min(self.to_write, session.out.room))
        self.to_write -= session.out.write(data)
        if self.to_write:
            session.starved = True
        session.flush(self.world.now)
        self.machine.acknowledge_due(session, self.world.now, True)

    def handle_input(self, count: int) -> None:
        while count and self.waiting:
            count -= 1
            item = self.waiting.popleft()
            lane = item.lane
            position, items = self.handled_input.get(lane.id, (self.world.config.input_start, []))
            size = len(item.data) if item.kind == Type.DATA else 1
            client = self.world.by_id[lane.id]
            check(
                item.end - size == position, f"client {client.number}: {item.end - size} handled, {position} was next"
            )
            if item.kind == Type.DATA:
                check(item.data == true_bytes(client.number, position, size), f"wrong input at {position}")
            items.append((item.kind, b"" if item.kind == Type.DATA else item.data))
            self.handled_input[lane.id] = (item.end, items)
            self.machine.handled(item, self.world.now)

    def answer_capture(self) -> None:
        if self.captures and self.session is not None:
            request = self.captures.popleft()
            self.session.send_snapshot(request.token, self.session.out.end, b"screen", False)

    def exit(self) -> None:
        session = self.session
        if session is not None and session.exit is None:
            self.to_write, session.starved = 0, False
            self.waiting.clear()
            self.machine.acknowledge_due(session, self.world.now, True)
            session.finish(0, None, self.world.now)

    def lost(self, conn: Connection) -> None:
        if conn in self.conns:
            self.conns.remove(conn)
            self.machine.disconnected(conn.far)


class World:
    """Everything, and the steps that a driver may take; each step ends with `verify`."""

    def __init__(self, config: Config, kinds: tuple[tuple[bool, messages.Mode], ...]) -> None:
        self.config = config
        self.now = SECOND
        self.log = RingLog(config.start, config.ring)
        self.clients: list[Client] = []
        for number, (exact, mode) in enumerate(kinds, 1):
            self.clients.append(Client(self, number, exact=exact, mode=mode))
        self.by_id = {bytes(client.id): client for client in self.clients}
        self.pod = Pod(self)
        self.node = Node(self)
        self.old: list[Connection] = []  # connections their client has left but the node has not noticed

    # ---- steps -------------------------------------------------------------------------------------------------

    def connect(self, client: Client) -> None:
        """The client dials again; the node may go on reading what was in flight on the old connection."""
        if client.closed is not None:
            return
        if client.conn is not None:
            self.old.append(client.conn)
        conn = client.connect()
        self.node.owners[conn] = client
        self._after()

    def cut(self, client: Client) -> None:
        """The connection breaks: what is in flight is gone, both sides notice."""
        conn, client.conn = client.conn, None
        client.attached = False
        if conn is not None:
            self.node.client_lost(conn)
        self._after()

    def leave(self, client: Client) -> None:
        """SUSPEND, politely."""
        if client.conn is not None and client.attached:
            client.conn.near.send_message(Type.SUSPEND, HANDLE, messages.Suspend(client.intake.next))
            self.old.append(client.conn)
            client.conn = None
            client.attached = False
        self._after()

    def notice_old(self, which: int, up: int) -> None:
        """Of a connection that its client left, `up` more bytes arrive at the node, which then notices the end."""
        if self.old:
            conn = self.old.pop(which % len(self.old))
            self._deliver_up(conn, up)
            self.node.client_lost(conn)
        self._after()

    def pod_connect(self) -> None:
        """The node connects to the pod; the pod may not have noticed yet that the old connection is dead."""
        if self.node.pod_conn is not None or self.pod.closed or self.node.session.state is State.CLOSED:
            return
        conn = self.node.connect_pod()
        self.pod.conns.append(conn)
        self.pod.machine.connected(conn.far)
        self._after()

    def pod_cut(self, late: int) -> None:
        """The node loses the pod; `late` more of its bytes still arrive there."""
        conn = self.node.pod_conn
        if conn is not None:
            self._collect()
            self.node.pod_lost()
            data = conn.up.get(late)
            self._pod_bytes(conn, data)
        self._after()

    def pod_notice(self) -> None:
        """The pod notices connections that the node has left."""
        for conn in list(self.pod.conns):
            if conn is not self.node.pod_conn:
                self.pod.lost(conn)
        self._after()

    def node_restart(self) -> None:
        """The node is killed and starts again: clients and pod notice."""
        for client in self.clients:
            client.conn, client.attached = None, False
        self.old.clear()
        self.node.owners.clear()
        if self.node.pod_conn is not None:
            self.pod.lost(self.node.pod_conn)
            self.node.pod_conn = None
        self.node.restart()
        self._after()

    def deliver(self, client: Client, up: int, down: int) -> None:
        """Some bytes arrive on a client's connection."""
        conn = client.conn
        if conn is not None:
            self._deliver_up(conn, up)
            if client.conn is conn:
                for frame in conn.near.receive(conn.down.get(down)):
                    client.receive(frame)
                self._drained_far(conn)
        self._after()

    def deliver_pod(self, up: int, down: int) -> None:
        """Some bytes arrive on the pod's connection."""
        conn = self.node.pod_conn
        if conn is not None:
            self._collect()
            self._pod_bytes(conn, conn.up.get(up))
            if self.node.pod_conn is conn:
                for frame in conn.near.receive(conn.down.get(down)):
                    self.node.pod_frame(frame)
                check(not conn.near.closing, "the node refused the pod's bytes")
                if conn.far.blocked and conn.down.size < conn.capacity and self.pod.session is not None:
                    conn.far.blocked = False
                    self.pod.session.flush(self.now)
        self._after()

    def act(self, step: Callable[[], object]) -> None:
        """Any step of a client or the pod by itself."""
        step()
        self._after()

    def tick(self, milliseconds: int) -> None:
        """Time passes; machines that are due are called."""
        self.now += milliseconds * MS
        self._timers()
        self._after()

    def _timers(self) -> None:
        session = self.node.session
        for _ in range(20):
            due = session.next_timeout()
            if due is None or due > self.now:
                break
            session.handle_timeout(self.now)
        else:
            check(False, "the session's timer never rests")
        pod = self.pod.session
        if pod is not None:
            for _ in range(20):
                due = pod.next_timeout()
                if due is None or due > self.now:
                    break
                self.pod.machine.acknowledge_due(pod, self.now, False)
            else:
                check(False, "the pod's timer never rests")
        for client in self.clients:
            client.acknowledge(False)

    # ---- inner workings ----------------------------------------------------------------------------------------

    def _connections(self) -> list[Connection]:
        found = [client.conn for client in self.clients if client.conn is not None] + self.old + self.pod.conns
        if self.node.pod_conn is not None and self.node.pod_conn not in found:
            found.append(self.node.pod_conn)
        return found

    def _collect(self) -> None:
        for conn in self._connections():
            conn.collect()

    def _after(self) -> None:
        self._collect()
        self.verify()

    def _deliver_up(self, conn: Connection, size: int) -> None:
        for frame in conn.far.receive(conn.up.get(size)):
            self.node.client_frame(conn, frame)
        check(not conn.far.closing, "the node refused a client's bytes")
        client = self.node.owners.get(conn)
        if conn.near.blocked and conn.up.size < conn.capacity and client is not None and client.conn is conn:
            conn.near.blocked = False
            client.flush()

    def _drained_far(self, conn: Connection) -> None:
        if conn.far.blocked and conn.down.size < conn.capacity:
            conn.far.blocked = False
            attachment = self.node.attachments.get(conn)
            if attachment is not None and attachment.session is not None:
                attachment.session.push(attachment, self.now)
                attachment.session.pace(self.now)

    def _pod_bytes(self, conn: Connection, data: bytes) -> None:
        if conn not in self.pod.conns:
            return
        for frame in conn.far.receive(data):
            self.pod.frame(conn, frame)
        check(not conn.far.closing, "the pod refused the node's bytes")
        if conn.near.blocked and conn.up.size < conn.capacity:
            conn.near.blocked = False

    # ---- what must hold ----------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Checks what must hold after every step."""
        session, log, config = self.node.session, self.log, self.config
        pod = self.pod.session
        if pod is not None:
            check(
                pod.out.base <= log.end, f"output up to {pod.out.base} was acknowledged, the journal ends at {log.end}"
            )
            check(log.end <= pod.out.end, "the journal holds what the program never wrote")
            check(pod.out.end - pod.out.base <= config.pod_window, "the pod's window was exceeded")
            handles = self.pod.machine._handles  # only this shows that memory stays bounded
            check(
                all(conn.far in handles for conn in self.pod.conns) and len(handles) == len(self.pod.conns),
                "links leak",
            )
        for attachment in session.attachments.values():
            check(attachment.cursor - attachment.acked <= attachment.window, "a client's window was exceeded")
            check(attachment.session is session, "an attachment that has left is still registered")
        for lane in session.lanes.values():
            check(lane.handled <= lane.next <= lane.handled + limits.WINDOW_BYTES, "an input window was exceeded")
            check(
                lane.attachment is None or session.attachments.get(lane.id) is lane.attachment, "a lane names a ghost"
            )
        check(len(session.lanes) <= limits.LANES_MAX, "too many lanes")
        captures = session._captures  # only this shows that memory stays bounded
        check(len(captures) <= 2, "captures leak")
        if session.state is State.ACTIVE:
            check(session.attachments, "active with nobody attached")
        if session.state is State.SUSPENDED:
            check(not session.attachments, "suspended with somebody attached")
        for client in self.clients:
            done = self.pod.handled_input.get(client.id, (client.input_start, []))[0]
            check(
                client.out.base <= done <= client.out.end,
                f"client {client.number} knows of {client.out.base}, done {done}",
            )
        bound = config.capacity + 2 * max(config.window, config.pod_window) + 66_000
        for conn in self._connections():
            check(max(conn.up.size, conn.down.size) <= bound, "too much is queued on a connection")

    def settle(self) -> None:
        """The network heals, everybody reads and writes: afterwards everything must have arrived everywhere."""
        self.pod_notice()
        while self.old:
            self.notice_old(0, 1 << 30)
        if self.node.pod_conn is None:
            self.pod_connect()
        for _ in range(400):
            before = self._mark()
            for client in self.clients:
                if client.closed is None and (client.conn is None or (client.errors and not client.attached)):
                    client.errors.clear()
                    self.connect(client)
                self.deliver(client, 1 << 30, 1 << 30)
                client.handle_output(1 << 30)
                client.flush()
            while self.old:
                self.notice_old(0, 1 << 30)
            self.deliver_pod(1 << 30, 1 << 30)
            while self.pod.captures:
                self.pod.answer_capture()
            self.pod.handle_input(1 << 30)
            self.tick(300)
            if self._mark() == before and not any(conn.up.size or conn.down.size for conn in self._connections()):
                break
        else:
            check(False, "the world does not come to rest")
        self._arrived()

    def _mark(self) -> tuple[object, ...]:
        pod = self.pod.session
        ends = (pod.out.base, pod.out.end, pod.out.sent) if pod is not None else ()
        streams = [
            (c.out.base, c.out.sent, c.intake.next, c.intake.acked, c.attached, bool(c.closed)) for c in self.clients
        ]
        return self.log.end, ends, tuple(streams), self.pod.to_write

    def _arrived(self) -> None:
        pod, end = self.pod.session, self.log.end
        check(pod is not None and not self.pod.to_write, "the program still waits for room")
        closed = self.node.session.state is State.CLOSED
        check(pod is not None and pod.out.end == end, f"the journal ends at {end}")
        check(pod is not None and (closed or pod.out.base == end), "output is not acknowledged to the program")
        for client in self.clients:
            if client.closed is not None and client.closed.output != end:
                continue
            check(client.intake.next == end, f"client {client.number} stands at {client.intake.next} of {end}")
            if client.mode == "drive" and self.node.session.ended is None:
                check(
                    client.out.base == client.out.end, f"input {client.out.base} of {client.out.end} was acknowledged"
                )
