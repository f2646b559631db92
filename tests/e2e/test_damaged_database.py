"""A node whose database was damaged: nobody who was revoked comes back, and no session shows another one's output."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sterna.client.calls import Caller
from sterna.client.endpoint import find
from sterna.node.app import DAMAGED_TEXT
from sterna.trust.device import DeviceKey
from tests.e2e.rig import running


def test_a_damaged_database_brings_nobody_back() -> None:
    with running() as rig:

        def elsewhere(name: str, token: str) -> tuple[int, str]:
            env = {"STERNA_STATE": os.fspath(rig.directory / name), "STERNA_TOKEN": token}
            done = rig.sterna("ls", "--host", "127.0.0.1", "--port", str(rig.port), env=env)
            return done.returncode, done.stderr

        revoked, kept = (rig.json("token") for _ in range(2))
        for name in ("lost", "mine"):
            assert elsewhere(name, kept["token"])[0] == 0
        assert elsewhere("mine", revoked["token"])[0] == 0
        lost = DeviceKey.load(os.fspath(rig.directory / "lost" / "client")).id.hex()
        assert rig.sterna("new", "--name", "secret").returncode == 0
        assert rig.sterna("send", "secret", "echo for-'me'", "--enter").returncode == 0
        assert rig.sterna("wait", "secret", "--match", "for-me", "--timeout", "10s").returncode == 0
        assert rig.sterna("revoke", lost).returncode == 0
        assert rig.sterna("revoke", "--token", revoked["id"]).returncode == 0
        rig.kill_node()
        database = Path(rig.state, "node", "node.db")
        database.with_name("node.db-wal").unlink(missing_ok=True)
        database.write_bytes(b"\xff" * 50_000)
        rig.start_node()

        status, said = elsewhere("lost", kept["token"])
        assert (status, "This device was revoked" in said) == (1, True)
        status, said = elsewhere("mine", revoked["token"])
        assert (status, "Access denied" in said) == (1, True)
        assert elsewhere("mine", kept["token"]) == (0, ""), "control: who was not revoked comes in"

        assert rig.node is not None
        logged = [json.loads(line) for line in rig.node.output().splitlines()]
        assert [entry["message"] for entry in logged if entry["level"] == "error"] == [DAMAGED_TEXT]
        checks = {each["name"]: each for each in json.loads(rig.sterna("doctor", "--json").stdout)["checks"]}
        assert checks["database"]["level"] == "WARN"

        assert rig.sterna("new", "--name", "other").returncode == 0
        with Caller(find(state=os.fspath(rig.state)), state=os.fspath(rig.state)) as caller:
            assert caller.call("info", session="other")["kept"] == 0
        assert "for-me" not in rig.sterna("capture", "other", "--scrollback").stdout
