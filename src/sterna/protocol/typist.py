"""Which terminal answers the program's questions: the last typist's; who is told (docs/protocol.md, EVENT)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sterna.protocol import messages
from sterna.protocol.frame import Type

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sterna.protocol.attachment import Attachment


class Answering:
    """What each terminal was told last, so that two who type in turn cost nobody else a frame."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told: dict[Attachment, bool] = {}

    def tell(self, typist: Attachment, attachments: Iterable[Attachment]) -> None:
        """Tells the typist's terminal that it answers and the others that they do not, where they do not know it.

        One that is alone and was never told anything answers anyway.
        """
        terminals = [attachment for attachment in attachments if attachment.answers]
        for terminal in terminals:
            value = terminal is typist
            known = self._told.get(terminal, value if len(terminals) == 1 else None)
            if known is not value:
                self._told[terminal] = value
                event = messages.Event("typist", count=int(value))
                terminal.link.send_message(Type.EVENT, terminal.handle, event)

    def forget(self, terminal: Attachment) -> None:
        """Forgets a terminal that left."""
        self._told.pop(terminal, None)
