"""Runs a node until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable

from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.node.logs import configure
from sterna.trust.fingerprint import fingerprint

_POLL_SECONDS = 0.02
_COUNTED_MAX = 1_000


class Ready:
    """Where a started node listens, and who it is; made on the node's loop, used by another thread."""

    __slots__ = ("_loop", "_node", "fingerprint", "host", "port")

    def __init__(self, node: Node) -> None:
        self.host, self.port = node.address
        self.fingerprint = fingerprint(node.identity.node_id)
        self._node = node
        self._loop = asyncio.get_running_loop()

    def agent(self, name: str, seconds: float) -> tuple[str | None, int]:
        """Returns what an agent says that it runs (None: nothing within `seconds`) and how many sessions it has."""
        return asyncio.run_coroutine_threadsafe(self._agent(name, seconds), self._loop).result()

    async def _agent(self, name: str, seconds: float) -> tuple[str | None, int]:
        deadline = self._loop.time() + seconds
        while self._loop.time() < deadline:
            pod = self._node.registry.pod("local", name)
            hello = pod.connection.hello if pod is not None and pod.connection is not None else None
            if hello is not None:
                return hello.label, len(self._node.table.living("local", name, 0, _COUNTED_MAX))
            await asyncio.sleep(_POLL_SECONDS)
        return None, 0


async def serve_node(config: NodeConfig, ready: Callable[[Ready], None], log_path: str | None = None) -> None:
    """Runs a node: calls `ready` once it listens, drains on SIGTERM, stops at once on SIGINT.

    The log goes to standard error, or is appended to the file `log_path`. Raises SternaError when it cannot start.
    """
    configure(config.log_level, log_path)
    loop = asyncio.get_running_loop()
    node = Node(config)
    interrupted = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(node.close)
        node.start()
        if config.metrics_port:
            from sterna.node.metrics import MetricsServer

            metrics = await MetricsServer.start(node, config.metrics_host, config.metrics_port)
            stack.push_async_callback(metrics.close)
        loop.add_signal_handler(signal.SIGTERM, node.stop_requested.set)
        loop.add_signal_handler(signal.SIGINT, _interrupt, node, interrupted)
        await asyncio.to_thread(ready, Ready(node))
        await node.stop_requested.wait()
        if not interrupted.is_set():
            await node.drain()


def _interrupt(node: Node, interrupted: asyncio.Event) -> None:
    interrupted.set()
    node.stop_requested.set()
