"""The remote daemon and its client; the names in `__all__` are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sterna.remote.client import Client
    from sterna.remote.clientprocess import Exit, Gap, Output, Process, ProcessLostError
    from sterna.remote.clientwire import RemoteError

__all__ = ["Client", "Exit", "Gap", "Output", "Process", "ProcessLostError", "RemoteError"]

_HOMES = {
    "client": ("Client",),
    "clientprocess": ("Exit", "Gap", "Output", "Process", "ProcessLostError"),
    "clientwire": ("RemoteError",),
}

if not TYPE_CHECKING:  # a type checker shall know the names above and no others

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for module, names in _HOMES.items():
            if name in names:
                value: object = getattr(import_module(f"sterna.remote.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module 'sterna.remote' has no attribute {name!r}")
