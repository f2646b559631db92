"""The pods on this machine: found by inotify, connected, and given their sessions (docs/protocol.md, section 5)."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from asyncinotify import Inotify, Mask

from sterna import limits
from sterna.clock import SYSTEM_CLOCK
from sterna.errors import Code, SternaError
from sterna.ids import clean_label, split_socket_name
from sterna.node.logs import Brake
from sterna.node.table import SessionTable
from sterna.protocol import messages
from sterna.protocol.attachment import Lane
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.session import Session
from sterna.transport.listen import peer_uid
from sterna.transport.pump import Conduit, Pump, Reactor
from sterna.transport.ticker import Ticker
from sterna.units import SECOND

if TYPE_CHECKING:
    from collections.abc import Generator

log = logging.getLogger("sterna.node.pods")

Ready = Callable[[str], None]
"""Called once a session is open at its pod (""), or with the reason why it is not."""

_OPEN_BATCH = 32
_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
_GONE_SECONDS = 3.0
_DIED = "The agent's process is gone."
RESTARTED_TEXT = "The agent was restarted and does not have this session any more."
_STOPPED = "The agent was stopped (`sterna down`, or a signal)."
_REFUSED = (errno.EPERM, errno.ENOTSOCK, errno.EMLINK)
_LIST_SECONDS = 60.0
_LIST_PAUSE_SECONDS = 1.0
# Of the processor's time, listing takes a tenth at most, however many files somebody makes.
_LIST_PAUSE_TIMES = 9
_LIST_BATCH = 64
_NOTICES_BURST = 100
_NOTICES_PER_SECOND = 1
_NOTICE_EVERY_SECONDS = 60
_NOTICE_MAX_CHARS = 200
_DATA, _ACK, _EXIT = int(Type.DATA), int(Type.ACK), int(Type.EXIT)


class Notices:
    """What is logged about pods: of each kind and name one line a minute, in all one a second after a burst of 100.

    How many were left out, a later line says.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], int] = {}
        self._brake = Brake(_NOTICES_BURST, _NOTICES_PER_SECOND)

    def say(self, level: int, event: str, pod: str, **more: str) -> None:
        """Logs a line about a pod (its socket's name), or counts it as left out."""
        now = SYSTEM_CLOCK.monotonic()
        last = self._said.get((event, pod))
        if (last is not None and now - last < _NOTICE_EVERY_SECONDS * SECOND) or not self._brake.admits(now):
            self._brake.left_out += 1
            return
        self._said.pop((event, pod), None)
        self._said[event, pod] = now
        for key, then in list(islice(self._said.items(), 2)):
            # What was said first stands first: two go for each that comes, so that what is too old never piles up.
            if now - then >= _NOTICE_EVERY_SECONDS * SECOND:
                del self._said[key]
        self._log(level, event, pod=pod, **{key: clean_label(text, _NOTICE_MAX_CHARS) for key, text in more.items()})

    def sum_up(self) -> None:
        """Logs how many lines were left out, if any were."""
        if self._brake.left_out and self._brake.admits(SYSTEM_CLOCK.monotonic()):
            self._log(logging.WARNING, "lines about pods left out")

    def _log(self, level: int, event: str, **fields: object) -> None:
        log.log(level, event, extra=fields | self._brake.fields())


class Port:
    """One session's place on a pod's connection."""

    __slots__ = ("connection", "features", "handle", "link")

    def __init__(self, connection: PodConnection, handle: int) -> None:
        self.connection = connection
        self.link = connection.link
        self.handle = handle
        self.features = connection.features

    def lane_handle(self, session: Session, lane: Lane) -> int:
        """Returns a new handle whose frames are this lane's."""
        return self.connection.new_handle((session, lane))

    def release(self, session: Session) -> None:
        """Forgets the session's handles."""
        self.connection.forget(session)


Target = Session | tuple[Session, Lane] | int
"""Whose a handle is: a session, a lane, or (a number) a session that is not in memory."""


