"""TLS records without data: they keep neither the node's loop nor anybody's keys."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.raw_client import Site, unharmed
from tests.e2e.rig import Rig

pytestmark = [
    pytest.mark.xdist_group("refused-tls"),
    pytest.mark.skipif(ctypes.util.find_library("ssl") is None, reason="libssl is not installed"),
]

COUNT = 200_000  # some 5.4 MB, and 1.6 s of OpenSSL's time
FEW = 8


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        yield Site(rig)


@pytest.mark.parametrize(("count", "end"), [(COUNT, "refused\n"), (FEW, "answered\n")])
def test_key_updates_without_end_hold_nobody_up(site: Site, count: int, end: str) -> None:
    words = [sys.executable, str(Path(__file__).parent / "keyupdates.py"), str(site.rig.port), str(count)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as flood:
        assert flood.stdin is not None
        assert flood.stdout is not None
        assert flood.stdout.readline() == "connected\n"
        assert flood.stdout.readline() == "ready\n"
        with unharmed(site):
            flood.stdin.write("go\n")
            flood.stdin.flush()
            assert flood.stdout.readline() == end
