"""The node's web site: the page, the WebSocket that it speaks through, and whether the node is well.

Nothing here has any authority of its own: no cookie, no login, no state. Who may do what is settled by the signed
CONNECT and RESUME on the WebSocket, as on every other connection.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web

from sterna import __version__, limits
from sterna.clock import SYSTEM_CLOCK
from sterna.node.logs import Brake
from sterna.transport.places import Places, place
from sterna.transport.tls import TlsSocket
from sterna.transport.websocket import SUBPROTOCOL, accept_key
from sterna.web.http import HEADERS, HttpConnection, Server, plain
from sterna.web.pages import Page, load, takes_gzip

if TYPE_CHECKING:
    from sterna.node.app import Node

log = logging.getLogger("sterna.web")

ALPN = "http/1.1"
CONNECTIONS_MAX = 512
PER_ADDRESS_MAX = limits.UNAUTHENTICATED_PER_ADDRESS_MAX
ANSWER_SECONDS = 60.0
UNREAD_MAX_BYTES = 64 * 1024
_SWEEP_SECONDS = 1.0
_LINES_BURST = 60
_LINES_PER_SECOND = 1
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def host_name(host: str) -> str | None:
    """Returns the name or address in a Host header or an authority, without port and brackets; None if it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _port = parts.port  # which raises for what is none
        name = parts.hostname
    except ValueError:
        return None
    if name is None or parts.netloc != host or parts.username is not None or "%" in name or not name.isascii():
        return None
    return _canonical(name)


