"""A real remote daemon in a directory of its own, and clients of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKEN = "tok-of-tests"
START_SECONDS = 20
REPLY_SECONDS = 20


def alive(pid: int) -> bool:
    """Returns whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], object], what: str) -> None:
    """Waits for a condition, which must come within 20 seconds."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Client:
    """One connection; it keeps frames apart from replies, in the order in which both came."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.connect(path)
        except OSError:
            self.sock.close()
            raise
        self._rest = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.settimeout(REPLY_SECONDS)
        self.sock.sendall(data)

    def line(self, seconds: float = REPLY_SECONDS) -> bytes:
        """Returns a line with its end, or what there is of one when the daemon closes the connection."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionError:
                data = b""
            if not data:
                line, self._rest = self._rest, b""
                return line
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line + b"\n"

    def silent(self, seconds: float) -> bool:
        """Returns whether nothing comes for so long."""
        try:
            return not self.line(seconds)
        except TimeoutError:
            return not self._rest

    def post(self, method: str, number: int = 1, /, **params: object) -> None:
        """Sends a request and does not wait."""
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params, "auth": TOKEN}
        self.send(json.dumps(message).encode() + b"\n")

    def ask(self, method: str, **params: object) -> Any:
        """Returns the result of a request, or its error; frames that come before it are dropped."""
        return self.reply(method, **params)[0]

    def reply(self, method: str, **params: object) -> tuple[Any, list[Any]]:
        """Returns the result of a request, or its error, and the frames that came before it."""
        self.post(method, 1, **params)
        frames: list[Any] = []
        while True:
            message = json.loads(self.line())
            if "type" not in message:
                return message.get("result", message.get("error")), frames
            frames.append(message)

    def frames_to_exit(self, process: str) -> list[Any]:
        """Returns the frames of a process up to its exit; replies in between are dropped."""
        frames = []
        while True:
            line = self.line()
            assert line, "the daemon closed the connection"
            message = json.loads(line)
            if message.get("processId") == process:
                frames.append(message)
                if message["stream"] == "exit":
                    return frames


class Daemon:
    """The daemon as the launcher starts it, but in the foreground."""

    def __init__(self, directory: Path, *flags: str, **variables: str) -> None:
        self.home = directory
        self.path = str(directory / "rpc.sock")
        token = directory / "token"
        token.write_text(TOKEN)
        self.log = directory / "log"
        environment = {
            "HOME": str(directory), "SHELL": "/bin/sh", "PATH": os.environ["PATH"], "LC_ALL": "C",
            "CLAUSTRUM_LOG_LEVEL": "debug", "CLAUSTRUM_DAEMON_CHILD": "1", **variables,
        }  # fmt: skip
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sterna.remote", "-serve", "-socket", self.path, "-token-file",
                str(token), *flags],
                env=environment, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.connect().sock.close()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, "the daemon does not listen"
                time.sleep(0.01)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()

    def connect(self) -> Client:
        return Client(self.path)

    def processor_seconds(self) -> float:
        """Returns the processor time that the daemon has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Returns the daemon's resident memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")
