"""A durable daemon that is killed all the time, and clients that check every byte of their processes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.integration.remote_rig import START_SECONDS, TOKEN, Client, Daemon, alive

# Writes numbered lines to both outputs until its input, numbered lines too, says that it is enough.
CHILD = """
import os, sys, threading, time
count, wrong, over = 0, 0, False
def read():
    global count, wrong, over
    for line in sys.stdin.buffer:
        if line == b"enough\\n":
            break
        wrong += line != b"in %d\\n" % count
        count += 1
    over = True
threading.Thread(target=read, daemon=True).start()
line = error = 0
while not over:
    lines = range(line, line + 300)
    os.write(1, b"".join(b"out %d\\n" % number for number in lines))
    line += 300
    if line % 1500 == 0:
        os.write(2, b"err %d\\n" % error)
        error += 1
    time.sleep(0.002)
os.write(1, b"read %d wrong %d wrote %d %d\\n" % (count, wrong, line, error))
os._exit(int(sys.argv[1]))
"""
RAW = "import tty; tty.setraw(0)\n"  # a terminal that changes nothing


def holders(directory: Path) -> list[int]:
    """Returns the process ids of the holders of daemons in a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if bytes(directory / "rpc.sock.holder") in words:
                found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """Returns the process ids of the children of a process, zombies too."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class BrokenError(Exception):
    """The connection ended."""


class Talk:
    """A client of one process, in a thread: it checks each frame, feeds numbered lines, and comes back when cut off.

    Parameters: `directory`, of the daemon; `name`, of the process; `code`, with which that is to exit; `terminal`,
    whether it has one.
    """

    def __init__(self, directory: Path, name: str, code: int, *, terminal: bool = False) -> None:
        self._path, self._name, self._code = str(directory / "rpc.sock"), name, code
        self._terminal = terminal
        self.enough = threading.Event()
        self.abandoned = threading.Event()
        self.failure: BaseException | None = None
        self.reconnects = -1
        self.frames: list[Any] = []
        self.pid = 0
        self._sent = b""  # all input that was made, accepted or not
        self._lines = 0
        self._applied = 0  # what was acknowledged
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    @property
    def over(self) -> bool:
        return bool(self.frames) and self.frames[-1]["stream"] == "exit"

    def _run(self) -> None:
        try:
            while not self.over and not self.abandoned.is_set():
                try:
                    with Client(self._path) as client:
                        self.reconnects += 1
                        self._converse(client)
                except TimeoutError as error:
                    raise AssertionError("neither frames nor replies come") from error
                except (BrokenError, OSError):
                    time.sleep(0.005)
            if self.over:
                self._check()
        except BaseException as error:  # noqa: BLE001 # the test's own thread says so
            self.failure = error

    def _message(self, client: Client) -> Any:
        line = client.line()
        if not line.endswith(b"\n"):
            raise BrokenError
        return json.loads(line)

    def _converse(self, client: Client) -> None:
        overlap = min(3, len(self.frames))
        client.post("process.reattach", 1, id=self._name, fromSeq=len(self.frames) - overlap, wantPid=True)
        at = len(self.frames) - overlap
        while "type" in (message := self._message(client)):
            at = self._take(message, at)
        result = message["result"]
        if not result["found"]:
            assert not self.pid, "the process is forgotten"
            command: dict[str, Any] = {"command": sys.executable, "args": ["-c", CHILD, str(self._code)]}
            if self._terminal:
                command |= {"args": ["-c", RAW + CHILD, str(self._code)], "pty": {}}
            client.post("process.spawn", 2, id=self._name, wantPid=True, **command)
            while "type" in (message := self._message(client)):
                at = self._take(message, at)
            self.pid = message["result"]["pid"]
            applied = 0
        else:
            assert self.pid in {0, result["pid"]}
            self.pid = result["pid"]
            assert result["lastSeq"] >= len(self.frames) - 1
            applied = result["stdinApplied"]
        assert self._applied <= applied <= len(self._sent)
        self._applied = applied
        while self._terminal and not self.frames:  # it is not raw before
            at = self._take(self._message(client), at)
        self._feed(client)
        while not self.over:
            message = self._message(client)
            if "type" in message:
                at = self._take(message, at)
            elif "error" in message:  # it has ended meanwhile
                assert self.enough.is_set(), message
            else:
                assert message["result"]["applied"] == len(self._sent), message
                self._applied = len(self._sent)
                self._feed(client)

    def _take(self, frame: Any, at: int) -> int:
        """Takes a frame that must be number `at + 1`, or the one that had this number before."""
        assert frame["seq"] == at + 1, f"{frame['seq']} instead of {at + 1}"
        if at < len(self.frames):
            assert frame == self.frames[at], "a frame has changed"
        else:
            self.frames.append(frame)
        return at + 1

    def _feed(self, client: Client) -> None:
        """Sends what is not acknowledged and some more; there is always exactly one request under way."""
        if not self._sent.endswith(b"enough\n"):
            for _ in range(200):
                self._sent += b"in %d\n" % self._lines
                self._lines += 1
            if self.enough.is_set():
                self._sent += b"enough\n"
        elif self._applied == len(self._sent):
            return
        data = base64.b64encode(self._sent[self._applied :]).decode()
        client.post("process.stdin", 3, id=self._name, data=data, offset=self._applied)

    def _check(self) -> None:
        out, err = (
            b"".join(base64.b64decode(frame["data"]) for frame in self.frames[:-1] if frame["stream"] == stream)
            for stream in ("stdout", "stderr")
        )
        *lines, last = out.decode().splitlines()
        if self._terminal:
            errors_seen = [line for line in lines if line.startswith("err ")]
            lines = [line for line in lines if not line.startswith("err ")]
            err = "".join(f"{line}\n" for line in errors_seen).encode()
        _, read, _, wrong, _, wrote, errors = last.split()
        assert (int(read), wrong) == (self._lines, "0"), f"{last}, {self._lines} lines were sent"
        assert int(wrote) == len(lines), "output is lost or doubled"
        for number, line in enumerate(lines):
            assert line == f"out {number}"
        assert err.decode() == "".join(f"err {number}\n" for number in range(int(errors)))
        assert self.frames[-1]["exitCode"] == self._code


class PatchedDaemon(Daemon):
    """A daemon whose code is changed by a piece of Python before it starts."""

    def __init__(self, directory: Path, patch: str, *flags: str) -> None:
        self.home, self.path, self.log = directory, str(directory / "rpc.sock"), directory / "log"
        (directory / "token").write_text(TOKEN)
        environment = {
            "HOME": str(directory), "SHELL": "/bin/sh", "PATH": os.environ["PATH"], "CLAUSTRUM_DAEMON_CHILD": "1",
        }  # fmt: skip
        program = f"{patch}\nfrom sterna.remote.app import main\nmain()"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, "-serve", "-socket", self.path, "-token-file",
                str(directory / "token"), *flags],
                env=environment, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip


def wait_gone(pids: list[int]) -> None:
    """Waits until none of the processes is there any more, not even as a zombie."""
    deadline = time.monotonic() + START_SECONDS
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"left: {[(pid, alive(pid)) for pid in left]}"
        time.sleep(0.01)
