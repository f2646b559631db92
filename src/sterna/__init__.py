"""Sterna hosts agent and terminal sessions that survive everything.

The names in `__all__` are the library's interface; each is imported when it is first used: `import sterna` is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sterna.client.aio import Session, connect
    from sterna.errors import (
        AgentError,
        Code,
        ConfigError,
        ConnectionLostError,
        ProtocolError,
        RefusedError,
        SternaError,
        StorageError,
        TrustError,
        UsageError,
    )
    from sterna.protocol.client import Gap, Notice, Trouble, Uncertain

__version__ = "0.1.0"

__all__ = [
    "AgentError",
    "Code",
    "ConfigError",
    "ConnectionLostError",
    "Gap",
    "Notice",
    "ProtocolError",
    "RefusedError",
    "Session",
    "SternaError",
    "StorageError",
    "Trouble",
    "TrustError",
    "Uncertain",
    "UsageError",
    "__version__",
    "connect",
]

_HOMES = {
    "sterna.client.aio": ("Session", "connect"),
    "sterna.errors": (
        "AgentError", "Code", "ConfigError", "ConnectionLostError", "ProtocolError", "RefusedError", "SternaError",
        "StorageError", "TrustError", "UsageError",
    ),
    "sterna.protocol.client": ("Gap", "Notice", "Trouble", "Uncertain"),
}  # fmt: skip


if not TYPE_CHECKING:  # a type checker shall know the names above and no others

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for module, names in _HOMES.items():
            if name in names:
                value: object = getattr(import_module(module), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module 'sterna' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
