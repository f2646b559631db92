"""Fuzzes a session's machine with hostile clients and a hostile pod, the pod's and the client's with a hostile node.

What clients send never raises. What a pod sends may raise ProtocolError, which ends the pod's connection; what a node
sends to a pod may raise ProtocolError, which ends the node's connection. What a node sends to a client never raises.
Nothing else is allowed.

Run as `python -m tests.fuzz.fuzz_session [CORPUS] [-runs=N] [-max_total_time=SECONDS]`.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["sterna"]):
    from sterna import limits
    from sterna.errors import Code, ProtocolError
    from sterna.ids import AttachmentId, DeviceId, SessionUid
    from sterna.journal.memory import MemoryLog
    from sterna.protocol import messages, podside
    from sterna.protocol.attachment import Attachment, Lane
    from sterna.protocol.client import ClientMachine, Dial, Output
    from sterna.protocol.frame import LOW, PAYLOAD_LIMITS_BYTES, Type, encode
    from sterna.protocol.link import Link
    from sterna.protocol.session import Session
    from sterna.protocol.states import State

UID = SessionUid(b"U" * 16)
NODE = b"N" * 32
RING = 20_000
START = (1 << 32) - 300
POD_KINDS = (Type.OPEN, Type.LANE, Type.DATA, Type.SIGNAL, Type.EOF, Type.ACK, Type.RESIZE, Type.CAPTURE, Type.AUDIENCE,
             Type.CLOSE, Type.PING)  # fmt: skip
STRANGE = (0, 1, 5, 100, START, START + 1, START + 200, 1 << 32, (1 << 62), limits.POSITION_MAX)


class Port:
    """A place on a pod's connection."""

    def __init__(self) -> None:
        self.link = Link()
        self.handle = 1
        self.features = frozenset(("snapshot",))
        self.lanes: list[Lane] = []

    def lane_handle(self, session: Session, lane: Lane) -> int:
        self.lanes.append(lane)
        return len(self.lanes) + 1

    def release(self, session: Session) -> None:
        self.lanes.clear()


