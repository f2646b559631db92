"""What a QUIC listener gives away before it knows who is there, and to whom: real sockets, one process."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from sterna import limits
from sterna.transport import quic
from tests.integration.quic_rig import Served, Speaker, drained, fence, made_up, serving, speaking, until

RETRY = 0xF0  # the first byte of a Retry, but for its last four bits


async def test_first_datagrams_below_1200_bytes_are_not_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with speaking() as sock:
            for size, version in ((1_199, 1), (1_199, 0x1A2A3A4A), (100, 1)):
                sock.sendto(made_up(size, version=version), served.listener.address)
            sock.sendto(made_up(1_200, target=bytes(7)), served.listener.address)  # RFC 9000, section 7.2: 8 at least
            assert await fence(served, sock) == []
            assert served.listener.connections == 0
            sock.sendto(made_up(1_200), served.listener.address)
            await fence(served, sock)
            assert served.listener.connections == 1


async def test_some_connections_begin_in_each_turn_and_others_are_asked_for_their_address(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with speaking() as sock:
            for turn in (1, 2):
                for _ in range(quic.BEGIN_PER_TURN_MAX + 3):
                    sock.sendto(made_up(1_200), served.listener.address)
                await fence(served, sock)
                assert served.listener.connections == turn * quic.BEGIN_PER_TURN_MAX
                assert served.listener.retries == turn * 3


async def test_connections_without_a_stream_end_in_time_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quic, "_SWEEP_SECONDS", 0.01)
    async with serving(tmp_path) as served:
        with Speaker(served) as idle, Speaker(served) as used, speaking() as half:
            await used.shake()
            used.write(0, b"x")
            await used.until(lambda: used.read(0))
            await idle.shake()
            assert served.listener.shaking == 0
            half.sendto(made_up(1_200), served.listener.address)
            await fence(served, half)
            assert (served.listener.shaking, served.listener.connections) == (1, 3)
            served.listener._seconds = 0.0
            await idle.until(lambda: idle.told and served.listener.connections == 1)
            used.write(0, b"y")
            await used.until(lambda: used.read(0) == b"xy")
            # IDs that a client gives up make room for others.
            before = len(served.listener._cids)
            for _ in range(5):
                used.quic.change_connection_id()
                await used.ask()
            assert len(served.listener._cids) <= before
            used.quic.reset_stream(0, 0)
            used.say()
            await used.until(lambda: used.told)
            assert not served.listener._cids
            assert len(served.listener._places) == 0


async def asked(served: Served, speaker: Speaker) -> tuple[bytes, range]:
    """Has a client asked for its address; returns the answer, which is not sent yet, and where in it the token is."""
    speaker.connect()
    retry, *_ = await fence(served, speaker.sock)
    assert retry[0] & 0xF0 == RETRY
    speaker.quic.receive_datagram(retry, speaker.target, time.monotonic())
    answer = speaker.made()[0]
    token = retry[7 + retry[5] + retry[6 + retry[5]] : -16]
    start = answer.index(token)
    return answer, range(start, start + len(token))


async def test_a_retry_token_is_good_for_one_address_and_one_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quic, "RETRY_ABOVE", 0)
    async with serving(tmp_path) as served, serving(tmp_path) as other:
        with (
            Speaker(served) as speaker, speaking() as port,
            speaking("127.0.0.2", speaker.sock.getsockname()[1]) as host,
        ):  # fmt: skip
            answer, token = await asked(served, speaker)
            for at in (6, *token):  # the ID that the node chose, and every byte of the token
                data = answer[:at] + bytes((answer[at] ^ 1,)) + answer[at + 1 :]
                speaker.sock.sendto(data, served.listener.address)
            await fence(served, speaker.sock)
            for stranger in (port, host):
                stranger.sendto(answer, served.listener.address)
                assert await fence(served, stranger) == []
            speaker.sock.sendto(answer, other.listener.address)
            await fence(other, speaker.sock)
            assert (served.listener.connections, other.listener.connections) == (0, 0)
            speaker.sock.sendto(answer, served.listener.address)
            await speaker.until(lambda: speaker.quic._handshake_confirmed)
            assert served.listener.connections == 1


async def test_a_retry_token_is_good_for_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic, "RETRY_ABOVE", 0)
    assert quic._TOKEN_SECONDS <= limits.HANDSHAKE_SECONDS
    async with serving(tmp_path) as served:
        with Speaker(served) as late, Speaker(served) as soon:
            monkeypatch.setattr(quic, "_TOKEN_SECONDS", -0.001)
            late.sock.sendto((await asked(served, late))[0], served.listener.address)
            await fence(served, late.sock)
            assert served.listener.connections == 0
            monkeypatch.undo()
            monkeypatch.setattr(quic, "RETRY_ABOVE", 0)
            soon.sock.sendto((await asked(served, soon))[0], served.listener.address)
            await fence(served, soon.sock)
            assert served.listener.connections == 1


async def test_who_says_hello_gets_three_times_of_that_until_it_answers(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker:
            speaker.connect()
            got = await fence(served, speaker.sock)
            (peer,) = served.listener._peers
            for _ in range(20):  # as if nothing came for long: all that was lost is sent again
                peer._quic.handle_timer((peer._quic.get_timer() or 0.0) + 0.001)
                peer.transmit()
                got += await fence(served, speaker.sock)
            said = sum(map(len, speaker.sent))
            assert said <= sum(map(len, got)) <= 3 * said


@pytest.mark.parametrize("missed", [False, True], ids=["the-first", "after-one-that-did-not-answer"])
async def test_an_address_that_answers_nothing_gets_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, missed: bool
) -> None:
    """Who sees a client's datagrams can send them from elsewhere; what the client is sent does not follow."""
    monkeypatch.setattr(quic, "_CANDIDATE_SECONDS", 0.0)
    async with serving(tmp_path) as served:
        served.quiet = True
        with Speaker(served) as speaker, speaking() as first, speaking("127.0.0.2") as second:
            await speaker.shake()
            speaker.write(0, b"x")
            await speaker.until(lambda: served.streams)
            await speaker.ask()
            victim = second if missed else first
            said = 0
            places = (first, second, second, second, second) if missed else (first,)
            for sock in places:
                speaker.quic.send_stream_data(0, b"y" * 30)
                for data in await speaker.something():
                    sock.sendto(data, speaker.target)
                    said += len(data) if sock is victim else 0
            await until(lambda: len(served.streams[0].got) == 1 + 30 * len(places))
            served.streams[0].push(bytes(200_000))
            await speaker.until(lambda: len(speaker.read(0)) == 200_000)
            got = await fence(served, victim)
            assert got, "it was asked"
            assert sum(map(len, got)) <= (3 * said if missed else quic._DATAGRAM_SENT_BYTES)
            assert missed or max(map(len, got)) > 3 * said, "the first gets a whole datagram"
            (peer,) = served.listener._peers
            assert peer.address == speaker.sock.getsockname()
            assert served.listener.moves == 0


