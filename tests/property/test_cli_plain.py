"""The short way of `sterna attach` and the library of command lines understand the same."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sterna.cli.attach import attach
from sterna.cli.attaching import Arguments, plain

FLAGS = ["--new", "--watch", "-d", "--displace", "--clipboard", "--notify"]
VALUES = ["--name", "--escape", "--state", "--host", "--port"]
WORDS = [
    "main", "", "-", "--", "-x", "--nam", "user@host", "ssh://host", "sterna://x", "none", "7220", "0", "65535",
    "65536", "+1", " 1", "1_0", "007220", "\u0663", "--help", "-h", "--via-ssh", "--listen", "--name=x", "-dd",
    "file", "there", "absent", "\udc80",
]  # fmt: skip
COMMANDS = st.lists(st.sampled_from(FLAGS + 3 * VALUES + WORDS) | st.text(max_size=3), max_size=8)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STERNA_STATE", raising=False)
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()


def by_click(words: list[str]) -> dict[str, object] | None:
    try:
        with attach.make_context("attach", list(words), help_option_names=["-h", "--help"]) as context:
            return dict(context.params)
    except (click.ClickException, click.exceptions.Exit):
        return None


def attributes(told: Arguments) -> dict[str, object]:
    return {name: getattr(told, name) for name in Arguments.__annotations__}


@given(COMMANDS, st.sampled_from(["", "there", "file", "absent"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400)
@example(["--port", "7220", "--host", "h", "main"], "there")
@example(["--state", "file"], "")
def test_both_ways_understand_the_same(words: list[str], state: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STERNA_STATE", state)
        told = plain(["attach", *words])
        assert told is None or attributes(told) == by_click(words)


@pytest.mark.parametrize(
    "words",
    [
        [], ["main"], ["--name", "s1", "main"], ["main", "-d"], ["--host", "192.0.2.1", "--port", "7220", "--watch"],
        ["--state", "there", "--new", "--clipboard", "--notify", "--escape", "none"],
    ],
)  # fmt: skip
def test_what_people_type_goes_the_short_way(words: list[str]) -> None:
    told = plain(["attach", *words])
    assert told is not None
    assert attributes(told) == by_click(words)


@pytest.mark.parametrize("words", [["pipe"], [], ["--debug", "attach"], ["attach", "a@b"], ["attach", "-"]])
def test_control_what_does_not(words: list[str]) -> None:
    assert plain(words) is None


def test_completion_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_STERNA_COMPLETE", "bash_source")
    assert plain(["attach"]) is None
    assert os.environ.get("STERNA_STATE") is None
