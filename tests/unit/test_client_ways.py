"""Whether a client goes over TCP or QUIC: what it learns, remembers, and takes from its file."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from sterna.client.endpoint import _QUIC_MODULE, _TCP_TRIES, Address, Ways

ADDRESSES: list[Address] = [
    (socket.AF_INET, ("192.0.2.1", 7220)),
    (socket.AF_INET6, ("2001:db8::1", 7220, 0, 0)),
    (socket.AF_UNIX, "node.sock"),
]
KEY = "node.example:7220"


def made(directory: Path, port: int = 0) -> Ways:
    return Ways(ADDRESSES, b"ca", port=port, path=str(directory / "known_ways"), key=KEY)


def wanted(ways: Ways) -> bool:
    return ways.wanted


def known(ways: Ways) -> bool | None:
    return ways.works


def write(directory: Path, text: str) -> None:
    path = directory / "known_ways"
    path.write_text(text)
    path.chmod(0o600)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_the_node_says_where(directory: Path) -> None:
    ways = made(directory)
    assert ways.targets == []
    ways.learn(7221)
    assert ways.targets == [(socket.AF_INET, ("192.0.2.1", 7221)), (socket.AF_INET6, ("2001:db8::1", 7221, 0, 0))]
    assert not wanted(ways), "a client that stays where it is stays with TCP"
    ways.moves = True
    assert wanted(ways)
    for port in (-1, 65_536):
        ways.learn(port)
        assert wanted(ways), "no port at all changes nothing"
    ways.learn(0)
    assert not wanted(ways)


def test_a_port_that_the_user_named_holds(directory: Path) -> None:
    ways = made(directory, 9000)
    assert wanted(ways)
    ways.learn(7221)
    ways.learn(0)
    assert {address[1] for _, address in ways.targets} == {9000}


def test_what_worked_is_kept_for_the_next_program(directory: Path) -> None:
    ways = made(directory)
    ways.learn(7221)
    ways.remember(True, 0)
    assert (directory / "known_ways").read_text() == f"{KEY} quic 7221\n"
    again = made(directory)
    assert known(again) is True
    assert not wanted(again), "it begins where a key costs less"
    assert again.retry_at == 0
    again.remember(False, 0)
    third = made(directory)
    assert known(third) is False
    assert third.retry_at > 0
    third.learn(7999)
    assert known(third) is None, "of another port nothing is known"
    assert made(directory, 9000).works is None


@pytest.mark.parametrize(
    "text",
    [
        "", f"{KEY} quic\n", f"{KEY} quic 0\n", f"{KEY} quic 99999\n", f"{KEY} quic x\n", f"{KEY} quic 1234567\n",
        f"{KEY}\n", "other.example:7220 quic 7221\n", "\0\n \n", f"{KEY} other 7221\n", f"{KEY} quic ²\n",
    ],
)  # fmt: skip
def test_a_damaged_file_only_costs_what_it_said(directory: Path, text: str) -> None:
    write(directory, text)
    ways = made(directory)
    assert ways.targets == []
    assert not wanted(ways)
    ways.learn(7221)
    ways.remember(True, 0)
    assert known(made(directory)) is True


def test_quic_is_imported_when_tcp_had_its_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, _QUIC_MODULE, raising=False)
    begun: list[bool] = []
    monkeypatch.setattr(Ways, "load", lambda _self: begun.append(True))
    ways = made(directory)
    ways.learn(7221)
    assert [ways.over_quic() for _ in range(_TCP_TRIES - 1)] == [False] * (_TCP_TRIES - 1)
    assert not begun
    assert not ways.over_quic()
    assert begun


def test_a_race_alternates_and_begins_with_what_works(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ways, "channel", object())
    ways = made(directory)
    ways.learn(7221)
    assert [ways.over_quic() for _ in range(4)] == [False, True, False, True]
    ways.won(quic=True, now=0)
    assert [ways.over_quic() for _ in range(4)] == [True, False, True, False]
    ways.won(quic=True, now=0)
    ways.doubt()
    assert [ways.over_quic() for _ in range(4)] == [False, True, False, True]
    ways.won(quic=False, now=0)
    assert ways.works, "both may have been cut off"
    assert ways.over_quic()
