"""A client that sends whatever a test wants, a heartbeat that shows that others are not harmed, and a node's memory.

Blocking sockets over `Link` and the messages, so that every frame on the wire is made by hand.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sterna.errors import Code
from sterna.ids import NodeId
from sterna.protocol import messages
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type, encode
from sterna.protocol.link import Link
from sterna.protocol.messages import Accept, Close, ConnectBody, Error, ResumeBody, Resumed, Signed
from sterna.trust.device import DeviceKey
from sterna.trust.local import read_local_token
from sterna.trust.pins import local_pin
from sterna.trust.tokens import TokenKey
from tests.e2e.rig import Rig

WAIT_SECONDS = 8.0
BEAT_SECONDS = 0.02
MIB = 1024 * 1024


def new_device() -> DeviceKey:
    """A device that nobody has seen before."""
    return DeviceKey(Ed25519PrivateKey.generate())


class Site:
    """A running node as somebody on its machine sees it: who it is, where it listens, its local token."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.state = os.fspath(rig.state / "node")
        pin = local_pin(self.state)
        token = read_local_token(self.state)
        assert pin is not None
        assert token is not None
        self.node_id: NodeId = pin.node_id
        self.context: ssl.SSLContext = pin.context()
        self.token = token
        self.socket = os.path.join(self.state, "node.sock")

    @property
    def pid(self) -> int:
        """The node's process id."""
        assert self.rig.node is not None
        return self.rig.node.pid

    def issue(self, tenant: str, *agents: str, modes: tuple[str, ...] = ("drive", "watch"), ttl: int = 0) -> str:
        """An access token that the node signed; with a negative `ttl` it has expired already."""
        key, now = TokenKey.load(self.state), int(time.time())
        then = now + ttl - 10 if ttl < 0 else now
        return key.issue(tenant, agents or ("*",), modes, now_s=then, expires=then + max(ttl, 1) if ttl else 0)

    def memory(self) -> int:
        """The node's own memory in bytes (Pss_Anon; proc(5), smaps_rollup)."""
        found = re.search(r"Pss_Anon: +(\d+) kB", Path(f"/proc/{self.pid}/smaps_rollup").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def client(self, **options: Any) -> Raw:
        """A connection to the node; options as for `Raw`."""
        return Raw(self, **options)


class Raw:
    """One connection with hand-made frames; `device` signs, `credential` is what CONNECT shows.

    `local` takes the Unix socket; else TLS over TCP from the address `source` (all of 127.0.0.0/8 is this machine).
    """

    def __init__(
        self, site: Site, *, local: bool = False, source: str = "", device: DeviceKey | None = None,
        credential: str | None = None, port: int = 0, tls: bool = True,
    ) -> None:  # fmt: skip
        self.site = site
        self.device = device or new_device()
        self.credential = site.token if credential is None else credential
        self.link = Link()
        self._frames: list[Frame] = []
        self.eof = False
        if local:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(site.socket)
        else:
            origin = (source, 0) if source else None
            self.sock = socket.create_connection(("127.0.0.1", port or site.rig.port), WAIT_SECONDS, origin)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                self.sock = site.context.wrap_socket(self.sock)

    def __enter__(self) -> Raw:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A test that fails in the middle is to be told for its own reason, not for what it left open.
        if hasattr(self, "sock"):
            self.sock.close()

    def close(self) -> None:
        """Closes the connection."""
        self.sock.close()

    # ---- sending -----------------------------------------------------------------------------------------------

    def raw(self, data: bytes) -> None:
        """Sends bytes as they are; that the node has closed meanwhile shows when they are answered."""
        self.sock.settimeout(WAIT_SECONDS)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.sock.sendall(data)

    def send(self, kind: int, handle: int = 0, seq: int = 0, payload: bytes = b"") -> None:
        """Sends one frame."""
        self.raw(encode(kind, handle, seq, payload))

    def say(self, kind: int, handle: int, message: messages.Message) -> None:
        """Sends one control frame."""
        self.send(kind, handle, 0, messages.pack(message))

    def half_close(self) -> None:
        """Says that no more bytes will come."""
        socket.socket.shutdown(self.sock, socket.SHUT_WR)  # an SSLSocket would forget its keys

    # ---- receiving ---------------------------------------------------------------------------------------------

    def frame(self, seconds: float = WAIT_SECONDS) -> Frame | None:
        """The next frame; None at the connection's end. AssertionError when nothing comes in time."""
        deadline = time.monotonic() + seconds
        while not self._frames and not self.eof:
            left = deadline - time.monotonic()
            assert left > 0, f"nothing came within {seconds} s"
            self.sock.settimeout(left)
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            self.eof = not data
            self._frames += self.link.receive(data)
        return self._frames.pop(0) if self._frames else None

    def until(self, *kinds: int, handle: int | None = None, seconds: float = WAIT_SECONDS) -> Frame:
        """The next frame of one of these types (on one handle)."""
        seen = []
        while (frame := self.frame(seconds)) is not None:
            if frame[0] in kinds and handle in (None, frame[1]):
                return frame
            seen.append(frame[:2])
        raise AssertionError(f"the connection ended before a frame {kinds} came; there were {seen}")

    def error(self, handle: int | None = 0) -> Error:
        """The next ERROR on a handle (None: on any)."""
        return messages.unpack(Error, self.until(Type.ERROR, handle=handle)[3])

    def code(self, handle: int | None = 0) -> Code:
        """The code of the next ERROR on a handle, which must come with its name and a sentence."""
        error = self.error(handle)
        assert error.name == Code(error.code).name.lower()
        assert error.message.endswith("."), error
        return Code(error.code)

    def ended(self, seconds: float = WAIT_SECONDS) -> bool:
        """Reads to the connection's end."""
        while self.frame(seconds) is not None:
            pass
        return True

    def alive(self) -> bool:
        """Whether the node still answers on this connection."""
        mark = os.urandom(8)
        self.send(Type.PING, 0, 0, mark)
        while (frame := self.frame()) is not None:
            if frame[0] == Type.PONG and frame[3] == mark:
                return True
        return False

    def data(self, size: int, handle: int = 1) -> bytes:
        """The next `size` bytes of output."""
        got = b""
        while len(got) < size:
            got += self.until(Type.DATA, handle=handle)[3]
        return got

    # ---- CONNECT and RESUME ------------------------------------------------------------------------------------

    def connect_body(self, **changes: Any) -> ConnectBody:
        """A CONNECT body for the exact echo agent, with changes."""
        fields: dict[str, Any] = {
            "context": messages.CONTEXT_CONNECT, "node": self.site.node_id, "request": os.urandom(16),
            "key": self.device.public, "attachment": os.urandom(16), "credential": self.credential, "agent": "echo",
            "want": "new", "exact": True, "cols": 0, "rows": 0,
        }  # fmt: skip
        return ConnectBody(**{**fields, **changes})

    def signed(self, body: ConnectBody | ResumeBody) -> bytes:
        """The payload of a CONNECT or RESUME frame: the body, signed by our device."""
        packed = messages.pack(body)
        return messages.pack(Signed(packed, self.device.sign(body.context, self.site.node_id, packed)))

    def answer(self, handle: int) -> Accept | Resumed | Error | Close:
        """What comes on a handle that something was asked on; an ERROR for the whole connection also counts."""
        while True:
            kind, on, _, payload = self.until(Type.ACCEPT, Type.RESUMED, Type.ERROR, Type.CLOSE)
            if on in (handle, 0):
                break
        if kind == Type.ACCEPT:
            return messages.unpack(Accept, payload)
        if kind == Type.RESUMED:
            return messages.unpack(Resumed, payload)
        return messages.unpack(Error, payload) if kind == Type.ERROR else messages.unpack(Close, payload)

    def connect(self, handle: int = 1, **changes: Any) -> Accept:
        """CONNECTs; it must be accepted."""
        answer = self.ask(handle, **changes)
        assert isinstance(answer, Accept), answer
        return answer

    def ask(self, handle: int = 1, **changes: Any) -> Accept | Resumed | Error | Close:
        """CONNECTs; returns whatever comes."""
        self.send(Type.CONNECT, handle, 0, self.signed(self.connect_body(**changes)))
        return self.answer(handle)

    def resume_body(self, accept: Accept, attachment: bytes, **changes: Any) -> ResumeBody:
        """A RESUME body for an attachment of a session, with changes."""
        fields: dict[str, Any] = {
            "context": messages.CONTEXT_RESUME, "node": self.site.node_id, "uid": accept.uid,
            "device": bytes(self.device.id), "attachment": attachment, "race": os.urandom(16),
            "counter": time.time_ns(), "epoch": accept.epoch, "log": accept.log, "output": 0, "cols": 0, "rows": 0,
        }  # fmt: skip
        return ResumeBody(**{**fields, **changes})

    def resume(
        self, handle: int, accept: Accept, attachment: bytes, **changes: Any
    ) -> Accept | Resumed | Error | Close:
        """RESUMEs; returns whatever comes."""
        self.send(Type.RESUME, handle, 0, self.signed(self.resume_body(accept, attachment, **changes)))
        return self.answer(handle)

    def call(self, method: str, /, **params: Any) -> Any:
        """The value of a CALL, or its Error."""
        call = messages.Call(1, method, msgspec.Raw(messages.pack(params)))
        self.say(Type.CALL, 0, call)
        result = messages.unpack(messages.Result, self.until(Type.RESULT)[3])
        return result.error if result.error is not None else msgspec.msgpack.decode(result.value)

    def echo(self, data: bytes, position: int, handle: int = 1) -> bytes:
        """Sends input at a position, acknowledges and returns as much output."""
        self.send(Type.DATA, handle, position, data)
        got = self.data(len(data), handle)
        self.send(Type.ACK, handle, position + len(data), (position + len(data)).to_bytes(8, "big"))
        return got


class Pulse:
    """An innocent session on the same node that types a key every 20 ms, in a thread; `check` says how it fared.

    Every key must be answered, on one connection that is never lost, and the slowest 1 % within a second.
    """

    def __init__(self, site: Site) -> None:
        self._raw = site.client()
        self._raw.connect(name=f"pulse-{os.urandom(4).hex()}")
        self.times: list[float] = []
        self.fault = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        position = 0
        try:
            while not self._stop.is_set():
                key = b"%07d " % (position % 10_000_000)
                start = time.monotonic()
                assert self._raw.echo(key, position) == key, f"the echo at {position} is wrong"
                self.times.append(time.monotonic() - start)
                position += len(key)
                self._stop.wait(BEAT_SECONDS)
        except (AssertionError, OSError) as error:
            self.fault = str(error) or repr(error)

    def check(self) -> None:
        """Fails if a key was not answered, or the 99th percentile is a second or more."""
        self._stop.set()
        self._thread.join(WAIT_SECONDS)
        self._raw.close()
        assert not self.fault, self.fault
        assert len(self.times) >= 3
        p99 = sorted(self.times)[int(len(self.times) * 0.99)]
        slowest = max(self.times)
        print(f"beside it {len(self.times)} keys were echoed, p99 {p99 * 1000:.1f} ms, max {slowest * 1000:.1f} ms")
        assert p99 < 1.0


@contextlib.contextmanager
def unharmed(site: Site, grow_mib: float = 8.0) -> Iterator[Pulse]:
    """Runs an innocent session beside what is inside, which may cost the node at most `grow_mib` of its own memory."""
    pulse = Pulse(site)
    try:
        while len(pulse.times) < 3 and not pulse.fault:
            time.sleep(BEAT_SECONDS)
        before = site.memory()
        yield pulse
        grown = site.memory() - before
        print(f"the node's memory grew by {grown / MIB:.2f} MiB from {before / MIB:.1f} MiB")
        assert grown <= grow_mib * MIB, f"the node's memory grew by {grown} bytes"
    finally:
        pulse.check()
