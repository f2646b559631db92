"""Hypothesis chooses the steps of the world of sessions, and shrinks what fails to the fewest of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from sterna.errors import ProtocolError
from sterna.protocol.frame import Type
from sterna.protocol.session import Session
from tests.simulation.session_parts import Config, ViolationError
from tests.simulation.session_steps import KINDS
from tests.simulation.session_world import World
from tests.simulation.test_session_runs import STARTS, AcknowledgesFirst, NoWindow, SkipsReplay

ALL = 1 << 30
SIZES = st.sampled_from((1, 10, 1000, 5000, 20_000))
BYTES = st.sampled_from((ALL, ALL, 3000, 20, 1, 0))
CLIENTS = st.integers(0, len(KINDS) - 1)
DRIVERS = st.sampled_from([number for number, (_, mode) in enumerate(KINDS) if mode == "drive"])


class SessionMachine(RuleBasedStateMachine):
    """Three attachments (an exact driver, a terminal, a watcher) of one session, its node and its pod."""

    session: type[Session] = Session

    @initialize(
        start=st.sampled_from(STARTS),
        input_start=st.sampled_from((0, (1 << 32) - 3000)),
        snapshots=st.booleans(),
        exits=st.booleans(),
    )
    def begin(self, start: int, input_start: int, snapshots: bool, exits: bool) -> None:
        config = Config(start=start, input_start=input_start, snapshots=snapshots, session=self.session, ring=12_288)
        self.world = World(config, KINDS)
        self.world.pod_connect()
        self.world.deliver_pod(ALL, ALL)
        for client in self.world.clients:
            self.world.connect(client)
            self.world.deliver(client, ALL, ALL)
        self.exits = exits

    @rule(client=CLIENTS, up=BYTES, down=BYTES)
    def network(self, client: int, up: int, down: int) -> None:
        self.world.deliver(self.world.clients[client], up, down)

    @rule(up=BYTES, down=BYTES)
    def pod_network(self, up: int, down: int) -> None:
        self.world.deliver_pod(up, down)

    @rule(client=CLIENTS, what=st.sampled_from(("connect", "connect", "connect", "cut", "leave")))
    def come_and_go(self, client: int, what: str) -> None:
        getattr(self.world, what)(self.world.clients[client])

    @rule(which=st.integers(0, 3), up=BYTES)
    def late_frames(self, which: int, up: int) -> None:
        self.world.notice_old(which, up)

    @rule(client=DRIVERS, size=SIZES)
    def type(self, client: int, size: int) -> None:
        self.world.act(lambda: self.world.clients[client].type(size))

    @rule(client=DRIVERS, kind=st.sampled_from((Type.SIGNAL, Type.EOF)))
    def mark(self, client: int, kind: Type) -> None:
        self.world.act(lambda: self.world.clients[client].mark(kind))

    @rule(client=CLIENTS, size=SIZES)
    def read(self, client: int, size: int) -> None:
        self.world.act(lambda: self.world.clients[client].handle_output(size))

    @rule(size=SIZES)
    def output(self, size: int) -> None:
        self.world.act(lambda: self.world.pod.write(size))

    @rule(count=st.integers(1, 4))
    def program_reads(self, count: int) -> None:
        self.world.act(lambda: self.world.pod.handle_input(count))

    @rule()
    def snapshot(self) -> None:
        self.world.act(self.world.pod.answer_capture)

    @rule(what=st.sampled_from(("connect", "connect", "notice", "cut", "restart")), late=BYTES)
    def disturb(self, what: str, late: int) -> None:
        if what == "cut":
            self.world.pod_cut(late)
        elif what == "connect":
            self.world.pod_connect()
        elif what == "notice":
            self.world.pod_notice()
        else:
            self.world.node_restart()

    @rule(milliseconds=st.sampled_from((1, 120, 260, 11_000)))
    def time_passes(self, milliseconds: int) -> None:
        self.world.tick(milliseconds)

    @precondition(lambda self: self.exits)
    @rule()
    def exit(self) -> None:
        self.world.act(self.world.pod.exit)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("broken", [AcknowledgesFirst, NoWindow, SkipsReplay])
def test_control_hypothesis_finds_a_broken_session(broken: type[Session]) -> None:
    machine: Any = type("Broken", (SessionMachine,), {"session": broken})
    with pytest.raises((ViolationError, ProtocolError, ExceptionGroup)):
        run_state_machine_as_test(
            machine, settings=settings(max_examples=500, stateful_step_count=40, database=None, phases=[Phase.generate])
        )
