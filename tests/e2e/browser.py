"""The page as people use it: Debian's Chromium, headless, on the real page of a real node, driven by Playwright.

`Web` is a node with its web page, `Chromium` a browser, `View` one tab of it. What a view received is compared on the
bytes that the JavaScript client handed out (`View.collect`), not on the screen. Every view complains at its end about
what no test may cause: violations of the Content-Security-Policy, script errors, dialogs, requests to another place.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.rig import START_SECONDS, Rig, free_port, wait_for

try:
    from playwright.sync_api import Browser, BrowserContext, CDPSession, Dialog, Page, sync_playwright
except ImportError:  # the tests are skipped, and say so
    MISSING = "Playwright is not installed: run `make test`"
else:
    MISSING = "" if shutil.which("chromium") else "chromium is not installed: run `make test` as root"

needed = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.xdist_group("page")]
"""What every module with tests of the page has as its `pytestmark`."""

# A certificate that nobody vouches for: browsers let people open the page, but keep nothing of it.
_UNTRUSTED = "error occurred when fetching the script."
_OFFLINE = re.compile(r"net::ERR_(INTERNET_DISCONNECTED|CONNECTION_REFUSED|CONNECTION_RESET|CONNECTION_CLOSED)")

_WATCH = """
window.violations = [];
window.seen = () => sterna.tabs.find((tab) => tab.active);
document.addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
"""

# `fault` makes the control: the first event with that text is dropped or doubled before it is compared.
_COLLECT = """
(fault) => {
  const collected = { parts: [], length: 0, next: null, breaks: 0, spoiled: false };
  window.collected = collected;
  const { session } = seen();
  session.on("data", (data, position) => {
    if (collected.next !== null && position !== collected.next) collected.breaks++;
    collected.next = position + data.length;
    const spoil = fault && !collected.spoiled && new TextDecoder().decode(data).includes(fault.text);
    collected.spoiled ||= spoil;
    for (let i = 0; i < (spoil ? fault.times : 1); i++) {
      collected.parts.push(data.slice());
      collected.length += data.length;
    }
  });
}
"""

_COLLECTED = """
async () => {
  const whole = await new Blob(collected.parts).arrayBuffer();
  const url = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(new Blob([whole]));
  });
  return url.slice(url.indexOf(",") + 1);
}
"""

_DIGEST = """
async () => {
  const whole = new Uint8Array(collected.length);
  let at = 0;
  for (const part of collected.parts) { whole.set(part, at); at += part.length; }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", whole));
  collected.parts = [];
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
"""

_TEXT = """
() => {
  const tab = seen();
  if (!tab) return "";
  const buffer = tab.terminal.buffer.active;
  const lines = [];
  for (let y = 0; y < buffer.length; y++) lines.push(buffer.getLine(y).translateToString(true).trimEnd());
  return lines.join("\\n").trimEnd();
}
"""


class Web:
    """A node with a web page, and bash as its agent `main`."""

    def __init__(self, rig: Rig, *options: str) -> None:
        self.rig = rig
        self.port = free_port()
        self._options = ("--web-port", str(self.port), "--quic-port", "0", *options)
        self._numbers = itertools.count(1)
        self.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Starts the node, for the first time or again."""
        self.rig.start_node(*self._options)

    def session(self, *command: str, name: str | None = None) -> str:
        """Makes a new session, of bash unless `command` is another; returns its name."""
        name = name or f"s{next(self._numbers)}"
        done = self.rig.sterna("new", "--name", name, *(["--", *command] if command else []))
        assert done.returncode == 0, done.stderr
        return name

    def link(self, *options: str) -> str:
        """Returns the link of `sterna share`."""
        url: str = self.rig.json("share", "--local", *options)["web"]
        return url

    def about(self, name: str) -> dict[str, Any]:
        """What the node says of a session."""
        info: dict[str, Any] = self.rig.json("info", name)
        return info


@contextlib.contextmanager
def web_running(*options: str) -> Iterator[Web]:
    with Rig() as rig:
        yield Web(rig, *options)


class View:
    """One tab of a browser."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.sockets: list[str] = []
        self.said: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", self._asked)
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("request", lambda request: self.requests.append(f"{request.url} {request.headers} {request.post_data}"))
        self.devtools: CDPSession = page.context.new_cdp_session(page)
        self.devtools.send("Network.enable")
        shaken = "Network.webSocketWillSendHandshakeRequest"
        self.devtools.on(shaken, lambda event: self.sockets.append(str(event["request"]["headers"])))
        page.on("websocket", lambda socket: self.sockets.append(socket.url))

    def _asked(self, dialog: Dialog) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    # ---- the page ----------------------------------------------------------------------------------------------

    def eval(self, expression: str, argument: Any = None) -> Any:
        return self.page.evaluate(expression, argument)

    def wait(self, expression: str, seconds: float = START_SECONDS) -> Any:
        """Waits until an expression of the page is true; returns its value."""
        return wait_for(lambda: self.eval(f"() => {expression}"), seconds, name=expression)

    def open(self, url: str) -> None:
        """Opens a link to one session, and waits until it is there."""
        self.page.goto(url)
        self.wait(
            "globalThis.sterna && (document.querySelector('#add-link') || (seen() && seen().state !== 'connecting'))"
        )
        if self.page.locator("#add-link").count():
            self.page.click("#add-link [data-answer=yes]")
        self.attached()

    def attached(self) -> None:
        """Waits until the tab that is seen is attached to its session."""
        state = self.wait("globalThis.sterna && ['open', 'failed', 'ended'].includes(seen()?.state) && seen().state")
        assert state == "open", self.page.inner_text("body")

    def tab(self) -> dict[str, Any]:
        """What the page says of the tab that is seen."""
        keys = "({ uid, name, state, others }) => ({ uid, name, state, others })"
        found: dict[str, Any] = self.eval(f"() => sterna.tabs.filter((tab) => tab.active).map({keys})[0]")
        return found

    def complaints(self) -> list[str]:
        """What no test may cause."""
        allowed = [text for text in self.said if _UNTRUSTED in text or _OFFLINE.search(text)]
        bad = [text for text in self.said if text.startswith("error") and text not in allowed]
        violations = [] if self.page.is_closed() else self.eval("() => window.violations ?? []")
        return [*self.errors, *bad, *violations]

    def hosts(self) -> set[str]:
        """Where all requests went."""
        urls = [text.split()[0] for text in self.requests] + [text for text in self.sockets if "://" in text[:6]]
        return {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:"))}

    # ---- the terminal ------------------------------------------------------------------------------------------

    def text(self) -> str:
        """What is in the terminal that is seen, with what was scrolled away."""
        text: str = self.eval(_TEXT)
        return text

    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal that is seen."""
        cols, rows = self.eval(
            "() => { const { terminal: t } = sterna.tabs.find((t) => t.active); return [t.cols, t.rows]; }"
        )
        return cols, rows

    def type(self, text: str) -> None:
        """Types; the terminal has the focus."""
        self.page.keyboard.type(text)

    def line(self, text: str) -> None:
        """Types a line."""
        self.type(text)
        self.page.keyboard.press("Enter")

    def expect(self, pattern: str, seconds: float = START_SECONDS) -> str:
        """Waits for a pattern at the beginning of lines (`^`, `$`) of the terminal; returns the text."""
        wanted = re.compile(pattern, re.MULTILINE)

        def there() -> str:
            text = self.text()
            return text if wanted.search(text) else ""

        try:
            return wait_for(there, seconds, name=pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}; the screen ends:\n{self.text()[-2000:]}\n{self.tab()}") from None

    def collect(self, fault: dict[str, str | int] | None = None) -> None:
        """Begins to keep the bytes that the client hands out; `fault` spoils one event, as a control."""
        self.eval(_COLLECT, fault)

    def collected(self) -> bytes:
        """The bytes handed out since `collect`."""
        return base64.b64decode(self.eval(_COLLECTED))

    def digest(self) -> str:
        """The SHA-256 of the bytes handed out since `collect`, which are forgotten."""
        digest: str = self.eval(_DIGEST)
        return digest

    def length(self) -> int:
        """How many bytes were handed out since `collect`."""
        length: int = self.eval("() => collected.length")
        return length

    def heap(self) -> int:
        """The bytes that the page's scripts hold, after everything else was thrown away."""
        self.devtools.send("HeapProfiler.collectGarbage")
        usage = self.devtools.send("Runtime.getHeapUsage")
        return int(usage["usedSize"] + usage["embedderHeapUsedSize"] + usage["backingStorageSize"])

    def message(self) -> str:
        """What the status line says."""
        return self.page.inner_text("#message")


class Chromium:
    """A browser; each of its devices keeps what it knows apart from the others."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._stack = contextlib.ExitStack()
        self._contexts: list[BrowserContext] = []
        self.views: list[View] = []
        self.browser: Browser

    def __enter__(self) -> Chromium:
        playwright = self._stack.enter_context(sync_playwright())
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        arguments = [*sandbox, *self._arguments]
        self.browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        self._stack.callback(self.browser.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def device(self, **options: Any) -> BrowserContext:
        """Returns a device: a browser of its own, that knows no node."""
        context = self.browser.new_context(**{"ignore_https_errors": True, **options})
        context.set_default_timeout(START_SECONDS * 1000)
        context.add_init_script(_WATCH)
        self._contexts.append(context)
        return context

    def view(self, device: BrowserContext | None = None, **options: Any) -> View:
        """Returns a new tab, of a new device unless `device` is given."""
        view = View((device or self.device(**options)).new_page())
        self.views.append(view)
        return view

    def opened(self, url: str, device: BrowserContext | None = None, **options: Any) -> View:
        """Returns a new tab with a session open in it."""
        view = self.view(device, **options)
        view.open(url)
        return view

    def forget(self) -> list[str]:
        """Closes all devices; returns what the views complain about."""
        complaints = [text for view in self.views for text in view.complaints()]
        for context in self._contexts:
            context.close()
        self._contexts, self.views = [], []
        return complaints


@contextlib.contextmanager
def clean(chromium: Chromium, web: Web) -> Iterator[Chromium]:
    """A browser for one test, at whose end nobody may have complained and nothing may have gone elsewhere."""
    try:
        yield chromium
        views = list(chromium.views)
        complaints = chromium.forget()
        assert not complaints, complaints
        assert {host for view in views for host in view.hosts()} <= {f"127.0.0.1:{web.port}"}
    finally:
        chromium.forget()


def slices(data: bytes, begin: bytes, end: bytes) -> bytes:
    """What stands between two marks, each of which has to be there exactly once."""
    assert data.count(begin) == data.count(end) == 1, (data[:200], data[-200:])
    return data.partition(begin)[2].partition(end)[0]


def fails(what: Callable[[], object]) -> bool:
    """Tells whether a check fails: what a control has to do."""
    try:
        what()
    except AssertionError:
        return True
    return False
