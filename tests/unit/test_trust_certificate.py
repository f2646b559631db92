"""sterna.trust.certificate and fingerprint: a node id from a certificate, without an X.509 library."""

from __future__ import annotations

import datetime
import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from sterna.errors import TrustError, UsageError
from sterna.ids import NodeId
from sterna.trust.certificate import CERTIFICATE_MAX_BYTES, node_id_of, public_key_of
from sterna.trust.fingerprint import fingerprint, parse_fingerprint

NODE = NodeId(bytes(range(32)))
DER = serialization.Encoding.DER
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def certificate(key: Key, names: int = 1) -> bytes:
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.ORGANIZATIONAL_UNIT_NAME, "u" * 60)] * names)
    return (
        x509.CertificateBuilder()
        .subject_name(subject).issuer_name(subject).serial_number(1 << 150).public_key(key.public_key())
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
        .public_bytes(DER)
    )  # fmt: skip


def test_public_keys_of_all_kinds_and_sizes() -> None:
    keys: list[Key] = [ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate(),
                       rsa.generate_private_key(65537, 2048)]  # fmt: skip
    for key in keys:
        spki = key.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        for names in (1, 3, 60):
            der = certificate(key, names)
            assert public_key_of(der) == spki
            assert node_id_of(der) == hashlib.sha256(spki).digest()


def test_every_truncation_and_any_addition_is_refused() -> None:
    der = certificate(ec.generate_private_key(ec.SECP256R1()))
    for length in range(len(der)):
        with pytest.raises(TrustError):
            node_id_of(der[:length])
    with pytest.raises(TrustError):
        node_id_of(der + b"\0")
    with pytest.raises(TrustError, match="more than"):
        node_id_of(der + bytes(CERTIFICATE_MAX_BYTES))


@pytest.mark.parametrize(
    "der",
    [
        b"", b"0", b"0\x00", b"\x30\x80\x30\x00\x00\x00", b"\x30\x81\x05" + bytes(5), b"\x30\x82\x00\x90" + bytes(0x90),
        b"\x30\x84\x00\x00\x00\x02\x30\x00", b"\x30\x88" + b"\xff" * 8, b"\x30\x02\x30\x00", b"\x31\x02\x30\x00",
        b"\x30\x7f" + b"\x30" * 127, b"\x30\x03\x30\x7f\x00",
    ],
)  # fmt: skip
def test_what_is_not_der_is_refused(der: bytes) -> None:
    with pytest.raises(TrustError):
        public_key_of(der)


def test_fingerprint_is_pinned_and_comes_back() -> None:
    shown = fingerprint(NODE)
    assert shown == "aaaq-eaye-auda-ocaj-bifq-ydio-b4ib-ceqt-cqkr-mfyy-denb-wha5-dypq"
    for form in (shown, shown.upper(), shown.replace("-", ""), shown.replace("-", " "), f" {shown}\n", NODE.hex(),
                 NODE.hex().upper(), NODE.hex(":")):  # fmt: skip
        assert parse_fingerprint(form) == NODE


def test_fingerprint_is_base32_of_rfc_4648() -> None:
    import base64

    for node in (NODE, NodeId(bytes(32)), NodeId(b"\xff" * 32)):
        assert fingerprint(node).replace("-", "") == base64.b32encode(node).decode().rstrip("=").lower()


@pytest.mark.parametrize("text", ["", "x", "-" * 200, "a" * 51, "a" * 53, "1" * 52, "a" * 51 + "b", "g" * 64, "0" * 63,
                                  "ä" * 52, "a" * 10_000])  # fmt: skip
def test_junk_is_no_fingerprint(text: str) -> None:
    with pytest.raises(UsageError, match="fingerprint"):
        parse_fingerprint(text)
