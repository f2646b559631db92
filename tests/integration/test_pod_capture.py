"""Pictures of a screen while its program goes on: a pod's server with real programs, its node made by hand."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna import limits
from sterna.pod import screen as screen_module
from sterna.pod.runner import ProgramStarter
from sterna.pod.screen import Terminal, engine_name, open_terminal
from sterna.pod.screen_ghostty import GhosttyTerminal
from sterna.pod.server import PodServer
from sterna.protocol import messages
from sterna.protocol.compress import decompress
from sterna.protocol.frame import Type
from sterna.protocol.link import Link

WAIT_SECONDS = 20.0
SESSION, LANE = 1, 2
UID, ATTACHMENT = b"U" * 16, b"A" * 16

# Says what was typed; "!" ends it.
ECHO = """
import os, tty
tty.setraw(0)
os.write(1, b"".join(b"\\x1b[3%dmline %d\\x1b[0m\\r\\n" % (n % 8, n) for n in range(200)) + b"ready")
while (key := os.read(0, 1)) != b"!":
    os.write(1, key)
"""
# Writes styled lines, wide characters and unfinished sequences until a key is typed.
BUSY = """
import os, random, select, sys, tty
tty.setraw(0)
r = random.Random(int(sys.argv[1]))
os.write(1, b"ready")
while not select.select([0], [], [], 0.002)[0]:
    line = "\\x1b[3%dm%s \\u6570 \\U0001f600\\x1b[48;5;%dm%s\\x1b[m" % (
        r.randrange(8), "word " * r.randrange(30), r.randrange(256), "x" * r.randrange(40))
    data = (line + r.choice(["\\r\\n", "\\x1b[%d;7H" % r.randrange(1, 25), "\\x1b[?25l", "\\x1b[2J"])).encode()
    at = r.randrange(len(data))
    os.write(1, data[:at])
    os.write(1, data[at:])
