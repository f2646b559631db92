"""Frames that nobody may send, each answered with its ERROR while another session of the node goes on unharmed."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.codec import Frame
from sterna.protocol.crc import crc16
from sterna.protocol.frame import Type, encode
from sterna.protocol.link import Link
from sterna.protocol.messages import Accept, Error, Resize, Signal, Signed
from tests.e2e.raw_client import Raw, Site, unharmed
from tests.e2e.rig import Rig

pytestmark = pytest.mark.xdist_group("refused-frames")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        yield Site(rig)


def broken(kind: int, payload: bytes = b"", *, magic: bytes = b"CL", length: int | None = None, crc: int = 0) -> bytes:
    """A frame whose checksum is right unless `crc` changes it, but whose magic or length may lie."""
    size = len(payload) if length is None else length
    head = magic + struct.pack(">BIIH", kind, 0, 0, size)
    return head + (crc16(payload, crc16(head)) ^ crc).to_bytes(2, "big") + payload


FAULTS: dict[str, tuple[bytes, Code]] = {
    "bad magic": (broken(Type.PING, b"x", magic=b"XL"), Code.BAD_MAGIC),
    "http": (b"GET / HTTP/1.1\r\nHost: sterna\r\n\r\n", Code.BAD_MAGIC),
    "bad crc": (broken(Type.PING, b"x", crc=1), Code.BAD_CRC),
    "bad crc of a connect": (broken(Type.CONNECT, b"\x80", crc=0x8000), Code.BAD_CRC),
    "huge length": (broken(Type.PING, b"x", length=65_535), Code.TOO_LARGE),
    "huge connect": (broken(Type.CONNECT, length=limits.CONTROL_MAX_BYTES + 1), Code.TOO_LARGE),
    "unknown type": (broken(0x7F, b"x"), Code.UNKNOWN_TYPE),
    "type zero": (broken(0x00), Code.UNKNOWN_TYPE),
    "ping of 65 bytes": (broken(Type.PING, bytes(limits.PING_MAX_BYTES + 1)), Code.TOO_LARGE),
    "long ack": (broken(Type.ACK, bytes(9)), Code.TOO_LARGE),
    "eof with a payload": (broken(Type.EOF, b"x"), Code.TOO_LARGE),
    "call before connect": (encode(Type.CALL, 0, 0, messages.pack(messages.Call(1, "list"))), Code.DENIED),
    "a node's frame": (encode(Type.RESULT, 0, 0, b"\x80"), Code.PROTOCOL),
    "a pod's frame": (encode(Type.OPEN, 0, 0, b"\x80"), Code.PROTOCOL),
    "data on the connection": (encode(Type.DATA, 0, 0, b"x"), Code.PROTOCOL),
    "connect on handle 0": (encode(Type.CONNECT, 0, 0, messages.pack(Signed(b"\x80", b""))), Code.BAD_HANDLE),
}
"""What a stranger sends first, and the ERROR on session 0 that ends the connection."""


def bomb(shape: bytes) -> bytes:
    return encode(Type.CONNECT, 1, 0, messages.pack(Signed(shape, bytes(64))))


BODIES: dict[str, bytes] = {
    "not a map": encode(Type.CONNECT, 1, 0, b"\x01"),
    "nothing": encode(Type.CONNECT, 1, 0),
    "a reserved byte": encode(Type.CONNECT, 1, 0, b"\xc1"),
    "wrong types": bomb(b"\x81\xa7context\x07"),
    "missing keys": bomb(b"\x80"),
    "deep arrays": encode(Type.CONNECT, 1, 0, b"\x91" * 30_000),
    "deep arrays inside": bomb(b"\x81\xa1x" + b"\x91" * 30_000),
    "deep maps inside": bomb(b"\x81\xa1x" * 10_000),
    "an array of 2^32 - 1": bomb(b"\x81\xa8features\xdd\xff\xff\xff\xff"),
    "a map of 2^32 - 1": bomb(b"\x81\xa3env\xdf\xff\xff\xff\xff"),
    "a text of 2^32 - 1": bomb(b"\x81\xa7context\xdb\xff\xff\xff\xff"),
    "bytes of 2^32 - 1": encode(Type.CONNECT, 1, 0, b"\x81\xa4body\xc6\xff\xff\xff\xff"),
    "an unknown array of 2^32 - 1": bomb(b"\x81\xa1x\xdd\xff\xff\xff\xff"),
    "no UTF-8": bomb(b"\x81\xa7context\xa2\xff\xfe"),
    "a resume instead": encode(Type.RESUME, 1, 0, messages.pack(Signed(b"\x80", bytes(64)))),
}
"""Payloads of a CONNECT that are no MessagePack, or not the one that is wanted."""


def test_broken_frames_end_only_their_connection(site: Site) -> None:
    with unharmed(site):
        for name, (data, code) in FAULTS.items():
            with site.client() as raw:
                raw.raw(data)
                assert raw.code() == code, name
                assert raw.ended(), name


def test_payloads_of_exactly_what_is_allowed_are_taken(site: Site) -> None:
    """The twins of those that are a byte too large."""
    with site.client() as raw:
        size = limits.CONTROL_MAX_BYTES - len(raw.signed(raw.connect_body(label="x" * 1_000)))
        payload = raw.signed(raw.connect_body(label="x" * (1_000 + size)))
        assert len(payload) == limits.CONTROL_MAX_BYTES
        raw.send(Type.CONNECT, 1, 0, payload)
        assert isinstance(raw.answer(1), Accept)
        ping = os.urandom(limits.PING_MAX_BYTES)
        raw.send(Type.PING, 0, 0, ping)
        assert raw.until(Type.PONG)[3] == ping
        assert raw.echo(b"well", 0) == b"well"
        raw.send(Type.EOF, 1, 4)
        raw.until(Type.CLOSE, handle=1)


def test_invalid_messagepack_is_refused(site: Site) -> None:
    with unharmed(site):
        for name, data in BODIES.items():
            with site.client() as raw:
                raw.raw(data)
                assert raw.code() == Code.BAD_PAYLOAD, name
                assert raw.ended(), name
        # Their twin has keys that nobody knows too, but what they hold is there.
        with site.client() as raw:
            known = msgspec.msgpack.decode(messages.pack(raw.connect_body()))
            body = messages.pack({**known, "x": msgspec.Raw(b"\xdd\0\0\0\1\x91\x07"), "y": {"x": None}})
            raw.say(Type.CONNECT, 1, Signed(body, raw.device.sign(messages.CONTEXT_CONNECT, site.node_id, body)))
            assert isinstance(raw.answer(1), Accept)


def test_unknown_types_from_0x80_are_ignored(site: Site) -> None:
    with unharmed(site), site.client() as raw:
        for kind in (0x81, 0xC0, 0xFF):
            raw.raw(broken(kind, os.urandom(1000)))
        assert raw.alive()
        raw.connect()
        assert raw.echo(b"still there", 0) == b"still there"


WHOLE = encode(Type.CONNECT, 1, 0, b"\x80" * 100)


def test_a_frame_cut_short_is_truncated(site: Site) -> None:
    with unharmed(site):
        for size in (1, 14, 15, len(WHOLE) - 1):
            with site.client(local=True) as raw:
                raw.raw(WHOLE[:size])
                raw.half_close()
                assert raw.code() == Code.TRUNCATED, size
                assert raw.ended(), size
            assert half_closed_over_tls(site, WHOLE[:size]) == Code.TRUNCATED, size
            with site.client() as raw:  # also without TLS's own goodbye
                raw.raw(WHOLE[:size])
                raw.half_close()
                assert raw.code() == Code.TRUNCATED, size
                assert raw.ended(), size


def half_closed_over_tls(site: Site, data: bytes) -> Code:
    """Sends `data` and close_notify (RFC 8446, section 6.1), but goes on reading; returns the code of the ERROR."""
    come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = site.context.wrap_bio(come, go)
    link = Link()
    frames: list[Frame] = []
    with socket.create_connection(("127.0.0.1", site.rig.port), 5) as sock:

        def step(act: Callable[[], object]) -> object:
            while True:
                try:
                    return act()
                except ssl.SSLWantReadError:
                    sock.sendall(go.read())
                    come.write(sock.recv(65536))

        step(tls.do_handshake)
        tls.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        sock.sendall(go.read())
        while not frames:
            got = step(lambda: tls.read(65536))
            assert isinstance(got, bytes)
            assert got
            frames += link.receive(got)
    return Code(messages.unpack(Error, frames[0][3]).code)


def test_a_connection_without_a_fault_ends_quietly(site: Site) -> None:
    with site.client() as raw:
        assert raw.alive()
        raw.half_close()
        assert raw.frame() is None


def test_nothing_after_the_first_fault_counts(site: Site) -> None:
    """What a stranger sends behind a refused CONNECT, in the same write, is not even looked at."""
    with unharmed(site), site.client() as owner, site.client() as raw:
        owner.connect(want="call")
        before = {session["name"] for session in owner.call("list")["sessions"]}
        wrong = raw.signed(raw.connect_body(credential="lt1.wrong"))
        right = raw.signed(raw.connect_body(name="behind"))
        raw.raw(encode(Type.CONNECT, 1, 0, wrong) + encode(Type.CONNECT, 2, 0, right))
        assert raw.code(1) == Code.DENIED
        assert raw.ended()
        after = {session["name"] for session in owner.call("list")["sessions"]}
        assert after == before


# ---- on a session ----------------------------------------------------------------------------------------------


def at(position: int) -> bytes:
    return position.to_bytes(8, "big")


def beyond_the_window(raw: Raw) -> None:
    """Input to a program that reads nothing, up to the window and one byte more."""
    raw.connect(handle=2, agent="deaf", name="deaf")
    position = 0
    while position < limits.WINDOW_BYTES + 1024 * 1024:
        raw.send(Type.DATA, 2, position, bytes(65_000))
        position += 65_000


ON_A_SESSION: dict[str, tuple[Callable[[Raw], None], int, Code]] = {
    "data with a gap": (lambda raw: raw.send(Type.DATA, 1, 7, b"x"), 1, Code.GAP),
    "ack beyond what was sent": (lambda raw: raw.send(Type.ACK, 1, 1, at(1)), 1, Code.PROTOCOL),
    "ack of 2^64 - 1": (lambda raw: raw.send(Type.ACK, 1, 0, b"\xff" * 8), 1, Code.PROTOCOL),
    "input beyond the window": (beyond_the_window, 2, Code.LIMIT),
    "a handle never used": (lambda raw: raw.send(Type.DATA, 9, 0, b"x"), 9, Code.BAD_HANDLE),
    "a handle in use": (lambda raw: raw.send(Type.CONNECT, 1, 0, raw.signed(raw.connect_body())), 0, Code.BAD_HANDLE),
    "nothing as a signal": (lambda raw: raw.send(Type.SIGNAL, 1, 0), 1, Code.BAD_PAYLOAD),
    "garbage as a signal": (lambda raw: raw.send(Type.SIGNAL, 1, 0, b"\x81\xa4name\x07"), 1, Code.BAD_PAYLOAD),
    "garbage as a resize": (lambda raw: raw.send(Type.RESIZE, 1, 0, b"\xc1"), 0, Code.BAD_PAYLOAD),
}
"""What a client with a session may not do, the handle of the ERROR, and its code."""


@pytest.fixture(scope="module")
def deaf(site: Site) -> Site:
    site.rig.start_pod("deaf", "sleep", "1000", kind="stream")
    return site


@pytest.mark.parametrize("name", ON_A_SESSION)
def test_a_session_does_not_take_everything(deaf: Site, name: str) -> None:
    act, handle, code = ON_A_SESSION[name]
    with unharmed(deaf), deaf.client() as raw:
        accept = raw.connect()
        act(raw)
        assert raw.code(handle) == code
        # What ends an attachment, or its connection, does not end the session.
        with deaf.client(device=raw.device) as again:
            other = again.connect(want="join", uid=accept.uid)
            assert other.uid == accept.uid
            assert again.echo(b"here", 0) == b"here"


def test_a_handle_used_before_is_not_used_again(site: Site) -> None:
    with unharmed(site), site.client() as raw:
        raw.connect(handle=5)
        raw.say(Type.SUSPEND, 5, messages.Suspend())
        raw.until(Type.SUSPEND, handle=5)
        for handle in (5, 4):
            with site.client() as other:
                other.connect(handle=5)
                other.send(Type.CONNECT, handle, 0, other.signed(other.connect_body()))
                assert other.code() == Code.BAD_HANDLE
                assert other.ended()


def test_sizes_are_kept_within_bounds(site: Site) -> None:
    """A RESIZE to nothing leaves the size as it is, one beyond all bounds is cut to 1,000 cells."""
    site.rig.start_pod("tty", "sh", "-c", "while read x; do stty size; done")
    with unharmed(site), site.client() as raw:
        raw.connect(agent="tty", exact=False, cols=90, rows=30, term="xterm")
        sizes = (
            (0, 0, b"30 90"), (65_535, 65_535, b"1000 1000"), (2**63, 2**63, b"1000 1000"), (-5, -5, b"1000 1000"),
            (81, 25, b"25 81"),
        )  # fmt: skip
        sent = 0
        for cols, rows, shown in sizes:
            raw.say(Type.RESIZE, 1, Resize(cols, rows))
            # A size that follows another at once comes a moment later: asked again until it is there.
            seen, until = b"", time.monotonic() + 8
            while shown not in seen:
                assert time.monotonic() < until, seen[-200:]
                raw.send(Type.DATA, 1, sent, b"\n")
                sent += 1
                seen += raw.data(1)


def test_signals_that_are_none_take_their_place_and_change_nothing(site: Site) -> None:
    payloads = [messages.pack(Signal(name)) for name in ("NOSUCH", "\x1b[31m", "KILL\0", "x" * 20_000)]
    with unharmed(site), site.client() as raw:
        raw.connect()
        for position, payload in enumerate(payloads):
            raw.send(Type.SIGNAL, 1, position, payload)
        raw.send(Type.DATA, 1, len(payloads), b"after")
        assert raw.data(5) == b"after"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"argv": ["a\0b"]}, Code.NO_AGENT),
        ({"argv": ["cat", "\0"]}, Code.NO_AGENT),
        ({"cwd": "/\0"}, Code.NO_AGENT),
        ({"argv": ["x"] * (limits.ARGV_MAX + 1)}, Code.TOO_LARGE),
        ({"argv": ["x" * (limits.ARGV_MAX_BYTES + 1)]}, Code.TOO_LARGE),
        ({"env": {str(n): "" for n in range(limits.ENV_MAX + 1)}}, Code.TOO_LARGE),
        ({"cwd": "/nowhere"}, Code.NO_AGENT),
        ({"name": "\x1b]0;owned\x07"}, Code.BAD_REQUEST),
        ({"name": "../../etc"}, Code.BAD_REQUEST),
        ({"agent": "\x1b[2J"}, Code.BAD_REQUEST),
        ({"agent": "nobody"}, Code.NO_AGENT),
        ({"attachment": b"short"}, Code.BAD_PAYLOAD),
        ({"min": 9, "max": 9}, Code.VERSION),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_impossible_wishes_are_refused(site: Site, changes: dict[str, Any], code: Code) -> None:
    with unharmed(site), site.client() as raw:
        answer = raw.ask(**changes)
        assert isinstance(answer, Error), answer
        assert answer.code == code, answer
        assert answer.message.isprintable()


@pytest.mark.parametrize(
    "changes", [{"env": {"A\0": "b", "B=": "c", "": "d"}}, {"env": {"A": "\0"}}, {"term": "\0"}], ids=str
)
def test_variables_that_no_program_can_have_are_left_out(site: Site, changes: dict[str, Any]) -> None:
    with unharmed(site), site.client() as raw:
        raw.connect(**changes)
        assert raw.echo(b"runs", 0) == b"runs"


def test_labels_lose_their_escape_sequences(site: Site) -> None:
    with site.client() as raw, site.client() as other:
        accept = raw.connect(label="\x1b]0;owned\x07\u202eevil\n\x9b31m")
        other.connect(want="join", uid=accept.uid, label="\x1b[2Jme")
        event = messages.unpack(messages.Event, raw.until(Type.EVENT)[3])
        assert event.label == "[2Jme"
        shown = other.call("info", session=accept.name)["attachments"]
        shown += other.call("devices")["devices"]
        assert "]0;ownedevil31m" in {entry["label"] for entry in shown}
        assert all(entry["label"].isprintable() for entry in shown)


def test_more_attachments_and_lanes_than_allowed(site: Site) -> None:
    with unharmed(site, grow_mib=16), site.client() as raw:
        accept = raw.connect()
        for number in range(limits.ATTACHMENTS_MAX - 1):
            raw.connect(handle=2 + number, want="join", uid=accept.uid)
        answer = raw.ask(handle=500, want="join", uid=accept.uid)
        assert isinstance(answer, Error)
        assert answer.code == Code.LIMIT
        # Watchers have places of their own, fewer of them.
        for number in range(limits.WATCHERS_MAX):
            raw.connect(handle=600 + number, want="join", uid=accept.uid, mode="watch")
        answer = raw.ask(handle=700, want="join", uid=accept.uid, mode="watch")
        assert isinstance(answer, Error)
        assert answer.code == Code.LIMIT
        # Those that are there go on; one that leaves makes room, and lanes of the past are given up for new ones.
        for number in range(limits.LANES_MAX + 5):
            handle = 1000 + number
            raw.say(Type.SUSPEND, 2 if number == 0 else handle - 1, messages.Suspend())
            again = raw.ask(handle=handle, want="join", uid=accept.uid)
            assert isinstance(again, Accept), again
        assert len(raw.call("info", session=accept.name)["lanes"]) <= limits.LANES_MAX
        raw.send(Type.DATA, 1, 0, b"still")
        assert raw.data(5, handle=1) == b"still"


def test_many_handles_one_after_another(site: Site) -> None:
    """Handles that were used and ended cost nothing: two hundred sessions one after another on one connection."""
    with unharmed(site), site.client() as raw:
        for number in range(200):
            handle = 1 + number * 2
            raw.connect(handle=handle)
            raw.say(Type.CLOSE, handle, messages.Close())
            raw.until(Type.CLOSE, handle=handle)
        assert raw.alive()
