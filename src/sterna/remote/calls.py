"""What a method is given and how it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sterna.errors import SternaError
from sterna.remote.wire import encode, encode_text, utf8

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sterna.remote.connection import Connection
    from sterna.remote.fields import Kind

PARSE_ERROR: Final = -32700
BAD_VERSION: Final = -32600
NO_METHOD: Final = -32601
BAD_PARAMS: Final = -32602
FAILED: Final = -32603
UNAUTHORIZED: Final = -32001
STDIN_GAP: Final = -32003

Result = dict[str, object]
SUCCESS: Final[Result] = {"success": True}


class CallError(SternaError):
    """A method refuses or fails; `number` and the text are fixed by the contract."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


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

    def fail(self, error: CallError) -> None:
        """Sends an error."""
        self._send(error_json(error.number, str(error)))

    def send_encoded(self, line: bytes) -> None:
        """Sends a line that a worker has already encoded."""
        self.connection.pending -= 1
        self.connection.pending_bytes -= self.size
        self.connection.write(line)
        self.connection.settle()

    def _send(self, outcome: str) -> None:
        self.send_encoded(line(self.id_text, outcome))


def error_json(number: int, text: str) -> str:
    """Returns the error member of a reply."""
    return f'"error":{{"code":{number},"message":{encode_text(text)}}}'


def line(id_text: str, outcome: str) -> bytes:
    """Returns the line of a reply."""
    return utf8(f'{{"jsonrpc":"2.0","id":{id_text},{outcome}}}\n')
