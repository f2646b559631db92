"""Node ids as people read and compare them: 13 groups of four letters and digits (base32, RFC 4648)."""

from __future__ import annotations

from sterna.errors import UsageError
from sterna.ids import NODE_ID_BYTES, NodeId

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_VALUES = {letter: value for value, letter in enumerate(_ALPHABET)}
_CHARS = 52
_SPARE_BITS = _CHARS * 5 - NODE_ID_BYTES * 8
_GROUP_CHARS = 4
_TEXT_MAX_CHARS = 128


def fingerprint(node_id: NodeId) -> str:
    """Returns a node id in the form for people, as `abcd-efgh-…`: the whole of it, lower case."""
    number = int.from_bytes(node_id, "big") << _SPARE_BITS
    letters = "".join(_ALPHABET[number >> shift & 31] for shift in range((_CHARS - 1) * 5, -1, -5))
    return "-".join(letters[start : start + _GROUP_CHARS] for start in range(0, _CHARS, _GROUP_CHARS))


def parse_fingerprint(text: str) -> NodeId:
    """Returns the node id that `text` names: what `fingerprint` gives, in any case and grouping, or 64 hex digits.

    Raises UsageError if it is neither.
    """
    if len(text) <= _TEXT_MAX_CHARS:
        plain = text.strip().lower().replace("-", "").replace(" ", "").replace(":", "")
        if len(plain) == NODE_ID_BYTES * 2 and all(digit in "0123456789abcdef" for digit in plain):
            return NodeId(bytes.fromhex(plain))
        if len(plain) == _CHARS and all(letter in _VALUES for letter in plain):
            number = 0
            for letter in plain:
                number = number << 5 | _VALUES[letter]
            if not number & ((1 << _SPARE_BITS) - 1):
                return NodeId((number >> _SPARE_BITS).to_bytes(NODE_ID_BYTES, "big"))
    raise UsageError(f"{text[:80]!r} is no fingerprint of a node: use the 13 groups of four that `sterna info` shows.")
