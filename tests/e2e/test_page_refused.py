"""What others say is text on the page, what they may not do is refused, and nobody else's page gets in."""

from __future__ import annotations

import contextlib
import http.server
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.browser import Chromium, View, Web, needed
from tests.e2e.rig import wait_for
from tests.e2e.screens import attach_words

pytestmark = needed

SCRIPT = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>"\'`><svg onload=window.harmed=1>'
BIDI = "\u202egnp.exe\u2066"


def unharmed(view: View) -> bool:
    """Tells whether nothing that was said became part of the page: no script ran, no element appeared."""
    made = "document.querySelectorAll('img, iframe, script:not([src]), [onerror], [onload]').length"
    harmed: list[Any] = view.eval(f"() => [window.harmed === 1, {made}]")
    return harmed == [False, 0]


# ---- script in what others say -----------------------------------------------------------------------------------


def rewrite(web: Web, session: str, **columns: str | None) -> None:
    """Changes what the node keeps of a session, past all of its checks: as a hostile node would."""
    web.rig.stop_node()
    with contextlib.closing(sqlite3.connect(web.rig.state / "node" / "node.db")) as database, database:
        for column, value in columns.items():
            done = database.execute(f"UPDATE sessions SET {column} = ? WHERE name = ?", (value, session))  # noqa: S608 -- our own words
            assert done.rowcount == 1
    web.start()


def test_a_hostile_name_is_text_in_the_list_and_in_the_tab(paged: Web, chromium: Chromium) -> None:
    name = SCRIPT + BIDI
    session = paged.session()
    link = paged.link("--all")
    rewrite(paged, session, name=name)
    view = chromium.view()
    view.page.goto(link)
    row = view.page.locator("#session-rows .open", has_text="<img src=x")
    row.wait_for()
    shown = row.inner_text()
    assert shown.startswith(SCRIPT)
    row.click()
    view.attached()
    # The tab, its tooltip and its label for screen readers, the document's title.
    assert view.page.locator(".tab[aria-selected=true]").inner_text().startswith(SCRIPT)
    assert view.page.title().startswith(SCRIPT)
    for item in ("rename", "end"):
        view.page.click("#tool-menu")
        view.page.click(f"#menu [data-item={item}]")
        view.page.click("dialog [data-answer=cancel]")
    assert unharmed(view)
    # A control character that turns the order of letters around could make one name look like another.
    assert [text for text in (shown, view.page.title()) if "\u202e" in text or "\u2066" in text] == []


def test_hostile_titles_and_output_are_text(paged: Web, chromium: Chromium) -> None:
    view = chromium.opened(paged.link(paged.session()))
    path = paged.rig.directory / "hostile"
    path.write_bytes(
        f"\x1b]0;{SCRIPT}\x07\x1b]2;{BIDI}{SCRIPT}\x1b\\{SCRIPT}\r\n\x1b]8;;javascript:harmed=1\x07here\x1b]8;;\x07".encode()
    )
    view.line(f"clear; cat {path}; echo; echo javascript:harmed=1")
    view.expect("^here$")
    tab = view.page.locator(".tab[aria-selected=true]")
    wait_for(lambda: SCRIPT in (tab.get_attribute("title") or ""), name="the title")
    title = tab.get_attribute("title") or ""
    assert "\u202e" not in title
    # A link that a program makes may not run anything either, whatever is clicked.
    box = view.page.locator(".panel:not([hidden]) .xterm-screen").bounding_box()
    assert box is not None
    rows = view.eval("() => seen().terminal.rows")
    at = view.text().split("\n").index("here")
    for turn in range(3):
        view.page.mouse.move(box["x"] + 10 + turn, box["y"] + (at + 0.5) * box["height"] / rows)
        view.page.wait_for_timeout(50)
    view.page.mouse.click(box["x"] + 12, box["y"] + (at + 0.5) * box["height"] / rows)
    view.page.wait_for_timeout(200)
    assert unharmed(view)
    assert [page.url for page in view.page.context.pages if "javascript" in page.url] == []


def test_a_hostile_label_is_text(paged: Web, chromium: Chromium) -> None:
    """What another device calls itself."""
    name = paged.session()
    view = chromium.opened(paged.link(name))
    label = SCRIPT[:60]
    terminal = paged.rig.terminal(*attach_words(paged.rig, name)[3:], env={"USER": label + BIDI})
    terminal.expect("$ ")
    wait_for(lambda: view.tab()["others"], name="the other device")
    assert view.tab()["others"][0].startswith(label)
    assert (view.page.get_attribute("#presence", "title") or "").startswith(label)
    assert "\u202e" not in view.tab()["others"][0]
    assert unharmed(view)


def ended(web: Web, name: str) -> None:
    """Waits until the program of a session has ended."""
    wait_for(lambda: web.about(name)["state"] == "exited", name="the program's end")


def test_a_hostile_reason_is_text(paged: Web, chromium: Chromium) -> None:
    """Why a session ended, as the node tells it."""
    for reason in (None, SCRIPT):
        name = paged.session("sh", "-c", "exit 3")
        ended(paged, name)
        if reason is not None:
            rewrite(paged, name, end_reason=reason, status=None, signal=None)
        view = chromium.view()
        view.page.goto(paged.link(name))
        strip = view.page.locator(".panel:not([hidden]) .strip")
        strip.wait_for()
        assert (reason or "Ended with status 3.") in strip.inner_text()
        assert unharmed(view)


