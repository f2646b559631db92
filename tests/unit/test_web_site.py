"""The site in one process, on both event loops: files, names of hosts, a WebSocket, and its end."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sterna import __version__
from sterna.node.app import Node
from sterna.node.config import NodeConfig
from sterna.node.logs import Brake
from sterna.transport.listen import tcp_socket
from sterna.trust.pins import local_pin
from sterna.web import site as site_module
from sterna.web.http import HttpConnection
from sterna.web.pages import STATIC, TYPES, load, takes_gzip
from sterna.web.site import UNREAD_MAX_BYTES, Site, host_name


@pytest.fixture
def short_directory() -> Iterator[Path]:
    # A Unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="st-"))
    yield path
    shutil.rmtree(path)


class Served:
    """A node with its site in this process."""

    def __init__(self, node: Node, site: Site, port: int, context: ssl.SSLContext) -> None:
        self.node, self.site, self.port, self.context = node, site, port, context

    async def ask(self, text: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)
        writer.write(text.replace("\n", "\r\n").encode())
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            found = [line for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")]
            return head + (await reader.readexactly(int(found[0][16:])) if found else b"")
        finally:
            writer.close()


@pytest.fixture
async def served(short_directory: Path) -> AsyncIterator[Served]:
    state = str(short_directory / "n")
    node = Node(NodeConfig(port=0, state=state, sockets=str(short_directory / "p")))
    sock = tcp_socket("127.0.0.1", 0)
    node.start()
    site = Site(node, node.config.web_hosts())
    site.listen(sock)
    pin = local_pin(state)
    assert pin is not None
    context = pin.context()
    context.set_alpn_protocols(["http/1.1"])
    try:
        yield Served(node, site, sock.getsockname()[1], context)
    finally:
        await site.close()
        await node.close()
        # What was told of the end in a turn of the loop of its own.
        await asyncio.sleep(0.05)


async def test_the_page_and_a_websocket_on_any_loop(served: Served) -> None:
    answer = await served.ask("GET / HTTP/1.1\nHost: localhost\n\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert (Path(STATIC) / "index.html").read_bytes() in answer
    assert (await served.ask("GET /healthz HTTP/1.1\nHost: localhost\n\n")).endswith(b"ok\n")
    answer = await served.ask(
        "GET /ws HTTP/1.1\nHost: localhost\nUpgrade: websocket\nConnection: Upgrade\nSec-WebSocket-Version: 13\n"
        "Sec-WebSocket-Protocol: clawterm.v1\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n\n"
    )
    assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer
    assert b"Sec-WebSocket-Protocol: clawterm.v1\r\n" in answer
    assert b"Extensions" not in answer
    assert served.node.accepted == 1
    served.node.draining = True
    assert b" 503 " in await served.ask("GET /healthz HTTP/1.1\nHost: localhost\n\n")


async def test_files_go_compressed_to_who_takes_that(served: Served) -> None:
    style = (Path(STATIC) / "page.css").read_bytes()

    async def get(more: str) -> tuple[dict[str, str], bytes]:
        answer = await served.ask(f"GET /page.css HTTP/1.1\nHost: localhost\n{more}\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        return {"status": status[9:12], **dict(line.split(": ", 1) for line in lines)}, body

    plain, body = await get("")
    assert body == style
    assert "Content-Encoding" not in plain
    packed, body = await get("Accept-Encoding: br, gzip;q=0.5\n")
    assert gzip.decompress(body) == style
    assert len(body) < len(style) / 2
    assert packed["Content-Encoding"] == "gzip"
    assert packed["Content-Type"] == plain["Content-Type"] == TYPES[".css"]
    assert packed["Vary"] == plain["Vary"] == "Accept-Encoding"
    assert packed["ETag"] != plain["ETag"]
    for more, tag, status in (
        ("Accept-Encoding: gzip\n", packed["ETag"], "304"), ("", plain["ETag"], "304"),
        ("Accept-Encoding: gzip\n", plain["ETag"], "200"), ("", packed["ETag"], "200"),
    ):  # fmt: skip
        again, _ = await get(f"{more}If-None-Match: {tag}\n")
        assert again["status"] == status
        assert again["Vary"] == "Accept-Encoding"
    answer = await served.ask("GET /icon-192.png HTTP/1.1\nHost: localhost\nAccept-Encoding: gzip\n\n")
    assert answer.endswith((Path(STATIC) / "icon-192.png").read_bytes())
    assert b"Vary" not in answer.partition(b"\r\n\r\n")[0]


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        ("", False), ("gzip", True), ("br, GZIP", True), ("gzip;q=0", False), ("gzip; q=0.000", False),
        ("gzip;q=0.1", True), ("*", True), ("*;q=0", False), ("*, gzip;q=0", False), ("identity", False),
        ("x-gzip2", False), (",;,", False),
    ],
)  # fmt: skip
def test_who_takes_gzip(accepted: str, takes: bool) -> None:
    assert takes_gzip(accepted) is takes


async def test_the_node_says_who_it_is(served: Served) -> None:
    head, _, body = (await served.ask("GET /node HTTP/1.1\nHost: localhost:7222\n\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: application/json" in head
    assert b"Cache-Control: no-store\r\n" in head
    told = json.loads(body)
    assert told == {"id": served.node.identity.node_id.hex(), "name": "localhost", "version": __version__}
    served.node.config.names = ["build.example", "other.example"]
    assert b'"build.example"' in await served.ask("GET /node HTTP/1.1\nHost: localhost\n\n")
    assert b" 421 " in await served.ask("GET /node HTTP/1.1\nHost: evil.example\n\n")


async def test_a_node_with_too_many_connections_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.node, "adopt", lambda *_args, **_more: False)
    answer = await served.ask(
        "GET /ws HTTP/1.1\nHost: localhost\nUpgrade: websocket\nConnection: Upgrade\nSec-WebSocket-Version: 13\n"
        "Sec-WebSocket-Protocol: clawterm.v1\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n\n"
    )
    assert answer.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Node.Example:7222", "node.example"), ("node.example.", "node.example"), ("[::1]:7222", "::1"),
        ("[0:0::1]", "::1"), ("127.0.0.1", "127.0.0.1"), ("", None), ("a@b", None), ("a:b", None), ("a/b", None),
        ("[::1", None), ("[fe80::1%25eth0]", None), ("a?b", None), ("a#b", None),
        ("n\udcffde", None), ("nöde", None), ("[::ffff:127.0.0.1]", "127.0.0.1"),
    ],
)  # fmt: skip
def test_names_in_host_headers(host: str, name: str | None) -> None:
    assert host_name(host) == name


def test_every_file_of_the_page_has_a_type_and_only_hashed_names_are_kept(tmp_path: Path) -> None:
    files = [path for path in Path(STATIC).rglob("*") if path.is_file()]
    assert len(load()) == len(files), (
        f"files without a type: {[path.name for path in files if path.suffix not in TYPES]}"
    )
    names = {
        "app.3f9c2d1a.js": True, "app-3F9C2D1A.css": True, "sub/font-0123456789abcdef.woff2": True, "app.js": False,
        "service-worker.js": False, "xterm-addon.js": False, "app.3f9c2d1a.js.map": True, "terminal.js": False,
    }  # fmt: skip
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / "secret.pem").write_text("x")
    pages = load(str(tmp_path))
    assert {path[1:]: "immutable" in page.cache for path, page in pages.items()} == names


def test_nothing_in_the_page_needs_another_policy() -> None:
    """No inline script or style and no other host: the policy forbids them."""
    text = (Path(STATIC) / "index.html").read_text(encoding="utf-8")
    assert "<style" not in text
    assert " style=" not in text
    assert "<script>" not in text
    assert "http:" not in text
    assert "https:" not in text


FOREIGN = (
    "GET /ws HTTP/1.1\nHost: localhost\nUpgrade: websocket\nConnection: Upgrade\nSec-WebSocket-Version: 13\n"
    "Sec-WebSocket-Protocol: clawterm.v1\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n"
    "Origin: https://other.example\n\n"
)


async def test_a_page_of_another_site_gets_no_second_request(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=served.context)
    try:
        writer.write(FOREIGN.replace("\n", "\r\n").encode() * 2)
        answers = await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()
    assert answers.count(b"HTTP/1.1 403 ") == answers.count(b"HTTP/1.1") == 1
    assert b"Connection: close" in answers


async def test_of_two_origins_none_is_believed(served: Served) -> None:
    own = FOREIGN.replace("other.example", "localhost")
    assert b" 101 " in await served.ask(own)
    for more in ("https://other.example", "https://localhost"):
        two = own.replace("\n\n", f"\nOrigin: {more}\n\n")
        assert (await served.ask(two)).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))


@pytest.mark.parametrize("more", ["Transfer-Encoding: chunked\n\n0\n", "Content-Length: 1\n\nx"])
async def test_a_request_has_no_body(served: Served, more: str) -> None:
    answer = await served.ask(f"GET / HTTP/1.1\nHost: localhost\n{more}\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in answer


# ---- bounds --------------------------------------------------------------------------------------------------------

ASKED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Visitor:
    """One that connected, says something when it is told to, and reads nothing but what it is asked for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def come(cls, served: Served, address: str = "127.0.0.1") -> Visitor:
        """Its TLS handshake is done, and the site knows it."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.bind((address, 0))
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
        return cls(*await asyncio.open_connection(sock=sock, ssl=served.context, server_hostname="127.0.0.1"))

    async def healthy(self) -> bool:
        """Whether it is answered."""
        self.writer.write(ASKED)
        return (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\nok\n"), 5)).startswith(b"HTTP/1.1 200")

    async def ended(self) -> bool:
        """Whether the site has ended it, without an answer."""
        try:
            return await asyncio.wait_for(self.reader.read(1), 5) == b""
        except ConnectionResetError:
            return True


async def test_one_too_many_makes_the_one_go_that_did_nothing_for_longest(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_module, "PER_ADDRESS_MAX", 3)
    monkeypatch.setattr(site_module, "CONNECTIONS_MAX", 5)
    others = [await Visitor.come(served, "127.0.0.2") for _ in range(2)]
    first, second, third = [await Visitor.come(served) for _ in range(3)]
    assert await first.healthy()
    crowd = [first, third, *others, await Visitor.come(served)]
    assert await second.ended(), "of its address, the first has asked since"
    assert served.site.evicted == 1
    for each in (crowd[2], crowd[1], crowd[0], crowd[4]):
        assert await each.healthy()
    crowd.append(await Visitor.come(served, "127.0.0.3"))
    assert await crowd.pop(3).ended(), "of all, the only one that never asked"
    assert served.site.evicted == 2
    for each in crowd:
        assert await each.healthy()
        each.writer.close()


class Later:
    """The loop, for a sweep of a later time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop, self._seconds = loop, seconds
        self.call_later = loop.call_later

    def time(self) -> float:
        return self._loop.time() + self._seconds


