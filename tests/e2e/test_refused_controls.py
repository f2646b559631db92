"""The controls of the tests of refusals: where one check is dropped on purpose, its test fails."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e import (
    test_refused_access,
    test_refused_floods,
    test_refused_frames,
    test_refused_places,
    test_refused_pods,
)
from tests.e2e.raw_client import Raw, Site
from tests.e2e.rig import Daemon, Rig, wait_for
from tests.e2e.test_refused_access import Victim

pytestmark = pytest.mark.xdist_group("refused-controls")

HERE = Path(__file__).parent
SOURCE = "127.7.7.7"
IN_VAIN_SECONDS = 1.0


@contextlib.contextmanager
def broken_site(broken: str) -> Iterator[Site]:
    """A node without one of its checks, with an agent that echoes."""
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        words = [sys.executable, os.fspath(HERE / "broken_node.py"), broken, os.fspath(rig.state)]
        node = rig.node = Daemon([*words, os.fspath(rig.sockets), str(rig.port)], rig.env, rig.directory / "node.log")
        wait_for(lambda: node.first_line() or rig._check(node), name="the node")
        yield Site(rig)


def broken_frames(site: Site, _directory: Path) -> None:
    test_refused_frames.test_broken_frames_end_only_their_connection(site)


def forged_resumes(site: Site, _directory: Path) -> None:
    victim = Victim(site)
    try:
        test_refused_access.test_forged_resumes(site, victim, SOURCE)
    finally:
        victim.close()


def wrong_tokens(site: Site, directory: Path) -> None:
    test_refused_access.test_wrong_expired_and_foreign_tokens(site, SOURCE, directory)


def revoked_device(site: Site, _directory: Path) -> None:
    test_refused_access.test_a_revoked_device_is_out(site, SOURCE)


def foreign_tenant(site: Site, _directory: Path) -> None:
    victim = Victim(site)
    try:
        test_refused_access.test_another_tenant_sees_and_touches_nothing(site, victim, SOURCE)
    finally:
        victim.close()


def restored_backup(site: Site, directory: Path) -> None:
    victim = Victim(site)
    try:
        test_refused_access.test_a_restored_backup_recovers_through_stale(site, victim, directory)
    finally:
        victim.close()


def lent_ticket(site: Site, _directory: Path) -> None:
    victim = Victim(site)
    try:
        test_refused_access.test_a_ticket_is_for_one_device_and_one_session(site, victim, SOURCE)
    finally:
        victim.close()


def silent_flood(site: Site, _directory: Path) -> None:
    test_refused_floods.test_ten_thousand_half_open_handshakes_of_each_kind(site)


def foreign_socket(site: Site, _directory: Path) -> None:
    test_refused_places.test_another_users_socket_is_no_agent(site)


CONTROLS: dict[str, tuple[Callable[[Site, Path], None], str]] = {
    "frames": (broken_frames, "nothing came"),
    "devices": (forged_resumes, "Resumed"),
    "tokens": (wrong_tokens, "no agent"),
    "revoked": (revoked_device, "Resumed"),
    "tenants": (foreign_tenant, "no such session for this device"),
    "owners": (foreign_socket, "in vain"),
    "race": (restored_backup, "Resumed"),
    "tickets": (lent_ticket, "Accept"),
    "silent": (silent_flood, rf"<= \({test_refused_floods.SILENT_MAX} \+ 32\)"),
}
"""What is not checked, the test that must notice it, and the words in which it does."""


@pytest.mark.parametrize("broken", CONTROLS)
def test_control_without_the_check_it_is_noticed(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test, words = CONTROLS[broken]
    if broken == "owners" and os.geteuid():
        pytest.skip("only root can give a socket away")
    monkeypatch.setattr(Raw.until, "__kwdefaults__", {"handle": None, "seconds": IN_VAIN_SECONDS})
    monkeypatch.setattr(test_refused_places, "wait_for", functools.partial(wait_for, seconds=IN_VAIN_SECONDS))
    with broken_site(broken) as site, pytest.raises(AssertionError, match=words):
        test(site, tmp_path)


def test_control_a_client_that_unpacks_whatever_it_gets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        words = [sys.executable, os.fspath(HERE / "broken_attach.py"), "bombs"]
        monkeypatch.setattr(rig, "words", lambda *args: [*words, *args])
        with pytest.raises(AssertionError, match=r"assert \d+ < \d+"):
            test_refused_pods.test_a_zstd_bomb_is_refused_by_the_client(Site(rig))
