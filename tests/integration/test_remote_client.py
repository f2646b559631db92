"""The asyncio client against a real daemon: typed results, and processes through lost connections."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from sterna.errors import ConnectionLostError, SternaError, UsageError
from sterna.remote import Client, Exit, Gap, Output, Process, ProcessLostError, RemoteError, clientwire
from sterna.remote.clientcalls import Validity
from sterna.remote.clientwire import Link, SocketDialer
from sterna.remote.dispatch import METHODS
from tests.integration.remote_rig import TOKEN, Daemon

SECONDS = 30


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("remote"), CLAUSTRUM_LOG_LEVEL="error") as running:
        yield running


@asynccontextmanager
async def connected(daemon: Daemon) -> AsyncIterator[Client]:
    async with asyncio.timeout(SECONDS), await Client.connect(daemon.path) as client:
        yield client


class Cuts:
    """A way to the daemon whose connections can be cut; `links` are all that were made."""

    def __init__(self, daemon: Daemon) -> None:
        self._path = daemon.path
        self.links: list[Link] = []
        self.token = TOKEN

    async def dial(self, link: Link) -> str:
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: link, self._path)
        except OSError as error:
            raise ConnectionLostError(str(error)) from None
        self.links.append(link)
        return self.token

    def cut(self) -> None:
        self.links[-1].close()


async def output_of(process: Process) -> tuple[bytes, bytes, int]:
    found = {"stdout": b"", "stderr": b""}
    async for event in process:
        if isinstance(event, Output):
            found[event.stream] += event.data
        else:
            assert isinstance(event, Exit)
    assert process.exit_code is not None
    return found["stdout"], found["stderr"], process.exit_code


async def test_methods_without_processes(daemon: Daemon, tmp_path: Path) -> None:
    async with connected(daemon) as client:
        await client.ping()
        assert (await client.version()).platform == "linux"
        assert tuple((await client.capabilities()).methods) == METHODS
        (tmp_path / "a").write_text("text\n")
        (tmp_path / "d").mkdir()
        entries = await client.list_files(str(tmp_path))
        assert [(entry.name, entry.is_dir) for entry in entries] == [("a", False), ("d", True)]
        assert await client.validate(str(tmp_path)) == Validity(valid=True, is_dir=True)
        assert (await client.validate("/nowhere")).error == "Path does not exist"
        assert (await client.stat(str(tmp_path / "a"))).size == 5
        assert (await client.read_file(str(tmp_path / "a"))).content == "text\n"
        with pytest.raises(RemoteError, match="exceeds maxBytes") as caught:
            await client.read_file(str(tmp_path / "a"), max_bytes=4)
        assert caught.value.number == -32602
        assert (await client.extract_tar("/nowhere", str(tmp_path / "d"))).error.startswith("open archive: ")
        with pytest.raises(RemoteError) as unknown:
            await client.call("files.nothing", {}, msgspec.Raw)
        assert unknown.value.number == -32601
        with pytest.raises(UsageError, match="1 MiB"):
            await client.stat("x" * 1_100_000)


async def test_git(daemon: Daemon, tmp_path: Path) -> None:
    async with connected(daemon) as client:
        repo = str(tmp_path / "repo")
        commit = "git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x"
        script = f"git init -q -b main {repo} && cd {repo} && {commit}"
        assert await (await client.spawn("sh", ["-c", script])).wait() == 0
        assert (await client.git_info(repo)).branch == "main"
        assert (await client.git_status(repo)).clean
        made = await client.create_worktree(repo, "new", str(tmp_path / "tree"))
        assert (made.success, made.source_branch) == (True, "main")
        assert (await client.git_branches(repo)).branches == ["main", "new"]
        assert (await client.remove_worktree(repo, str(tmp_path / "tree"), "new")).success
        assert (await client.create_worktree(str(tmp_path), "b", "/x")).error_code == "not_a_repo"


async def test_a_process(daemon: Daemon) -> None:
    async with connected(daemon) as client:
        process = await client.spawn("sh", ["-c", 'read a; echo "$a"; echo no >&2; exit 7'], env={"A": "b"})
        assert process.pid > 0
        await process.write(b"yes\n")
        assert await output_of(process) == (b"yes\n", b"no\n", 7)
        with pytest.raises(SternaError, match="no more input"):
            await process.write(b"more")
        with pytest.raises(RemoteError, match="executable file not found") as caught:
            await client.spawn("no-such-program")
        assert caught.value.number == -32603
        sleeper = await client.spawn("sleep", ["1000"], id="sleeper")
        with pytest.raises(UsageError, match="sleeper already"):
            await client.spawn("true", id="sleeper")
        assert (await sleeper.kill_and_wait()).died
        assert await sleeper.wait() == -1
        assert not (await client.kill_and_wait("unknown")).found
        assert await client.attach("unknown") is None


async def test_input_and_output_are_exact_through_cuts(daemon: Daemon) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    data = rng.randbytes(12 << 20)
    way = Cuts(daemon)
    async with asyncio.timeout(SECONDS), await Client.open(way) as client:
        process = await client.spawn("head", ["-c", str(len(data))])
        digest, size = hashlib.sha256(), 0

        async def feed() -> None:
            at = 0
            while at < len(data):
                piece = data[at : at + rng.randrange(1, 300_000)]
                at += len(piece)
                await process.write(piece)
            await process.drain()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(feed())
            cut = 0
            async for event in process:
                assert not isinstance(event, Gap)
                if isinstance(event, Output):
                    digest.update(event.data)
                    size += len(event.data)
                    if size >= cut and client.connected:
                        way.cut()
                        cut = size + rng.randrange(1_000_000)
        assert (size, process.exit_code) == (len(data), 0)
        assert digest.digest() == hashlib.sha256(data).digest()
        print(f"{len(way.links)} connections, {process.duplicates} duplicates")
        assert len(way.links) > 5


async def test_what_was_dropped_is_named(daemon: Daemon, tmp_path: Path) -> None:
    way = Cuts(daemon)
    async with asyncio.timeout(SECONDS), await Client.open(way) as client:
        script = f"echo begin; read x; head -c 60000000 /dev/zero; touch {tmp_path}/done"
        process = await client.spawn("sh", ["-c", script])
        first = await anext(process)
        assert isinstance(first, Output)
        way.token = "wrong"
        await process.write(b"\n")
        await process.drain()
        way.cut()  # and for a while nobody reads
        while not (await asyncio.to_thread((tmp_path / "done").exists)):
            await asyncio.sleep(0.01)
        way.token = TOKEN
        events = [event async for event in process]
        assert isinstance(events[-1], Exit)
        gaps = [event for event in events if isinstance(event, Gap)]
        assert len(gaps) == 1
        kept = [event for event in events if isinstance(event, Output)]
        following = [event.seq for event in kept if event.seq > gaps[0].last]
        assert following == list(range(gaps[0].last + 1, events[-1].seq))
        assert following[0] == gaps[0].last + 1


async def test_a_slow_reader_holds_the_process_up_and_calls_still_work(daemon: Daemon) -> None:
    async with connected(daemon) as client:
        process = await client.spawn("head", ["-c", "100000000", "/dev/zero"])
        size = calls = 0
        async for event in process:
            if isinstance(event, Output):
                size += len(event.data)
                if event.seq % 500 == 1:  # the reply is behind output that nobody reads meanwhile
                    await client.ping()
                    calls += 1
                    await asyncio.sleep(0.01)
                    assert process._queued < 8 << 20
        assert size == 100_000_000
        assert calls > 3


async def test_a_process_whose_start_was_not_confirmed_is_found_and_not_started_twice(
    daemon: Daemon, tmp_path: Path
) -> None:
    way = Cuts(daemon)
    async with asyncio.timeout(SECONDS), await Client.open(way) as client:
        for turn in range(3):
            starting = asyncio.ensure_future(client.spawn("sh", ["-c", f"echo x >> {tmp_path}/{turn}; exit {turn}"]))
            await asyncio.sleep(0)
            way.cut()  # the request is on its way, the reply will find nobody
            assert await (await starting).wait() == turn
            assert (tmp_path / str(turn)).read_text() == "x\n"
        starting = asyncio.ensure_future(client.spawn("true", id="named"))
        await asyncio.sleep(0)
        way.cut()
        with pytest.raises(ConnectionLostError):
            await starting


async def test_a_request_that_comes_late_does_not_take_the_output_away(daemon: Daemon) -> None:
    way = Cuts(daemon)
    async with asyncio.timeout(SECONDS), await Client.open(way) as client:
        process = await client.spawn("cat")
        process.attaching()  # as if that request had been sent and not been answered
        way.cut()
        while not process.attached:
            await asyncio.sleep(0.01)
        with daemon.connect() as late:  # it arrives after the one of the connection that goes on
            assert late.ask("process.reattach", id=process.id)["found"]
        await process.write(b"heard")
        event = await anext(process)
        assert isinstance(event, Output)
        assert event.data == b"heard"
        await process.kill("KILL")


async def test_another_client_goes_on_where_one_stopped(daemon: Daemon) -> None:
    async with connected(daemon) as first, connected(daemon) as second:
        process = await first.spawn("sh", ["-c", "echo one; read x; echo two; read x; exit 3"], id="moved")
        event = await anext(process)
        await process.write(b"x\n")
        await process.drain()
        moved = await second.attach("moved", after=event.seq)  # type: ignore[union-attr] # an Output
        assert moved is not None
        assert moved.applied == 2
        await moved.write(b"y\n")
        assert await output_of(moved) == (b"two\n", b"", 3)
        assert moved.pid == process.pid


async def test_the_end_of_the_daemon(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        async with asyncio.timeout(SECONDS), await Client.connect(daemon.path) as client:
            process = await client.spawn("sleep", ["1000"])
            daemon.process.kill()
            await asyncio.to_thread(daemon.process.wait)
            call = asyncio.ensure_future(client.ping())
            with Daemon(tmp_path):
                await call  # it waited for the next daemon, which another call finds
                with pytest.raises(ProcessLostError, match="restarted"):
                    await process.wait()
                await client.shutdown()
                with pytest.raises(ConnectionLostError):
                    await client.ping()
    place = tmp_path / "a place"
    with pytest.raises(ConnectionLostError, match="No daemon answers") as caught:
        await Client.connect(str(place / "rpc.sock"))
    (tmp_path / "sterna-remote").write_text(f'#!/bin/sh\nexec {sys.executable} -m sterna.remote "$@"\n')
    (tmp_path / "sterna-remote").chmod(0o755)
    env = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["sh", "-c", str(caught.value).split("`")[1]]
    await asyncio.to_thread(subprocess.run, words, env=env, check=True, timeout=SECONDS)
    async with asyncio.timeout(SECONDS), await Client.connect(str(place / "rpc.sock")) as client:
        await client.shutdown()
    with pytest.raises(ConnectionLostError, match=r"`printf %s TOKEN \| sterna-remote -serve -token-fd 0 -socket"):
        await Client.connect(str(place / "rpc.sock"), token="mine")


async def test_a_signal_whose_confirmation_was_lost(daemon: Daemon) -> None:
    cuts = Cuts(daemon)
    async with asyncio.timeout(SECONDS), await Client.open(cuts) as client:
        process = await client.spawn("sleep", ["1000"])
        call = asyncio.ensure_future(client.kill("nobody"))
        await asyncio.sleep(0)  # it is sent
        cuts.cut()
        with pytest.raises(ConnectionLostError):
            await call
        await client.ping()
        call = asyncio.ensure_future(process.kill("INT", again=True))
        await asyncio.sleep(0)
        cuts.cut()
        await call
        assert len(cuts.links) == 3
        await process.wait()


@pytest.mark.parametrize("before", [None, "of the daemon before"])
async def test_a_token_that_comes_after_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    came = asyncio.Queue[asyncio.StreamWriter]()
    server = await asyncio.start_unix_server(lambda _reader, writer: came.put_nowait(writer), str(tmp_path / "s"))
    token = tmp_path / "daemon.token"
    if before is not None:
        token.write_text(before)
        os.utime(token, (1, 1))

    def dialling() -> asyncio.Task[str]:
        return asyncio.ensure_future(SocketDialer(str(tmp_path / "s")).dial(Link(lambda _: None, lambda *_: None)))

    async with asyncio.timeout(SECONDS):
        dial = dialling()
        writers = [await came.get()]
        for _ in range(10):
            await asyncio.sleep(0)
        assert not dial.done()
        token.write_text(TOKEN)
        assert await dial == TOKEN
        token.unlink()
        monkeypatch.setattr(clientwire, "_TOKEN_SECONDS", 0.02)  # and for one that never comes
        if before is not None:
            token.write_text(before)
            os.utime(token, (1, 1))
            assert await dialling() == before
        else:
            with pytest.raises(ConnectionLostError, match=r"token beside .* cannot be read"):
                await dialling()
        writers.append(await came.get())
        for writer in writers:
            writer.close()
            await writer.wait_closed()
        server.close()
        await server.wait_closed()


async def test_over_a_command(daemon: Daemon) -> None:
    noisy = f"echo noise of a start-up file; exec {sys.executable} -m sterna.remote -bridge -socket {daemon.path}"
    async with asyncio.timeout(SECONDS):
        async with await Client.over(["sh", "-c", noisy], token=TOKEN) as client:
            process = await client.spawn("echo", ["hi"])
            assert await output_of(process) == (b"hi\n", b"", 0)
        with pytest.raises(RemoteError, match="Unauthorized") as caught:
            await Client.over(["sh", "-c", noisy], token="wrong")
        assert caught.value.number == -32001
        with pytest.raises(ConnectionLostError):
            await Client.over(["false"], token="x")
        for command in ("/nowhere/bridge", "exec /nowhere/bridge"):
            with pytest.raises(ConnectionLostError, match=r"ended with status 127.*install sterna on that machine"):
                await Client.over(["sh", "-c", f"{command} 2>/dev/null"], token="x")
        with pytest.raises(UsageError, match="cannot be started"):
            await Client.over(["/nowhere/ssh"], token="x")


def test_the_example(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text(
        f'#!/bin/sh\ntest "$*" = "-T host sterna-remote -bridge" || exit 255\n'
        f"exec {sys.executable} -m sterna.remote -bridge -socket {daemon.path}\n"
    )
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    repo = tmp_path / "repo"
    subprocess.run(["git", "init", "-q", str(repo)], check=True)
    example = Path(__file__).parents[2] / "examples" / "remote_build.py"
    words = [sys.executable, str(example), "host", str(tmp_path / "token"), str(repo)]
    done = subprocess.run(
        [*words, "sh", "-c", "touch made; echo built; exit 3"], capture_output=True, text=True, check=False, timeout=30,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("built\n", "?? made\n", 3)
    words[3] = str(tmp_path / "typo")
    done = subprocess.run([*words, "true"], capture_output=True, text=True, check=False, timeout=30)
    said = f"remote_build: {tmp_path}/typo cannot be read (No such file or directory): copy the daemon's token there.\n"
    assert (done.stdout, done.stderr, done.returncode) == ("", said, 1)


async def test_what_is_no_daemon(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(answer, str(tmp_path / "s"))
    with pytest.raises(ConnectionLostError, match="no daemon of this kind"):
        await Client.connect(str(tmp_path / "s"), token="x")
    server.close()
    await server.wait_closed()


def test_the_daemon_does_not_load_the_client(daemon: Daemon) -> None:
    script = (
        "import sys, sterna.remote.daemon, sterna.remote.launcher\n"
        "sys.exit('asyncio' in sys.modules or 'sterna.remote.client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
