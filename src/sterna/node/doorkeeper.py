"""Who may do what: proofs, tokens, tickets, and the brake on guessing (docs/protocol.md, section 4)."""

from __future__ import annotations

import logging
from collections import OrderedDict
from fnmatch import fnmatchcase

from sterna import limits
from sterna.clock import SYSTEM_CLOCK
from sterna.errors import Code, ProtocolError, RefusedError, StorageError, TrustError
from sterna.ids import AttachmentId, DeviceId, NodeId, check_agent
from sterna.node.logs import Brake
from sterna.node.store import REVOKED_TEXT, AttachmentRow, Store
from sterna.protocol import messages
from sterna.protocol.messages import ConnectBody, ResumeBody, Signed
from sterna.transport.places import place
from sterna.trust import device as device_keys
from sterna.trust.tickets import ticket_hash
from sterna.trust.tokens import LOCAL_GRANT, Access
from sterna.units import SECOND

log = logging.getLogger("sterna.node.doorkeeper")

_DENIED = "Access denied: the token, ticket or key is not valid for this."
_TICKET = "This link is not valid: another device used it already, it expired, or it was ended; ask for a new one."
_WATCH_ONLY = "This access is for looking on only: use --watch, or ask for access that allows typing."
_MINUTE = 60 * SECOND
_ADDRESSES_MAX = 10_000
_LINES_BURST = 60
_LINES_PER_SECOND = 1
# A key that no device has; a proof for an unknown attachment is checked against it so that the answer takes as long.
# It must be a point of the curve: checking against any other bytes takes a tenth of the time.
_NOBODY = device_keys.nobody()


class Visitor:
    """Who is behind a connection once CONNECT was proved: its tenant, device, and what it may use.

    `session` (a number) limits a ticket's holder to one session; `modes` holds "drive" and/or "watch". `ticket` is the
    hash of the ticket that let it in, `admin` says that it is the node's own user (by the local token). `token` is the
    id of what let it in otherwise, "" for the node's own user, and `expires` when that is over, in Unix seconds (0:
    never).
    """

    __slots__ = (
        "admin", "agents", "device", "expires", "label", "modes", "public", "session", "tenant", "ticket", "token",
    )  # fmt: skip

    def __init__(
        self, tenant: str, device: DeviceId, public: bytes, agents: tuple[str, ...], modes: frozenset[str]
    ) -> None:
        self.tenant = tenant
        self.device = device
        self.public = public
        self.agents = agents
        self.modes = modes
        self.session: int | None = None
        self.admin = False
        self.label = self.token = ""
        self.ticket = b""
        self.expires = 0

    @property
    def guest(self) -> bool:
        """Whether a ticket let it in."""
        return bool(self.ticket)

    @property
    def owner(self) -> bool:
        """Whether it has all of its tenant's rights: every agent, to drive."""
        return not self.guest and "*" in self.agents and "drive" in self.modes

    def may_use(self, agent: str, mode: str) -> bool:
        """Tells whether an agent may be used in a mode; who may drive may also watch."""
        return (mode in self.modes or (mode == "watch" and "drive" in self.modes)) and any(
            fnmatchcase(agent, glob) for glob in self.agents
        )


