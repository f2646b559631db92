"""Measures the journal: cost of append, read and replay, and time and memory of a start with many logs.

Run as `python bench/journal.py [--logs N] [--directory DIR]`; the directory's file system is part of what is measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial

from sterna.journal import Journal, Log


def resident_bytes() -> int:
    """Returns the anonymous memory of this process (proc_pid_status(5), RssAnon)."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def cost(name: str, call: Callable[[], object], rounds: int, repeat: int = 5) -> None:
    """Prints the best mean of several runs, in microseconds."""
    best = float("inf")
    for _ in range(repeat):
        began = time.perf_counter()
        for _ in range(rounds):
            call()
        best = min(best, (time.perf_counter() - began) / rounds)
    print(f"{name:44} {best * 1e6:10.2f} µs")


def one_log(directory: str) -> None:
    """Prints what the hot path of one session costs."""
    journal = Journal(directory)
    log = journal.create(1)
    one = b"x"
    cost("append 1 byte", lambda: log.append(one), 20_000)
    for size in (4096, 32 * 1024, 64 * 1024):
        block = os.urandom(size)
        cost(f"append {size} bytes, ring turning", partial(log.append, block), 400)
    fresh = [journal.create(number) for number in range(100, 100 + 100)]
    block = os.urandom(64 * 1024)
    began = time.perf_counter()
    for other in fresh:
        for _ in range(8):
            other.append(block)
    print(f"{'append 65536 bytes, pages never used before':44} {(time.perf_counter() - began) / 800 * 1e6:10.2f} µs")
    position = log.chunks[3].start
    cost("read 65536 bytes", lambda: log.read(position, 65536), 2_000)
    cost("read 1 byte at the end", lambda: log.read(log.end - 1, 65536), 20_000)
    cost("replay of the whole ring (1 MiB)", lambda: replay(log), 50)

    def reopen() -> None:
        nonlocal log
        log.release()
        log = journal.open(1)

    cost("release and open with a full ring", reopen, 20)
    journal.close()


def replay(log: Log) -> int:
    """Reads everything that a log has."""
    position = log.tail
    while data := log.read(position, 65536):
        position += len(data)
    return position


def many_logs(directory: str, count: int) -> None:
    """Prints what suspended sessions cost in memory, at a start, and when output comes for one of them."""
    data = os.urandom(1500)
    journal = Journal(directory)
    log: Log | None = None
    began = time.perf_counter()
    for number in range(count):
        log = journal.create(number)
        log.append(data)
        log.release()
    print(f"{f'create, append and release {count} logs':44} {time.perf_counter() - began:10.2f} s")
    journal.close()
    del journal, log
    gc.collect()
    before = resident_bytes()
    began = time.perf_counter()
    journal = Journal(directory)
    print(f"{'scan at start':44} {time.perf_counter() - began:10.2f} s")
    gc.collect()
    print(f"{'memory per log that is not open':44} {(resident_bytes() - before) / count:10.0f} bytes")
    print(f"{'disk per log':44} {journal.used_bytes / count:10.0f} bytes in {journal.arenas} arenas")
    number = 0

    def output() -> None:
        nonlocal number
        number = (number + 7919) % count
        log = journal.open(number)
        log.append(b"some more output\r\n")
        log.pack()
        log.release()

    cost("open, append, pack, release one of them", output, 2_000, repeat=3)
    began = time.perf_counter()
    opened = [journal.open(number) for number in range(0, count, 10)]
    print(f"{'open a tenth of them, each':44} {(time.perf_counter() - began) / len(opened) * 1e6:10.2f} µs")
    gc.collect()
    began = time.perf_counter()
    for number in range(count):
        journal.remove(number)
    print(f"{'remove one log':44} {(time.perf_counter() - began) / count * 1e6:10.2f} µs")
    journal.close()


def main() -> None:
    """Runs both parts in a new directory and removes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logs", type=int, default=100_000)
    parser.add_argument("--directory", default=None)
    options = parser.parse_args()
    root = tempfile.mkdtemp(prefix="journal-", dir=options.directory)
    try:
        one_log(os.path.join(root, "one"))
        many_logs(os.path.join(root, "many"), options.logs)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
