"""sterna.trust.device: one key per installation whoever comes first, pinned signatures, a counter that only rises."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sterna import paths
from sterna.errors import StorageError, TrustError, UsageError
from sterna.ids import NodeId
from sterna.limits import PAYLOAD_MAX_BYTES, POSITION_MAX
from sterna.trust import device
from sterna.trust.device import CONNECT, RESUME, DeviceKey, device_id, next_counter, raise_counter, verify

if TYPE_CHECKING:
    from pathlib import Path

NODE = NodeId(bytes(range(32)))
BODY = b"body"
# RFC 8032, section 7.1, test 1.
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
ED25519 = b"\x01" + bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
CONNECT_SIGNATURE = bytes.fromhex(
    "4b7f8f62c442680e1c1c8069dd2b76cc3f2218101b12d27fc61d854e79ecc146"
    "097155ead17ca3e1025d8fc3549913ba8cd88bbdd4136b7492536843c21fda07"
)
RESUME_SIGNATURE = bytes.fromhex(
    "2681b362846e3c65751835cba019bfafc7b146cfece549028d7bece1dbf5c3f9"
    "294cedf3d32b1a480d1e23c5015c92277d24d0011e2778c9452e429121e42002"
)
# RFC 6979, appendix A.2.5: key, and signature of "sample" with SHA-256.
POINT = b"\x04" + bytes.fromhex(
    "60fed4ba255a9d31c961eb74c6356d68c049b8923b61fa6ce669622e60f29fb6"
    "7903fe1008b8bc99a41ae9e95628bc64f2f1b20c2d7e9f5177a3c294d4462299"
)
SAMPLE_SIGNATURE = bytes.fromhex(
    "efd48b2aacb6a8fd1140dd9cd45e81d69d2c877b56aaf991c34d0ea84eaf3716"
    "f7cb1c942d657c41d436c7a1b6e29f65f3e900dbb9aff4064dc4ab2f843acda8"
)
# The same key over our own CONNECT message, by RFC 6979 too.
P256 = b"\x02" + POINT
P256_SIGNATURE = bytes.fromhex(
    "241af1ac52b314427433df1136a9994abafcce6c79f3c937ce6ccc0b0ab72817"
    "af98d4ff3441ef33f5c6750ffaa765ef7153482080514d50d4eda739302ad7bd"
)
VECTORS = [(ED25519, CONNECT_SIGNATURE), (P256, P256_SIGNATURE)]
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

LOAD = """
import sys
from sterna.trust.device import DeviceKey
print("ready", flush=True)
sys.stdin.readline()
print(DeviceKey.load(sys.argv[1]).public.hex())
"""
COUNT = """
import sys
from sterna.trust.device import next_counter
print("ready", flush=True)
sys.stdin.readline()
print(*(next_counter(sys.argv[1], 1_000) for _ in range(50)))
"""


def race(code: str, directory: Path, processes: int) -> list[str]:
    """Runs the program in several processes that all begin at once, and returns the last line of each."""
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(paths.__file__))}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ,
        )
        for _ in range(processes)
    ]  # fmt: skip
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    output = [process.communicate(timeout=30)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return [text.strip().splitlines()[-1] for text in output]


def test_signatures_are_pinned() -> None:
    key = DeviceKey(Ed25519PrivateKey.from_private_bytes(SEED))
    assert key.public == ED25519
    assert key.sign(CONNECT, NODE, BODY) == CONNECT_SIGNATURE
    assert key.sign(RESUME, NODE, BODY) == RESUME_SIGNATURE
    assert key.id == device_id(ED25519) == hashlib.sha256(ED25519).digest()


def test_p256_vector_of_rfc_6979() -> None:
    assert device._verify_p256(POINT, b"sample", SAMPLE_SIGNATURE)


@pytest.mark.parametrize(("public", "signature"), VECTORS)
def test_verify_takes_exactly_what_was_signed(public: bytes, signature: bytes) -> None:
    assert verify(public, CONNECT, NODE, BODY, signature)
    assert not verify(public, RESUME, NODE, BODY, signature)
    assert not verify(public, CONNECT, NodeId(bytes(32)), BODY, signature)
    assert not verify(public, CONNECT, NODE, BODY + b"\0", signature)
    assert not verify(public, CONNECT, NODE, b"", signature)


@pytest.mark.parametrize(("public", "signature"), VECTORS)
def test_every_flipped_bit_of_key_and_signature_is_refused(public: bytes, signature: bytes) -> None:
    for bit in range(len(signature) * 8):
        changed = (int.from_bytes(signature, "big") ^ 1 << bit).to_bytes(len(signature), "big")
        assert not verify(public, CONNECT, NODE, BODY, changed), f"bit {bit} of the signature"
    for bit in range(len(public) * 8):
        changed = (int.from_bytes(public, "big") ^ 1 << bit).to_bytes(len(public), "big")
        assert not verify(changed, CONNECT, NODE, BODY, signature), f"bit {bit} of the key"


@pytest.mark.parametrize("public", [b"", b"\x01", b"\x02", b"\x00" * 33, b"\x03" + ED25519[1:], ED25519 + b"\0",
                                    b"\x02" + POINT[:33], b"\x02\x03" + POINT[1:33], b"\x02" + bytes(65),
                                    b"\x02\x04" + b"\xff" * 64, b"\x01" + b"\xff" * 32, b"\x01" * 100_000])  # fmt: skip
def test_junk_keys_are_refused(public: bytes) -> None:
    for signature in (CONNECT_SIGNATURE, P256_SIGNATURE, b"", bytes(64), bytes(1_000_000)):
        assert not verify(public, CONNECT, NODE, BODY, signature)


@pytest.mark.parametrize("sign", [0, 0x80])
@pytest.mark.parametrize("number", range(7))
def test_keys_with_which_anybody_can_sign_are_refused(number: int, sign: int) -> None:
    point = bytearray(sorted(device._WEAK_ED25519)[number])
    point[31] |= sign
    # R the neutral element and S zero hold whenever the hash is a multiple of the key's order: of 200 messages some do.
    forged = b"\x01" + bytes(63)
    taken = 0
    for body in (bytes((byte,)) for byte in range(200)):
        assert not verify(b"\x01" + bytes(point), CONNECT, NODE, body, forged)
        try:
            Ed25519PublicKey.from_public_bytes(bytes(point)).verify(forged, CONNECT.encode() + NODE + body)
        except InvalidSignature:
            continue
        taken += 1
    # The control: the library itself takes them.
    assert taken > 0


@pytest.mark.parametrize(
    ("r", "s"), [(0, 0), (0, 1), (1, 0), (P256_ORDER, 1), (1, P256_ORDER), (2**256 - 1, 2**256 - 1)]
)
def test_p256_signatures_out_of_range_are_refused(r: int, s: int) -> None:
    assert not verify(P256, CONNECT, NODE, BODY, r.to_bytes(32, "big") + s.to_bytes(32, "big"))


def test_a_der_signature_is_refused() -> None:
    # WebCrypto gives r and s raw; two encodings of one signature would be one too many.
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    r, s = (int.from_bytes(P256_SIGNATURE[start : start + 32], "big") for start in (0, 32))
    assert not verify(P256, CONNECT, NODE, BODY, encode_dss_signature(r, s))


def test_bodies_are_bounded() -> None:
    key = DeviceKey(Ed25519PrivateKey.from_private_bytes(SEED))
    largest = bytes(PAYLOAD_MAX_BYTES)
    signature = key.sign(CONNECT, NODE, largest)
    assert verify(ED25519, CONNECT, NODE, largest, signature)
    assert not verify(ED25519, CONNECT, NODE, largest + b"\0", signature)
    for context, node, body in (
        ("other", NODE, BODY), (CONNECT, NodeId(NODE[:31]), BODY), (CONNECT, NODE, largest + b"\0")
    ):  # fmt: skip
        with pytest.raises(UsageError):
            key.sign(context, node, body)


def test_key_is_made_once_and_kept(tmp_path: Path) -> None:
    directory = str(tmp_path / "state")
    first = DeviceKey.load(directory)
    assert DeviceKey.load(directory).public == first.public
    assert DeviceKey.load(str(tmp_path / "other")).public != first.public
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(f"{directory}/{device.KEY_FILE}").st_mode) == 0o600
    assert sorted(os.listdir(directory)) == [device.KEY_FILE, f"{device.KEY_FILE}.lock"]
    assert verify(first.public, RESUME, NODE, BODY, DeviceKey.load(directory).sign(RESUME, NODE, BODY))


def test_processes_that_start_at_once_get_one_key(tmp_path: Path) -> None:
    keys = race(LOAD, tmp_path / "state", 8)
    assert keys == [DeviceKey.load(str(tmp_path / "state")).public.hex()] * 8


@pytest.mark.parametrize("content", [b"", b"ed25519 ", b"ed25519 00", b"x" * 64, SEED, b"ed25519 " + b"zz" * 32,
                                     b"ed25519 \xff" + b"0" * 63, b"ed25519 " + b"00" * 33])  # fmt: skip
def test_damaged_key_is_an_error_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / device.KEY_FILE
    paths.atomic_write(str(path), content)
    with pytest.raises(TrustError, match="damaged"):
        DeviceKey.load(str(tmp_path))
    assert path.read_bytes() == content


def test_readable_or_foreign_places_are_refused(tmp_path: Path) -> None:
    DeviceKey.load(str(tmp_path))
    (tmp_path / device.KEY_FILE).chmod(0o640)
    with pytest.raises(TrustError, match="open to other users"):
        DeviceKey.load(str(tmp_path))
    (tmp_path / device.KEY_FILE).chmod(0o600)
    tmp_path.chmod(0o770)
    with pytest.raises(StorageError, match="chmod go-w"):
        DeviceKey.load(str(tmp_path))


def test_counter_is_the_wall_clock_or_one_more(tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert next_counter(directory, 1_000) == 1_000
    assert next_counter(directory, 1_000) == 1_001
    assert next_counter(directory, 500) == 1_002
    assert next_counter(directory, 2_000) == 2_000


def test_counter_follows_stale(tmp_path: Path) -> None:
    directory = str(tmp_path)
    raise_counter(directory, 5_000)
    assert next_counter(directory, 1_000) == 5_001
    raise_counter(directory, 10)
    assert next_counter(directory, 1_000) == 5_002


def test_a_node_cannot_use_up_the_counter(tmp_path: Path) -> None:
    directory = str(tmp_path)
    for value in (-1, device.COUNTER_RAISE_MAX + 1, POSITION_MAX, 1 << 64):
        with pytest.raises(TrustError, match="hostile"):
            raise_counter(directory, value)
    raise_counter(directory, device.COUNTER_RAISE_MAX)
    assert next_counter(directory, 0) == device.COUNTER_RAISE_MAX + 1


def test_counter_ends_with_an_error(tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert next_counter(directory, POSITION_MAX) == POSITION_MAX
    with pytest.raises(TrustError, match="used up"):
        next_counter(directory, 0)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"-5", b"abc", b"9" * 30])
def test_damaged_counter_counts_as_nothing(tmp_path: Path, content: bytes) -> None:
    paths.atomic_write(str(tmp_path / device.COUNTER_FILE), content)
    assert next_counter(str(tmp_path), 77) == 77


def test_no_two_processes_get_one_counter(tmp_path: Path) -> None:
    values = [int(value) for line in race(COUNT, tmp_path, 4) for value in line.split()]
    assert sorted(values) == list(range(1_000, 1_200))
