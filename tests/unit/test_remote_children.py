"""What children of the daemon start with, and the login shell among them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sterna.remote.log import Log
from sterna.remote.loginpath import LoginPath, login_shell
from sterna.remote.loop import Loop, Timer
from sterna.remote.spawn import spawn


def test_children_begin_without_blocked_and_ignored_signals() -> None:
    """Python ignores SIGPIPE and SIGXFSZ, and a thread that starts a child may have blocked anything."""
    assert signal.getsignal(signal.SIGPIPE) == signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    source, sink = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        pid = spawn(b"/bin/cat", [b"cat", b"/proc/self/status"], [], b"", (0, sink, 2))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(sink)
    with open(source) as file:
        status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
    os.waitpid(pid, 0)
    assert int(status["SigBlk"], 16) == 0
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not int(status["SigIgn"], 16) & 1 << number - 1, number


def test_a_login_shell_is_a_file_that_may_be_executed(tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text("#!/bin/sh\n")
    shell.chmod(0o644)
    usual = login_shell("")
    assert usual in {"/bin/zsh", "/bin/bash", "/bin/sh"}
    assert login_shell(str(shell)) == login_shell(str(tmp_path)) == login_shell(f"{shell}\0") == usual
    shell.chmod(0o755)
    assert login_shell(str(shell)) == str(shell)


def test_the_login_shell_is_asked_as_a_user_would_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = tmp_path / "shell"
    shell.write_text(
        '#!/bin/sh\necho "$# $1 $2 $3 $DISABLE_AUTO_UPDATE $ZSH_DISABLE_COMPFIX" > "$HOME/how"\n'
        'PATH=/from/login eval "$4"\n'
    )
    shell.chmod(0o755)
    errors: list[BaseException] = []
    loop = Loop(errors.append)
    later, waits = loop.later, list[float]()

    def note(seconds: float, call: object) -> Timer:
        waits.append(seconds)
        return later(seconds, call)  # type: ignore[arg-type] # as it came

    monkeypatch.setattr(loop, "later", note)
    null = os.open(os.devnull, os.O_WRONLY)
    path = LoginPath(loop, Log("error", null))
    path.start(str(shell), [b"HOME=" + os.fsencode(tmp_path), b"PATH=" + os.fsencode(os.defpath)])
    assert waits == [4], "the contract's bound"
    path.when_known(loop.stop)
    later(10, loop.stop)
    loop.run()
    loop._epoll.close()
    for descriptor in (null, loop._bell, loop._button):
        os.close(descriptor)
    assert (path.value, errors) == (b"/from/login", [])
    assert (tmp_path / "how").read_text() == "4 -l -i -c true true\n"
