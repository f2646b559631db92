"""Agents that misbehave on their socket never harm the sessions of others, the node, or their users' terminals."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.codec import Frame
from sterna.protocol.compress import compress
from sterna.protocol.frame import Type, encode
from sterna.protocol.link import Link
from sterna.protocol.messages import Error, Exit, Hello, LaneState, Opened, Snapshot
from tests.e2e.raw_client import MIB, Site, new_device, unharmed
from tests.e2e.rig import Rig, wait_for

pytestmark = pytest.mark.xdist_group("refused-pods")

CLIENT_MAX_KIB = 160 * 1024
HELLO = encode(Type.HELLO, 0, 0, messages.pack(Hello(1, "pty", b"i" * 16, ["many", "snapshot"])))


class Rogue:
    """An agent's end of the pod socket, in a thread: `behave` gets each connection of the node."""

    def __init__(self, site: Site, name: str, behave: Callable[[Line], None]) -> None:
        self.path = os.fspath(site.rig.sockets / f"local_{name}")
        self.connections = 0
        self._behave = behave
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._closing = False
        self._sock: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self._closing:
                sock.close()
                return
            self.connections += 1
            self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(15)
        self._sock = sock
        with sock, contextlib.suppress(OSError, EndedError):
            self._behave(Line(sock))

    def __enter__(self) -> Rogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closing = True
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self.path)
        self._thread.join(5)
        self._listener.close()
        os.unlink(self.path)


class EndedError(Exception):
    """The node has closed the connection."""


