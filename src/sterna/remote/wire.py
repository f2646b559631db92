"""JSON exactly as the contract reads and writes it; sans-IO.

A decoded value is one of: None, True, False, `str`, `Number` (its literal), `list`, `Members` (the pairs of an object
in their order, repeated keys included). Text that was no UTF-8 and lone surrogate escapes stay in it as lone surrogates
until `scalar` makes U+FFFD of them, which only the few texts that are used need.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from json.encoder import encode_basestring
from math import isinf
from typing import TYPE_CHECKING, Any, NoReturn

from sterna.errors import SternaError
from sterna.limits import REMOTE_NESTING_MAX
from sterna.remote.gonumber import through_double

if TYPE_CHECKING:
    from collections import deque


class Number(str):
    """A number as it was written."""

    __slots__ = ()


class Members(list[Any]):  # of tuple[str, Value]; said so, an array that may be one would have two types of items
    """The members of an object, in their order."""

    __slots__ = ()


Value = None | bool | str | list["Value"] | Members


class WireError(SternaError):
    """The line is no JSON, or a value in it has no meaning."""


def _refused(_literal: str) -> NoReturn:
    raise WireError("NaN and Infinity are no JSON")


_fast = JSONDecoder(object_pairs_hook=Members, parse_int=Number, parse_float=Number, parse_constant=_refused).scan_once  # type: ignore[attr-defined] # what `decode` calls; it alone takes a position
_PIECE_BYTES = 65_536  # of a file, decoded at a time
_SPACES = re.compile(r"[ \t\r\n]*")
# Members of an array or an object, each with its comma, that hold no arrays or objects but such as hold none.
_PLAIN = r'[^\[\]{}",]++|"(?:[^"\\]|\\.)*+"'
_RUN = re.compile(rf"(?:(?:{_PLAIN}|[\[{{](?:{_PLAIN}|,)*+[\]}}])*+,)++", re.DOTALL)
_RUN_CHARS = 4_096
_SURROGATES = re.compile("[\ud800-\udfff]+")


def decode(line: bytes) -> Value:
    """Returns the value of one line of JSON.

    Raises `WireError` for whatever RFC 8259 forbids, for data after the value and beyond 10,000 levels of nesting.
    """
    text = line.decode("utf-8", "surrogateescape")
    start = _SPACES.match(text).end() if text[:1] != "{" else 0  # type: ignore[union-attr] # it always matches
    try:
        value, end = _fast(text, start)
    except RecursionError:
        return decode_deep(text)
    except (StopIteration, JSONDecodeError, WireError) as error:
        raise WireError("this is no JSON") from error
    if end != len(text) and _SPACES.fullmatch(text, end) is None:
        raise WireError("data after the value")
    if len(text) > REMOTE_NESTING_MAX and text.count("[") + text.count("{") > REMOTE_NESTING_MAX:
        _check_depth(value)
    return value  # type: ignore[no-any-return] # the hooks above make exactly these types


def _check_depth(value: Value) -> None:
    """Raises `WireError` for a value that is nested too deeply; how much the C scanner takes depends on the Python."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list)]:
        depth += 1
        if depth > REMOTE_NESTING_MAX:
            raise WireError("nested too deeply")
        level = [
            inner
            for item in level
            for inner in ([member for _, member in item] if isinstance(item, Members) else item)
            if isinstance(inner, list)
        ]


def decode_deep(text: str) -> Value:
    """Returns the value of a text of any permitted nesting: without recursion, and slower. Raises `WireError`."""
    return _Deep(text).run()


def decode_apart(line: bytes) -> Value:
    """As `decode`, for a thread beside others: it lets them go on all the time, which the C scanner does not."""
    return decode_deep(line.decode("utf-8", "surrogateescape"))


class _Deep:
    """One pass over a text with a stack of its own."""

    __slots__ = ("_at", "_keys", "_open", "_text")

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._open: list[list[Value] | Members] = []
        self._keys: list[str] = []  # of the members that are not complete, one for each open object

    def run(self) -> Value:
        while True:
            if self._open and not isinstance(self._open[-1], Members):
                self._run("[", "]")
            done, value = self._value()
            while done:
                if not self._open:
                    if self._peek():
                        raise WireError("data after the value")
                    return value
                done = self._add(value)
                if done:
                    value = self._close()

    def _run(self, opening: str, closing: str) -> None:
        """Adds whole members as far as they are plain, many at a time; one is left, as each ends with a comma."""
        if len(self._open) == REMOTE_NESTING_MAX:
            return
        target = self._open[-1]
        while (match := _RUN.match(self._text, self._at, self._at + _RUN_CHARS)) is not None:
            text = f"{opening}{match[0][:-1]}{closing}"
            try:
                members, end = _fast(text, 0)
            except (StopIteration, JSONDecodeError) as error:
                raise WireError("this is no JSON") from error
            if end != len(text) or not members:
                raise WireError("this is no JSON")
            target += members
            self._at = match.end()

    def _peek(self) -> str:
        match = _SPACES.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._text[self._at : self._at + 1]

    def _scalar(self) -> Value:
        """Returns what is no array and no object, which the C scanner reads without recursion."""
        try:
            value, self._at = _fast(self._text, self._at)
        except (StopIteration, JSONDecodeError) as error:
            raise WireError("this is no JSON") from error
        return value  # type: ignore[no-any-return] # as in `decode`

    def _value(self) -> tuple[bool, Value]:
        """Returns a complete value, or (False, None) after it opened an array or object that has members."""
        char = self._peek()
        if char in {"[", "{"}:
            self._at += 1
            opened: list[Value] | Members = [] if char == "[" else Members()
            if len(self._open) >= REMOTE_NESTING_MAX:
                raise WireError("nested too deeply")
            if self._peek() == ("]" if char == "[" else "}"):
                self._at += 1
                return True, opened
            self._open.append(opened)
            if char == "{":
                self._key()
            return False, None
        return True, self._scalar()

    def _key(self) -> None:
        self._run("{", "}")
        if self._peek() != '"':
            raise WireError("a key is missing")
        key = str(self._scalar())
        if self._peek() != ":":
            raise WireError("a colon is missing")
        self._at += 1
        self._keys.append(key)

    def _add(self, value: Value) -> bool:
        """Adds a value to what is open; returns whether that ended with it."""
        target = self._open[-1]
        char = self._peek()
        self._at += 1
        if isinstance(target, Members):
            target.append((self._keys.pop(), value))
            if char == ",":
                self._key()
                return False
            if char == "}":
                return True
        else:
            target.append(value)
            if char == ",":
                return False
            if char == "]":
                return True
        raise WireError("a comma is missing")

    def _close(self) -> Value:
        return self._open.pop()