def test_script_would_be_seen(paged: Web, chromium: Chromium) -> None:
    """The control: the same text as a part of the page is noticed, and stopped by the policy."""
    view = chromium.view()
    view.page.goto(paged.url)
    assert unharmed(view)
    view.eval("(text) => document.body.insertAdjacentHTML('beforeend', text)", SCRIPT)
    assert not unharmed(view)
    wait_for(lambda: any("script-src" in text for text in view.complaints()), name="the policy's complaint")
    assert view.eval("() => window.harmed") is None
    chromium.views.remove(view)


# ---- a link to watch ---------------------------------------------------------------------------------------------


def test_a_link_to_watch_types_nothing(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    path = paged.rig.directory / "typed-by-a-watcher"
    driver = chromium.opened(paged.link(name))
    watcher = chromium.opened(paged.link("--watch", name))
    assert watcher.page.is_visible("#watching")
    assert watcher.page.inner_text("#watching") == "Watching"
    watcher.page.keyboard.press("Control+c")
    watcher.line(f"touch {path}")
    watcher.page.keyboard.press("Control+d")
    wait_for(lambda: "watch" in watcher.message(), name="what keys do here")
    refused = watcher.eval("() => seen().session.write('exit\\r').then(() => 'taken', (error) => error.message)")
    assert refused == "This attachment only watches: connect with mode drive to type."
    # A question of the terminal (DSR) is not answered by one who watches, and its size is not taken.
    watcher.page.set_viewport_size({"width": 500, "height": 300})
    driver.line("echo fence $((1 + 1))")
    for view in (driver, watcher):
        view.expect("^fence 2$")
    assert "touch" not in driver.text()
    assert not path.exists()
    assert (paged.about(name)["cols"], paged.about(name)["rows"]) == driver.size()
    # The control: from somebody who may type it, the same line does its work.
    driver.line(f"touch {path}")
    wait_for(path.exists, name="the file")
    watcher.page.click("#tool-menu")
    assert watcher.page.is_disabled("#menu [data-item=end]")
    assert watcher.page.is_disabled("#menu [data-item=rename]")


# ---- pages from elsewhere ----------------------------------------------------------------------------------------

_TRY = """
(address) => new Promise((done) => {
  const socket = new WebSocket(address, "clawterm.v1");
  socket.onopen = () => done("open");
  socket.onerror = () => done("refused");
})
"""


@contextlib.contextmanager
def elsewhere(page: bytes) -> Iterator[int]:
    """A server of somebody else, with one page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_from_elsewhere_gets_nothing(paged: Web, chromium: Chromium, host: str) -> None:
    """Neither a page of another port of this host, nor one of another host: no session, no answer, no frame."""
    socket = f"wss://127.0.0.1:{paged.port}/ws"
    device = chromium.device()
    with elsewhere(f'<title>elsewhere</title><iframe src="{paged.url}"></iframe>'.encode()) as port:
        page = device.new_page()
        page.goto(f"http://{host}:{port}/")
        assert page.evaluate(_TRY, socket) == "refused"
        read = "(url) => fetch(url).then((answer) => answer.text()).catch(() => 'refused')"
        assert page.evaluate(read, f"{paged.url}node") == "refused"
        framed = wait_for(lambda: [frame for frame in page.frames if frame.parent_frame], name="the frame")
        wait_for(lambda: framed[0].url.startswith("chrome-error:"), name="a frame that is refused")
        opened = "(url) => { const other = window.open(url); return other === null ? 'blocked' : 'opened'; }"
        with device.expect_page() as popup:
            page.evaluate(opened, paged.url)
        popup.value.wait_for_load_state()
        assert popup.value.evaluate("() => window.opener") is None
    # The control: the node's own page may.
    own = chromium.view(device)
    own.page.goto(paged.url)
    assert own.eval(_TRY, socket) == "open"


# ---- pasting -----------------------------------------------------------------------------------------------------


def paste(view: View, text: str) -> None:
    """Pastes with the keys for it."""
    view.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    view.eval("(text) => navigator.clipboard.writeText(text)", text)
    view.page.keyboard.press("Control+Shift+V")


def test_a_paste_of_several_lines_asks_first(paged: Web, chromium: Chromium) -> None:
    view = chromium.opened(paged.link(paged.session()))
    # Not the shell's own guard: one that takes every line at once.
    view.line("clear; bind 'set enable-bracketed-paste off'; echo ready; cat")
    view.expect("^ready$")
    paste(view, "a single line")
    view.expect("^a single line$")
    assert view.page.locator("#paste").count() == 0
    view.page.keyboard.press("Enter")
    hostile = "echo one\nrm -rf \x1b[201~two\nthree <b>bold</b>\n"
    paste(view, hostile)
    view.page.locator("#paste").wait_for()
    shown = view.page.inner_text("#paste-text")
    assert "echo one" in shown
    assert "<b>bold</b>" in shown
    assert "\u241b[201~" in shown
    assert unharmed(view)
    view.page.click("#paste [data-answer=cancel]")
    paste(view, "first\nsecond\n")
    view.page.locator("#paste").wait_for()
    assert "first" not in view.text()
    view.page.click("#paste [data-answer=yes]")
    text = view.expect("^second$")
    assert "echo one" not in text
    assert "rm -rf" not in text