def _canonical(name: str) -> str:
    name = name.strip("[]").lower().removesuffix(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _default_port(host: str) -> str:
    return host.lower().removesuffix(":443")


class Site:
    """Answers HTTP on the node's web port; made by `listen` in a running loop, ended by `close`."""

    def __init__(self, node: Node, names: Iterable[str]) -> None:
        self._node = node
        self._names = frozenset(map(_canonical, (*_LOOPBACK, *names)))
        self._loop = asyncio.get_running_loop()
        self._server = Server(self._answer)
        self._pages = load()
        self._open: dict[HttpConnection, str] = {}  # and where it is, as counted
        self._places = Places()
        self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        self._lines = Brake(_LINES_BURST, _LINES_PER_SECOND)
        self.evicted = 0

    def listen(self, sock: socket.socket) -> None:
        """Takes connections of a listening socket, with the node's certificate."""
        self._node.listen(sock, self._accepted, ALPN)

    # ---- connections -------------------------------------------------------------------------------------------

    def _accepted(self, sock: TlsSocket, peer: str) -> None:
        """Takes one that began its TLS handshake; one too many makes the one go that did nothing for longest."""
        where = place(peer)
        if self._places.at(where) >= PER_ADDRESS_MAX:
            self._evict(next(each for each, its in self._open.items() if its == where))
        elif len(self._open) >= CONNECTIONS_MAX:
            self._evict(next(iter(self._open)))
        connection = HttpConnection(self._node.reactor, self._server, sock, peer, self._gone)
        connection.due = self._loop.time() + limits.HANDSHAKE_SECONDS
        self._open[connection] = where
        self._places.add(where)
        connection.start()

    def _evict(self, connection: HttpConnection) -> None:
        self.evicted += 1
        connection.abort()

    def _gone(self, connection: HttpConnection) -> None:
        if connection in self._open:
            self._places.remove(self._open.pop(connection))

    def _sweep(self) -> None:
        """Ends those whose first request, or whose taking of an answer, lasts too long; logs what was left out."""
        self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        if self._lines.left_out and self._lines.admits(SYSTEM_CLOCK.monotonic()):
            log.warning("foreign origin, of others too", extra=self._lines.fields())
        now = self._loop.time()
        for connection in [each for each in self._open if each.due < now]:
            connection.abort()

    async def close(self) -> None:
        """Ends all connections that are no WebSockets; those are the node's."""
        self._timer.cancel()
        for connection in list(self._open):
            connection.abort()
        await self._server.shutdown(0)

    # ---- requests ----------------------------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers a request; nothing in it is waited for, so it takes one turn of the loop."""
        connection = request.transport
        if not isinstance(connection, HttpConnection):
            return plain(503, "This connection is over.")
        if connection.queued > UNREAD_MAX_BYTES:
            # More requests at once than answers are taken: browsers do not do that.
            connection.abort()
        connection.due = self._loop.time() + ANSWER_SECONDS
        if connection in self._open:
            self._open[connection] = self._open.pop(connection)
        answer = self._refusal(request, connection)
        if answer is None:
            answer = self._found(request, connection)
        return answer

    def _refusal(self, request: web.BaseRequest, connection: HttpConnection) -> web.Response | None:
        """Returns the answer to a request that is refused whatever it asks for."""
        hosts = request.headers.getall("Host", [])
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or (name not in self._names and name != _canonical(connection.local)):
            shown = (name or "that")[:80]
            answer = plain(421, f"No node is called {shown} here: name it in the node's setting names or web_names.")
        elif request.method not in ("GET", "HEAD"):
            answer = plain(405, "Only GET.", Allow="GET, HEAD")
        elif request.headers.get("Transfer-Encoding") or request.headers.get("Content-Length", "0") != "0":
            answer = plain(413, "A request has no body here.")
        else:
            return None
        answer.force_close()
        return answer

    def _found(self, request: web.BaseRequest, connection: HttpConnection) -> web.Response:
        path = request.rel_url.raw_path
        if path == "/ws":
            return self._socket(request, connection)
        if path == "/healthz":
            return plain(503, "draining") if self._node.draining else plain(200, "ok")
        if path == "/node":
            return self._about(request)
        page = self._pages.get(path)
        return plain(404, "There is nothing here.") if page is None else self._page(request, page)

    def _about(self, request: web.BaseRequest) -> web.Response:
        """Says who this node is, for a page whose link does not: nothing that its certificates do not say too."""
        names = self._node.config.names
        about = {
            "id": self._node.identity.node_id.hex(),
            "name": names[0] if names else host_name(request.headers["Host"]),
            "version": __version__,
        }
        headers = {**HEADERS, "Cache-Control": "no-store"}
        return web.json_response(about, headers=headers)

    def _page(self, request: web.BaseRequest, page: Page) -> web.Response:
        packed = page.packed if takes_gzip(request.headers.get("Accept-Encoding", "")) else None
        etag = page.etag(packed=packed is not None)
        headers = {**HEADERS, "ETag": etag, "Cache-Control": page.cache, "Content-Type": page.type}
        if page.packed is not None:
            headers["Vary"] = "Accept-Encoding"
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
        if etag in known or known == ["*"]:
            return web.Response(status=304, headers=headers)
        if packed is None:
            return web.Response(body=page.content, headers=headers)
        return web.Response(body=packed, headers={**headers, "Content-Encoding": "gzip"})

    def _socket(self, request: web.BaseRequest, connection: HttpConnection) -> web.Response:
        """Makes the connection a client's, or says why not."""
        headers = request.headers
        key = accept_key(headers.get("Sec-WebSocket-Key", ""))
        if headers.get("Upgrade", "").lower() != "websocket" or key is None or request.method != "GET":
            return plain(426, "This is for WebSockets.", Upgrade="websocket", Connection="Upgrade")
        if headers.get("Sec-WebSocket-Version") != "13":
            return plain(426, "Only version 13 of WebSocket.", Sec_WebSocket_Version="13")
        if not self._same_origin(request):
            self._foreign(connection.peer, ascii(headers.get("Origin"))[:80])
            refusal = plain(403, "Only this node's own page may connect here.")
            refusal.force_close()
            return refusal
        offered = [word.strip() for word in ",".join(headers.getall("Sec-WebSocket-Protocol", [])).split(",")]
        if SUBPROTOCOL not in offered:
            return plain(400, f"The subprotocol here is {SUBPROTOCOL}.")
        fields = {
            "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": key,
            "Sec-WebSocket-Protocol": SUBPROTOCOL, **HEADERS,
        }  # fmt: skip
        lines = ["HTTP/1.1 101 Switching Protocols", *(f"{name}: {value}" for name, value in fields.items())]
        answer = "\r\n".join((*lines, "", "")).encode("ascii")
        adopted = False

        def begin() -> None:
            nonlocal adopted
            adopted = connection.upgrade(answer, self._node.adopt)

        self._node.reactor.run(begin)
        # After an upgrade nobody gets this: aiohttp's connection is over.
        return plain(503, "This node has too many connections: come back later.", Retry_After="5")

    def _foreign(self, peer: str, origin: str) -> None:
        """Logs that a page of another site tried, unless too many lines are written."""
        if self._lines.admits(SYSTEM_CLOCK.monotonic()):
            log.warning("foreign origin", extra={"peer": peer, "origin": origin, **self._lines.fields()})
        else:
            self._lines.left_out += 1

    @staticmethod
    def _same_origin(request: web.BaseRequest) -> bool:
        """Tells whether no page of another site is behind a request (RFC 6455, section 10.2; Fetch Metadata).

        Programs send no Origin, browsers always do: who has none gets nothing that an own socket would not give.
        """
        origins = request.headers.getall("Origin", [])
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return False
        if not origins:
            return True
        scheme, _, authority = origins[0].partition("://")
        return len(origins) == 1 and scheme == "https" and _default_port(authority) == _default_port(request.host)
