"""Terminals that change their size at any moment while a program prints or draws as fast as it can."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Callable

import pytest

from tests.e2e.screens import HERE, Pane, assert_never_same, assert_same
from tests.e2e.test_terminal_programs import Stage, Twins, stage

__all__ = ["stage"]
pytestmark = [
    pytest.mark.xdist_group("terminal-programs"),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]

SIZES = 30
BREAKS = 12  # redraws of 300 frames each
# Some seconds, in bursts, so that the clients are at times behind and at times not.
FLOOD = "for i in $(seq 20000); do echo $i-$((i*i)); ((i % 100)) || sleep 0.02; done; echo loa''ded"


def storm(twins: Twins, *, broken: bool = False) -> None:
    """Changes the size of one terminal, and of the one without Sterna, at random moments; at last it is as before.

    The other device's stays as it is: it gets pictures meanwhile.
    """
    rng = twins.rng
    pair = [twins.plain, twins.attached[0]]
    for turn in range(SIZES):
        last = turn == SIZES - 1
        cols, rows = (80, 24) if last else (rng.randrange(30, 160), rng.randrange(6, 60))
        rng.shuffle(pair)
        for pane in pair:
            pane.resize(cols, rows)
        time.sleep(0 if last else rng.choice((0, 0.01, 0.05, 0.1, 0.3)))
    for pane in pair:
        pane.resized()
    if not broken:
        twins.told(80, 24)


def bash(twins: Twins, *, broken: bool = False) -> None:
    twins.line(FLOOD)
    twins.expect("^[0-9]{2,}-")
    storm(twins, broken=broken)
    assert "loaded" not in twins.plain.text(), "it was all over before the last change"
    for pane in (twins.plain, twins.attached[0]):
        pane.expect("^loaded", 30)
    twins.ready()
    twins.line("echo $COLUMNS $LINES")
    twins.plain.expect("^80 24")


def full_screen(twins: Twins, *, broken: bool = False) -> None:
    twins.line(f"{sys.executable} {HERE}/full_screen.py")
    twins.expect("keys 0 last none")
    twins.type("l" * BREAKS)
    twins.expect("frame [0-9]{2,}")
    storm(twins, broken=broken)
    twins.plain.expect(f"keys {BREAKS} last l frame {BREAKS * 300}", 30)
    if not broken:
        twins.expect(f"keys {BREAKS} last l frame {BREAKS * 300}")
    twins.type("x")
    twins.plain.expect("last x")


@pytest.mark.parametrize("program", [bash, full_screen])
def test_sizes_that_change_under_load_leave_the_same_screen(stage: Stage, program: Callable[..., None]) -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print("seed", seed)
    twins = Twins(stage, seed)
    program(twins)
    # The terminals' own way to break long lines anew is exact, so not a line of the flood may be missing either.
    if program is bash:
        assert_same(twins.attached[0], twins.plain)
    assert_same(*twins.attached, twins.plain, look=Pane.screen)
    twins.close()


@pytest.mark.parametrize("program", [bash, full_screen])
def test_control_a_size_that_is_not_told_is_noticed(stage: Stage, program: Callable[..., None]) -> None:
    twins = Twins(stage, 0, broken="size")
    program(twins, broken=True)
    assert_never_same(twins.attached[0], twins.plain, look=Pane.screen)
    twins.close()
