"""The control payloads: MessagePack maps, typed, unknown keys ignored (docs/protocol.md, section 6)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from sterna import limits
from sterna.errors import Code, ProtocolError
from sterna.ids import clean_label
from sterna.protocol.frame import Type

VERSION = 1
CONTEXT_CONNECT = "clawterm/1 CONNECT"
CONTEXT_RESUME = "clawterm/1 RESUME"

Position = Annotated[int, msgspec.Meta(ge=0, le=limits.POSITION_MAX)]
"""A byte count, or another number that is never negative: 0 to 2^63 - 1."""

Mode = Literal["drive", "watch"]
Kind = Literal["pty", "chat", "stream"]
Want = Literal["latest", "named", "new", "join", "call"]


class Message(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What all control payloads have in common."""


class Signed(Message, frozen=True, gc=False):
    """CONNECT and RESUME: `body` exactly as signed, `sig` over context ‖ node id ‖ body (64 bytes)."""

    body: bytes
    sig: bytes


class ConnectBody(Message, frozen=True, gc=False):
    """What CONNECT asks for; `want` "call" opens no session and only authorises CALLs on this connection.

    `node` is the node id (32 bytes), `request` 16 random bytes that make a repeated CONNECT harmless, `key` the
    device's public key with its algorithm byte, `attachment` 16 random bytes, `credential` an access token or a share
    ticket. `exact` asks for every byte from `output` on (or the oldest kept); without it a snapshot may stand for
    history.
    """

    context: str
    node: bytes
    request: bytes
    key: bytes
    attachment: bytes
    credential: str
    tenant: str = ""
    agent: str = ""
    want: Want = "latest"
    min: int = VERSION
    max: int = VERSION
    features: list[str] = []
    name: str | None = None
    uid: bytes | None = None
    label: str = ""
    mode: Mode = "drive"
    exact: bool = False
    displace: bool = False
    output: Position | None = None
    cols: int = 80
    rows: int = 24
    term: str = ""
    argv: list[str] | None = None
    cwd: str | None = None
    env: dict[str, str] = {}


class Accept(Message, frozen=True, gc=False):
    """ACCEPT: the session is there; DATA continues at `output`, input is wanted from `input`.

    `window` is in bytes, `keepalive` in seconds; `snapshot` says that a SNAPSHOT comes before any DATA; output before
    `head` is history, whose questions to a terminal nobody waits for any more. `quic` is the UDP port, 0 if none.
    """

    uid: bytes
    log: Position
    kind: Kind
    epoch: Position
    node: bytes
    name: str
    agent: str
    output: Position
    input: Position
    window: Position
    keepalive: int
    features: list[str] = []
    created: bool = False
    snapshot: bool = False
    mode: Mode = "drive"
    state: str = "active"
    head: Position = 0
    quic: int = 0


class ResumeBody(Message, frozen=True, gc=False):
    """What RESUME proves and says: which attachment comes back, and that its next output byte wanted is `output`.

    `counter` rises with every RESUME of an attachment; connections that race each other share `race` (16 bytes). `sent`
    is the position after all input sent so far, from which a lane goes on that neither node nor pod remembers.
    `handled` is less than `output` where bytes were received and not written yet: they still count against the window.
    """

    context: str
    node: bytes
    uid: bytes
    device: bytes
    attachment: bytes
    race: bytes
    counter: Position
    epoch: Position
    log: Position
    output: Position
    sent: Position = 0
    handled: Position | None = None
    cols: int = 80
    rows: int = 24
    min: int = VERSION
    max: int = VERSION
    features: list[str] = []


class Lost(Message, frozen=True, gc=False):
    """Output positions [start, end) that this attachment will never get."""

    start: Position
    end: Position


class Resumed(Message, frozen=True, gc=False):
    """RESUMED: output continues at `output`; `input` is the next input position wanted, None where the agent is gone.

    `head` is as in ACCEPT. `forgotten` says that nobody remembers this attachment's lane (too many others came since):
    what was sent before `input` and not acknowledged is uncertain.
    """

    epoch: Position
    log: Position
    output: Position
    input: Position | None = None
    lost: Lost | None = None
    snapshot: bool = False
    state: str = "active"
    head: Position = 0
    forgotten: bool = False


class Close(Message, frozen=True, gc=False):
    """CLOSE: the session ends for good; `status` is the exit code, `signal` the number that ended the program."""

    code: int = 0
    reason: str = ""
    status: int | None = None
    signal: int | None = None
    output: Position | None = None


class Error(Message, frozen=True, gc=False):
    """ERROR: `retry_after` in seconds, `address` of a moved session, `value` the code's own number."""

    code: int
    name: str
    message: str
    retry_after: float | None = None
    address: str | None = None
    value: int | None = None


class Suspend(Message, frozen=True, gc=False):
    """SUSPEND: leaving, keep it; `position` is the next byte wanted by who leaves."""

    position: Position = 0


class Resize(Message, frozen=True, gc=False):
    """RESIZE: the terminal's size in cells; the last one wins."""

    cols: int
    rows: int


class Signal(Message, frozen=True, gc=False):
    """SIGNAL: a signal's name without SIG (INT, TERM, …) for the program's foreground process group."""

    name: str


class Snapshot(Message, frozen=True, gc=False):
    """One part of what repaints the screen as it was at output position `position`; `lost` names skipped output.

    Without `data` in its only part it is a bare notice of the gap.
    """

    position: Position
    part: int = 0
    last: bool = True
    zstd: bool = False
    data: bytes = b""
    lost: Lost | None = None
    token: int = 0


class Call(Message, frozen=True, gc=False):
    """CALL: a request on session 0; `params` is a map whose shape `method` decides."""

    id: int
    method: str
    params: msgspec.Raw = msgspec.Raw(b"\x80")


