"""Command-line flags in the syntax of Go's package flag."""

from __future__ import annotations

import re
from typing import Final

from sterna.errors import SternaError

_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_UNITS: Final = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_PART: Final = re.compile(r"([0-9]*)(?:\.([0-9]*))?(ns|us|µs|μs|ms|s|m|h)")
_INT: Final = re.compile(
    r"[-+]?(0[xX]_?[0-9a-fA-F](_?[0-9a-fA-F])*|0[oO]?(_?[0-7])*|0[bB]_?[01](_?[01])*|[1-9](_?[0-9])*)"
)
_INT64 = 1 << 63

BOOLS: Final = {
    "serve": "run the daemon", "bridge": "relay standard input and output to the daemon",
    "install": "install a CLI version",
    "stop": "stop the daemon", "version": "print the version", "keep-children": "leave processes running at shutdown",
    "listen-pipe": "ignored on this platform", "files-read-regular-only": "files.read refuses devices and pipes",
    "durable": "processes survive the daemon's end", "strict": "safer than the contract asks for",
    "extensions": "methods and parameters beyond the contract",
}  # fmt: skip
TEXTS: Final = {
    "socket": "path of the daemon's socket", "token-file": "file with the token; it is deleted once read",
    "metrics-addr": "HOST:PORT that serves GET /metrics", "cli-dir": "directory of CLI versions",
    "cli-version": "version to install", "cli-url": "where to download it",
    "cli-checksum": "SHA-256 of the compressed file",
    "cli-zst": "local compressed file",
}  # fmt: skip
INTS: Final = {
    "token-fd": (-1, "descriptor to read the token from"),
    "max-extract-bytes": (0, "bound of an archive's files, 0 for none"),
    "cli-keep": (3, "versions to keep, 0 for all"), "max-cli-bytes": (0, "bound of a CLI's size, 0 for none"),
}  # fmt: skip
DURATIONS: Final = {
    "git-timeout": "after which git is killed, 0 for never",
    "cli-probe-timeout": "bound of the CLI's --version, 0 for none",
    "cli-download-timeout": "bound of a download, 0 for none", "libc-probe-timeout": "bound of ldd, 0 for none",
}  # fmt: skip

_BOUNDS: Final = frozenset({"max-extract-bytes", "max-cli-bytes", *DURATIONS})  # below 0 is none, as 0 is


class FlagError(SternaError):
    """The command line is wrong; the text is the first line that is printed. An empty text asks for the usage only."""


class Flags:
    """Parsed flags; `given` holds the names that stood on the command line. Durations are in nanoseconds."""

    def __init__(self) -> None:
        self.bools = dict.fromkeys(BOOLS, False)
        self.texts = dict.fromkeys(TEXTS, "")
        self.ints = {name: default for name, (default, _) in INTS.items()} | dict.fromkeys(DURATIONS, 0)
        self.given: set[str] = set()

    def seconds(self, name: str) -> float:
        """Returns a duration in seconds."""
        return self.ints[name] / 1e9


def parse(words: list[str]) -> Flags:
    """Returns the flags in `words`, up to the first word that is none. Raises `FlagError`. Source: package flag."""
    flags, rest = Flags(), list(words)
    while rest and len(rest[0]) > 1 and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == "--":
            break
        dashes = 2 if word.startswith("--") else 1
        name, equals, value = word[dashes:].partition("=")
        if not name or name.startswith("-"):
            raise FlagError(f"bad flag syntax: {word}")
        _set(flags, name, value if equals else None, rest)
    return flags


def _set(flags: Flags, name: str, value: str | None, rest: list[str]) -> None:
    if name in BOOLS:
        if value is not None and value not in _TRUE | _FALSE:
            raise FlagError(f'invalid boolean value "{value}" for -{name}: parse error')
        flags.bools[name] = value is None or value in _TRUE
    elif name in TEXTS or name in INTS or name in DURATIONS:
        if value is None:
            if not rest:
                raise FlagError(f"flag needs an argument: -{name}")
            value = rest.pop(0)
        if name in TEXTS:
            flags.texts[name] = value
        else:
            try:
                number = duration(value) if name in DURATIONS else integer(value)
            except ValueError as error:
                raise FlagError(f'invalid value "{value}" for flag -{name}: {error}') from error
            flags.ints[name] = max(0, number) if name in _BOUNDS else number
    elif name in {"h", "help"}:
        raise FlagError
    else:
        raise FlagError(f"flag provided but not defined: -{name}")
    flags.given.add(name)


def usage(program: str) -> str:
    """Returns what is printed for -help and after an error."""
    kinds = {name: ("", text) for name, text in BOOLS.items()} | {
        name: (" string", text) for name, text in TEXTS.items()
    }
    kinds |= {name: (" int", f"{text} (default {value})" if value else text) for name, (value, text) in INTS.items()}
    kinds |= {name: (" duration", text) for name, text in DURATIONS.items()}
    return f"Usage of {program}:\n" + "".join(
        f"  -{name}{kind}\n    \t{text}\n" for name, (kind, text) in sorted(kinds.items())
    )


def integer(text: str) -> int:
    """Returns a number of 64 bits in any base. Raises `ValueError` with the text to print (strconv.ParseInt)."""
    if not _INT.fullmatch(text):
        raise ValueError("parse error")
    plain = text.replace("_", "")
    sign, digits = (-1, plain[1:]) if plain[0] == "-" else (1, plain.removeprefix("+"))
    octal = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
    value = sign * int(digits, 8 if octal else 0)
    if not -_INT64 <= value < _INT64:
        raise ValueError("value out of range")
    return value


def duration(text: str) -> int:
    """Returns `1h2m3.5s` in nanoseconds. Raises `ValueError` with the text to print (time.ParseDuration)."""
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if rest == "0":
        return 0
    total, at = 0, 0
    while at < len(rest):
        part = _PART.match(rest, at)
        if part is None or not (part[1] or part[2]):
            raise ValueError("parse error")
        unit, fraction = _UNITS[part[3]], part[2] or ""
        total += int(part[1] or 0) * unit + int(fraction or 0) * unit // 10 ** len(fraction)
        at = part.end()
    if not rest or total >= _INT64:
        raise ValueError("parse error")
    return sign * total


def duration_text(nanoseconds: int) -> str:
    """Returns a duration as `1m0s` (time.Duration.String), which is exact down to a millisecond here."""
    if nanoseconds < 10**9:
        return f"{nanoseconds / 10**6:g}ms" if nanoseconds else "0s"
    minutes, rest = divmod(nanoseconds, 60 * 10**9)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 10**9:.9f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds
