"""A session with its pod and three clients through seeded faults; and controls: broken machines are found out."""

from __future__ import annotations

import os
from typing import Any

import pytest

from sterna import limits
from sterna.errors import ProtocolError
from sterna.protocol import messages, podside
from sterna.protocol.attachment import Attachment
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.podside import Input, PodMachine, PodSession
from sterna.protocol.session import Session
from sterna.protocol.stream import Intake, SendStream
from tests.simulation.session_parts import Config, ViolationError
from tests.simulation.session_steps import run

FIRST = int(os.environ.get("STERNA_TEST_SEED", "0"))
"""The seed of the first run: another number tries other faults."""
RUNS = int(os.environ.get("STERNA_TEST_RUNS", "40"))
STARTS = (0, (1 << 31) - 5000, (1 << 32) - 5000, (1 << 33) - 100)


def config(seed: int, **classes: Any) -> Config:
    """Positions near 2**31, 2**32 and 2**33, with and without snapshots, by seed."""
    start, input_start = STARTS[seed % 4], (0, (1 << 32) - 3000)[seed // 4 % 2]
    return Config(start=start, input_start=input_start, snapshots=seed % 3 > 0, **classes)


@pytest.mark.parametrize("part", range(4))
def test_everything_arrives_once_and_in_order(part: int) -> None:
    lost = got = 0
    for seed in range(FIRST + part, FIRST + part + 4 * RUNS, 4):
        print(f"seed {seed}: STERNA_TEST_SEED={seed} STERNA_TEST_RUNS=1")
        world = run(seed, config(seed), exits=seed % 2 > 0)
        lost += sum(end > start for client in world.clients for start, end in client.lost)
        got += sum(client.got for client in world.clients)
    assert got > 0
    assert lost > 0 or RUNS < 20, "no ring was overrun: the runs show nothing about gaps"


def test_the_same_with_real_windows() -> None:
    for seed in range(FIRST, FIRST + RUNS // 4 + 1):
        print(f"seed {seed}")
        sizes = config(seed)
        sizes.window = sizes.pod_window = limits.WINDOW_BYTES
        sizes.ring, sizes.capacity = limits.RING_BYTES, 65_536
        run(seed, sizes, steps=200, exits=seed % 2 > 0)


def fault_is_found(**classes: Any) -> str:
    """Returns what gave a broken machine away in one of 60 runs."""
    for seed in range(60):
        try:
            run(seed, config(seed, **classes), exits=seed % 2 > 0)
        except (ViolationError, ProtocolError) as error:
            print(f"seed {seed}: {error}")
            return str(error)
    raise AssertionError("nothing noticed the fault")


class AcknowledgesFirst(Session):
    """Acknowledges output to the pod before it is in the journal."""

    def pod_data(self, seq: int, payload: bytes, now: int) -> None:
        port = self.port
        assert port is not None
        position = self.log.end + len(payload)
        port.link.send(Type.ACK, port.handle, position, position.to_bytes(8, "big"))
        self.__dict__.setdefault("held", []).append((seq, payload))
        held = self.__dict__["held"]
        if len(held) > 1:
            first_seq, first_payload = held.pop(0)
            super().pod_data(first_seq, first_payload, now)


class PromisesInput(Session):
    """Acknowledges input when it is forwarded, not when the pod has handled it."""

    def client_input(self, attachment: Attachment, kind: int, seq: int, payload: bytes, now: int) -> None:
        super().client_input(attachment, kind, seq, payload, now)
        lane = attachment.lane
        if lane is not None and attachment.session is self and attachment.mode == "drive":
            position = lane.next
            attachment.link.send(Type.ACK, attachment.handle, position, position.to_bytes(8, "big"))


class SkipsReplay(Session):
    """Goes on at the end of the log instead of where the client stopped."""

    def resume(self, attachment: Attachment, body: messages.ResumeBody, now: int) -> None:
        raw = {name: getattr(body, name) for name in body.__struct_fields__}
        raw["output"] = self.log.end
        super().resume(attachment, messages.ResumeBody(**raw), now)


class SilentGap(Session):
    """Does not name what the ring has overwritten."""

    def _gap(self, attachment: Attachment, now: int, position: int) -> None:
        attachment.cursor = attachment.acked = position


class NoWindow(Session):
    """Sends as fast as the connection takes it."""

    def push(self, attachment: Attachment, now: int) -> None:
        attachment.window = 1 << 20
        super().push(attachment, now)
        attachment.window = 4096


class KeepsOld(Session):
    """Does not displace an attachment's old connection."""

    def _end(self, attachment: Attachment, *args: Any, **more: Any) -> None:
        return


class PacedByNobody(Session):
    """Acknowledges all output at once: the ring runs over a driver that is still reading."""

    def pace(self, now: int) -> None:
        if self.port is not None:
            end = self.log.end + 1
            self.port.link.send(Type.ACK, self.port.handle, end, end.to_bytes(8, "big"))


class SnapshotBeforeAsked(Session):
    """Forgets that somebody waits for a snapshot when the pod's connection is lost."""

    def pod_gone(self) -> None:
        for capture in self._captures.values():
            for attachment in capture.attachments:
                attachment.waiting = False
        super().pod_gone()


@pytest.mark.parametrize(
    "broken",
    [AcknowledgesFirst, PromisesInput, SkipsReplay, SilentGap, NoWindow, KeepsOld, PacedByNobody, SnapshotBeforeAsked],
)
def test_control_a_broken_session_is_found_out(broken: type[Session]) -> None:
    fault_is_found(session=broken)


class NoRewind(SendStream):
    """Does not send again what the receiver has not got."""

    def rewind(self, position: int) -> None:
        self.acknowledge(position)


class ForgetsUnsent(SendStream):
    """Treats an acknowledgement as one for everything that was sent."""

    def acknowledge(self, position: int) -> int:
        return super().acknowledge(max(position, self.sent))


@pytest.mark.parametrize("broken", [NoRewind, ForgetsUnsent])
def test_control_a_broken_sender_is_found_out(broken: type[SendStream]) -> None:
    fault_is_found(client_stream=broken)


class TakesDuplicates(Intake):
    """Takes what it had before as new."""

    def receive(self, kind: int, seq: int, payload: bytes) -> bytes | None:
        self.next += len(payload) if kind == Type.DATA else 1
        return payload


class HandledAtOnce(Intake):
    """Acknowledges what it received, not what was handled."""

    def receive(self, kind: int, seq: int, payload: bytes) -> bytes | None:
        new = super().receive(kind, seq, payload)
        self.handle(self.next, 0)
        return new


@pytest.mark.parametrize("broken", [TakesDuplicates, HandledAtOnce])
def test_control_a_broken_receiver_at_the_pod_is_found_out(
    broken: type[Intake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(podside, "Intake", broken)
    fault_is_found()


class NeverRoomy(PodMachine):
    """Does not wake a program when a new connection brings room."""

    def _roomy(self, session: PodSession) -> None:
        return None


class NoFence(PodMachine):
    """Goes on listening to the connection that a session was on before."""

    def _lane_frame(self, session: PodSession, lane: podside.PodLane, frame: Any, link: Link, now: int) -> Any:
        kind, _handle, seq, payload = frame
        new = lane.intake.receive(kind, seq, payload) if kind in (Type.DATA, Type.SIGNAL, Type.EOF) else None
        return None if new is None else Input(session, lane, kind, new[:1] + new, lane.intake.next)


@pytest.mark.parametrize("broken", [NeverRoomy, NoFence])
def test_control_a_broken_pod_is_found_out(broken: type[PodMachine]) -> None:
    fault_is_found(pod=broken)
