"""The node's sessions: in memory while somebody uses them, else only in the store and the journal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, Protocol

import msgspec

from sterna import limits
from sterna.clock import SYSTEM_CLOCK
from sterna.errors import Code, ProtocolError, RefusedError, StorageError
from sterna.ids import AttachmentId, SessionUid, uid_of
from sterna.journal.interface import OutputLog
from sterna.journal.journal import Journal
from sterna.journal.memory import MemoryLog, MemoryShares
from sterna.node.finals import Finals
from sterna.node.store import SessionRow, Store
from sterna.protocol import messages
from sterna.protocol.attachment import Ended, Lane, PodPort
from sterna.protocol.messages import LaneState
from sterna.protocol.session import Session
from sterna.protocol.states import Cause, State
from sterna.units import SECOND

if TYPE_CHECKING:
    from sterna.protocol.attachment import OutputLog as CoreLog

log = logging.getLogger("sterna.node.sessions")

AGENT_NAME_TEXT = "There is an agent {0!r}, and only its own sessions may be called so: choose another name."

P = ParamSpec("P")
_READ_BYTES = 65_536
_LIVING = (State.CONNECTING, State.ACTIVE, State.SUSPENDED)
_LOST_BATCH = 32
# What the store keeps of an agent's long name before "-" and a number.
_STEM_CHARS = 57
_HELD_BYTES = 16 * limits.WINDOW_BYTES


class Parker(Protocol):
    """Learns that a session leaves memory."""

    def park(self, session: Session) -> None:
        """Keeps what is needed to bring it back."""


class SessionTable:
    """Finds, loads, stores and ends sessions.

    `overwrite` False holds agents whose output nobody reads once the ring is full of it. `retention` is in seconds, 0
    = for ever.
    """

    def __init__(
        self,
        store: Store,
        journal: Journal,
        *,
        boot: str,
        overwrite: bool = True,
        retention: int = limits.RETENTION_SECONDS,
        ring_bytes: int = limits.RING_BYTES,
        spill_bytes: int = limits.SPILL_BYTES,
    ) -> None:
        self.store = store
        self.journal = journal
        self.boot = boot
        self._overwrite = overwrite
        self._retention = retention
        self._ring = ring_bytes
        self._spill = spill_bytes
        self._hot: dict[int, Session] = {}
        self._by_uid: dict[bytes, int] = {}
        self._used: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._stored: dict[int, State] = {}
        self._memory = MemoryShares()
        self._finals = Finals()
        self.storage_failures = 0
        self.on_lost: Callable[[Callable[[], None]], None] = lambda work: work()
        self.is_agent: Callable[[str, str], bool] = lambda _tenant, _name: False

    # ---- finding -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._hot)

    def hot(self) -> Iterable[Session]:
        """Returns the sessions in memory."""
        return self._hot.values()

    def loaded(self, number: int) -> Session | None:
        """Returns a session if it is in memory."""
        return self._hot.get(number)

    def load(self, number: int) -> Session | None:
        """Returns a session, from disk if need be; None if there is none or it was closed.

        A new one gets another name here if the node chose one that is an agent's; raises RefusedError (`EXISTS`) if
        such a name was asked for.
        """
        return self._load(number, named=True)

    def _load(self, number: int, *, named: bool = False) -> Session | None:
        session = self._hot.get(number)
        if session is not None:
            self._used[number] = SYSTEM_CLOCK.monotonic()
            if session.ended is not None and not session.final:
                session.final = self.store.final(number)
                self._finals.note(session)
            return session
        row = self.store.session(number)
        if row is None or row.state == State.CLOSED:
            return None
        if named and row.state == State.CONNECTING and number not in self.journal:
            row = self._named(row)
        return self._add(row)

    def by_uid(self, uid: bytes) -> Session | None:
        """Returns the session with this uid, from disk if need be."""
        number = self._by_uid.get(uid)
        if number is None:
            row = self.store.session_by_uid(SessionUid(uid))
            number = row.number if row is not None else None
        return self.load(number) if number is not None else None

    def reserved(self, tenant: str, agent: str, name: str) -> bool:
        """Tells whether a session of an agent may not have a name, because it is another agent's or looks like a uid.

        Whoever names an agent or a uid must never reach a program of somebody else.
        """
        return uid_of(name) is not None or (name != agent and self.is_agent(tenant, name))

    def _named(self, row: SessionRow) -> SessionRow:
        """Returns a new session's row; of the names that the node chooses (`agent`, `agent-N`) with a free one.

        As in the store, N doubles until one is free, then nears the last taken.
        """
        tenant, agent, name = row.tenant, row.agent, row.name
        if not self.reserved(tenant, agent, name):
            return row
        stem, _, number = (agent, "-", "1") if name == agent else name.rpartition("-")
        if stem not in (agent, agent[:_STEM_CHARS]) or not number.isdigit():
            raise RefusedError(Code.EXISTS, AGENT_NAME_TEXT.format(name))

        def is_taken(suffix: int) -> bool:
            other = f"{stem}-{suffix}"
            return self.reserved(tenant, agent, other) or self.store.session_by_name(tenant, other) is not None

        taken, free = int(number), int(number) + 1
        while is_taken(free):
            taken, free = free, free * 2
        while free - taken > 1:
            middle = (taken + free) // 2
            taken, free = (middle, free) if is_taken(middle) else (taken, middle)
        name = f"{stem}-{free}"
        self.store.rename(row.number, name)
        return msgspec.structs.replace(row, name=name)

    def _add(self, row: SessionRow) -> Session:
        holding = row.state in _LIVING and self.store.last_driver_exact(row.number)
        output = self._open_log(row, holding)
        session = Session(
            SessionUid(row.uid), output, log_id=row.log_id, kind=row.kind, tenant=row.tenant, agent=row.agent,
            name=row.name, number=row.number,
        )  # fmt: skip
        session.epoch = row.epoch
        session.overwrite = self._overwrite
        session.holding = holding
        session.spare = partial(self._spare, row.tenant)
        session.state = State.SUSPENDED if row.state == State.ACTIVE else State(row.state)
        if session.state is State.EXITED:
            session.ended = Ended(Code(row.end_code or Code.ENDED), row.end_reason or "", row.status, row.signal)
            session.final = self.store.final(row.number)
            for state in _lane_states(self.store.lanes(row.number)):
                lane_id = AttachmentId(state.attachment)
                session.lanes[lane_id] = Lane(lane_id, state.next)
            self._finals.note(session)
        self._hot[row.number] = session
        self._by_uid[row.uid] = row.number
        self._used[row.number] = SYSTEM_CLOCK.monotonic()
        return session

    def _open_log(self, row: SessionRow, holding: bool) -> OutputLog:
        """Returns a session's log; what the disk lost is named in the log of the program, and in `lost` to who needs
        it.
        """
        if row.number in self.journal:
            # How far an exact reader was is not known any more, and the agent sends one window with each new
            # connection.
            ring = self._ring + _HELD_BYTES if holding else self._ring
            output = self.journal.open(row.number, ring_bytes=ring, spill_bytes=self._spill)
            if output.damaged:
                log.error("journal damaged", extra={"session": row.name, "lost": output.damaged})
            return output
        return self.journal.create(row.number, ring_bytes=self._ring, spill_bytes=self._spill, owner=row.tenant)

    def _in_memory(self, number: int, tenant: str, start: int) -> MemoryLog:
        return MemoryLog(number, start=start, shares=self._memory, owner=tenant)

    def _spare(self, tenant: str, broken: CoreLog) -> CoreLog:
        """Returns a log in memory that goes on where one on disk failed."""
        self.storage_failures += 1
        log.error("journal failed; the session goes on in memory")
        number = getattr(broken, "number", 0)
        spare = self._in_memory(number, tenant, broken.tail)
        position = broken.tail
        try:
            while position < broken.end:
                data = broken.read(position, _READ_BYTES)
                spare.append(data)
                position += len(data)
        except StorageError:
            spare.release()
            spare = self._in_memory(number, tenant, broken.end)
        return spare

    # ---- making and ending -------------------------------------------------------------------------------------

    def create(self, row: SessionRow) -> Session:
        """Returns the session for a new row."""
        return self._add(row)

    def opened(self, session: Session, port: PodPort, opened: messages.Opened, now: int) -> None:
        """Takes a session up at its pod; where the journal lacks what the pod no longer has, a new log begins."""
        before = session.state
        try:
            session.pod_opened(port, opened, now)
        except ProtocolError:
            log.error("output lost between journal and agent", extra={"session": session.name})
            self._new_log(session, opened.base)
            session.pod_opened(port, opened, now)
        if session.state is not before:
            self._keep(self.store.set_state, session.id, session.state, SYSTEM_CLOCK.wall())

    def _new_log(self, session: Session, start: int) -> None:
        session.log_id = self.store.next_log_id()
        self._keep(self.store.set_log, session.id, session.log_id)
        getattr(session.log, "release", lambda: None)()
        self.journal.remove(session.id)
        try:
            session.log = self.journal.create(
                session.id, ring_bytes=self._ring, spill_bytes=self._spill, start=start, owner=session.tenant
            )  # fmt: skip
        except StorageError:
            session.log = self._in_memory(session.id, session.tenant, start)

    def discard(self, number: int) -> None:
        """Forgets a session that was begun but could not be stored."""
        session = self._hot.get(number)
        if session is not None:
            getattr(session.log, "release", lambda: None)()
            self._drop(session)
        if number in self.journal:
            self.journal.remove(number)

    def _keep(self, write: Callable[P, object], *args: P.args, **more: P.kwargs) -> bool:
        """Stores something about a session that goes on even if the disk is full; returns whether it is stored.

        What is missing then is found out anew after the node's next start: from the pod, or from the journal.
        """
        try:
            write(*args, **more)
        except StorageError as error:
            self.storage_failures += 1
            log.error("session not stored", extra={"reason": str(error)})
            return False
        return True

    def refused(self, number: int, reason: str, now: int) -> None:
        """Forgets a session whose program could not be started."""
        session = self._hot.get(number)
        if session is not None and session.state is State.CONNECTING:
            session.port = None
            session.state = State.CLOSED
            self._closed(session)

    def agent_lost(self, number: int, reason: str, now: int) -> None:
        """Ends one session whose agent is gone."""
        session = self._load(number)
        if session is not None and session.ended is None:
            session.port = None
            session.agent_lost(now, reason)
            self.settle(session)

    def agent_gone(self, tenant: str, agent: str, reason: str, now: int) -> None:
        """Ends all living sessions of an agent; many of them in several turns of the loop."""
        batch = self.living(tenant, agent, 0, _LOST_BATCH)
        for number in batch:
            self.agent_lost(number, reason, now)
        if len(batch) == _LOST_BATCH:
            self.on_lost(lambda: self.agent_gone(tenant, agent, reason, now))

    def settle(self, session: Session) -> None:
        """Stores what happened to a session."""
        events, session.events = session.events, []
        for event in events:
            if event == "exited":
                self._exited(session)
            elif event == "closed":
                self._closed(session)

    def _exited(self, session: Session) -> None:
        ended = session.ended
        assert ended is not None
        lanes = messages.pack(session.lane_states())
        wall = SYSTEM_CLOCK.wall()
        stored = self._keep(
            self.store.set_end, session.id, int(ended.code), ended.reason, ended.status, ended.signal, lanes, wall
        )
        if session.final:
            self._keep(self.store.set_final, session.id, session.final)
        self._finals.note(session)
        log.info("session ended", extra={"session": session.name, "status": ended.status, "signal": ended.signal})
        if stored:
            session.release()  # else the pod is to say it again after the next start

    def _closed(self, session: Session) -> None:
        self._keep(self.store.close_session, session.id, SYSTEM_CLOCK.wall())
        getattr(session.log, "release", lambda: None)()
        self.journal.remove(session.id)
        self._drop(session)
        log.info("session closed", extra={"session": session.name})

    def _drop(self, session: Session) -> None:
        self._hot.pop(session.id, None)
        self._by_uid.pop(session.uid, None)
        self._used.pop(session.id, None)
        self._ends.pop(session.id, None)
        self._stored.pop(session.id, None)
        self._finals.forget(session)

    def collected(self, session: Session) -> None:
        """Notes that a pod sent a part of a last screen."""
        self._finals.note(session)

    def store_state(self, session: Session) -> None:
        """Stores whether somebody is attached, when that changed."""
        number, state = session.id, session.state
        if session.ended is not None or self._stored.get(number) is state:
            return
        if self._keep(self.store.set_state, number, state, SYSTEM_CLOCK.wall()):
            self._stored[number] = state

    # ---- what pods need ----------------------------------------------------------------------------------------

    def living(self, tenant: str, agent: str, after: int, limit: int) -> list[int]:
        """Returns numbers of an agent's sessions that have not ended, in order, above `after`."""
        return [row.number for row in self.store.living((tenant, agent), after, limit)]

    def open_request(self, number: int) -> messages.Open | None:
        """Returns the OPEN that takes up an existing session at its pod; None if it has ended."""
        session = self._hot.get(number)
        if session is not None:
            if session.ended is not None:
                return None
            return messages.Open(session.uid, session.log.end, name=session.name)
        row = self.store.session(number)
        if row is None or row.state not in _LIVING:
            return None
        if number not in self.journal:
            return messages.Open(row.uid, 0, name=row.name)
        output = self.journal.open(number, ring_bytes=self._ring, spill_bytes=self._spill)
        end = output.end
        output.release()
        return messages.Open(row.uid, end, name=row.name)

    # ---- housekeeping ------------------------------------------------------------------------------------------

    def cold(self, idle: int, now: int) -> list[Session]:
        """Returns the sessions in memory that nobody is attached to and that were quiet for `idle` nanoseconds."""
        return [session for session in self._hot.values() if self._is_cold(session, idle, now)]

    def _is_cold(self, session: Session, idle: int, now: int) -> bool:
        number, end = session.id, session.log.end
        if session.attachments or session.state is State.CONNECTING or isinstance(session.log, MemoryLog):
            self._used[number] = now
        elif end != self._ends.get(number):
            self._ends[number] = end
            self._used[number] = now
        else:
            return now - self._used[number] >= idle
        return False

    def evict(self, session: Session, idle: int, now: int, parker: Callable[[Session], None]) -> bool:
        """Takes a session out of memory if it is still cold, after `parker` has seen it; returns whether it was."""
        if self._hot.get(session.id) is not session or not self._is_cold(session, idle, now):
            return False
        parker(session)
        packer = getattr(session.log, "pack", None)
        if packer is not None:
            packer()
        getattr(session.log, "release", lambda: None)()
        self._drop(session)
        return True

    def claim_logs(self) -> None:
        """Says, at the start, whose the logs are, and removes those that no session has.

        With a new database, or one from a backup, numbers come again: another session must never find output that is
        not its own.
        """
        tenants, orphans = self.store.tenants(), []
        for number in self.journal.logs():
            if number in tenants:
                self.journal.assign(number, tenants[number])
            else:
                orphans.append(number)
        for number in orphans:
            self.journal.remove(number)
        if orphans:
            log.warning("output of unknown sessions removed", extra={"logs": len(orphans)})

    def purge(self) -> int:
        """Forgets what is older than the retention time; returns how many sessions."""
        if not self._retention:
            return 0
        numbers = self.store.purge(SYSTEM_CLOCK.wall() - self._retention * SECOND)
        for number in numbers:
            session = self._hot.get(number)
            if session is not None:
                session.close(Cause.RETENTION, SYSTEM_CLOCK.monotonic())
                getattr(session.log, "release", lambda: None)()
                self._drop(session)
            if number in self.journal:
                self.journal.remove(number)
        return len(numbers)


def _lane_states(blob: bytes) -> list[LaneState]:
    return messages.unpack(list[LaneState], blob) if blob else []
