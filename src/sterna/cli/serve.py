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


class Ready:
    """Where a started node listens, and who it is."""

    __slots__ = ("fingerprint", "host", "port")

    def __init__(self, node: Node) -> None:
        self.host, self.port = node.address
        self.fingerprint = fingerprint(node.identity.node_id)


async def serve_node(config: NodeConfig, ready: Callable[[Ready], None]) -> None:
    """Runs a node: calls `ready` once it listens, drains on SIGTERM, stops at once on SIGINT.

    Raises SternaError when it cannot start.
    """
    configure(config.log_level)
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
