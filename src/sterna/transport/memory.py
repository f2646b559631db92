"""A network in memory with faults from a seed: the same seed gives the same run, in virtual time.

It stands where sockets stand in a daemon, so that lost, late, split and blocked bytes can be had without waiting.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from sterna.errors import Code, SternaError
from sterna.units import MILLISECOND, SECOND

CAPACITY_BYTES = 64 * 1024
STEPS_PER_SECOND_MAX = 100_000


class LivelockError(SternaError):
    """The machines keep each other, or themselves, busy without end."""

    code = Code.INTERNAL


class End(Protocol):
    """One side of a connection.

    It may have two more methods: `ended(now)` is called once when it learns that the connection is gone, and
    `blocked(state, now)` when its pipe is full (True) or takes bytes again (False).
    """

    def receive(self, data: bytes, now: int) -> None:
        """Takes bytes that arrived; `now` in virtual nanoseconds."""

    def data_to_send(self) -> Iterable[bytes]:
        """Returns what is to be sent, in this order, and forgets it."""


class Timed(Protocol):
    """A machine with time limits in virtual nanoseconds."""

    def next_timeout(self) -> int | None:
        """Returns when it wants to be called, or None."""

    def handle_timeout(self, now: int) -> None:
        """Does what is due."""


def _tell(end: End | None, method: str, *arguments: int) -> None:
    """Calls a method that an end may have, if it has not left."""
    call = getattr(end, method, None)
    if call is not None:
        call(*arguments)


class _Pipe:
    """One direction: `backlog` found no room, `flight` is on its way with the time of its arrival.

    `sender` and `receiver` are None once they have left.
    """

    def __init__(self, sender: End, receiver: End) -> None:
        self.sender: End | None = sender
        self.receiver: End | None = receiver
        self.backlog: deque[bytes] = deque()
        self.flight: deque[tuple[int, bytes]] = deque()
        self.flight_bytes = 0
        self.arrival = 0
        self.frozen = self.full = self.finishing = False

    def clear(self) -> None:
        """Loses everything that has not arrived."""
        self.backlog.clear()
        self.flight.clear()
        self.flight_bytes = 0


class Connection:
    """A connection between two ends; `alive` is False once it was cut, in silence or not, or closed and emptied."""

    def __init__(self, network: MemoryNetwork, near: End, far: End) -> None:
        self._network = network
        self._pipes = (_Pipe(near, far), _Pipe(far, near))
        self._silent = False
        self.alive = True

    def cut(self) -> None:
        """Ends the connection: bytes in flight are lost, and every end that has not left learns it now."""
        self.alive = self._silent = False
        self._network.forget_connection(self)
        ends = [pipe.sender for pipe in self._pipes]
        for pipe in self._pipes:
            pipe.clear()
            pipe.sender = pipe.receiver = None
        for end in ends:
            _tell(end, "ended", self._network.now)

    def cut_silently(self) -> None:
        """Ends the connection so that nobody learns it: bytes in flight are lost, later ones pile up in the pipes."""
        if self.alive:
            self.alive, self._silent = False, True
            for pipe in self._pipes:
                pipe.flight.clear()  # they still fill the sender's buffers: no acknowledgement comes for them

    def freeze(self, sender: End) -> None:
        """Holds what `sender` has sent, in flight or not, until `heal`; the other direction goes on."""
        self._pipe(sender).frozen = True

    def heal(self) -> None:
        """Ends all freezes: what was held arrives after a new delay. A cut connection stays cut."""
        for pipe in self._pipes:
            if pipe.frozen:
                pipe.frozen = False
                start = pipe.arrival = self._network.arrival(pipe.arrival)
                pipe.flight = deque((start, data) for _, data in pipe.flight)

    def close(self, end: End) -> None:
        """Closes from one side: `end` hears nothing more; the other learns it after all bytes sent before."""
        out = self._pipe(end)
        self.collect()
        back = self._pipes[1 - self._pipes.index(out)]
        out.sender = back.receiver = None
        out.finishing = True
        back.clear()
        if self._silent and back.sender is None:
            self._network.forget_connection(self)

    def waiting_bytes(self, sender: End) -> int:
        """Returns how many bytes of `sender` have not arrived."""
        pipe = self._pipe(sender)
        return pipe.flight_bytes + sum(map(len, pipe.backlog))

    def _pipe(self, sender: End) -> _Pipe:
        for pipe in self._pipes:
            if pipe.sender is sender:
                return pipe
        raise ValueError("This end is not, or no longer, on this connection.")

    # ---- for the network ---------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Takes what the ends want to send into the pipes."""
        for pipe in self._pipes:
            if pipe.sender is not None:
                pipe.backlog.extend(bytes(data) for data in pipe.sender.data_to_send() if data)
            self._fill(pipe)

    def _fill(self, pipe: _Pipe) -> None:
        network = self._network
        if pipe.receiver is None:
            pipe.clear()
        while pipe.backlog and pipe.flight_bytes < network.capacity_bytes:
            data = pipe.backlog.popleft()
            most = min(len(data), network.capacity_bytes - pipe.flight_bytes)
            size = network.split(most)
            if size < len(data):
                pipe.backlog.appendleft(data[size:])
            pipe.flight_bytes += size
            if not self._silent:
                pipe.arrival = network.arrival(pipe.arrival)
                pipe.flight.append((pipe.arrival, data[:size]))
        full = bool(pipe.backlog)
        if full is not pipe.full:
            pipe.full = full
            _tell(pipe.sender, "blocked", full, network.now)

    def due(self) -> int | None:
        """Returns when the next bytes, or an end, arrive."""
        if not self.alive:
            return None
        pipes = [pipe for pipe in self._pipes if not pipe.frozen and (pipe.flight or pipe.finishing)]
        return min((pipe.flight[0][0] if pipe.flight else pipe.arrival for pipe in pipes), default=None)

    def deliver(self, now: int) -> None:
        """Lets one piece, or one end, arrive that is due."""
        for pipe in self._pipes:
            if pipe.frozen:
                continue
            if pipe.flight and pipe.flight[0][0] <= now:
                _, data = pipe.flight.popleft()
                pipe.flight_bytes -= len(data)
                if pipe.receiver is not None:
                    pipe.receiver.receive(data, now)
                return
            if pipe.finishing and not pipe.flight and pipe.arrival <= now:
                self.cut()
                return


