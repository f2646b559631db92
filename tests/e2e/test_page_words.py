"""What the page says and offers where something is refused, over, away, wrongly typed or too large."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.e2e.browser import Chromium, View, Web, needed
from tests.e2e.rig import wait_for
from tests.e2e.screens import attach_words
from tests.e2e.test_page_people import phone, sideways

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

pytestmark = needed

STRIP = ".panel:not([hidden]) .strip"
NOTE = ".panel:not([hidden]) .note[data-kind={}]"


def listed(web: Web, chromium: Chromium, name: str, device: BrowserContext | None = None) -> View:
    """The list, with this session in it."""
    view = chromium.view(device)
    view.page.goto(web.link("--all"))
    view.page.locator("#session-rows .open", has_text=name).wait_for()
    return view


def row(view: View, name: str, act: str) -> str:
    """A button in a session's row of the list."""
    return f"#session-rows tr:has(.open:text-is('{name}')) [data-act={act}]"


def devices(web: Web, *, revoked: bool = False) -> set[str]:
    """The ids of the browsers that the node knows."""
    found = web.rig.json("devices")["devices"]
    return {device["id"] for device in found if "Chrome" in device["label"] and device["revoked"] is revoked}


def revoke(web: Web, known: set[str]) -> None:
    """Revokes the browser that was not known before."""
    (device,) = devices(web) - known
    assert web.rig.sterna("revoke", device).returncode == 0


# ---- revoked -----------------------------------------------------------------------------------------------------