class Line:
    """One connection of the node to a rogue agent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.link = Link()
        self.frames: list[Frame] = []

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def say(self, kind: int, handle: int, message: messages.Message) -> None:
        self.raw(encode(kind, handle, 0, messages.pack(message)))

    def until(self, *kinds: int) -> Frame:
        while True:
            while self.frames:
                frame = self.frames.pop(0)
                if frame[0] in kinds:
                    return frame
            data = self.sock.recv(65536)
            if not data:
                raise EndedError
            self.frames += self.link.receive(data)

    def open(self, after: int = 0, base: int = 0) -> tuple[int, int]:
        """Greets and takes the next session: its handle and that of its lane."""
        self.raw(HELLO)
        handle = self.until(Type.OPEN)[1]
        self.say(Type.OPENED, handle, Opened(after, base))
        return handle, self.until(Type.LANE)[1]

    def linger(self) -> None:
        """Reads until the node ends it."""
        while True:
            self.until(0)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        yield Site(rig)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- bytes that are no frames, and none at all -----------------------------------------------------------------

GARBAGE: dict[str, Callable[[Line], None]] = {
    "noise": lambda line: line.raw(os.urandom(100_000)),
    "http": lambda line: line.raw(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "close at once": lambda line: None,
    "hello, then noise": lambda line: line.raw(HELLO + os.urandom(100_000)),
    "hello, then close": lambda line: line.raw(HELLO),
    "half a frame": lambda line: line.raw(HELLO[:20]),
    "two hellos": lambda line: line.raw(HELLO * 2 + b"x"),
    "bad hello": lambda line: line.raw(encode(Type.HELLO, 0, 0, b"\x81\xa7version\xa1x")),
    "huge counts": lambda line: line.raw(
        encode(Type.OPENED, 1, 0, b"\x83\xa4next\x00\xa4base\x00\xa5lanes\xdd\xff\xff\xff\xff")
    ),
    "a thousand opened": lambda line: line.raw(
        HELLO + b"".join(encode(Type.OPENED, n, 0, messages.pack(Opened(n, n))) for n in range(1000))
    ),
}


def test_garbage_from_a_pod_costs_little_and_harms_nobody(site: Site) -> None:
    """Ten agents at once that end or break every connection: each is asked again ever more rarely."""
    with unharmed(site, 16), contextlib.ExitStack() as stack:
        rogues = [stack.enter_context(Rogue(site, f"garbage{n}", behave)) for n, behave in enumerate(GARBAGE.values())]
        wait_for(lambda: all(rogue.connections >= 2 for rogue in rogues), name="the node to try again")
        cpu, start = cpu_seconds(site.pid), time.monotonic()
        tries = [rogue.connections for rogue in rogues]
        time.sleep(2.0)
        used = (cpu_seconds(site.pid) - cpu) / (time.monotonic() - start)
        more = [rogue.connections - before for rogue, before in zip(rogues, tries, strict=True)]
        print(f"connections within 2 s: {more}; the node used {used:.2f} of a processor")
        assert max(more) <= 10
        assert used < 0.5


def test_a_pod_that_never_greets_is_given_up(site: Site) -> None:
    with unharmed(site), Rogue(site, "mute", Line.linger), site.client() as raw:
        start = time.monotonic()
        raw.send(Type.CONNECT, 1, 0, raw.signed(raw.connect_body(agent="mute", name="mute")))
        kind, _, _, payload = raw.until(Type.ERROR, Type.ACCEPT, seconds=limits.HANDSHAKE_SECONDS + 5)
        assert kind == Type.ERROR
        assert messages.unpack(Error, payload).code == Code.NO_AGENT
        assert time.monotonic() - start < limits.HANDSHAKE_SECONDS + 3
        raw.connect(handle=2)
        assert raw.echo(b"others", 0, handle=2) == b"others"


def test_thousands_of_names_for_one_socket_keep_no_agent_out_and_fill_no_log(site: Site) -> None:
    """As a user of another tenant may make them in a directory that all write to."""
    rig, names = site.rig, [f"mallory_x{number}" for number in range(4_200)]
    first = rig.sockets / "mallory_first"
    assert rig.node is not None
    with unharmed(site, 16), socket.socket(socket.AF_UNIX) as sock, site.client() as raw:
        sock.bind(os.fspath(first))
        sock.listen(100)
        before = rig.node.log.stat().st_size
        try:
            for name in names:
                os.link(first, rig.sockets / name)
            rig.start_pod("late", "cat", kind="stream")
            raw.connect(want="call")
            wait_for(lambda: "late" in [agent["name"] for agent in raw.call("list")["agents"]], name="the agent")
            raw.connect(handle=2, agent="late")
            assert raw.echo(b"late", 0, handle=2) == b"late"
            grown = rig.node.log.stat().st_size - before
            print(f"the log grew by {grown} bytes")
            assert grown < 64 * 1024
        finally:
            for name in ("mallory_first", *names):
                (rig.sockets / name).unlink(missing_ok=True)


# ---- a session of its own --------------------------------------------------------------------------------------


def lie(kind: int, position: int, payload: bytes = b"x") -> Callable[[Line], None]:
    def behave(line: Line) -> None:
        handle, _ = line.open()
        line.raw(encode(kind, handle, position, payload))
        line.linger()

    return behave


def wrong_ack(line: Line) -> None:
    _, lane = line.open()
    line.raw(encode(Type.ACK, lane, 0, b"\xff" * 8))
    line.linger()


def opened_beyond(line: Line) -> None:
    line.open(2**62, 2**62)
    line.linger()


def opened_backwards(line: Line) -> None:
    line.open(0, 2**63 - 1)
    line.linger()


def strange_exit(line: Line) -> None:
    handle, _ = line.open()
    line.say(Type.EXIT, handle, Exit(2**63 - 1, 2**63 + 5, -(2**62), [LaneState(os.urandom(16), 2**62)] * 500))
    line.linger()


def close_in_the_middle(line: Line) -> None:
    handle, _ = line.open()
    line.raw(encode(Type.DATA, handle, 0, bytes(1000))[:500])


def snapshot_from_the_future(line: Line) -> None:
    line.raw(HELLO)
    handle = line.until(Type.OPEN)[1]
    line.say(Type.OPENED, handle, Opened(0, 0))
    line.raw(encode(Type.DATA, handle, 0, b"x" * 10))
    token = messages.unpack(messages.Capture, line.until(Type.CAPTURE)[3]).token
    line.say(Type.SNAPSHOT, handle, Snapshot(2**62, 0, True, False, b"future", None, token))
    line.linger()


LIES: dict[str, Callable[[Line], None]] = {
    "data with a gap": lie(Type.DATA, 1000),
    "data from before the beginning": lie(Type.DATA, 2**31 + 5),
    "an exit that is none": lie(Type.EXIT, 0, b"\xc1"),
    "an exit beyond all numbers": strange_exit,
    "an acknowledgement of 2^64 - 1": wrong_ack,
    "positions beyond the journal": opened_beyond,
    "positions in the wrong order": opened_backwards,
    "the end in the middle of a frame": close_in_the_middle,
    "a snapshot without a question": lie(Type.SNAPSHOT, 0, messages.pack(Snapshot(0, 0, True, True, b"x", None, 77))),
    "a snapshot that is none": lie(Type.SNAPSHOT, 0, b"\x93"),
}


def test_lies_about_a_session_harm_only_that_session(site: Site) -> None:
    taken: list[str] = []
    with unharmed(site, 16), contextlib.ExitStack() as stack:
        for number, (name, behave) in enumerate(LIES.items()):
            stack.enter_context(Rogue(site, f"liar{number}", behave))
            print(name)
            with site.client() as raw:
                answer = raw.ask(agent=f"liar{number}", name=f"liar{number}", exact=False, term="xterm")
                if not isinstance(answer, Error):
                    taken.append(f"liar{number}")
                # What it says may be an error, an end, or nothing; the connection it came on is not what suffers.
                raw.send(Type.DATA, 1, 0, b"typed")
                assert raw.alive(), name
                raw.connect(handle=2)
                assert raw.echo(b"mine", 0, handle=2) == b"mine", name
        # Control: who tells the truth is believed.
        stack.enter_context(Rogue(site, "honest", lie(Type.DATA, 0, b"truth")))
        with site.client() as raw:
            raw.connect(agent="honest", name="honest", exact=False)
            assert raw.data(5) == b"truth"
        with site.client() as raw:
            raw.connect(want="call")
            names = {session["name"] for session in raw.call("list")["sessions"]}
            assert len(taken) >= len(LIES) - 1
            outputs = set()
            for name in taken:
                assert name in names
                outputs.add(raw.call("info", session=name)["output"])
                raw.call("close", session=name)
            assert outputs == {0, 2**62}, "no lie became output; where it begins is the agent's to say"


def test_a_snapshot_from_the_future_moves_nobody(site: Site) -> None:
    with unharmed(site), Rogue(site, "future", snapshot_from_the_future) as rogue, site.client() as raw:
        accept = raw.connect(agent="future", name="future", exact=False, term="xterm", cols=80, rows=24)
        assert raw.data(10) == b"x" * 10
        with site.client() as second:
            second.connect(want="join", uid=accept.uid, exact=False, term="xterm", cols=80, rows=24)
            wait_for(lambda: rogue.connections >= 2, name="the node to end its connection")
            assert second.alive()


@pytest.mark.parametrize("how", ["alone", "beside-another-device", "resume"])
def test_a_device_revoked_while_the_agent_is_waited_for_stays_out(site: Site, how: str) -> None:
    opens, attachment = 0, os.urandom(16)
    answers = threading.Semaphore(1 if how == "resume" else 0)

    def hesitate(line: Line) -> None:
        nonlocal opens
        line.raw(HELLO)
        handle = line.until(Type.OPEN)[1]
        opens += 1
        answers.acquire()
        line.say(Type.OPENED, handle, Opened(0, 0))
        line.until(Type.LANE)
        if how != "resume" or opens > 1:
            line.linger()

    with Rogue(site, f"slow-{how}", hesitate), site.client() as owner, site.client() as raw:
        owner.connect(want="call")
        wish: dict[str, Any] = {"agent": f"slow-{how}", "name": f"slow-{how}", "attachment": attachment}
        late = raw
        if how == "resume":
            accept = raw.connect(**wish)  # then the agent's connection is lost, and it is slow on the next one
            wait_for(lambda: opens == 2, name="the session to be asked for again")
            late = site.client(device=raw.device)
            late.send(Type.RESUME, 1, 0, late.signed(late.resume_body(accept, attachment)))
        else:
            raw.send(Type.CONNECT, 1, 0, raw.signed(raw.connect_body(**wish)))
            wait_for(lambda: opens == 1, name="the session to be asked for")
        if how == "beside-another-device":
            mine, raw.device = raw.device, new_device()
            raw.connect(handle=2)
            raw.device = mine
        assert late.alive()
        assert owner.call("revoke", device=raw.device.id.hex())["device"] == raw.device.id.hex()
        answers.release()
        answer = late.answer(1)
        assert isinstance(answer, Error), answer
        assert answer.code == Code.REVOKED
        late.close()
        found = [session for session in owner.call("list")["sessions"] if session["name"] == wish["name"]]
        assert [session["attached"] for session in found] == [0]


def test_output_without_a_window_is_kept_within_the_ring(site: Site) -> None:
    """64 MiB that nobody asked for: what the ring cannot keep is gone, the node's memory stays what it was."""
    sent = threading.Event()

    def flood(line: Line) -> None:
        handle, _ = line.open()
        position, chunk = 0, bytes(65_000)
        while position < 64 * MIB:
            line.raw(encode(Type.DATA, handle, position, chunk))
            position += len(chunk)
        sent.set()
        line.linger()

    with unharmed(site, 8), Rogue(site, "flood", flood), site.client() as raw:
        accept = raw.connect(agent="flood", name="flood", exact=False)
        assert sent.wait(20)
        with site.client() as caller:
            caller.connect(want="call")
            wait_for(lambda: caller.call("info", session="flood")["output"] >= 64 * MIB, name="all of it")
            about = caller.call("info", session="flood")
            assert about["output"] - about["kept"] <= limits.RING_BYTES + 2 * limits.CHUNK_MAX_BYTES
        assert accept.window == limits.WINDOW_BYTES


