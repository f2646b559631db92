"""Watchers that come and go in a loop: whoever types into that session must not notice.

The program has 10,000 coloured lines above its screen, so each watcher's picture is much work.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from sterna.pod.screen import engine_name
from sterna.protocol import messages
from sterna.protocol.compress import decompress
from sterna.protocol.frame import Type
from tests.e2e.raw_client import Raw, Site
from tests.e2e.rig import Rig

pytestmark = [
    pytest.mark.xdist_group("capture-load"),
    pytest.mark.skipif(engine_name() != "ghostty", reason="libghostty-vt is not there"),
]

LINES = 10_000
WATCHERS = 2
KEYS_SECONDS = 5.0
KEY_EVERY_SECONDS = 0.01
ECHO_P99_SECONDS = 0.25

PROGRAM = f"""
import os, tty
tty.setraw(0)
out = open(1, "wb", closefd=False)
for n in range({LINES}):
    out.write(b"".join(b"\\x1b[3%d;4%dm%03d " % ((n + k) % 8, (n * k) % 8, k) for k in range(19)))
    out.write(b"\\x1b[m%d\\r\\n" % n)
out.write(b"ready")
out.flush()
while True:
    os.write(1, os.read(0, 1))
"""


class Watcher:
    """Attaches, waits for the whole picture, leaves, and comes again, in a thread."""

    def __init__(self, site: Site, uid: bytes) -> None:
        self._site = site
        self._uid = uid
        self.sizes: list[int] = []
        self.fault = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._site.client(local=True) as raw:
                while not self._stop.is_set():
                    self._come(raw, 1 + len(self.sizes))
        except (AssertionError, OSError) as error:
            self.fault = str(error) or repr(error)

    def _come(self, raw: Raw, handle: int) -> None:
        raw.connect(handle, want="join", uid=self._uid, mode="watch", exact=False, cols=80, rows=24)
        data = b""
        while True:
            part = messages.unpack(messages.Snapshot, raw.until(Type.SNAPSHOT, handle=handle, seconds=30)[3])
            data += part.data
            if part.last:
                break
        assert part.zstd
        self.sizes.append(len(decompress(data)))
        raw.say(Type.SUSPEND, handle, messages.Suspend())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(40)
        assert not self._thread.is_alive()
        assert not self.fault, self.fault


@pytest.fixture
def site() -> Iterator[Site]:
    with Rig() as rig:
        rig.start_pod("loud", sys.executable, "-c", PROGRAM)
        rig.start_node()
        yield Site(rig)


def test_who_types_does_not_notice_watchers_in_a_loop(site: Site) -> None:
    with site.client(local=True) as driver:
        accept = driver.connect(agent="loud", exact=False, cols=80, rows=24, term="xterm")
        got = 0
        tail = b""
        while not tail.endswith(b"ready"):
            payload = driver.until(Type.DATA, handle=1)[3]
            got += len(payload)
            tail = (tail + payload)[-5:]
            driver.send(Type.ACK, 1, got, got.to_bytes(8, "big"))
        watchers = [Watcher(site, accept.uid) for _ in range(WATCHERS)]
        times: list[float] = []
        end = time.monotonic() + KEYS_SECONDS
        while time.monotonic() < end or min(len(watcher.sizes) for watcher in watchers) < 2:
            start = time.monotonic()
            assert start < end + 30, "no pictures came"
            key = os.urandom(1).hex().encode()[:1]
            driver.send(Type.DATA, 1, len(times), key)
            assert driver.data(1) == key
            times.append(time.monotonic() - start)
            got += 1
            driver.send(Type.ACK, 1, got, got.to_bytes(8, "big"))
            time.sleep(KEY_EVERY_SECONDS)
        for watcher in watchers:
            watcher.stop()
    pictures = [size for watcher in watchers for size in watcher.sizes]
    p50, p99 = (sorted(times)[int(len(times) * part)] for part in (0.5, 0.99))
    print(
        f"{len(times)} keys, p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, max {max(times) * 1000:.1f} ms; "
        f"{len(pictures)} pictures of {min(pictures)} to {max(pictures)} bytes"
    )
    assert min(pictures) > LINES * 80, "the pictures have no scroll-back"
    assert p99 < ECHO_P99_SECONDS