def test_a_revoked_browser_is_told_and_gets_in_again_with_a_new_key(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    known = devices(paged)
    view = listed(paged, chromium, name)
    beside = chromium.view(view.page.context)
    beside.page.goto(paged.url)
    beside.page.locator("#session-rows .open", has_text=name).click()
    beside.attached()
    shown = view.page.locator("#problems [data-act=key]")
    revoke(paged, known)
    # At once: the list asks only every four seconds.
    shown.wait_for(timeout=2_500)
    assert "revoked" in view.page.inner_text("#problems")
    assert not view.page.is_visible("#session-table")
    assert not view.page.is_visible("#new-form")
    beside.page.locator(f"{STRIP} [data-act=key]").wait_for()
    assert beside.page.locator(f"{STRIP} [data-act=retry]").count() == 0
    # It asks no more.
    sockets = len(view.sockets)
    view.page.wait_for_timeout(5_000)
    assert len(view.sockets) == sockets
    shown.click()
    view.page.click("#confirm [data-answer=yes]")
    view.page.locator("#welcome").wait_for()
    assert view.page.inner_text("#share-command") == "sterna share --all --local", "only this machine reaches the node"
    view.page.fill("#link-field", paged.link("--all"))
    view.page.keyboard.press("Enter")
    view.page.locator("#session-rows .open", has_text=name).click()
    view.attached()
    view.line("echo again $((1 + 1))")
    view.expect("^again 2$")
    assert len(devices(paged) - known) == 1


def test_a_key_can_be_forgotten_on_the_start_page(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    known = devices(paged)
    view = chromium.opened(paged.link(name))
    view.page.click("#tab-home")
    view.page.click("#forget-key")
    view.page.click("#confirm [data-answer=cancel]")
    assert view.page.locator("#link-rows li").count() == 1
    view.page.click("#forget-key")
    view.page.click("#confirm [data-answer=yes]")
    view.page.locator("#welcome").wait_for()
    view.open(paged.link(name))
    assert len(devices(paged) - known) == 2


# ---- names -------------------------------------------------------------------------------------------------------


def test_a_wrong_name_is_refused_where_it_is_typed(paged: Web, chromium: Chromium) -> None:
    name, other = paged.session(), paged.session()
    view = listed(paged, chromium, other)
    view.page.fill("#new-name", "bad name")
    view.page.click("#new-session")
    assert view.page.locator("#new-name:invalid").count() == 1
    assert view.eval("() => sterna.tabs.length") == 0
    view.page.click(row(view, name, "rename"))
    for wrong in ("bad name", other):
        view.page.fill("#asked", wrong)
        view.page.keyboard.press("Enter")
        if wrong == other:
            view.page.locator("#ask .problem:not(:empty)").wait_for()
            assert "already" in view.page.inner_text("#ask .problem")
        assert view.page.input_value("#asked") == wrong
    view.page.fill("#asked", f"{name}-new")
    view.page.keyboard.press("Enter")
    view.page.locator("#session-rows .open", has_text=f"{name}-new").wait_for()
    assert view.page.locator("dialog").count() == 0
    # The same question in a session's own menu.
    view.page.click(f"#session-rows .open:text-is('{name}-new')")
    view.attached()
    view.page.click("#tool-menu")
    view.page.click("#menu [data-item=rename]")
    view.page.fill("#asked", other)
    view.page.keyboard.press("Enter")
    view.page.locator("#ask .problem:not(:empty)").wait_for()
    view.page.fill("#asked", f"{name}-last")
    view.page.keyboard.press("Enter")
    wait_for(lambda: view.tab()["name"] == f"{name}-last", name="the new name")


# ---- the list ----------------------------------------------------------------------------------------------------


def test_the_list_uses_the_words_of_the_command_line(paged: Web, chromium: Chromium) -> None:
    name, over = paged.session(), paged.session("sh", "-c", "exit 3")
    wait_for(lambda: paged.about(over)["state"] == "exited", name="the program's end")
    view = listed(paged, chromium, over)
    for one in (name, over):
        cell = view.page.inner_text(f"#session-rows tr:has(.open:text-is('{one}')) .c-state")
        assert cell == paged.about(one)["state"]
    assert view.page.inner_text(row(view, name, "end")) == "End"
    assert view.page.inner_text(row(view, over, "end")) == "Remove"
    # To start one needs no scrolling, however many there are.
    tops = view.eval("() => ['#new-form', '#session-table'].map((id) => document.querySelector(id).offsetTop)")
    assert tops == sorted(tops)
    view.page.click(row(view, over, "end"))
    assert view.page.inner_text("#confirm [data-answer=yes]") == "Remove"
    view.page.click("#confirm [data-answer=yes]")
    view.page.locator(f"#session-rows .open:text-is('{over}')").wait_for(state="detached")


def test_a_link_that_is_used_up_shows_no_empty_list(paged: Web, chromium: Chromium) -> None:
    link = paged.link("--all")
    first = chromium.view()
    first.page.goto(link)
    first.page.locator("#new-form").wait_for()
    view = chromium.view()
    view.page.goto(link)
    view.page.locator("#problems button").wait_for()
    assert view.page.inner_text("#problems button") == "Forget this link"
    assert not view.page.is_visible("#session-table")


def test_a_list_without_its_node_stays_and_offers_nothing(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    view = listed(paged, chromium, name)
    view.page.context.set_offline(True)
    paged.rig.kill_node()
    try:
        view.page.locator("#problems .problem").wait_for()
        assert view.page.locator(f"#session-rows tr.away .open:text-is('{name}')").is_visible()
        assert view.page.is_disabled(row(view, name, "end"))
    finally:
        view.page.context.set_offline(False)
        paged.start()
    wait_for(lambda: view.page.is_enabled(row(view, name, "end")), name="the node again")


def test_a_session_that_ended_has_nobody_in_it(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    view = chromium.opened(paged.link(name))
    watcher = chromium.opened(paged.link("--watch", name))
    for one in (view, watcher):
        one.wait("document.querySelector('#presence').textContent === '1 other device'")
    view.line("exit")
    for one in (view, watcher):
        one.page.locator(STRIP).wait_for()
        one.wait("document.querySelector('#presence').textContent === ''")
    watcher.page.click("#tab-home")
    assert not watcher.page.is_visible("#welcome")


# ---- devices, tabs and sizes -------------------------------------------------------------------------------------


def test_devices_can_be_told_apart(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    desk = chromium.opened(paged.link(name))
    small = chromium.opened(paged.link(name), phone(chromium))
    watcher = chromium.opened(paged.link("--watch", name))
    for view, wanted in (
        (desk, ["Chrome on Linux, desktop (watching)", "Chrome on Linux, phone"]),
        (small, ["Chrome on Linux, desktop", "Chrome on Linux, desktop (watching)"]),
        (watcher, ["Chrome on Linux, desktop", "Chrome on Linux, phone"]),
    ):
        shown = " && ".join(f"seen().others.includes('{label}')" for label in wanted)
        view.wait(f"seen().others.length === {len(wanted)} && {shown}")


# Names of tabs and keys that do not fit, and a bell without its sign.
_CUT = """
() => {
  const names = [...document.querySelectorAll(".tab .tab-name")].filter((one) => one.scrollWidth > one.clientWidth);
  const width = (one) => one.getBoundingClientRect().width;
  const keys = [...document.querySelectorAll(".key span")].filter((one) => width(one) > width(one.parentElement));
  const bells = [...document.querySelectorAll("[data-mark=bell]")];
  const signs = bells.filter((tab) => !getComputedStyle(tab, "::after").content.includes("\\u266a"));
  return [...names, ...keys, ...signs].map((one) => one.textContent);
}
"""


def test_many_tabs_on_a_phone_keep_their_names(paged: Web, chromium: Chromium) -> None:
    view = chromium.view(phone(chromium))
    names = [paged.session(name=f"tab-no-{number}") for number in range(5)]
    view.page.goto(paged.link("--all"))
    for name in names:
        view.page.tap("#tab-home")
        view.page.locator(f"#session-rows .open:text-is('{name}')").tap()
        view.attached()
    view.eval("""() => { sterna.tabs[3].session.write("printf '\\\\a'\\r"); }""")
    view.page.locator("#tab-4[data-mark=bell]").wait_for()
    # Turned, and with what an on-screen keyboard leaves: no word is cut, and the tab that is seen is there.
    right = "(id) => document.querySelector(id).getBoundingClientRect().right"
    for width, height in ((360, 740), (740, 360), (360, 400)):
        view.page.set_viewport_size({"width": width, "height": height})
        view.wait(f"document.querySelector('#app').clientHeight === {height}")
        view.wait(f"({right})('.tab[aria-selected=true]') <= ({right})('#tabs')")
        assert width > 360 or view.eval(_CUT) == []
        assert not sideways(view)


def test_a_click_beside_a_smaller_terminal_keeps_the_keys(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    view = chromium.opened(paged.link(name))
    terminal = paged.rig.terminal(*attach_words(paged.rig, name)[3:], cols=40, rows=10)
    terminal.type("echo small\r")
    wait_for(lambda: view.size() == (40, 10), name="the terminal's size")
    box = view.page.locator(".panel:not([hidden]) .screen").bounding_box()
    assert box is not None
    view.page.mouse.click(box["x"] + box["width"] - 30, box["y"] + box["height"] - 30)
    view.line("echo typed $((1 + 1))")
    view.expect("^typed 2$")


def test_a_session_that_is_too_large_is_readable(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    view = chromium.opened(paged.link(name), viewport={"width": 1000, "height": 600})
    font = view.eval("() => seen().terminal.options.fontSize")
    terminal = paged.rig.terminal(*attach_words(paged.rig, name)[3:], cols=110, rows=100)
    terminal.type("clear; seq -f 'number %g' 150\r")
    view.expect("^number 150$")
    wait_for(lambda: view.size() == (110, 100), name="the terminal's size")
    assert view.eval("() => seen().terminal.options.fontSize") == font
    wait_for(lambda: view.page.inner_text("#size").endswith("scroll"), name="a word of it")
    # What is seen begins with a whole line, and the line of the cursor is there.
    part = view.wait(
        """(() => {
          const host = document.querySelector(".panel:not([hidden]) .screen");
          const { terminal } = seen();
          const height = host.querySelector(".xterm-screen").clientHeight / terminal.rows;
          const [first, last] = [host.scrollTop / height, (host.scrollTop + host.clientHeight) / height];
          const cursor = terminal.buffer.active.cursorY;
          return first < cursor && cursor + 1 <= last && [Math.abs(first - Math.round(first))];
        })()"""
    )
    assert part[0] < 0.1


def test_what_was_typed_offline_brings_the_size_back(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    view = chromium.opened(paged.link(name))
    own = view.size()
    terminal = paged.rig.terminal(*attach_words(paged.rig, name)[3:], cols=60, rows=20)
    terminal.type("echo small\r")
    wait_for(lambda: view.size() == (60, 20), name="the terminal's size")
    view.page.context.set_offline(True)
    view.wait("seen().state === 'trouble'")
    view.line("echo typed $((1 + 1))")
    view.page.context.set_offline(False)
    view.expect("^typed 2$")
    wait_for(lambda: view.size() == own, name="the page's own size")
    about = wait_for(lambda: (paged.about(name)["cols"], paged.about(name)["rows"]) == own, name="the session's size")
    assert about


# ---- notices -----------------------------------------------------------------------------------------------------

DEAF = ("sh", "-c", "echo up; exec sleep 1000")


def begin(view: View, agent: str, name: str) -> None:
    """Begins a session in the list."""
    view.page.select_option("#new-agent", agent)
    view.page.fill("#new-name", name)
    view.page.click("#new-session")
    view.attached()


def test_what_was_lost_is_said_with_how_much(paged: Web, chromium: Chromium) -> None:
    rig, name = paged.rig, "loses"
    rig.start_pod("deaf", *DEAF, kind="stream")
    view = chromium.view()
    view.page.goto(paged.link("--all"))
    begin(view, "main", name)
    terminal = rig.terminal(*attach_words(rig, name)[3:])
    terminal.type("echo mine\r")  # who typed last is who the output waits for
    wait_for(lambda: view.size() == (80, 24), name="the terminal's size")
    view.eval("() => seen().session.on('gap', ({ start, end }) => { window.lost = end - start; })")
    view.page.context.set_offline(True)
    terminal.type("head -c 2000000 /dev/zero | tr '\\0' x; echo; echo the end\r")
    terminal.expect("\nthe end")
    view.page.context.set_offline(False)
    note = view.page.locator(NOTE.format("gap"))
    said = note.inner_text().strip()
    lost = view.wait("window.lost")
    assert said.startswith(f"{lost / 2**20:.1f} MiB of output were not kept while this page was away; what you see is ")
    view.expect("^the end$")
    note.locator(".note-close").click()
    assert note.count() == 0
    # Of what the program's pipe does not take, nobody knows when the agent is gone.
    view.page.click("#tab-home")
    begin(view, "deaf", f"{name}-deaf")
    view.expect("^up$")
    view.eval("() => { seen().session.write('x'.repeat(100_000)).catch(() => undefined); }")
    view.wait("seen().session.inputs.length === 0")
    rig.kill_pod("deaf")
    rig.start_pod("deaf", *DEAF, kind="stream")
    said = view.page.locator(NOTE.format("uncertain")).inner_text()
    assert re.match(r"The agent was lost: the last \d+ KiB that you typed may or may not have reached it", said), said
    assert "The agent" in view.page.locator(STRIP).inner_text()
    rig.kill_pod("deaf")


# ---- drawing, links, copies --------------------------------------------------------------------------------------

_NO_WEBGL = """
const { getContext } = HTMLCanvasElement.prototype;
HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
  return kind.startsWith("webgl") ? null : getContext.call(this, kind, ...more);
};
"""
_LOSE = """
() => {
  const all = [...document.querySelectorAll(".panel:not([hidden]) canvas")];
  const drawn = all.map((canvas) => canvas.getContext("webgl2")).find((context) => context);
  drawn.getExtension("WEBGL_lose_context").loseContext();
}
"""
# Where a text begins and ends in the terminal that is seen.
_PLACE = """
(text) => {
  const { terminal } = seen();
  const { active } = terminal.buffer;
  const box = document.querySelector(".panel:not([hidden]) .xterm-screen").getBoundingClientRect();
  const [width, height] = [box.width / terminal.cols, box.height / terminal.rows];
  for (let y = 0; y < terminal.rows; y++) {
    const x = active.getLine(active.viewportY + y).translateToString().indexOf(text);
    const [left, right] = [box.x + x * width + 1, box.x + (x + text.length) * width - 1];
    if (x >= 0) return [left, right, box.y + (y + 0.5) * height];
  }
}
"""


def drawn(view: View) -> tuple[str, bool]:
    """By what the terminal that is seen is drawn, and whether there are elements with its text."""
    kind = view.eval("() => seen().renderer")
    return kind, view.page.locator(".panel:not([hidden]) .xterm-rows", has_text="drawn 42").count() == 1


def copied(view: View) -> str:
    """What is on the clipboard."""
    text: str = view.eval("() => navigator.clipboard.readText()")
    return text


def test_links_copies_and_letters_with_and_without_webgl(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    fast = chromium.view()
    fast.page.goto(paged.link(name).replace("/#", "/?renderer=webgl#"))
    fast.attached()
    fast.wait("seen().renderer === 'webgl'")
    fast.line("echo drawn $((6 * 7))")
    fast.expect("^drawn 42$")
    assert drawn(fast) == ("webgl", False)
    fast.eval(_LOSE)  # the browser gets three seconds to give it back: meanwhile
    device = chromium.device(permissions=["clipboard-read", "clipboard-write"])
    device.add_init_script(_NO_WEBGL)
    view = chromium.view(device)
    view.page.goto(paged.link(name).replace("/#", "/?renderer=webgl#"))
    view.attached()
    view.expect("^drawn 42$")
    wait_for(lambda: drawn(view) == ("dom", True), name="elements")
    plain, hidden = f"{paged.url}licenses.txt", f"{paged.url}licenses.txt?hidden"
    view.line(f"clear; echo {plain}; printf '\\e]8;;{hidden}\\e\\\\a text\\e]8;;\\e\\\\\\n'; echo 'copy this'")
    view.expect("^copy this$")
    mouse = view.page.mouse
    left, right, y = view.eval(_PLACE, "copy this")
    mouse.move(left, y)
    mouse.down()
    mouse.move(right, y)
    mouse.up()
    view.page.keyboard.press("Control+Shift+C")
    wait_for(lambda: view.message() == "Copied", name="a word of it")
    assert copied(view) == "copy this"
    for text, address in ((plain, plain), ("a text", hidden)):
        left, _, y = view.eval(_PLACE, text)
        mouse.move(left + 20, y)
        view.page.locator(".panel:not([hidden]) .xterm-cursor-pointer").wait_for()
        with device.expect_page() as opened:
            mouse.click(left + 20, y)
            if address != text:
                assert view.page.inner_text("#open-link .url") == address
                view.page.click("#open-link [data-answer=yes]")
        opened.value.wait_for_load_state()
        assert (opened.value.url, opened.value.evaluate("() => [opener, document.referrer]")) == (address, [None, ""])
        opened.value.close()
    cols, _ = view.size()
    view.page.click("#tool-larger")
    wait_for(lambda: view.message() == "Text of 15 px", name="a word of it")
    assert view.size()[0] < cols
    assert '"fontSize":15' in view.eval("() => localStorage['sterna.settings']")
    # A program that writes the clipboard.
    view.line("clear; printf '\\e]52;c;%s\\a' $(printf offered | base64)")
    note = view.page.locator(NOTE.format("clipboard"))
    assert note.inner_text().startswith("The program wants to write to the clipboard.")
    assert copied(view) == "copy this"
    note.get_by_role("button", name="Allow in this tab").click()
    wait_for(lambda: copied(view) == "offered", name="what the program wrote")
    assert note.count() == 0
    wait_for(lambda: fast.eval("() => seen().renderer") == "dom", name="elements")
    view.line("clear; echo drawn $((6 * 7))")
    wait_for(lambda: drawn(fast) == ("dom", True), name="what is drawn by them")
