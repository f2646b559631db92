"""The last screens of ended programs that are in memory: bounded for each tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sterna import limits

if TYPE_CHECKING:
    from sterna.protocol.session import Session


class Finals:
    """Knows who holds a last screen; where a tenant's are too large together, those noted longest ago are let go.

    One that is stored is loaded again when it is wanted. One that a pod has not yet sent to its end is lost: to the
    tenant whose pods send so much.
    """

    __slots__ = ("_bytes", "_held")

    def __init__(self) -> None:
        self._held: dict[str, dict[int, tuple[Session, int]]] = {}
        self._bytes: dict[str, int] = {}

    def note(self, session: Session) -> None:
        """Counts what a session holds now."""
        self.forget(session)
        if not session.final:
            return
        tenant = session.tenant
        held = self._held.setdefault(tenant, {})
        held[session.id] = session, len(session.final)
        self._bytes[tenant] = self._bytes.get(tenant, 0) + len(session.final)
        while self._bytes.get(tenant, 0) > limits.FINALS_LOADED_PER_TENANT_MAX_BYTES:
            oldest, _ = next(iter(held.values()))
            self.forget(oldest)
            oldest.final = b""

    def forget(self, session: Session) -> None:
        """Counts a session no longer."""
        held = self._held.get(session.tenant, {})
        _, size = held.pop(session.id, (session, 0))
        if size:
            self._bytes[session.tenant] -= size
            if not held:
                del self._held[session.tenant], self._bytes[session.tenant]
