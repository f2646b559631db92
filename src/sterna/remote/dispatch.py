"""From a line to a method: the order of checks is part of the contract (section 4)."""

from __future__ import annotations

from _operator import _compare_digest
from typing import TYPE_CHECKING, Final

from sterna.remote.calls import (
    BAD_PARAMS,
    BAD_VERSION,
    FAILED,
    NO_METHOD,
    NO_PARAMS,
    PARSE_ERROR,
    UNAUTHORIZED,
    Call,
    CallError,
    LargeReplyError,
    MayWaitError,
    Params,
    error_json,
    line,
    reply_pieces,
)
from sterna.remote.fields import BindError, Kind, bind, fold
from sterna.remote.log import clipped
from sterna.remote.wire import Members, Number, Value, WireError, decode, decode_apart, encode, encode_echo, scalar

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
WAITING: Final = "waiting"
_READING: Final = frozenset({
    "files.list", "files.validate", "files.stat", "files.read", "git.info", "git.status", "git.list_branches",
})  # fmt: skip

_PARSE_REPLY: Final = line("null", error_json(PARSE_ERROR, "Parse error"))
_PONG: Final = '"result":{"pong":true}'
_SHUTDOWN: Final = "server.shutdown"
_ENVELOPE: Final = frozenset({"jsonrpc", "id", "method", "params", "auth"})
_ABSENT: Final = object()
_LIGHT_BYTES: Final = 4_096  # up to here, or with so few values, a line is read where it arrives
_LIGHT_VALUES: Final = 1_024
_LONG_BYTES: Final = 65_536  # from here on text takes its time if it is not ASCII


class Request:
    """The members of a request that count."""

    __slots__ = ("auth", "bound", "id_text", "jsonrpc", "method", "params")

    def __init__(self) -> None:
        self.jsonrpc = self.method = self.auth = ""
        self.id_text = "null"
        self.params: Value | object = _ABSENT
        self.bound: Params | None = None  # the parameters, where they are known already


def decode_request(data: bytes, read: Callable[[bytes], Value] = decode) -> Request:
    """Returns a line's request; null counts as an empty one. Raises `WireError` for everything that is none."""
    if data[:1] == b"[" or data[:1] == b'"':
        raise WireError("a request is an object")  # whether it is JSON or not
    value = read(data)
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

    Parameters: `workers`, of each namespace with methods that may block, and under `WAITING` of those that wait for
    somebody; `decoder`, a single thread for lines of very many values; `token`, without line ends; `inline`, methods
    that answer by themselves and never block; `threaded`, methods that may block; `fields`, the parameters of both
    kinds; `server`, results of the namespace server; `shut_down`, called by server.shutdown; `guarded`, whether that
    needs the token too.
    """

    def __init__(
        self,
        log: Log,
        workers: Mapping[str, Workers],
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
        self._strangers = decoder.alike()
        self._inline, self._threaded, self._fields, self._shut_down = inline, threaded, fields, shut_down
        self._server = {method: f'"result":{encode(result)}' for method, result in server.items()}
        self._server["server.ping"] = _PONG
        self._open = None if guarded else _SHUTDOWN  # the method that needs no token

    def handle(self, connection: Connection, data: bytes) -> None:
        """Answers one line, now or later."""
        if len(data) > _LIGHT_BYTES and (_heavy(data) or (len(data) > _LONG_BYTES and not data.isascii())):
            connection.hold(len(data))
            known = connection.trusted or self._token in data  # others do not make those wait who have the token
            (self._decoder if known else self._strangers).submit(lambda: self._read_apart(connection, data))
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
            request = decode_request(data, decode_apart)
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
            self._check(connection, request)
            outcome = self._server.get(request.method)
            if outcome is None:
                self._call(connection, request, size)
                return
        except CallError as error:
            outcome = error_json(error.number, str(error))
        connection.write(line(request.id_text, outcome))

    def _check(self, connection: Connection, request: Request) -> None:
        method = request.method
        if self._authorized(request.auth):
            if not connection.trusted:
                connection.trust()
        elif method != self._open:
            self._log.refusal(f"[Server] Unauthorized request: method={clipped(method)}, id={clipped(request.id_text)}")
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
                _Job(self._workers, request.method, self._threaded[request.method], call).submit()
        except CallError as error:
            call.fail(error)
        except Exception as error:  # noqa: BLE001 # the contract's safety net: one request fails, the daemon goes on
            call.fail(CallError(FAILED, f"recovered panic: {error}"))


class _Job:
    """A call of a method in a worker, which also encodes what it returns; sending is the loop's.

    What only reads is not done any more for a client that is gone, and waits until the client has taken other replies.
    """

    __slots__ = ("_connection", "_namespace", "_pool", "_reads", "_taken", "_todo", "wanted")

    def __init__(
        self, workers: Mapping[str, Workers], name: str, method: Callable[[Params], Result], call: Call
    ) -> None:
        self._pool, self._namespace = workers, name.partition(".")[0]
        self._reads = name in _READING
        self._connection, params = call.connection, call.params
        self._todo: tuple[Callable[[], Result], Call] | None = (lambda: method(params)), call
        self.wanted = self._taken = 0
        call.params = NO_PARAMS

    def submit(self) -> None:
        """Has it done."""
        if not self._connection.closed:
            self._connection.jobs.add(self)
        self._pool[self._namespace].submit(self._work)

    def start(self) -> None:
        """There is room for the reply now, and it is taken."""
        self._taken = self.wanted
        self._pool[self._namespace].submit(self._go_on)

    def drop(self) -> None:
        """The client is gone: what has not begun never will, unless it changes something."""
        if self._reads:
            self._todo = None

    def _work(self) -> Callable[[], None]:
        if self._reads and not self._connection.take(0):
            return lambda: self._connection.queue(self)
        return self._go_on()

    def _go_on(self) -> Callable[[], None]:
        todo = self._todo
        if todo is None:
            return self._release
        method, call = todo
        try:
            result = method()
        except LargeReplyError as large:
            self._todo, self.wanted = (large.rest, call), large.size
            if not self._connection.take(large.size):
                return lambda: self._connection.queue(self)
            self._taken = large.size
            return self._go_on()
        except MayWaitError as waiting:
            self._todo = waiting.rest, call
            return self._wait
        except CallError as error:
            reply: tuple[bytes, ...] = (line(call.id_text, error_json(error.number, str(error))),)
        except Exception as error:  # noqa: BLE001 # as in `_call`
            reply = (line(call.id_text, error_json(FAILED, f"recovered panic: {error}")),)
        else:
            reply = tuple(reply_pieces(call.id_text, result))
        return lambda: self._send(call, reply)

    def _wait(self) -> None:
        """Goes on where only what may wait for somebody else waits; a client that is gone is not put in the queue."""
        self._release(ended=False)
        pool = self._pool[WAITING]
        if pool.all_busy:
            self._reads = True
        if not (self._reads and self._connection.closed):
            pool.submit(self._go_on)

    def _send(self, call: Call, reply: tuple[bytes, ...]) -> None:
        call.send_encoded(*reply)
        self._release()

    def _release(self, *, ended: bool = True) -> None:
        taken, self._taken = self._taken, 0
        self._connection.give_back(taken)
        if ended:
            self._connection.jobs.discard(self)
