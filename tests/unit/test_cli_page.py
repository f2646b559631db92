"""Which port the web page of `sterna up` gets, and what happens where it is another's."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from sterna.cli import access, loop, serve, up
from sterna.errors import UsageError
from sterna.node.config import WEB_PORT, NodeConfig


@pytest.mark.parametrize(
    ("flags", "port", "asked"),
    [
        ((), WEB_PORT, False), (("--web-port", "7222"), 7222, True), (("--web-port", "8443"), 8443, True),
        (("--no-web",), 0, False), (("--web-port", "0"), 0, False), (("--no-web", "--web-port", "0"), 0, False),
    ],
)  # fmt: skip
def test_the_page_is_there_unless_it_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], port: int, asked: bool
) -> None:
    seen: list[tuple[int, bool]] = []

    def serve_node(config: NodeConfig, *_args: object, web_asked: bool) -> None:
        seen.append((config.web_port, web_asked))

    monkeypatch.setattr(serve, "serve_node", serve_node)
    monkeypatch.setattr(loop, "run", lambda _node: None)
    done = CliRunner().invoke(up.up, ["--state", str(tmp_path), *flags])
    assert done.exit_code == 0, done.output
    assert seen == [(port, asked)]


def test_two_words_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(up.up, ["--state", str(tmp_path), "--no-web", "--web-port", "7222"])
    assert isinstance(done.exception, UsageError)


@pytest.fixture
def occupied(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The usual port, which somebody else has."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port: int = other.getsockname()[1]
        monkeypatch.setattr(serve, "WEB_PORT", port)
        yield port


def config(tmp_path: Path, **more: Any) -> NodeConfig:
    return NodeConfig(state=str(tmp_path), sockets=str(tmp_path), **more)


def test_a_usual_port_in_use_is_no_failure_unless_it_was_asked_for(tmp_path: Path, occupied: int) -> None:
    node = config(tmp_path, web_port=occupied)
    sock, without = serve._web_socket(node, asked=False)
    assert (sock, node.web_port) == (None, 0)
    assert without.startswith(f"There is no web page: port {occupied} on 127.0.0.1 is in use;")
    assert without.endswith("choose another with --web-port.")
    with pytest.raises(UsageError, match="or leave it out with --web-port 0"):
        serve._web_socket(config(tmp_path, web_port=occupied), asked=True)
    same = config(tmp_path, port=occupied, web_port=occupied)
    assert serve._web_socket(same, asked=False)[0] is None
    assert same.web_port == 0


def test_up_says_what_is_missing_and_names_the_state_that_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    about: Any = SimpleNamespace(
        opened=threading.Event(), no_quic="There is no QUIC: …", without="There is no web page: …",
        host="127.0.0.1", port=7220, url=None, fingerprint="f",
    )  # fmt: skip
    about.opened.set()
    state = str(tmp_path / "my state")
    for chosen, words, terminal in ((state, f" --state '{state}'", True), (None, "", False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        up._announce(about, state, "main", False, chosen, "sterna up")
        said = capsys.readouterr()
        assert [line for line in said.err.splitlines() if "There is no" in line] == [
            *["sterna: There is no QUIC: …"] * terminal, "sterna: There is no web page: …",
        ]  # fmt: skip
        assert f"attach{words}\n" in said.out
        assert f"down{words}` stops all" in said.out


def test_up_says_that_others_may_look_into_a_directory_that_it_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode, said in ((0o755, True), (0o700, False)):
        tmp_path.chmod(mode)
        up._tell_listable(str(tmp_path))
        assert (f"{tmp_path} can be listed by others: `chmod 700 {tmp_path}`." in capsys.readouterr().err) is said
        assert tmp_path.stat().st_mode & 0o777 == mode, "what to do with it is left to whose it is"


@pytest.mark.parametrize(
    ("host", "web_host", "said"),
    [
        ("0.0.0.0", "127.0.0.1", True), ("192.0.2.7", "::1", True), ("0.0.0.0", "0.0.0.0", False),  # noqa: S104 -- told, not bound to
        ("192.0.2.7", "192.0.2.8", False), ("127.0.0.1", "127.0.0.1", False), ("192.0.2.7", "::", False),
    ],
)  # fmt: skip
def test_share_says_that_a_page_on_loopback_needs_a_proxy(
    capsys: pytest.CaptureFixture[str], host: str, web_host: str, said: bool
) -> None:
    access._check_page({"host": host, "web_host": web_host})
    text = capsys.readouterr().err
    assert ("give its port with --web-port 443" in text) is said
    assert bool(text) is said
