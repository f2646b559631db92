"""`await sterna.connect(…)`: sessions for asyncio programs, on any loop (uvloop too)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING

from sterna.client.conversation import Attached, Conversation, Happening, Plan, make_plan, usual_state
from sterna.client.dialling import Dialling
from sterna.client.driver import STANDBY, STANDBY_SECONDS, Mover
from sterna.client.endpoint import Endpoint
from sterna.client.session import Wish, make_machine
from sterna.client.watchers import AddressWatch, SleepWatch
from sterna.errors import ConnectionLostError, SternaError
from sterna.protocol.client import ClientMachine, Dial, Event
from sterna.protocol.link import Link
from sterna.protocol.messages import Mode
from sterna.transport.pump import Conduit, Pump, Reactor
from sterna.transport.tls import TlsSocket
from sterna.units import MILLISECOND, SECOND

if TYPE_CHECKING:
    from sterna.transport.quic_client import QuicPump

_QUICK_SECONDS, _BUSY_SECONDS, _IDLE_SECONDS = 0.05, 0.1, 1.0
_LEAVE_SECONDS = 3.0


class _Outlet(Link):
    """Carries the machine's bytes to a pump."""

    __slots__ = ()

    def put(self, parts: list[bytes]) -> None:
        """Queues bytes as they are."""
        self._out.extend(parts)
        self.out_bytes += sum(map(len, parts))
        self.wake()


class _Surroundings:
    """What all sessions of one loop share: the reactor, and the watch on addresses and on the machine's sleep."""

    _of: dict[asyncio.AbstractEventLoop, _Surroundings] = {}  # noqa: RUF012  # one entry per loop that has sessions

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.reactor = Reactor(loop)
        self._drivers: set[_Driver] = set()
        self._sleep = SleepWatch()
        self._addresses = AddressWatch()
        if self._addresses.fileno() >= 0:
            loop.add_reader(self._addresses.fileno(), self._address_event)
        self._timer = loop.call_later(_IDLE_SECONDS, self._look)

    @classmethod
    def join(cls, driver: _Driver) -> _Surroundings:
        """Returns the running loop's, which it is told of a driver."""
        loop = asyncio.get_running_loop()
        found = cls._of.get(loop)
        if found is None:
            found = cls._of[loop] = cls(loop)
        found._drivers.add(driver)
        return found

    def leave(self, driver: _Driver) -> None:
        """Forgets a driver, and all after the last one."""
        self._drivers.discard(driver)
        if not self._drivers and self._of.get(self.loop) is self:
            del self._of[self.loop]
            self._timer.cancel()
            if self._addresses.fileno() >= 0:
                self.loop.remove_reader(self._addresses.fileno())
                self._addresses.close()

    def _suspect(self, reason: str) -> None:
        for driver in list(self._drivers):
            driver.suspect(reason)

    def _address_event(self) -> None:
        if self._addresses.changed():
            for driver in list(self._drivers):
                driver.network_changed()

    def _look(self) -> None:
        self._timer = self.loop.call_later(_IDLE_SECONDS, self._look)
        if self._sleep.slept(time.monotonic_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)):
            self._suspect("the machine slept")


