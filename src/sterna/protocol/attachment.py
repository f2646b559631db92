"""What a session consists of: its log, its place at the pod, lanes, attachments (docs/protocol.md, sections 2, 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from sterna import limits
from sterna.errors import Code
from sterna.ids import AttachmentId, DeviceId
from sterna.protocol.link import Link
from sterna.protocol.messages import Lost, Mode

if TYPE_CHECKING:
    from sterna.protocol.session import Session


class OutputLog(Protocol):
    """What the machine needs of a session's durable output."""

    @property
    def tail(self) -> int:
        """The oldest position that can still be read."""

    @property
    def end(self) -> int:
        """The next position."""

    def append(self, data: bytes | memoryview) -> None:
        """Adds bytes; StorageError when they could not be kept."""

    def read(self, position: int, limit: int) -> bytes:
        """Returns at most `limit` bytes from `position`."""

    def keep_from(self, position: int | None) -> None:
        """Says from where on output is unread, so that it may outgrow the ring as far as the log allows."""


class PodPort(Protocol):
    """One session's place on a connection to its pod."""

    link: Link
    handle: int
    features: frozenset[str]

    def lane_handle(self, session: Session, lane: Lane) -> int:
        """Returns a new handle on the pod's connection whose frames are this lane's."""

    def release(self, session: Session) -> None:
        """Forgets the session's handles: it does not come back to this pod."""


class Lane:
    """One attachment's input on its way to the pod; it outlives connections.

    `next` is the position wanted next from the client, `handled` what the pod acknowledged, `handle` its handle on the
    pod's connection (0: none).
    """

    __slots__ = ("attachment", "handle", "handled", "id", "next", "used")

    def __init__(self, attachment_id: AttachmentId, handled: int = 0) -> None:
        self.id = attachment_id
        self.handle = 0
        self.handled = self.next = handled
        self.attachment: Attachment | None = None
        self.used = 0


class Attachment:
    """One client process or browser tab, connected now.

    `cursor` is the next output position to send, `acked` what the client has handled; `waiting` holds output back until
    a snapshot came; `laggard` means that it no longer paces the agent. `answers` says that a terminal is there.
    """

    __slots__ = (
        "acked", "answers", "closing", "cols", "cursor", "device", "exact", "handle", "id", "label", "lane", "laggard",
        "link", "lost", "mode", "progress", "resync", "rows", "session", "waiting", "window",
    )  # fmt: skip

    def __init__(
        self, attachment_id: AttachmentId, link: Link, handle: int, device: DeviceId, mode: Mode, label: str
    ) -> None:
        self.id = attachment_id
        self.link = link
        self.handle = handle
        self.device = device
        self.mode: Mode = mode
        self.label = label
        self.exact = False
        self.answers = False
        self.cols = self.rows = 0
        self.cursor = self.acked = 0
        self.window = limits.WINDOW_BYTES
        self.waiting = self.laggard = self.resync = self.closing = False
        self.progress = 0
        self.lost: Lost | None = None
        self.lane: Lane | None = None
        self.session: Session | None = None

    def rank(self, typist: Attachment | None) -> tuple[bool, bool, int]:
        """Orders drivers: exact ones first, the slowest of them, then the typist, then who is farthest."""
        return self.exact, not self.exact and self is typist, -self.cursor if self.exact else self.cursor


class Capture:
    """A snapshot that the pod was asked for: who gets it (nobody, once they have left), and how many `parts` came.

    `size` is the terminal's when it was asked for, in cells. An `extra` one stands for nothing that is lost: it is
    shown at its place in the output, or not at all.
    """

    __slots__ = ("attachments", "extra", "parts", "size")

    def __init__(self, attachments: list[Attachment], size: tuple[int, int], *, extra: bool) -> None:
        self.attachments = attachments
        self.size = size
        self.extra = extra
        self.parts = 0


class Ended:
    """How a session's program ended: exit code or signal number, or neither when the agent was lost."""

    __slots__ = ("code", "reason", "signal", "status")

    def __init__(self, code: Code, reason: str, status: int | None = None, signal: int | None = None) -> None:
        self.code = code
        self.reason = reason
        self.status = status
        self.signal = signal
