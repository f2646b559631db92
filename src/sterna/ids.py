"""Names and identifiers: typed, validated once, at the border."""

from __future__ import annotations

import re
from typing import NewType

from sterna.errors import UsageError

SessionUid = NewType("SessionUid", bytes)
"""16 random bytes: a session's real name, the same on every node."""
AttachmentId = NewType("AttachmentId", bytes)
"""16 random bytes: one client process or browser tab."""
NodeId = NewType("NodeId", bytes)
"""32 bytes: SHA-256 of the node's long-lived public key (DER, SubjectPublicKeyInfo)."""
LogId = NewType("LogId", int)
"""u63: one unbroken numbering of a session's output; a new one begins where history was lost."""
DeviceId = NewType("DeviceId", bytes)
"""32 bytes: SHA-256 of a device's public key as it travels."""

UID_BYTES = 16
NODE_ID_BYTES = 32

_TENANT = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}\Z")
_AGENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_UID = re.compile(r"[0-9a-fA-F]{32}\Z")


def check_tenant(text: str) -> str:
    """Returns a tenant's name if it is one: lower-case letters, digits, `.` and `-`, no underscore; else UsageError."""
    if not _TENANT.match(text):
        raise UsageError(
            f"{text[:80]!r} is no tenant name: use 1 to 63 of a-z 0-9 . - (no underscore), a letter or digit first."
        )
    return text


def check_agent(text: str) -> str:
    """Returns an agent's name if it is one: letters, digits, `.`, `_`, `-`; else UsageError."""
    if not _AGENT.match(text):
        raise UsageError(
            f"{text[:80]!r} is no agent name: use 1 to 63 letters, digits, . _ -, a letter or digit first."
        )
    return text


def check_name(text: str) -> str:
    """Returns a session's name if it is one: letters, digits, `.`, `_`, `-`, but no uid; else UsageError."""
    if not _NAME.match(text):
        raise UsageError(
            f"{text[:80]!r} is no session name: use 1 to 63 letters, digits, . _ -, a letter or digit first."
        )
    if uid_of(text) is not None:
        raise UsageError(f"{text!r} is no session name: 32 hex digits are a session's uid, so choose another name.")
    return text


def uid_of(text: str) -> SessionUid | None:
    """Returns the uid that 32 hex digits stand for, None if `text` is anything else."""
    return SessionUid(bytes.fromhex(text)) if _UID.match(text) else None


def split_socket_name(name: str) -> tuple[str, str] | None:
    """Splits a pod socket's file name `{tenant}_{agent}` at its first underscore; None if it is not such a name."""
    tenant, underscore, agent = name.partition("_")
    if underscore and _TENANT.match(tenant) and _AGENT.match(agent):
        return tenant, agent
    return None


def clean_label(text: str, limit: int = 80) -> str:
    """Returns a label or title without control and formatting characters, at most `limit` characters long.

    What other devices call themselves is shown on terminals and pages, so it may not carry escape sequences.
    """
    return "".join(c for c in text if c.isprintable())[:limit]
