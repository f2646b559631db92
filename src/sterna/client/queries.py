"""Removes from a session's output what a terminal would answer, and what writes the clipboard or commands kitty.

Only the last typist's terminal may answer queries, and never to replayed output (docs/protocol.md, section 4): an
answer would reach the program as typed input. Sources: ECMA-48, the VT500 parser (vt100.net/emu/dec_ansi_parser),
xterm's ctlseqs, the kitty keyboard, graphics, clipboard and notification protocols.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPLAY = "replay"  # output from before this moment: no query passes
LIVE = "live"  # this terminal belongs to the last typist and may answer
PASSIVE = "passive"  # another terminal answers: no query passes

SEQUENCE_HELD_MAX_BYTES = 4_096

# C0 controls that terminals skip inside a sequence (in CSI they execute them); DEL is skipped too.
_I = rb"[\x00-\x17\x19\x1c-\x1f\x7f]*+"
_PARAMETERS = rb"[\x00-\x17\x19\x1c-\x3f\x7f]*+"
_NUMBER = rb"[\x00-\x06\x08-\x17\x19\x1c-\x1f\x7f0-9]*+"
# What follows an introducer. Every introducer ends any sequence before it, so sequences never nest.
_CSI = rb"(?:" + _PARAMETERS + rb"[cnpqxtuSwyvR|]|\?" + _PARAMETERS + rb"m)"
_OSC = rb"(?P<number>" + _NUMBER + rb")(?!\Z)"
_DCS = _PARAMETERS + rb"[qQ]"
_APC = rb"G(?P<keys>[^\x07\x18\x1a\x1b\xc2;]*+)(?=[\x07\x18\x1a\x1b\xc2;])"
# kitty's remote control commands the terminal; what else it has of this kind it answers.
_KITTY = rb"@kitty-(?=(?P<remote>cmd)|(?!(?:cm?)?\Z))"
_KITTY_BEGUN = rb"@(?:k(?:i(?:t(?:t(?:y(?:-(?:cm?)?)?)?)?)?)?)?"
# The sequences that full screens are made of are left out early: that is nine times as fast.
_COMMON = rb"\[(?:[0-9;]*+[mHKJABCDGLMPXd]|\?[0-9;]*+[hl])"

# What replayed output alone needs is compiled when it is first used: the import is on the way to the first answer.
_FIND_CLIPBOARD = (
    rb"\x1b(?!\[)"
    + _I
    + rb"(?:(?P<osc>\]"
    + _OSC
    + rb")|P(?:(?P<tmux>"
    + _PARAMETERS
    + rb"tmux;)|(?P<kitty>"
    + _PARAMETERS
    + _KITTY
    + rb")))"
)
_FIND_QUERIES = (
    rb"\x1b(?!" + _COMMON + rb")" + _I + rb"(?:(?P<csi>\[" + _CSI + rb")|(?P<osc>\]" + _OSC + rb")|(?P<decid>Z)"
    rb"|(?P<dcs>P" + _DCS + rb")|P(?P<tmux>" + _PARAMETERS + rb"tmux;)|P(?P<kitty>" + _PARAMETERS + _KITTY + rb")"
    rb"|(?P<apc>_" + _APC + rb"))"
)
# The same for output with UTF-8 encoded C1 controls, which xterm, VTE and WezTerm obey as introducers.
_FIND_C1 = re.compile(rb"\xc2(?:[\x80-\x9f]|\Z)")
_C1 = (
    # The look ahead is what the search is fast by.
    rb"(?=[\x1b\xc2])(?:"
    rb"(?P<csi>(?:\x1b" + _I + rb"\[|\xc2\x9b)" + _CSI + rb")|(?P<osc>(?:\x1b" + _I + rb"\]|\xc2\x9d)" + _OSC + rb")"
    rb"|(?P<decid>\x1b" + _I + rb"Z|\xc2\x9a)|(?P<dcs>(?:\x1b" + _I + rb"P|\xc2\x90)" + _DCS + rb")"
    rb"|(?P<tmux>(?:\x1b" + _I + rb"P|\xc2\x90)" + _PARAMETERS + rb"tmux;)"
    rb"|(?P<kitty>(?:\x1b" + _I + rb"P|\xc2\x90)" + _PARAMETERS + _KITTY + rb")"
    rb"|(?P<apc>(?:\x1b" + _I + rb"_|\xc2\x9f)" + _APC + rb"))"
)
_INCOMPLETE = (
    rb"(?:(?P<esc>\xc2|\x1b" + _I + rb")|(?P<csi>(?:\x1b" + _I + rb"\[|\xc2\x9b)" + _PARAMETERS + rb")"
    rb"|(?P<osc>(?:\x1b" + _I + rb"\]|\xc2\x9d)" + _NUMBER + rb")"
    rb"|(?P<dcs>(?:\x1b" + _I + rb"P|\xc2\x90)" + _PARAMETERS + rb"(?:tmux|tmu|tm|t|" + _KITTY_BEGUN + rb")?)"
    rb"|(?P<apc>(?:\x1b" + _I + rb"_|\xc2\x9f)(?:G[^\x07\x18\x1a\x1b\xc2;]*+)?))\Z"
)
# Where an incomplete sequence that is too long may begin: nothing that follows may begin another one.
_LONG = rb"(?:\x1b|\xc2[\x90\x9b\x9d\x9f])(?=[^\x1b\xc2]{%d})" % (SEQUENCE_HELD_MAX_BYTES - 1)
_QUERY_CSI = (
    rb"[>=]?[\d:;]*c"  # DA1, DA2, DA3
    rb"|0*[56]n|\?[\d:;]*n"  # DSR, CPR, their private forms
    rb"|\??[\d:;]*\$p"  # DECRQM
    rb"|>[\d:;]*q"  # XTVERSION
    rb"|[\d:;]*x"  # DECREQTPARM
    rb"|0*(?:1[1345689]|2[01])(?:;[\d:;]*)?t"  # window reports
    rb"|\?[\d:;]*u"  # kitty keyboard flags
    rb"|\?[\d:;]*m"  # XTQMODKEYS
    rb"|\?[\d:;]*S"  # XTSMGRAPHICS
    rb"|[\d:;]*(?:[&$,]u|'\||#[|RS]|\$w|\*y|\"v|\+x)"  # DEC and xterm state reports
)
_BODY = rb"[^\x07\x18\x1a\x1b\xc2]*+(?:\xc2(?![\x80-\x9f]|\Z)[^\x07\x18\x1a\x1b\xc2]*+)*+"
# What is left unfinished at the end, by the introducer; C1 controls count as well, but end nothing that ESC began.
_OPEN_ESC = (
    rb"(\x1b)" + _I + rb"(?:(\[)" + _PARAMETERS + rb"|(\])[^\x07\x18\x1a]*+|([PX^_])[^\x18\x1a]*+"
    rb"|([ -/])[\x00-\x17\x19\x1c-/\x7f]*+)?\Z"
)
_OPEN_C1 = rb"(?:(\xc2\x9b)" + _PARAMETERS + rb"|(\xc2\x9d)[^\x07\x18\x1a]*+|(\xc2[\x90\x98\x9e\x9f])[^\x18\x1a]*+)\Z"
_C1_INTRODUCERS = (b"\xc2\x90", b"\xc2\x98", b"\xc2\x9b", b"\xc2\x9d", b"\xc2\x9e", b"\xc2\x9f")
_ST = b"\x1b\\"
_STRING_END = re.compile(rb"[\x07\x18\x1a\x1b]|\xc2(?:[\x80-\x9f]|\Z)")
_LONG_STRING_END = re.compile(rb"[\x18\x1a\x1b]|\xc2(?:[\x80-\x9f]|\Z)")
# What ends the rest of an over-long escape or control sequence: its final byte, a cancel, or what begins another.
_ESC_END = re.compile(rb"[\x18\x1a\x1b\x20-\x7e\x80-\xff]")
_CSI_END = re.compile(rb"[\x18\x1a\x1b\x40-\x7e\x80-\xff]")
_CONTROLS = bytes((*range(0x20), 0x7F))
_PRINTABLES = bytes(byte for byte in range(0x100) if byte not in _CONTROLS)

_CLIPBOARD_NUMBERS = frozenset((52, 5522))
_QUERY_NUMBERS = frozenset((4, 5, *range(10, 20), 21, 22, 39, 49, 50, 52, 60, 61, 99, 702, 708, 1337, 5522))
_ITERM_CLIPBOARD = (b"Copy", b"EndCopy")
_ITERM_QUERIES = (b"ReportCellSize", b"ReportVariable", b"RequestUpload", b"Capabilities")
_ITERM_KEY_BYTES = max(map(len, (*_ITERM_CLIPBOARD, *_ITERM_QUERIES)))
_WITH_PAYLOAD = (52, 99, 5522)  # what they are stands before the first semicolon, or right after it

# What the filter is in the middle of.
_GROUND, _SKIP_OSC, _SKIP_STRING, _SKIP_TMUX, _SKIP_CSI, _SKIP_ESC = range(6)
_REST = {"esc": _SKIP_ESC, "csi": _SKIP_CSI, "osc": _SKIP_OSC, "dcs": _SKIP_STRING, "apc": _SKIP_STRING}
_INTRODUCED = {0x5B: _SKIP_CSI, 0x5D: _SKIP_OSC, 0x50: _SKIP_STRING, 0x58: _SKIP_STRING, 0x5E: _SKIP_STRING,
               0x5F: _SKIP_STRING}  # fmt: skip
_ENDS = {_SKIP_OSC: _STRING_END, _SKIP_CSI: _CSI_END, _SKIP_ESC: _ESC_END}
_PASS, _UNDECIDED = -1, -2


class QueryFilter:
    """Filters output incrementally; any split of the input gives the same result, what is left is byte-exact.

    `mode` is REPLAY, LIVE or PASSIVE and may be set at any time; `clipboard` lets OSC 52 (and its iTerm2 and kitty
    kin) write, and in live mode read, the clipboard. At most SEQUENCE_HELD_MAX_BYTES of a sequence that is not
    complete are held back; one that is longer before it tells what it is, is dropped whole. Raw
    8-bit C1 controls are not looked for: in UTF-8 they are parts of characters. A tmux passthrough (DCS tmux;) is
    dropped unless the clipboard is opted in and the mode is live, because it can hide either. kitty's remote control
    is dropped in all modes, what else kitty answers (DCS @kitty-) in all but live. ST takes the place of what is
    dropped in the middle of another sequence: else what stands before and after it could make a new one.
    """

    __slots__ = ("_held", "_open", "_skipping", "clipboard", "mode")

    def __init__(self, mode: str = LIVE, *, clipboard: bool = False) -> None:
        self.mode = mode
        self.clipboard = clipboard
        self._held = b""
        self._open = b""  # the introducer of what the output so far is in the middle of
        self._skipping = _GROUND

    @property
    def held_bytes(self) -> int:
        """How many bytes are held back."""
        return len(self._held)

    def feed(self, data: bytes) -> bytes:
        """Returns what may go to the terminal; `data` itself when there is nothing to look at in it."""
        live = self.mode == LIVE
        begun = self._held or self._skipping
        if not begun and b"\x1b" not in data and (b"\xc2" not in data or not _FIND_C1.search(data)):
            if self._open:
                self._open = _open(self._open + data, 0, len(self._open) + len(data))
            return data if live else _without_enquiry(data)
        data = self._held + data if self._held else data
        return self._filter(data if live else _without_enquiry(data), live)

    def flush(self) -> bytes:
        """Returns what is held back, because no more output comes, and starts afresh."""
        held = b"" if self._skipping else self._held
        self._held = self._open = b""
        self._skipping = _GROUND
        return held if self.mode == LIVE else _without_enquiry(held)

    def _filter(self, data: bytes, live: bool) -> bytes:
        self._held = b""
        kept: list[bytes] = []
        c1 = bool(_FIND_C1.search(data))
        search = _searcher(c1, live)
        passed = scanned = self._skip(data, 0) if self._skipping else 0
        found, long = search(data, scanned), _overlong(data, scanned, c1)
        while not self._skipping and (found or long):
            # What was found is looked for again only behind it: else many long sequences would take quadratic time.
            if found and found.start() < scanned:
                found = search(data, scanned)
                continue
            if long and long.start() < scanned:
                long = _overlong(data, scanned, c1)
                continue
            if long and (found is None or long.start() <= found.start()):
                self._keep(kept, data, passed, long.start(), dropping=True)
                self._skipping = _REST[long.lastgroup or "esc"]
                passed = scanned = self._skip(data, long.end())
                continue
            assert found is not None  # the loop's condition
            scanned = found.end()
            verdict = self._judge(found, data, live)
            if verdict == _PASS:
                continue
            self._keep(kept, data, passed, found.start(), dropping=verdict != _UNDECIDED)
            passed = found.start()
            if verdict == _UNDECIDED:
                break
            if found.lastgroup == "csi":  # the controls within are carried out, so they stay
                kept.append(data[passed:scanned].translate(None, _PRINTABLES).replace(b"\x1b", b""))
            passed = scanned
            if verdict != _GROUND:
                self._skipping = verdict
                passed = scanned = self._skip(data, scanned)
        else:
            if not self._skipping:
                last = max(scanned, len(data) - SEQUENCE_HELD_MAX_BYTES)
                rest = re.compile(_INCOMPLETE).search(data, max(last, data.rfind(b"\x1b", last)))
                stop = rest.start() if rest else len(data)
                self._keep(kept, data, passed, stop)
                passed = stop
        if not self._held:
            self._held = data[passed:]
        return b"".join(kept)

    def _keep(self, kept: list[bytes], data: bytes, start: int, end: int, *, dropping: bool = False) -> None:
        """Keeps a part of `data`, and ends what it leaves unfinished if what follows is dropped."""
        if start < end:
            kept.append(data[start:end])
            if self._open:
                piece = self._open + kept[-1]
                self._open = _open(piece, 0, len(piece))
            else:
                self._open = _open(data, start, end)
        if dropping and self._open:
            kept.append(_ST)
            self._open = b""

    def _judge(self, found: re.Match[bytes], data: bytes, live: bool) -> int:
        """Returns _PASS, _UNDECIDED, or what to be in the middle of after dropping the match."""
        kind = found.lastgroup
        if kind == "kitty":
            return _SKIP_STRING if not live or found["remote"] else _PASS
        if live and self.clipboard:
            return _PASS
        if live and kind not in ("osc", "tmux"):
            return _PASS
        if kind == "osc":
            return self._judge_osc(found, data, live)
        if kind == "tmux":
            return _SKIP_TMUX
        if kind == "decid":
            return _GROUND
        if kind == "dcs":
            header = found["dcs"].translate(None, _CONTROLS)
            return _SKIP_STRING if header.endswith((b"$q", b"+q", b"+Q")) else _PASS
        if kind == "apc":
            return _SKIP_STRING if b"a=q" in found["keys"].translate(None, _CONTROLS).split(b",") else _PASS
        sequence = found["csi"].translate(None, _CONTROLS).removeprefix(b"\xc2\x9b").removeprefix(b"[")
        return _GROUND if re.fullmatch(_QUERY_CSI, sequence) else _PASS

    def _judge_osc(self, found: re.Match[bytes], data: bytes, live: bool) -> int:
        digits = found["number"].translate(None, _CONTROLS).lstrip(b"0")
        number = int(digits) if 0 < len(digits) <= 4 else 0
        if number not in _QUERY_NUMBERS or (live and number not in _CLIPBOARD_NUMBERS and number != 1337):
            return _PASS
        if number in _CLIPBOARD_NUMBERS and not self.clipboard and data[found.end()] == ord(";"):
            return _SKIP_OSC
        end = _body_end(data, found.end())
        long = end - found.start() > SEQUENCE_HELD_MAX_BYTES
        if not long and (end == len(data) or (data[end] == 0xC2 and end + 1 == len(data))):
            return _UNDECIDED
        end = min(end, found.start() + SEQUENCE_HELD_MAX_BYTES)
        body = data[found.end() : end].translate(None, _CONTROLS).removeprefix(b";")
        if long and not _tells(number, body):
            return _SKIP_OSC
        if number == 1337 and not self.clipboard and body.startswith(_ITERM_CLIPBOARD):
            return _SKIP_OSC
        return _SKIP_OSC if not live and _is_query(number, body) else _PASS

    def _skip(self, data: bytes, start: int) -> int:
        """Skips the rest of a dropped string; returns where ground is reached, or the length of `data`.

        A last byte that needs the next one to be understood is held.
        """
        while found := _ENDS.get(self._skipping, _LONG_STRING_END).search(data, start):
            position = found.start()
            if self._skipping in (_SKIP_CSI, _SKIP_ESC):
                byte, begun = data[position], self._skipping == _SKIP_ESC
                self._skipping = _INTRODUCED.get(byte, _GROUND) if begun else _GROUND
                start = position if byte == 0x1B or byte >= 0x80 else position + 1
                if self._skipping:
                    continue
                return start
            two = data[position : position + 2]
            if two in (b"\x1b", b"\xc2"):
                self._held = two
                return len(data)
            if two == b"\x1b\x1b" and self._skipping == _SKIP_TMUX:
                start = position + 2
                continue
            self._skipping = _GROUND
            if two in (b"\x1b\\", b"\xc2\x9c"):
                return position + 2
            return position if data[position] in (0x1B, 0xC2) else position + 1
        return len(data)


def _open(data: bytes, start: int, end: int) -> bytes:
    """Returns the introducers of what data[start:end] leaves unfinished, for C1 controls obeyed and not."""
    begin = data.rfind(b"\x1b", start, end)
    found = re.compile(_OPEN_ESC).match(data, begin, end) if begin >= 0 else None
    opened = b"".join(filter(None, found.groups())) if found else b""
    if data.find(b"\xc2", max(begin, start), end) >= 0:
        last = max(data.rfind(introducer, max(begin, start), end) for introducer in _C1_INTRODUCERS)
        found = re.compile(_OPEN_C1).match(data, last, end) if last >= 0 else None
        opened += b"".join(filter(None, found.groups())) if found else b""
        opened += b"\xc2" if data[end - 1] == 0xC2 else b""
    return opened


def _searcher(c1: bool, live: bool) -> Callable[[bytes, int], re.Match[bytes] | None]:
    if c1:
        return re.compile(_C1).search
    return re.compile(_FIND_CLIPBOARD).search if live else re.compile(_FIND_QUERIES).search


def _overlong(data: bytes, start: int, c1: bool) -> re.Match[bytes] | None:
    """Finds a sequence that could still be anything after SEQUENCE_HELD_MAX_BYTES: terminals skip padding."""
    if len(data) - start <= SEQUENCE_HELD_MAX_BYTES:
        return None
    for begin in _long_starts(data, start, c1):
        end = begin + SEQUENCE_HELD_MAX_BYTES + 1
        if end <= len(data) and (found := re.compile(_INCOMPLETE).match(data, begin, end)):
            return found
    return None


def _long_starts(data: bytes, start: int, c1: bool) -> Iterator[int]:
    """Yields where sequences begin that are not interrupted for SEQUENCE_HELD_MAX_BYTES."""
    if c1:
        yield from (found.start() for found in re.compile(_LONG).finditer(data, start))
        return
    begin = data.find(b"\x1b", start)
    while begin >= 0:
        last = data.rfind(b"\x1b", begin, begin + SEQUENCE_HELD_MAX_BYTES + 1)
        if last == begin:
            yield begin
            last = data.find(b"\x1b", begin + 1)
        begin = last


def _body_end(data: bytes, start: int) -> int:
    found = re.compile(_BODY).match(data, start, start + SEQUENCE_HELD_MAX_BYTES + 1)
    return found.end() if found else start


def _tells(number: int, body: bytes) -> bool:
    """Says whether the beginning of a long OSC's body is enough to judge it by."""
    if number == 1337:
        return len(body) >= _ITERM_KEY_BYTES
    return number in _WITH_PAYLOAD and bool(body.partition(b";")[2])


def _is_query(number: int, body: bytes) -> bool:
    if number in (60, 61):
        return True
    if number == 21:
        return any(field.endswith(b"=?") for field in body.split(b";"))
    if number == 99:
        return b"p=?" in body.partition(b";")[0].split(b":")
    if number == 1337:
        return body.startswith(_ITERM_QUERIES)
    if number == 5522:
        return b"type=read" in body.partition(b";")[0].split(b":")
    return any(field.startswith(b"?") for field in body.split(b";"))


def _without_enquiry(data: bytes) -> bytes:
    """Drops ENQ, which makes a terminal send its answerback string; it draws nothing."""
    return data.replace(b"\x05", b"") if b"\x05" in data else data
