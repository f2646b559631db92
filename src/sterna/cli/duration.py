"""Lengths of time on the command line: `90s`, `10m`, `2h`, `7d`; a number alone is seconds."""

from __future__ import annotations

import re

import click

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd]?)\Z")


class Duration(click.ParamType[float]):
    """A length of time, as seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the seconds; wrong use ends the command with what was expected."""
        if isinstance(value, float | int):
            return float(value)
        match = _DURATION.match(str(value))
        if match is None:
            self.fail(
                f"{str(value)[:40]!r} is no length of time: use a number and s, m, h or d, as in 90s or 10m.",
                param,
                ctx,
            )
        return float(match[1]) * _UNITS[match[2]]


DURATION = Duration()


def in_words(seconds: float) -> str:
    """Returns a length of time in its largest fitting unit: `0.5 s`, `45 s`, `10 min`, `2 h`, `7 d`."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 or not round(seconds, 1) else f"{seconds:.1f} s"