class PodConnection:
    """A connection to one pod: its greeting, and the handles of sessions and lanes on it."""

    def __init__(self, pod: Pod, reactor: Reactor, sock: socket.socket) -> None:
        self.pod = pod
        self.link = Link()
        self.pump = Pump(reactor, sock, self.link, self, peer=pod.name)
        self.hello: messages.Hello | None = None
        self.features: frozenset[str] = frozenset()
        self.stopped = False
        self._handles: dict[int, Target] = {}
        self._opening: dict[int, tuple[int, list[Ready]]] = {}
        self._asked: dict[int, int] = {}
        self._at: dict[int, int] = {}
        self._next = 1
        self._table = pod.registry.table

    def new_handle(self, target: Target) -> int:
        """Returns a handle never used on this connection."""
        handle = self._next
        self._next += 1
        self._handles[handle] = target
        return handle

    def park(self, session: Session) -> None:
        """Notes that a session leaves memory: its frames bring it back."""
        port = session.port
        if isinstance(port, Port) and port.connection is self:
            self._handles[port.handle] = session.id
            self._forget_lanes(session)

    def forget(self, session: Session) -> None:
        """Forgets the handles of a session that does not come back."""
        self._handles.pop(self._at.pop(session.id, 0), None)
        self._forget_lanes(session)

    def _forget_lanes(self, session: Session) -> None:
        for lane in session.lanes.values():
            self._handles.pop(lane.handle, None)

    def open(self, number: int, request: messages.Open, ready: Ready | None) -> None:
        """Sends OPEN for a session; `ready` hears how it went."""
        waiting = self._opening.get(self._asked.get(number, 0))
        if waiting is not None:
            if ready is not None:
                waiting[1].append(ready)
            return
        handle = self._asked[number] = self.new_handle(number)
        self._opening[handle] = (number, [ready] if ready is not None else [])
        self.link.send_message(Type.OPEN, handle, request)

    # ---- the pump's owner --------------------------------------------------------------------------------------

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Takes the pod's bytes."""
        now = SYSTEM_CLOCK.monotonic()
        link = self.link
        try:
            for frame in link.receive(data):
                self._frame(frame, now)
        except SternaError as error:
            # Whatever it sent that could not be dealt with is this pod's fault and nobody else's.
            self.pod.say("pod broke the protocol", logging.WARNING, reason=str(error))
            link.fail(error.code, str(error))
        link.check()

    def _frame(self, frame: Frame, now: int) -> None:
        kind, handle, _, payload = frame
        target = self._handles.get(handle)
        if type(target) is tuple:
            if kind == _ACK and len(payload) == 8:
                target[0].pod_ack(target[1], payload)
        elif kind == Type.HELLO and self.hello is None:
            self._greeted(messages.unpack(messages.Hello, payload))
        elif kind == Type.OPENED:
            self._opened(handle, messages.unpack(messages.Opened, payload), now)
        elif target is not None and kind in (_DATA, _EXIT, Type.SNAPSHOT):
            self._session_frame(handle, target, frame, now)
        elif kind == Type.ERROR and handle == 0:
            error = messages.unpack(messages.Error, payload)
            self.stopped = error.code == Code.ENDED
            self.pod.say("pod ended the connection", logging.WARNING, reason=error.message)

    def _session_frame(self, handle: int, target: Target, frame: Frame, now: int) -> None:
        kind, _, seq, payload = frame
        assert not isinstance(target, tuple)
        session = target
        if isinstance(session, int):
            loaded = self._table.load(session)
            if loaded is None:
                self.link.send_message(Type.CLOSE, handle, messages.Close(reason="unknown"))
                del self._handles[handle]
                return
            session = loaded
            session.port = Port(self, handle)
            self._handles[handle] = session
        if kind == _DATA:
            session.pod_data(seq, payload, now)
            self.pod.registry.ticker.watch(session)
        elif kind == _EXIT:
            session.pod_exit(messages.unpack(messages.Exit, payload), now)
        else:
            part = messages.unpack(messages.Snapshot, payload)
            session.pod_snapshot(part, now)
            if part.token == 0:
                self._table.collected(session)
        if session.events:
            self._table.settle(session)

    def _greeted(self, hello: messages.Hello) -> None:
        self.hello = hello
        self.features = frozenset(hello.features)
        self.pod.say("pod connected", kind=hello.kind)
        self.pod.ready(self)

    def _opened(self, handle: int, opened: messages.Opened, now: int) -> None:
        pending = self._opening.pop(handle, None)
        if pending is None:
            return
        number, waiting = pending
        self._asked.pop(number, None)
        reason = ""
        if opened.error is not None:
            self._handles.pop(handle, None)
            reason = opened.error.message
            if opened.error.code == Code.NOT_FOUND:
                self._table.agent_lost(number, RESTARTED_TEXT, now)
            else:
                self._table.refused(number, opened.error.message, now)
        else:
            # A session that is opened once more has a new handle; what the old one was is over.
            self._handles.pop(self._at.get(number, 0), None)
            self._at[number] = handle
            session = self._table.loaded(number)
            if session is None and waiting:
                session = self._table.load(number)
            if session is not None:
                self._handles[handle] = session
                try:
                    self._table.opened(session, Port(self, handle), opened, now)
                    self.pod.registry.ticker.watch(session)
                except SternaError:
                    for ready in waiting:
                        ready("The agent's answer made no sense.")
                    raise
        for ready in waiting:
            ready(reason)

    def drained(self, pump: Conduit) -> None:
        """Nothing waits for a pod: what goes to it is bounded by its clients' windows."""

    def ended(self, pump: Conduit, reason: str) -> None:
        """Takes the sessions off; the pod is looked for again."""
        for target in list(self._handles.values()):
            if isinstance(target, Session) and isinstance(target.port, Port) and target.port.connection is self:
                target.pod_gone()
        self._handles.clear()
        self._at.clear()
        waiting = [ready for _, readies in self._opening.values() for ready in readies]
        self._opening.clear()
        self.pod.lost(self, reason)
        if self.stopped:
            # A pod that says goodbye takes its programs with it: nobody has to wait until its socket is missed.
            self._table.agent_gone(self.pod.tenant, self.pod.agent, _STOPPED, SYSTEM_CLOCK.monotonic())
        for ready in waiting:
            ready("The agent's connection was lost.")