os.write(1, b"\\x1b[m\\x1b[H\\x1b[JEND")
"""


class Pod:
    """A pod's server on a loop in another thread, and the node's side of its socket; `output` is all that came."""

    def __init__(self, path: str, *command: str) -> None:
        self._up = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(path, list(command))), daemon=True)
        self._thread.start()
        assert self._up.wait(WAIT_SECONDS)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.link = Link()
        self.output = b""
        self.typed = 0
        self.snapshots: dict[int, tuple[int, bytes]] = {}
        self.exit: messages.Exit | None = None
        self._parts: dict[int, bytes] = {}
        self.pongs: list[bytes] = []
        self.link.send_message(Type.OPEN, SESSION, messages.Open(UID, 0, True))
        self.link.send_message(Type.LANE, LANE, messages.Lane(UID, ATTACHMENT))
        self.say(Type.AUDIENCE, messages.Audience(1))

    async def _serve(self, path: str, command: list[str]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        starter = ProgramStarter(command, kind="pty", cwd=os.path.dirname(path), env=os.environ)
        server = PodServer(path, starter, kind="pty", features=["snapshot"])
        self._up.set()
        await self._stop.wait()
        server.close()
        await starter.wait_ended()

    def close(self) -> None:
        self.sock.close()
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()

    def flush(self) -> None:
        for piece in self.link.data_to_send():
            self.sock.sendall(piece)

    def say(self, kind: int, message: messages.Message) -> None:
        self.link.send_message(kind, SESSION, message)
        self.flush()

    def type(self, keys: bytes) -> None:
        self.link.send(Type.DATA, LANE, self.typed, keys)
        self.typed += len(keys)
        self.flush()

    def capture(self, token: int, scrollback: bool = True) -> None:
        self.say(Type.CAPTURE, messages.Capture(token, scrollback))

    def ping(self, mark: bytes) -> None:
        self.link.send(Type.PING, 0, 0, mark)
        self.flush()

    def read(self, seconds: float) -> None:
        """Takes what comes within `seconds`."""
        self.sock.settimeout(seconds)
        try:
            data = self.sock.recv(65_536)
        except TimeoutError:
            return
        assert data, "the pod has closed the connection"
        for kind, handle, _seq, payload in self.link.receive(data):
            if kind == Type.DATA:
                self.output += payload
                self.link.send(Type.ACK, handle, len(self.output), len(self.output).to_bytes(8, "big"))
            elif kind == Type.SNAPSHOT:
                self._part(messages.unpack(messages.Snapshot, payload))
            elif kind == Type.EXIT:
                self.exit = messages.unpack(messages.Exit, payload)
            elif kind == Type.PONG:
                self.pongs.append(payload)
        self.flush()

    def _part(self, part: messages.Snapshot) -> None:
        assert part.position <= len(self.output), "the output that a picture includes goes first"
        data = self._parts[part.token] = self._parts.get(part.token, b"") + part.data
        if part.last:
            assert part.token not in self.snapshots
            self.snapshots[part.token] = part.position, decompress(data) if part.zstd else data

    def until_output(self, wanted: bytes) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while wanted not in self.output:
            assert time.monotonic() < end, f"{wanted!r} did not come: {self.output[-200:]!r}"
            self.read(0.1)

    def until_snapshots(self, *tokens: int) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not self.snapshots.keys() >= set(tokens):
            assert time.monotonic() < end, f"pictures {tokens} did not come, only {list(self.snapshots)}"
            self.read(0.1)

    def assert_same(self, position: int, data: bytes) -> None:
        """Compares a terminal that saw all output with one that got the picture and then what came after it."""
        whole, late = open_terminal(80, 24), open_terminal(80, 24)
        whole.feed(self.output)
        late.feed(data)
        late.feed(self.output[position:])
        assert late.cells(scrollback=True) == whole.cells(scrollback=True)
        assert late.snapshot() == whole.snapshot()


class Gate:
    """Stops every picture with scroll-back where its drawing begins, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[float] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        snapshot = GhosttyTerminal.snapshot

        def gated(terminal: GhosttyTerminal, *, scrollback: bool = True, final: bool = False) -> bytes:
            if scrollback:
                self.begun.append(time.monotonic())
                self.entered.release()
                assert self.open.wait(WAIT_SECONDS)
            return snapshot(terminal, scrollback=scrollback, final=final)

        monkeypatch.setattr(GhosttyTerminal, "snapshot", gated)


needs_ghostty = pytest.mark.skipif(engine_name() != "ghostty", reason="libghostty-vt is not there")


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(os.fspath(tmp_path / "p"), sys.executable, "-c", ECHO)
    pod.until_output(b"ready")
    yield pod
    pod.close()


