"""What `sterna attach` does, without the library that reads command lines: its import takes a fifth of a connection."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

from sterna.cli.spoken import program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sterna.client.status import ScreenModel

_FLAGS = {
    "--new": "fresh", "--watch": "watch", "-d": "displace", "--displace": "displace", "--clipboard": "clipboard",
    "--notify": "notify",
}  # fmt: skip
_VALUES = ("--name", "--escape", "--state", "--host", "--port")


class Arguments:
    """What `sterna attach` is told; `sterna attach --help` says what it means.

    Parameters: `told`, the values of attributes that differ from the default.
    """

    target: str | None = None
    name: str | None = None
    fresh: bool = False
    watch: bool = False
    displace: bool = False
    escape: str = "~"
    clipboard: bool = False
    notify: bool = False
    state: str | None = None
    host: str | None = None
    port: int | None = None

    def __init__(self, told: Mapping[str, object]) -> None:
        self.__dict__.update(told)


def plain(words: Sequence[str]) -> Arguments | None:
    """Returns what a plain command line `attach …` tells; None for all that click is to look at.

    That is `user@host`, what is wrong, what asks for help, and every rare spelling.
    """
    if words[:1] != ["attach"] or "_STERNA_COMPLETE" in os.environ:
        return None
    told: dict[str, str | int] = {}
    rest = iter(words[1:])
    for word in rest:
        value: str | int = True
        if word in _FLAGS:
            name = _FLAGS[word]
        elif word in _VALUES:
            name, value = word[2:], next(rest, "")
        else:
            name, value = "target", word
        if name in told or not value or str(value).startswith("-"):
            return None
        told[name] = value
    target, port = str(told.get("target", "")), str(told.get("port", "1"))
    if "@" in target or "://" in target or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65_536):
        return None
    if "port" in told:
        told["port"] = int(port)
    if state := told.get("state") or os.environ.get("STERNA_STATE"):
        if os.path.exists(state) and not (os.path.isdir(state) and os.access(state, os.R_OK)):
            return None
        told["state"] = state
    return Arguments(told)


def run_plain(told: Arguments) -> int:
    """Does what `run` does, a little sooner."""
    if sys.modules.keys().isdisjoint(("msgspec", "typing_extensions")):
        # msgspec takes from there what `typing` has since Python 3.11; its import is a tenth of a start.
        sys.modules["typing_extensions"] = None  # type: ignore[assignment]  # it is not found
        import msgspec  # noqa: F401  # for those who need it next

        del sys.modules["typing_extensions"]
    return run(told)


def run(told: Arguments) -> int:
    """Attaches this terminal to a session; returns the exit status."""
    from sterna.cli.target import choose
    from sterna.client import attach as client

    endpoint, wish = choose(
        told.target, name=told.name, fresh=told.fresh, state=told.state, host=told.host, port=told.port
    )
    options = client.AttachOptions()
    options.state = told.state
    options.displace = told.displace
    options.escape = None if told.escape == "none" else told.escape
    options.clipboard = told.clipboard
    options.notify = told.notify
    options.mode = "watch" if told.watch else "drive"
    options.make_screen = _make_screen
    options.again = _again(told)
    options.starts = _by_ssh(told.target)
    return client.attach(endpoint, wish, options)


def _again(told: Arguments) -> str:
    """Returns the command that comes back to a session; a share link's secret is not shown."""
    from sterna.trust.links import is_link

    target = told.target
    if target == "-":
        return shlex.join([*program(), "attach", "-"])
    if target is not None and is_link(target):
        return shlex.join([*program(), "attach"]) + " 'LINK'"
    elsewhere: list[str] = []
    if target is not None and _by_ssh(target):
        from sterna.cli.ssh import given

        elsewhere = [target, *given()]
    flags = [("--state", told.state), ("--host", told.host), ("--port", told.port and str(told.port))]
    words = [*program(), "attach", *elsewhere, *(word for flag, value in flags if value for word in (flag, value))]
    return shlex.join([*words, "--name"]) + " NAME"


def _by_ssh(target: str | None) -> bool:
    return target is not None and ("@" in target or target.startswith("ssh://"))


def _make_screen(cols: int, rows: int) -> ScreenModel:
    """Returns the status line's model of the terminal; the engine is loaded when there is trouble to tell of."""
    from sterna.cli.screenmodel import EngineModel

    return EngineModel(cols, rows)
