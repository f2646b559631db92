"""The web port from outside: who may come in, who is refused while others go on, and that not a byte is lost by it.

Run as a program it is a node without one of its checks, for the controls: `test_web BREAK STATE SOCKETS PORT WEB_PORT`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import os
import random
import select
import shutil
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from sterna import limits
from sterna.protocol import messages
from sterna.protocol.frame import Type
from sterna.protocol.messages import Accept, Resumed
from tests.e2e.exact_duplex import stream
from tests.e2e.exact_rig import HERE, ByteCutProxy, new_seed, size_of
from tests.e2e.raw_client import Raw, Site, new_device, unharmed
from tests.e2e.rig import Daemon, Rig, free_port, wait_for
from tests.integration.test_websocket import RefusedError, WebRaw, WebSock, client_frame, request

pytestmark = pytest.mark.xdist_group("web")

PIECE_BYTES = 32 * 1024
HALF_OPEN = 500
PER_ADDRESS_MAX = 64
SLOW_SECONDS = 10


# ---- nodes that lack a check -------------------------------------------------------------------------------------


def _break(name: str) -> None:
    """Takes one check out of the site."""
    from sterna.transport import websocket
    from sterna.web import http, site

    changes: dict[str, list[tuple[Any, str, Any]]] = {
        "origin": [(site.Site, "_same_origin", staticmethod(lambda _request: True))],
        "refusal": [(site.Site, "_refusal", lambda *_args: None)],
        "subprotocol": [(site, "SUBPROTOCOL", "other.v1")],
        "frames": [(websocket.Reader, "_check", lambda *_args: True)],
        "slow": [(limits, "HANDSHAKE_SECONDS", 10_000), (http, "IDLE_SECONDS", 10_000.0)],
        "many": [(site, "PER_ADDRESS_MAX", 1 << 20), (site, "CONNECTIONS_MAX", 1 << 20)],
        "headers": [(http, "HEADERS", {}), (site, "HEADERS", {})],
    }
    for owner, attribute, value in changes[name]:
        assert hasattr(owner, attribute)
        setattr(owner, attribute, value)


def main() -> None:
    from sterna.cli.loop import run
    from sterna.cli.serve import serve_node
    from sterna.node.config import NodeConfig

    name, state, sockets, port, web_port = sys.argv[1:6]
    _break(name)
    config = NodeConfig(
        port=int(port), web_port=int(web_port), state=os.path.join(state, "node"), sockets=sockets,
        unauthenticated_per_address=1 << 10,
    )  # fmt: skip
    os.makedirs(config.state, 0o700, exist_ok=True)
    run(serve_node(config, lambda about: print(f"listening on {about.port}", flush=True)))


class Web:
    """A running node and its web port."""

    def __init__(self, rig: Rig, port: int) -> None:
        self.rig = rig
        self.port = port
        self.site = Site(rig)

    def client(self, **options: Any) -> WebRaw:
        return WebRaw(self.site, self.port, **options)

    def tls(self) -> ssl.SSLSocket:
        return self.site.context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 8))

    def ask(self, method: str = "GET", path: str = "/", **headers: str) -> http.client.HTTPResponse:
        """Asks once; the answer was read and can be looked at."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.site.context, timeout=8)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            answer.text = answer.read().decode()  # type: ignore[attr-defined]  # for the test's own use
            return answer
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """What comes back for some bytes, up to the connection's end or a moment of silence."""
        with self.tls() as tls:
            tls.settimeout(0.3)
            tls.sendall(data)
            answer = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while more := tls.recv(65536):
                    answer += more
            return answer

    def upgrade(self, **changes: str | None) -> int:
        """Asks for a WebSocket with changed headers; returns the status."""
        ask = request(f"127.0.0.1:{self.port}", **changes)
        try:
            WebSock.open(self.site.context, self.port, ask=ask).close()
        except RefusedError as error:
            return error.status
        return 101