class _Driver:
    """Runs one machine on the loop: dials, sends, receives, and keeps its time. `on_settled` follows every change."""

    def __init__(
        self,
        machine: ClientMachine,
        endpoint: Endpoint,
        on_event: Callable[[Event], None],
        on_settled: Callable[[], None],
    ) -> None:
        self.machine = machine
        self.endpoint = endpoint
        self._on_event = on_event
        self._on_settled = on_settled
        self._around = _Surroundings.join(self)
        self._loop = self._around.loop
        self._connecting: dict[int, socket.socket] = {}
        self._shaking: set[int] = set()
        self._pumps: dict[int, Pump] = {}
        self._quics: dict[int, QuicPump] = {}
        self._opened: set[int] = set()  # the QUIC connections that the machine knows as established
        self._dialling = Dialling(machine, endpoint)
        self._mover = Mover(machine, endpoint)
        self._standby_until = 0
        self._last_active: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0
        self._watch = self._loop.call_later(_IDLE_SECONDS, self._look)
        self.closed = False
        self.run(lambda: None)

    def run(self, what: Callable[[], object]) -> None:
        """Does something with the machine, and all that follows from it."""
        if not self.closed:
            self._around.reactor.run(self._run, what)

    def _run(self, what: Callable[[], object]) -> None:
        what()
        self._settle()

    def suspect(self, reason: str) -> None:
        """Passes on that the network may have failed."""
        self.run(lambda: self.machine.suspect(time.monotonic_ns(), reason))

    def close(self) -> None:
        """Ends everything at once."""
        if self.closed:
            return
        self.closed = True
        self._watch.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for number in [*self._connecting, *self._pumps, *self._quics]:
            self._drop(number)
        self._around.leave(self)

    # ---- the machine -------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        machine = self.machine
        while True:
            action = machine.next_action()
            if action is not None:
                if isinstance(action, Dial):
                    self._dial(action.connection)
                else:
                    self._drop(action.connection)
                continue
            for number, parts in machine.data_to_send():
                pump = self._pumps.get(number)
                if pump is not None and isinstance(pump.link, _Outlet):
                    pump.link.put(parts)
                elif number in self._quics:
                    self._quics[number].send(parts)
                    self._look_in(_QUICK_SECONDS)
            event = machine.next_event()
            if event is None:
                break
            if self._mover.passes(event):
                self._on_event(event)
        if machine.active != self._last_active:
            self._last_active = machine.active
            if machine.active is not None:
                source = self._source(machine.active)
                self._mover.opened(time.monotonic_ns(), quic=machine.active in self._quics, source=source)
        self._arm()
        self._on_settled()

    def _source(self, number: int) -> str:
        """Returns our own address of a connection, "" for one inside of this machine."""
        if number in self._quics:
            return self._quics[number].channel.source
        sock = self._pumps[number].socket
        return "" if sock.family == socket.AF_UNIX else str(sock.getsockname()[0])

    def _arm(self) -> None:
        """Sets the timer for the machine; one that is early stays, it will look again."""
        due = self.machine.next_timeout()
        if due is None or self.closed:
            return
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_later(max(due - time.monotonic_ns(), 0) / SECOND, self._timeout)

    def _timeout(self) -> None:
        self._timer = None
        now = time.monotonic_ns()
        due = self.machine.next_timeout()
        # The loop's clock may be a little behind: a timer that is almost due is due.
        if due is not None and due <= now + MILLISECOND:
            self.run(lambda: self.machine.handle_timeout(max(now, due)))
        else:
            self._arm()

    def _look_in(self, seconds: float) -> None:
        """Has `_look` called in so many seconds, or before."""
        due = self._loop.time() + seconds
        if self._watch.cancelled() or due < self._watch.when():
            self._watch.cancel()
            self._watch = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        """Looks for bytes that the network does not acknowledge."""
        self._watch.cancel()
        number = self.machine.active
        quic = self._quics.get(number) if number is not None else None
        now = time.monotonic_ns()
        self._look_for_quic(now, quic)
        owed = self.machine.input.end > self.machine.input.base
        quick = self._mover.migrating or self._mover.unsettled or (quic is not None and quic.channel.busy)
        self._look_in(_QUICK_SECONDS if quick else _BUSY_SECONDS if owed else _IDLE_SECONDS)
        if quic is not None:
            reason = self._mover.stuck(quic.channel, now)
            quic.arm()
            if reason:
                self.suspect(reason)
            return
        pump = self._pumps.get(number) if number is not None else None
        if pump is None or number is None or pump.socket.family == socket.AF_UNIX:
            return
        reason = self._mover.silent(number, pump.socket, now)
        if reason:
            self.suspect(reason)

    def _look_for_quic(self, now: int, active: QuicPump | None) -> None:
        """Begins a QUIC connection beside one over TCP, and gives it up if it takes too long."""
        held = self._mover.late(now)
        if held is not None:
            self._on_event(held)
            self._on_settled()
        standby = self._quics.get(STANDBY)
        if standby is not None:
            if now >= self._standby_until:
                self._mover.standby_failed(standby.channel, now)
                self._quic_close(STANDBY)
        elif self._mover.wants_standby(now, quic=active is not None):
            self._standby_until = now + STANDBY_SECONDS * SECOND
            if not self._dial_quic(STANDBY):
                self.endpoint.ways.remember(False, now)

    def network_changed(self) -> None:
        """Migrates what goes over QUIC; what goes over TCP is suspect."""
        number = self.machine.active
        quic = self._quics.get(number) if number is not None else None
        if quic is not None:
            if self._mover.migrate(quic.channel, time.monotonic_ns()):
                quic.rewatch()
            quic.arm()
            self._look_in(_QUICK_SECONDS)
        if quic is None or self._mover.troubled:
            self.endpoint.ways.renew()
            self.suspect("the network changed")

    # ---- QUIC --------------------------------------------------------------------------------------------------

    def _dial_quic(self, number: int) -> bool:
        ways = self.endpoint.ways
        make = ways.channel
        if make is None:
            return False
        family, address = ways.target()
        if isinstance(address, str):
            return False
        try:
            channel = make(family, address, ways.ca)
        except OSError:
            return False
        from sterna.transport.quic_client import QuicPump

        self._quics[number] = QuicPump(self._around.reactor, channel, number, self._tended)
        return True

    def _take_standby(self, number: int) -> bool:
        """Gives the connection that is established already to the machine."""
        quic = self._quics.get(STANDBY)
        if quic is None or not quic.channel.established or quic.channel.over:
            return False
        del self._quics[STANDBY]
        self._quics[number] = quic
        quic.number = number
        self._opened.add(number)
        self.machine.established(number, time.monotonic_ns())
        return True

    def _tended(self, quic: QuicPump, data: bytes) -> None:
        """Tells the machine what came over a QUIC connection, and what became of it."""
        number, channel, now = quic.number, quic.channel, time.monotonic_ns()
        if self.closed or self._quics.get(number) is not quic:
            return
        if data and number in self._opened:
            self.run(lambda: self.machine.receive(number, data, now))
            if self._quics.get(number) is not quic:
                return
        if channel.over or channel.ended:
            opened = number in self._opened
            self._quic_close(number)
            if number == STANDBY:
                self.endpoint.ways.remember(False, now)
            elif opened:
                reason = channel.over or "the node closed the connection"
                self.run(lambda: self.machine.lost(number, now, reason))
            else:
                self.run(lambda: self._dial_tcp(number))  # what stands behind it then is said of TCP
        elif channel.established and number not in self._opened:
            if number != STANDBY:
                self._opened.add(number)
                self.run(lambda: self.machine.established(number, now))
            elif self._mover.ready(now):
                self.run(lambda: self._mover.move(now))

    def _quic_close(self, number: int) -> None:
        self._opened.discard(number)
        self._quics.pop(number).close()

    # ---- sockets -----------------------------------------------------------------------------------------------

    def _dial(self, number: int) -> None:
        if self._take_standby(number):
            return
        if not (self.endpoint.ways.over_quic() and self._dial_quic(number)):
            self._dial_tcp(number)

    def _dial_tcp(self, number: int) -> None:
        sock = self._dialling.begin(number)
        if sock is not None:
            self._connecting[number] = sock
            self._loop.add_writer(sock.fileno(), self.run, lambda: self._connected(number))

    def _connected(self, number: int) -> None:
        sock = self._connecting.pop(number)
        self._loop.remove_writer(sock.fileno())
        if self._dialling.connected(number, sock):
            self._open(number, sock)
        else:
            sock.close()

    def _open(self, number: int, plain: socket.socket) -> None:
        context = self.endpoint.context
        sock = plain if context is None else TlsSocket(plain, context)
        if context is not None:
            self._shaking.add(number)
            self.machine.connected(number, time.monotonic_ns())
        pump = Pump(
            self._around.reactor, sock, _Outlet(), self, handshake=context is not None, on_open=self._established
        )
        pump.data = number
        self._pumps[number] = pump
        pump.start()
        if context is None:
            self._established(pump)

    def _established(self, pump: Pump) -> None:
        number = self._number(pump)
        self._shaking.discard(number)
        self.run(lambda: self.machine.established(number, time.monotonic_ns()))

    def _drop(self, number: int) -> None:
        quic = self._quics.get(number)
        if quic is not None:
            if number in self._opened:
                quic.send(self.machine.farewell(number))
            self._quic_close(number)
            return
        sock = self._connecting.pop(number, None)
        if sock is not None:
            self._loop.remove_writer(sock.fileno())
            sock.close()
        pump = self._pumps.pop(number, None)
        if pump is not None:
            last = self.machine.farewell(number)
            if last and number not in self._shaking and isinstance(pump.link, _Outlet):
                pump.link.put(last)
                pump.flush()
            self._shaking.discard(number)
            pump.abort("dropped")

    def _number(self, pump: Conduit) -> int:
        assert isinstance(pump.data, int)
        return pump.data

    # ---- the pumps' owner --------------------------------------------------------------------------------------

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Takes the node's bytes."""
        self.run(lambda: self.machine.receive(self._number(pump), data, time.monotonic_ns()))

    def drained(self, pump: Conduit) -> None:
        """Learns that a connection takes more; the window bounds what waits for it."""

    def ended(self, pump: Conduit, reason: str) -> None:
        """Reports a connection that is over, unless we ended it."""
        number = self._number(pump)
        if self._pumps.get(number) is not pump:
            return
        del self._pumps[number]
        if number not in self._shaking:
            self.run(lambda: self.machine.lost(number, time.monotonic_ns(), reason))
            return
        self._shaking.discard(number)
        text = f"The TLS handshake with {self.endpoint.name} failed: {reason}."
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            text = f"The node at {self.endpoint.name} is not the one known there: its certificate is another's."
        self.run(lambda: self.machine.dial_failed(number, time.monotonic_ns(), refused=True, reason=text))


