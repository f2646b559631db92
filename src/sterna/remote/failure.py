"""How a mode ends when it cannot do its work."""

from __future__ import annotations

from sterna.errors import SternaError


class StartError(SternaError):
    """The program ends with status 1 after printing `claustrum: ` and this text, which the contract fixes."""
