"""Counters of the daemon, and the little HTTP server that shows them when it is asked for."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from sterna.limits import REMOTE_METRICS_REQUEST_MAX_BYTES, REMOTE_METRICS_SECONDS
from sterna.remote.loop import READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from sterna.remote.log import Log
    from sterna.remote.loop import Loop

_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_RETRY_SECONDS: Final = 0.1
_REQUESTS_MAX: Final = 32  # open at once; the oldest one makes room
_TEXTS: Final = {
    "connections": "Client connections accepted.",
    "process_spawns": "Processes started.",
    "process_exits": "Processes exited.",
    "reattaches": "Reattachments to a known process.",
    "stream_bytes": "Bytes of process output read.",
    "stdin_bytes": "Bytes of process input accepted.",
}


class Metrics:
    """What happened since the daemon started."""

    __slots__ = ("connections", "process_exits", "process_spawns", "reattaches", "stdin_bytes", "stream_bytes")

    def __init__(self) -> None:
        self.connections = self.process_spawns = self.process_exits = 0
        self.reattaches = self.stream_bytes = self.stdin_bytes = 0

    def text(self) -> str:
        """Returns the counters in Prometheus' text format."""
        return "".join(
            f"# HELP claustrum_{name}_total {text}\n# TYPE claustrum_{name}_total counter\n"
            f"claustrum_{name}_total {getattr(self, name)}\n"
            for name, text in _TEXTS.items()
        )


class MetricsServer:
    """Answers `GET /metrics` on a TCP address, one request for each connection."""

    def __init__(self, loop: Loop, metrics: Metrics, log: Log) -> None:
        self._loop, self._metrics, self._log = loop, metrics, log
        self._listener: socket.socket | None = None
        self._requests: dict[_Request, None] = {}  # the oldest one first

    def listen(self, address: str) -> None:
        """Opens the listener at `HOST:PORT`; a failure costs a line in the log and nothing else."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, int(port)), family=family)
        except (OSError, ValueError, OverflowError) as error:
            self._log.error(f"[metrics] listen {address}: {error}")
            return
        listener.setblocking(False)
        self._listener = listener
        self._loop.watch(listener.fileno(), READ, self._accept)
        self._log.info(f"[metrics] listening on {address}")

    def close(self) -> None:
        """Closes the listener."""
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _accept(self, _events: int) -> None:
        if self._listener is None:
            return
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # descriptors ran out: whoever asks waits
            self._loop.forget(self._listener.fileno())
            self._loop.later(_RETRY_SECONDS, self._accept_again)
            return
        if len(self._requests) >= _REQUESTS_MAX:
            next(iter(self._requests)).close()
        self._requests[_Request(self._loop, sock, self._metrics, self._requests.pop)] = None

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.watch(self._listener.fileno(), READ, self._accept)


class _Request:
    """One HTTP connection: a request head in, one answer out."""

    def __init__(self, loop: Loop, sock: socket.socket, metrics: Metrics, closed: Callable[[_Request], object]) -> None:
        self._loop, self._socket, self._metrics, self._closed = loop, sock, metrics, closed
        self._head, self._answer = b"", b""
        sock.setblocking(False)
        self._timer = loop.later(REMOTE_METRICS_SECONDS, self.close)
        loop.watch(sock.fileno(), READ, self._ready)

    def _ready(self, events: int) -> None:
        try:
            if self._answer:
                self._answer = self._answer[self._socket.send(self._answer) :]
            else:
                self._read()
        except BlockingIOError:
            return
        except OSError:
            self._answer = b""
            self.close()
            return
        if not self._answer and b"\r\n\r\n" in self._head:
            self.close()

    def _read(self) -> None:
        data = self._socket.recv(REMOTE_METRICS_REQUEST_MAX_BYTES)
        self._head += data
        if not data or len(self._head) > REMOTE_METRICS_REQUEST_MAX_BYTES:
            self.close()
        elif b"\r\n\r\n" in self._head:
            words = self._head.split(b"\r\n", 1)[0].split(b" ")
            path = words[1].partition(b"?")[0] if len(words) == 3 else b""
            if path != b"/metrics":
                self._answer = self._response("404 Not Found", "text/plain; charset=utf-8", "404 page not found\n")
            else:
                self._answer = self._response("200 OK", _TYPE, self._metrics.text())
            self._loop.change(self._socket.fileno(), WRITE)

    @staticmethod
    def _response(status: str, kind: str, body: str) -> bytes:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close"
        return f"{head}\r\n\r\n{body}".encode()

    def close(self) -> None:
        """Ends the connection; doing it again does nothing."""
        if self._socket.fileno() >= 0:
            self._timer.cancel()
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._closed(self)
