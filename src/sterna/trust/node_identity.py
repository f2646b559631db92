"""Who a node is: a long-lived key that acts as a small certificate authority, and short-lived certificates below it.

Node id = SHA-256 of that key (docs/protocol.md, section 4), so leaf certificates may be rotated at any time without
anybody noticing. Only nodes import this module: it needs cryptography.x509, which is slow to load.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import re
import ssl
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sterna import paths
from sterna.errors import ConfigError, TrustError
from sterna.ids import NodeId
from sterna.trust.certificate import subject_of
from sterna.trust.pins import CERTIFICATE_FILE
from sterna.trust.tls import ALPN, harden

if TYPE_CHECKING:
    from collections.abc import Sequence

CA_FILE = "node-ca.pem"
LEAF_FILE = "node-leaf.pem"
CHAIN_FILE = "node-chain.pem"
LOCK_FILE = "node-ca.lock"

HOSTS_MAX = 64
HOST_MAX_CHARS = 253
LEAF_DAYS = 365
RENEW_DAYS = 30
_FILE_MAX_BYTES = 64 * 1024
_USER_FILE_MAX_BYTES = 1024 * 1024
_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\Z")
_ALWAYS = ("localhost", "127.0.0.1", "::1")
_UTC = datetime.UTC
# RFC 5280, section 4.1.2.5: what has no well-defined end of validity. It begins early because some clocks are wrong.
_CA_FROM = datetime.datetime(2020, 1, 1, tzinfo=_UTC)
_CA_UNTIL = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=_UTC)


class NodeIdentity:
    """A node's key, its id and its current leaf certificate, kept in the node's state directory.

    `node_id` is its name for ever, `ca` its own certificate in DER (what clients pin).
    """

    __slots__ = ("_authority", "_ca_pem", "_directory", "_hosts", "_key", "ca", "node_id")

    def __init__(
        self, directory: str, key: ec.EllipticCurvePrivateKey, authority: x509.Certificate, hosts: tuple[str, ...]
    ) -> None:
        self._directory = directory
        self._key = key
        self._authority = authority
        self._hosts = hosts
        self._ca_pem = authority.public_bytes(serialization.Encoding.PEM)
        self.ca = authority.public_bytes(serialization.Encoding.DER)
        self.node_id = _key_id(key.public_key())

    @classmethod
    def load(cls, directory: str, hosts: Sequence[str] = (), *, now_s: int) -> NodeIdentity:
        """Returns the identity kept in `directory`, made on first use, and a certificate for `hosts` and loopback.

        `now_s` is Unix time in seconds. Several processes may call it at once. Raises TrustError if a file is open to
        others or damaged (an identity is never replaced silently), ConfigError for impossible host names.
        """
        directory = paths.private_dir(directory)
        names = _host_names(hosts)
        with paths.locked(os.path.join(directory, LOCK_FILE)):
            path = os.path.join(directory, CA_FILE)
            content = paths.read_private(path, _FILE_MAX_BYTES)
            if content is None:
                content = _new_authority()
                paths.atomic_write(path, content, sync=True)
            key, authority = _parse_authority(content, path)
            identity = cls(directory, key, authority, names)
            identity._renew(now_s)
            identity._publish()
        return identity

    def _publish(self) -> None:
        """Writes our own certificate where local clients look for it, so that they need no first meeting."""
        path = os.path.join(self._directory, CERTIFICATE_FILE)
        if paths.read_private(path, _FILE_MAX_BYTES) != self._ca_pem:
            paths.atomic_write(path, self._ca_pem)

    def renew(self, *, now_s: int) -> bool:
        """Makes a new leaf certificate if the present one ends within 30 days; call it daily.

        Returns True if there is a new one: then listeners take a fresh `server_context`.
        """
        with paths.locked(os.path.join(self._directory, LOCK_FILE)):
            return self._renew(now_s)

    def _renew(self, now_s: int) -> bool:
        path = os.path.join(self._directory, LEAF_FILE)
        now = datetime.datetime.fromtimestamp(now_s, _UTC)
        content = paths.read_private(path, _FILE_MAX_BYTES)
        if content is not None and self._is_good(content, now):
            return False
        paths.atomic_write(path, self._new_leaf(now) + self._ca_pem, sync=True)
        return True

    def _is_good(self, content: bytes, now: datetime.datetime) -> bool:
        """Tells whether the leaf file holds key and certificate for our hosts, from our key, for 30 more days."""
        try:
            key = serialization.load_pem_private_key(content, None)
            leaf, *_ = x509.load_pem_x509_certificates(content)
            leaf.verify_directly_issued_by(self._authority)
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
            # Whatever is wrong with it, it is ours to replace: nobody depends on a leaf.
            return False
        return (
            key.public_key() == leaf.public_key()
            and names == _alternative_names(self._hosts)
            and leaf.not_valid_before_utc <= now
            and leaf.not_valid_after_utc - now > datetime.timedelta(days=RENEW_DAYS)
        )

    def _new_leaf(self, now: datetime.datetime) -> bytes:
        """Returns a fresh key and a certificate for it, in PEM; from a day ago, for clocks that are behind."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sterna node")]), self._authority.subject)
            .public_key(key.public_key())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=LEAF_DAYS))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_alternative_names(self._hosts), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(key, certificate)

    def server_context(
        self, *, certificate: str | None = None, key: str | None = None, alpn: tuple[str, ...] = (ALPN,)
    ) -> ssl.SSLContext:
        """Returns a server's TLS 1.3 context without session tickets, which presents our leaf certificate and our own.

        With `certificate` and `key` (paths of PEM files the user has from a public authority) it presents those, and
        our own certificate after them: clients that verify the chain by the system's authorities learn the node id so.
        Raises ConfigError if these files cannot be used, TrustError if ours cannot.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        harden(context, alpn)
        context.num_tickets = 0
        if certificate is None:
            path = os.path.join(self._directory, LEAF_FILE)
            try:
                context.load_cert_chain(path, password=_no_password)
            except (OSError, ssl.SSLError) as error:
                raise TrustError(f"The certificate in {path} is damaged: remove it, start the node again.") from error
            return context
        path = self._user_chain(certificate)
        try:
            context.load_cert_chain(path, key if key is not None else certificate, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"The TLS certificate {certificate} cannot be used with its key {key or certificate}: {_reason(error)}."
            ) from error
        return context

    def _user_chain(self, certificate: str) -> str:
        """Writes the user's certificates and our own into one file, as OpenSSL takes a chain from one file only."""
        try:
            with open(certificate, "rb") as file:
                content = file.read(_USER_FILE_MAX_BYTES + 1)
            if len(content) > _USER_FILE_MAX_BYTES:
                raise ConfigError(f"The TLS certificate {certificate} is larger than {_USER_FILE_MAX_BYTES} bytes.")
            chain = x509.load_pem_x509_certificates(content)
        except OSError as error:
            raise ConfigError(f"The TLS certificate {certificate} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(f"The TLS certificate {certificate} holds no certificate in PEM format.") from error
        pem = b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain)
        path = os.path.join(self._directory, CHAIN_FILE)
        if paths.read_private(path, 4 * _USER_FILE_MAX_BYTES) != pem + self._ca_pem:
            paths.atomic_write(path, pem + self._ca_pem)
        return path


