"""The real client machine, a node's real session and a pod's real machine over the network in memory.

Only what stands between the machines is of this world: the node's door (which CONNECT and RESUME it lets in), a user
who types and reads, a program that reads and writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

from sterna import limits
from sterna.errors import Code
from sterna.ids import AttachmentId, DeviceId
from sterna.protocol import client as machine
from sterna.protocol import messages
from sterna.protocol.attachment import Attachment
from sterna.protocol.client import ClientMachine
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.session import Session
from sterna.transport.memory import Connection, MemoryNetwork
from tests.simulation import session_parts, session_world
from tests.simulation.session_parts import MS, NODE, SECOND, STREAM_KINDS, Config, RingLog, check, true_bytes

DEVICE = b"D" * 32
ATTACHMENT = AttachmentId(b"\1" * 16)


class NodeEnd:
    """A client's connection as its node sees it: what node/clients.py does, without keys and a database."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.link = Link()
        self.attachments: dict[int, Attachment] = {}
        self.connection: Connection | None = None
        self.gone = False

    def data_to_send(self) -> list[bytes]:
        return self.link.data_to_send()

    def receive(self, data: bytes, now: int) -> None:
        for frame in self.link.receive(data):
            attachment = self.attachments.get(frame[1])
            if attachment is None:
                self._frame(frame, now)
            elif attachment.session is not None:
                self._attached(attachment, frame, now)
        check(not self.link.closing, "the node refused the client's bytes")

    def blocked(self, state: bool, now: int) -> None:
        self.link.blocked = state
        for attachment in self.attachments.values():
            if not state and attachment.session is not None:
                attachment.session.push(attachment, now)
                attachment.session.pace(now)

    def ended(self, now: int) -> None:
        self.gone = True
        for attachment in self.attachments.values():
            if attachment.session is not None:
                attachment.session.detach(attachment, now)

    def _attached(self, attachment: Attachment, frame: Frame, now: int) -> None:
        kind, handle, seq, payload = frame
        session = self.node.session
        if kind in STREAM_KINDS:
            session.client_input(attachment, kind, seq, payload, now)
        elif kind == Type.ACK:
            session.client_ack(attachment, payload, now)
        elif kind == Type.SUSPEND:
            session.detach(attachment, now, polite=True)
            position = attachment.lane.handled if attachment.lane is not None else 0
            self.link.send_message(Type.SUSPEND, handle, messages.Suspend(position))

    def _frame(self, frame: Frame, now: int) -> None:
        kind, handle, _, payload = frame
        if kind == Type.PING:
            self.node.pings.append(now)
            self.link.send(Type.PONG, 0, 0, payload)
        elif kind == Type.CONNECT:
            self.node.session.attach(self._attachment(handle), now, output=None, node=NODE, created=True)
        elif kind == Type.RESUME:
            body = messages.unpack(messages.ResumeBody, messages.unpack(messages.Signed, payload).body)
            node = self.node
            if body.race == node.race:
                self.link.refuse(handle, Code.SUPERSEDED, "Another connection of this attachment was faster.")
            elif body.counter <= node.counter:
                self.link.refuse(handle, Code.STALE, "This counter was used before.", value=node.counter)
            elif not node.session.lanes_known:
                self.link.refuse(handle, Code.BUSY, "The agent is away.", retry_after=0.2)
            else:
                node.counter, node.race = body.counter, body.race
                node.session.resume(self._attachment(handle), body, now)

    def _attachment(self, handle: int) -> Attachment:
        attachment = Attachment(ATTACHMENT, self.link, handle, DeviceId(DEVICE), "drive", "laptop")
        attachment.exact = True
        self.attachments[handle] = attachment
        return attachment


class PodEnd:
    """One side of the connection between node and pod: frames go to `take`."""

    def __init__(self, link: Link, take: Callable[[Frame], None], away: Callable[[], None]) -> None:
        self.link, self.take, self.away = link, take, away
        self.drained: Callable[[], None] | None = None

    def data_to_send(self) -> list[bytes]:
        return self.link.data_to_send()

    def receive(self, data: bytes, now: int) -> None:
        for frame in self.link.receive(data):
            self.take(frame)
        check(not self.link.closing, "node or pod refused the other's bytes")

    def blocked(self, state: bool, now: int) -> None:
        self.link.blocked = state
        if not state and self.drained is not None:
            self.drained()

    def ended(self, now: int) -> None:
        self.away()


