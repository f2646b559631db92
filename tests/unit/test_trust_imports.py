"""What a client loads at its start: no X.509 library, nothing heavy (the start-up time is part of the product)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sterna import paths

CLIENT = "from sterna import paths; from sterna.trust import device, pins, links, local, tickets, fingerprint"
HEAVY = {
    "asyncio", "cryptography.x509", "cryptography.hazmat.primitives.asymmetric.ec", "dataclasses", "datetime",
    "inspect", "ipaddress", "json", "logging", "pathlib", "subprocess", "urllib", "urllib.parse",
}  # fmt: skip


def loaded(code: str) -> set[str]:
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(paths.__file__))}
    command = [
        sys.executable,
        "-c",
        f"import sys; before = set(sys.modules); {code}; print(*(set(sys.modules) - before))",
    ]
    return set(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.split())


def test_client_loads_nothing_heavy() -> None:
    modules = loaded(CLIENT)
    assert "sterna.trust.pins" in modules
    assert "cryptography.hazmat.primitives.asymmetric.ed25519" in modules
    assert sorted(modules & HEAVY) == []


def test_pinned_context_and_signature_load_nothing_more() -> None:
    code = (
        f"{CLIENT}; import os, tempfile; directory = tempfile.mkdtemp();"
        "key = device.DeviceKey.load(directory); key.sign(device.CONNECT, bytes(32), b'x');"
        "device.next_counter(directory, 1); pins.PinStore(directory).get('h', 1); pins.probe_context()"
    )
    assert sorted(loaded(code) & (HEAVY - {"datetime", "pathlib", "subprocess", "inspect", "dataclasses"})) == []


@pytest.mark.parametrize("name", sorted(HEAVY - {"urllib"}))
def test_control_the_heavy_ones_would_be_seen(name: str) -> None:
    assert name in loaded(f"import {name}")
