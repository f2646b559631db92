"""The code against docs/vectors.json, the bytes that other implementations are held to as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sterna.errors import Code
from sterna.ids import NodeId
from sterna.protocol import messages
from sterna.protocol.codec import Decoder
from sterna.protocol.compress import decompress
from sterna.protocol.crc import crc16
from sterna.protocol.frame import MAGIC, Type, encode, expand
from sterna.trust import device

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs/vectors.json").read_text(encoding="utf-8"))
SAFE = (1 << 53) - 1


def cases(section: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", VECTORS[section], ids=lambda case: case.get("name", ""))


def neutral(value: Any) -> Any:
    """Returns a message as the vectors write it."""
    if isinstance(value, msgspec.Raw):
        return {"msgpack": bytes(value).hex()}
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, bool | str | float) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) <= SAFE else {"u64": str(value)}
    if isinstance(value, list):
        return [neutral(item) for item in value]
    if isinstance(value, dict):
        return {key: neutral(item) for key, item in value.items()}
    return {name: neutral(getattr(value, name)) for name in value.__struct_fields__}


def test_the_version_is_ours() -> None:
    assert VECTORS["version"] == messages.VERSION


def test_checksums() -> None:
    assert ("313233343536373839", "fee8") in [(case["data"], case["crc"]) for case in VECTORS["crc"]]
    for case in VECTORS["crc"]:
        data = bytes.fromhex(case["data"])
        assert f"{crc16(data):04x}" == case["crc"]
        assert crc16(data) == slow_crc(data)
        for at in range(len(data)):
            assert crc16(data[at:], crc16(data[:at])) == crc16(data)


def slow_crc(data: bytes) -> int:
    """CRC-16/UMTS from its definition: polynomial 0x8005, nothing reflected, start 0."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x8005 if crc & 0x8000 else crc << 1
            crc &= 0xFFFF
    return crc


def test_every_frame_type_has_a_vector() -> None:
    assert {case["type"] for case in VECTORS["frames"]} == set(Type)
    for kind in messages.MESSAGES:
        assert any(case["type"] == kind and "message" in case for case in VECTORS["frames"]), Type(kind).name


@cases("frames")
def test_frames(case: dict[str, Any]) -> None:
    payload, data = bytes.fromhex(case["payload"]), bytes.fromhex(case["bytes"])
    assert encode(case["type"], case["handle"], case["seq"], payload) == data
    assert int.from_bytes(data[:2], "big") == MAGIC
    assert (data[2], int.from_bytes(data[3:7], "big")) == (case["type"], case["handle"])
    assert (int.from_bytes(data[7:11], "big"), int.from_bytes(data[11:13], "big")) == (case["seq"], len(payload))
    assert int.from_bytes(data[13:15], "big") == slow_crc(data[:13] + payload)
    decoder = Decoder()
    assert decoder.feed(data) == [(case["type"], case["handle"], case["seq"], payload)]
    if "message" in case:
        message = messages.unpack(messages.MESSAGES[case["type"]], payload)
        assert neutral(message) == case["message"]
        assert messages.pack(message) == payload


@cases("streams")
def test_streams_of_frames_in_pieces(case: dict[str, Any]) -> None:
    check_pieces(case)
    assert case["fault"] is None


@cases("faults")
def test_faults(case: dict[str, Any]) -> None:
    decoder = check_pieces(case)
    assert decoder.fault is Code(case["code"])
    assert decoder.fault.name.lower() == case["fault"]


def check_pieces(case: dict[str, Any]) -> Decoder:
    decoder, found = Decoder(), []
    for chunk in case["chunks"]:
        found += decoder.feed(bytes.fromhex(chunk))
    decoder.eof()
    wanted = [(f["type"], f["handle"], f["seq"], bytes.fromhex(f["payload"])) for f in case["frames"]]
    assert found == wanted
    assert (decoder.fault is None) == (case["fault"] is None)
    return decoder


@pytest.mark.parametrize("fault", [Code.BAD_MAGIC, Code.BAD_CRC, Code.UNKNOWN_TYPE, Code.TOO_LARGE, Code.TRUNCATED])
def test_every_fault_of_a_frame_has_a_vector(fault: Code) -> None:
    assert fault.name.lower() in {case["fault"] for case in VECTORS["faults"]}


def test_positions() -> None:
    for case in VECTORS["positions"]:
        assert str(expand(case["low"], int(case["near"]))) == case["position"]


@cases("signed")
def test_signed_bodies(case: dict[str, Any]) -> None:
    public, node = bytes.fromhex(case["public"]), NodeId(bytes.fromhex(case["node"]))
    body, signature = bytes.fromhex(case["body"]), bytes.fromhex(case["signature"])
    assert case["context"].encode("ascii") + node + body == bytes.fromhex(case["input"])
    assert device.verify(public, case["context"], node, body, signature)
    assert not device.verify(public, case["context"], node, body + b"\0", signature)
    shape = messages.ConnectBody if case["context"] == messages.CONTEXT_CONNECT else messages.ResumeBody
    message: Any = messages.unpack(shape, body)
    assert neutral(message) == case["message"]
    assert messages.pack(message) == body
    assert message.context == case["context"]
    if case["algorithm"] == "ed25519":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        key = device.DeviceKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(case["private"])))
        assert key.public == public
        assert key.sign(case["context"], node, body) == signature


def test_compressed_payloads() -> None:
    for case in VECTORS["zstd"]:
        assert decompress(bytes.fromhex(case["compressed"])).hex() == case["plain"]


def test_control_one_changed_byte_is_noticed() -> None:
    case = next(dict(case) for case in VECTORS["frames"] if case["name"] == "DATA")
    case["bytes"] = case["bytes"][:-2] + "00"
    with pytest.raises(AssertionError):
        test_frames(case)
