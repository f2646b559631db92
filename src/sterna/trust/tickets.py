"""One-time share tickets: a random secret for the link, and the hash under which the node remembers it."""

from __future__ import annotations

import hashlib
import os

from sterna.errors import TrustError
from sterna.trust import base64url

TICKET_BYTES = 32
TICKET_CHARS = 43
TICKET_HASH_BYTES = 32


def new_ticket() -> tuple[str, bytes]:
    """Returns a ticket (43 characters, for the link's fragment) and its SHA-256, which is all the node stores."""
    secret = os.urandom(TICKET_BYTES)
    return base64url.encode(secret), hashlib.sha256(secret).digest()


def ticket_hash(text: str) -> bytes:
    """Returns the SHA-256 under which a ticket is stored; raises TrustError if `text` cannot be one.

    Looking up by hash needs no constant-time comparison: what the time tells is about the hash, not the secret.
    """
    secret = base64url.decode(text, TICKET_BYTES)
    if secret is None or len(secret) != TICKET_BYTES:
        raise TrustError("The share ticket is not valid: ask for a new link.")
    return hashlib.sha256(secret).digest()