@contextlib.contextmanager
def started(*options: str) -> Iterator[Web]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        port = free_port()
        rig.start_node("--web-port", str(port), *options)
        yield Web(rig, port)


@contextlib.contextmanager
def broken(name: str) -> Iterator[Web]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        port = free_port()
        words = [sys.executable, "-m", "tests.e2e.test_web", name, os.fspath(rig.state), os.fspath(rig.sockets)]
        env = {**rig.env, "PYTHONPATH": f"{rig.env['PYTHONPATH']}:{HERE.parents[1]}"}
        node = rig.node = Daemon([*words, str(rig.port), str(port)], env, rig.directory / "node.log")
        wait_for(lambda: node.first_line() or not node.running, name="the node")
        yield Web(rig, port)


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with started() as found:
        yield found


# ---- the page ----------------------------------------------------------------------------------------------------

STRICT = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; font-src 'self'; "
        "manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def every_answer(web: Web) -> list[tuple[int, dict[str, str]]]:
    """The status and headers of one answer of every kind."""
    upgrade = request(f"127.0.0.1:{web.port}")
    host = f"Host: 127.0.0.1:{web.port}\r\n".encode()
    asked = [
        b"GET / HTTP/1.1\r\n" + host, b"HEAD / HTTP/1.1\r\n" + host, b"GET /page.js HTTP/1.1\r\n" + host,
        b"GET /healthz HTTP/1.1\r\n" + host, b"GET /node HTTP/1.1\r\n" + host, b"GET /none HTTP/1.1\r\n" + host,
        b"POST / HTTP/1.1\r\n" + host, b"GET / HTTP/1.1\r\nHost: evil.example\r\n", b"GET / HTTP/1.1\r\n",
        b"nonsense\r\n", b"GET /ws HTTP/1.1\r\n" + host,
        b"GET / HTTP/1.1\r\nContent-Length: 5\r\n" + host, b"GET / HTTP/1.1\r\nX: " + bytes(9000) + b"\r\n" + host,
        b"GET / HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n" + host, b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n" + host,
        upgrade.replace(b"clawterm.v1", b"other")[:-2], upgrade.replace(b"Host", b"Origin: https://evil.example\r\nHost")[:-2],
        upgrade[:-2],
    ]  # fmt: skip
    found = []
    for data in asked:
        head = web.raw(data + b"\r\n").partition(b"\r\n\r\n")[0].decode("latin-1")
        first, *lines = head.split("\r\n")
        assert first.startswith(("HTTP/1.1 ", "HTTP/1.0 400 ")), (data[:60], head)
        found.append((int(first.split()[1]), dict(line.split(": ", 1) for line in lines)))
    return found


def faults(answers: list[tuple[int, dict[str, str]]]) -> list[str]:
    return [
        f"{status}: {name}"
        for status, headers in answers
        for name in STRICT
        if headers.get(name) != STRICT[name] or "Set-Cookie" in headers
    ]


def test_every_answer_has_the_strict_headers_and_no_cookie(web: Web) -> None:
    answers = every_answer(web)
    statuses = [status for status, _ in answers]
    assert statuses == [200, 200, 200, 200, 200, 404, 405, 421, 400, 400, 426, 413, 400, 400, 400, 400, 403, 101]
    assert faults(answers) == []
    assert all("aiohttp" not in headers.get("Server", "") for _, headers in answers)


def test_files_have_their_types_and_are_asked_for_again(web: Web) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer = web.ask(path=path)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-cache"
        assert web.ask(path=path, If_None_Match=answer.headers["ETag"]).status == 304
        assert web.ask(path=path, If_None_Match='"other"').status == 200
    for path in ("/index.html", "/../site.py", "/%2e%2e/site.py", "//page.js", "/static/page.js", "/page.js/"):
        assert web.ask(path=path).status == 404


