"""A client in the world of sessions: it keeps its streams through all connections and checks every byte it gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sterna.ids import AttachmentId
from sterna.protocol import messages
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type
from tests.simulation.session_parts import HANDLE, NODE, RESUMABLE, UID, Connection, check, true_bytes

if TYPE_CHECKING:
    from tests.simulation.session_world import World


class Client:
    """One attachment's client: it keeps its streams through all connections and notes every byte that it got."""

    def __init__(self, world: World, number: int, *, exact: bool, mode: messages.Mode = "drive") -> None:
        self.world, self.number, self.exact, self.mode = world, number, exact, mode
        self.id = AttachmentId(bytes([number]) * 16)
        config = world.config
        self.input_start = config.input_start if mode == "drive" else 0  # a watcher has no lane
        self.out = config.client_stream(self.input_start, config.window, 1000)
        self.intake = config.client_intake(0)
        self.known = False  # it has an ACCEPT
        self.attached = False
        self.expects_snapshot = self.free = False  # free: history before the first byte is nobody's loss
        self.closed: messages.Close | None = None
        self.lost: list[tuple[int, int]] = []
        self.conn: Connection | None = None
        self.got = 0
        self.errors: list[int] = []

    # What the user does.

    def type(self, size: int) -> None:
        data = true_bytes(self.number, self.out.end, size)
        self.out.write(data)
        self.flush()

    def mark(self, kind: int) -> None:
        self.out.mark(kind, messages.pack(messages.Signal("INT")) if kind == Type.SIGNAL else b"")
        self.flush()

    def handle_output(self, size: int) -> None:
        self.intake.handle(min(self.intake.handled + size, self.intake.next), self.world.now)

    def flush(self, up_to: int | None = None) -> None:
        conn = self.conn
        if conn is None or not self.attached or conn.near.blocked or self.mode != "drive":
            return
        for kind, position, payload in self.out.take(up_to):
            conn.near.send(kind, HANDLE, position, payload)

    def acknowledge(self, joining: bool) -> None:
        if self.conn is None or not self.attached:
            return
        ack = self.intake.acknowledgement(self.world.now, joining)
        if ack is not None:
            self.conn.near.send(Type.ACK, HANDLE, ack, ack.to_bytes(8, "big"))

    # What the node says.

    def receive(self, frame: Frame) -> None:
        kind, handle, seq, payload = frame
        if handle == 0:
            check(kind != Type.ERROR, f"the connection failed: {payload!r}")
            return
        if kind == Type.ACCEPT:
            self._accept(messages.unpack(messages.Accept, payload))
        elif kind == Type.RESUMED:
            self._resumed(messages.unpack(messages.Resumed, payload))
        elif kind == Type.DATA:
            self._data(seq, payload)
        elif kind == Type.ACK:
            self._acknowledged(int.from_bytes(payload, "big"))
        elif kind == Type.SNAPSHOT:
            self._snapshot(messages.unpack(messages.Snapshot, payload))
        elif kind == Type.CLOSE:
            self._close(messages.unpack(messages.Close, payload))
        elif kind == Type.ERROR:
            error = messages.unpack(messages.Error, payload)
            check(error.code in RESUMABLE, f"client {self.number} was refused: {error.name}: {error.message}")
            self.errors.append(error.code)
            self.attached = False

    def _accept(self, accept: messages.Accept) -> None:
        self.known = self.attached = True
        self.free = True
        self.intake = self.world.config.client_intake(accept.output)
        self.expects_snapshot = accept.snapshot
        self.out.rewind(accept.input)
        self.flush()

    def _resumed(self, resumed: messages.Resumed) -> None:
        self.attached = True
        want = self.intake.next
        if resumed.lost is None:
            check(resumed.output == want, f"RESUMED goes on at {resumed.output}, {want} was wanted, nothing named")
        else:
            check(resumed.lost.start == want, f"RESUMED names {resumed.lost}, {want} was wanted")
            check(resumed.lost.end == resumed.output, f"RESUMED names {resumed.lost} and goes on at {resumed.output}")
            self._name(resumed.lost)
            self.intake.skip(resumed.output)
        self.expects_snapshot = resumed.snapshot
        if resumed.input is not None:
            self.out.rewind(resumed.input)
        self.flush()

    def _name(self, lost: messages.Lost) -> None:
        check(lost.start <= lost.end, f"a lost range runs backwards: {lost}")
        # Nobody may name as lost what the log still holds.
        self.lost.append((lost.start, lost.end))

    def _data(self, seq: int, payload: bytes) -> None:
        check(self.attached, "DATA came before ACCEPT or RESUMED")
        want = self.intake.next
        new = self.intake.receive(int(Type.DATA), seq, payload)
        if new is None:
            check(False, f"client {self.number} was sent bytes before {want} again")
            return
        check(not self.expects_snapshot, "DATA came before the SNAPSHOT that was promised")
        check(len(new) == len(payload), f"client {self.number} was sent bytes before {want} again")
        check(new == true_bytes(0, want, len(new)), f"client {self.number} got wrong bytes at {want}")
        self.got += len(new)
        self.free = False

    def _acknowledged(self, position: int) -> None:
        done = self.world.pod.handled_input.get(self.id, (self.input_start, []))[0]
        check(position <= done, f"input up to {position} was acknowledged, the program has had {done}")
        self.out.acknowledge(position)

    def _snapshot(self, part: messages.Snapshot) -> None:
        want = self.intake.next
        if part.lost is not None:
            check(part.lost.end == part.position, f"{part.lost} is named, the snapshot is of {part.position}")
            self._name(part.lost)
        if part.last:
            named = any(start <= want and part.position <= end for start, end in self.lost)
            fresh = self.free and (self.expects_snapshot or part.position == want)
            resumed = self.expects_snapshot and any(part.position >= start for start, _ in self.lost)
            check(
                part.position == want or named or fresh or resumed,
                f"client {self.number}: a snapshot jumps from {want} to {part.position}, nothing named",
            )
            check(part.position >= want, f"a snapshot of {part.position} goes back before {want}")
            check(not self.exact or named, "an exact client got a snapshot for bytes that were not lost")
            if self.exact:
                log = self.world.log
                check(part.position <= log.tail or part.position <= log.end, "lost is named beyond the log")
            self.intake.skip(part.position)
            self.expects_snapshot = False

    def _close(self, close: messages.Close) -> None:
        check(close.output == self.intake.next, f"CLOSE at {close.output}, {self.intake.next} was wanted next")
        self.closed = close
        if self.conn is not None:
            self.conn.near.send_message(Type.CLOSE, HANDLE, messages.Close())

    # Connections.

    def connect(self) -> Connection:
        conn = Connection(self.world.config.capacity)
        self.conn = conn
        self.attached = False
        if not self.known:
            body = messages.pack(messages.Signed(b"connect", b""))
            conn.near.send(Type.CONNECT, HANDLE, 0, body)
        else:
            resume = messages.ResumeBody(
                messages.CONTEXT_RESUME, NODE, UID, b"d", self.id, b"r", 1, 1, 1, self.intake.next
            )
            conn.near.send(Type.RESUME, HANDLE, 0, messages.pack(messages.Signed(messages.pack(resume), b"")))
        return conn
