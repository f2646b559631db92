"""The client's machine against a node's session over a network that cuts, freezes and goes silent; and controls."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import msgspec
import pytest

from sterna import limits
from sterna.protocol import client, messages, race
from sterna.protocol.client import ClientMachine, Suspended, Trouble, Uncertain
from sterna.protocol.race import Vitals
from sterna.transport.memory import Connection, End, LivelockError, MemoryNetwork
from tests.simulation.client_world import ATTACHMENT, ClientWorld
from tests.simulation.session_parts import MS, SECOND, ViolationError

FIRST = int(os.environ.get("STERNA_TEST_SEED", "0"))
"""The seed of the first run: another number tries other faults."""
RUNS = int(os.environ.get("STERNA_TEST_RUNS", "25"))
FOUND = (1390, 1435)
"""Seeds whose faults once ended a session: a RESUME of our own displaced the connection that had taken over."""
TOTAL = 150_000
FAILURES = (AssertionError, LivelockError)


def storm(seed: int, kind: type[ClientMachine] = ClientMachine) -> ClientWorld:
    """Types and prints through 20 s of faults, then lets everything arrive."""
    print(f"seed {seed}: STERNA_TEST_SEED={seed} STERNA_TEST_RUNS=1")
    world = ClientWorld(seed, kind=kind, capacity_bytes=16_384, dial=30 * MS)
    world.open()
    chance = random.Random(seed)
    for _ in range(25):
        world.run(chance.randrange(5 * MS, 1500 * MS))
        world.pod.write(chance.randrange(TOTAL // 10))
        world.user.enter(chance.randrange(TOTAL // 10))
        fault(world, chance)
    world.reachable = True
    for connection in world.network.connections:
        connection.heal()

    def arrived() -> bool:
        streams = world.user.machine.input
        return (
            world.pod.to_write == world.user.to_type == 0
            and world.pod.session is not None
            and world.user.got == world.pod.session.out.end
            and world.handled() == streams.end == streams.base
        )

    world.run_until(arrived, 60 * SECOND)
    world.run(60 * SECOND)
    assert arrived(), "something came twice"
    return world


def fault(world: ClientWorld, chance: random.Random) -> None:
    """Breaks something, perhaps."""
    ends = list(world.user.ends.values())
    if not ends:
        return
    end = chance.choice(ends)
    connection, choice = end.connection, chance.random()
    if choice < 0.2:
        connection.cut()
    elif choice < 0.4:
        connection.cut_silently()
    elif choice < 0.6 and connection.alive:
        sides: list[End] = [end, *(far for far in world.node_ends if far.connection is connection)]
        connection.freeze(chance.choice(sides))
        world.network.call_at(world.now + chance.randrange(4 * SECOND), connection.heal)
    elif choice < 0.7:
        world.pod_connection.cut()
    elif choice < 0.8:
        world.reachable = not world.reachable


def test_everything_arrives_once_and_in_order() -> None:
    resumed = 0
    for seed in (*range(FIRST, FIRST + RUNS), *(FOUND if RUNS > 1 else ())):
        world = storm(seed)
        resumed += world.user.counter
        assert world.user.got > 0
    assert resumed > 3 * RUNS or RUNS < 10, "there was hardly anything to recover from"


def test_a_seed_is_one_run() -> None:
    def trace() -> list[tuple[int, str]]:
        return [(time, type(event).__name__) for time, event in storm(FIRST).user.events]

    assert trace() == trace()


class Repeats(ClientMachine):
    """Sends input again from the wrong place after RESUMED."""

    def _resumed(self, connection: client._Connection, resumed: messages.Resumed, now: int) -> None:
        super()._resumed(connection, msgspec.structs.replace(resumed, input=self.input.sent), now)


class Skips(ClientMachine):
    """Takes output for had that did not come."""

    def _resumed(self, connection: client._Connection, resumed: messages.Resumed, now: int) -> None:
        super()._resumed(connection, msgspec.structs.replace(resumed, output=resumed.head), now)


@pytest.mark.parametrize("kind", [Repeats, Skips])
def test_control_broken_machines_are_found_out(kind: type[ClientMachine]) -> None:
    for seed in range(20):
        try:
            storm(seed, kind)
        except (ViolationError, AssertionError, LivelockError) as error:
            print(error)
            return
    raise AssertionError("nothing noticed the fault")


# ---- silence and keepalive -------------------------------------------------------------------------------------------


def silence(seed: int) -> None:
    """The network dies under a quiet session; input goes on within 2 s."""
    print(f"seed {seed}")
    world = ClientWorld(seed)
    world.open()
    world.run(500 * MS)
    old = world.active
    old.cut_silently()
    world.user.enter(10)
    world.run_until(lambda: world.user.machine.active is not None and world.active is not old, 2 * SECOND)
    world.run_until(lambda: world.handled() == 10, SECOND)
    assert [event.reason for _, event in world.user.all(Trouble)][-2:] == ["no answer", ""]


def test_a_silent_cut_is_noticed_and_another_connection_takes_over_within_two_seconds() -> None:
    for seed in range(FIRST, FIRST + 10):
        silence(seed)


def test_control_silence_without_suspicion(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Vitals.check
    monkeypatch.setattr(Vitals, "check", lambda self, now, owed: check(self, now, owed).replace("no answer", ""))
    with pytest.raises(FAILURES):
        silence(FIRST)


def keepalive() -> None:
    """An idle connection is asked in time, for two minutes."""
    world = ClientWorld(FIRST)
    world.open()
    world.run(120 * SECOND)
    pings = [SECOND, *world.node.pings, world.now]
    longest = max(after - before for before, after in pairwise(pings))
    assert longest <= limits.KEEPALIVE_SECONDS * SECOND + 100 * MS, f"{longest / SECOND} s without a PING"
    assert len(pings) < 30, "an idle connection is asked all the time"


def test_an_idle_connection_is_asked_in_time() -> None:
    keepalive()


def test_control_keepalive_of_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_KEEPALIVE", 86_400 * SECOND)
    with pytest.raises(AssertionError, match="without a PING"):
        keepalive()


# ---- counters, races, lanes ------------------------------------------------------------------------------------------


def stale(*, raises: bool) -> None:
    """The node knows a higher counter, as after a client's restored backup."""
    world = ClientWorld(FIRST, raises=raises)
    world.open()
    world.node.counter = 1000
    world.active.cut()
    world.user.enter(10)
    world.run_until(lambda: world.handled() == 10, 5 * SECOND)
    assert world.node.counter == world.user.counter == 1001


