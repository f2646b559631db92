"""A walk over an X.509 certificate to its public key, so that clients get a node id without an X.509 library.

Strict DER (X.690, section 10): every length definite and minimal, every byte accounted for. A walker that is more
lenient than OpenSSL, or lenient in another way, could be shown one key while OpenSSL checks another.
"""

from __future__ import annotations

import hashlib

from sterna.errors import TrustError
from sterna.ids import NodeId

CERTIFICATE_MAX_BYTES = 16_384
_SEQUENCE, _INTEGER, _VERSION = 0x30, 0x02, 0xA0
# TBSCertificate up to the public key (RFC 5280, section 4.1): serial, algorithm, issuer, validity, subject, key.
_FIELDS = (_INTEGER, _SEQUENCE, _SEQUENCE, _SEQUENCE, _SEQUENCE, _SEQUENCE)


def node_id_of(certificate: bytes) -> NodeId:
    """Returns SHA-256 of the SubjectPublicKeyInfo of a certificate in DER; raises TrustError if it is none."""
    return NodeId(hashlib.sha256(public_key_of(certificate)).digest())


def subject_of(node_id: NodeId) -> str:
    """Returns the common name in a node's own certificate: it tells that certificate from all others in a chain."""
    return f"Sterna node {node_id.hex()[:16]}"


def public_key_of(certificate: bytes) -> bytes:
    """Returns the SubjectPublicKeyInfo (DER, with its header) of a certificate in DER.

    Raises TrustError if it is none, or larger than 16 KiB.
    """
    if len(certificate) > CERTIFICATE_MAX_BYTES:
        raise TrustError(
            f"The other side's certificate has more than {CERTIFICATE_MAX_BYTES} bytes: no node's is so large."
        )
    start, end = _element(certificate, 0, len(certificate), _SEQUENCE)
    if end != len(certificate):
        raise _malformed()
    position, end = _element(certificate, start, end, _SEQUENCE)
    if position < end and certificate[position] == _VERSION:
        position = _element(certificate, position, end, _VERSION)[1]
    begin = position
    for tag in _FIELDS:
        begin, position = position, _element(certificate, position, end, tag)[1]
    return certificate[begin:position]


def _element(data: bytes, position: int, end: int, tag: int) -> tuple[int, int]:
    """Returns where the content of the element at `position` starts and ends; it must have this tag, and fit."""
    if end - position < 2 or data[position] != tag:
        raise _malformed()
    length = data[position + 1]
    start = position + 2
    if length >= 0x80:
        count = length & 0x7F
        # Certificates are at most 16 KiB: two bytes of length are enough, and the indefinite form (0x80) is not DER.
        if count not in (1, 2) or end - start < count:
            raise _malformed()
        length = int.from_bytes(data[start : start + count], "big")
        start += count
        if length < (0x80 if count == 1 else 0x100):
            raise _malformed()
    if length > end - start:
        raise _malformed()
    return start, start + length


def _malformed() -> TrustError:
    return TrustError("The other side's certificate is not a well-formed X.509 certificate: it cannot be trusted.")
