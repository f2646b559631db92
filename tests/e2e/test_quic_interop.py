"""Another QUIC implementation (aioquic) as a client of the node: handshake, session, Retry, several streams."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent, StreamDataReceived

from sterna.protocol import messages
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type, encode
from sterna.protocol.link import Link
from sterna.protocol.messages import Accept
from sterna.transport.quic import RETRY_ABOVE
from tests.e2e.raw_client import Raw, Site, new_device
from tests.integration.test_quic import QuicRig

SECONDS = 5.0


@pytest.fixture(scope="module")
def rig() -> Iterator[QuicRig]:
    with QuicRig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_quic_node()
        yield rig


class Client(QuicConnectionProtocol):
    """An aioquic connection whose streams' bytes go to queues."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.streams: dict[int, asyncio.Queue[bytes]] = {}

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            queue = self.streams[event.stream_id]
            if event.data:
                queue.put_nowait(event.data)
            if event.end_stream:
                queue.put_nowait(b"")
        elif isinstance(event, ConnectionTerminated):
            for queue in self.streams.values():
                queue.put_nowait(b"")


class Stream:
    """One stream of an aioquic connection with the protocol's frames."""

    def __init__(self, rig: QuicRig, client: Client) -> None:
        site = Site(rig)
        self.raw = object.__new__(Raw)  # only for the messages that it makes: it has no socket
        self.raw.site, self.raw.device, self.raw.credential = site, new_device(), site.token
        self._client = client
        self.number: int = 4 * len(client.streams)
        self.queue = client.streams[self.number] = asyncio.Queue()
        self._link = Link()
        self._frames: list[Frame] = []

    def write(self, data: bytes, *, end: bool = False) -> None:
        self._client._quic.send_stream_data(self.number, data, end)
        self._client.transmit()

    def send(self, kind: int, handle: int = 0, seq: int = 0, payload: bytes = b"") -> None:
        self.write(encode(kind, handle, seq, payload))

    async def until(self, kind: int) -> Frame:
        while True:
            while self._frames:
                frame = self._frames.pop(0)
                if frame[0] == kind:
                    return frame
            data = await self.queue.get()
            assert data, "the stream ended"
            self._frames += self._link.receive(data)

    async def connect(self) -> Accept:
        self.send(Type.CONNECT, 1, 0, self.raw.signed(self.raw.connect_body()))
        return messages.unpack(Accept, (await self.until(Type.ACCEPT))[3])

    async def echo(self, data: bytes, position: int) -> bytes:
        self.send(Type.DATA, 1, position, data)
        got = b""
        while len(got) < len(data):
            got += (await self.until(Type.DATA))[3]
        end = position + len(data)
        self.send(Type.ACK, 1, end, end.to_bytes(8, "big"))
        return got


@asynccontextmanager
async def connected(rig: QuicRig, *, alpn: str = "clawterm/1") -> AsyncIterator[Client]:
    site = Site(rig)
    with open(os.path.join(site.state, "node.crt"), "rb") as file:
        ca = file.read()
    configuration = QuicConfiguration(is_client=True, alpn_protocols=[alpn], server_name="localhost", cadata=ca)
    configuration.verify_mode = ssl.CERT_REQUIRED
    async with asyncio.timeout(SECONDS):
        async with connect(
            "127.0.0.1", rig.quic_port, configuration=configuration, create_protocol=Client
        ) as client:  # fmt: skip
            assert isinstance(client, Client)
            yield client


async def test_an_aioquic_client_connects_and_gets_its_echo(rig: QuicRig) -> None:
    async with connected(rig) as client:
        stream = Stream(rig, client)
        accept = await stream.connect()
        assert accept.agent == "echo"
        data = os.urandom(60_000)
        for turn in range(20):
            assert await stream.echo(data, turn * len(data)) == data


async def test_the_end_of_a_stream_leaves_the_other_sessions_of_a_connection_alone(rig: QuicRig) -> None:
    async with connected(rig) as client:
        streams = [Stream(rig, client) for _ in range(4)]
        for stream in streams:
            await stream.connect()
        streams[0].write(b"", end=True)
        while await streams[0].queue.get():
            pass  # until the node has ended its side, too
        client._quic.reset_stream(4, 7)
        client.transmit()
        for stream in streams[2:]:
            assert await stream.echo(b"still here", 0) == b"still here"


async def test_a_client_is_asked_for_its_address_when_many_handshakes_are_open(rig: QuicRig) -> None:
    from tests.integration.test_quic import initial, status

    loop = asyncio.get_running_loop()
    place = ("127.0.0.1", rig.quic_port)
    transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=place)
    for data in await asyncio.to_thread(lambda: [initial() for _ in range(3 * RETRY_ABOVE)]):
        transport.sendto(data)
        await asyncio.sleep(0.001)
    transport.close()
    assert (await asyncio.to_thread(status, rig))["retries"] > 0
    start = time.monotonic()
    async with connected(rig) as client:
        stream = Stream(rig, client)
        await stream.connect()
        assert await stream.echo(b"after a Retry", 0) == b"after a Retry"
        assert client._quic._retry_count == 1
    print(f"with a Retry it took {(time.monotonic() - start) * 1000:.0f} ms")


async def test_another_protocol_is_refused(rig: QuicRig) -> None:
    with pytest.raises(ConnectionError):
        async with connected(rig, alpn="h3"):
            pass


async def test_a_stream_that_breaks_the_protocol_is_told_so(rig: QuicRig) -> None:
    async with connected(rig) as client:
        stream = Stream(rig, client)
        stream.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        error = messages.unpack(messages.Error, (await stream.until(Type.ERROR))[3])
        assert error.message.endswith(".")


async def test_strangers_leave_no_more_connections_than_are_allowed(rig: QuicRig) -> None:
    """A connection whose session was refused counts as one without a proof, not as one that is looked after."""
    from tests.integration.test_quic import status

    async with connected(rig) as client:
        stream = Stream(rig, client)
        stream.raw.credential = "nonsense"
        stream.send(Type.CONNECT, 1, 0, stream.raw.signed(stream.raw.connect_body()))
        error = messages.unpack(messages.Error, (await stream.until(Type.ERROR))[3])
        assert error.name == "denied"
        while await stream.queue.get():
            pass
        told = await asyncio.to_thread(status, rig)
        assert told["unproved"] >= 1
