"""From a line to a method: the order of checks is part of the contract (section 4)."""

from __future__ import annotations

from _operator import _compare_digest
from typing import TYPE_CHECKING, Final

from sterna.remote.calls import (
    BAD_PARAMS,
    BAD_VERSION,
    FAILED,
    NO_METHOD,
    PARSE_ERROR,
    UNAUTHORIZED,
    Call,
    CallError,
    Params,
    error_json,
    line,
)
from sterna.remote.fields import BindError, Kind, bind, fold
from sterna.remote.wire import Members, Number, Value, WireError, decode, encode, encode_echo, scalar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sterna.remote.calls import Result
    from sterna.remote.connection import Connection
    from sterna.remote.log import Log
    from sterna.remote.workers import Workers

METHODS: Final = (
    "server.ping", "server.version", "server.capabilities", "server.shutdown",
    "files.list", "files.validate", "files.stat", "files.read", "files.extract_tar",
    "git.info", "git.status", "git.list_branches", "git.worktree_create", "git.worktree_remove",
    "process.spawn", "process.stdin", "process.kill", "process.killAndWait", "process.reattach",
)  # fmt: skip
NAMESPACES: Final = frozenset(method.partition(".")[0] for method in METHODS)
FEATURES: Final = ("process.stdin.offset",)

_PARSE_REPLY: Final = line("null", error_json(PARSE_ERROR, "Parse error"))
_PONG: Final = '"result":{"pong":true}'
_SHUTDOWN: Final = "server.shutdown"
_ENVELOPE: Final = frozenset({"jsonrpc", "id", "method", "params", "auth"})
_ABSENT: Final = object()
_LIGHT_BYTES: Final = 4_096  # up to here, or with so few values, a line is read where it arrives
_LIGHT_VALUES: Final = 1_024


class Request:
    """The members of a request that count."""

    __slots__ = ("auth", "bound", "id_text", "jsonrpc", "method", "params")

    def __init__(self) -> None:
        self.jsonrpc = self.method = self.auth = ""
        self.id_text = "null"
        self.params: Value | object = _ABSENT
        self.bound: Params | None = None  # the parameters, where they are known already


def decode_request(data: bytes) -> Request:
    """Returns a line's request; null counts as an empty one. Raises `WireError` for everything that is none."""
    if data[:1] == b"[" or data[:1] == b'"':
        raise WireError("a request is an object")  # whether it is JSON or not
    value = decode(data)
    request = Request()
    if value is None:
        return request
    if not isinstance(value, Members):
        raise WireError("a request is an object")
    for key, member in value:
        name = key if key in _ENVELOPE else fold(key)
        if name == "id":
            request.id_text = encode_echo(member)
        elif name == "params":
            request.params = member
        elif name in _ENVELOPE:
            if member is None:
                continue
            if not isinstance(member, str) or isinstance(member, Number):
                raise WireError("a member has the wrong type")
            setattr(request, name, scalar(member))
    return request


def _heavy(data: bytes) -> bool:
    """Returns whether a line may hold very many values; looking for each is much faster than counting all."""
    left = _LIGHT_VALUES
    for mark in (b",", b"[", b"{"):
        at = data.find(mark)
        while at >= 0:
            left -= 1
            if not left:
                return True
            at = data.find(mark, at + 1)
    return False


