"""Hypothesis chooses the steps of the world of sessions, and shrinks what fails to the fewest of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from sterna.protocol.frame import Type
from sterna.protocol.session import Session
from tests.simulation.session_steps import KINDS
from tests.simulation.session_world import Config, Violation, World
from tests.simulation.test_session_runs import STARTS, PromisesInput, SilentGap, SkipsReplay

ALL = 1 << 30
SIZES = st.sampled_from((1, 10, 1000, 5000, 20_000))
BYTES = st.sampled_from((0, 1, 20, 3000, ALL))
CLIENTS = st.integers(0, len(KINDS) - 1)
DRIVERS = st.sampled_from([number for number, (_, mode) in enumerate(KINDS) if mode == "drive"])


class SessionMachine(RuleBasedStateMachine):
    """Three attachments (an exact driver, a terminal, a watcher) of one session, its node and its pod."""

    session: type[Session] = Session

    @initialize(start=st.sampled_from(STARTS), input_start=st.sampled_from((0, (1 << 32) - 3000)), snapshots=st.booleans())
    def begin(self, start: int, input_start: int, snapshots: bool) -> None:
        config = Config(start=start, input_start=input_start, snapshots=snapshots, session=self.session)
        self.world = World(config, KINDS)
        self.world.pod_connect()
        self.world.deliver_pod(ALL, ALL)

    @rule(client=CLIENTS, up=BYTES, down=BYTES)
    def network(self, client: int, up: int, down: int) -> None:
        self.world.deliver(self.world.clients[client], up, down)

    @rule(up=BYTES, down=BYTES)
    def pod_network(self, up: int, down: int) -> None:
        self.world.deliver_pod(up, down)

    @rule(client=CLIENTS)
    def connect(self, client: int) -> None:
        self.world.connect(self.world.clients[client])

    @rule(client=CLIENTS)
    def cut(self, client: int) -> None:
        self.world.cut(self.world.clients[client])

    @rule(client=CLIENTS)
    def leave(self, client: int) -> None:
        self.world.leave(self.world.clients[client])

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

    @rule(late=BYTES)
    def pod_cut(self, late: int) -> None:
        self.world.pod_cut(late)

    @rule()
    def pod_connect(self) -> None:
        self.world.pod_connect()

    @rule()
    def pod_notice(self) -> None:
        self.world.pod_notice()

    @rule()
    def node_restart(self) -> None:
        self.world.node_restart()

    @rule(milliseconds=st.sampled_from((1, 120, 260, 11_000)))
    def time_passes(self, milliseconds: int) -> None:
        self.world.tick(milliseconds)

    @rule()
    def exit(self) -> None:
        self.world.act(self.world.pod.exit)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("broken", [PromisesInput, SilentGap, SkipsReplay])
def test_control_hypothesis_finds_a_broken_session(broken: type[Session]) -> None:
    machine: Any = type("Broken", (SessionMachine,), {"session": broken})
    with pytest.raises((Violation, ExceptionGroup)):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]  # hypothesis leaves it untyped
            machine, settings=settings(max_examples=500, stateful_step_count=40, deadline=None, database=None)
        )
