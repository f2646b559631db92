"""A pod's socket: node connections, frames, and one runner for each session (docs/protocol.md, section 5)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from sterna import limits
from sterna.clock import SYSTEM_CLOCK
from sterna.errors import Code, ProtocolError, SternaError
from sterna.ids import check_agent, check_tenant
from sterna.protocol import podside
from sterna.protocol.link import Link
from sterna.protocol.messages import Kind, Open
from sterna.protocol.podside import Input, PodMachine, PodSession
from sterna.transport.listen import Listener, peer_uid, unix_socket
from sterna.transport.pump import Conduit, Pump, Reactor
from sterna.transport.ticker import Ticker


class Runner(Protocol):
    """What stands behind one session: a program, or an agent written in Python."""

    def input(self, item: Input) -> None:
        """Takes input; `server.handled(item)` is to be called once it is really handled."""

    def resized(self) -> None:
        """The terminal has another size."""

    def audience(self) -> None:
        """The number of attached terminals changed."""

    def capture(self, token: int, scrollback: bool) -> None:
        """A snapshot is wanted."""

    def roomy(self) -> None:
        """Output finds room again."""

    def close(self) -> None:
        """The session is over for good."""


class Picture(Protocol):
    """A screen with its scroll-back, which takes long to draw; the steps are taken in this order."""

    def begin(self) -> bool:
        """It is this one's turn, on the loop; False if nobody wants it any more."""

    def copy(self) -> None:
        """Copies the screen, which is short work, beside the loop."""

    def copied(self) -> None:
        """The copy is there, on the loop."""

    def paint(self) -> None:
        """Draws the copy, beside the loop and all other work."""

    def painted(self) -> None:
        """The picture is there, on the loop."""


StartRunner = Callable[["PodServer", PodSession, Open], Runner]
"""Starts what a new session needs; raises SternaError when that cannot be done."""