class Source:
    """Choices out of the fuzzer's bytes."""

    def __init__(self, data: bytes) -> None:
        self.fdp = atheris.FuzzedDataProvider(data)

    def more(self) -> bool:
        return bool(self.fdp.remaining_bytes())

    def below(self, count: int) -> int:
        return int(self.fdp.ConsumeIntInRange(0, count - 1))

    def number(self) -> int:
        if self.below(3):
            return STRANGE[self.below(len(STRANGE))]
        return int(self.fdp.ConsumeIntInRange(0, limits.POSITION_MAX))

    def bytes_(self, limit: int) -> bytes:
        data = bytes(self.fdp.ConsumeBytes(self.below(min(limit, 40) + 1)))
        return data * (1 + self.below(2) * min(500, limit // max(len(data), 1) - 1) if data else 1)

    def lanes(self) -> list[messages.LaneState]:
        return [messages.LaneState(bytes([65 + self.below(3)]) * 16, self.number()) for _ in range(self.below(3))]


class NodeWorld:
    """A session, three attachments at most, and a pod that sends what it likes."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.log = MemoryLog(1, ring_bytes=RING, start=START)
        self.session = Session(UID, self.log, log_id=1, kind="pty", tenant="t", agent="a", name="n")
        self.port: Port | None = None
        self.now = 1
        self.all: list[Attachment] = []

    def step(self) -> None:
        self.now += self.source.below(4) * 200_000_000
        choice = self.source.below(16)
        if choice < 3:
            self.arrive()
        elif choice < 9:
            self.client()
        elif choice < 15:
            self.pod()
        else:
            self.session.handle_timeout(self.now)
        self.verify()

    def arrive(self) -> None:
        source = self.source
        who = Attachment(
            AttachmentId(bytes([65 + source.below(3)]) * 16), Link(), 1 + source.below(5), DeviceId(b"D" * 32),
            "watch" if not source.below(4) else "drive", "x",
        )  # fmt: skip
        who.exact, who.answers = bool(source.below(2)), bool(source.below(2))
        who.window = 1 + source.below(10_000)
        self.all.append(who)
        if source.below(2):
            output = None if source.below(2) else source.number()
            self.session.attach(who, self.now, output=output, node=NODE, created=False)
        else:
            body = messages.ResumeBody(
                messages.CONTEXT_RESUME, NODE, UID, b"d", who.id, b"r", 1, 1, source.below(2), source.number()
            )
            self.session.resume(who, body, self.now)

    def client(self) -> None:
        """Whatever a client sends, nothing is raised."""
        alive = list(self.session.attachments.values())
        if not alive:
            return
        session, source = self.session, self.source
        who = alive[source.below(len(alive))]
        choice = source.below(8)
        if choice < 3:
            kind = (Type.DATA, Type.SIGNAL, Type.EOF)[choice]
            seq = (who.lane.next if who.lane is not None and source.below(2) else source.number()) & LOW
            session.client_input(who, kind, seq, source.bytes_(PAYLOAD_LIMITS_BYTES[kind]), self.now)
        elif choice == 3:
            position = who.cursor if source.below(2) else source.number()
            session.client_ack(who, position.to_bytes(8, "big")[: 8 - source.below(2) * source.below(9)], self.now)
        elif choice == 4:
            session.client_resize(who, source.number(), source.number(), self.now)
        elif choice == 5:
            session.client_close(who, self.now)
        elif choice == 6:
            session.detach(who, self.now)
        else:
            who.link.blocked = not who.link.blocked
            session.push(who, self.now)

    def pod(self) -> None:
        """What a pod sends may break the protocol; then its connection ends."""
        source = self.source
        try:
            if self.port is None:
                port = Port()
                near = self.log.end if source.below(4) else source.number()
                opened = messages.Opened(near + source.below(2) * 100, near, source.lanes())
                if self.session.state not in (State.EXITED, State.CLOSED):
                    self.session.pod_opened(port, opened, self.now)
                    self.port = port
            else:
                self.pod_frame(self.port)
        except ProtocolError:
            self.lose()
        if self.session.port is None:
            self.port = None

    def pod_frame(self, port: Port) -> None:
        session, source = self.session, self.source
        choice = source.below(7)
        if choice < 3:
            seq = self.log.end if choice else source.number()
            session.pod_data(seq & LOW, source.bytes_(limits.PAYLOAD_MAX_BYTES), self.now)
        elif choice == 3:
            if port.lanes:
                session.pod_ack(port.lanes[source.below(len(port.lanes))], source.bytes_(8))
        elif choice == 4:
            lost = messages.Lost(source.number(), source.number()) if source.below(2) else None
            session.pod_snapshot(
                messages.Snapshot(
                    source.number(),
                    source.below(2),
                    bool(source.below(2)),
                    False,
                    source.bytes_(100),
                    lost,
                    source.below(4),
                ),
                self.now,
            )
        elif choice == 5:
            self.lose()
        elif not source.below(5):
            session.pod_exit(messages.Exit(source.number(), source.below(256), None, source.lanes()), self.now)
        else:
            session.agent_lost(self.now, "gone") if not source.below(8) else self.lose()

    def lose(self) -> None:
        self.port = None
        self.session.pod_gone()

    def verify(self) -> None:
        session = self.session
        for who in session.attachments.values():
            assert who.cursor - who.acked <= who.window
            assert who.session is session
        for who in self.all:
            assert who.session is not session or session.attachments.get(who.id) is who
            assert who.link.out_bytes < 2_000_000
            who.link.data_to_send()
        assert self.log.end - self.log.tail <= RING + limits.CHUNK_MAX_BYTES
        assert (session.state is State.ACTIVE) <= bool(session.attachments)
        if self.port is not None:
            self.port.link.data_to_send()
        due = session.next_timeout()
        if due is not None and due <= self.now:
            session.handle_timeout(self.now)


def pod_under_a_hostile_node(source: Source) -> None:
    """The pod's machine takes any frames; ProtocolError is allowed and ends the connection."""
    pod = podside.PodMachine(b"I" * 16, "pty", ["many"], "x", 3)
    link = Link()
    pod.connected(link)
    waiting: list[podside.Input] = []
    now = 1
    for _ in range(60):
        if not source.more():
            break
        now += source.below(3) * 200_000_000
        kind = POD_KINDS[source.below(len(POD_KINDS))]
        event = None
        try:
            event = pod.receive(
                link, (int(kind), source.below(4), source.number() & LOW, pod_payload(kind, source)), now
            )
        except ProtocolError:
            pod.disconnected(link)
            link = Link()
            pod.connected(link)
        if isinstance(event, podside.Opening):
            pod.opened(event, now)
        elif isinstance(event, podside.Input):
            waiting.append(event)
        if waiting and source.below(2):
            pod.handled(waiting.pop(0), now)
        for session in list(pod.sessions.values()):
            session.out.write(bytes(source.below(3) * 50_000))
            session.flush(now)
            pod.acknowledge_due(session, now, False)
            assert len(session.lanes) <= limits.LANES_MAX
            assert session.out.end - session.out.base <= limits.WINDOW_BYTES
        link.data_to_send()


def pod_payload(kind: Type, source: Source) -> bytes:
    """Returns a payload that fits the type, more often than not."""
    if not source.below(8):
        return source.bytes_(PAYLOAD_LIMITS_BYTES[kind])
    uid = bytes([65 + source.below(4)]) * 16
    made: messages.Message | None = None
    if kind is Type.OPEN:
        made = messages.Open(uid, source.number(), bool(source.below(2)), source.number(), source.number())
    elif kind is Type.LANE:
        made = messages.Lane(uid, bytes([65 + source.below(90)]) * 16, source.number())
    elif kind is Type.RESIZE:
        made = messages.Resize(source.number(), source.number())
    elif kind is Type.CAPTURE:
        made = messages.Capture(source.below(9))
    elif kind is Type.AUDIENCE:
        made = messages.Audience(source.below(9))
    return messages.pack(made) if made is not None else source.bytes_(PAYLOAD_LIMITS_BYTES[kind])


def client_under_a_hostile_node(source: Source) -> None:
    """The client's machine takes any frames on any of its connections and never raises."""
    body = messages.ConnectBody(messages.CONTEXT_CONNECT, NODE, b"r" * 16, b"k", b"a" * 16, "")
    client = ClientMachine(
        body, device=b"d" * 32, sign=lambda context, signed: b"s" * 64, counter=lambda: 1,
        raise_counter=lambda value: None, random=bytes, now=1,
    )  # fmt: skip
    now, known = 1, []
    for _ in range(80):
        if not source.more() or client.finished:
            break
        now += (0, 1, 300_000_000, 3_000_000_000)[source.below(4)]
        while (action := client.next_action()) is not None:
            if isinstance(action, Dial):
                known.append(action.connection)
                if source.below(8):
                    client.established(action.connection, now)
                else:
                    client.dial_failed(action.connection, now, refused=bool(source.below(2)))
            else:
                client.farewell(action.connection)
        number = known[-1 - source.below(min(3, len(known)))] if known else 0
        choice = source.below(16)
        if choice < 12:
            kind, payload = node_message(source)
            client.receive(number, encode(kind, source.below(3), source.number(), payload), now)
        elif choice == 12:
            client.lost(number, now)
        elif choice == 13:
            client.write(bytes(source.below(2000)), now)
        elif choice == 14:
            client.suspect(now, "fuzz")
        else:
            client.handle_timeout(now)
        while (event := client.next_event()) is not None:
            if isinstance(event, Output) and source.below(2):
                client.handled(event.end, now)
        client.data_to_send()
        assert client.input.end - client.input.base <= limits.WINDOW_BYTES


def node_message(source: Source) -> tuple[Type, bytes]:
    """Returns what a node might send to a client, or something like it."""
    number, lost = source.number, messages.Lost(source.number(), source.number()) if source.below(2) else None
    wait = (None, 0.1, float("nan"), float("inf"), -1.0)[source.below(5)]
    codes = list(Code)
    made: list[tuple[Type, messages.Message | bytes]] = [
        (Type.ACCEPT, messages.Accept(UID, 1, "pty", 1, NODE, "n", "a", number(), 0, 1000, 15, head=number())),
        (Type.RESUMED, messages.Resumed(1, source.below(3), number(), number() if source.below(4) else None, lost)),
        (Type.DATA, source.bytes_(limits.PAYLOAD_MAX_BYTES)),
        (Type.ACK, number().to_bytes(8, "big")[: source.below(10)]),
        (Type.SNAPSHOT, messages.Snapshot(number(), source.below(2), bool(source.below(2)), False, b"x", lost)),
        (Type.ERROR, messages.error(codes[source.below(len(codes))], "x", retry_after=wait, value=number())),
        (Type.CLOSE, messages.Close(output=number())),
        (Type.EVENT, messages.Event("uncertain", start=number(), end=number())),
        (Type.SUSPEND, messages.Suspend(number())),
        (Type.PONG, source.bytes_(64)),
        (Type.PING, source.bytes_(64)),
    ]
    kind, message = made[source.below(len(made))]
    if not source.below(8):
        return kind, source.bytes_(PAYLOAD_LIMITS_BYTES[kind])
    return kind, message if isinstance(message, bytes) else messages.pack(message)


def one(data: bytes) -> None:
    """Checks one input; the steps themselves say which exceptions are allowed."""
    source = Source(data)
    which = source.below(4)
    if which == 0:
        pod_under_a_hostile_node(source)
        return
    if which == 1:
        client_under_a_hostile_node(source)
        return
    world = NodeWorld(source)
    for _ in range(80):
        if not source.more():
            break
        world.step()


def main() -> None:
    """Fuzzes until a limit of the command line is reached."""
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
