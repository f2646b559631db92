"""Parameters bound to typed fields: keys without case, null that leaves a field alone, maps that merge.

Repeated keys do what encoding/json does to a struct that already holds a value (the contract, section 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sterna.errors import SternaError
from sterna.remote.gonumber import INT64_MAX, INT64_MIN, UINT64_MAX, integer
from sterna.remote.wire import Members, Number, scalar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sterna.remote.wire import Value


class BindError(SternaError):
    """A parameter has the wrong type or is out of range."""


_FOLDED: Final = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ\u017f\u212a", "abcdefghijklmnopqrstuvwxyzsk")


def fold(key: str) -> str:
    """Returns `key` as keys are compared: ASCII without case; U+017F counts as s, U+212A as k (bytes.EqualFold)."""
    return key.translate(_FOLDED)


class Text:
    """A string; missing or null is empty."""

    def zero(self) -> object:
        """Returns what a missing field is."""
        return ""

    def bind(self, value: Value, old: object) -> object:
        """Returns the new value of the field. Raises `BindError`."""
        if value is None:
            return old
        if not isinstance(value, str) or isinstance(value, Number):
            raise BindError
        return scalar(value)


class Flag:
    """A boolean; with `absent` given, null is the same as missing."""

    def __init__(self, absent: bool | None = None) -> None:
        self._absent = absent

    def zero(self) -> object:
        """Returns what a missing field is."""
        return bool(self._absent)

    def bind(self, value: Value, old: object) -> object:
        """Returns the new value of the field. Raises `BindError`."""
        if value is None:
            return old if self._absent is None else self._absent
        if not isinstance(value, bool):
            raise BindError
        return value


class Integer:
    """An integer literal of 64 bits; an optional one is None when it is missing or null."""

    def __init__(self, *, signed: bool, optional: bool = False) -> None:
        self._range = (INT64_MIN, INT64_MAX) if signed else (0, UINT64_MAX)
        self._zero = None if optional else 0

    def zero(self) -> object:
        """Returns what a missing field is."""
        return self._zero

    def bind(self, value: Value, old: object) -> object:
        """Returns the new value of the field. Raises `BindError`."""
        if value is None:
            return old if self._zero == 0 else None
        number = integer(value, *self._range) if isinstance(value, Number) else None
        if number is None:
            raise BindError
        return number


class Texts:
    """A list of strings. A repeated list is written over the one before it, so null keeps what stood at its place."""

    def zero(self) -> object:
        """Returns what a missing field is."""
        return Reused()

    def bind(self, value: Value, old: object) -> object:
        """Returns the new value of the field. Raises `BindError`."""
        if value is None:
            return Reused()
        if not isinstance(value, list) or isinstance(value, Members):
            raise BindError
        kept = old.kept if isinstance(old, Reused) and value else []
        items = []
        for position, item in enumerate(value):
            text = TEXT.bind(item, kept[position] if position < len(kept) else "")
            items.append(str(text))
        return Reused(items, items + kept[len(items) :])


class Reused(list[str]):
    """A bound list and everything that its memory ever held."""

    def __init__(self, items: list[str] | tuple[()] = (), kept: list[str] | tuple[()] = ()) -> None:
        super().__init__(items)
        self.kept = list(kept)


class TextMap:
    """An object of strings; a repeated one merges, null empties it, a null member is empty."""

    def zero(self) -> object:
        """Returns what a missing field is."""
        return {}

    def bind(self, value: Value, old: object) -> object:
        """Returns the new value of the field. Raises `BindError`."""
        if value is None:
            return {}
        if not isinstance(value, Members) or not isinstance(old, dict):
            raise BindError
        for key, item in value:
            old[scalar(key)] = TEXT.bind(item, "")
        return old


class Group:
    """An object with fields of its own; missing or null is None, a repeated one merges (a pointer to a struct)."""

    def __init__(self, **kinds: Kind) -> None:
        self._kinds = kinds

    def zero(self) -> object:
        """Returns what a missing field is."""
        return None

    def bind(self, value: Value, old: object) -> object:
        """Returns the new value of the field. Raises `BindError`."""
        return None if value is None else bind(value, self._kinds, old if isinstance(old, dict) else {})


TEXT: Final = Text()
Kind = Text | Flag | Integer | Texts | TextMap | Group


def bind(params: Value, kinds: Mapping[str, Kind], old: Mapping[str, object] | None = None) -> dict[str, object]:
    """Returns the value of every field in `kinds`, keyed by its name there (in the spelling of the contract).

    Parameters: `params`, an object or null; unknown members are ignored; `old`, what fields held. Raises `BindError`.
    """
    bound = {name: kind.zero() for name, kind in kinds.items()}
    if old:
        bound |= old
    if params is None:
        return bound
    if not isinstance(params, Members):
        raise BindError
    for key, value in params:
        name = key
        kind = kinds.get(key)
        if kind is None:
            folded = fold(key)
            name = next((name for name in kinds if fold(name) == folded), "")
            if not name:
                continue
            kind = kinds[name]
        bound[name] = kind.bind(value, bound[name])
    return bound