class Node(session_world.Node):
    """A node with one session: the counter and the race of the last RESUME, and when PINGs came."""

    counter = 0
    race = b""

    def __init__(self, world: ClientWorld) -> None:
        super().__init__(cast(session_world.World, world))
        self.pings: list[int] = []


class User:
    """Who uses the client machine: its driver, and a check of every byte that comes out of it."""

    def __init__(self, world: ClientWorld, kind: type[ClientMachine], raises: bool) -> None:
        self.world = world
        self.number, self.id, self.mode, self.exact = 1, ATTACHMENT, "drive", True
        self.ends: dict[int, ClientEnd] = {}
        self.got = 0
        self.to_type = 0
        self.counter = 0
        self.raises = raises
        self.events: list[tuple[int, machine.Event]] = []
        chance = random.Random(world.seed)
        body = messages.ConnectBody(
            messages.CONTEXT_CONNECT, NODE, b"Q" * 16, b"K", ATTACHMENT, "", exact=True, term="", cols=0, rows=0
        )
        self.machine = kind(
            body, device=DEVICE, sign=lambda context, data: b"", counter=self._count, raise_counter=self._raise,
            random=chance.randbytes, now=world.now,
        )  # fmt: skip

    def _count(self) -> int:
        self.counter += 1
        return self.counter

    def _raise(self, value: int) -> None:
        if self.raises:
            self.counter = max(self.counter, value)

    def next_timeout(self) -> int | None:
        return self.machine.next_timeout()

    def handle_timeout(self, now: int) -> None:
        self.machine.handle_timeout(now)
        self.settle()

    def enter(self, size: int) -> None:
        """Types bytes; what finds no room waits."""
        self.to_type += size
        self._type()

    def _type(self) -> None:
        position = self.machine.input.end
        data = true_bytes(self.number, position, min(self.to_type, limits.WINDOW_BYTES))
        self.to_type -= self.machine.write(data, self.world.now)

    def settle(self) -> None:
        """Deals with everything that the machine asks for."""
        now = self.world.now
        while (event := self.machine.next_event()) is not None:
            self.events.append((now, event))
            if isinstance(event, machine.Output):
                start = event.end - len(event.data)
                check(start == self.got, f"output {start} came, {self.got} was next")
                check(event.data == true_bytes(0, start, len(event.data)), f"wrong output at {start}")
                self.got = event.end
                self.machine.handled(event.end, now)
            elif isinstance(event, machine.Roomy):
                self._type()
            else:
                check(not isinstance(event, machine.Gap | machine.Failed), f"{type(event).__name__}: {vars_of(event)}")
        while (action := self.machine.next_action()) is not None:
            if isinstance(action, machine.Dial):
                self.world.dial(action.connection)
            else:
                end = self.ends.pop(action.connection, None)
                if end is not None:
                    end.out += self.machine.farewell(action.connection)
                    end.connection.close(end)

    def collect(self) -> None:
        """Hands every connection its bytes; the machine gives those of all of them at once."""
        for number, out in self.machine.data_to_send():
            self.ends[number].out += out

    def all(self, kind: Any) -> list[tuple[int, Any]]:
        """Returns the events of one kind, with their times."""
        return [(time, event) for time, event in self.events if isinstance(event, kind)]


def vars_of(event: object) -> str:
    return ", ".join(f"{name}={getattr(event, name)}" for name in getattr(event, "__slots__", ()))


class ClientEnd:
    """One connection of the client machine."""

    connection: Connection

    def __init__(self, user: User, number: int) -> None:
        self.user, self.number = user, number
        self.out: list[bytes] = []

    def data_to_send(self) -> list[bytes]:
        self.user.collect()
        out, self.out = self.out, []
        return out

    def receive(self, data: bytes, now: int) -> None:
        self.user.machine.receive(self.number, data, now)
        self.user.settle()

    def ended(self, now: int) -> None:
        self.user.ends.pop(self.number, None)
        self.user.machine.lost(self.number, now)
        self.user.settle()