def test_a_stale_counter_is_raised_and_the_session_goes_on() -> None:
    stale(raises=True)


def test_control_stale_counter_that_is_not_raised() -> None:
    with pytest.raises(FAILURES):
        stale(raises=False)


class KeepsLosers(ClientMachine):
    """Drops no connection that lost a race."""

    def _drop(self, connection: client._Connection) -> None:
        pass


def losers(kind: type[ClientMachine]) -> None:
    """Dialling takes long: several connections are on their way when the first one is RESUMED."""
    world = ClientWorld(FIRST, kind=kind, dial=180 * MS, delay_min=80 * MS, delay_max=100 * MS)
    world.open()
    world.active.cut()
    dials = len(world.node_ends)
    world.run_until(lambda: len(world.user.ends) > 1, SECOND)
    world.run_until(lambda: world.user.machine.active is not None, SECOND)
    world.run(SECOND)
    assert len(world.node_ends) > dials + 1, "there was no race"
    assert list(world.user.ends) == [world.user.machine.active]
    assert [end.connection for end in world.node_ends if not end.gone] == [world.active]
    assert len(world.session.attachments) == 1


def test_losers_of_a_race_are_dropped() -> None:
    losers(ClientMachine)


def test_control_losers_that_stay() -> None:
    with pytest.raises(FAILURES):
        losers(KeepsLosers)


class Remembers(ClientMachine):
    """Does not see that its lane was forgotten."""

    def _resumed(self, connection: client._Connection, resumed: messages.Resumed, now: int) -> None:
        super()._resumed(connection, msgspec.structs.replace(resumed, forgotten=False), now)


def forgotten(kind: type[ClientMachine]) -> None:
    """Node and pod give up the lane while the client is away with unacknowledged input."""
    world = ClientWorld(FIRST, kind=kind)
    world.open()
    world.run(SECOND)
    connection = world.active
    connection.cut_silently()
    world.user.enter(100)
    connection.cut()
    assert world.pod.session is not None
    world.session.lanes.pop(ATTACHMENT)
    world.pod.session.lanes.pop(ATTACHMENT)
    world.pod.handled_input[ATTACHMENT] = (100, [])
    world.open()
    world.user.enter(10)
    world.run_until(lambda: world.handled() == 110, SECOND)
    assert [(event.start, event.end) for _, event in world.user.all(Uncertain)] == [(0, 100)]