def test_a_snapshot_without_end_does_not_cost_the_connection_of_others(site: Site) -> None:
    """Parts and parts, never the last one, to a client that has other sessions on the same connection."""
    refused = threading.Event()

    def endless(number: Callable[[int], int]) -> Callable[[Line], None]:
        def behave(line: Line) -> None:
            line.raw(HELLO)
            handle = line.until(Type.OPEN)[1]
            line.say(Type.OPENED, handle, Opened(0, 0))
            line.raw(encode(Type.DATA, handle, 0, b"x" * 10))
            token = messages.unpack(messages.Capture, line.until(Type.CAPTURE)[3]).token
            data = bytes(limits.SNAPSHOT_PART_BYTES)
            try:
                for at in range(2000):
                    line.say(Type.SNAPSHOT, handle, Snapshot(10, number(at), False, False, data, None, token))
            finally:
                refused.set()

        return behave

    with unharmed(site, 24):
        for name, number in (("endless", lambda at: at), ("zeros", lambda at: 0)):
            refused.clear()
            with Rogue(site, name, endless(number)), site.client() as first, site.client() as raw:
                accept = first.connect(agent=name, name=name, exact=False, term="xterm", cols=80, rows=24)
                assert first.data(10) == b"x" * 10
                raw.connect()
                raw.send(Type.CONNECT, 2, 0, raw.signed(raw.connect_body(
                    want="join", uid=accept.uid, exact=False, term="xterm", cols=80, rows=24
                )))  # fmt: skip
                assert refused.wait(15)
                assert raw.echo(b"mine", 0) == b"mine"