class MemoryNetwork:
    """Connections, machines and calls in one virtual time; all that is random comes from `seed`.

    `now` begins at `start`; every piece takes `delay_min` to `delay_max` (all in nanoseconds) and overtakes none. A
    pipe has `capacity_bytes` in flight at most. More than `steps_max` steps in one second raise LivelockError.
    """

    def __init__(
        self,
        seed: int,
        *,
        start: int = 0,
        delay_min: int = MILLISECOND,
        delay_max: int = 20 * MILLISECOND,
        capacity_bytes: int = CAPACITY_BYTES,
        steps_max: int = STEPS_PER_SECOND_MAX,
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311  # faults are to be repeated, not secret
        self.now = start
        self.delay_min, self.delay_max = delay_min, delay_max
        self.capacity_bytes = capacity_bytes
        self._steps_max = steps_max
        self._steps, self._second = 0, start // SECOND
        self._connections: list[Connection] = []
        self._machines: list[Timed] = []
        self._calls: list[tuple[int, int, Callable[[], object]]] = []
        self._numbers = 0

    def connect(self, near: End, far: End) -> Connection:
        """Connects two ends; both may send at once."""
        connection = Connection(self, near, far)
        self._connections.append(connection)
        return connection

    def watch(self, machine: Timed) -> None:
        """Calls a machine when it is due, from now on."""
        self._machines.append(machine)

    def call_at(self, time: int, call: Callable[[], object]) -> None:
        """Calls `call` at a time in virtual nanoseconds: a fault, a user, a connection that is established."""
        self._numbers += 1
        heapq.heappush(self._calls, (time, self._numbers, call))

    @property
    def connections(self) -> list[Connection]:
        """The connections that are alive, oldest first."""
        return [connection for connection in self._connections if connection.alive]

    def next_event_time(self) -> int | None:
        """Returns when something happens next, at the earliest now, or None when nothing ever will."""
        for connection in list(self._connections):
            connection.collect()
        due = [connection.due() for connection in self._connections]
        due += [machine.next_timeout() for machine in self._machines]
        times = [time for time in due if time is not None] + [call[0] for call in self._calls[:1]]
        return max(min(times), self.now) if times else None

    def step(self) -> bool:
        """Moves time to the next event and lets it happen, bytes first; False when nothing is due ever.

        Raises LivelockError when too much happens in one virtual second.
        """
        time = self.next_event_time()
        if time is None:
            return False
        self.now = time
        self._count()
        for connection in self._connections:
            due = connection.due()
            if due is not None and due <= time:
                connection.deliver(time)
                return True
        if self._calls and self._calls[0][0] <= time:
            heapq.heappop(self._calls)[2]()
            return True
        for machine in list(self._machines):
            due = machine.next_timeout()
            if due is not None and due <= time:
                machine.handle_timeout(time)
        return True

    def advance(self, until: int) -> None:
        """Lets happen all that is due up to and at `until`, in virtual nanoseconds; LivelockError as in `step`."""
        while (time := self.next_event_time()) is not None and time <= until:
            self.step()
        self.now = max(self.now, until)

    def _count(self) -> None:
        second = self.now // SECOND
        if second != self._second:
            self._second, self._steps = second, 0
        self._steps += 1
        if self._steps > self._steps_max:
            raise LivelockError(
                f"More than {self._steps_max} steps in a virtual second: look for a timeout that stays due."
            )

    def arrival(self, before: int) -> int:
        """Returns when bytes sent now arrive, not before those that were sent earlier."""
        return max(before, self.now + self._random.randint(self.delay_min, self.delay_max))

    def split(self, size: int) -> int:
        """Returns how many of `size` bytes travel in one piece: often all, else any number."""
        return size if self._random.random() < 0.5 else self._random.randint(1, size)

    def forget_connection(self, connection: Connection) -> None:
        """Drops a connection that nobody can hear any more."""
        if connection in self._connections:
            self._connections.remove(connection)
