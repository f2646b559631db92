"""What clients may CALL, and who may (docs/protocol.md, section 6)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from sterna import limits
from sterna.clock import SYSTEM_CLOCK
from sterna.errors import Code, RefusedError, SternaError
from sterna.ids import DeviceId, check_name, clean_label, uid_of
from sterna.node.doorkeeper import Visitor
from sterna.node.schema import Issuer, ShareRow
from sterna.node.store import DEVICES_PER_TENANT_MAX, REVOKED_TEXT, DeviceRow, SessionRow
from sterna.node.table import AGENT_NAME_TEXT
from sterna.node.tickets import ENDED_TEXT, TICKETS_PER_TENANT_MAX
from sterna.protocol import messages
from sterna.protocol.states import Cause, State
from sterna.trust.tickets import new_ticket
from sterna.units import SECOND

if TYPE_CHECKING:
    from sterna.node.app import Node
    from sterna.node.clients import ClientConnection
    from sterna.protocol.attachment import Attachment
    from sterna.protocol.session import Session

_PAGE = 100
_VALUE_MAX_BYTES = limits.PAYLOAD_MAX_BYTES - 1024
_TOKEN_TTL_MAX_SECONDS = 10 * 365 * 86_400
# Of a signed token, and of one in a token file (sterna.trust.tokens).
_TOKEN_ID = re.compile("[0-9a-f]{32}|file-[0-9a-f]{16}")
_DEVICE_ID = re.compile("[0-9a-f]{64}")
_TTL_MAX_SECONDS = 30 * 86_400
_SHARE_ID = re.compile("[0-9a-f]{8,16}")


class _Which(msgspec.Struct, gc=False):
    """A session by name, or by uid in hex."""

    session: str = ""


class _Page(msgspec.Struct, gc=False):
    """A page of a list: what comes after this number."""

    after: int = 0
    agent: str = ""


class _Share(msgspec.Struct, gc=False):
    """A share ticket: for a session or `all` of them, a mode, a time to live in seconds until it is used."""

    session: str = ""
    all: bool = False
    mode: str = "drive"
    ttl: int = 600


class _Unshare(msgspec.Struct, gc=False):
    """A share ticket to be ended, by its id: the first 16 hex digits of its hash, or 8 or more of them."""

    id: str


class _Rename(msgspec.Struct, gc=False):
    """A new name for a session."""

    session: str
    name: str


class _Revoke(msgspec.Struct, gc=False):
    """A device (its id in hex, or the beginning of it) or an access token (its id) to refuse from now on.

    `this_device` says that the caller knows that it means itself.
    """

    device: str = ""
    token: str = ""
    this_device: bool = False


class _Token(msgspec.Struct, gc=False):
    """An access token to be issued: agents as globs, modes, and seconds until it expires (0: never)."""

    tenant: str = ""
    agents: tuple[str, ...] = ("*",)
    modes: tuple[str, ...] = ("drive", "watch")
    ttl: int = 0


class Calls:
    """Answers CALLs for one node; every answer is limited to the caller's tenant and rights."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._methods: dict[str, tuple[Callable[[Visitor, Any], dict[str, Any]], type[Any]]] = {
            "list": (self._list, _Page),
            "info": (self._info, _Which),
            "node": (self._about, _Page),
            "share": (self._share, _Share),
            "shares": (self._shares, _Page),
            "unshare": (self._unshare, _Unshare),
            "devices": (self._devices, _Page),
            "revoke": (self._revoke, _Revoke),
            "rename": (self._rename, _Rename),
            "close": (self._close, _Which),
            "displace": (self._displace, _Which),
            "token": (self._token, _Token),
            "drain": (self._drain, _Page),
        }

    def answer(self, connection: ClientConnection, visitor: Visitor, call: messages.Call, now: int) -> messages.Result:
        """Returns the RESULT of a CALL: a value, or the error."""
        found = self._methods.get(call.method)
        try:
            if found is None:
                raise RefusedError(Code.UNSUPPORTED, f"There is no method {clean_label(call.method)!r}.")
            method, shape = found
            value = messages.pack(method(visitor, messages.unpack(shape, call.params)))
            if len(value) > _VALUE_MAX_BYTES:
                raise RefusedError(Code.TOO_LARGE, "The answer is too large.")
        except SternaError as error:
            return messages.Result(call.id, error=messages.error(error.code, str(error)))
        return messages.Result(call.id, msgspec.Raw(value))

    # ---- sessions ----------------------------------------------------------------------------------------------

    def _list(self, visitor: Visitor, page: _Page) -> dict[str, Any]:
        store = self._node.store
        if visitor.session is not None:
            row = store.session(visitor.session)
            rows = [row] if row is not None and row.number > page.after else []
            pod = self._node.registry.pod(visitor.tenant, row.agent) if row is not None else None
            pods = [pod] if pod is not None else []
        else:
            rows = store.sessions(visitor.tenant, None, page.after, _PAGE)
            pods = self._node.pods(visitor.tenant)[:_PAGE]
        shown = [
            self._describe(row)
            for row in rows
            if row.state != State.CLOSED
            and (not page.agent or row.agent == page.agent)
            and row.tenant == visitor.tenant
            and visitor.may_use(row.agent, "watch")
        ]
        agents = [
            {"name": pod.agent, "kind": pod.kind, "ready": pod.is_ready}
            for pod in pods
            if visitor.may_use(pod.agent, "watch")
        ]
        return {"sessions": shown, "agents": agents, "next": rows[-1].number if len(rows) == _PAGE else 0}

    def _describe(self, row: SessionRow) -> dict[str, Any]:
        live = self._node.table.loaded(row.number)
        # Whoever was attached when the node was killed keeps no session busy that is not in memory since.
        idle = State.SUSPENDED if row.state == State.ACTIVE else State(row.state)
        return {
            "name": row.name,
            "uid": row.uid.hex(),
            "agent": row.agent,
            "kind": row.kind,
            "state": (live.state if live is not None else idle).value,
            "created": row.created // SECOND,
            "changed": row.changed // SECOND,
            "attached": len(live.attachments) if live is not None else 0,
            "status": row.status,
            "signal": row.signal,
            "reason": row.end_reason or "",
        }

    def _row(self, visitor: Visitor, which: str, mode: str) -> SessionRow:
        """Returns the session a caller names, if it may use it in this mode."""
        store, uid = self._node.store, uid_of(which)
        row = store.session_by_uid(uid) if uid is not None else None
        if row is None:
            row = store.session_by_name(visitor.tenant, which)
        if (
            row is None
            or row.tenant != visitor.tenant
            or visitor.session not in (None, row.number)
            or not visitor.may_use(row.agent, mode)
        ):
            raise RefusedError(
                Code.NOT_FOUND, f"There is no session {clean_label(which)!r}; `sterna ls` shows what there is."
            )
        return row

    def _info(self, visitor: Visitor, which: _Which) -> dict[str, Any]:
        row = self._row(visitor, which.session, "watch")
        about = self._describe(row)
        session = self._node.table.load(row.number)
        if session is not None:
            about |= {
                "output": session.log.end,
                "kept": session.log.tail,
                "log": session.log_id,
                "epoch": session.epoch,
                "cols": session.cols,
                "rows": session.rows,
                "attachments": [
                    {"label": a.label, "mode": a.mode, "device": a.device.hex()[:16], "cols": a.cols, "rows": a.rows}
                    for a in session.attachments.values()
                ],
                "lanes": [{"attachment": lane.id.hex(), "handled": lane.handled} for lane in session.lanes.values()],
            }
        return about

    def _rename(self, visitor: Visitor, request: _Rename) -> dict[str, Any]:
        row = self._row(visitor, request.session, "drive")
        if self._node.table.reserved(row.tenant, row.agent, check_name(request.name)):
            raise RefusedError(Code.EXISTS, AGENT_NAME_TEXT.format(request.name))
        self._node.store.rename(row.number, request.name)
        live = self._node.table.loaded(row.number)
        if live is not None:
            live.name = request.name
        return {"name": request.name}

    def _close(self, visitor: Visitor, which: _Which) -> dict[str, Any]:
        row = self._row(visitor, which.session, "drive")
        if row.state == State.CLOSED:
            return {"name": row.name}
        session = self._node.table.load(row.number)
        if session is None:
            return {"name": row.name}
        now = SYSTEM_CLOCK.monotonic()
        if session.ended is not None or session.port is not None:
            self._end(session, now)
        else:
            self._node.registry.ensure(session, lambda _reason: self._end(session, SYSTEM_CLOCK.monotonic()))
        return {"name": row.name}

    def _end(self, session: Any, now: int) -> None:
        session.close(Cause.CLOSE, now)
        self._node.table.settle(session)

    def _displace(self, visitor: Visitor, which: _Which) -> dict[str, Any]:
        row = self._row(visitor, which.session, "drive")
        session = self._node.table.loaded(row.number)
        count = len(session.attachments) if session is not None else 0
        if session is not None:
            session.displace(None, Code.DISPLACED, "Another device took the session over.", SYSTEM_CLOCK.monotonic())
            self._node.table.store_state(session)
        return {"displaced": count}

    def _share(self, visitor: Visitor, request: _Share) -> dict[str, Any]:
        mode: messages.Mode = "watch" if request.mode == "watch" else "drive"
        if request.mode != mode or not 0 < request.ttl <= _TTL_MAX_SECONDS:
            raise RefusedError(Code.BAD_REQUEST, "A share has mode drive or watch and lives for 1 second to 30 days.")
        row = None if request.all else self._row(visitor, request.session, mode)
        if visitor.guest:
            raise RefusedError(Code.DENIED, "A share link cannot be shared on; ask who gave it to you.")
        if row is None:
            self._owner(visitor)
        text, hashed = new_ticket()
        wall = SYSTEM_CLOCK.wall()
        number, agents = (row.number, row.agent) if row is not None else (None, "*")
        expires = self._node.store.add_ticket(
            hashed, visitor.tenant, number, agents, mode, wall + request.ttl * SECOND, wall, _issuer(visitor)
        )
        return {
            "ticket": text,
            "session": row.uid.hex() if row is not None else None,
            "name": row.name if row is not None else None,
            "agent": row.agent if row is not None else None,
            "mode": request.mode,
            "expires": expires // SECOND,
            **self._about(visitor, _Page()),
        }

    def _shares(self, visitor: Visitor, page: _Page) -> dict[str, Any]:
        self._no_guest(visitor)
        start = min(max(page.after, 0), TICKETS_PER_TENANT_MAX)
        wall = SYSTEM_CLOCK.wall()
        rows = self._node.store.shares(visitor.tenant, _issuer(visitor), wall, _PAGE + 1, start)
        return {"shares": [_shown(row) for row in rows[:_PAGE]], "next": start + _PAGE if len(rows) > _PAGE else 0}

    def _unshare(self, visitor: Visitor, request: _Unshare) -> dict[str, Any]:
        self._no_guest(visitor)
        if _SHARE_ID.fullmatch(request.id) is None:
            raise RefusedError(Code.BAD_REQUEST, "That is no link's id: give the 16 digits, or 8 or more of them.")
        store, now = self._node.store, SYSTEM_CLOCK.monotonic()
        rows = store.shares(visitor.tenant, _issuer(visitor), SYSTEM_CLOCK.wall())
        found = [row for row in rows if row.hash.hex().startswith(request.id)]
        if len(found) != 1:
            raise RefusedError(
                Code.NOT_FOUND, "No link of yours, or more than one, has that id; `sterna share --list` shows them."
            )
        hashed, left = found[0].hash, []
        for attachment_id, number in store.end_ticket(visitor.tenant, hashed):
            session = self._node.table.loaded(number)
            attachment = session.attachments.get(attachment_id) if session is not None else None
            if session is not None and attachment is not None:
                left.append(attachment.link)
                self._drop(session, attachment, Code.DENIED, ENDED_TEXT, now)
        for connection in self._node.connections:
            caller = connection.visitor
            if caller is not None and caller.ticket == hashed:
                connection.visitor = None  # no more CALLs
                connection.watch()
            elif caller is not None or connection.link not in left:
                continue
            if not connection.living:
                connection.link.fail(Code.DENIED, ENDED_TEXT)
        store.sync()
        return _shown(found[0])

    def _no_guest(self, visitor: Visitor) -> None:
        if visitor.guest:
            raise RefusedError(Code.DENIED, "A share link neither shows nor ends links; ask who gave it to you.")

    # ---- node, devices, tokens ---------------------------------------------------------------------------------

    def _about(self, visitor: Visitor, _page: _Page) -> dict[str, Any]:
        host, port = self._node.address
        return {
            "node": self._node.identity.node_id.hex(),
            "host": host,
            "port": port,
            "quic_port": self._node.quic_port,
            "no_quic": self._node.no_quic,
            "web_port": self._node.config.web_port,
            "web_host": self._node.config.web_host or host,
            "tenant": visitor.tenant,
            "started": self._node.started // SECOND if visitor.owner else 0,
            "sessions": self._node.store.count(visitor.tenant) if visitor.owner else 0,
            "connections": len(self._node.connections) if visitor.admin else 0,
        }

    def _devices(self, visitor: Visitor, page: _Page) -> dict[str, Any]:
        self._owner(visitor)
        start = min(max(page.after, 0), DEVICES_PER_TENANT_MAX)
        # Those of this page, and one more if there is another page.
        rows = self._node.store.devices(visitor.tenant, min(_PAGE + 1, DEVICES_PER_TENANT_MAX - start), start)
        shown = [
            {
                "id": row.id.hex(),
                "label": row.label,
                "created": row.created // SECOND,
                "seen": row.seen // SECOND,
                "revoked": row.revoked,
                "sessions": row.sessions,
                "self": row.id == visitor.device,
            }
            for row in rows[:_PAGE]
        ]
        return {"devices": shown, "next": start + _PAGE if len(rows) > _PAGE else 0}

    def _revoke(self, visitor: Visitor, request: _Revoke) -> dict[str, Any]:
        if request.token:
            self._admin(visitor)
            if _TOKEN_ID.fullmatch(request.token) is None:
                raise RefusedError(Code.BAD_REQUEST, "That is no token's id: give the id or all of the token.")
            self._node.doorkeeper.revoke_token(request.token)
            return {"token": request.token}
        self._owner(visitor)
        device = self._device(visitor.tenant, request.device)
        if device == visitor.device and not request.this_device:
            raise RefusedError(
                Code.BAD_REQUEST,
                "That is this very device, which could not come in any more: if you mean it, add --this-device.",
            )
        self._node.store.revoke_device(visitor.tenant, device)
        now = SYSTEM_CLOCK.monotonic()
        for session in list(self._node.table.hot()):
            if session.tenant == visitor.tenant:
                for attachment in list(session.attachments.values()):
                    if attachment.device == device:
                        self._drop(session, attachment, Code.REVOKED, REVOKED_TEXT, now)
        for connection in self._node.connections:
            caller = connection.visitor
            if caller is not None and (caller.tenant, caller.device) == (visitor.tenant, device):
                connection.visitor = None  # no more CALLs
                connection.watch()
            elif caller is not None or connection.who != (visitor.tenant, device):
                continue
            if caller is not visitor and not connection.living:
                connection.link.fail(Code.REVOKED, REVOKED_TEXT)
        return {"device": device.hex()}

    def _drop(self, session: Session, attachment: Attachment, code: Code, text: str, now: int) -> None:
        session.drop(attachment, code, text, now)
        self._node.table.store_state(session)
        self._node.ticker.watch(session)

    def _device(self, tenant: str, which: str) -> DeviceId:
        """Returns the device of a tenant that an id in hex means, or 8 digits or more of its beginning."""
        store, found = self._node.store, list[DeviceRow]()
        if _DEVICE_ID.fullmatch(which) is not None:
            row = store.device(DeviceId(bytes.fromhex(which)), tenant)
            found = [row] if row is not None else []
        elif len(which) >= 8:
            found = [row for row in store.devices(tenant) if row.id.hex().startswith(which)]
        if len(found) != 1:
            raise RefusedError(
                Code.NOT_FOUND,
                "No device, or more than one, begins with that (8 digits at least); `sterna devices` shows them.",
            )
        return found[0].id

    def _token(self, visitor: Visitor, request: _Token) -> dict[str, Any]:
        self._admin(visitor)
        if not 0 <= request.ttl <= _TOKEN_TTL_MAX_SECONDS:
            raise RefusedError(Code.BAD_REQUEST, "A token lives for at most ten years (0: until it is revoked).")
        now_s = SYSTEM_CLOCK.wall() // SECOND
        tenant = request.tenant or visitor.tenant
        expires = now_s + request.ttl if request.ttl else 0
        return {
            "token": self._node.token_key.issue(tenant, request.agents, request.modes, now_s=now_s, expires=expires)
        }

    def _drain(self, visitor: Visitor, _page: _Page) -> dict[str, Any]:
        self._admin(visitor)
        self._node.stop_requested.set()
        return {"pid": os.getpid()}

    def _owner(self, visitor: Visitor) -> None:
        if not visitor.owner:
            raise RefusedError(Code.DENIED, "That needs a token for all agents of its tenant, to drive them.")

    def _admin(self, visitor: Visitor) -> None:
        if not visitor.admin:
            raise RefusedError(Code.DENIED, "Only the user whose node this is may do that, on its machine.")


def _issuer(visitor: Visitor) -> Issuer:
    return Issuer(visitor.device, visitor.token, visitor.expires * SECOND, visitor.owner)


def _shown(row: ShareRow) -> dict[str, Any]:
    """Returns a share ticket as it is listed."""
    return {
        "id": row.hash.hex()[:16],
        "name": row.name,
        "session": row.uid.hex() if row.uid is not None else None,
        "agent": row.agent,
        "mode": row.mode,
        "issuer": row.issuer.hex()[:16],
        "expires": row.expires // SECOND,
        "device": row.device.hex()[:16] if row.device is not None else None,
        "label": row.label,
    }
