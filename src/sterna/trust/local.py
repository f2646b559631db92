"""Trust on one machine: who can read a node's private state directory may use everything of its tenant `local`."""

from __future__ import annotations

import os

from sterna import paths
from sterna.errors import TrustError
from sterna.trust import base64url

LOCAL_TENANT = "local"
LOCAL_FILE = "local.token"
_PREFIX = "lt1."
_SECRET_BYTES = 32
_FILE_MAX_BYTES = 128


def create_local_token(directory: str) -> str:
    """Returns the node's local token, made on first use in its state directory (0600, once, whoever comes first).

    Raises TrustError if the file is open to others or damaged, StorageError if the disk fails.
    """
    directory = paths.private_dir(directory)
    path = os.path.join(directory, LOCAL_FILE)
    token = read_local_token(directory)
    if token is None:
        with paths.locked(path + ".lock"):
            token = read_local_token(directory)
            if token is None:
                token = _PREFIX + base64url.encode(os.urandom(_SECRET_BYTES))
                paths.atomic_write(path, token.encode("ascii") + b"\n", sync=True)
    return token


def read_local_token(directory: str) -> str | None:
    """Returns the local token of the node whose state is in `directory`, or None if there is none.

    Raises TrustError if the file is open to others or damaged.
    """
    path = os.path.join(directory, LOCAL_FILE)
    content = paths.read_private(path, _FILE_MAX_BYTES)
    if content is None:
        return None
    text = content.decode("ascii", "replace").strip()
    secret = base64url.decode(text[len(_PREFIX) :], _SECRET_BYTES) if text.startswith(_PREFIX) else None
    if secret is None or len(secret) != _SECRET_BYTES:
        raise TrustError(f"The token in {path} is damaged: remove the file and start the node again.")
    return text
