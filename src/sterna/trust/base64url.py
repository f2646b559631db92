"""Base64 for URLs without padding (RFC 4648, section 5), strict: one text for each byte string."""

from __future__ import annotations

import binascii

_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")


def encode(data: bytes) -> str:
    """Returns `data` in base64url without padding."""
    return binascii.b2a_base64(data, newline=False).rstrip(b"=").translate(_TO_URL).decode("ascii")


def decode(text: str, max_bytes: int) -> bytes | None:
    """Returns what `text` encodes, or None if it is not exactly what `encode` gives, or longer than `max_bytes`.

    Being strict matters: a lenient decoder would accept several texts for one token.
    """
    if len(text) > (max_bytes * 4 + 2) // 3 or not text.isascii():
        return None
    raw = text.encode("ascii").translate(_FROM_URL)
    try:
        data = binascii.a2b_base64(raw + b"=" * (-len(raw) % 4), strict_mode=True)
    except binascii.Error:
        return None
    return data if encode(data) == text else None
