"""The safety net around methods, and what the counters look like."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from sterna.remote.calls import Call, Params
from sterna.remote.dispatch import WAITING, Dispatcher
from sterna.remote.log import Log
from sterna.remote.metrics import Metrics
from sterna.remote.workers import Workers
from tests.unit.test_remote_connection import Rig


def fail(_: Call | Params) -> None:
    raise RuntimeError('"odd" <thing>')


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    dispatcher = Dispatcher(
        Log("error"), {kind: Workers(made.loop.post) for kind in ("files", WAITING)}, Workers(made.loop.post, 1), b"t",
        inline={"process.kill": fail}, threaded={"files.stat": fail},  # type: ignore[dict-item] # it returns nothing
        fields={"process.kill": {}, "files.stat": {}}, server={}, shut_down=lambda: None,
    )  # fmt: skip
    made.connection._handle = dispatcher.handle
    yield made
    made.close()


def asked(rig: Rig, method: str) -> bytes:
    rig.peer.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": {}, "auth": "t"}).encode())
    rig.peer.sendall(b"\n")
    got = bytearray()

    def done() -> bool:
        try:
            got.extend(rig.peer.recv(1000))
        except BlockingIOError:
            pass
        return got.endswith(b"\n")

    rig.peer.setblocking(False)
    rig.turn(done)
    rig.peer.setblocking(True)
    return bytes(got)


@pytest.mark.parametrize("method", ["process.kill", "files.stat"])
def test_a_method_that_breaks_costs_its_request_only(rig: Rig, method: str) -> None:
    said = b'"code":-32603,"message":"recovered panic: \\"odd\\" \\u003cthing\\u003e"'
    assert asked(rig, method) == b'{"jsonrpc":"2.0","id":1,"error":{' + said + b"}}\n"
    assert asked(rig, "server.ping") == b'{"jsonrpc":"2.0","id":1,"result":{"pong":true}}\n'
    assert (rig.errors, rig.connection.pending, rig.connection.closed) == ([], 0, False)


def test_counters_have_their_order_and_each_its_help_and_type() -> None:
    metrics, names = Metrics(), list[str]()
    metrics.connections, metrics.stdin_bytes = 3, 7
    lines = metrics.text().split("\n")
    assert lines.pop() == ""
    for told, kind, counted in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name, value = counted.split(" ")
        names.append(name.removeprefix("claustrum_").removesuffix("_total"))
        assert told.startswith(f"# HELP {name} ")
        assert kind == f"# TYPE {name} counter"
        assert value == {"connections": "3", "stdin_bytes": "7"}.get(names[-1], "0")
    assert names == ["connections", "process_spawns", "process_exits", "reattaches", "stream_bytes", "stdin_bytes"]
