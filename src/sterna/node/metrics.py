"""Metrics for Prometheus on a port of their own: read from the node when asked for, so sessions pay nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sterna.clock import SYSTEM_CLOCK
from sterna.errors import UsageError
from sterna.protocol.states import State
from sterna.transport.listen import tcp_socket
from sterna.units import SECOND

if TYPE_CHECKING:
    from sterna.node.app import Node

log = logging.getLogger("sterna.node.metrics")

REQUEST_MAX_BYTES = 4_096
REQUEST_SECONDS = 5.0
CONNECTIONS_MAX = 16
_LAG_EVERY_SECONDS = 0.5
_FAULTS = ("headers", "files", "entries", "overlaps", "chunks", "io")


class Counts(Protocol):
    """What is counted in the database, off the loop."""

    def __call__(self) -> dict[str, int]:
        """Returns how many sessions are stored in each state."""


class StoredSessions:
    """Counts sessions by state over a read-only connection of its own: the loop does not wait for it."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self) -> dict[str, int]:
        """Returns how many sessions are stored in each state; none where the database cannot be read just now."""
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{quote(self._path)}?mode=ro", uri=True, timeout=1.0)
            ) as found:
                rows = found.execute("SELECT state, count(*) FROM sessions WHERE state != 'closed' GROUP BY state")
                return {str(state): int(count) for state, count in rows}
        except sqlite3.Error:
            return {}