def _no_password() -> str:
    """Answers OpenSSL's question for a pass phrase; without an answer it would ask on the terminal and block."""
    return ""


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or "it is not a key and certificate in PEM format"


def _key_id(public: ec.EllipticCurvePublicKey) -> NodeId:
    encoded = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return NodeId(hashlib.sha256(encoded).digest())


def _new_authority() -> bytes:
    """Returns a fresh key and its self-signed certificate, in PEM, in one file so that both appear at once."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Each node's name is its own: chains of different nodes must not look alike.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject_of(_key_id(key.public_key())))])
    certificate = (
        _builder(name, name)
        .public_key(key.public_key())
        .not_valid_before(_CA_FROM)
        .not_valid_after(_CA_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(key, certificate)


def _parse_authority(content: bytes, path: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = serialization.load_pem_private_key(content, None)
        authority, *_ = x509.load_pem_x509_certificates(content)
    except (ValueError, TypeError) as error:
        raise _damaged(path) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != authority.public_key():
        raise _damaged(path)
    return key, authority


def _damaged(path: str) -> TrustError:
    return TrustError(
        f"The node's key in {path} is damaged: restore it from a backup, or remove it to become a new node that every "
        "client must trust anew."
    )


def _builder(subject: x509.Name, issuer: x509.Name) -> x509.CertificateBuilder:
    serial = x509.random_serial_number()
    return x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).serial_number(serial)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bytes:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def _host_names(hosts: Sequence[str]) -> tuple[str, ...]:
    """Returns the hosts and loopback, sorted, each once; raises ConfigError if one cannot be in a certificate."""
    if len(hosts) > HOSTS_MAX:
        raise ConfigError(f"A node's certificate takes at most {HOSTS_MAX} host names.")
    names = dict.fromkeys(_ALWAYS)
    for host in hosts:
        name = host.strip().lower().strip("[]").partition("%")[0]
        try:
            name = str(ipaddress.ip_address(name))
        except ValueError:
            if len(name) > HOST_MAX_CHARS or not _HOST.match(name):
                raise ConfigError(f"{host[:80]!r} is no host name or address for a certificate.") from None
        names[name] = None
    return tuple(sorted(names))


def _alternative_names(hosts: tuple[str, ...]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)
