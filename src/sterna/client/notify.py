"""Turns bell and exit into notifications of the user's desktop terminal (`sterna attach --notify`).

OSC 9 is understood by iTerm2, kitty, WezTerm, Ghostty and Windows Terminal; OSC 777 by urxvt, foot and VTE.
In tmux either is wrapped in a passthrough, which tmux(1) obeys with `allow-passthrough on`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sterna.limits import LABEL_MAX_CHARS
from sterna.units import MILLISECOND

if TYPE_CHECKING:
    from collections.abc import Mapping

NOTIFY_EVERY_MS = 5_000
NOTIFY_TEXT_MAX_CHARS = 200

_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def cleaned(text: str, limit_chars: int = NOTIFY_TEXT_MAX_CHARS) -> str:
    """Returns `text` on one line without control and formatting characters, at most `limit_chars` characters long."""
    from unicodedata import category

    kept = "".join(" " if category(char) in _UNSAFE_CATEGORIES else char for char in text[: 4 * limit_chars])
    return " ".join(kept.split())[:limit_chars]


def uses_osc_777(environ: Mapping[str, str]) -> bool:
    """Returns whether the terminal that `environ` tells of takes OSC 777 rather than OSC 9."""
    return "VTE_VERSION" in environ or environ.get("TERM", "").startswith(("foot", "rxvt"))


def passthrough(sequence: bytes) -> bytes:
    """Returns `sequence` wrapped so that tmux hands it to the terminal outside."""
    return b"\x1bPtmux;" + sequence.replace(b"\x1b", b"\x1b\x1b") + b"\x1b\\"


_STRING = rb"\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"
_STRING_OPEN = rb"\x1b(?:[\]PX^_][^\x07\x1b]*)?\Z"


class BellFinder:
    """Tells real bells from the BEL that ends a title or another string sequence; any split of the output is the
    same.
    """

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open = b""

    def feed(self, data: bytes) -> bool:
        """Returns whether the program rang in this piece of output."""
        if not self._open and b"\a" not in data and b"\x1b" not in data:
            return False
        text = re.compile(_STRING).sub(b"", self._open + data)
        unfinished = re.compile(_STRING_OPEN).search(text)
        # Of a string that is not finished only its beginning matters, so nothing grows here.
        self._open = unfinished[0][:2] if unfinished is not None else b""
        return b"\a" in text


class Notifier:
    """Makes notification sequences, bells at most one every NOTIFY_EVERY_MS.

    `session` is the session's name; `environ` tells the kind of terminal ($TMUX, $TERM, $VTE_VERSION). The bytes must
    be written between, not within, the session's control sequences (`sterna.client.status.unfinished` tells).
    """

    __slots__ = ("_bell_ns", "_osc_777", "_title", "_tmux")

    def __init__(self, session: str, environ: Mapping[str, str]) -> None:
        # A title field ends at a semicolon.
        self._title = cleaned(f"sterna {session}", LABEL_MAX_CHARS).replace(";", ",")
        self._tmux = bool(environ.get("TMUX"))
        self._osc_777 = uses_osc_777(environ)
        self._bell_ns: int | None = None

    def bell(self, now_ns: int) -> bytes:
        """Returns the notification of a bell; nothing when the last one is too recent (monotonic nanoseconds)."""
        if self._bell_ns is not None and now_ns - self._bell_ns < NOTIFY_EVERY_MS * MILLISECOND:
            return b""
        self._bell_ns = now_ns
        return self._sequence("The bell rang.")

    def exited(self, status: str) -> bytes:
        """Returns the notification that the program ended; `status` says how ("exit status 1", "signal TERM")."""
        return self._sequence(f"The program ended: {status}.")

    def _sequence(self, text: str) -> bytes:
        body = cleaned(text)
        # Words first: OSC 9 with a leading digit is a progress bar to Windows Terminal and ConEmu.
        content = f"777;notify;{self._title};{body}" if self._osc_777 else f"9;{self._title}: {body}"
        sequence = b"\x1b]" + content.encode("utf-8", "replace") + b"\x1b\\"
        return passthrough(sequence) if self._tmux else sequence
