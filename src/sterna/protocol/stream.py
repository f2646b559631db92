"""The reliable stream: positions, acknowledgement and window (docs/protocol.md, section 2).

Positions are 64-bit byte counts. An input stream also carries *marks* (SIGNAL, EOF) that take one position each, so
they too happen exactly once and in order.
"""

from __future__ import annotations

from collections import deque

from sterna import limits
from sterna.errors import Code, ProtocolError
from sterna.protocol.frame import Type, expand
from sterna.units import MILLISECOND

_DATA = int(Type.DATA)
_JOIN = limits.ACK_JOIN_MS * MILLISECOND
_DELAY = limits.ACK_DELAY_MS * MILLISECOND

Item = tuple[int, int, bytes]
"""(frame type, position of its first byte, payload)."""


def span(kind: int, payload: bytes) -> int:
    """Returns how many positions a frame of a stream takes: its bytes for DATA, one for a mark."""
    return len(payload) if kind == _DATA else 1


class SendStream:
    """Keeps what is not acknowledged and says what to send next.

    `base` is the first position not acknowledged, `sent` the next one to send, `end` the next one to write;
    `window` bounds `end - base`, so memory is bounded. `chunk` is the most payload bytes of one frame.
    """

    __slots__ = ("_items", "_next", "_top", "base", "chunk", "end", "sent", "window")

    def __init__(self, start: int = 0, window: int = limits.WINDOW_BYTES, chunk: int = limits.CHUNK_BYTES) -> None:
        self._items: deque[Item] = deque()
        self._next = 0  # index in _items of the first item that holds unsent bytes
        self._top = start  # the furthest ever sent, on this connection or an earlier one
        self.base = self.sent = self.end = start
        self.window = window
        self.chunk = chunk

    @property
    def room(self) -> int:
        """How many positions may be written now."""
        return self.base + self.window - self.end

    @property
    def unsent(self) -> int:
        """How many positions wait to be sent."""
        return self.end - self.sent

    def write(self, data: bytes) -> int:
        """Takes the first bytes that fit into the window; returns how many."""
        taken = max(min(len(data), self.room), 0)
        step = self.chunk
        for at in range(0, taken, step):
            piece = data[at : min(at + step, taken)]
            self._items.append((_DATA, self.end, piece))
            self.end += len(piece)
        return taken

    def mark(self, kind: int, payload: bytes = b"") -> bool:
        """Writes a mark (SIGNAL or EOF); False when the window is full."""
        if self.room < 1:
            return False
        self._items.append((kind, self.end, payload))
        self.end += 1
        return True

    def take(self, up_to: int | None = None) -> list[Item]:
        """Returns what is to be sent now, and counts it as sent; nothing that begins at `up_to` or later."""
        out: list[Item] = []
        items, index = self._items, self._next
        while index < len(items):
            kind, position, payload = items[index]
            if up_to is not None and position >= up_to:
                break
            if position < self.sent:
                payload = payload[self.sent - position :]
                position = self.sent
            out.append((kind, position, payload))
            self.sent = position + (len(payload) if kind == _DATA else 1)
            index += 1
        self._next = index
        self._top = max(self._top, self.sent)
        return out

    def acknowledge(self, position: int) -> int:
        """Forgets everything before `position`; returns how many positions that were.

        What an earlier connection carried may be acknowledged after `rewind`, before it was sent again; then it is not.
        Raises ProtocolError (`PROTOCOL`) for a position never sent; an old one changes nothing.
        """
        if position > self._top:
            raise ProtocolError(Code.PROTOCOL, f"position {position} was acknowledged but only {self._top} were sent")
        gained = position - self.base
        if gained <= 0:
            return 0
        items = self._items
        while items:
            kind, start, payload = items[0]
            stop = start + (len(payload) if kind == _DATA else 1)
            if stop > position:
                if start < position:
                    items[0] = (kind, position, payload[position - start :])
                break
            items.popleft()
            self._next -= 1
        self._next = max(self._next, 0)
        self.base = position
        self.sent = max(self.sent, position)
        return gained

    def rewind(self, position: int) -> None:
        """Sends again from `position`, the receiver's next byte wanted; what lies before it counts as acknowledged.

        Raises ProtocolError (`GAP`) when the receiver wants bytes that were acknowledged long ago, or never written.
        """
        if not self.base <= position <= self.end:
            raise ProtocolError(Code.GAP, f"position {position} is wanted but only {self.base} to {self.end} are there")
        self._top = max(self._top, position)
        self.acknowledge(position)
        self.sent = position
        self._next = 0

    def unacknowledged(self) -> list[Item]:
        """Returns everything that is not acknowledged, in order."""
        return list(self._items)


class Intake:
    """The receiving half: delivers in order, drops what it has, and says when to acknowledge.

    `next` is the position wanted next, `handled` how far the receiver's own side has really dealt with it, `acked` what
    the peer was told. An acknowledgement is lazy: it joins data that goes out anyway once it is ACK_JOIN_MS old, goes
    by itself after ACK_DELAY_MS, and at once after ACK_EVERY_BYTES.
    """

    __slots__ = ("_since", "acked", "handled", "next")

    def __init__(self, start: int = 0) -> None:
        self.next = self.handled = self.acked = start
        self._since = -1

    def receive(self, kind: int, seq: int, payload: bytes) -> bytes | None:
        """Returns what is new of this frame's payload, None when all of it was had before.

        Raises ProtocolError (`GAP`) when bytes before it are missing.
        """
        want = self.next
        position = expand(seq, want)
        if position > want:
            raise ProtocolError(Code.GAP, f"bytes {want} to {position} are missing")
        size = len(payload) if kind == _DATA else 1
        if position == want:
            self.next = want + size
            return payload if size else None
        if position + size <= want:
            return None
        self.next = position + size
        return payload[want - position :]

    def handle(self, position: int, now: int) -> None:
        """Notes that everything before `position` is dealt with; `now` in monotonic nanoseconds."""
        if position > self.handled:
            self.handled = position
            if self._since < 0:
                self._since = now

    def acknowledgement(self, now: int, joining: bool) -> int | None:
        """Returns the position to acknowledge now, or None; `joining` says that data goes to the peer anyway."""
        since = self._since
        if since < 0:
            return None
        handled = self.handled
        age = now - since
        if age >= _DELAY or handled - self.acked >= limits.ACK_EVERY_BYTES or (joining and age >= _JOIN):
            self._since = -1
            self.acked = handled
            return handled
        return None

    def timeout(self) -> int | None:
        """Returns when an acknowledgement is due by itself, in monotonic nanoseconds, or None."""
        return self._since + _DELAY if self._since >= 0 else None

    def told(self, position: int) -> None:
        """Notes that the peer learnt `position` in another way (RESUMED, OPENED)."""
        self.acked = max(self.acked, position)
        if self.acked >= self.handled:
            self._since = -1

    def skip(self, position: int) -> None:
        """Goes on at `position`: the bytes before it will not come (a gap was announced, or a snapshot stands for
        them).
        """
        self.next = self.handled = self.acked = position
        self._since = -1
