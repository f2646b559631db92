"""The device key: what proves that a client is the installation that opened a session (docs/protocol.md, section 4)."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sterna import paths
from sterna.errors import StorageError, TrustError, UsageError
from sterna.ids import NODE_ID_BYTES, DeviceId, NodeId
from sterna.limits import PAYLOAD_MAX_BYTES, POSITION_MAX
from sterna.trust.keyfile import load_ed25519

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CONNECT = "clawterm/1 CONNECT"
RESUME = "clawterm/1 RESUME"

ED25519 = 1
P256 = 2
SIGNATURE_BYTES = 64
ED25519_PUBLIC_BYTES = 1 + 32
P256_PUBLIC_BYTES = 1 + 65

KEY_FILE = "device.key"
COUNTER_FILE = "device.counter"
_COUNTER_FILE_MAX_BYTES = 32
# What a node may make us jump to leaves room for 2**40 more connections below the largest number on the wire.
COUNTER_RAISE_MAX = POSITION_MAX - (1 << 40)

# The Ed25519 points of small order in each encoding, without the sign bit (libsodium, ge25519_has_small_order): with
# such a key anybody can make signatures, so a stolen uid would be enough.
_WEAK_ED25519 = frozenset(
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)

_CONTEXTS = {CONNECT: CONNECT.encode("ascii"), RESUME: RESUME.encode("ascii")}


class DeviceKey:
    """The private key of one client installation; `public` is its wire form (an algorithm byte and the raw key)."""

    __slots__ = ("_private", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = bytes((ED25519,)) + private.public_key().public_bytes_raw()

    @classmethod
    def load(cls, directory: str) -> DeviceKey:
        """Returns the key of the installation whose state is in `directory`, made on first use.

        Raises TrustError if the file is open to others or damaged, StorageError if the disk fails.
        """
        return cls(load_ed25519(os.path.join(directory, KEY_FILE)))

    @property
    def id(self) -> DeviceId:
        """What nodes call this device: SHA-256 of `public`."""
        return device_id(self.public)

    def sign(self, context: str, node_id: NodeId, body: bytes) -> bytes:
        """Returns the 64-byte signature over context, node id and body; `context` is `CONNECT` or `RESUME`."""
        return self._private.sign(_signed(context, node_id, body))


def _signed(context: str, node_id: bytes, body: bytes) -> bytes:
    """Joins what is signed; unambiguous: no context is the beginning of another, and a node id's length is fixed."""
    prefix = _CONTEXTS.get(context)
    if prefix is None:
        raise UsageError(f"{context[:40]!r} is not a context of signatures: use CONNECT or RESUME.")
    if len(node_id) != NODE_ID_BYTES or len(body) > PAYLOAD_MAX_BYTES:
        raise UsageError(f"A signature covers a node id of 32 bytes and a body of at most {PAYLOAD_MAX_BYTES} bytes.")
    return prefix + node_id + body


def verify(public: bytes, context: str, node_id: NodeId, body: bytes, signature: bytes) -> bool:
    """Tells whether `signature` is the one of the device `public` over context, node id and body.

    `public`, `body` and `signature` come from a peer: whatever they are, the answer is True or False. Raises UsageError
    only if `context` or `node_id`, which are the caller's own, make no sense.
    """
    if len(body) > PAYLOAD_MAX_BYTES or len(signature) != SIGNATURE_BYTES or not public:
        return False
    message = _signed(context, node_id, body)
    try:
        if public[0] == ED25519 and len(public) == ED25519_PUBLIC_BYTES:
            if public[1:-1] + bytes((public[-1] & 0x7F,)) in _WEAK_ED25519:
                return False
            Ed25519PublicKey.from_public_bytes(public[1:]).verify(signature, message)
            return True
        if public[0] == P256 and len(public) == P256_PUBLIC_BYTES:
            return _verify_p256(public[1:], message, signature)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        pass
    return False


def _verify_p256(point: bytes, message: bytes, signature: bytes) -> bool:
    """Checks what WebCrypto's ECDSA P-256 with SHA-256 gives: r and s, 32 bytes each, big-endian (no DER)."""
    # Imported here: only nodes verify, and only browsers without Ed25519 need it.
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    return True


def device_id(public: bytes) -> DeviceId:
    """Returns the name of a device: SHA-256 of its public key in wire form."""
    return DeviceId(hashlib.sha256(public).digest())


def nobody() -> bytes:
    """Returns the public key, in wire form, of a device that does not exist: its private key is forgotten at once."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return bytes((ED25519,)) + Ed25519PrivateKey.generate().public_key().public_bytes_raw()


def next_counter(directory: str, wall_ns: int) -> int:
    """Returns the counter for the next RESUME, max(stored + 1, `wall_ns`), and stores it; no two calls get the same.

    A lost or damaged file counts as 0: the wall clock, or the node's ERROR `stale`, puts it right (section 4).
    Raises StorageError if the disk fails, TrustError if there is no larger number.
    """
    path = os.path.join(directory, COUNTER_FILE)
    with paths.locked(path + ".lock"):
        value = max(_stored_counter(path) + 1, wall_ns)
        if value > POSITION_MAX:
            raise TrustError(f"The counter in {path} is used up: remove it and {KEY_FILE} to get a new identity.")
        try:
            paths.atomic_write(path, b"%d\n" % value)
        except StorageError:
            # On a full disk the wall clock has to do: nobody is kept from a session that could make room.
            if value != wall_ns:
                raise
        return value


def raise_counter(directory: str, at_least: int) -> None:
    """Makes the next counter larger than `at_least`, the number in an ERROR `stale`.

    Raises TrustError if it is absurdly large: a node must not be able to use up the counter for all other nodes.
    """
    if not 0 <= at_least <= COUNTER_RAISE_MAX:
        raise TrustError("The node claims a counter that no device can have reached: it is broken or hostile.")
    path = os.path.join(directory, COUNTER_FILE)
    with paths.locked(path + ".lock"):
        if at_least > _stored_counter(path):
            paths.atomic_write(path, b"%d\n" % at_least)


def _stored_counter(path: str) -> int:
    content = paths.read_private(path, _COUNTER_FILE_MAX_BYTES)
    text = (content or b"").strip()
    value = int(text) if text.isdigit() else 0
    return value if value <= POSITION_MAX else 0
