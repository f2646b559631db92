from __future__ import annotations

import contextlib
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from sterna.limits import REMOTE_BACKLOG_BYTES, REMOTE_REPLIES_MAX_BYTES, REMOTE_RETENTION_SECONDS
from sterna.remote import connection as connection_module
from sterna.remote.calls import Call, Params
from sterna.remote.connection import Budget, Connection
from sterna.remote.dispatch import _Job
from sterna.remote.log import Log
from sterna.remote.loginpath import LoginPath
from sterna.remote.loop import Loop
from sterna.remote.metrics import Metrics
from sterna.remote.processes import Processes
from sterna.remote.workers import Workers


class Rig:
    """One connection of which the test holds the other end."""

    def __init__(self, answer: Callable[[Connection, bytes], None] | None = None, budget: Budget | None = None) -> None:
        self.errors: list[BaseException] = []
        self.loop = Loop(self.errors.append)
        self.peer, ours = socket.socketpair()
        ours.setblocking(False)
        self.lines: list[bytes] = []
        self.reasons: list[str] = []
        self.budget = budget or Budget()
        self.connection = Connection(self.loop, ours, answer or self.note, self.gone, self.budget)

    def note(self, _connection: Connection, line: bytes) -> None:
        self.lines.append(line)

    def gone(self, _connection: Connection, reason: str) -> None:
        self.reasons.append(reason)

    def turn(self, done: Callable[[], object]) -> None:
        """Runs the loop until a condition holds."""
        deadline = time.monotonic() + 10

        def look() -> None:
            if done() or time.monotonic() > deadline:
                self.loop.stop()
            else:
                self.loop.later(0.002, look)

        look()
        self.loop._running = not done()
        self.loop.run()
        assert done()

    def close(self) -> None:
        self.connection.close()
        self.peer.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_lines_come_whole_whatever_the_cut(rig: Rig) -> None:
    for piece in (b"a", b"b\n", b"\n\r\nc\r\n", b"d\r\r\n" + b"e" * 50_000, b"e" * 50_000, b"e\nrest"):
        rest = 0 if b"\n" in piece else rig.budget.used
        rig.peer.sendall(piece)
        rig.turn(lambda piece=piece, rest=rest: rig.budget.used == rest + len(piece.rpartition(b"\n")[2]))  # type: ignore[misc] # bound now
    assert [line[:3] for line in rig.lines] == [b"ab", b"c", b"d\r", b"eee"]
    assert len(rig.lines[3]) == 100_001


def test_lazy_lines_are_made_as_they_are_read(rig: Rig) -> None:
    made = 0

    def lines() -> Iterator[bytes]:
        nonlocal made
        for number in range(1000):
            made += 1
            yield b"%0999d\n" % number

    rig.connection.write(b"first\n")
    rig.connection.write_lazy(lines(), 1_000_000)
    rig.connection.write(b"last\n")
    assert rig.connection.full
    assert made < 700, "the socket takes some, the backlog holds some, the rest waits"
    got = b""
    rig.peer.settimeout(0.5)
    while not got.endswith(b"last\n"):
        got += rig.peer.recv(1 << 20)
        rig.connection.flush()
    assert got == b"first\n" + b"".join(b"%0999d\n" % number for number in range(1000)) + b"last\n"
    assert rig.connection.backlog == 0
    assert made == 1000


def test_a_bound_of_lazy_lines_may_be_wrong(rig: Rig) -> None:
    for bound in (1, 10_000_000):
        rig.connection.write_lazy(iter([b"x\n"] * 10), bound)
        assert rig.peer.recv(100) == b"x\n" * 10
        assert rig.connection.backlog == 0


