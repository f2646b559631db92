"""The whole product on one machine: a node, agents and the command line as real processes, and a network that fails.

`Rig` keeps the node's port and state across restarts; its directory is short enough for Unix sockets. `CutProxy` (in
`tests.e2e.proxy`) stands between a client and the node. Everything is stopped by process id at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tests.e2e.proxy import CutProxy

SOURCE = Path(__file__).parents[2] / "src"
START_SECONDS = 20.0
STOP_SECONDS = 10.0
RUN_SECONDS = 30.0
_SETTLE_SECONDS = 0.02

T = TypeVar("T")


def wait_for(what: Callable[[], T], seconds: float = START_SECONDS, *, name: str = "it") -> T:
    """Returns the first true value of `what()`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds} s for {name} in vain"
        time.sleep(_SETTLE_SECONDS)


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _children(pid: int) -> list[int]:
    """All descendants of a process, itself not included."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{waiting[-1]}/task"):
                direct = [int(word) for word in Path(f"/proc/{waiting[-1]}/task/{task}/children").read_text().split()]
                found += direct
                waiting[:0] = direct
        waiting.pop()
    return found


def _started(pid: int) -> str:
    """When a process started, in ticks: with the pid it names a process for good; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


class Daemon:
    """A process that the rig started and will stop, with what it started itself.

    What it writes goes to `log` (standard error, appended over restarts) and beside it to a file for standard output.
    """

    def __init__(self, words: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        self._out = log.with_suffix(".out")
        with log.open("ab") as err, self._out.open("wb") as out:
            self._start = err.tell()
            self.process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        """What it wrote to standard error since it was started."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def first_line(self) -> str:
        """The first line of its standard output, "" before there is one."""
        with self._out.open("rb") as file:
            line = file.readline().decode(errors="replace")
        return line if line.endswith("\n") else ""

    def kill(self) -> None:
        """Kills it at once (SIGKILL); what it started lives on."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def stop(self, number: int = signal.SIGTERM, seconds: float = STOP_SECONDS) -> int:
        """Asks it to end and waits; SIGKILL if it does not. Returns its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.process.args!r} did not stop within {seconds} s:\n{self.output()}") from None

    def destroy(self) -> None:
        """Ends it and all that it started, by process id."""
        family = [(pid, _started(pid)) for pid in _children(self.pid)]
        with contextlib.suppress(AssertionError):
            self.stop(seconds=3.0)
        for pid, started in family:
            if started and _started(pid) == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class PtyClient:
    """A command of `sterna` in a terminal of its own; `seen` is everything it wrote there."""

    def __init__(self, words: Sequence[str], env: dict[str, str], *, cols: int = 80, rows: int = 24) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        # setsid(1) makes the terminal the controlling one, then becomes the command: the pid stays.
        self.process = subprocess.Popen(["setsid", "-c", *words], env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.seen = bytearray()
        self._mark = 0

    def type(self, text: str | bytes) -> None:
        """Types."""
        rest = text.encode() if isinstance(text, str) else text
        while rest:
            rest = rest[os.write(self.master, rest) :]

    def read(self, seconds: float = 0.0) -> bytes:
        """Returns what came within `seconds`; b"" when nothing did or the terminal is closed."""
        if not select.select([self.master], [], [], seconds)[0]:
            return b""
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return b""
        self.seen += data
        return data

    def expect(self, text: str | bytes, seconds: float = START_SECONDS) -> bytes:
        """Reads until `text` comes, after what was expected before; returns what came up to its end."""
        want = text.encode() if isinstance(text, str) else text
        deadline = time.monotonic() + seconds
        while True:
            at = self.seen.find(want, self._mark)
            if at >= 0:
                start, self._mark = self._mark, at + len(want)
                return bytes(self.seen[start : self._mark])
            assert time.monotonic() < deadline, f"{want!r} did not come; there was {bytes(self.seen[self._mark :])!r}"
            if not self.read(0.2) and self.process.poll() is not None and not self.read(0.1):
                raise AssertionError(f"it ended before {want!r} came; there was {bytes(self.seen[self._mark :])!r}")

    def wait(self, seconds: float = START_SECONDS) -> int:
        """Reads until it ends; returns its exit status."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end; there was {bytes(self.seen[self._mark :])!r}"
            self.read(0.05)
        while self.read(0.02):
            pass
        return self.process.returncode

    def close(self) -> None:
        """Kills it if it still runs, and closes the terminal."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_SECONDS)
        os.close(self.master)


class Rig:
    """A node with its agents on a port of its own; `with Rig() as rig:` cleans up whatever happens."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="st-"))
        self.state = self.directory / "s"
        self.sockets = self.state / "sockets"
        self.port = free_port()
        self.node: Daemon | None = None
        self.pods: dict[str, Daemon] = {}
        self.about: dict[str, Any] = {}
        self._clients: list[PtyClient] = []
        self._proxies: list[CutProxy] = []
        self.sockets.mkdir(mode=0o700, parents=True)
        self.state.chmod(0o700)
        keep = {
            k: v for k, v in os.environ.items() if not k.startswith(("STERNA_", "XDG_", "PYTHON", "COLUMNS", "LINES"))
        }
        self.env = {
            **keep,
            "PYTHONPATH": os.fspath(SOURCE),
            "STERNA_STATE": os.fspath(self.state),
            "XDG_STATE_HOME": os.fspath(self.directory / "x"),
            "XDG_CONFIG_HOME": os.fspath(self.directory / "c"),
            "XDG_RUNTIME_DIR": os.fspath(self.directory / "r"),
            "HOME": os.fspath(self.directory),
            "TERM": "xterm-256color",
            "LC_ALL": "C.UTF-8",
            "PS1": "$ ",
        }

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.node is not None:
            print(f"--- the node's last words ---\n{self.node.output()[-4000:]}")
        self.close()

    # ---- node and agents ---------------------------------------------------------------------------------------

    def start_pod(
        self, agent: str = "main", *command: str, kind: str = "pty", env: dict[str, str] | None = None
    ) -> Daemon:
        """Starts an agent that runs `command` (by default bash without its start-up files); returns once it listens."""
        words = list(command) or ["bash", "--norc", "--noprofile"]
        options = ["--agent", agent, "--kind", kind, "--cwd", os.fspath(self.directory)]
        words = self.words("pod", *options, "--sockets", os.fspath(self.sockets), "--", *words)
        pod = Daemon(words, {**self.env, **(env or {})}, self.directory / f"pod-{agent}.log")
        self.pods[agent] = pod
        path = os.fspath(self.sockets / f"local_{agent}")
        wait_for(lambda: _answers(path) or self._check(pod), name=f"the agent {agent}")
        return pod

    def start_node(self, *options: str) -> dict[str, Any]:
        """Starts the node, and the agent `main` (bash) unless it runs; returns what `up --json` prints."""
        assert self.node is None or not self.node.running, "the node runs already"
        if "main" not in self.pods or not self.pods["main"].running:
            self.start_pod()
        # Tests run side by side: who wants the web page or QUIC names a port of its own.
        page = [] if "--web-port" in options else ["--no-web"]
        page += [] if "--quic-port" in options else ["--quic-port", "0"]
        words = self.words("up", "--json", "--port", str(self.port), "--state", os.fspath(self.state), *page, *options)
        node = self.node = Daemon(words, self.env, self.directory / "node.log")
        line = wait_for(lambda: node.first_line() or self._check(node), name="the node")
        self.about = json.loads(line)
        return self.about

    def _check(self, daemon: Daemon) -> str:
        assert daemon.running, f"it ended with status {daemon.process.returncode}:\n{daemon.output()}"
        return ""

    def kill_node(self) -> None:
        """Kills the node (SIGKILL); the agents live on."""
        assert self.node is not None
        self.node.kill()

    def stop_node(self) -> int:
        """Stops the node politely (SIGTERM); the agents live on. Returns its exit status."""
        assert self.node is not None
        return self.node.stop()

    def restart_node(self, *, kill: bool = False) -> dict[str, Any]:
        """Stops (or kills) the node and starts it again on the same port."""
        if self.node is not None and self.node.running:
            if kill:
                self.kill_node()
            else:
                self.stop_node()
        return self.start_node()

    def kill_pod(self, agent: str = "main") -> None:
        """Kills an agent with all its programs (SIGKILL)."""
        pod = self.pods.pop(agent)
        family = [(pid, _started(pid)) for pid in _children(pod.pid)]
        pod.kill()
        for pid, started in family:
            if started and _started(pid) == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # ---- clients -----------------------------------------------------------------------------------------------

    def words(self, *args: str) -> list[str]:
        """The words of a `sterna` command."""
        return [sys.executable, "-m", "sterna", *args]

    def sterna(
        self, *args: str, typed: str = "", timeout: float = RUN_SECONDS, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a `sterna` command against this node; `typed` is its standard input, output and error are text."""
        return subprocess.run(
            self.words(*args), env={**self.env, **(env or {})}, input=typed, capture_output=True, text=True,
            timeout=timeout, check=False, cwd=self.directory,
        )  # fmt: skip

    def json(self, *args: str) -> Any:
        """Runs a `sterna` command with --json, which must succeed; returns what it printed."""
        done = self.sterna(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def terminal(self, *args: str, cols: int = 80, rows: int = 24, env: dict[str, str] | None = None) -> PtyClient:
        """Runs a `sterna` command in a terminal of its own; closed at the end."""
        client = PtyClient(self.words(*args), {**self.env, **(env or {})}, cols=cols, rows=rows)
        self._clients.append(client)
        return client

    def proxy(self, port: int | None = None) -> CutProxy:
        """Begins a proxy in front of the node's TCP port (or of another); stopped at the end."""
        proxy = CutProxy(self.port if port is None else port)
        self._proxies.append(proxy)
        return proxy

    def close(self) -> None:
        """Stops everything and removes the directory."""
        for client in self._clients:
            client.close()
        for proxy in self._proxies:
            proxy.close()
        for daemon in (self.node, *self.pods.values()):
            if daemon is not None:
                daemon.destroy()
        shutil.rmtree(self.directory, ignore_errors=True)


def _answers(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return ""
        return path


@contextlib.contextmanager
def running(*options: str) -> Iterator[Rig]:
    """A rig with a node and the agent `main`."""
    with Rig() as rig:
        rig.start_node(*options)
        yield rig
