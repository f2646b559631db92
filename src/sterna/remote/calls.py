"""What a method is given and how it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sterna.errors import SternaError
from sterna.remote.wire import encode, encode_pieces, encode_text, utf8

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sterna.remote.connection import Connection
    from sterna.remote.fields import Kind

PARSE_ERROR: Final = -32700
BAD_VERSION: Final = -32600
NO_METHOD: Final = -32601
BAD_PARAMS: Final = -32602
FAILED: Final = -32603
UNAUTHORIZED: Final = -32001
STDIN_GAP: Final = -32003
_PIECE_CHARS: Final = 65_536

Result = dict[str, object]
SUCCESS: Final[Result] = {"success": True}


class CallError(SternaError):
    """A method refuses or fails; `number` and the text are fixed by the contract."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class MayWaitError(Exception):
    """Raised by a method in a worker when the rest may wait for somebody else, such as the writer of a FIFO.

    Parameters: `rest`, which is done where only its like waits behind it.
    """

    def __init__(self, rest: Callable[[], Result]) -> None:
        super().__init__()
        self.rest = rest


class LargeReplyError(Exception):
    """Raised by a method in a worker when its reply may be large: whoever asks for many has to read them, too.

    Parameters: `size`, in bytes; `rest`, which is done when there is room for so many.
    """

    def __init__(self, size: int, rest: Callable[[], Result]) -> None:
        super().__init__()
        self.size, self.rest = size, rest


class Params:
    """Bound parameters, read by the type that their table gives them."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def text(self, name: str) -> str:
        """Returns a string."""
        value = self._values[name]
        assert isinstance(value, str)
        return value

    def flag(self, name: str) -> bool:
        """Returns a boolean, False for one that this daemon does not know of."""
        return self._values.get(name) is True

    def number(self, name: str) -> int:
        """Returns an integer."""
        value = self._values[name]
        assert isinstance(value, int)
        return value

    def optional(self, name: str) -> int | None:
        """Returns an integer that may be missing."""
        value = self._values[name]
        return value if isinstance(value, int) else None

    def texts(self, name: str) -> list[str]:
        """Returns a list of strings."""
        value = self._values[name]
        assert isinstance(value, list)
        return value

    def group(self, name: str) -> Params | None:
        """Returns an object with fields of its own that may be missing, or that this daemon does not know of."""
        value = self._values.get(name)
        return Params(value) if isinstance(value, dict) else None

    def map(self, name: str) -> dict[str, str]:
        """Returns an object of strings."""
        value = self._values[name]
        assert isinstance(value, dict)
        return value


NO_PARAMS: Final = Params({})
"""Of a call that needs them no more."""


class Additions:
    """What extensions add to the contract's methods; nothing unless they are asked for."""

    def __init__(self) -> None:
        self.inline: Mapping[str, Callable[[Call], None]] = {}
        self.threaded: Mapping[str, Callable[[Params], Result]] = {}
        self.fields: Mapping[str, Mapping[str, Kind]] = {}
        self.methods: tuple[str, ...] = ()
        self.features: tuple[str, ...] = ()


class Call:
    """One request that waits for its reply.

    Parameters: `id_text`, the request's id as it is to be printed; `size`, bytes of its line, which it keeps in memory.
    """

    __slots__ = ("connection", "id_text", "params", "size")

    def __init__(self, connection: Connection, id_text: str, params: Params, size: int) -> None:
        self.connection, self.id_text, self.params, self.size = connection, id_text, params, size
        connection.pending += 1
        connection.pending_bytes += size

    def succeed(self, result: Result) -> None:
        """Sends the result."""
        self._send(f'"result":{encode(result)}')

    def succeed_by_and_by(self, result: Result, size: int) -> None:
        """Sends a result that may be large, made while the client reads it; `size` is about that of its line."""
        self.send_encoded()
        self.connection.write_lazy(reply_pieces(self.id_text, result), size)

    def fail(self, error: CallError) -> None:
        """Sends an error."""
        self._send(error_json(error.number, str(error)))

    def send_encoded(self, *pieces: bytes) -> None:
        """Sends a line that has been encoded already."""
        self.connection.pending -= 1
        self.connection.pending_bytes -= self.size
        self.connection.write_all(pieces)
        self.connection.settle()

    def _send(self, outcome: str) -> None:
        self.send_encoded(line(self.id_text, outcome))


def reply_pieces(id_text: str, result: Result) -> Iterator[bytes]:
    """Returns the line of a result in pieces that are made one by one: each keeps other threads waiting for itself."""
    made, size = [f'{{"jsonrpc":"2.0","id":{id_text},"result":'], len(id_text)
    for piece in encode_pieces(result):
        made.append(piece)
        size += len(piece)
        if size >= _PIECE_CHARS:
            yield utf8("".join(made))
            made, size = [], 0
    yield utf8("".join(made) + "}\n")


def error_json(number: int, text: str) -> str:
    """Returns the error member of a reply."""
    return f'"error":{{"code":{number},"message":{encode_text(text)}}}'


def line(id_text: str, outcome: str) -> bytes:
    """Returns the line of a reply."""
    return utf8(f'{{"jsonrpc":"2.0","id":{id_text},{outcome}}}\n')
