"""sterna.trust.node_identity: an identity that never changes, leaf certificates that come and go."""

from __future__ import annotations

import datetime
import hashlib
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from sterna import paths
from sterna.errors import ConfigError, StorageError, TrustError
from sterna.trust import node_identity
from sterna.trust.certificate import node_id_of, subject_of
from sterna.trust.node_identity import CA_FILE, LEAF_FILE, NodeIdentity
from sterna.trust.pins import CERTIFICATE_FILE, local_pin

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_800_000_000
DAY = 86_400

LOAD = """
import sys
from sterna.trust.node_identity import NodeIdentity
print("ready", flush=True)
sys.stdin.readline()
print(NodeIdentity.load(sys.argv[1], now_s=1_800_000_000).node_id.hex())
"""


def leaf(directory: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates((directory / LEAF_FILE).read_bytes())[0]


def test_first_run_makes_key_and_certificates(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    identity = NodeIdentity.load(str(directory), now_s=NOW)
    authority = x509.load_der_x509_certificate(identity.ca)
    spki = authority.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert identity.node_id == hashlib.sha256(spki).digest() == node_id_of(identity.ca)
    assert authority.subject.rfc4514_string() == f"CN={subject_of(identity.node_id)}"
    assert authority.not_valid_after_utc.year == 9999
    for name in (CA_FILE, LEAF_FILE, CERTIFICATE_FILE):
        assert stat.S_IMODE(os.stat(directory / name).st_mode) == 0o600
    leaf(directory).verify_directly_issued_by(authority)
    assert leaf(directory).not_valid_after_utc == datetime.datetime.fromtimestamp(NOW + 365 * DAY, datetime.UTC)
    # What clients read holds no key.
    assert b"PRIVATE" not in (directory / CERTIFICATE_FILE).read_bytes()
    pin = local_pin(str(directory))
    assert pin is not None
    assert (pin.node_id, pin.ca) == (identity.node_id, identity.ca)
    assert local_pin(str(tmp_path)) is None


def test_names_in_the_leaf(tmp_path: Path) -> None:
    NodeIdentity.load(
        str(tmp_path), ["Build.example", "192.0.2.7", "[2001:DB8::0001]", "fe80::1%eth0", "localhost"], now_s=NOW
    )
    names = leaf(tmp_path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert sorted(names.get_values_for_type(x509.DNSName)) == ["build.example", "localhost"]
    addresses = sorted(str(address) for address in names.get_values_for_type(x509.IPAddress))
    assert addresses == ["127.0.0.1", "192.0.2.7", "2001:db8::1", "::1", "fe80::1"]


@pytest.mark.parametrize("host", ["", " ", "a b", "a\nb", "ü.example", "-x", "x" * 300, "a..b", "a/b", "*"])
def test_impossible_names_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="no host name"):
        NodeIdentity.load(str(tmp_path), [host], now_s=NOW)


def test_too_many_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most"):
        NodeIdentity.load(str(tmp_path), [f"h{number}" for number in range(65)], now_s=NOW)


def test_identity_and_leaf_are_kept(tmp_path: Path) -> None:
    first = NodeIdentity.load(str(tmp_path), ["a.example", "b.example"], now_s=NOW)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    again = NodeIdentity.load(str(tmp_path), ["b.example", "A.example", "a.example"], now_s=NOW + 300 * DAY)
    assert again.node_id == first.node_id
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == files
    assert not again.renew(now_s=NOW + 334 * DAY)


@pytest.mark.parametrize(
    ("days", "hosts", "renewed"),
    [(334, [], False), (336, [], True), (400, [], True), (-2, [], True), (0, ["new.example"], True)],
)
def test_leaf_is_rotated(tmp_path: Path, days: int, hosts: list[str], renewed: bool) -> None:
    first = NodeIdentity.load(str(tmp_path), now_s=NOW)
    before = leaf(tmp_path)
    again = NodeIdentity.load(str(tmp_path), hosts, now_s=NOW + days * DAY)
    assert (leaf(tmp_path) != before) == renewed
    assert (leaf(tmp_path).public_key() != before.public_key()) == renewed
    assert (again.node_id, again.ca) == (first.node_id, first.ca)


def test_renew_while_running(tmp_path: Path) -> None:
    identity = NodeIdentity.load(str(tmp_path), ["a.example"], now_s=NOW)
    before = leaf(tmp_path)
    assert not identity.renew(now_s=NOW + 100 * DAY)
    assert identity.renew(now_s=NOW + 340 * DAY)
    assert leaf(tmp_path) != before
    assert not identity.renew(now_s=NOW + 340 * DAY)


@pytest.mark.parametrize("damage", ["", "junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_damaged_leaf_is_replaced(tmp_path: Path, damage: str) -> None:
    NodeIdentity.load(str(tmp_path), now_s=NOW)
    (tmp_path / LEAF_FILE).write_text(damage)
    NodeIdentity.load(str(tmp_path), now_s=NOW)
    assert leaf(tmp_path).not_valid_after_utc.timestamp() == NOW + 365 * DAY


def test_leaf_of_another_node_is_replaced(tmp_path: Path) -> None:
    one = NodeIdentity.load(str(tmp_path / "one"), now_s=NOW)
    NodeIdentity.load(str(tmp_path / "two"), now_s=NOW)
    (tmp_path / "two" / LEAF_FILE).rename(tmp_path / "one" / LEAF_FILE)
    NodeIdentity.load(str(tmp_path / "one"), now_s=NOW)
    leaf(tmp_path / "one").verify_directly_issued_by(x509.load_der_x509_certificate(one.ca))


@pytest.mark.parametrize("keep", [0, 100, 300, -20])
def test_damaged_identity_is_an_error_and_stays(tmp_path: Path, keep: int) -> None:
    NodeIdentity.load(str(tmp_path), now_s=NOW)
    content = (tmp_path / CA_FILE).read_bytes()[:keep]
    (tmp_path / CA_FILE).write_bytes(content)
    with pytest.raises(TrustError, match="damaged"):
        NodeIdentity.load(str(tmp_path), now_s=NOW)
    assert (tmp_path / CA_FILE).read_bytes() == content


def test_identity_of_mixed_halves_is_an_error(tmp_path: Path) -> None:
    halves = []
    for name in ("one", "two"):
        NodeIdentity.load(str(tmp_path / name), now_s=NOW)
        key, mark, certificate = (tmp_path / name / CA_FILE).read_bytes().partition(b"-----BEGIN CERTIFICATE")
        halves.append((key, mark + certificate))
    (tmp_path / "one" / CA_FILE).write_bytes(halves[0][0] + halves[1][1])
    with pytest.raises(TrustError, match="damaged"):
        NodeIdentity.load(str(tmp_path / "one"), now_s=NOW)


@pytest.mark.parametrize("name", [CA_FILE, LEAF_FILE])
def test_readable_files_and_open_directories_are_refused(tmp_path: Path, name: str) -> None:
    NodeIdentity.load(str(tmp_path), now_s=NOW)
    (tmp_path / name).chmod(0o644)
    with pytest.raises(TrustError, match="open to other users"):
        NodeIdentity.load(str(tmp_path), now_s=NOW)
    (tmp_path / name).chmod(0o600)
    tmp_path.chmod(0o770)
    with pytest.raises(StorageError, match="chmod go-w"):
        NodeIdentity.load(str(tmp_path), now_s=NOW)


def test_processes_that_start_at_once_are_one_node(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(paths.__file__))}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "state")]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        for _ in range(4)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    output = [process.communicate("\n", timeout=30)[0].strip() for process in running]
    assert output == [NodeIdentity.load(str(tmp_path / "state"), now_s=NOW).node_id.hex()] * 4


def test_user_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    identity = NodeIdentity.load(str(tmp_path / "state"), now_s=NOW)
    NodeIdentity.load(str(tmp_path / "other"), now_s=NOW)
    junk = tmp_path / "junk.pem"
    junk.write_text("nothing")
    good = str(tmp_path / "other" / LEAF_FILE)
    for certificate, key in (("/absent.pem", None), (str(junk), None), (good, str(junk)), (good, "/absent.pem")):
        with pytest.raises(ConfigError, match="TLS certificate"):
            identity.server_context(certificate=certificate, key=key)
    # A key that does not belong to the certificate.
    with pytest.raises(ConfigError, match="cannot be used with its key"):
        identity.server_context(certificate=good, key=str(tmp_path / "state" / LEAF_FILE))


def test_key_with_a_pass_phrase_is_an_error_and_no_question(tmp_path: Path) -> None:
    identity = NodeIdentity.load(str(tmp_path / "state"), now_s=NOW)
    path = tmp_path / "other"
    NodeIdentity.load(str(path), now_s=NOW)
    key = serialization.load_pem_private_key((path / LEAF_FILE).read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    with pytest.raises(ConfigError, match="cannot be used with its key"):
        identity.server_context(certificate=str(path / LEAF_FILE), key=str(tmp_path / "locked.pem"))


def test_bounds_fit_together() -> None:
    assert node_identity.RENEW_DAYS < node_identity.LEAF_DAYS
