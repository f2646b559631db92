"""Many megabytes each way at once through `sterna pipe` while the connection is cut again and again."""

from __future__ import annotations

import time

import pytest

from tests.e2e.exact_rig import MEGABYTE, ByteCutProxy, Duplex, elapsed, new_seed, node_notes, size_of, start_node
from tests.e2e.rig import Rig

CUTS = 150


def run(
    short: int, *, broken: str = "", broken_node: str = "", seconds: float = 600.0
) -> tuple[str, int, tuple[int, int]]:
    seed, size = new_seed(), size_of(short)
    with Rig() as rig:
        duplex = Duplex(rig, seed, size)
        start_node(rig, broken=broken_node)
        proxy = ByteCutProxy(rig.port, seed, 2 * size // (CUTS + 15), CUTS)
        start = time.monotonic()
        try:
            pipe = duplex.start(duplex.words(proxy.port, broken=broken), streams=True)
            said = duplex.finish(pipe, seconds)
        finally:
            proxy.close()
        fault = duplex.fault()
        lost, both = duplex.cuts()
        print(
            f"{size / 1e6:.0f} MB each way in {elapsed(start)}: {proxy.cuts} connections cut, {lost} of them in use, "
            f"{both} with unacknowledged bytes in both directions; exit status {pipe.returncode} {said[:200]} {fault}"
        )
        return fault or said, pipe.returncode, (lost, both)


@pytest.mark.timeout(700)
def test_every_byte_arrives_once_through_a_hundred_cuts() -> None:
    fault, status, (lost, both) = run(50)
    assert fault == ""
    assert status == 0
    assert lost >= 100
    assert both >= 90


@pytest.mark.timeout(120)
def test_control_a_client_that_does_not_send_again_is_caught() -> None:
    fault, _, _ = run(5, broken="forget", seconds=10.0)
    assert "differs" in fault


@pytest.mark.timeout(120)
def test_control_a_node_that_lets_the_agent_run_on_is_caught() -> None:
    fault, status, _ = run(25, broken_node="overwrite")
    assert "differs" in fault
    assert status == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("narrow", ["", "narrow"], ids=["wide", "narrow"])
def test_without_cuts_one_connection_carries_everything(narrow: str) -> None:
    """Bytes that the client itself lost would break a frame, and be sent again on another connection unnoticed."""
    seed, size = new_seed(), 3 * MEGABYTE if narrow else size_of(50)
    with Rig() as rig:
        duplex = Duplex(rig, seed, size)
        start_node(rig)
        pipe = duplex.start(duplex.words(rig.port, broken=narrow), streams=True)
        said = duplex.finish(pipe, 100.0)
        assert (duplex.fault(), said, pipe.returncode) == ("", "", 0)
        assert len(node_notes(rig).read_text().split()) == 1, "the session was resumed"
