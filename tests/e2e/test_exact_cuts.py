"""Many megabytes each way at once through `sterna pipe` while the connection is cut again and again."""

from __future__ import annotations

import time

import pytest

from tests.e2e.exact_rig import ByteCutProxy, Duplex, elapsed, new_seed, size_of
from tests.e2e.rig import Rig

CUTS = 110


def run(short: int, *, broken: str = "") -> tuple[str, int, tuple[int, int]]:
    seed, size = new_seed(), size_of(short)
    with Rig() as rig:
        duplex = Duplex(rig, seed, size)
        rig.start_node()
        proxy = ByteCutProxy(rig.port, seed, 2 * size // (CUTS + 15), CUTS)
        start = time.monotonic()
        try:
            pipe = duplex.start(duplex.words(proxy.port, broken=broken), streams=True)
            said = duplex.finish(pipe, 50 if short < 50 else 600)
        finally:
            proxy.close()
        fault = duplex.fault()
        lost, both = duplex.cuts()
        print(
            f"{size / 1e6:.0f} MB each way in {elapsed(start)}: {proxy.cuts} connections cut, {lost} of them in use, "
            f"{both} with unacknowledged bytes in both directions; exit status {pipe.returncode} {said} {fault}"
        )
        return fault or said, pipe.returncode, (lost, both)


@pytest.mark.timeout(700)
def test_every_byte_arrives_once_through_a_hundred_cuts() -> None:
    fault, status, (lost, both) = run(25)
    assert fault == ""
    assert status == 0
    assert lost >= 100
    assert both >= 90


@pytest.mark.timeout(120)
def test_control_a_client_that_does_not_send_again_is_caught() -> None:
    fault, _, _ = run(5, broken="forget")
    assert "differs" in fault
