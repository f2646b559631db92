"""One connection's frames, both ways: decoding, queueing, and the closing ERROR (docs/protocol.md, section 1)."""

from __future__ import annotations

from collections.abc import Callable

from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.codec import ALL_FRAMES, Decoder, Frame
from sterna.protocol.frame import Type, encode, header

_JOIN_BELOW = 4096


def _ignore() -> None:
    """Stands for a hook that nobody set."""


class Link:
    """A connection as the core sees it: frames in, bytes out; no socket.

    `wake` is called when there is something to send on a link that had nothing; the driver then takes `data_to_send()`.
    `closing` says that the driver shall close the connection once everything is sent; the driver sets `blocked` while
    its socket takes no more, and nobody then queues bulk data.
    """

    __slots__ = ("_decoder", "_out", "blocked", "closing", "out_bytes", "wake")

    def __init__(self, wake: Callable[[], None] = _ignore) -> None:
        self._decoder = Decoder()
        self._out: list[bytes] = []
        self.out_bytes = 0
        self.blocked = False
        self.closing = False
        self.wake = wake

    def receive(self, data: bytes | memoryview, most: int = ALL_FRAMES) -> list[Frame]:
        """Returns the frames these bytes complete, of `most`; broken bytes queue the closing ERROR instead."""
        frames = self._decoder.feed(data, most)
        if not frames:
            self.check()
        return frames

    def check(self) -> None:
        """Queues the closing ERROR if the last bytes were broken; called after their good frames were dealt with."""
        fault, reason = self._decoder.fault, self._decoder.reason
        if fault is not None and not self.closing:
            self.fail(fault, f"{reason[:1].upper()}{reason[1:]}.")

    def keep(self, data: bytes | memoryview) -> None:
        """Takes bytes to look at them later."""
        self._decoder.keep(data)

    @property
    def more(self) -> bool:
        """Whether what was received may hold more whole frames than were asked for."""
        return self._decoder.more

    def receive_eof(self) -> Code | None:
        """Notes the end of the peer's bytes; returns the fault if it came inside a frame."""
        self._decoder.eof()
        return self._decoder.fault

    @property
    def waiting(self) -> int:
        """Bytes held of a frame that is not whole yet."""
        return self._decoder.waiting

    def send(self, kind: int, handle: int, seq: int, payload: bytes = b"") -> None:
        """Queues one frame."""
        if self.closing:
            return
        out = self._out
        if len(payload) < _JOIN_BELOW:
            frame = encode(kind, handle, seq, payload)
            self.out_bytes += len(frame)
            out.append(frame)
        else:
            head = header(kind, handle, seq, payload)
            self.out_bytes += len(head) + len(payload)
            out.append(head)
            out.append(payload)
        self.wake()

    def send_message(self, kind: int, handle: int, message: messages.Message, seq: int = 0) -> None:
        """Queues one control frame."""
        self.send(kind, handle, seq, messages.pack(message))

    def refuse(self, handle: int, code: Code, message: str, **more: float | int | str | None) -> None:
        """Queues an ERROR for one handle: only that attachment ends."""
        self.send_message(Type.ERROR, handle, messages.error(code, message, **more))  # type: ignore[arg-type]  # passed on by name

    def fail(self, code: Code, message: str, **more: float | int | str | None) -> None:
        """Queues an ERROR on session 0 and closes the connection after it."""
        self.refuse(0, code, message, **more)
        self.closing = True

    def data_to_send(self) -> list[bytes]:
        """Returns the queued bytes, which the driver must send in this order, and forgets them."""
        out = self._out
        self._out = []
        self.out_bytes = 0
        return out
