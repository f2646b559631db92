"""Watching addresses (in a network namespace of its own), sleep and acknowledgements, on the real kernel."""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from sterna.client import watchers
from sterna.client.watchers import AckWatch, AddressWatch, SleepWatch, TcpState, tcp_state, unacknowledged
from sterna.limits import CLOCK_JUMP_MS
from sterna.units import MILLISECOND, SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="netlink and TCP_INFO are Linux's")
WAIT_SECONDS = 20
CLONE_NEWNET = 0x40000000


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, timeout=WAIT_SECONDS, capture_output=True, text=True).stdout


@pytest.fixture
def namespace() -> Iterator[str]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    name = f"sterna-{secrets.token_hex(6)}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr!r}")
    try:
        yield name
    finally:
        ip("netns", "delete", name)


def made_in(namespace: str, make: Callable[[], object]) -> object:
    """Calls `make` in a thread that has entered the namespace; a socket keeps the one that it was made in."""
    made: list[object] = []

    def enter_and_make() -> None:
        descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
                made.append(OSError(ctypes.get_errno(), "setns"))
                return
        finally:
            os.close(descriptor)
        made.append(make())

    thread = threading.Thread(target=enter_and_make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        pytest.skip(f"the namespace cannot be entered: {made[0]}")
    return made[0]


@pytest.fixture
def watch(namespace: str) -> Iterator[AddressWatch]:
    ip("-n", namespace, "link", "add", "one", "type", "veth", "peer", "name", "one-peer")
    ip("-n", namespace, "link", "add", "two", "type", "veth", "peer", "name", "two-peer")
    ip("-n", namespace, "link", "set", "one-peer", "up")
    ip("-n", namespace, "link", "set", "two-peer", "up")
    ip("-n", namespace, "address", "add", "192.0.2.1/24", "dev", "one")
    ip("-n", namespace, "link", "set", "one", "up")
    deadline = time.monotonic() + WAIT_SECONDS
    while "state UP" not in ip("-n", namespace, "link", "show", "one") and time.monotonic() < deadline:
        time.sleep(0.01)
    made = made_in(namespace, AddressWatch)
    assert isinstance(made, AddressWatch)
    # IPv6 addresses of `one` may still be on their way; they are link-local, so none of it counts.
    assert not made.changed()
    yield made
    made.close()


def noticed(watch: AddressWatch, wait_seconds: float = 0) -> bool:
    """Most changes are announced before `ip` returns; a carrier takes the kernel a moment, so those wait."""
    deadline = time.monotonic() + wait_seconds
    while select.select([watch.fileno()], [], [], max(0, deadline - time.monotonic()))[0]:
        if watch.changed():
            return True
    return False


def test_changes_are_noticed_once(watch: AddressWatch, namespace: str) -> None:
    for change in (
        ("address", "add", "198.51.100.7/24", "dev", "one"),
        ("address", "delete", "198.51.100.7/24", "dev", "one"),
        ("address", "add", "2001:db8::7/64", "dev", "one", "nodad"),
        ("route", "add", "default", "via", "192.0.2.254"),
        ("route", "replace", "default", "via", "192.0.2.253"),
        ("route", "delete", "default"),
        ("link", "set", "one", "down"),
        ("link", "set", "one", "up"),
        ("link", "delete", "one"),
    ):
        ip("-n", namespace, *change)
        assert noticed(watch, WAIT_SECONDS), change
        assert not noticed(watch), change


def test_noise_is_not(watch: AddressWatch, namespace: str) -> None:
    for noise in (
        ("address", "change", "192.0.2.1/24", "dev", "one", "valid_lft", "1000", "preferred_lft", "500"),
        ("link", "set", "one", "alias", "renamed"),
        ("link", "set", "one", "mtu", "1400"),
        ("link", "set", "two", "up"),
        ("link", "set", "two", "down"),
        ("address", "add", "fe80::7/64", "dev", "one", "nodad"),
        ("route", "add", "203.0.113.0/24", "via", "192.0.2.254"),
        ("link", "add", "three", "type", "veth", "peer", "name", "three-peer"),
        ("link", "delete", "three"),
    ):
        ip("-n", namespace, *noise)
        assert not noticed(watch), noise
    # The control: the same watch does notice.
    ip("-n", namespace, "address", "delete", "192.0.2.1/24", "dev", "one")
    assert noticed(watch)


def test_a_flood_of_changes_is_drained_in_bounded_pieces(watch: AddressWatch, namespace: str) -> None:
    batch = "".join(f"address add 10.0.{i // 250}.{i % 250 + 1}/32 dev one\n" for i in range(3_000))
    command = ["ip", "-n", namespace, "-batch", "-"]
    subprocess.run(command, input=batch.encode(), check=True, timeout=WAIT_SECONDS)
    assert noticed(watch)
    for _ in range(100):
        if not select.select([watch.fileno()], [], [], 0)[0]:
            break
        watch.changed()
    assert not noticed(watch)
    ip("-n", namespace, "address", "delete", "192.0.2.1/24", "dev", "one")
    assert noticed(watch)


def test_where_netlink_is_not_allowed_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise PermissionError(1, "not allowed")

    monkeypatch.setattr(socket, "socket", refuse)
    watch = AddressWatch()
    assert watch.fileno() == -1
    assert not watch.changed()
    watch.close()


def test_damaged_messages_are_ignored() -> None:
    watch = AddressWatch()
    whole = watchers._HEADER.pack(24, watchers._NEWADDR, 0, 0, 0) + watchers._ADDRESS.pack(2, 24, 0, 0, 9)
    assert watch._take(whole)
    for length in range(len(whole)):
        watch._take(whole[:length])
        watch._take(watchers._HEADER.pack(length, watchers._NEWROUTE, 0, 0, 0) + whole[16:length])
    watch.close()


def test_sleep() -> None:
    jump = CLOCK_JUMP_MS * MILLISECOND
    watch = SleepWatch()
    assert not watch.slept(5 * SECOND, 1000 * SECOND)  # it slept before the program began
    assert not watch.slept(100 * SECOND, 1095 * SECOND)  # time passed
    assert not watch.slept(101 * SECOND, 1096 * SECOND + jump)  # too short to matter
    assert watch.slept(102 * SECOND, 1098 * SECOND + 2 * jump)
    assert not watch.slept(103 * SECOND, 1099 * SECOND + 2 * jump)


def test_a_jump_of_the_wall_clock_counts_as_sleep() -> None:
    watch = SleepWatch()
    assert not watch.slept(SECOND, SECOND, 1_000 * SECOND)
    assert not watch.slept(2 * SECOND, 2 * SECOND, 1_001 * SECOND)
    assert watch.slept(3 * SECOND, 3 * SECOND, 1_300 * SECOND)
    assert watch.slept(4 * SECOND, 4 * SECOND, 1_000 * SECOND)


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            yield client, accepted


def test_acknowledged_bytes(connection: tuple[socket.socket, socket.socket]) -> None:
    client, accepted = connection
    client.sendall(b"x" * 1000)
    assert len(accepted.recv(1000, socket.MSG_WAITALL)) == 1000
    deadline = time.monotonic() + WAIT_SECONDS
    while (state := tcp_state(client)) and state.unacked_segments and time.monotonic() < deadline:
        time.sleep(0.001)
    found = unacknowledged(client)
    assert found is not None
    assert found[0] == 0
    assert AckWatch().waiting_ms(state, time.monotonic_ns()) == 0


def test_bytes_that_nobody_acknowledges(namespace: str) -> None:
    """The link goes down under an established connection: nothing fails, but the count and the time tell."""
    peer = f"{namespace}-b"
    ip("netns", "add", peer)
    try:
        ip("-n", namespace, "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", peer)
        ip("-n", namespace, "address", "add", "192.0.2.1/24", "dev", "here")
        ip("-n", peer, "address", "add", "192.0.2.2/24", "dev", "there")
        ip("-n", namespace, "link", "set", "here", "up")
        ip("-n", peer, "link", "set", "there", "up")
        server = made_in(peer, lambda: socket.create_server(("192.0.2.2", 7220)))
        client = made_in(namespace, lambda: socket.create_connection(("192.0.2.2", 7220), WAIT_SECONDS))
        assert isinstance(server, socket.socket)
        assert isinstance(client, socket.socket)
        with server, client, server.accept()[0] as accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
            ip("-n", peer, "link", "set", "there", "down")
            client.sendall(b"y")
            watch = AckWatch()
            waited = 0
            deadline = time.monotonic() + WAIT_SECONDS
            while waited < 300 and time.monotonic() < deadline:
                waited = watch.waiting_ms(tcp_state(client), time.monotonic_ns())
                time.sleep(0.01)
            assert waited >= 300
            found = unacknowledged(client)
            assert found is not None
            assert found[0] >= 1
            assert found[1] >= 300
            state = tcp_state(client)
            assert state is not None
            assert state.retransmits >= 1
            assert 0 < state.rtt_us < SECOND // 1000
    finally:
        ip("netns", "delete", peer)


def test_waiting_begins_with_what_was_sent_not_with_the_last_answer() -> None:
    def state(unacked: int, last_ack_ms: int, last_sent_ms: int) -> TcpState:
        return TcpState(
            unacked_segments=unacked, last_ack_ms=last_ack_ms, last_sent_ms=last_sent_ms, rtt_us=1, retransmits=0
        )

    watch = AckWatch()
    now = 1_000 * SECOND
    assert watch.waiting_ms(state(1, 60_000, 5), now) == 5  # idle for a minute, then a key
    assert watch.waiting_ms(state(2, 60_100, 1), now + 100 * MILLISECOND) == 105  # another key
    assert watch.waiting_ms(state(1, 20, 101), now + 200 * MILLISECOND) == 20  # the first was acknowledged
    assert watch.waiting_ms(state(0, 1, 200), now + 300 * MILLISECOND) == 0
    assert watch.waiting_ms(None, now) == 0


def test_no_tcp_no_answer() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert unacknowledged(one) is None
        assert tcp_state(one) is None