async def test_an_address_that_answers_gets_all(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker:
            await speaker.shake()
            speaker.write(0, b"x")
            await speaker.until(lambda: speaker.read(0) == b"x")
            speaker.sock.close()
            speaker.sock = speaking("127.0.0.2")
            speaker.write(0, b"y")
            await speaker.until(lambda: speaker.read(0) == b"xy" and served.listener.moves)
            (peer,) = served.listener._peers
            assert peer.address == speaker.sock.getsockname()


async def test_one_address_at_a_time_is_asked_and_not_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_CANDIDATE_SECONDS", "_ASK_AGAIN_SECONDS", "_CANDIDATE_MAX_SECONDS"):
        monkeypatch.setattr(quic, name, 1_000.0)
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker, speaking() as one, speaking("127.0.0.2") as two:
            await speaker.shake()
            (peer,) = served.listener._peers
            for sock in (one, one, two, one):
                speaker.quic.send_ping(99)
                for data in await speaker.something():
                    sock.sendto(data, speaker.target)
            assert await fence(served, one)
            assert await fence(served, two) == []
            assert peer._pings == 1
            assert peer.address == speaker.sock.getsockname()


async def test_an_answer_for_one_address_does_not_count_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quic, "_CANDIDATE_SECONDS", 0.0)
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker, speaking() as one, speaking("127.0.0.2") as two:
            await speaker.shake()
            await speaker.ask()
            (peer,) = served.listener._peers
            questions = []
            for sock in (one, two):
                speaker.quic.send_ping(99)
                for data in await speaker.something():
                    sock.sendto(data, speaker.target)
                questions.append(await fence(served, sock))
            assert all(questions)
            for data in questions[0]:
                speaker.quic.receive_datagram(data, speaker.target, time.monotonic())
            await speaker.ask()
            assert peer.address == speaker.sock.getsockname()


