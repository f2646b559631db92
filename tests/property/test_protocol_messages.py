"""Control payloads: what is packed comes back, unknown keys are ignored, anything else is one ProtocolError."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna import limits
from sterna.errors import Code, ProtocolError
from sterna.protocol import compress, messages
from sterna.protocol.messages import Message

SHAPES: list[type[Message]] = sorted(
    {*messages.MESSAGES.values(), messages.ConnectBody, messages.ResumeBody, messages.LaneState, messages.Lost},
    key=lambda shape: shape.__name__,
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    found: st.SearchStrategy[Any]
    if isinstance(kind, msgspec.inspect.UnionType):
        found = st.one_of([values(part) for part in kind.types])
    elif isinstance(kind, msgspec.inspect.LiteralType):
        found = st.sampled_from(kind.values)
    elif isinstance(kind, msgspec.inspect.ListType):
        found = st.lists(values(kind.item_type), max_size=3)
    elif isinstance(kind, msgspec.inspect.DictType):
        found = st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=3)
    elif isinstance(kind, msgspec.inspect.StructType):
        found = structs(kind)
    elif isinstance(kind, msgspec.inspect.RawType):
        found = PLAIN.map(lambda value: msgspec.Raw(messages.pack(value)))
    else:
        plain: dict[Any, st.SearchStrategy[Any]] = {
            msgspec.inspect.IntType: st.integers(0, (1 << 63) - 1),
            msgspec.inspect.StrType: st.text(max_size=8),
            msgspec.inspect.BytesType: st.binary(max_size=40),
            msgspec.inspect.BoolType: st.booleans(),
            msgspec.inspect.FloatType: st.floats(allow_nan=False),
            msgspec.inspect.NoneType: st.none(),
        }
        found = plain[type(kind)]
    return found


def structs(kind: msgspec.inspect.StructType) -> st.SearchStrategy[Any]:
    return st.builds(kind.cls, **{field.name: values(field.type) for field in kind.fields})


def shape_info(shape: type[Message]) -> msgspec.inspect.StructType:
    info = msgspec.inspect.type_info(shape)
    assert isinstance(info, msgspec.inspect.StructType)
    return info


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@given(data=st.data())
def test_what_is_packed_comes_back(shape: type[Message], data: st.DataObject) -> None:
    message = data.draw(structs(shape_info(shape)))
    payload = messages.pack(message)
    again = messages.unpack(shape, payload)
    assert messages.pack(again) == payload
    plain = msgspec.msgpack.decode(payload)
    # A later version may add keys, and may send what is the default.
    assert messages.pack(messages.unpack(shape, messages.pack({**plain, "a later key": [1, {"x": b"y"}]}))) == payload


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@given(payload=st.binary(max_size=60) | PLAIN.map(messages.pack))
def test_anything_else_is_one_error(shape: type[Message], payload: bytes) -> None:
    try:
        messages.unpack(shape, payload)
    except ProtocolError as error:
        if error.code is not Code.BAD_PAYLOAD:
            raise


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x81\xa4name\xa1\xff",  # not UTF-8
        b"\x81\xa4name\xdb\xff\xff\xff\xff",  # text of 4 GiB
        b"\x82\xa4name\xa1a\xa1x\xdd\xff\xff\xff\xff",  # 4,294,967,295 items in a key that nobody reads
        b"\x82\xa4name\xa1a\xa1x" + b"\x91" * 30_000,  # deep
        b"\x82\xa4name\xa1a\xa1x" + b"\x81\xa1a" * 9_000,
        b"\x81\xa4name\xa1a\xc0",  # something after the end
        b"\x81\xa4name\xc1",  # never used by MessagePack
        b"\xc0",
        b"\x81\xa4name\xd6\xff\x00\x00\x00\x00",  # a timestamp
    ],
)
def test_hostile_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.unpack(messages.Signal, payload)
    assert caught.value.code == Code.BAD_PAYLOAD
    assert len(str(caught.value)) < 400


@given(st.binary(max_size=2000))
def test_compressed_bytes_come_back(data: bytes) -> None:
    assert compress.decompress(compress.compress(data)) == data


@given(st.binary(max_size=100))
def test_what_is_not_one_compressed_frame_is_one_error(data: bytes) -> None:
    for payload in (data, compress.compress(b"x") + data, compress.compress(b"x" * 100)[: len(data)]):
        try:
            compress.decompress(payload)
        except ProtocolError as error:
            if error.code is not Code.BAD_PAYLOAD:
                raise


def test_a_bomb_is_refused_at_its_limit() -> None:
    bomb = compress.compress(bytes(limits.DECOMPRESSED_MAX_BYTES + 1))
    assert len(bomb) < limits.PAYLOAD_MAX_BYTES
    with pytest.raises(ProtocolError) as caught:
        compress.decompress(bomb)
    assert caught.value.code == Code.TOO_LARGE
    assert len(compress.decompress(compress.compress(bytes(1000)), 1000)) == 1000
    with pytest.raises(ProtocolError):
        compress.decompress(compress.compress(bytes(1001)), 1000)
