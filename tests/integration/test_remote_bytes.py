"""Any bytes on the socket: the daemon lives, answers what is a request, and never answers on another connection."""

from __future__ import annotations

import json
import random
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sterna.remote.dispatch import METHODS
from tests.integration.remote_rig import TOKEN, Client, Daemon

# Nothing below may name a path that deletes: destDir and worktreePath are never given.
NAMES = [
    "jsonrpc", "id", "method", "params", "auth", "path", "maxBytes", "command", "args", "env", "cwd",
    "wantPid", "data", "offset",
    "signal", "timeoutMs", "escalate", "fromSeq", "ID", "Params",
]  # fmt: skip
METHODS_TRIED = [
    name
    for name in METHODS
    if name not in {"server.shutdown", "files.extract_tar", "git.worktree_remove", "git.worktree_create"}
]
members = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.text(max_size=5),
    st.sampled_from(["2.0", "p", "true", TOKEN, "aGk=", "/", "\0"]),
    st.lists(st.text(max_size=3), max_size=3), st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)  # fmt: skip
params = st.one_of(members, st.dictionaries(st.sampled_from(NAMES), members, max_size=5))
requests = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0") | members, "method": st.sampled_from(METHODS_TRIED) | st.text(max_size=8),
    "auth": st.just(TOKEN) | members},
    optional={"id": st.recursive(members, lambda inner: st.lists(inner, max_size=2), max_leaves=3), "params": params},
).map(lambda message: json.dumps(message).encode())  # fmt: skip
lines = st.one_of(
    requests,
    requests.map(lambda line: line[: len(line) // 2]),
    st.binary(max_size=30),
    st.sampled_from([b"", b"\r", b" ", b"null", b"{}", b"[" * 500]),
).map(lambda line: line.replace(b"\n", b"").replace(b"server.shutdown", b"server.shut"))


def marked(number: int) -> bytes:
    return f'{{"jsonrpc":"2.0","id":"mark-{number}","method":"server.ping","auth":"{TOKEN}"}}\n'.encode()


def pong(number: int) -> bytes:
    return f'{{"jsonrpc":"2.0","id":"mark-{number}","result":{{"pong":true}}}}\n'.encode()


def test_any_lines_are_answered_on_their_own_connection_only(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.connect() as witness:
        rounds = 0

        @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(lines, max_size=8), st.binary(max_size=20))
        def play(sent: list[bytes], rest: bytes) -> None:
            nonlocal rounds
            rounds += 1
            with daemon.connect() as client:
                client.send(b"".join(line + b"\n" for line in sent) + marked(rounds))
                while (line := client.line()) != pong(rounds):
                    message = json.loads(line)
                    assert message.get("jsonrpc") == "2.0" or message.get("type") == "stream", line
                client.send(rest)
            witness.send(marked(-rounds))
            assert witness.line() == pong(-rounds), "nothing of other connections comes here"

        play()
        assert daemon.process.poll() is None


def test_any_bytes_at_any_cut(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with Daemon(tmp_path) as daemon, daemon.connect() as witness:
        for number in range(200):
            client = Client(daemon.path)
            with client:
                for _ in range(chance.randrange(5)):
                    data = chance.randbytes(chance.randrange(3_000))
                    if chance.random() < 0.5:
                        data = bytes(byte & 0x7F for byte in data)
                    try:
                        client.send(data)
                    except OSError:
                        break
            witness.send(marked(number))
            assert witness.line() == pong(number)
        assert daemon.process.poll() is None
        assert daemon.memory_mib() < 100