@needs_ghostty
def test_the_program_is_read_while_its_picture_is_drawn(echo: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    position = len(echo.output)
    echo.capture(7)
    assert gate.entered.acquire(timeout=WAIT_SECONDS)
    try:
        echo.type(b"a key")
        echo.until_output(b"a key")
        # Neither who comes nor who leaves stops the loop that all sessions of the pod share.
        for terminals in (2, 0, 1):
            echo.say(Type.AUDIENCE, messages.Audience(terminals))
        echo.capture(8, scrollback=False)
        echo.until_snapshots(8)
        echo.ping(b"mark")
        while echo.pongs != [b"mark"]:
            echo.read(WAIT_SECONDS)
        assert 7 not in echo.snapshots
    finally:
        gate.open.set()
    echo.until_snapshots(7)
    assert echo.snapshots[7][0] == position
    assert echo.snapshots[8][0] == len(echo.output)
    echo.assert_same(*echo.snapshots[7])


@needs_ghostty
def test_who_waits_for_the_same_shares_one_drawing(echo: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    position = len(echo.output)
    try:
        for token in (1, 2, 3):
            echo.capture(token)
        assert gate.entered.acquire(timeout=WAIT_SECONDS)
        for token, key in ((4, b"a"), (5, b"b"), (6, b"c")):
            echo.type(key)
            echo.until_output(b"ready" + b"abc"[: token - 3])
            echo.capture(token)
        echo.ping(b"mark")
        while echo.pongs != [b"mark"]:
            echo.read(WAIT_SECONDS)
    finally:
        gate.open.set()
    echo.until_snapshots(1, 2, 3, 4, 5, 6)
    assert len(gate.begun) == 2
    assert [echo.snapshots[token][0] for token in (1, 2, 3)] == [position] * 3
    assert [echo.snapshots[token][0] for token in (4, 5, 6)] == [position + 3] * 3
    for token in range(1, 7):
        echo.assert_same(*echo.snapshots[token])


@needs_ghostty
def test_pictures_are_not_begun_one_after_another(echo: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    for token in range(1, 5):
        echo.type(b"x")
        echo.until_output(b"ready" + b"x" * token)
        echo.capture(token)
        echo.until_snapshots(token)
    gaps = [later - earlier for earlier, later in zip(gate.begun, gate.begun[1:], strict=False)]
    print("gaps", gaps)
    # The copy is made before the drawing begins, so a gap may be a little shorter than 250 ms.
    assert len(gaps) == 3
    assert min(gaps) > 0.2


@needs_ghostty
def test_a_flood_is_read_one_window_ahead_of_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    flood = (
        "import os, tty; tty.setraw(0); os.write(1, b'ready'); os.read(0, 1)\nwhile True: os.write(1, b'y\\r\\n' * 999)"
    )
    pod = Pod(os.fspath(tmp_path / "p"), sys.executable, "-c", flood)
    try:
        pod.until_output(b"ready")
        pod.capture(1)
        assert gate.entered.acquire(timeout=WAIT_SECONDS)
        pod.type(b"go")
        end = time.monotonic() + WAIT_SECONDS
        while len(pod.output) < 5 + limits.WINDOW_BYTES:
            assert time.monotonic() < end, f"only {len(pod.output)} bytes came"
            pod.read(0.1)
        pod.ping(b"mark")
        while pod.pongs != [b"mark"]:
            pod.read(WAIT_SECONDS)
        assert len(pod.output) == 5 + limits.WINDOW_BYTES
        gate.open.set()
        while len(pod.output) < 4 * limits.WINDOW_BYTES:
            assert time.monotonic() < end, f"only {len(pod.output)} bytes came"
            pod.read(0.1)
        assert pod.snapshots[1][0] == 5
    finally:
        gate.open.set()
        pod.close()


@pytest.mark.parametrize("packable", [True, False])
def test_pictures_of_a_busy_program_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packable: bool) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    if not packable:
        # An engine without copies: the old way has to go on.
        real = screen_module.open_terminal

        def unpackable(cols: int, rows: int, lines: int = 10_000, *, packed: bytes | None = None) -> Terminal:
            terminal = real(cols, rows, lines, packed=packed)
            return Unpackable(terminal)  # type: ignore[return-value]  # it passes on what it does not have

        monkeypatch.setattr(screen_module, "open_terminal", unpackable)
    pod = Pod(os.fspath(tmp_path / "p"), sys.executable, "-c", BUSY, str(seed))
    try:
        pod.until_output(b"ready")
        ahead = 0
        for token in range(1, 11):
            pod.capture(token, scrollback=token % 3 != 0)
            pod.until_snapshots(token)
            ahead += len(pod.output) - pod.snapshots[token][0]
        pod.type(b"q")
        pod.until_output(b"END")
        while pod.exit is None:
            pod.read(WAIT_SECONDS)
        print(len(pod.output), "bytes,", ahead, "read while pictures were drawn")
        assert pod.exit.position == len(pod.output)
        for token, (position, data) in pod.snapshots.items():
            if token % 3:  # without scroll-back that is as it was on the terminal
                pod.assert_same(position, data)
        whole = open_terminal(80, 24)
        whole.feed(pod.output)
        assert pod.snapshots[0] == (len(pod.output), whole.snapshot(final=True)), "the last screen is another one"
    finally:
        pod.close()


class Unpackable:
    """An engine that cannot be packed."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def pack(self) -> bytes | None:
        return None

    def __getattr__(self, name: str) -> object:
        return getattr(self._terminal, name)
