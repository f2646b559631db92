"""Ed25519 private keys in files: made on first use, once, whoever comes first."""

from __future__ import annotations

import os

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sterna import paths
from sterna.errors import TrustError
from sterna.trust.leftovers import remove_leftovers

_PREFIX = b"ed25519 "
_SEED_BYTES = 32
_FILE_MAX_BYTES = 256


def load_ed25519(path: str) -> Ed25519PrivateKey:
    """Returns the key in the file at `path`, made with mode 0600 if it is absent.

    The directory is made and checked too. Several processes may call this at once: all get the same key. Raises
    TrustError if the file is open to others or damaged (a damaged key is never replaced silently), StorageError if the
    disk fails.
    """
    # Node and clients come by here when they start: the moment to look what killed ones left in their directory.
    remove_leftovers(paths.private_dir(os.path.dirname(os.path.abspath(path))))
    content = paths.read_private(path, _FILE_MAX_BYTES)
    if content is None:
        with paths.locked(path + ".lock"):
            content = paths.read_private(path, _FILE_MAX_BYTES)
            if content is None:
                content = _PREFIX + os.urandom(_SEED_BYTES).hex().encode("ascii") + b"\n"
                paths.atomic_write(path, content, sync=True)
    seed = _seed(content)
    if seed is None:
        raise TrustError(f"The key in {path} is damaged: restore it, or remove the file to get a new identity.")
    return Ed25519PrivateKey.from_private_bytes(seed)


def _seed(content: bytes) -> bytes | None:
    if not content.startswith(_PREFIX):
        return None
    try:
        seed = bytes.fromhex(content[len(_PREFIX) :].decode("ascii"))
    except ValueError:
        return None
    return seed if len(seed) == _SEED_BYTES else None
