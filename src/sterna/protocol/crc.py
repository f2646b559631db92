"""CRC-16/UMTS over frames (docs/protocol.md, section 1)."""

from __future__ import annotations

from fastcrc.crc16 import umts as crc16

__all__ = ["crc16"]