class Session(Attached):
    """A session that this program is attached to, through any failure of the network; made by `connect`.

    Iterating over it, or `read`, gives the output; what was given counts as handled when the caller asks for more.
    `async with` leaves politely at its end: the session goes on without us. One task may read while others write.
    """

    def __init__(
        self, machine: ClientMachine, endpoint: Endpoint, on_event: Callable[[Happening], None] | None
    ) -> None:
        self._conversation = Conversation(machine, on_event)
        self._machine = machine
        self._loop = asyncio.get_running_loop()
        self._waiting: list[asyncio.Future[None]] = []
        self._writing = asyncio.Lock()
        self._driver = _Driver(machine, endpoint, self._conversation.event, self._settled)

    # ---- output ------------------------------------------------------------------------------------------------

    async def read(self, limit: int = -1) -> bytes:
        """Returns output as soon as there is some, at most `limit` bytes (-1: all there is); b"" after the end.

        Raises RefusedError when the node ended the attachment. Asking for more acknowledges what was returned before;
        a program that does not ask holds the agent back once a window (256 KiB) is full.
        """
        conversation = self._conversation
        self._driver.run(lambda: conversation.handled(time.monotonic_ns()))
        while True:
            data = conversation.take(limit)
            if data:
                return data
            if data is not None:
                self._driver.run(lambda: conversation.confirm(time.monotonic_ns()))
                return b""
            await self._change()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def events(self) -> AsyncIterator[Happening]:
        """Yields what happens beside the bytes: Gap, Uncertain, Trouble, Notice; ends with the attachment.

        The newest 1,000 are kept; with `on_event` given to `connect` there are none here.
        """
        happenings = self._conversation.happenings
        while True:
            while happenings:
                yield happenings.popleft()
            if self._conversation.over:
                return
            await self._change()

    # ---- input -------------------------------------------------------------------------------------------------

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends input; returns once all of it is in the window (256 KiB not yet handled by the program).

        What one call writes stays together. Raises RefusedError after the end, UsageError when only watching.
        """
        view = memoryview(data).cast("B")
        async with self._writing:
            while view:
                self._conversation.check_writable()
                # One byte more than fits makes the machine tell when there is room again.
                piece = bytes(view[: max(self._machine.input.room, 0) + 1])
                view = view[self._put(piece) :]
                if view:
                    await self._change()
            self._conversation.check_writable()

    def _put(self, piece: bytes) -> int:
        taken = 0

        def put() -> None:
            nonlocal taken
            taken = self._machine.write(piece, time.monotonic_ns())

        self._driver.run(put)
        return taken

    async def eof(self) -> None:
        """Ends the input: Ctrl-D on a terminal, the end of standard input elsewhere."""
        await self._mark(lambda: self._machine.eof(time.monotonic_ns()))

    async def signal(self, name: str) -> None:
        """Sends a signal by name (INT, TERM, …) to the foreground program, in order with the input."""
        await self._mark(lambda: self._machine.signal(name.upper().removeprefix("SIG"), time.monotonic_ns()))

    async def _mark(self, mark: Callable[[], bool]) -> None:
        async with self._writing:
            self._conversation.check_writable()
            while self._machine.input.room < 1:
                await self._change()
                self._conversation.check_writable()
            self._driver.run(mark)

    async def drain(self) -> None:
        """Waits until the program has taken all input that was written; raises RefusedError if that cannot be."""
        while self._machine.input.base < self._machine.input.end:
            self._conversation.check_writable()
            await self._change()

    def resize(self, cols: int, rows: int) -> None:
        """Tells the size of our terminal in cells."""
        self._driver.run(lambda: self._machine.resize(cols, rows))

    # ---- the end -----------------------------------------------------------------------------------------------

    async def wait_closed(self) -> int | None:
        """Waits until the session ended, or this attachment; returns the exit status as `exit_status` does.

        Output must be read meanwhile (by another task), or the program may wait for it. Raises what ended the
        attachment.
        """
        conversation = self._conversation
        while not conversation.over:
            await self._change()
        if conversation.error is not None:
            raise conversation.error
        return conversation.exit_status

    async def suspend(self) -> None:
        """Leaves: the session goes on, and a later `connect` finds it. What was read counts as handled."""
        conversation = self._conversation
        self._driver.run(lambda: conversation.handled(time.monotonic_ns()))
        await self._leave()

    async def _leave(self) -> None:
        conversation = self._conversation
        try:
            if conversation.close is not None:
                self._driver.run(lambda: conversation.confirm(time.monotonic_ns()))
            elif not conversation.over and conversation.accept is not None:
                self._driver.run(lambda: self._machine.suspend(time.monotonic_ns()))
                async with asyncio.timeout(_LEAVE_SECONDS):
                    while not conversation.over:
                        await self._change()
        except TimeoutError:
            pass
        finally:
            self.abort()

    async def close(self) -> int | None:
        """Ends the session for good, its program too; returns the exit status if any. Unread output is lost."""
        conversation, asked = self._conversation, -1
        while not conversation.over:
            conversation.check_writable()
            active = self._machine.active
            if active is not None and active != asked:
                asked = active
                self._driver.run(lambda: self._machine.close(time.monotonic_ns()))
            else:
                await self._change()
        if conversation.error is not None:
            self.abort()
            raise conversation.error
        while conversation.take():
            pass
        self._driver.run(lambda: conversation.handled(time.monotonic_ns()))
        await self._leave()
        return conversation.exit_status

    def abort(self) -> None:
        """Drops the connection without a word; the session goes on."""
        self._conversation.left = True
        self._driver.close()
        self._settled()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.suspend()
        elif issubclass(kind, asyncio.CancelledError | KeyboardInterrupt):
            self.abort()
        else:
            await self._leave()  # what was read last is not acknowledged: it was not dealt with

    # ---- waiting -----------------------------------------------------------------------------------------------

    def _settled(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _change(self) -> None:
        """Waits until something changed."""
        future = self._loop.create_future()
        self._waiting.append(future)
        await future

    async def _opened(self) -> None:
        conversation = self._conversation
        while conversation.accept is None and not conversation.over:
            await self._change()
        conversation.check_open()


async def connect(  # noqa: PLR0913  # everything that the command line can say, by name
    target: str | None = None,
    *,
    agent: str = "main",
    name: str | None = None,
    new: bool = False,
    mode: Mode = "drive",
    exact: bool = True,
    state: str | None = None,
    host: str | None = None,
    port: int | None = None,
    link: str | None = None,
    token: str | None = None,
    size: tuple[int, int] | None = None,
    term: str = "",
    argv: list[str] | None = None,
    cwd: str | None = None,
    output: int | None = None,
    displace: bool = False,
    quic_port: int | None = None,
    timeout: float | None = None,  # noqa: ASYNC109  # covers the search for the node too, and has a sentence of its own
    on_event: Callable[[Happening], None] | None = None,
) -> Session:
    """Attaches to a session and returns it once it is there.

    `target` is a share link, an agent's name or a session's; without it the latest session with `agent`, the one called
    `name` (made if absent), or a `new` one, which `argv` and `cwd` (of the node's machine) make too. The node is this
    machine's, that of the state directory `state` (else $STERNA_STATE), or at `host` and `port` with access `token`;
    `link` names all of it. `exact` gives every byte from position `output`, or the oldest kept; else what repaints the
    screen comes first. `size` is our terminal's (columns, rows), if there is one; `displace` ends all other
    attachments; `quic_port` is the node's UDP port, 0 for TCP only (else $STERNA_QUIC_PORT, else what the node says);
    `timeout` is in seconds. `on_event` gets every Gap, Uncertain, Trouble and Notice. Raises SternaError with what to
    do.
    """
    state = usual_state(state)
    try:
        async with asyncio.timeout(timeout):
            plan = await asyncio.to_thread(
                make_plan, target, agent=agent, name=name, new=new, state=state, host=host, port=port, link=link,
                token=token, argv=argv, cwd=cwd, quic_port=quic_port,
            )  # fmt: skip

            def machine(wish: Wish) -> ClientMachine:
                return make_machine(
                    plan.endpoint, wish, state=state, size=size or (0, 0), term=term, mode=mode, exact=exact,
                    displace=displace, output=output,
                )  # fmt: skip

            return await _first(plan, machine, on_event)
    except TimeoutError:
        raise ConnectionLostError(f"No session within {timeout:g} seconds: is the node reachable?") from None


async def _first(
    plan: Plan, make: Callable[[Wish], ClientMachine], on_event: Callable[[Happening], None] | None
) -> Session:
    """Returns the session for the first wish that the node grants."""
    for wish in plan.wishes:
        session = Session(await asyncio.to_thread(make, wish), plan.endpoint, on_event)
        try:
            await session._opened()
        except SternaError as error:
            session.abort()
            if plan.goes_on(wish, error):
                continue
            raise plan.refusal(error) from None
        except BaseException:
            session.abort()
            raise
        return session
    raise AssertionError("a plan has at least one wish")


__all__ = ["Happening", "Session", "connect"]
