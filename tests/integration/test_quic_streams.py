"""Streams of a QUIC connection that are none, too many, or not taken, and what both sides insist on: one process."""

from __future__ import annotations

import socket
import time
from functools import partial
from pathlib import Path

import pytest
from qh3.quic import events
from qh3.tls import SessionTicket

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.codec import Decoder
from sterna.protocol.frame import Type, encode
from sterna.transport import quic
from sterna.transport.quic_client import QuicChannel
from sterna.transport.quic_connection import PatientConnection
from tests.integration.quic_rig import Served, Speaker, serving, speaking, until

KIB = 1024


async def test_streams_of_a_connection_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker:
            await speaker.shake()
            numbers = [4 * number for number in range(quic.STREAMS_MAX + 1)]
            for number in numbers:
                speaker.write(number, b"x")
            await speaker.until(lambda: speaker.all(events.StreamReset))
            assert [event.stream_id for event in speaker.all(events.StreamReset)] == numbers[-1:]
            assert len(served.streams) == quic.STREAMS_MAX
            await speaker.until(lambda: all(speaker.read(number) == b"x" for number in numbers[:-1]))
            speaker.quic.reset_stream(numbers[3], 0)
            speaker.write(numbers[-1] + 4, b"y")
            await speaker.until(lambda: speaker.read(numbers[-1] + 4) == b"y")


async def test_one_that_is_not_adopted_is_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Served, "_adopt", lambda _served, _carry: False)
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker:
            await speaker.shake()
            speaker.write(0, b"x")
            await speaker.until(lambda: speaker.all(events.StreamReset) and speaker.all(events.StopSendingReceived))
            assert speaker.told is None