@pytest.mark.parametrize(("asks", "seconds"), [(False, 10), (True, 60)])
async def test_who_asks_or_takes_nothing_is_swept_out_in_time(
    served: Served, monkeypatch: pytest.MonkeyPatch, asks: bool, seconds: int
) -> None:
    visitor = await Visitor.come(served)
    assert not asks or await visitor.healthy()
    for later, left in ((seconds - 2, 1), (seconds + 1, 0)):
        served.site._timer.cancel()
        monkeypatch.setattr(served.site, "_loop", Later(asyncio.get_running_loop(), later))
        served.site._sweep()
        await asyncio.sleep(0)
        assert len(served.site._open) == left
    assert await visitor.ended()


async def test_answers_that_nobody_takes_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before that ends any connection; who reads gets any number of them."""
    queued = []

    def abort(connection: HttpConnection) -> None:
        queued.append(connection.queued)
        HttpConnection.close(connection)

    monkeypatch.setattr(HttpConnection, "abort", abort)
    asked, size = ASKED.replace(b"healthz", b"page.css"), len((Path(STATIC) / "page.css").read_bytes())
    deaf, honest = await Visitor.come(served), await Visitor.come(served)
    async with asyncio.timeout(10):
        while not queued:
            deaf.writer.write(asked)
            honest.writer.write(asked)
            await honest.reader.readuntil(b"\r\n\r\n")
            await honest.reader.readexactly(size)
    assert UNREAD_MAX_BYTES < queued[0] < UNREAD_MAX_BYTES + 2 * size
    assert await honest.healthy()
    for each in (deaf, honest):
        each.writer.close()


async def test_pages_of_other_sites_do_not_fill_the_log(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # No line but those of the burst, until the next sweep is made by hand.
    monkeypatch.setattr(served.site, "_lines", Brake(3, 0))
    for _ in range(8):
        assert b" 403 " in await served.ask(FOREIGN)
    lines = [record for record in caplog.records if record.name == "sterna.web"]
    assert [record.getMessage() for record in lines] == ["foreign origin"] * 3
    assert served.site._lines.left_out == 5
    monkeypatch.setattr(served.site._lines, "_left", 1.0)
    served.site._timer.cancel()
    served.site._sweep()
    last = [record for record in caplog.records if record.name == "sterna.web"][3:]
    assert [vars(record)["left_out"] for record in last] == [5]