class ClientWorld:
    """One user, one node, one pod, and the network between them."""

    def __init__(
        self,
        seed: int,
        *,
        kind: type[ClientMachine] = ClientMachine,
        raises: bool = True,
        dial: int = 10 * MS,
        **net: int,
    ) -> None:
        self.seed = seed
        self.network = MemoryNetwork(seed, start=SECOND, **net)
        self.config = Config(
            window=limits.WINDOW_BYTES, pod_window=limits.WINDOW_BYTES, ring=limits.RING_BYTES, snapshots=False
        )
        self.log = RingLog(0, limits.RING_BYTES)
        self.dial_time = dial
        self.reachable = True
        self.node_ends: list[NodeEnd] = []
        self.user = User(self, kind, raises)
        self.clients = [self.user]
        self.by_id = {bytes(ATTACHMENT): self.user}
        self.pod = session_world.Pod(cast(session_world.World, self))
        self.node = Node(self)
        self.pod_connection = self.connect_pod()
        for timed in (self.user, self.node.session, self):
            self.network.watch(timed)
        self.user.settle()

    @property
    def now(self) -> int:
        return self.network.now

    @property
    def session(self) -> Session:
        return self.node.session

    # The pod's acknowledgements, and the program that reads what it gets.

    def next_timeout(self) -> int | None:
        if self.pod.waiting:
            return self.now
        return self.pod.session.next_timeout() if self.pod.session is not None else None

    def handle_timeout(self, now: int) -> None:
        self.pod.handle_input(1 << 30)
        if self.pod.session is not None:
            self.pod.machine.acknowledge_due(self.pod.session, now, False)

    def connect_pod(self) -> Connection:
        links = self.node.connect_pod()
        self.pod.conns.append(links)
        near = PodEnd(links.near, self.node.pod_frame, self._pod_lost)
        far = PodEnd(links.far, lambda frame: self._to_pod(links, frame), lambda: self.pod.lost(links))
        far.drained = self._flush_pod
        connection = self.network.connect(near, far)
        self.pod.machine.connected(links.far)
        return connection

    def _to_pod(self, links: session_parts.Connection, frame: Frame) -> None:
        if links in self.pod.conns:
            self.pod.frame(links, frame)

    def _pod_lost(self) -> None:
        self.node.pod_lost()
        self.network.call_at(self.now + 100 * MS, self._pod_back)

    def _pod_back(self) -> None:
        self.pod_connection = self.connect_pod()

    def _flush_pod(self) -> None:
        if self.pod.session is not None:
            self.pod.session.flush(self.now)

    def dial(self, number: int) -> None:
        """The driver of the client dials: the node hears of it after a while, or never."""
        if self.reachable:
            self.network.call_at(self.now + self.dial_time, lambda: self._dialled(number))

    def _dialled(self, number: int) -> None:
        user = self.user
        if user.machine.finished or number not in user.machine._connections:  # a Drop came first
            return
        near, far = ClientEnd(user, number), NodeEnd(self.node)
        near.connection = far.connection = self.network.connect(near, far)
        user.ends[number] = near
        self.node_ends.append(far)
        user.machine.connected(number, self.now)
        user.machine.established(number, self.now)
        user.settle()

    # For tests.

    def run(self, nanoseconds: int) -> None:
        self.network.advance(self.now + nanoseconds)

    def run_until(self, done: Callable[[], bool], nanoseconds: int) -> int:
        """Runs until something is so; returns how long it took, and fails after `nanoseconds`."""
        start = self.now
        while not done():
            time = self.network.next_event_time()
            assert time is not None, "nothing will ever happen"
            assert time <= start + nanoseconds, "it did not happen in time"
            self.network.step()
        return self.now - start

    @property
    def active(self) -> Connection:
        """The connection that carries the session now."""
        number = self.user.machine.active
        assert number is not None
        return self.user.ends[number].connection

    def open(self) -> None:
        self.run_until(lambda: self.user.machine.active is not None, 5 * SECOND)

    def handled(self) -> int:
        """How much input the program got, every byte checked."""
        return self.pod.handled_input.get(ATTACHMENT, (0, []))[0]
