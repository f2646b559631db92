"""Finds the escape keys of `sterna attach` (`~d`, `~.`, `~?`, `~~`) in what the user types."""

from __future__ import annotations

import re
from enum import IntEnum

from sterna.errors import UsageError

PASTE_BEGIN = b"\x1b[200~"
PASTE_END = b"\x1b[201~"
_MARKER_BYTES = len(PASTE_BEGIN)


class Action(IntEnum):
    """What an escape key asks for."""

    DETACH = 1
    DROP = 2
    HELP = 3


_ACTIONS = {ord("d"): Action.DETACH, ord("."): Action.DROP, ord("?"): Action.HELP}


def help_text(char: str = "~") -> str:
    """Returns the lines that the help key shows, separated by CR LF because the terminal is in raw mode."""
    return "\r\n".join(
        (
            "Supported escape keys, after a newline:",
            f"  {char}d  detach, the session goes on",
            f"  {char}.  drop the connection at once, the session goes on",
            f"  {char}?  this help",
            f"  {char}{char}  send one {char}",
            "",
        )
    )


class EscapeKeys:
    """Takes the escape keys out of typed bytes, incrementally: any split of the input gives the same result.

    `enabled` False passes everything; `char` is the escape character, one printable ASCII character.
    Raises `UsageError` for another one. As in ssh(1) the character counts only at the start or after CR or LF,
    and is held back until the next byte decides. Inside a bracketed paste it never counts. After detach or drop
    the rest of the input belongs to nobody and is discarded.
    """

    __slots__ = ("_bytes", "_char", "_enabled", "_ended", "_find", "_line_start", "_marked", "_paste", "_pending")

    def __init__(self, enabled: bool, char: str = "~") -> None:
        if len(char) != 1 or not "!" <= char <= "~":
            raise UsageError(f"The escape character must be one printable ASCII character, not {char!r}.")
        self._enabled = enabled
        self._char = ord(char)
        self._bytes = char.encode()
        self._find = re.compile(rb"\x1b\[200~|(?<=[\r\n])" + re.escape(self._bytes))
        self._line_start = True
        self._pending = False
        self._ended = False
        self._paste = False
        self._marked = 0  # bytes of the next paste marker that the input so far ends with (all of them were passed on)

    def feed(self, data: bytes) -> tuple[bytes, list[Action]]:
        """Returns the bytes to send and the actions asked for, in the order typed.

        Without an escape character in `data` and none pending, that is `data` itself.
        """
        if not self._enabled or not data:
            return data, []
        if self._pending or self._ended or self._bytes in data or b"~" in data:
            return self._filter(data)
        self._note_marker(data)
        self._line_start = data[-1] in b"\r\n"
        return data, []

    def flush(self) -> bytes:
        """Returns the escape character that is held back, if one is, because no more input comes."""
        held = self._bytes if self._pending else b""
        self._pending = False
        return held

    def _filter(self, data: bytes) -> tuple[bytes, list[Action]]:
        if self._ended:
            return b"", []
        sent: list[bytes] = []
        actions: list[Action] = []
        position = self._complete_marker(data, sent)
        while position < len(data):
            if self._paste:
                position = self._skip_paste(data, position, sent)
            elif self._pending:
                position = self._decide(data, position, sent, actions)
                if actions and actions[-1] is not Action.HELP:
                    return b"".join(sent), actions
            elif self._line_start and data[position] == self._char:
                self._pending = True
                position += 1
            else:
                position = self._plain(data, position, sent)
        if self._pending:
            self._marked = 0
        else:
            self._note_marker(data)
        return b"".join(sent), actions

    def _complete_marker(self, data: bytes, sent: list[bytes]) -> int:
        """Takes the rest of a paste marker that began in earlier input; returns how many bytes that is."""
        rest = (PASTE_END if self._paste else PASTE_BEGIN)[self._marked :]
        if not self._marked or not data.startswith(rest):
            return 0
        self._paste = not self._paste
        self._marked = 0
        self._line_start = False
        sent.append(rest)
        return len(rest)

    def _skip_paste(self, data: bytes, position: int, sent: list[bytes]) -> int:
        end = data.find(PASTE_END, position)
        stop = len(data) if end < 0 else end + _MARKER_BYTES
        sent.append(data[position:stop])
        if end >= 0:
            self._paste = False
            self._marked = 0
        self._line_start = False
        return stop

    def _decide(self, data: bytes, position: int, sent: list[bytes], actions: list[Action]) -> int:
        """Decides about the held escape character by the byte that follows it."""
        self._pending = False
        byte = data[position]
        if byte == self._char:
            sent.append(self._bytes)
            self._line_start = False
            return position + 1
        action = _ACTIONS.get(byte)
        if action is None:
            sent.append(self._bytes)
            self._line_start = False
            return position
        actions.append(action)
        self._ended = action is not Action.HELP
        return position + 1

    def _plain(self, data: bytes, position: int, sent: list[bytes]) -> int:
        found = self._find.search(data, position)
        if found is None:
            stop = len(data)
        elif found.group() == PASTE_BEGIN:
            stop = found.end()
            self._paste = True
            self._marked = 0
        else:
            stop = found.start()
        sent.append(data[position:stop])
        self._line_start = data[stop - 1] in b"\r\n"
        return stop

    def _note_marker(self, data: bytes) -> None:
        """Remembers how much of the next paste marker the input so far ends with."""
        marker = PASTE_END if self._paste else PASTE_BEGIN
        if len(data) < _MARKER_BYTES and self._marked:
            data = marker[: self._marked] + data
        start = data.rfind(b"\x1b", max(0, len(data) - _MARKER_BYTES + 1))
        self._marked = len(data) - start if start >= 0 and marker.startswith(data[start:]) else 0