def test_input_of_a_forgotten_lane_is_uncertain() -> None:
    forgotten(ClientMachine)


def test_control_forgotten_lane_that_is_not_seen() -> None:
    with pytest.raises(FAILURES):
        forgotten(Remembers)


# ---- leaving ---------------------------------------------------------------------------------------------------------


def suspend(*, answered: bool) -> int:
    """Leaves, and returns how long that took in nanoseconds."""
    world = ClientWorld(FIRST)
    world.open()
    if not answered:
        world.active.cut_silently()
    world.user.machine.suspend(world.now)
    took = world.run_until(lambda: bool(world.user.all(Suspended)), 2 * SECOND)
    world.run(SECOND)
    assert world.user.machine.finished
    assert not world.user.ends
    assert bool(world.session.attachments) is not answered
    return took


def test_suspend_is_answered_at_once() -> None:
    assert suspend(answered=True) <= 100 * MS


def test_suspend_without_an_answer_ends_within_two_seconds() -> None:
    assert suspend(answered=False) == 2 * SECOND


def test_control_suspend_that_waits_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ANSWER", 86_400 * SECOND)
    with pytest.raises(FAILURES):
        suspend(answered=False)


# ---- the network itself ----------------------------------------------------------------------------------------------


class Plain:
    """An end that sends what stands in `out` and notes what it learns."""

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.got = b""
        self.learnt: list[str] = []

    def data_to_send(self) -> list[bytes]:
        out, self.out = self.out, []
        return out

    def receive(self, data: bytes, now: int) -> None:
        self.got += data

    def ended(self, now: int) -> None:
        self.learnt.append("ended")

    def blocked(self, state: bool, now: int) -> None:
        self.learnt.append("blocked" if state else "roomy")


def pair() -> tuple[MemoryNetwork, Plain, Plain, Connection]:
    network, near, far = MemoryNetwork(FIRST, capacity_bytes=100), Plain(), Plain()
    return network, near, far, network.connect(near, far)


def test_a_full_pipe_blocks_and_everything_arrives() -> None:
    network, near, far, connection = pair()
    near.out = [bytes(range(250))]
    assert network.next_event_time() is not None
    assert near.learnt == ["blocked"]
    assert connection.waiting_bytes(near) == 250
    network.advance(SECOND)
    assert far.got == bytes(range(250))
    assert near.learnt == ["blocked", "roomy"]
    assert network.now == SECOND


def test_cuts_lose_what_is_in_flight_and_only_loud_ones_are_learnt() -> None:
    for silent in (False, True):
        network, near, far, connection = pair()
        near.out = [b"x" * 50]
        network.next_event_time()
        connection.cut_silently() if silent else connection.cut()
        near.out = [b"y" * 200]
        network.advance(SECOND)
        assert far.got == b""
        assert far.learnt == ([] if silent else ["ended"])
        assert near.learnt == (["blocked"] if silent else ["ended"])


def test_a_freeze_holds_one_way_until_it_is_healed() -> None:
    network, near, far, connection = pair()
    near.out, far.out = [b"up"], [b"down"]
    connection.freeze(near)
    network.advance(SECOND)
    assert (near.got, far.got) == (b"down", b"")
    connection.heal()
    network.advance(2 * SECOND)
    assert far.got == b"up"


def test_a_close_comes_after_all_bytes() -> None:
    network, near, far, connection = pair()
    near.out = [b"x" * 300]
    connection.close(near)
    network.advance(SECOND)
    assert far.got == b"x" * 300
    assert far.learnt == ["ended"]
    assert near.learnt == ["blocked"]
    assert not network.connections


class Restless:
    """A machine that is due whatever is done."""

    def next_timeout(self) -> int | None:
        return 0

    def handle_timeout(self, now: int) -> None:
        pass


def test_a_timeout_that_stays_due_is_a_livelock() -> None:
    network = MemoryNetwork(FIRST)
    network.watch(Restless())
    with pytest.raises(LivelockError):
        network.advance(SECOND)
