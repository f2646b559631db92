"""HTTP over the pump: aiohttp reads requests and writes answers, while TLS and the bounds are those of every socket.

aiohttp's own listening would cost TLS buffers of 64 KiB and more for each connection and know no bound on silent ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from sterna.protocol.link import Link
from sterna.transport.pump import Conduit, Owner, Pump, Reactor
from sterna.transport.tls import TlsSocket
from sterna.transport.websocket import WebSocket, Wire

IDLE_SECONDS = 10.0
LINE_MAX_BYTES = 4_096
FIELD_MAX_BYTES = 4_096
HEADERS_MAX = 64

HEADERS: Mapping[str, str] = {
    # xterm.js would set styles that this policy refuses: js/page/build.mjs mends that.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; font-src 'self'; "
        "manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": (
        "camera=(), display-capture=(), geolocation=(), hid=(), microphone=(), midi=(), payment=(), serial=(), usb=()"
    ),
    "Server": "sterna",
}
"""What stands in every answer."""


def plain(status: int, text: str, **more: str) -> web.Response:
    """Returns an answer of one sentence; `more` are headers, with _ for -."""
    fields = {name.replace("_", "-"): value for name, value in more.items()}
    return web.Response(status=status, text=f"{text}\n", headers={**HEADERS, "Cache-Control": "no-store", **fields})


class _Handler(web.RequestHandler):
    """aiohttp's protocol of one connection; a request that is none is answered like any other, and is no log line."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Returns the answer to a request that cannot be read, or that failed here."""
        if status >= 500:
            self.logger.error("a request failed", exc_info=exc)
            answer = plain(status, "This failed here; the node's log says why.")
        else:
            answer = plain(400, "This is no HTTP request, or too large a one.")
        answer.force_close()
        return answer


class Server(web.Server):
    """Makes the protocol of each connection, with bounds on what a request may be."""

    def __call__(self) -> web.RequestHandler:
        """Returns the protocol for one connection."""
        return _Handler(
            self, loop=asyncio.get_running_loop(), keepalive_timeout=IDLE_SECONDS, lingering_time=0.0,
            access_log=None,  # type: ignore[arg-type]  # which turns it off, as AppRunner does
            tcp_keepalive=False, max_line_size=LINE_MAX_BYTES, max_field_size=FIELD_MAX_BYTES, max_headers=HEADERS_MAX,
            timeout_ceil_threshold=IDLE_SECONDS + 1,
        )  # fmt: skip


class HttpConnection(asyncio.Transport):
    """One connection, from its TLS handshake to its end or to its upgrade: aiohttp's transport and the pump's owner.

    `due` is when it will be ended, by the loop's clock; `gone` is called once when it is over or was upgraded.
    """

    def __init__(
        self, reactor: Reactor, server: Server, sock: TlsSocket, peer: str, gone: Callable[[HttpConnection], None]
    ) -> None:
        super().__init__()
        self._reactor = reactor
        self._server = server
        self._gone = gone
        self._protocol: asyncio.Protocol | None = None
        self._wire = Wire()
        self._pump = Pump(reactor, sock, self._wire, self, peer=peer, handshake=True, on_open=self._opened)
        self.peer = peer
        self.local = str(self._pump.socket.getsockname()[0])
        self.due = 0.0
        self._upgraded = False

    def start(self) -> None:
        """Begins the TLS handshake."""
        self._pump.start()

    def _opened(self, _pump: Pump) -> None:
        self._protocol = self._server()
        self._protocol.connection_made(self)

    @property
    def queued(self) -> int:
        """How many bytes of answers wait for the other side to take them."""
        return self._pump.queued

    def upgrade(self, answer: bytes, adopt: Callable[[Callable[[Link, Owner], Conduit]], bool]) -> bool:
        """Makes it a WebSocket of the one who adopts it, and says `answer` first; False if nobody does.

        aiohttp is told that its connection is over, and forgets it.
        """
        pump, wire = self._pump, self._wire

        def carry(link: Link, owner: Owner) -> Conduit:
            return WebSocket(self._reactor, pump, wire, link, owner)

        if pump.closed or not adopt(carry):
            return False
        wire.push(answer)
        self._upgraded = True
        self._over()
        if self._protocol is not None:
            self._protocol.connection_lost(None)
            self._protocol = None
        return True

    def _over(self) -> None:
        gone, self._gone = self._gone, lambda _connection: None
        gone(self)

    # ---- the pump's owner --------------------------------------------------------------------------------------

    def received(self, pump: Conduit, data: memoryview) -> None:
        """Takes the browser's bytes."""
        if self._protocol is not None:
            self._protocol.data_received(bytes(data))

    def drained(self, pump: Conduit) -> None:
        """Does nothing: an answer is queued as a whole."""

    def ended(self, pump: Conduit, reason: str) -> None:
        """Tells aiohttp, in a turn of the loop of its own."""
        self._over()
        if self._protocol is not None:
            self._reactor.loop.call_soon(self._protocol.connection_lost, None)
            self._protocol = None

    # ---- aiohttp's transport -----------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Returns what is known of the connection: its peer."""
        return (self.peer, 0) if name == "peername" else default

    def is_closing(self) -> bool:
        """Whether nothing more is taken."""
        return self._upgraded or self._wire.closing or self._pump.closed

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queues bytes."""
        if not self.is_closing():
            self._wire.push(bytes(data))

    def close(self) -> None:
        """Ends the connection after what is queued."""
        if not self.is_closing():
            self._wire.closing = True
            self._wire.wake()

    def abort(self) -> None:
        """Ends the connection at once."""
        if not self._upgraded:
            self._pump.abort("ended")

    def pause_reading(self) -> None:
        """Ends the connection: who sends so much that nobody can take it means no good, as nothing takes a body."""
        self.abort()

    def resume_reading(self) -> None:
        """Does nothing."""