def test_requests_are_held_back_while_replies_are_not_taken() -> None:
    reply = b"r" * (REMOTE_REPLIES_MAX_BYTES // 4) + b"\n"
    served = []

    def answer(connection: Connection, line: bytes) -> None:
        served.append(line)
        connection.write(reply)

    rig = Rig(answer)
    rig.peer.sendall(b"".join(b"%d\n" % number for number in range(50)))
    rig.turn(lambda: len(served) >= 4)
    assert len(served) < 10
    rig.peer.setblocking(False)
    got = 0

    def read() -> bool:
        nonlocal got
        try:
            while data := rig.peer.recv(1 << 20):
                got += len(data)
        except BlockingIOError:
            pass
        return got == 50 * len(reply)

    rig.turn(read)
    assert served == [b"%d" % number for number in range(50)]
    rig.close()


def test_many_requests_without_a_reply_stop_the_reading() -> None:
    def answer(connection: Connection, _line: bytes) -> None:
        connection.pending += 1

    rig = Rig(answer)
    rig.peer.sendall(b"x\n" * 10_000)
    rig.turn(lambda: rig.connection.pending > 4_000)
    before = rig.connection.pending
    assert before < 5_000
    rig.connection.pending = 0
    rig.connection.settle()
    rig.turn(lambda: rig.connection.pending > 4_000)
    rig.close()


def test_long_requests_without_a_reply_stop_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "REMOTE_PENDING_MAX_BYTES", 1_000)
    served: list[bytes] = []

    def answer(connection: Connection, line: bytes) -> None:
        served.append(line)
        connection.pending_bytes += len(line)

    rig = Rig(answer)
    rig.peer.sendall(b"".join(b"%0100d\n" % number for number in range(30)))
    for bunch in (11, 22, 30):
        rig.turn(lambda bunch=bunch: len(served) >= bunch)  # type: ignore[misc] # bound now
        assert len(served) == bunch
        rig.connection.pending_bytes = 0
        rig.connection.settle()
    rig.close()


def test_unfinished_lines_of_all_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "REMOTE_PARTIAL_TOTAL_MAX_BYTES", 100_000)
    budget = Budget()
    friend, small, old, young = (Rig(budget=budget) for _ in range(4))
    friend.connection.trust()
    used = 0
    for rig, size in ((friend, 30_000), (small, 1_000), (old, 40_000), (young, 40_000)):
        rig.peer.sendall(b"x" * size)
        used += size
        rig.turn(lambda used=used: budget.used == used or old.reasons)  # type: ignore[misc] # bound now
    assert old.reasons == ["unfinished lines of all clients take too much memory"]
    reasons = [friend.reasons, small.reasons, young.reasons]
    assert reasons == [[], [], []], "not who reads now, nor who has the token"
    assert budget.used == 71_000
    for rig in (friend, small, old, young):
        rig.close()
    assert budget.used == 0


def test_refusals_that_strangers_do_not_read_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "REMOTE_REFUSALS_TOTAL_MAX_BYTES", 8_000_000)
    budget = Budget()
    rigs = [Rig(budget=budget) for _ in range(4)]
    rigs[0].connection.trust()
    for rig in rigs:
        rig.connection.write(b"x" * 3_500_000)
    assert [rig.connection.closed for rig in rigs].count(True) == 1
    assert not rigs[0].connection.closed
    assert budget.out > 3_000_000
    assert 6_000_000 < budget.refusals < 8_000_000
    for rig in rigs:
        rig.close()
    assert (budget.out, budget.refusals) == (0, 0)


@pytest.mark.parametrize("leaves", [False, True])
def test_many_lines_of_one_client_leave_others_their_turn(leaves: bool) -> None:
    served: list[bytes] = []

    def answer(connection: Connection, line: bytes) -> None:
        served.append(line)
        connection.write(line)
        time.sleep(0.0005)

    rig, between = Rig(answer), list[int]()

    def look() -> None:
        between.append(len(served))
        if len(served) < 200:
            rig.loop.post(look)

    rig.peer.sendall(b"".join(b"%d\n" % number for number in range(200)))
    rig.loop.post(look)
    if leaves:
        rig.peer.close()
    rig.turn(lambda: len(served) == 200)
    assert served == [b"%d" % number for number in range(200)], "whether the client stays for the answers or not"
    assert max(after - before for before, after in pairwise(between)) < 50
    if leaves:
        rig.turn(lambda: rig.reasons)
        assert rig.reasons == [""]
    rig.close()


