"""Runs of datagrams through real sockets: nothing lost, joined wrongly, or held back."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import socket
from collections.abc import Iterator

import pytest
from qh3.quic.configuration import QuicConfiguration

from sterna.transport import quic, udp
from sterna.transport.pump import Reactor
from sterna.transport.quic import QuicListener


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours = udp.udp_socket("127.0.0.1", 0)
    theirs = udp.open_udp(socket.AF_INET)
    udp.join(theirs)
    theirs.connect(ours.getsockname())
    theirs.send(b"first")
    yield ours, theirs
    ours.close()
    theirs.close()


def received(sock: socket.socket) -> list[bytes]:
    found: list[bytes] = []
    while True:
        try:
            data, size = udp.receive(sock)
        except BlockingIOError:
            return found
        found += [data[at : at + size] for at in range(0, len(data), size)]


def test_what_goes_in_runs_comes_as_it_was(pair: tuple[socket.socket, socket.socket]) -> None:
    seed = int(os.environ.get("STERNA_UDP_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"STERNA_UDP_SEED={seed}")
    rng = random.Random(seed)
    ours, theirs = pair
    address = ours.recvfrom(10)[1]
    lengths = set()
    for _ in range(50):
        groups = ([rng.choice((1210, 1440, 999, 30))] * rng.choice((1, 9)) for _ in range(rng.randrange(1, 60)))
        sent = [rng.randbytes(size) for size in itertools.chain.from_iterable(groups)]
        for run in udp.runs(sent[:300]):
            lengths.add(len(run))
            udp.send_run(ours, run, address)
        assert received(theirs) == sent[:300]
    assert max(lengths) > 5


def test_a_small_datagram_is_on_its_way_before_the_next_is_made() -> None:
    made: list[int] = []

    def make() -> Iterator[bytes]:
        for size in (40, 1210, 1210, 700, 1210):
            made.append(size)
            yield bytes(size)

    grouped = udp.runs(make())
    assert [len(each) for each in next(grouped)] == [40]
    assert made == [40]
    assert [[len(each) for each in run] for run in grouped] == [[1210, 1210, 700], [1210]]


async def test_where_runs_do_not_go_each_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sock = udp.udp_socket("127.0.0.1", 0)
    reactor = Reactor(asyncio.get_running_loop())
    listener = QuicListener(reactor, sock, lambda _carry: False, QuicConfiguration(is_client=False))
    theirs = udp.open_udp(socket.AF_INET)
    theirs.bind(("127.0.0.1", 0))

    def refuse(_sock: socket.socket, run: list[bytes], _address: udp.Address) -> None:
        calls.append(len(run))
        raise OSError(errno.EIO, "no")

    calls: list[int] = []
    monkeypatch.setattr(quic, "send_run", refuse)
    run = [bytes([number]) * 1200 for number in range(10)]
    try:
        listener.send_run(run, theirs.getsockname())
        assert [theirs.recv(2000) for _ in run] == run
        listener.send_run(run, theirs.getsockname())
        assert [theirs.recv(2000) for _ in run] == run
        assert calls == [10], "it is not tried again"
    finally:
        listener.close()
        theirs.close()