def test_only_get_and_head(web: Web) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "PROPFIND"):
        answer = web.ask(method, "/")
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET, HEAD"
    for method in ("X", "CONNECT"):
        assert web.ask(method, "/").status in (400, 405)
    head = web.ask("HEAD", "/page.js")
    assert (head.status, head.text) == (200, "")  # type: ignore[attr-defined]  # set by `ask`


# ---- who may come in ---------------------------------------------------------------------------------------------

ANY = "0.0.0.0"  # noqa: S104 -- on purpose: the test is about it
FOREIGN_ORIGINS = (
    "https://evil.example", "null", "http://127.0.0.1:{port}", "https://127.0.0.1", "https://127.0.0.1:1",
    "https://localhost:{port}", "https://127.0.0.1:{port}.evil.example", "https://evil@127.0.0.1:{port}", "",
)  # fmt: skip


def foreign(web: Web) -> list[int]:
    """What foreign pages get."""
    found = [web.upgrade(Origin=origin.replace("{port}", str(web.port))) for origin in FOREIGN_ORIGINS]
    same = f"https://127.0.0.1:{web.port}"
    return [*found, *(web.upgrade(Origin=same, Sec_Fetch_Site=site) for site in ("cross-site", "same-site"))]


def test_a_foreign_page_is_refused(web: Web) -> None:
    with unharmed(web.site):
        assert set(foreign(web)) == {403}
        assert web.upgrade(Origin=f"https://127.0.0.1:{web.port}") == 101
        assert web.upgrade(Origin=f"https://127.0.0.1:{web.port}", Sec_Fetch_Site="same-origin") == 101
        assert web.upgrade() == 101