class Pod:
    """One pod socket: `{tenant}_{agent}`; connected as long as it is there."""

    def __init__(self, registry: PodRegistry, tenant: str, agent: str, path: str) -> None:
        self.registry = registry
        self.tenant, self.agent, self.path = tenant, agent, path
        self.name = f"{tenant}_{agent}"
        self.connection: PodConnection | None = None
        self._tries = 0
        self._timer: asyncio.TimerHandle | None = None
        self._absent_since = 0.0
        self._since = 0.0
        self._waiting: list[Callable[[PodConnection | None], None]] = []
        self.gone = False
        self.kind: messages.Kind = "pty"

    @property
    def is_ready(self) -> bool:
        """Whether sessions can be opened now."""
        return self.connection is not None and self.connection.hello is not None

    def say(self, event: str, level: int = logging.INFO, **more: str) -> None:
        """Logs something about this pod, unless too much is logged about pods."""
        self.registry.notices.say(level, event, self.name, **more)

    def connect(self) -> None:
        """Connects, or tries again a little later; a socket that nobody serves for a while means that the agent is
        gone.
        """
        if self._timer is not None:
            self._timer.cancel()  # it was not the timer that called: one is enough
            self._timer = None
        if self.gone or self.connection is not None:
            return
        try:
            sock = self.dial()
        except OSError as error:
            self._absent(error)
        else:
            self.take(sock)

    def take(self, sock: socket.socket) -> None:
        """Begins with a connection that `dial` returned."""
        loop = self.registry.reactor.loop
        self._since, self._absent_since = loop.time(), 0.0
        connection = self.connection = PodConnection(self, self.registry.reactor, sock)
        connection.pump.start()
        loop.call_later(limits.HANDSHAKE_SECONDS, self._expect_hello, connection)

    def _expect_hello(self, connection: PodConnection) -> None:
        """Gives up a connection on which nobody has greeted in time; those who wait for the pod learn it."""
        if connection is self.connection and connection.hello is None:
            connection.pump.abort("it does not greet")
            self.registry.reactor.run(self._tell, None)

    def look(self) -> os.stat_result:
        """Returns what the socket's name stands for, after checking who owns it; raises OSError."""
        found = os.lstat(self.path)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.ENOTSOCK, "it is not a socket")
        if not self.registry.trusts(found.st_uid, self.tenant):
            raise OSError(errno.EPERM, "another user owns it")
        return found

    def dial(self) -> socket.socket:
        """Returns a connection to the socket, after checking who owns and who serves it; raises OSError."""
        self.look()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            sock.connect(self.path)
            _pid, uid = peer_uid(sock)
            if not self.registry.trusts(uid, self.tenant):
                raise OSError(errno.EPERM, "another user serves it")
        except OSError:
            sock.close()
            raise
        return sock

    def _absent(self, error: OSError) -> None:
        loop = self.registry.reactor.loop
        if error.errno in _REFUSED:
            self.say("pod socket refused", logging.WARNING, reason=str(error.strerror))
            self.forget(str(error.strerror))
            return
        if not self._absent_since:
            self._absent_since = loop.time()
        if error.errno in (errno.ECONNREFUSED, errno.ENOENT) and loop.time() - self._absent_since >= _GONE_SECONDS:
            # A pod that stops removes its socket, one that dies leaves it behind.
            self.forget("nobody serves its socket", _STOPPED if error.errno == errno.ENOENT else _DIED)
            return
        delay = _RETRY_SECONDS[min(self._tries, len(_RETRY_SECONDS) - 1)]
        self._tries += 1
        self._timer = loop.call_later(delay, self.connect)

    def forget(self, reason: str, ending: str = _DIED) -> None:
        """Gives the pod up: its sessions end as lost, with the sentence `ending`."""
        self.gone = True
        if self._timer is not None:
            self._timer.cancel()
        self.say("pod gone", reason=reason)
        self.registry.forget(self, ending)
        self._tell(None)

    def ready(self, connection: PodConnection) -> None:
        """Opens the pod's known sessions, those that somebody waits for first."""
        assert connection.hello is not None
        self.kind = connection.hello.kind
        self._tell(connection)
        self.registry.reopen(connection)

    def _tell(self, connection: PodConnection | None) -> None:
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback(connection)

    def reopen(self, connection: PodConnection, after: int) -> int:
        """Opens a batch of the sessions that this pod should have, numbered above `after`; returns the last one's
        number, 0 when there are no more.
        """
        if connection is not self.connection or connection.pump.closed:
            return 0
        table = self.registry.table
        batch = table.living(self.tenant, self.agent, after, _OPEN_BATCH)
        for number in batch:
            session = table.loaded(number)
            if session is None or session.port is None:
                request = table.open_request(number)
                if request is not None:
                    connection.open(number, request, None)
        return batch[-1] if len(batch) == _OPEN_BATCH else 0

    def lost(self, connection: PodConnection, reason: str) -> None:
        """Looks at once whether the pod is still there."""
        if self.connection is connection:
            self.connection = None
            self.say("pod disconnected", reason=reason)
            if not self.gone and not self.registry.closing:
                loop = self.registry.reactor.loop
                # One that ends every connection at once is asked ever more rarely.
                if loop.time() - self._since >= _RETRY_SECONDS[-1]:
                    self._tries = 0
                delay = _RETRY_SECONDS[min(self._tries, len(_RETRY_SECONDS)) - 1] if self._tries else 0.0
                self._tries += 1
                self._timer = loop.call_later(delay, self.connect)

    def when_ready(self, callback: Callable[[PodConnection | None], None]) -> None:
        """Calls back with the connection once the pod has greeted, or with None when it is given up."""
        if self.is_ready:
            callback(self.connection)
        elif self.gone:
            callback(None)
        else:
            self._waiting.append(callback)

    def close(self) -> None:
        """Disconnects; the pod goes on."""
        self.gone = True
        if self._timer is not None:
            self._timer.cancel()
        if self.connection is not None:
            self.connection.pump.flush()
            self.connection.pump.abort("the node stops")