# ---- what reaches the user's terminal --------------------------------------------------------------------------


def test_a_zstd_bomb_is_refused_by_the_client(site: Site) -> None:
    """256 MiB in a few kilobytes, as the snapshot that paints a new terminal: one sentence, and no memory."""
    data = compress(bytes(256 * MIB))
    assert len(data) < 2 * limits.SNAPSHOT_PART_BYTES

    def behave(line: Line) -> None:
        line.raw(HELLO)
        handle = line.until(Type.OPEN)[1]
        line.say(Type.OPENED, handle, Opened(0, 0))
        line.raw(encode(Type.DATA, handle, 0, b"x" * 10))
        while True:
            token = messages.unpack(messages.Capture, line.until(Type.CAPTURE)[3]).token
            half = len(data) // 2
            line.say(Type.SNAPSHOT, handle, Snapshot(10, 0, False, True, data[:half], None, token))
            line.say(Type.SNAPSHOT, handle, Snapshot(10, 1, True, True, data[half:], None, token))

    with unharmed(site, 8), Rogue(site, "bomb", behave), site.client() as first:
        first.connect(agent="bomb", name="bomb", exact=False, term="xterm", cols=80, rows=24)
        assert first.data(10) == b"x" * 10
        terminal = site.rig.terminal("attach", "bomb")
        peak = 0
        deadline = time.monotonic() + 15
        while terminal.process.poll() is None and peak < CLIENT_MAX_KIB and time.monotonic() < deadline:
            terminal.read(0.01)
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{terminal.process.pid}/status").read_text()
                peak = max(peak, next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))
        assert peak < CLIENT_MAX_KIB
        assert terminal.wait() == 1
        assert b"was refused" in terminal.seen
        assert b"Traceback" not in terminal.seen
        print(f"the client took {peak / 1024:.0f} MiB at most")


def test_last_screens_that_never_end_are_bounded(site: Site) -> None:
    sessions, parts = 80, limits.FINAL_MAX_BYTES // limits.SNAPSHOT_PART_BYTES

    def behave(line: Line) -> None:
        line.raw(HELLO)
        for _ in range(sessions):
            handle = line.until(Type.OPEN)[1]
            line.say(Type.OPENED, handle, Opened(0, 0))
            for number in range(parts):
                line.say(Type.SNAPSHOT, handle, Snapshot(0, number, False, False, os.urandom(60_000)))
            line.raw(encode(Type.DATA, handle, 0, b"sent"))
        line.linger()

    allowed = limits.FINALS_LOADED_PER_TENANT_MAX_BYTES // MIB + 16
    with unharmed(site, allowed), Rogue(site, "screens", behave), site.client() as raw:
        for handle in range(1, sessions + 1):
            raw.connect(handle, agent="screens", name=f"screen-{handle}", want="named")
            assert raw.data(4, handle) == b"sent"
