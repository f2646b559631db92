"""Runs a node until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import signal
import socket
import threading
from collections.abc import Callable

from sterna.clock import SYSTEM_CLOCK
from sterna.errors import UsageError
from sterna.node.app import Node
from sterna.node.config import WEB_PORT, NodeConfig
from sterna.node.logs import configure
from sterna.transport.listen import tcp_socket
from sterna.trust.fingerprint import fingerprint
from sterna.trust.links import ShareLink
from sterna.trust.local import LOCAL_TENANT
from sterna.trust.tickets import new_ticket
from sterna.units import SECOND

log = logging.getLogger("sterna.node")

_POLL_SECONDS = 0.02
_COUNTED_MAX = 1_000


class Ready:
    """Where a started node listens, and who it is; made on the node's loop, used by another thread.

    `url` is the web page's address, or None; `without` says in a sentence why there is none although there should be;
    `no_quic` says so of QUIC.
    `opened` is set once the page is served too.
    """

    __slots__ = ("_loop", "_node", "fingerprint", "host", "no_quic", "opened", "port", "url", "without")

    def __init__(self, node: Node, url: str | None = None, without: str = "") -> None:
        self.host, self.port = node.address
        self.url = url
        self.without = without
        self.no_quic = node.no_quic
        self.opened = threading.Event()
        self.fingerprint = fingerprint(node.identity.node_id)
        self._node = node
        self._loop = asyncio.get_running_loop()

    def agent(self, name: str, seconds: float) -> tuple[str | None, int]:
        """Returns what an agent says that it runs (None: nothing within `seconds`) and how many sessions it has."""
        return asyncio.run_coroutine_threadsafe(self._agent(name, seconds), self._loop).result()

    def invitation(self, host: str, seconds: int) -> str:
        """Returns a link to the page at `host` that opens all sessions on the first device to use it in that time."""
        return asyncio.run_coroutine_threadsafe(self._invitation(host, seconds), self._loop).result()

    async def _invitation(self, host: str, seconds: int) -> str:
        node, wall = self._node, SYSTEM_CLOCK.wall()
        ticket, hashed = new_ticket()
        node.store.add_ticket(hashed, LOCAL_TENANT, None, "*", "drive", wall + seconds * SECOND, wall)
        return ShareLink(
            host, node.config.web_port, session_port=self.port, ticket=ticket, node_id=node.identity.node_id,
            mode="drive",
        ).web()  # fmt: skip

    async def _agent(self, name: str, seconds: float) -> tuple[str | None, int]:
        deadline = self._loop.time() + seconds
        while self._loop.time() < deadline:
            pod = self._node.registry.pod("local", name)
            hello = pod.connection.hello if pod is not None and pod.connection is not None else None
            if hello is not None:
                return hello.label, len(self._node.table.living("local", name, 0, _COUNTED_MAX))
            await asyncio.sleep(_POLL_SECONDS)
        return None, 0


async def serve_node(
    config: NodeConfig, ready: Callable[[Ready], None], log_path: str | None = None, *, web_asked: bool = False
) -> bool:
    """Runs a node: calls `ready` once it listens, drains on SIGTERM, stops at once on SIGINT; returns whether it was
    interrupted so.

    The log goes to standard error, or is appended to the file `log_path`. The web page's usual port may be another
    node's, which then has the page, unless it was `web_asked` for. Raises SternaError when it cannot start.
    """
    _check_address(config.host, "--host")
    if config.web_port and config.web_host:
        _check_address(config.web_host, "--web-host")
    configure(config.log_level, log_path)
    loop = asyncio.get_running_loop()
    node = Node(config)
    interrupted = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        web, without = _web_socket(config, asked=web_asked or config.web_port != WEB_PORT)
        if web is not None:
            stack.callback(web.close)
        stack.push_async_callback(node.close)
        node.start()
        if config.metrics_port:
            from sterna.node.metrics import MetricsServer

            metrics = await MetricsServer.start(node, config.metrics_host, config.metrics_port)
            stack.push_async_callback(metrics.close)
        loop.add_signal_handler(signal.SIGTERM, node.stop_requested.set)
        loop.add_signal_handler(signal.SIGINT, _interrupt, node, interrupted)
        about = Ready(node, _url(*web.getsockname()[:2]) if web is not None else None, without)
        # The page takes 0.1 s to be loaded: meanwhile the node serves, and who asks for the page waits.
        await asyncio.gather(asyncio.to_thread(ready, about), _open_web(node, web, stack, about.opened))
        await node.stop_requested.wait()
        if not interrupted.is_set():
            await node.drain()
    return interrupted.is_set()


def _check_address(host: str, option: str) -> None:
    """Raises UsageError if this machine cannot listen on an address, whatever the port."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {host}: {error.strerror}; name an address of this machine with {option}."
        ) from None


def _web_socket(config: NodeConfig, *, asked: bool) -> tuple[socket.socket | None, str]:
    """Returns the web page's listening socket; without one, why, if it is not because nobody wants it."""
    if not config.web_port:
        return None, ""
    if config.web_port == config.port:
        if asked:
            raise UsageError(
                f"Sessions and web page cannot share port {config.port}: choose another --web-port, or 0 for none."
            )
        config.web_port = 0
        return None, "There is no web page, as its usual port is the sessions' own: choose another with --web-port."
    try:
        return tcp_socket(config.web_host or config.host, config.web_port), ""
    except UsageError as error:
        reason = f"{str(error).replace('--port', '--web-port')}"
    if asked:
        raise UsageError(f"No web page: {reason[:-1]}, or leave it out with --web-port 0.")
    config.web_port = 0
    log.warning("no web page", extra={"reason": reason})
    return None, f"There is no web page: {reason[:1].lower()}{reason[1:]}"


async def _open_web(
    node: Node, sock: socket.socket | None, stack: contextlib.AsyncExitStack, opened: threading.Event
) -> None:
    """Serves the web page on a listening socket."""
    try:
        if sock is not None:
            module = await asyncio.to_thread(importlib.import_module, "sterna.web.site")
            site = module.Site(node, node.config.web_hosts())
            stack.push_async_callback(site.close)
            site.listen(sock)
    finally:
        opened.set()


def _url(host: str, port: int) -> str:
    """Returns the page's address, as seen from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- compared with, not bound to
    return f"https://[{host}]:{port}/" if ":" in host else f"https://{host}:{port}/"


def _interrupt(node: Node, interrupted: asyncio.Event) -> None:
    interrupted.set()
    node.stop_requested.set()