class PodRegistry:
    """All pods in one directory of sockets, kept up to date by inotify(7); what it misses is found within a minute.

    `tenants` maps user ids to the tenants whose sockets they may own; None: this process's user may own any. Of the
    PODS_MAX pods a tenant has PODS_PER_TENANT_MAX at most, so that its users cannot keep others' out.
    """

    def __init__(
        self,
        directory: str,
        table: SessionTable,
        reactor: Reactor,
        ticker: Ticker,
        tenants: Mapping[int, frozenset[str]] | None = None,
    ) -> None:
        self.directory = directory
        self.table = table
        self.reactor = reactor
        self.ticker = ticker
        self.closing = False
        self._tenants = tenants
        self.notices = Notices()
        self._pods: dict[tuple[str, str], Pod] = {}
        self._counts: Counter[str] = Counter()
        self._crowded = False
        self._listing: Generator[str, None, None] | None = None
        self._listed_ns = 0
        self._list_again = False
        self._list_timer: asyncio.TimerHandle | None = None
        self._rested = 0.0
        self._inotify: Inotify | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = 0.0
        self._arrivals: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self._reopening: deque[tuple[PodConnection, int]] = deque()
        table.is_agent = lambda tenant, name: (tenant, name) in self._pods

    def trusts(self, uid: int, tenant: str) -> bool:
        """Tells whether a user may serve agents of a tenant."""
        if self._tenants is None:
            return uid in (os.geteuid(), 0)
        return tenant in self._tenants.get(uid, frozenset()) or uid == 0

    def start(self) -> None:
        """Begins to watch, then looks once at what is there."""
        self._started = self.reactor.loop.time()
        self._inotify = Inotify()
        self._inotify.add_watch(self.directory, Mask.CREATE | Mask.MOVED_TO | Mask.ATTRIB)
        self._task = self.reactor.loop.create_task(self._watch(self._inotify))
        for name in sorted(os.listdir(self.directory)):
            self._look_at(name)
        self._list_in(_LIST_SECONDS)

    async def _watch(self, inotify: Inotify) -> None:
        async for event in inotify:
            if event.mask & Mask.Q_OVERFLOW:
                self._list_in(0.0)
            elif event.name is not None:
                self._look_at(str(event.name))

    def _list_in(self, seconds: float) -> None:
        """Sees to it that the directory is listed within so many seconds, but not again right after the last time."""
        if self._listing is not None:
            self._list_again = True  # it may be past the name that this is about
            return
        due = max(self.reactor.loop.time() + seconds, self._rested)
        if self._list_timer is None or due < self._list_timer.when():
            if self._list_timer is not None:
                self._list_timer.cancel()
            self._list_timer = self.reactor.loop.call_at(due, self._list)

    def _list(self) -> None:
        self._list_timer = None
        self._listing = self._names()
        self._listed_ns = 0
        self._list_some()

    def _names(self) -> Generator[str, None, None]:
        try:
            with os.scandir(self.directory) as entries:
                for entry in entries:
                    yield entry.name
        except OSError as error:
            self.notices.say(logging.ERROR, "sockets' directory cannot be read", self.directory, reason=str(error))

    def _list_some(self) -> None:
        """Looks at a batch of names; the rest in later turns of the loop, then the next time is set."""
        listing = self._listing
        if listing is None or self.closing:
            return
        began, count = SYSTEM_CLOCK.monotonic(), 0
        for name in islice(listing, _LIST_BATCH):
            count += 1
            self._look_at(name, listed=True)
        self._listed_ns += SYSTEM_CLOCK.monotonic() - began
        loop = self.reactor.loop
        if count == _LIST_BATCH:
            loop.call_soon(self._list_some)
            return
        self._listing = None
        self._rested = loop.time() + max(_LIST_PAUSE_SECONDS, self._listed_ns / SECOND * _LIST_PAUSE_TIMES)
        again, self._list_again = self._list_again, False
        self.notices.sum_up()
        self._list_in(0.0 if again else _LIST_SECONDS)

    def _look_at(self, name: str, *, listed: bool = False) -> None:
        """Does `_appeared`; what fails for one pod, as the disk may, keeps no other out."""
        try:
            self.reactor.run(self._appeared, name, listed)
        except SternaError as error:
            self.notices.say(logging.ERROR, "pod not taken up", name, reason=str(error))

    def _appeared(self, name: str, listed: bool = False) -> None:
        """Takes up a socket with a pod's name; a replaced one is another process's, found out on the next connect.

        A socket that was `listed` may have been left behind long ago: it counts as a pod's only if somebody serves it.
        """
        key = split_socket_name(name)
        if key is None:
            return
        pod = self._pods.get(key)
        if pod is not None:
            if pod.connection is None and not listed:
                pod.connect()
            return
        if len(self._pods) >= limits.PODS_MAX or self._counts[key[0]] >= limits.PODS_PER_TENANT_MAX:
            self._crowded = True
            self.notices.say(logging.WARNING, "pod left out", name, reason="there are too many")
            return
        pod = Pod(self, *key, os.path.join(self.directory, name))
        try:
            # Only here: whoever can link another's socket shall not end an agent that is connected.
            if pod.look().st_nlink > 1:
                raise OSError(errno.EMLINK, "it has more names than this one")
            sock = pod.dial() if listed else None
        except OSError as error:
            if error.errno in _REFUSED:
                pod.say("pod socket refused", logging.WARNING, reason=str(error.strerror))
            return
        self._pods[key] = pod
        self._counts[pod.tenant] += 1
        if sock is not None:
            pod.take(sock)
        else:
            pod.connect()
        for callback in self._arrivals.pop(key, []):
            self.reactor.loop.call_soon(callback)

    def pod(self, tenant: str, agent: str) -> Pod | None:
        """Returns a pod that is there, or was a moment ago."""
        return self._pods.get((tenant, agent))

    def pods(self, tenant: str | None = None) -> list[Pod]:
        """Returns all pods (of one tenant), by name."""
        return [self._pods[key] for key in sorted(key for key in self._pods if tenant in (None, key[0]))]

    def forget(self, pod: Pod, ending: str) -> None:
        """Drops a pod that is gone, and ends its sessions with the sentence `ending`."""
        if self._pods.get((pod.tenant, pod.agent)) is pod:
            del self._pods[(pod.tenant, pod.agent)]
            self._counts[pod.tenant] -= 1
            if not self._counts[pod.tenant]:
                del self._counts[pod.tenant]
            if self._crowded:
                self._crowded = False
                self._list_in(0.0)
        self.table.agent_gone(pod.tenant, pod.agent, ending, SYSTEM_CLOCK.monotonic())

    def reopen(self, connection: PodConnection) -> None:
        """Begins to open a pod's known sessions: one batch of one pod in each turn of the loop, however many there
        are.
        """
        self._reopening.append((connection, 0))
        if len(self._reopening) == 1:
            self.reactor.loop.call_soon(self._reopen_some)

    def _reopen_some(self) -> None:
        if self.closing:
            return
        connection, after = self._reopening[0]
        try:
            self.reactor.run(self._reopen_batch, connection, after)
        finally:
            self._reopening.popleft()
            if self._reopening:
                self.reactor.loop.call_soon(self._reopen_some)

    def _reopen_batch(self, connection: PodConnection, after: int) -> None:
        last = connection.pod.reopen(connection, after)
        if last:
            self._reopening.append((connection, last))

    def ensure(self, session: Session, ready: Ready, *, fresh: messages.Open | None = None) -> None:
        """Sees to it that a session is open at its pod, then calls `ready`; after a short grace it says why not."""
        if session.ended is not None or (session.port is not None and session.lanes_known):
            ready("")
            return
        pod = self.pod(session.tenant, session.agent)
        if pod is None:
            self._await_arrival(session, ready, fresh)
            return

        def connected(connection: PodConnection | None) -> None:
            if connection is None:
                ready("Its agent is gone.")
                return
            request = fresh or self.table.open_request(session.id)
            if request is None:
                ready("It has ended.")
            else:
                connection.open(session.id, request, ready)

        pod.when_ready(connected)

    def _await_arrival(self, session: Session, ready: Ready, fresh: messages.Open | None) -> None:
        """Right after the node's start the pods may still be on their way; later a missing one is gone."""
        loop = self.reactor.loop
        key = (session.tenant, session.agent)
        left = self._started + _GONE_SECONDS - loop.time()
        if fresh is not None or left <= 0:
            if fresh is None:
                self.table.agent_gone(*key, _STOPPED, SYSTEM_CLOCK.monotonic())
            ready("There is no such agent here.")
            return
        done = False

        def arrived() -> None:
            nonlocal done
            if not done:
                done = True
                self.reactor.run(lambda: self.ensure(session, ready))

        self._arrivals.setdefault(key, []).append(arrived)
        loop.call_later(left + 0.01, arrived)

    async def close(self) -> None:
        """Stops watching and disconnects from all pods."""
        self.closing = True
        if self._list_timer is not None:
            self._list_timer.cancel()
        if self._listing is not None:
            self._listing.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._inotify is not None:
            self._inotify.close()
        for pod in list(self._pods.values()):
            pod.close()
