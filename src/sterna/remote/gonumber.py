"""Numbers as the contract prints and reads them: IEEE doubles in, the shortest digits that read back out."""

from __future__ import annotations

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
UINT64_MAX = (1 << 64) - 1

_PLAIN_DIGITS = 15  # so many decimal digits pass through a double unchanged


def text_of(value: float) -> str:
    """Returns the shortest text of a finite double: plain for 1e-6 <= |x| < 1e21, else with an exponent.

    Parameters: `value`, finite. Source: encoding/json, floatEncoder.
    """
    text = repr(value)
    if "e" not in text:  # between 1e-4 and 1e16, where Python prints the same digits plainly
        return text.removesuffix(".0")
    sign, digits, exponent = _parts(text)
    point = len(digits) + exponent  # where the decimal point stands, counted from the left of the digits
    if 1e-6 <= abs(value) < 1e21:
        if point <= 0:
            return f"{sign}0.{'0' * -point}{digits}"
        if point >= len(digits):
            return sign + digits + "0" * (point - len(digits))
        return f"{sign}{digits[:point]}.{digits[point:]}"
    mantissa = digits[0] + ("." + digits[1:] if len(digits) > 1 else "")
    return f"{sign}{mantissa}e{point - 1:+d}" if point > 0 else f"{sign}{mantissa}e-{1 - point}"


def _parts(text: str) -> tuple[str, str, int]:
    """Returns sign, significant digits without zeros at either end, and the power of ten of the last digit."""
    sign = "-" if text.startswith("-") else ""
    mantissa, _, power = text.removeprefix("-").partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits, exponent = (whole + fraction).lstrip("0"), int(power or 0) - len(fraction)
    short = digits.rstrip("0")
    return sign, short or "0", exponent + len(digits) - len(short)


def through_double(literal: str) -> str:
    """Returns what a JSON number becomes by being read as a double and printed again.

    Raises `OverflowError` when it is out of a double's range.
    """
    if literal.isdigit() and len(literal) <= _PLAIN_DIGITS:
        return literal
    value = float(literal)
    if value in {float("inf"), float("-inf")}:
        raise OverflowError(literal)
    return text_of(value)


def integer(literal: str, low: int, high: int) -> int | None:
    """Returns the value of an integer literal within `low` to `high`, or None: `4.0` and `1e2` are no integers.

    A sign is refused where `low` is 0, so `-0` is no unsigned number.
    """
    digits = literal.removeprefix("-")
    if not digits.isdigit() or len(digits) > 20 or (low == 0 and literal.startswith("-")):
        return None
    value = int(literal)
    return value if low <= value <= high else None