FOREIGN_HOSTS = (
    "evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "192.0.2.1", "localhost@evil.example", "", "[::1",
    "localhost:x", "evil.example/localhost", "localhost localhost", "127.0.0.1, localhost", "[::1%25lo]",
)  # fmt: skip
OWN_HOSTS = ("127.0.0.1", "localhost", "LOCALHOST:{port}", "[::1]:{port}", "127.0.0.1:443", "localhost.")


def hosts(web: Web, names: tuple[str, ...]) -> list[int]:
    """What a page and a WebSocket under each of these names get."""
    found = []
    for name in names:
        host = name.replace("{port}", str(web.port))
        found += [web.ask(Host=host).status, web.upgrade(Host=host)]
    return found


def test_another_host_is_refused(web: Web) -> None:
    """A page whose name was made to point here (DNS rebinding) gets nothing."""
    with unharmed(web.site):
        assert set(hosts(web, FOREIGN_HOSTS)) <= {400, 421}
        assert hosts(web, FOREIGN_HOSTS)[:8] == [421] * 8
        assert set(hosts(web, OWN_HOSTS)) == {200, 101}
        said = web.ask(Host="evil.example")
        assert said.text.strip() == (  # type: ignore[attr-defined]  # set by `ask`
            "No node is called evil.example here: name it in the node's setting names or web_names."
        )
        two = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
        assert web.raw(two).split()[1] in (b"400", b"421")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_configured_name_and_the_address_reached_are_allowed() -> None:
    with Rig() as rig:
        port, state = free_port(), os.fspath(rig.state / "node")
        options = [
            "--host",
            ANY,
            "--name",
            "node.example",
            "--web-name",
            "Proxy.example",
            "--web-port",
            str(port),
        ]
        words = rig.words(
            "node", "--port", str(rig.port), "--state", state, "--sockets", os.fspath(rig.sockets), *options
        )
        rig.node = Daemon(words, rig.env, rig.directory / "node.log")
        wait_for((rig.state / "node" / "local.token").exists, name="the node")
        web = Web(rig, port)
        wait_for(lambda: answers(port), name="its web port")
        assert hosts(web, ("node.example", "proxy.example", "PROXY.example:8443")) == [200, 101] * 3
        assert hosts(web, (ANY, "other.example")) == [421] * 4


@pytest.mark.parametrize("offered", [None, "other.v1", "clawterm.v2, clawterm.v11", "CLAWTERM.V1", ""])
def test_a_foreign_subprotocol_is_refused_before_the_upgrade(web: Web, offered: str | None) -> None:
    with unharmed(web.site):
        assert web.upgrade(Sec_WebSocket_Protocol=offered) == 400
        assert web.upgrade(Sec_WebSocket_Protocol="other.v1, clawterm.v1") == 101


@pytest.mark.parametrize(
    "changes",
    [
        {"Upgrade": "h2c"}, {"Upgrade": None}, {"Sec-WebSocket-Version": "8"}, {"Sec-WebSocket-Key": "short"},
        {"Sec-WebSocket-Key": None}, {"Sec-WebSocket-Key": "*" * 24},
    ],
)  # fmt: skip
def test_half_a_request_for_an_upgrade_is_refused(web: Web, changes: dict[str, str | None]) -> None:
    assert web.upgrade(**changes) == 426


def test_no_request_makes_the_node_fail(web: Web) -> None:
    """Requests with random bytes in them: answered or ended, never an error in the log."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    host = f"127.0.0.1:{web.port}"
    tail = f" HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    lines = (b"GET /", b"GET http://[", b"GET //[", b"GET /%zz", b"GET *", b"GET /\xff", b"HEAD /ws")
    known = [request(host), request(host, Origin="null"), *(line + tail for line in lines)]
    known += [
        b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost:99999999\r\n\r\n",
        request(host).replace(b"Host", b"Origin: \xff\xfe\r\nHost"), request(host).replace(b"==\r\n", b"\xff=\r\n"),
        b"POST /" + tail[:-2] + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]  # fmt: skip
    for turn in range(200):
        data = bytearray(known[turn] if turn < len(known) else rng.choice(known))
        for _ in range(0 if turn < len(known) else rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with web.tls() as tls, contextlib.suppress(TimeoutError, ConnectionResetError):
            tls.settimeout(0.1)
            tls.sendall(data)
            assert b" 500 " not in tls.recv(4096)[:16], bytes(data)
    assert web.rig.node is not None
    assert '"level": "error"' not in web.rig.node.output()
    assert web.ask().status == 200


# ---- slow and many -----------------------------------------------------------------------------------------------


def trickle(web: Web, seconds: float) -> float:
    """Sends a request byte by byte for as long as the node listens; returns how long that was."""
    start = time.monotonic()
    with web.tls() as tls:
        tls.settimeout(0.2)
        for byte in b"GET / HTTP/1.1\r\nX: " + b"x" * 1000:
            with contextlib.suppress(TimeoutError):
                try:
                    tls.sendall(bytes((byte,)))
                    if not tls.recv(1):
                        break
                except (ConnectionResetError, BrokenPipeError, ssl.SSLError):
                    break
            if time.monotonic() - start > seconds:
                break
    return time.monotonic() - start


def test_a_slow_request_is_given_up(web: Web) -> None:
    with unharmed(web.site):
        assert SLOW_SECONDS - 2 < trickle(web, 20) < SLOW_SECONDS + 4


def left(socks: list[ssl.SSLSocket]) -> int:
    """How many the node has not ended."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLRDHUP)
    return len(socks) - len(poll.poll(0))


def half_open(web: Web) -> tuple[int, int]:
    """Five hundred that did their TLS handshake and say nothing, then half a request; how many are kept of each."""
    kept = []
    for first in (b"", b"GET / HTTP/1.1\r\nHost: local"):
        with contextlib.ExitStack() as stack:
            socks = []
            for _ in range(HALF_OPEN):
                socks.append(stack.enter_context(web.tls()))
                if first:
                    socks[-1].sendall(first)
            time.sleep(0.2)
            kept.append(left(socks))
    return kept[0], kept[1]


def test_half_open_connections_are_few_and_honest_ones_come_in(web: Web) -> None:
    with unharmed(web.site, 24):
        assert max(half_open(web)) <= PER_ADDRESS_MAX
        assert web.ask().status == 200
    with unharmed(web.site, 24), contextlib.ExitStack() as stack:
        # WebSockets that prove nothing are the node's: unauthenticated_max counts them, and they end after 10 s.
        raws = [stack.enter_context(web.client()) for _ in range(HALF_OPEN)]
        assert web.ask().status == 200
        with web.client() as honest:
            honest.connect()
            assert honest.echo(b"hello", 0) == b"hello"
        wait_for(lambda: left([raw.web.tls for raw in raws]) == 0, limits.HANDSHAKE_SECONDS + 4, name="all to be ended")


def test_many_requests_at_once_whose_answers_nobody_takes_are_ended(web: Web) -> None:
    with unharmed(web.site):
        line = f"GET /page.js HTTP/1.1\r\nHost: 127.0.0.1:{web.port}\r\n\r\n".encode()
        with web.tls() as tls:
            tls.settimeout(3)
            try:
                for _ in range(3000):
                    tls.sendall(line * 30)
            except (TimeoutError, ssl.SSLError, ConnectionResetError, BrokenPipeError) as error:
                print(f"ended by {error!r}")
            else:
                raise AssertionError("90,000 requests were taken whose answers were not")


# ---- controls ----------------------------------------------------------------------------------------------------


def _text(web: Web) -> int:
    with web.client() as raw:
        raw.connect()
        raw.web.tls.sendall(client_frame(1, b"CL"))
        raw.ended()
        return raw.web.close_code


CONTROLS: dict[str, Callable[[Web], bool]] = {
    "origin": lambda web: set(foreign(web)) != {403},
    "refusal": lambda web: 421 not in hosts(web, FOREIGN_HOSTS) and web.ask("POST").status != 405,
    "subprotocol": lambda web: web.upgrade(Sec_WebSocket_Protocol="other.v1") == 101,
    "frames": lambda web: _text(web) != 1003,
    "slow": lambda web: trickle(web, SLOW_SECONDS + 5) > SLOW_SECONDS + 4,
    "many": lambda web: max(half_open(web)) > PER_ADDRESS_MAX,
    "headers": lambda web: bool(faults(every_answer(web)[:5])),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_a_node_without_the_check_is_caught(name: str) -> None:
    with broken(name) as web:
        assert CONTROLS[name](web)


# ---- behind a reverse proxy --------------------------------------------------------------------------------------

NGINX = """
daemon off; pid {d}/pid; error_log {d}/error.log; events {{}}
http {{
    access_log off;
    client_body_temp_path {d}/1; proxy_temp_path {d}/2; fastcgi_temp_path {d}/3; uwsgi_temp_path {d}/4;
    scgi_temp_path {d}/5;
    map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
    server {{
        listen 127.0.0.1:{port} ssl;
        server_name term.example;
        ssl_certificate {d}/cert.pem;
        ssl_certificate_key {d}/cert.pem;
        location / {{
            proxy_pass https://127.0.0.1:{web};
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {state}/node.crt;
            proxy_ssl_name localhost;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_buffering off;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_words_for_nginx_in_the_documentation_work() -> None:
    authority = trustme.CA()
    with started("--web-name", "term.example") as web:
        directory, port = web.rig.directory, free_port()
        authority.issue_cert("term.example").private_key_and_cert_chain_pem.write_to_path(f"{directory}/cert.pem")
        text = NGINX.format(d=directory, port=port, web=web.port, state=web.site.state)
        (directory / "nginx.conf").write_text(text)
        words = ["nginx", "-e", f"{directory}/error.log", "-c", f"{directory}/nginx.conf"]
        nginx = Daemon(words, dict(os.environ), directory / "nginx.log")
        try:
            wait_for(lambda: answers(port) or not nginx.running, name="nginx")
            context = ssl.create_default_context()
            context.check_hostname = False
            authority.configure_trust(context)
            host = f"term.example:{port}"
            ask = request(host, Origin=f"https://{host}")
            web.site.context = context
            with WebRaw(web.site, port, ask=ask) as raw:
                raw.connect()
                assert raw.echo(b"through nginx", 0) == b"through nginx"
            for refused, status in (({"Origin": "https://evil.example"}, 403), ({"Host": "evil.example"}, 421)):
                with pytest.raises(RefusedError) as caught:
                    WebRaw(web.site, port, ask=request(host, **refused))
                assert caught.value.status == status
        finally:
            nginx.destroy()


# ---- exactness ---------------------------------------------------------------------------------------------------


class Duplex(threading.Thread):
    """A client over WebSocket that sends and gets a stream through any number of lost connections.

    With `careless` it asks for bytes again that it has got, and keeps both.
    """

    def __init__(self, web: Web, port: int, seed: int, size: int, *, careless: bool = False) -> None:
        super().__init__(daemon=True)
        self._web, self._port, self._size, self._careless = web, port, size, careless
        self._source = b"".join(stream(f"{seed}-in", size))
        self._device, self._attachment, self._request = new_device(), os.urandom(16), os.urandom(16)
        self._accept: Accept | None = None
        self.digest = hashlib.sha256()
        self.tail = b""
        self.got = self._acked = self._sent = self._handled = 0
        self.connections = 0
        self.fault = ""
        self._closed = False

    def run(self) -> None:
        deadline = time.monotonic() + 100
        try:
            while not self._closed and time.monotonic() < deadline:
                try:
                    with WebRaw(self._web.site, self._port, device=self._device) as raw:
                        self.connections += 1
                        if self._begin(raw):
                            self._go(raw)
                except (OSError, RefusedError, EOFError):
                    time.sleep(0.02)
        except AssertionError as error:
            self.fault = str(error)

    def reached(self, position: int) -> bool:
        """Whether so much output came, or something went wrong."""
        return self.got >= position or bool(self.fault)

    def _answer(self, raw: Raw) -> tuple[int, bytes]:
        while (frame := raw.frame()) is not None:
            if frame[0] in (Type.ACCEPT, Type.RESUMED, Type.ERROR, Type.CLOSE):
                return frame[0], frame[3]
        raise EOFError

    def _begin(self, raw: WebRaw) -> bool:
        if self._accept is None:
            body = raw.connect_body(agent="duplex", request=self._request, attachment=self._attachment)
            raw.send(Type.CONNECT, 1, 0, raw.signed(body))
        else:
            again = max(0, self.got - 70_000) if self._careless else self.got
            more = {"output": again, "sent": self._sent}
            raw.send(Type.RESUME, 1, 0, raw.signed(raw.resume_body(self._accept, self._attachment, **more)))
        kind, payload = self._answer(raw)
        if kind == Type.ACCEPT:
            self._accept = messages.unpack(Accept, payload)
            self._sent = self._handled = self._accept.input
        elif kind == Type.RESUMED:
            resumed = messages.unpack(Resumed, payload)
            assert resumed.lost is None, "the node lost output"
            if resumed.input is not None:
                self._sent = self._handled = resumed.input
            if self._careless:
                self.got = resumed.output
            assert resumed.output == self.got, f"output goes on at {resumed.output}, wanted {self.got}"
        else:
            text = messages.unpack(messages.Error, payload).message if kind == Type.ERROR else "closed"
            self._closed = kind == Type.CLOSE
            raise EOFError(text)
        return True

    def _go(self, raw: WebRaw) -> None:
        while True:
            while self._sent < self._size and self._sent - self._handled <= limits.WINDOW_BYTES - PIECE_BYTES:
                piece = self._source[self._sent : self._sent + PIECE_BYTES]
                raw.send(Type.DATA, 1, self._sent & 0xFFFFFFFF, piece)
                self._sent += len(piece)
            if self._sent == self._size:
                raw.send(Type.EOF, 1, self._sent & 0xFFFFFFFF)
                self._sent += 1
            frame = raw.frame()
            if frame is None:
                return
            kind, _, seq, payload = frame
            if kind == Type.DATA:
                self._take(raw, seq, payload)
            elif kind == Type.ACK:
                self._handled = max(self._handled, int.from_bytes(payload, "big"))
            elif kind == Type.CLOSE:
                self._closed = True
                return
            elif kind == Type.ERROR:
                return

    def _take(self, raw: WebRaw, seq: int, payload: bytes) -> None:
        assert seq == self.got & 0xFFFFFFFF, f"output at {seq}, wanted {self.got}"
        self.got += len(payload)
        self.digest.update(payload)
        self.tail = (self.tail + payload)[-200:]
        if self.got - self._acked >= limits.ACK_EVERY_BYTES or len(payload) < 1000:
            self._acked = self.got
            raw.send(Type.ACK, 1, self.got & 0xFFFFFFFF, self.got.to_bytes(8, "big"))


def expected(seed: int, size: int) -> str:
    """The SHA-256 of all that the program writes when it got everything once."""
    digest, put = hashlib.sha256(), hashlib.sha256()
    for block in stream(f"{seed}-out", size):
        digest.update(block)
    for block in stream(f"{seed}-in", size):
        put.update(block)
    digest.update(f"\nread {size} sha256 {put.hexdigest()} wrong -1\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def duplex(seed: int, size: int) -> Iterator[Web]:
    with Rig() as rig:
        program = os.fspath(Path(HERE) / "exact_duplex.py")
        rig.start_pod("duplex", sys.executable, program, str(seed), str(size), kind="stream")
        port = free_port()
        rig.start_node("--web-port", str(port))
        yield Web(rig, port)


def through_cuts(size: int, cuts: int, *, careless: bool = False) -> tuple[Duplex, str, int]:
    seed = new_seed()
    with duplex(seed, size) as web:
        proxy = ByteCutProxy(web.port, seed, 2 * size // (cuts + 12), cuts)
        try:
            client = Duplex(web, proxy.port, seed, size, careless=careless)
            start = time.monotonic()
            client.start()
            client.join(110)
        finally:
            proxy.close()
        print(
            f"{size / 1e6:.0f} MB each way in {time.monotonic() - start:.1f} s: {proxy.cuts} cuts, "
            f"{client.connections} connections, {client.tail[-120:]!r} {client.fault}"
        )
        return client, expected(seed, size), proxy.cuts


@pytest.mark.timeout(150)
def test_every_byte_arrives_once_through_a_hundred_cuts() -> None:
    client, digest, cuts = through_cuts(size_of(20), 110)
    assert client.fault == ""
    assert cuts >= 100
    assert client.digest.hexdigest() == digest


@pytest.mark.timeout(150)
def test_control_a_client_that_takes_bytes_twice_is_caught() -> None:
    client, digest, _ = through_cuts(size_of(3), 20, careless=True)
    assert client.digest.hexdigest() != digest


def connected(client: Duplex, times: int) -> bool:
    return client.connections >= times


@pytest.mark.timeout(150)
def test_a_killed_node_goes_on_exactly_where_it_was() -> None:
    seed, size = new_seed(), size_of(12)
    rng = random.Random(seed)
    with duplex(seed, size) as web:
        client = Duplex(web, web.port, seed, size)
        client.start()
        for part in range(1, 5):
            goal = part * size // 6 + rng.randrange(size // 20)
            wait_for(functools.partial(client.reached, goal), 40, name=f"{goal} bytes")
            # What it has may have come before the last kill.
            wait_for(functools.partial(connected, client, part), name="its next connection")
            web.rig.kill_node()
            web.rig.start_node("--web-port", str(web.port))
        client.join(60)
        assert client.fault == ""
        assert client.connections >= 5
        assert client.digest.hexdigest() == expected(seed, size)


if __name__ == "__main__":
    main()