class Waiting:
    """A job whose reply has so many bytes."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.started, self.dropped = wanted, 0, 0

    def start(self) -> None:
        self.started += 1

    def drop(self) -> None:
        self.dropped += 1


def test_replies_are_made_as_the_client_reads_them() -> None:
    rig, jobs = Rig(), [Waiting(REMOTE_REPLIES_MAX_BYTES // 2) for _ in range(4)]
    for job in jobs:
        rig.connection.jobs.add(job)
        rig.connection.queue(job)
    assert [job.started for job in jobs] == [1, 1, 0, 0]
    rig.connection.write(b"x" * (REMOTE_REPLIES_MAX_BYTES * 3 // 4))
    rig.connection.give_back(jobs[0].wanted)
    assert jobs[2].started == 0, "its place is taken by a reply that is not read"
    rig.peer.setblocking(False)

    def read() -> bool:
        with contextlib.suppress(BlockingIOError):
            rig.peer.recv(1 << 20)
        return jobs[2].started == 1

    rig.turn(read)
    rig.close()
    assert [job.started for job in jobs] == [1, 1, 1, 0]
    assert [job.dropped for job in jobs] == [1, 1, 1, 1]


def test_the_replies_of_all_clients_are_bounded_and_each_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "REMOTE_OUTGOING_TOTAL_MAX_BYTES", 1_000_000)
    budget = Budget()
    one, two = Rig(budget=budget), Rig(budget=budget)
    assert one.connection.take(900_000)
    assert two.connection.take(900_000), "the first one is free"
    assert not two.connection.take(1)
    one.connection.give_back(900_000)
    assert two.connection.take(1)
    one.close()
    two.close()


class Held(Params):
    """Parameters that one may refer to weakly."""


def test_jobs_of_a_client_that_is_gone() -> None:
    """What only reads is dropped with its parameters, what changes something is done."""
    rig, go, ran = Rig(), threading.Event(), list[str]()
    pool = Workers(rig.loop.post, 1)
    pool.submit(lambda: go.wait(10) and (lambda: None))  # type: ignore[arg-type,return-value] # it comes
    kept = []

    def run(params: Params) -> dict[str, object]:
        ran.append(params.text("path"))
        return {}

    for name in ("files.read", "files.extract_tar"):
        params = Held({"path": name})
        kept.append(weakref.ref(params))
        call = Call(rig.connection, "1", params, 100)
        del params
        _Job({"files": pool}, name, run, call).submit()
        del call
    assert [ref() is None for ref in kept] == [False, False]
    rig.close()
    assert [ref() is None for ref in kept] == [True, False]
    go.set()
    rig.turn(lambda: ran)
    assert ran == ["files.extract_tar"]


def test_an_error_in_one_connection_ends_it_alone() -> None:
    def answer(_connection: Connection, _line: bytes) -> None:
        raise RuntimeError("broken")

    rig = Rig(answer)
    rig.peer.sendall(b"x\n")
    rig.turn(lambda: rig.errors)
    assert rig.reasons == ["internal error"]
    ran: list[int] = []
    rig.loop.later(0, lambda: ran.append(1))
    rig.turn(lambda: ran)
    rig.close()


def test_a_backlog_makes_processes_wait() -> None:
    rig = Rig()
    rig.connection.write_pieces((b"x" * 10, bytearray(b"y" * (3 * REMOTE_BACKLOG_BYTES)), b"}\n"))
    assert rig.connection.full
    got = b""
    while len(got) < 12 + 3 * REMOTE_BACKLOG_BYTES:
        got += rig.peer.recv(1 << 20)
        rig.connection.flush()
    assert (got[:11], got[-3:]) == (b"x" * 10 + b"y", b"y}\n")
    assert rig.connection.backlog == 0
    rig.close()


def test_timers_run_in_their_order_and_not_when_cancelled() -> None:
    rig, ran = Rig(), list[str]()
    rig.loop.later(0.02, lambda: ran.append("late"))
    rig.loop.later(0.001, lambda: ran.append("early"))
    rig.loop.later(0.01, lambda: ran.append("never")).cancel()
    rig.loop.post(lambda: ran.append("posted"))
    rig.turn(lambda: len(ran) == 3)
    assert ran == ["posted", "early", "late"]
    rig.close()


class Exited:
    """A process that exited so many seconds ago."""

    def __init__(self, name: str, ago: float, *, running: bool = False) -> None:
        self.id, self.running, self.ended_at = name, running, time.monotonic() - ago

        self.child = self

    def unsubscribe(self) -> None:
        pass

    unwatch_all = forget = unsubscribe


def test_processes_are_forgotten_a_quarter_of_an_hour_after_their_end() -> None:
    rig = Rig()
    log = Log("error")
    processes = Processes(rig.loop, log, Metrics(), LoginPath(rig.loop, log), [], "/")
    for process in (
        Exited("old", REMOTE_RETENTION_SECONDS + 1), Exited("young", REMOTE_RETENTION_SECONDS - 5),
        Exited("runs", 10**6, running=True),
    ):  # fmt: skip
        processes._known[process.id] = process  # type: ignore[assignment] # all that a sweep looks at
    processes._sweep()
    assert sorted(processes._known) == ["runs", "young"]
    rig.close()