def scalar(text: str) -> str:
    """Returns `text` with U+FFFD for each lone surrogate: one for each byte that was no UTF-8."""
    if text.isascii():
        return text
    return _SURROGATES.sub(lambda match: "\ufffd" * len(match[0]), text)


def encode_text(text: str) -> str:
    r"""Returns `text` as a JSON string; a lone surrogate stands for a byte that is no UTF-8 and becomes `\ufffd`.

    Source: the contract, section 5 (encoding/json with HTML escaping).
    """
    done: str = encode_basestring(text)
    if "<" in done or ">" in done or "&" in done:
        done = done.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    if not done.isascii():
        done = done.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        done = _SURROGATES.sub(lambda match: "\\ufffd" * len(match[0]), done)
    return done


def encode_echo(value: Value) -> str:
    """Returns a decoded value printed anew: numbers through doubles, keys sorted by bytes, the last of equal keys.

    Raises `WireError` when a number is out of a double's range.
    """
    if isinstance(value, Number):
        return _echo_number(value)
    if isinstance(value, str):
        return encode_text(scalar(value))
    if isinstance(value, list):
        _check_numbers(value)
        return _encode_nested(value)
    return "null" if value is None else "true" if value else "false"


def _echo_number(literal: str) -> str:
    try:
        return through_double(literal)
    except OverflowError as error:
        raise WireError("a number is out of range") from error


def _check_numbers(value: list[Value] | Members) -> None:
    """Raises `WireError` for a number out of range anywhere, also in members that lose against later ones."""
    todo: list[Value] = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Members):
            todo += [member for _key, member in item]
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, Number) and isinf(float(item)):
            raise WireError("a number is out of range")


def _encode_nested(value: list[Value] | Members) -> str:
    """As `encode_echo` for arrays and objects; with a stack of its own, as nesting is only bounded by the line."""
    out: list[str] = []
    todo: list[Value | tuple[str]] = [value]  # a tuple is text that is ready
    while todo:
        item = todo.pop()
        if isinstance(item, tuple):
            out.append(item[0])
        elif isinstance(item, Members):  # before `list`, which it also is
            last = {scalar(key): member for key, member in item}
            out.append("{")
            todo.append(("}",))
            for position, key in enumerate(sorted(last, reverse=True), 1):
                todo += last[key], (f"{',' if position < len(last) else ''}{encode_text(key)}:",)
        elif isinstance(item, list):
            out.append("[")
            todo.append(("]",))
            for position in range(len(item) - 1, -1, -1):
                member: Value = item[position]
                todo.append(member)
                if position:
                    todo.append((",",))
        else:
            out.append(encode_echo(item))
    return "".join(out)


def encode(value: object) -> str:
    """Returns a reply's value as JSON: `str`, `bool`, `int`, `float`, None, lists, and dicts in their own order."""
    if isinstance(value, str):
        return encode_text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        from sterna.remote.gonumber import text_of

        return text_of(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{encode_text(key)}:{encode(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(encode, value)) + "]"
    raise TypeError(f"a reply cannot hold {value!r}")


class Raw:
    """Bytes of a file, in pieces, that stand for a text: decoded as they are encoded, and dropped then."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: deque[bytes]) -> None:
        self.pieces = pieces

    def texts(self) -> Iterator[str]:
        """Returns the text in pieces; bytes that are no UTF-8 become lone surrogates."""
        decoder = getincrementaldecoder("utf-8")("surrogateescape")
        while self.pieces:
            piece = memoryview(self.pieces.popleft())
            for start in range(0, len(piece), _PIECE_BYTES):
                yield decoder.decode(piece[start : start + _PIECE_BYTES])
        yield decoder.decode(b"", final=True)


def encode_pieces(value: object) -> Iterator[str]:
    """Returns what `encode` does in pieces, of which none takes long; a `Raw` and iterators may be in it, too."""
    if isinstance(value, dict):
        mark = "{"
        for key, item in value.items():
            yield f"{mark}{encode_text(key)}:"
            yield from encode_pieces(item)
            mark = ","
        yield "}" if value else "{}"
    elif isinstance(value, (list, tuple, Iterator)):
        mark = "["
        for item in value:
            yield mark
            yield encode(item)
            mark = ","
        yield "]" if mark == "," else "[]"
    elif isinstance(value, Raw):
        yield '"'
        for text in value.texts():
            yield encode_text(text)[1:-1]
        yield '"'
    else:
        yield encode(value)


def utf8(text: str) -> bytes:
    """Returns encoded JSON as bytes; it holds no surrogates any more."""
    return text.encode()
