"""Connections of one IPv6 network are counted together on every port: what a socket would say is made up here."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sterna.node.app import Node
from sterna.transport.listen import Listener, tcp_socket
from sterna.transport.pump import Reactor
from sterna.transport.tls import TlsSocket
from sterna.trust.node_identity import NodeIdentity
from sterna.web import site as web
from sterna.web.site import Site
from tests.integration.test_pump_close import tcp_pair

HOSTS = ("192.0.2.1", "2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:1::2", "2001:db8:0:1:ffff::3", "192.0.2.2")


@pytest.fixture
def context(tmp_path: Path) -> ssl.SSLContext:
    return NodeIdentity.load(os.fspath(tmp_path), now_s=int(time.time())).server_context()


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    made = [tcp_pair() for _ in HOSTS]
    yield made
    for ends in made:
        for end in ends:
            end.close()


def take(pairs: list[tuple[socket.socket, socket.socket]], hold: Callable[[socket.socket, str], None]) -> None:
    """Has all taken, where two of a place are the most."""
    for host, (ours, _) in zip(HOSTS, pairs, strict=True):
        hold(ours, host)
    assert [host for host, (ours, _) in zip(HOSTS, pairs, strict=True) if ours.fileno() < 0] == ["2001:db8:0:1::1"]


async def test_silent_connections(pairs: list[tuple[socket.socket, socket.socket]], context: ssl.SSLContext) -> None:
    accepted: list[str] = []
    listener = Listener(
        Reactor(asyncio.get_running_loop()), tcp_socket("127.0.0.1", 0), lambda _sock, peer: accepted.append(peer),
        context=context, per_address=2,
    )  # fmt: skip
    try:
        take(pairs, listener._hold)
        assert (listener.evicted, listener.silent) == (1, len(HOSTS) - 1)
    finally:
        listener.close()
    assert len(listener._places) == 0


async def test_connections_of_the_web_port(
    pairs: list[tuple[socket.socket, socket.socket]], context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "PER_ADDRESS_MAX", 2)
    node: Node = SimpleNamespace(reactor=Reactor(asyncio.get_running_loop()))  # type: ignore[assignment]  # all it needs
    site = Site(node, ())
    try:
        take(pairs, lambda sock, peer: site._accepted(TlsSocket(sock, context, server_side=True), peer))
        assert (site.evicted, len(site._open)) == (1, len(HOSTS) - 1)
    finally:
        await site.close()
    assert len(site._places) == 0
