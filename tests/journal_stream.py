"""What the tests of the journal have in common: streams whose every byte follows from its position."""

from __future__ import annotations

import random
from typing import NoReturn

from sterna.journal import LostBytesError, OutputLog

_PERIOD = 1_000_003
_BLOCK = random.Random(20).randbytes(_PERIOD)
_TWICE = _BLOCK + _BLOCK


def stream(key: int, start: int, size: int) -> bytes:
    """Returns the bytes from position `start` of the stream called `key`."""
    at = (start + key * 7919) % _PERIOD
    data = _TWICE[at : at + min(size, _PERIOD)]
    return data if size <= _PERIOD else (data * (size // _PERIOD + 1))[:size]


def read_all(log: OutputLog, limit: int = 65536) -> tuple[list[tuple[int, bytes]], list[tuple[int, int]]]:
    """Returns all readable runs (position, bytes) of a log, and the ranges that reading named as lost."""
    runs: list[tuple[int, bytes]] = []
    lost: list[tuple[int, int]] = []
    position = log.tail
    while position < log.end:
        try:
            data = log.read(position, limit)
        except LostBytesError as error:
            lost.append((error.start, error.end))
            before, position = position, error.end
            assert lost[-1][0] == before < position <= log.end
            continue
        assert 0 < len(data) <= limit
        runs.append((position, data))
        position += len(data)
    assert position == log.end
    assert log.read(log.end, 10) == b""
    return runs, lost


def check_right(log: OutputLog, key: int, limit: int = 65536) -> list[tuple[int, int]]:
    """Fails if any byte of the log is not the stream's; returns what is lost in it."""
    runs, lost = read_all(log, limit)
    for position, data in runs:
        assert data == stream(key, position, len(data)), f"wrong bytes at {position} of log {log.number}"
    return lost


def fill_up(log: OutputLog, step: int) -> NoReturn:
    """Appends the log's own stream until an error ends it."""
    while True:
        log.append(stream(log.number, log.end, step))


def whole(log: OutputLog) -> bytes:
    """Returns everything from tail to end of an undamaged log."""
    runs, lost = read_all(log)
    assert lost == []
    return b"".join(data for _, data in runs)
