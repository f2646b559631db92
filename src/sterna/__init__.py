"""Sterna hosts agent and terminal sessions that survive everything."""

from __future__ import annotations

__version__ = "0.1.0"
