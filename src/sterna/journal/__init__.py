"""The journal: output of sessions held durably in a few large files (docs/protocol.md, section 3)."""

from sterna.errors import LostBytesError, PositionError
from sterna.journal.interface import JournalFullError, OutputLog
from sterna.journal.journal import Journal
from sterna.journal.log import Log
from sterna.journal.memory import MemoryJournal, MemoryLog
from sterna.journal.space import Faults

__all__ = [
    "Faults",
    "Journal",
    "JournalFullError",
    "Log",
    "LostBytesError",
    "MemoryJournal",
    "MemoryLog",
    "OutputLog",
    "PositionError",
]
