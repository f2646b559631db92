"""What addresses are counted as where the bounds are."""

from __future__ import annotations

import ipaddress


def place(address: str) -> str:
    """Returns what an address is counted as: of IPv6 the /64, as whoever has one address there has all (RFC 4291)."""
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    mapped = found.ipv4_mapped
    return str(mapped) if mapped is not None else found.packed[:8].hex(":", 2) + "::/64"


class Places:
    """How many of something each place has, as `place` returns it."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._count)

    def at(self, where: str) -> int:
        """Returns how many a place has."""
        return self._count.get(where, 0)

    def add(self, where: str) -> None:
        """Counts one more."""
        self._count[where] = self._count.get(where, 0) + 1

    def remove(self, where: str) -> None:
        """Counts one less; there must be one."""
        left = self._count[where] - 1
        if left:
            self._count[where] = left
        else:
            del self._count[where]
