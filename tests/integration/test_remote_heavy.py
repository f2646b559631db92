"""Lines of very many values: read beside the loop, with the same answers in the same order, and in bounded memory."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sterna.remote import dispatch
from tests.integration.remote_rig import TOKEN, Daemon

LINE = 1_048_575
SHARE = 0.6  # of the time that reading takes, for which another client may wait: what the C scanner needs at a stretch


def filled(item: bytes) -> bytes:
    """A line as long as there can be, whose id holds as many items as fit."""
    start, end = b'{"jsonrpc":"2.0","method":"server.ping","id":[', b"]}"
    count = (LINE - len(start) - len(end)) // (len(item) + 1)
    return start + b",".join([item] * count) + end + b"\n"


HEAVY = {
    "lists": filled(b"[1]"),
    "objects": filled(b'{"a":1}'),
    "deep": filled(b"[" * 5000 + b"1" + b"]" * 5000),
}


def worst_ping_ms(daemon: Daemon, stop: Callable[[], bool]) -> float:
    worst = 0.0
    with daemon.connect() as client:
        while not stop():
            began = time.perf_counter()
            assert client.ask("server.ping") == {"pong": True}
            worst = max(worst, (time.perf_counter() - began) * 1e3)
            time.sleep(0.002)
    return worst


def beside(daemon: Daemon, line: bytes) -> tuple[float, bytes]:
    """The worst ping of another client while a line is answered, and the answer."""
    answers: list[bytes] = []

    def send() -> None:
        with daemon.connect() as client:
            client.send(line)
            answers.append(client.line())

    thread = threading.Thread(target=send)
    thread.start()
    worst = worst_ping_ms(daemon, lambda: not thread.is_alive())
    thread.join()
    return worst, answers[0]


@pytest.mark.parametrize("name", ["lists", "deep"])
def test_a_line_of_very_many_values_holds_nobody_up(name: str, tmp_path: Path) -> None:
    with Daemon(tmp_path, CLAUSTRUM_LOG_LEVEL="error") as daemon:
        worst, own = [], []
        for _ in range(3):  # a busy machine may be the reason once
            milliseconds, answer = beside(daemon, HEAVY[name])
            worst.append(milliseconds)
            began = time.perf_counter()
            id_text = dispatch.decode_request(HEAVY[name].strip()).id_text
            own.append((time.perf_counter() - began) * 1e3)
            assert answer.decode() == (
                f'{{"jsonrpc":"2.0","id":{id_text},"error":{{"code":-32001,'
                '"message":"Unauthorized: invalid or missing auth token"}}\n'
            )
        assert min(worst) < SHARE * min(own), (worst, own)


def test_lines_behind_a_heavy_one_keep_their_place(tmp_path: Path) -> None:
    numbers = list(range(20_000))
    requests = []
    for turn in range(4):
        heavy = {"jsonrpc": "2.0", "id": [turn, numbers], "method": "server.ping", "auth": TOKEN}
        broken = '{"id":[' + "1," * 3000 + "]}"
        wrong = {"jsonrpc": "2.0", "id": turn, "method": "files.stat", "params": {"path": numbers}, "auth": TOKEN}
        light = {"jsonrpc": "2.0", "id": turn, "method": "server.ping", "auth": TOKEN}
        requests += [json.dumps(heavy), broken, json.dumps(wrong), json.dumps(light)]
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.send("".join(f"{request}\n" for request in requests).encode())
        for turn in range(4):
            answers = [json.loads(client.line()) for _ in range(4)]
            assert answers[0] == {"jsonrpc": "2.0", "id": [turn, numbers], "result": {"pong": True}}
            assert answers[1]["error"]["code"] == -32700
            assert answers[2] == {"jsonrpc": "2.0", "id": turn, "error": {"code": -32602, "message": "Invalid params"}}
            assert answers[3] == {"jsonrpc": "2.0", "id": turn, "result": {"pong": True}}
        # The same for a client that leaves in the middle: nothing of it stays.
        for _ in range(5):
            with daemon.connect() as leaving:
                leaving.send(HEAVY["lists"])
        assert client.ask("server.ping") == {"pong": True}


def test_heavy_lines_of_strangers_have_a_queue_of_their_own(tmp_path: Path) -> None:
    request = {"jsonrpc": "2.0", "id": 1, "method": "server.ping", "params": list(range(3_000)), "auth": TOKEN}
    with Daemon(tmp_path, CLAUSTRUM_LOG_LEVEL="error") as daemon, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(daemon.connect()) for _ in range(8)]
        for stranger in strangers:
            stranger.send(HEAVY["lists"])
        with daemon.connect() as client:
            client.send(json.dumps(request).encode() + b"\n")
            assert json.loads(client.line()) == {"jsonrpc": "2.0", "id": 1, "result": {"pong": True}}
        strangers[-1].sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            strangers[-1].sock.recv(1)
        strangers[-1].sock.setblocking(True)
        assert b"-32001" in strangers[-1].line()


def test_input_behind_a_heavy_line_arrives_in_order(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.ask("process.spawn", id="c", command="head", args=["-c", "8"])
        for number in range(4):
            extra = {"unknown": list(range(3000))} if number % 2 == 0 else {}
            client.post("process.stdin", number, id="c", data="MDAwMQ==" if number == 0 else "MDAwMg==",
                        offset=4 * min(number, 1), **extra)  # fmt: skip
        frames = client.frames_to_exit("c")
        assert [frame.get("data") for frame in frames] in (["MDAwMTAwMDI=", None], ["MDAwMQ==", "MDAwMg==", None])


@pytest.mark.parametrize(("flags", "ending"), [((), b"\n"), (("-strict",), b"\n"), (("-strict",), b"")])
def test_a_heavy_line_of_a_closing_client_is_answered(tmp_path: Path, flags: tuple[str, ...], ending: bytes) -> None:
    request = {"jsonrpc": "2.0", "id": 1, "method": "server.ping", "params": list(range(100_000)), "auth": TOKEN}
    with Daemon(tmp_path, *flags) as daemon, daemon.connect() as client:
        client.send(json.dumps(request).encode() + ending)
        client.sock.shutdown(socket.SHUT_WR)
        assert json.loads(client.line()) == {"jsonrpc": "2.0", "id": 1, "result": {"pong": True}}