async def test_a_stream_for_one_direction_ends_the_connection(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker:
            await speaker.shake()
            speaker.write(0, b"x")
            await speaker.until(lambda: speaker.read(0))
            speaker.write(2, b"x")
            await speaker.until(lambda: speaker.told)
            assert speaker.told is not None
            assert speaker.told.error_code == quic._APPLICATION
            assert len(served.streams) == 1
            assert served.streams[0].end
            assert served.listener.connections == 0


async def test_streams_begin_in_any_order_and_only_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker:
            await speaker.shake()
            for _ in range(3):
                speaker.quic._open_stream()
            for number in (8, 0, 4):
                speaker.write(number, b"%d" % number)
                await speaker.until(partial(speaker.read, number))
            assert [stream.got for stream in served.streams] == [b"8", b"0", b"4"]
            for stream in served.streams[:2]:
                stream.link.closing = True
                stream.conduit.flush()
                assert stream.end
            # What the client says before it has heard of the end.
            for number in (8, 0, 4):
                speaker.quic.send_stream_data(number, b"later")
            speaker.say()
            await speaker.until(lambda: speaker.read(4) == b"4later")
            assert len(served.streams) == 3


@pytest.mark.parametrize("cut", [0, 1], ids=["between-frames", "inside-a-frame"])
async def test_an_end_inside_a_frame_is_told(tmp_path: Path, *, cut: int) -> None:
    async with serving(tmp_path) as served:
        served.quiet = True
        with Speaker(served) as speaker:
            await speaker.shake()
            speaker.write(0, b"")
            frame = encode(Type.PING, 0, 0, b"x")
            speaker.write(0, frame[: len(frame) - cut])
            await speaker.until(lambda: served.streams and served.streams[0].got)
            served.streams[0].link.receive(served.streams[0].got)
            speaker.write(0, b"", end=True)
            await speaker.until(lambda: any(event.end_stream for event in speaker.all(events.StreamDataReceived)))
            said = Decoder().feed(speaker.read(0))
            codes = [messages.unpack(messages.Error, frame[3]).code for frame in said if frame[0] == Type.ERROR]
            assert codes == ([Code.TRUNCATED] if cut else [])
            assert served.streams[0].end == "closed by the other side"
            assert served.listener.connections == 1


async def test_bulk_data_stops_while_a_stream_is_not_taken_and_goes_on_after_that(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.quiet = True
        with Speaker(served, max_stream_data=100 * KIB) as speaker:
            await speaker.shake()
            speaker.write(0, b"x")
            await speaker.until(lambda: served.streams)
            (echo,) = served.streams
            echo.push(b"soon")
            await speaker.until(lambda: speaker.read(0) == b"soon")
            assert not echo.conduit.link.blocked
            echo.push(bytes(300 * KIB))
            await until(lambda: not echo.link.out_bytes)
            assert echo.link.blocked
            assert 200 * KIB < echo.conduit.queued <= 300 * KIB
            echo.push(b"later")
            await speaker.ask()
            queued = echo.conduit.queued
            drains: list[int] = []

            def whole() -> bool:
                if echo.drains and not drains:
                    drains.append(echo.conduit.queued)
                return len(speaker.read(0)) == 300 * KIB + 9

            assert queued > 5
            await speaker.until(whole)
            assert speaker.read(0).endswith(b"\0later")
            assert not echo.conduit.link.blocked
            assert echo.drains == 1
            assert drains[0] < quic.SEND_LOW_BYTES + 5


async def test_the_end_of_a_stream_that_is_not_taken_comes_after_all_that_waits(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.quiet = True
        with Speaker(served, max_stream_data=100 * KIB) as speaker:
            await speaker.shake()
            speaker.write(0, b"x")
            await speaker.until(lambda: served.streams)
            (echo,) = served.streams
            echo.push(bytes(400 * KIB))
            await until(lambda: echo.link.blocked)
            echo.push(b"last")
            speaker.write(0, b"", end=True)
            await until(lambda: echo.end)
            await speaker.until(lambda: any(event.end_stream for event in speaker.all(events.StreamDataReceived)))
            assert speaker.read(0) == bytes(400 * KIB) + b"last"


async def test_who_takes_nothing_and_has_too_much_waiting_loses_the_stream(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.quiet = True
        with Speaker(served, max_stream_data=KIB) as speaker:
            await speaker.shake()
            for number in (0, 4):
                speaker.write(number, b"x")
            await speaker.until(lambda: len(served.streams) == 2)
            slow, other = served.streams
            slow.push(bytes(quic.SEND_HIGH_BYTES + KIB))
            await until(lambda: slow.link.blocked)
            slow.push(bytes(limits.OUTBOUND_MAX_BYTES))
            await speaker.ask()
            assert not slow.end, "so much may wait"
            slow.push(b"x")
            await speaker.until(lambda: speaker.all(events.StreamReset))
            assert "too much waits" in slow.end
            other.push(b"still here")
            await speaker.until(lambda: speaker.read(4) == b"still here")


async def test_a_node_gives_out_no_tickets(tmp_path: Path) -> None:
    """Without one there is no 0-RTT: nobody can send early data, and nobody can send it again."""
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker:
            await speaker.shake()
            await speaker.ask()
            assert speaker.tickets == []


# ---- the client's side -------------------------------------------------------------------------------------------


def channel_to(served: Served) -> QuicChannel:
    return QuicChannel(socket.AF_INET, served.listener.address, served.ca)


def heard(channel: QuicChannel) -> bytes:
    """Lets a channel do what is due."""
    channel.handle_timeout(time.monotonic_ns())
    return channel.receive()


async def settled(channel: QuicChannel) -> None:
    """Waits for the end of the handshake, and of the connection IDs and tickets that come with it."""
    await until(lambda: heard(channel) or channel.over or channel.established)
    channel.probe()
    await until(lambda: heard(channel) or channel.over or channel.answered)


@pytest.mark.parametrize("alpn", [True, False])
async def test_a_node_that_names_no_protocol_is_none(tmp_path: Path, *, alpn: bool) -> None:
    async with serving(tmp_path, alpn=alpn) as served:
        channel = channel_to(served)
        try:
            await until(lambda: heard(channel) or channel.over or channel.established)
            assert channel.established is alpn
            assert bool(channel.over) is not alpn
            if not alpn:
                await until(lambda: served.listener.connections == 0)  # it was told so
        finally:
            channel.close()


async def test_no_early_data_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a node that would take it."""
    kept: dict[bytes, SessionTicket] = {}
    asked: list[bytes] = []

    def keep(ticket: SessionTicket) -> None:
        kept[ticket.ticket] = ticket

    def find(name: bytes) -> SessionTicket | None:
        asked.append(name)
        return kept.get(name)

    generous = partial(PatientConnection, session_ticket_handler=keep, session_ticket_fetcher=find)
    monkeypatch.setattr(quic, "PatientConnection", generous)
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker:
            await speaker.shake()
            await speaker.until(lambda: speaker.tickets)
            with Speaker(served, session_ticket=speaker.tickets[0]) as again:
                await again.shake()
        assert asked, "one with a ticket uses it"
        asked.clear()
        for _ in range(2):
            channel = channel_to(served)
            try:
                await settled(channel)
                assert channel.established
            finally:
                channel.close()
        assert asked == []


async def test_a_client_on_another_path_has_another_connection_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sees both paths does not learn from the IDs that they are one client's (RFC 9000, section 9.5)."""
    opened: list[str] = []

    def bound(channel: QuicChannel) -> socket.socket:
        opened.append(f"127.0.0.{len(opened) + 1}")
        sock = speaking(opened[-1])
        sock.connect(channel._address)
        return sock

    monkeypatch.setattr(QuicChannel, "_open", bound)
    seen: list[tuple[str, bytes]] = []
    async with serving(tmp_path) as served:
        peer = served.listener._peer

        def look(data: bytes, address: tuple[str, int]) -> object:
            if data[0] < 0x80:
                seen.append((address[0], data[1:9]))
            return peer(data, address)

        monkeypatch.setattr(served.listener, "_peer", look)
        channel = channel_to(served)
        try:
            await settled(channel)
            for number in range(3):
                channel.send([b"%d" % number])
                await until(lambda: heard(channel))
                assert channel.migrate()
                await until(lambda: heard(channel) or channel.answered)
        finally:
            channel.close()
        ids = [{cid for host, cid in seen if host == address} for address in opened]
        assert all(ids)
        assert sum(map(len, ids)) == len(set.union(*ids))
