"""Whose the proved connections of a node are: no tenant and no link may take them all."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sterna import limits
from sterna.errors import Code, RefusedError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from sterna.ids import DeviceId

_RETRY_SECONDS = 5.0


class Crowd:
    """Counts connections for tenants, and for devices that a link let in; `most` is how many there may be in all."""

    __slots__ = ("_counts", "_owners", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._owners: dict[Hashable, list[str | DeviceId]] = {}
        self._counts: Counter[str | DeviceId] = Counter()

    def admit(self, connection: Hashable, tenant: str, guest: DeviceId | None) -> None:
        """Counts a connection for a tenant and, if a link let it in, for that device.

        Raises RefusedError: `LIMIT` if the link has too many, `BUSY` if the tenant would have more than
        SHARE_TIMES_FREE times what is left free, as in the journal.
        """
        owners = self._owners.get(connection, [])
        fresh: list[str | DeviceId] = []
        if guest is not None and guest not in owners:
            if self._counts[guest] >= limits.GUEST_CONNECTIONS_MAX:
                raise RefusedError(Code.LIMIT, "This link has too many connections: close some.")
            fresh.append(guest)
        if not owners:
            free = self._most - len(self._owners) - 1
            if self._counts[tenant] + 1 > limits.SHARE_TIMES_FREE * free:
                raise RefusedError(
                    Code.BUSY, "You have most of this node's connections: close some.", retry_after=_RETRY_SECONDS
                )
            fresh.append(tenant)
        self._owners[connection] = owners + fresh
        self._counts.update(fresh)

    def gone(self, connection: Hashable) -> None:
        """Forgets a connection that ended."""
        for owner in self._owners.pop(connection, ()):
            self._counts[owner] -= 1
            if not self._counts[owner]:
                del self._counts[owner]