class PodServer:
    """Serves the sessions of one agent on one Unix socket.

    `path` is the socket's; `start` makes a session's runner. Nodes must run as this user or as root.
    """

    def __init__(
        self,
        path: str,
        start: StartRunner,
        *,
        kind: Kind,
        features: list[str],
        label: str = "",
        sessions_max: int = limits.POD_SESSIONS_MAX,
    ) -> None:
        self.path = path
        self._start = start
        self.machine = PodMachine(os.urandom(16), kind, ["many", *features], label, sessions_max)
        self.reactor = Reactor(asyncio.get_running_loop())
        self.ticker = Ticker(self.reactor)
        self._pumps: set[Pump] = set()
        self._listener = Listener(self.reactor, unix_socket(path), self._accepted)
        self._worker: ThreadPoolExecutor | None = None
        self._painter: ThreadPoolExecutor | None = None
        self._pictures: deque[Picture] = deque()
        self._drawing = self._closed = False
        self._inode = os.stat(path).st_ino
        self.now = SYSTEM_CLOCK.monotonic

    def _accepted(self, sock: socket.socket, _peer: str) -> None:
        _pid, uid = peer_uid(sock)
        if uid not in (0, os.geteuid()) or len(self._pumps) >= limits.POD_CONNECTIONS_MAX:
            sock.close()
            return
        link = Link()
        pump = Pump(self.reactor, sock, link, self, peer=str(uid))
        self._pumps.add(pump)
        self.machine.connected(link)
        pump.start()

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Takes a node's bytes."""
        link, now = pump.link, self.now()
        try:
            for frame in link.receive(data):
                event = self.machine.receive(link, frame, now)
                if event is not None:
                    self._dispatch(event, now)
        except ProtocolError as error:
            link.fail(error.code, str(error))
        link.check()

    def _dispatch(self, event: podside.PodEvent, now: int) -> None:
        session = event.session
        if isinstance(event, podside.Opening):
            self._open(event, now)
            return
        runner: Runner | None = session.payload  # type: ignore[assignment]  # only this class sets it
        if runner is None:
            return
        if isinstance(event, Input):
            runner.input(event)
        elif isinstance(event, podside.Roomy):
            runner.roomy()
        elif isinstance(event, podside.Resized):
            runner.resized()
        elif isinstance(event, podside.AudienceChanged):
            runner.audience()
        elif isinstance(event, podside.CaptureAsked):
            runner.capture(event.request.token, event.request.scrollback)
        else:
            session.payload = None
            runner.close()

    def _open(self, opening: podside.Opening, now: int) -> None:
        session = opening.session
        try:
            session.payload = self._start(self, session, opening.request)
        except SternaError as error:
            self.machine.refused(opening, error.code, str(error))
        except OSError as error:
            self.machine.refused(opening, Code.NO_AGENT, f"The program could not be started: {error.strerror}.")
        else:
            self.machine.opened(opening, now)

    def handled(self, item: Input) -> None:
        """Reports input as handled; the acknowledgement goes lazily."""
        self.machine.handled(item, self.now())
        if item.lane.intake.timeout() is not None:
            self.ticker.watch(SessionTimer(self, item.session))

    def output(self, session: PodSession, data: bytes) -> None:
        """Writes output that fits the session's room and sends what can go."""
        session.out.write(data)
        now = self.now()
        session.flush(now)
        self.machine.acknowledge_due(session, now, True)

    def beside(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Has another thread do some short work, then calls `done` on the loop; neither after `close`."""
        if not self._closed:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "screen")
            self._submit(self._worker, work, done)

    def draw(self, picture: Picture) -> None:
        """Has a picture drawn after those that wait already, one at a time: only that one's copy takes memory."""
        self._pictures.append(picture)
        if not self._drawing:
            self._draw_next()

    def _draw_next(self) -> None:
        self._drawing = False
        while self._pictures and not self._drawing and not self._closed:
            picture = self._pictures.popleft()
            if picture.begin():
                self._drawing = True
                self.beside(picture.copy, functools.partial(self._copied, picture))

    def _copied(self, picture: Picture) -> None:
        picture.copied()
        if not self._closed:
            if self._painter is None:
                self._painter = ThreadPoolExecutor(1, "picture")
            self._submit(self._painter, picture.paint, functools.partial(self._painted, picture))

    def _painted(self, picture: Picture) -> None:
        try:
            picture.painted()
        finally:
            self._draw_next()

    def _submit(self, workers: ThreadPoolExecutor, work: Callable[[], None], done: Callable[[], None]) -> None:
        def finished(_future: Future[None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.reactor.loop.call_soon_threadsafe(self.reactor.run, done)

        workers.submit(work).add_done_callback(finished)

    def drained(self, pump: Conduit) -> None:
        """Sends what waited for this connection."""
        now = self.now()
        for session in self.machine.sessions.values():
            if session.link is pump.link and (session.out.unsent or session.exit is not None):
                session.flush(now)

    def ended(self, pump: Conduit, reason: str) -> None:
        """Forgets a node's connection; the sessions wait for the next one."""
        self._pumps.discard(pump)
        self.machine.disconnected(pump.link)

    def close(self) -> None:
        """Stops serving: ends every session's runner and removes the socket, if it is still ours."""
        self._listener.close()
        self.ticker.close()
        self._closed = True
        self._pictures.clear()
        for workers in (self._worker, self._painter):
            if workers is not None:
                workers.shutdown(wait=False, cancel_futures=True)
        for session in list(self.machine.sessions.values()):
            runner: Runner | None = session.payload  # type: ignore[assignment]  # only this class sets it
            session.payload = None
            if runner is not None:
                runner.close()
        for pump in list(self._pumps):
            pump.link.fail(Code.ENDED, "The agent was stopped.")
            pump.flush()
            pump.abort("the pod stops")
        try:
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass


class SessionTimer:
    """A session's lazy acknowledgements, as the ticker sees them; all timers of one session are equal."""

    __slots__ = ("server", "session")

    def __init__(self, server: PodServer, session: PodSession) -> None:
        self.server = server
        self.session = session

    def __hash__(self) -> int:
        return hash(self.session)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SessionTimer) and other.session is self.session

    def next_timeout(self) -> int | None:
        """Returns when an acknowledgement is due."""
        return self.session.next_timeout()

    def handle_timeout(self, now: int) -> None:
        """Sends what is due."""
        self.server.machine.acknowledge_due(self.session, now, False)


def socket_path(directory: str, tenant: str, agent: str) -> str:
    """Returns the path of a pod's socket, `{tenant}_{agent}`, in a directory."""
    return os.path.join(directory, f"{check_tenant(tenant)}_{check_agent(agent)}")
