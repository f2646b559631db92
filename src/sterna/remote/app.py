"""The executable `sterna-remote`: one of five modes, chosen by flags."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from sterna.remote import build, config
from sterna.remote.environment import DAEMON_MARK
from sterna.remote.failure import StartError
from sterna.remote.flags import FlagError, Flags, parse, usage

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_MODE: Final = "one of --version/--install/--serve/--bridge/--stop is required"
_SOCKET: Final = ".claude/remote/rpc.sock"


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Runs `sterna-remote` with `words`, by default the arguments of this process, and ends the process.

    Paths and texts are UTF-8 whatever the locale says, so in other locales it starts once more in Python's UTF-8 mode.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 # itself, no shell
    sys.exit(run(sys.argv[0], sys.argv[1:] if words is None else words))


def run(program: str, words: Sequence[str]) -> int:
    """Runs one mode and returns the exit status.

    Parameters: `program`, how it was called: its directory is where the configuration is; `words`, the arguments.
    """
    try:
        flags = parse(list(words))
    except FlagError as error:
        text = str(error)
        sys.stderr.write(f"{text}\n{usage(program)}" if text else usage(program))
        return 2 if text else 0
    override = config.apply(config.read(os.path.join(os.path.dirname(os.path.realpath(program)), config.NAME)), flags)
    try:
        return _mode(flags, override)
    except StartError as failure:
        sys.stderr.write(f"claustrum: {failure}\n")
        return 1


def _mode(flags: Flags, override: str) -> int:
    if flags.bools["version"]:
        print(build.version_line(override))  # noqa: T201 # what this mode is for
        return 0
    if flags.bools["install"]:
        from sterna.remote.install import install

        print(install(flags))  # noqa: T201 # as above
        return 0
    if flags.bools["stop"]:
        from sterna.remote.stop import stop, stop_own

        (stop_own if flags.bools["strict"] else stop)(_socket(flags))
    elif flags.bools["bridge"]:
        from sterna.remote.bridge import bridge

        bridge(_socket(flags), drain=flags.bools["strict"])
    elif flags.bools["serve"]:
        _serve(flags)
    else:
        sys.stderr.write(f"claustrum: {_NO_MODE}\n")
        return 2
    return 0


def _serve(flags: Flags) -> None:
    if os.environ.get(DAEMON_MARK):
        from sterna.remote.daemon import serve

        serve(flags, _socket(flags))
    else:
        from sterna.remote.launcher import launch

        launch(flags, _socket(flags))


def _socket(flags: Flags) -> str:
    if flags.texts["socket"]:
        return flags.texts["socket"]
    home = os.environ.get("HOME", "")
    if not home:
        raise StartError("cannot resolve home directory: $HOME is not defined")
    return os.path.join(home, _SOCKET)