async def test_a_connection_in_its_handshake_does_not_move(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with Speaker(served) as speaker, speaking() as other:
            speaker.connect()
            for data in await fence(served, speaker.sock):
                speaker.quic.receive_datagram(data, speaker.target, time.monotonic())
            for data in speaker.made():
                other.sendto(data, speaker.target)
            assert await fence(served, other) == []
            assert served.listener.shaking == 1
            await speaker.until(lambda: speaker.quic._handshake_confirmed)


async def test_connections_of_one_address_make_room_for_each_other(tmp_path: Path) -> None:
    async with serving(tmp_path, per_address=2) as served:
        with (
            Speaker(served) as first, Speaker(served) as second, Speaker(served) as third,
            Speaker(served, source="127.0.0.2") as other,
        ):  # fmt: skip
            await other.shake()
            for speaker in (first, second):
                await speaker.shake()
            assert served.listener.connections == 3
            await third.shake()
            await first.until(lambda: first.told)
            assert (served.listener.connections, served.listener.evicted) == (3, 1)
            third.write(0, b"x")
            await third.until(lambda: third.read(0))
            with Speaker(served) as fourth:
                await fourth.shake()
                assert served.listener.evicted == 1, "one with a stream is the owner's to look after"
                for speaker in (second, third, fourth, other):
                    await speaker.ask()
                third.quic.reset_stream(0, 0)
                third.say()
                await second.until(lambda: second.told)
                assert served.listener.evicted == 2, "without its stream it counts again"


async def test_all_connections_without_a_stream_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, unproved_max=2) as served:
        with speaking("127.0.0.1") as one, speaking("127.0.0.2") as two, speaking("127.0.0.3") as too:
            for sock in (one, two, too):
                sock.sendto(made_up(1_200), served.listener.address)
                await fence(served, sock)
            assert served.listener.connections == 2
            assert {peer.host for peer in served.listener._peers} == {"127.0.0.2", "127.0.0.3"}


async def test_connections_of_one_ipv6_network_are_counted_together(tmp_path: Path) -> None:
    async with serving(tmp_path, per_address=2) as served:
        hosts = ["2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:1::2", "2001:db8:0:1:ffff::3"]
        for host in hosts:
            # Nobody here has such addresses: this is what the socket would say.
            assert served.listener._peer(made_up(1_200), (host, 7000, 0, 0)) is not None
        assert sorted(peer.host for peer in served.listener._peers) == sorted(hosts[1:])
        for peer in list(served.listener._peers):
            peer.drop("")
        assert len(served.listener._places) == 0


def queue(path: Path) -> socket.socket:
    """A Unix socket for datagrams: the kernel's queue is short, and says when it is full."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind(os.fspath(path))
    return sock


async def test_what_the_socket_does_not_take_waits_in_bounds_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as served:
        with (
            queue(tmp_path / "theirs") as theirs, queue(tmp_path / "ours") as ours,
            monkeypatch.context() as patch,
        ):  # fmt: skip
            place = theirs.getsockname()
            room = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    room += ours.sendto(b"x", place)
            drained(theirs)
            patch.setattr(quic, "WAITING_DATAGRAMS_MAX", 20)
            patch.setattr(served.listener, "_sock", ours)
            sent = [b"%d" % number for number in range(room + 30)]
            for data in sent[: room + 1]:
                served.listener.send(data, place)
            assert served.listener.full
            got = drained(theirs)
            served.listener.send_run(sent[room + 1 : room + 2], place)
            assert drained(theirs) == [], "there is room, but others wait"
            for data in sent[room + 2 :]:
                served.listener.send(data, place)

            def empty() -> bool:
                got.extend(drained(theirs))
                return not served.listener.full

            await until(empty)
            assert got + drained(theirs) == sent[: room + 20]
            served.listener.send_run([b"after"], place)
            assert drained(theirs) == [b"after"]