class NodeCollector:
    """Turns the node's own counters into metrics; `stored` and `lag` (seconds) are set before each collection."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.stored: dict[str, int] = {}
        self.lag = 0.0

    def describe(self) -> Iterable[Metric]:
        """Names nothing in advance, so that registering collects nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics as they are now."""
        yield from self._sessions()
        yield from self._connections()
        yield from self._journal()
        node = self._node
        build = GaugeMetricFamily("sterna_build_info", "The version that runs.", labels=["version"])
        build.add_metric([_version()], 1)
        yield build
        started = node.started / SECOND
        yield GaugeMetricFamily("sterna_start_time_seconds", "When the node started (Unix time).", value=started)
        uptime = (SYSTEM_CLOCK.wall() - node.started) / SECOND
        yield GaugeMetricFamily("sterna_uptime_seconds", "How long the node runs.", value=uptime)
        yield GaugeMetricFamily("sterna_draining", "Whether the node is being drained.", value=node.draining)
        yield GaugeMetricFamily(
            "sterna_loop_lag_seconds", "The longest that the event loop was late since the last scrape.", value=self.lag
        )

    def _sessions(self) -> Iterator[Metric]:
        node = self._node
        sessions = GaugeMetricFamily("sterna_sessions", "Sessions by state.", labels=["state"])
        for state in State:
            if state is not State.CLOSED:
                sessions.add_metric([state.value], self.stored.get(state.value, 0))
        yield sessions
        yield GaugeMetricFamily("sterna_sessions_in_memory", "Sessions that are in memory.", value=len(node.table))
        attached = {"drive": 0, "watch": 0}
        for session in node.table.hot():
            for attachment in session.attachments.values():
                attached[attachment.mode] += 1
        attachments = GaugeMetricFamily("sterna_attachments", "Attached terminals by mode.", labels=["mode"])
        for mode, count in attached.items():
            attachments.add_metric([mode], count)
        yield attachments
        pods = GaugeMetricFamily("sterna_pods", "Agents by state.", labels=["state"])
        found = node.registry.pods()
        ready = sum(pod.is_ready for pod in found)
        pods.add_metric(["ready"], ready)
        pods.add_metric(["absent"], len(found) - ready)
        yield pods

    def _connections(self) -> Iterator[Metric]:
        node = self._node
        connections = GaugeMetricFamily("sterna_connections", "Connections by what is known of them.", labels=["state"])
        proved = sum(connection.proved for connection in node.connections)
        connections.add_metric(["proved"], proved)
        connections.add_metric(["unproved"], len(node.connections) - proved)
        connections.add_metric(["silent"], node.silent)
        yield connections
        yield CounterMetricFamily("sterna_connections_accepted", "Connections that were begun.", value=node.accepted)
        yield CounterMetricFamily("sterna_access_denied", "Proofs that were refused.", value=node.doorkeeper.denied)
        yield CounterMetricFamily(
            "sterna_connections_evicted", "Silent connections that made room for others.", value=node.evicted
        )

    def _journal(self) -> Iterator[Metric]:
        node, journal = self._node, self._node.journal
        for name, about, value in (
            ("used", "Bytes of the journal that belong to sessions.", journal.used_bytes),
            ("reserved", "Bytes of the journal's files.", journal.reserved_bytes),
            ("quota", "The most bytes that the journal may take.", journal.quota_bytes),
        ):
            yield GaugeMetricFamily(f"sterna_journal_{name}_bytes", about, value=value)
        faults = CounterMetricFamily("sterna_journal_faults", "What was found damaged or failed.", labels=["kind"])
        for kind in _FAULTS:
            faults.add_metric([kind], getattr(journal.faults, kind))
        yield faults
        yield CounterMetricFamily(
            "sterna_journal_sessions_in_memory_only",
            "Sessions whose log on disk failed.",
            value=node.table.storage_failures,
        )


def _version() -> str:
    """Returns the installed version; a source tree that was never installed has none."""
    try:
        return version("sterna")
    except PackageNotFoundError:
        return "unknown"


class MetricsServer:
    """Answers `GET /metrics` over HTTP/1.1, one request on a connection; made by `start`."""

    def __init__(self, node: Node, stored: Counts) -> None:
        self._collector = NodeCollector(node)
        self._stored = stored
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._lag = 0.0
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + _LAG_EVERY_SECONDS
        self._timer = self._loop.call_at(self._due, self._tick)

    @classmethod
    async def start(cls, node: Node, host: str, port: int) -> MetricsServer:
        """Returns a server that listens on `host` and `port`; raises UsageError when the address cannot be had."""
        try:
            sock = tcp_socket(host, port)
        except UsageError as error:
            raise UsageError(f"Metrics: {str(error).replace('--port', '--metrics-port')}") from None
        server = cls(node, StoredSessions(node.store.path))
        server._server = await asyncio.start_server(server._serve, sock=sock, limit=REQUEST_MAX_BYTES)
        log.info("metrics served", extra={"host": host, "port": server.port})
        return server

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _tick(self) -> None:
        """Notes how late the loop is; work that blocks it shows here."""
        now = self._loop.time()
        self._lag = max(self._lag, now - self._due)
        self._due = now + _LAG_EVERY_SECONDS
        self._timer = self._loop.call_at(self._due, self._tick)

    async def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        self._collector.stored = await self._loop.run_in_executor(None, self._stored)
        self._collector.lag, self._lag = max(self._lag, self._loop.time() - self._due, 0.0), 0.0
        # On the loop: nothing may change while it is counted.
        return generate_latest(self._registry)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if len(self._open) <= CONNECTIONS_MAX:
                async with asyncio.timeout(REQUEST_SECONDS):
                    writer.write(await self._answer(reader))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.CancelledError):
            # Cancelled by `close`: the task ends here, and asyncio would report a cancelled one as a failure.
            pass
        finally:
            self._open.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response("431 Request Header Fields Too Large", b"The request is too large.\n")
        except asyncio.IncompleteReadError:
            return b""
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"Only GET.\n", more="Allow: GET, HEAD\r\n")
        if path != b"/metrics":
            return _response("404 Not Found", b"The metrics are at /metrics.\n")
        return _response("200 OK", await self.text(), kind=CONTENT_TYPE_LATEST, body=method == b"GET")

    async def close(self) -> None:
        """Stops."""
        self._timer.cancel()
        for task in self._open:
            task.cancel()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


def _response(
    status: str, content: bytes, *, kind: str = "text/plain; charset=utf-8", more: str = "", body: bool = True
) -> bytes:
    fields = f"Content-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n{more}"
    return f"HTTP/1.1 {status}\r\n{fields}\r\n".encode("ascii") + (content if body else b"")