class Result(Message, frozen=True, gc=False):
    """RESULT: the answer to the CALL with this `id`: a value, or an error."""

    id: int
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: Error | None = None
    more: bool = False


class Event(Message, frozen=True, gc=False):
    """EVENT: a notice that may be dropped: `joined`, `left`, `typist`, `uncertain`, `storage`.

    `typist` says (`count` 1 or 0) whether this terminal is the one that answers the program's questions.
    """

    kind: str
    label: str = ""
    device: str = ""
    start: Position | None = None
    end: Position | None = None
    status: int | None = None
    count: int | None = None


class Hello(Message, frozen=True, gc=False):
    """HELLO: a pod says what it is; `instance` (16 random bytes) names this run of its process."""

    version: int
    kind: Kind
    instance: bytes
    features: list[str] = []
    label: str = ""


class LaneState(Message, frozen=True, gc=False):
    """How much input of one attachment the pod has handled: the next position wanted."""

    attachment: bytes
    next: Position


class Open(Message, frozen=True, gc=False):
    """OPEN: node takes (or makes) a session at the pod; it fences older connections of that uid.

    `journalled` is the next output position the node has not got. `fresh` allows the pod to start a program.
    """

    uid: bytes
    journalled: Position
    fresh: bool = False
    cols: int = 80
    rows: int = 24
    term: str = ""
    name: str = ""
    argv: list[str] | None = None
    cwd: str | None = None
    env: dict[str, str] = {}


class Opened(Message, frozen=True, gc=False):
    """OPENED: the pod's next output position for this session and what it has handled of each lane; or why not."""

    next: Position
    base: Position
    lanes: list[LaneState] = []
    cols: int = 0
    rows: int = 0
    error: Error | None = None


class Lane(Message, frozen=True, gc=False):
    """LANE: one attachment's input to session `uid` comes on this frame's handle."""

    uid: bytes
    attachment: bytes
    next: Position = 0


class Exit(Message, frozen=True, gc=False):
    """EXIT: the program ended after output position `position`; its code or the signal that ended it."""

    position: Position
    status: int | None = None
    signal: int | None = None
    lanes: list[LaneState] = []


class Capture(Message, frozen=True, gc=False):
    """CAPTURE: the node asks the pod for a SNAPSHOT; the answer carries the same `token`."""

    token: int
    scrollback: bool = True


class Audience(Message, frozen=True, gc=False):
    """AUDIENCE: how many terminals are attached that answer the program's queries; with 0 the pod answers."""

    terminals: int


MESSAGES: dict[int, type[Message]] = {
    Type.CONNECT: Signed,
    Type.ACCEPT: Accept,
    Type.SUSPEND: Suspend,
    Type.RESUME: Signed,
    Type.RESUMED: Resumed,
    Type.CLOSE: Close,
    Type.ERROR: Error,
    Type.RESIZE: Resize,
    Type.SIGNAL: Signal,
    Type.SNAPSHOT: Snapshot,
    Type.CALL: Call,
    Type.RESULT: Result,
    Type.HELLO: Hello,
    Type.OPEN: Open,
    Type.OPENED: Opened,
    Type.LANE: Lane,
    Type.EXIT: Exit,
    Type.CAPTURE: Capture,
    Type.AUDIENCE: Audience,
    Type.EVENT: Event,
}
"""The payload's shape of every frame type that has one."""

M = TypeVar("M")
_encode = msgspec.msgpack.Encoder().encode
_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {}


def pack(message: Any) -> bytes:
    """Returns a message, or any plain value, as MessagePack."""
    return _encode(message)


def unpack(shape: type[M], payload: bytes | msgspec.Raw) -> M:
    """Returns the payload as `shape`; ProtocolError (`BAD_PAYLOAD`) when it is none."""
    decoder = _decoders.get(shape)
    if decoder is None:
        decoder = _decoders[shape] = msgspec.msgpack.Decoder(shape)
    try:
        return decoder.decode(payload)  # type: ignore[no-any-return]  # the cache forgets which shape a decoder has
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = clean_label(str(error), limits.TEXT_SHOWN_MAX_CHARS)
        raise ProtocolError(Code.BAD_PAYLOAD, f"a {shape.__name__} payload is not valid: {reason}") from None


def unpack_shown(shape: type[M], payload: bytes | msgspec.Raw) -> M:
    """Returns the payload as `unpack` does, with texts that may be shown on a terminal, whoever sent them."""
    message = unpack(shape, payload)
    texts = {name: value for name in shape.__struct_fields__ if (value := getattr(message, name)).__class__ is str}  # type: ignore[attr-defined]  # every payload is a Struct
    changes = {name: new for name, text in texts.items() if (new := shown(text)) != text}
    return msgspec.structs.replace(message, **changes) if changes else message  # type: ignore[type-var]  # as above


def shown(value: Any) -> Any:
    """Returns a plain value with all texts in it as they may be shown: printable characters only, of bounded length."""
    if isinstance(value, str):
        return clean_label(value, limits.TEXT_SHOWN_MAX_CHARS)
    if isinstance(value, list):
        return [shown(item) for item in value]
    if isinstance(value, dict):
        return {shown(key): shown(item) for key, item in value.items()}
    return value


def error(
    code: Code,
    message: str,
    *,
    retry_after: float | None = None,
    address: str | None = None,
    value: int | None = None,
) -> Error:
    """Returns the ERROR payload for a code."""
    return Error(int(code), code.name.lower(), message, retry_after, address, value)


def is_signal(payload: bytes) -> bool:
    """Tells whether a SIGNAL frame's payload is one."""
    try:
        unpack(Signal, payload)
    except ProtocolError:
        return False
    return True
