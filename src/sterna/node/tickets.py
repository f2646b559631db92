"""Share tickets in the node's store: who made them, what they allow, whom they let in (docs/protocol.md, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sterna import limits
from sterna.errors import Code, RefusedError
from sterna.node.schema import Issuer, ShareRow, TicketRow
from sterna.units import SECOND

if TYPE_CHECKING:
    from sterna.ids import AttachmentId, DeviceId
    from sterna.node.database import Database
    from sterna.protocol.messages import Mode

BATCH_MAX = 1_000
TICKETS_PER_TENANT_MAX = 1_000
TICKETS_PER_TOKEN_MAX = 50
# Several old ones go for each new one, so that what is expired never piles up.
SWEEP_ROWS = 4
END_ISSUED = (
    "DELETE FROM tickets WHERE token IN (SELECT id FROM revoked_tokens) OR EXISTS (SELECT 1 FROM devices d "
    "WHERE d.tenant = tickets.tenant AND d.device = tickets.issuer AND d.revoked = 1)"
)
"""Ends the tickets of all whose access was revoked."""
ENDED_TEXT = "The share link that let you in was ended: ask for a new one."
_NODE_USER = Issuer()
_TICKET_KEPT, _DAY = limits.TICKET_KEPT_SECONDS * SECOND, 86_400 * SECOND


class Tickets:
    """The store's part for share tickets, and what it knows of revoked tokens."""

    _db: Database
    _requests: int
    _revoked: frozenset[str] | None

    def revoked_tokens(self) -> frozenset[str]:
        """Returns the ids of all revoked access tokens."""
        if self._revoked is None:
            self._revoked = frozenset(token for (token,) in self._db.all("SELECT id FROM revoked_tokens"))
        return self._revoked

    def add_ticket(
        self,
        hashed: bytes,
        tenant: str,
        session: int | None,
        agents: str,
        mode: Mode,
        expires: int,
        now: int,
        issuer: Issuer = _NODE_USER,
    ) -> int:
        """Remembers a share ticket by its hash until `expires`; `agents` is a glob, `session` a number or None for any.

        Returns when it expires: not after what its issuer came with.
        Of too many, one of the same token goes (or, for an owner, of anybody) that nobody has used, else the one of
        the same token unused for longest. Raises RefusedError: `LIMIT` if there is none, `REVOKED` or `EXPIRED` if the
        issuer's access is over.
        """
        if self._is_over(tenant, issuer.device, issuer.token):
            raise RefusedError(Code.REVOKED, "Your access was revoked: ask for access anew, then share.")
        expires = min(expires, issuer.until or expires)
        if expires <= now:
            raise RefusedError(Code.EXPIRED, "Your access has expired: ask for access anew, then share.")
        with self._db.transaction:
            self.purge_tickets(now, SWEEP_ROWS)
            count, own = self._db.one(
                "SELECT count(*), total(token = ?) FROM tickets WHERE tenant = ? AND expires > ?",
                (issuer.token, tenant, now),
            )
            if count >= TICKETS_PER_TENANT_MAX or (not issuer.owner and own >= TICKETS_PER_TOKEN_MAX):
                gone = self._db.write(
                    "DELETE FROM tickets WHERE hash IN (SELECT hash FROM tickets WHERE tenant = ?1 AND expires > ?2 "
                    "AND (token = ?3 OR (?4 AND device IS NULL)) "
                    "ORDER BY device IS NOT NULL, token != ?3, expires LIMIT 1)",
                    (tenant, now, issuer.token, issuer.owner),
                )
                if not gone:
                    raise RefusedError(
                        Code.LIMIT, f"{TICKETS_PER_TENANT_MAX} share tickets are out: wait until some expire."
                    )
            self._db.write(
                "INSERT OR REPLACE INTO tickets (hash, tenant, session, agents, mode, expires, issuer, token, until) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (hashed, tenant, session, agents, mode, expires, issuer.device, issuer.token, issuer.until),
            )
        return expires

    def _is_over(self, tenant: str, device: bytes, token: str) -> bool:
        """Tells whether what a ticket is issued by was revoked."""
        sql = "SELECT 1 FROM devices WHERE tenant = ? AND device = ? AND revoked = 1"
        return token in self.revoked_tokens() or self._db.one(sql, (tenant, device)) is not None

    def redeem_ticket(self, hashed: bytes, device: DeviceId, now: int) -> TicketRow | None:
        """Returns what a ticket allows and binds it to the first device that comes; None if it is not valid.

        Once bound it holds for TICKET_KEPT_SECONDS from each use, which is written once a day, but no longer than the
        token of whoever made it.
        """
        row = self._db.one(
            "SELECT tenant, session, agents, mode, expires, device, issuer, token, until FROM tickets "
            "WHERE hash = ? AND expires > ?",
            (hashed, now),
        )
        if row is None or row[5] not in (None, device) or self._is_over(row[0], row[6], row[7]):
            return None
        tenant, session, agents, mode, expires, owner, _issuer, _token, until = row
        kept = min(now + _TICKET_KEPT, until or limits.POSITION_MAX)
        if owner is None and self._is_over(tenant, device, ""):
            return TicketRow(tenant, session, agents, mode, expires)  # it is refused later: another may have the link
        if owner is None or kept - expires >= _DAY:
            expires = max(expires, kept)
            self._db.write("UPDATE tickets SET device = ?, expires = ? WHERE hash = ?", (device, expires, hashed))
        return TicketRow(tenant, session, agents, mode, expires)

    def shares(
        self, tenant: str, whose: Issuer, now: int, limit: int = TICKETS_PER_TENANT_MAX, start: int = 0
    ) -> list[ShareRow]:
        """Returns `limit` tickets of a tenant from the `start`th on that have not expired, the first to expire first.

        An owner gets all of them, others what their token or their device issued.
        """
        rows = self._db.all(
            "SELECT t.hash, s.uid, s.name, s.agent, t.mode, t.expires, t.issuer, t.device, d.label FROM tickets t "
            "LEFT JOIN sessions s ON s.number = t.session "
            "LEFT JOIN devices d ON d.tenant = t.tenant AND d.device = t.device "
            "WHERE t.tenant = ? AND t.expires > ? AND (? OR t.issuer = ? OR (t.token = ? AND t.token != '')) "
            "ORDER BY t.expires, t.hash LIMIT ? OFFSET ?",
            (tenant, now, whose.owner, whose.device, whose.token, limit, start),
        )
        return [ShareRow(*row) for row in rows]

    def end_ticket(self, tenant: str, hashed: bytes) -> list[tuple[AttachmentId, int]]:
        """Forgets a ticket, and the attachments that came by it; returns those, each with its session's number."""
        with self._db.transaction:
            # Of those from before it was noted by which ticket they came, all that may have come by this one.
            gone = self._db.all(
                "SELECT a.id, a.session FROM tickets t JOIN devices d ON d.tenant = t.tenant AND d.device = t.device "
                "JOIN attachments a ON a.device = d.row AND a.guest = 1 AND (a.ticket = t.hash "
                "OR (a.ticket = x'' AND (t.session IS NULL OR t.session = a.session))) "
                "WHERE t.tenant = ? AND t.hash = ?",
                (tenant, hashed),
            )
            for attachment_id, _session in gone:
                # What is asked again is not answered with what is gone.
                self._db.write(
                    "DELETE FROM requests WHERE attachment = ?1 AND device = (SELECT d.device FROM attachments a "
                    "JOIN devices d ON d.row = a.device WHERE a.id = ?1)",
                    (attachment_id,),
                )
                self._db.write("DELETE FROM attachments WHERE id = ?", (attachment_id,))
            self._db.write("DELETE FROM tickets WHERE tenant = ? AND hash = ?", (tenant, hashed))
        self._requests = -1  # counted anew
        return gone

    def purge_tickets(self, now: int, limit: int = BATCH_MAX) -> int:
        """Forgets tickets that have expired, at most `limit`; returns how many."""
        return self._db.write(
            "DELETE FROM tickets WHERE hash IN (SELECT hash FROM tickets WHERE expires <= ? ORDER BY expires LIMIT ?)",
            (now, limit),
        )
