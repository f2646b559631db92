"""A client of an agent that answers lines and prints numbered ones; says what came, when, and over what.

`python -m tests.e2e.quic_roamer STATE HOST PORT QUIC_PORT SECONDS`; with QUIC_PORT 0 the client decides for itself, as
anybody's does. It imports nothing that would have QUIC loaded before that.
"""

from __future__ import annotations

import json
import os
import sys
import time

from sterna.client.blocking import connect


def run(state: str, host: str, port: int, quic_port: int, seconds: float) -> None:
    os.environ["STERNA_STATE"] = state
    named = quic_port or None
    session = connect("both", new=True, state=state, host=host, port=port, quic_port=named, timeout=10.0)
    driver = session._driver
    machine = driver.machine
    seen, due = b"", 0.0
    sent_at: dict[int, float] = {}
    lines: list[int] = []
    echoes: list[tuple[float, float]] = []
    numbers: list[int] = []
    over: list[tuple[int, str]] = []
    start, loaded = 0.0, False
    while not start or time.monotonic() < start + seconds:
        now = time.monotonic()
        if not start and (named is None or machine.active in driver._quics):
            start = now
            session.events()
            loaded = "qh3" in sys.modules
            print("ready", flush=True)
        if start and machine.active is not None and machine.active not in numbers:
            numbers.append(machine.active)
            over.append((machine.active, "quic" if machine.active in driver._quics else "tcp"))
        if now >= due:
            due = now + 0.005
            sent_at[len(sent_at)] = now
            session.write(b"%d\n" % (len(sent_at) - 1), timeout=10.0)
        try:
            seen += session.read(timeout=max(due - time.monotonic(), 0.0))
        except TimeoutError:
            continue
        now = time.monotonic()
        *whole, seen = seen.split(b"\n")
        for line in whole:
            kind, _, number = line.partition(b" ")
            if kind == b"L":
                lines.append(int(number))
            else:
                echoes.append((sent_at[int(number)], now))
    troubles = [repr(event) for event in session.events()]
    found = {"lines": lines, "echoes": echoes, "numbers": numbers, "over": over, "troubles": troubles, "loaded": loaded}
    print(json.dumps(found), flush=True)
    session.abort()


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