class Dispatcher:
    """Answers lines.

    Parameters: `token`, without line ends; `inline`, methods that answer by themselves and never block; `threaded`,
    methods that may block; `decoder`, a single thread for lines of very many values; `fields`, the parameters of both
    kinds; `server`, results of the namespace server; `shut_down`, called by server.shutdown; `guarded`, whether that
    needs the token too.
    """

    def __init__(
        self,
        log: Log,
        workers: Workers,
        decoder: Workers,
        token: bytes,
        *,
        inline: Mapping[str, Callable[[Call], None]],
        threaded: Mapping[str, Callable[[Params], Result]],
        fields: Mapping[str, Mapping[str, Kind]],
        server: Mapping[str, Result],
        shut_down: Callable[[], None],
        guarded: bool = False,
    ) -> None:
        self._log, self._workers, self._decoder, self._token = log, workers, decoder, token
        self._inline, self._threaded, self._fields, self._shut_down = inline, threaded, fields, shut_down
        self._server = {method: f'"result":{encode(result)}' for method, result in server.items()}
        self._server["server.ping"] = _PONG
        self._open = None if guarded else _SHUTDOWN  # the method that needs no token

    def handle(self, connection: Connection, data: bytes) -> None:
        """Answers one line, now or later."""
        if len(data) > _LIGHT_BYTES and _heavy(data):
            connection.hold(len(data))
            self._decoder.submit(lambda: self._read_apart(connection, data))
            return
        try:
            request = decode_request(data)
        except WireError:
            connection.write(_PARSE_REPLY)
            return
        self._answer(connection, request, len(data))

    def _read_apart(self, connection: Connection, data: bytes) -> Callable[[], None]:
        """Reads a line of very many values in the decoder's thread, so that it holds up its own connection only."""
        request: Request | None = None
        try:
            request = decode_request(data)
            if request.method in self._fields and request.params is not _ABSENT:
                request.bound = Params(bind(request.params, self._fields[request.method]))  # type: ignore[arg-type] # not _ABSENT
        except WireError:
            pass
        except BindError:
            assert request is not None
            request.params = ""  # which cannot be bound either
        except Exception:  # noqa: BLE001 # as where it arrives: this connection ends, the daemon goes on
            return lambda: connection.close("internal error")

        def go_on() -> None:
            connection.release()
            if request is None:
                connection.write(_PARSE_REPLY)
            else:
                self._answer(connection, request, len(data))

        return go_on

    def _answer(self, connection: Connection, request: Request, size: int) -> None:
        try:
            self._check(request)
            outcome = self._server.get(request.method)
            if outcome is None:
                self._call(connection, request, size)
                return
        except CallError as error:
            outcome = error_json(error.number, str(error))
        connection.write(line(request.id_text, outcome))

    def _check(self, request: Request) -> None:
        method = request.method
        if method != self._open and not self._authorized(request.auth):
            self._log.warn(f"[Server] Unauthorized request: method={method}, id={request.id_text}")
            raise CallError(UNAUTHORIZED, "Unauthorized: invalid or missing auth token")
        if request.jsonrpc != "2.0":
            raise CallError(BAD_VERSION, "Invalid JSON-RPC version")
        if method in self._server or method in self._fields or method == _SHUTDOWN:
            return
        namespace, dot, _ = method.partition(".")
        if not dot:
            raise CallError(NO_METHOD, f"Invalid method format: {method}")
        if namespace not in NAMESPACES:
            raise CallError(NO_METHOD, f"Unknown namespace: {namespace}")
        raise CallError(NO_METHOD, f"Unknown method: {method}")

    def _authorized(self, auth: str) -> bool:
        return bool(auth) and _compare_digest(auth.encode(), self._token)

    def _call(self, connection: Connection, request: Request, size: int) -> None:
        if request.method == _SHUTDOWN:
            self._shut_down()
            return
        if request.params is _ABSENT:
            raise CallError(BAD_PARAMS, "Invalid params")
        try:
            params = request.bound or Params(bind(request.params, self._fields[request.method]))  # type: ignore[arg-type] # not _ABSENT
        except BindError as error:
            raise CallError(BAD_PARAMS, "Invalid params") from error
        call = Call(connection, request.id_text, params, size)
        answer = self._inline.get(request.method)
        try:
            if answer is not None:
                answer(call)
            else:
                method = self._threaded[request.method]
                self._workers.submit(lambda: self._work(method, call))
        except CallError as error:
            call.fail(error)
        except Exception as error:  # noqa: BLE001 # the contract's safety net: one request fails, the daemon goes on
            call.fail(CallError(FAILED, f"recovered panic: {error}"))

    @staticmethod
    def _work(method: Callable[[Params], Result], call: Call) -> Callable[[], None]:
        """Runs a method in a worker, which also encodes what it returns; sending is the loop's."""
        try:
            outcome = f'"result":{encode(method(call.params))}'
        except CallError as error:
            outcome = error_json(error.number, str(error))
        except Exception as error:  # noqa: BLE001 # as in `_call`
            outcome = error_json(FAILED, f"recovered panic: {error}")
        reply = line(call.id_text, outcome)
        return lambda: call.send_encoded(reply)