class Doorkeeper:
    """Checks proofs and credentials for one node; failures are counted for each address."""

    def __init__(self, node_id: NodeId, access: Access, store: Store) -> None:
        self._node = node_id
        self._access = access
        self._store = store
        self._revoked = store.revoked_tokens()
        self._failures: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._proofs: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._spent: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()
        self._lines = Brake(_LINES_BURST, _LINES_PER_SECOND)
        self.denied = 0

    # ---- the brake ---------------------------------------------------------------------------------------------

    def blocked(self, address: str, now: int) -> bool:
        """Tells whether an address has failed too often within a minute; `now` in monotonic nanoseconds."""
        found = self._failures.get(place(address))
        return found is not None and now - found[0] < _MINUTE and found[1] >= limits.FAILURES_PER_MINUTE_MAX

    def admits(self, address: str, now: int) -> bool:
        """Tells whether a proof from a blocked address is checked all the same, PROOFS_PER_SECOND_MAX a second.

        Genuine devices share their address with whoever fails; those failures must not lock them out, and checking
        them must stay cheap. `now` in monotonic nanoseconds.
        """
        source = place(address)
        since, count = self._proofs.pop(source, (now, 0))
        if now - since >= SECOND:
            since, count = now, 0
        self._proofs[source] = (since, min(count + 1, limits.PROOFS_PER_SECOND_MAX + 1))
        if len(self._proofs) > _ADDRESSES_MAX:
            self._proofs.popitem(last=False)
        return count < limits.PROOFS_PER_SECOND_MAX

    def failed(self, address: str, now: int, code: Code = Code.DENIED) -> None:
        """Counts a failure of an address, and logs it unless too many are logged."""
        self.denied += 1
        source = place(address)
        since, count = self._failures.pop(source, (now, 0))
        if now - since >= _MINUTE:
            since, count = now, 0
        self._failures[source] = (since, count + 1)
        if len(self._failures) > _ADDRESSES_MAX:
            self._failures.popitem(last=False)
        if self._lines.admits(now):
            log.warning("access denied", extra={"peer": address, "code": code.name, **self._lines.fields()})
        else:
            self._lines.left_out += 1

    def sum_up(self, now: int) -> None:
        """Logs how many failures were not logged, if any were."""
        if self._lines.left_out and self._lines.admits(now):
            log.warning("access denied to others", extra=self._lines.fields())

    # ---- CONNECT -----------------------------------------------------------------------------------------------

    def connect(self, signed: Signed, body: ConnectBody) -> Visitor:
        """Returns who sent a CONNECT, after checking signature and credential; else RefusedError."""
        genuine = device_keys.verify(body.key, messages.CONTEXT_CONNECT, self._node, signed.body, signed.sig)
        if body.context != messages.CONTEXT_CONNECT or body.node != self._node or not genuine:
            raise RefusedError(Code.DENIED, _DENIED)
        if body.min > messages.VERSION or body.max < messages.VERSION - 1:
            raise RefusedError(Code.VERSION, f"This node speaks protocol version {messages.VERSION}.")
        if len(body.attachment) != 16 or len(body.request) != 16:
            raise ProtocolError(Code.BAD_PAYLOAD, "attachment and request have 16 bytes")
        visitor = self._credential(body)
        if body.agent and body.want not in ("join", "call") and not visitor.may_use(check_agent(body.agent), body.mode):
            raise RefusedError(Code.DENIED, _WATCH_ONLY if visitor.may_use(body.agent, "watch") else _DENIED)
        visitor.label = body.label
        return visitor

    def _credential(self, body: ConnectBody) -> Visitor:
        device = device_keys.device_id(body.key)
        wall = SYSTEM_CLOCK.wall()
        if not body.credential:
            raise RefusedError(Code.DENIED, _DENIED)
        if len(body.credential) > limits.TOKEN_MAX_BYTES:
            raise RefusedError(Code.TOO_LARGE, "The token is too long.")
        try:
            hashed = ticket_hash(body.credential)
        except TrustError:
            hashed = b""
        # A secret of a token file may look like a ticket.
        ticket = self._store.redeem_ticket(hashed, device, wall) if hashed else None
        if ticket is not None:
            visitor = Visitor(ticket.tenant, device, body.key, (ticket.agents,), frozenset((ticket.mode,)))
            visitor.session = ticket.session
            visitor.ticket = hashed
        else:
            try:
                grant = self._access.grant(body.credential, wall // SECOND, self._revoked)
            except TrustError as error:
                code = error.code if error.code == Code.EXPIRED else Code.DENIED
                text = str(error) if code == Code.EXPIRED else _TICKET if hashed else _DENIED
                raise RefusedError(code, text) from None
            if body.tenant and body.tenant != grant.tenant:
                raise RefusedError(Code.DENIED, _DENIED)
            visitor = Visitor(grant.tenant, device, body.key, tuple(grant.agents), grant.modes)
            visitor.admin = grant.token == LOCAL_GRANT.token
            visitor.token, visitor.expires = "" if visitor.admin else grant.token, grant.expires
        self._store.put_device(device, body.key, visitor.tenant, body.label, wall)
        return visitor

    # ---- RESUME ------------------------------------------------------------------------------------------------

    def resume(self, signed: Signed, body: ResumeBody) -> AttachmentRow:
        """Returns the attachment that a RESUME proves to come from, and spends its counter; else RefusedError.

        Unknown attachment, wrong key, wrong device, wrong session: the same answer after the same work.
        """
        row = self._store.attachment(AttachmentId(body.attachment)) if len(body.attachment) == 16 else None
        public = row.public if row is not None else _NOBODY
        genuine = device_keys.verify(public, messages.CONTEXT_RESUME, self._node, signed.body, signed.sig)
        if (
            row is None
            or not genuine
            or body.context != messages.CONTEXT_RESUME
            or body.node != self._node
            or body.device != row.device
            or body.uid != row.uid
        ):
            raise RefusedError(Code.DENIED, _DENIED)
        if row.revoked:
            raise RefusedError(Code.REVOKED, REVOKED_TEXT)
        if body.min > messages.VERSION or body.max < messages.VERSION - 1:
            raise RefusedError(Code.VERSION, f"This node speaks protocol version {messages.VERSION}.")
        counter, race = max((row.counter, row.race), self._spent.get(body.attachment, (0, b"")))
        if body.counter <= counter:
            if race and body.race == race:
                raise RefusedError(Code.SUPERSEDED, "Another connection of this attachment was faster.")
            raise RefusedError(Code.STALE, "This counter was used before.", value=counter)
        if body.race == race:
            raise RefusedError(Code.SUPERSEDED, "Another connection of this attachment was faster.")
        if body.counter > limits.POSITION_MAX or len(body.race) != 16:
            raise RefusedError(Code.DENIED, _DENIED)
        self._spend(body)
        return row

    def _spend(self, body: ResumeBody) -> None:
        """Stores a counter so that its RESUME is good for nothing more; on a full disk it is remembered in memory.

        Whoever lost the connection is let in to make room; the node's death would make a recorded RESUME good again,
        but those travel within TLS only.
        """
        self._spent.pop(body.attachment, None)
        try:
            self._store.spend_counter(AttachmentId(body.attachment), body.counter, body.race, SYSTEM_CLOCK.wall())
        except StorageError as error:
            log.error("counter not stored", extra={"reason": str(error)})
            self._spent[body.attachment] = body.counter, body.race
            if len(self._spent) > limits.CONNECTIONS_MAX:
                self._spent.popitem(last=False)

    def revoke_token(self, token: str) -> None:
        """Refuses a token from now on."""
        self._store.revoke_token(token)
        self._revoked = self._store.revoked_tokens()
