"""The metrics: right numbers from a real node, nothing secret, and bounds on who asks."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sterna.errors import UsageError
from sterna.node import metrics
from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.node.metrics import MetricsServer
from tests.e2e.rig import Daemon, Rig, free_port, wait_for

Values = dict[tuple[str, str], float]


def values(text: str) -> Values:
    """Every sample by its name and the value of its first label."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def short_directory() -> Iterator[Path]:
    # A Unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="st-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def server(short_directory: Path) -> AsyncIterator[MetricsServer]:
    config = NodeConfig(port=0, state=str(short_directory / "n"), sockets=str(short_directory / "p"))
    node = Node(config)
    try:
        node.start()
        found = await MetricsServer.start(node, "127.0.0.1", 0)
        yield found
        await found.close()
    finally:
        await node.close()


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_only_get_metrics_is_answered_and_nothing_large(server: MetricsServer) -> None:
    answer = await ask(server.port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert values(body.decode())[("sterna_sessions", "active")] == 0
    assert (await ask(server.port, b"HEAD /metrics?x=1 HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")
    assert (await ask(server.port, b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
    assert (await ask(server.port, b"POST /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
    large = b"GET /metrics HTTP/1.1\r\nX: " + b"x" * metrics.REQUEST_MAX_BYTES
    assert (await ask(server.port, large + b"\r\n\r\n")).startswith(b"HTTP/1.1 431 ")


async def test_a_slow_or_silent_asker_is_dropped_and_many_are_bounded(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REQUEST_SECONDS", 0.3)
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(metrics.CONNECTIONS_MAX)]
    assert await ask(server.port, b"GET /metrics HTTP/1.1\r\n\r\n") == b"", "one more than there may be"
    for reader, writer in silent:
        assert await reader.read() == b""
        writer.close()
    assert (await ask(server.port, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_a_loop_that_is_blocked_shows_as_lag(server: MetricsServer) -> None:
    await server.text()
    deadline = asyncio.get_running_loop().time() + 0.9
    while asyncio.get_running_loop().time() < deadline:
        pass
    text = (await server.text()).decode()
    assert values(text)[("sterna_loop_lag_seconds", "")] > 0.2
    assert values((await server.text()).decode())[("sterna_loop_lag_seconds", "")] < 0.2, "each scrape begins anew"


async def test_a_port_in_use_is_named(server: MetricsServer) -> None:
    with pytest.raises(UsageError, match=r"Metrics: Port \d+ on 127.0.0.1 is in use.*--metrics-port"):
        await MetricsServer.start(None, "127.0.0.1", server.port)  # type: ignore[arg-type]  # it gets no further than the port


def test_a_node_with_a_session_counts_it_and_tells_no_names() -> None:
    with Rig() as rig:
        port = free_port()
        rig.start_pod("main")
        words = rig.words(
            "node", "-p", str(rig.port), "-s", os.fspath(rig.sockets), "-l", "https://keeper.example", "-t", "-",
            "--state", os.fspath(rig.state / "node"),
        )  # fmt: skip
        env = {
            **rig.env,
            "STERNA_NODE_METRICS_PORT": str(port),
            "STERNA_NODE_TOKEN": "not-used",
            "STERNA_NODE_COLD_SECONDS": "1",
        }
        words[words.index("-t") + 1] = "@" + os.fspath(token_file(rig))
        rig.node = Daemon(words, env, rig.directory / "node.log")
        rig.about = {}

        def scrape() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                return str(answer.read().decode())

        wait_for(lambda: "metrics served" in rig.node.output() if rig.node else False, name="the node")
        wait_for(lambda: values(scrape())[("sterna_pods", "ready")] == 1, name="the agent")
        before = values(scrape())
        client = rig.terminal("attach", "--name", "secret-name", "--host", "127.0.0.1", "--port", str(rig.port))
        client.type("echo x$((40+2))y\n")
        client.expect("x42y")
        text = scrape()
        now = values(text)
        assert now[("sterna_sessions", "active")] == 1
        assert now[("sterna_attachments", "drive")] == 1
        assert now[("sterna_attachments", "watch")] == 0
        assert now[("sterna_connections", "proved")] == 1
        assert now[("sterna_connections_accepted_total", "")] > before[("sterna_connections_accepted_total", "")]
        assert now[("sterna_journal_used_bytes", "")] > before[("sterna_journal_used_bytes", "")]
        assert now[("sterna_journal_faults_total", "io")] == 0
        assert now[("sterna_access_denied_total", "")] == 0
        assert now[("process_open_fds", "")] > 5
        client.type("\n~d")
        assert client.wait() == 0
        wait_for(lambda: values(scrape())[("sterna_sessions", "suspended")] == 1, name="the detached session")
        denied = rig.sterna("attach", "--host", "127.0.0.1", "--port", str(rig.port), env={"STERNA_TOKEN": "wrong"})
        assert denied.returncode != 0
        for secret in ("secret-name", "the-token-of-the-node", "local", "main"):
            assert secret not in text
        assert rig.stop_node() == 0
        assert "the-token-of-the-node" not in rig.node.output()


def token_file(rig: Rig) -> Path:
    path = rig.directory / "token"
    path.write_text("the-token-of-the-node\n")
    path.chmod(0o600)
    return path
