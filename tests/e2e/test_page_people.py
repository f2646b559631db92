"""The page under a thumb, under a keyboard alone, and for those who hear it or see little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.browser import Chromium, View, Web, needed
from tests.e2e.rig import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

pytestmark = needed

PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 740}, "device_scale_factor": 3, "is_mobile": True, "has_touch": True,
}  # fmt: skip
CONTRAST_MIN = 4.5

# Everything with a text of its own, how it contrasts with what is behind it (WCAG 2.2, 1.4.3), and where it ends.
_TEXTS = """
() => {
  const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const box = element.getBoundingClientRect();
    const hidden = !element.checkVisibility({ visibilityProperty: true }) || box.width < 2;
    if (!own || hidden || element.closest(".xterm, :disabled, noscript")) continue;
    const [front, back] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    found.push([element.textContent.trim().slice(0, 40), ratio, box.right]);
  }
  return found;
}
"""


def faint(view: View) -> list[Any]:
    """Texts that are hard to read."""
    return [[text, round(ratio, 2)] for text, ratio, _ in view.eval(_TEXTS) if ratio < CONTRAST_MIN]


def nameless(view: View) -> list[str]:
    """What can be used and has no name for those who hear the page."""
    used = {
        "button",
        "tab",
        "textbox",
        "searchbox",
        "menuitem",
        "menuitemradio",
        "menuitemcheckbox",
        "link",
        "combobox",
    }
    used |= {"checkbox", "toolbar", "tablist", "dialog", "heading"}
    nodes = view.devtools.send("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in nodes if not node.get("ignored") and node.get("role", {}).get("value") in used]
    assert len(seen) > 4
    return [str(node["role"]["value"]) for node in seen if not str(node.get("name", {}).get("value", "")).strip()]


def sideways(view: View) -> bool:
    """Tells whether the page, or anything on it that is no list of its own, is wider than the screen."""
    wide: bool = view.eval(
        """() => {
          const all = [document.documentElement, document.body, document.querySelector("#app")];
          const cut = [...document.querySelectorAll("button, input, select, dialog")].filter((element) => {
            const { left, right, width } = element.getBoundingClientRect();
            return width && !element.closest("#tabs") && (left < -0.5 || right > innerWidth + 0.5);
          });
          return cut.length > 0 || all.some((element) => element.scrollWidth > innerWidth);
        }"""
    )
    return wide


def phone(chromium: Chromium, **options: Any) -> BrowserContext:
    return chromium.device(**{**PHONE, **options})


def taken_up(view: View) -> View:
    """The terminal, tapped as one does to type."""
    view.page.tap(".panel:not([hidden]) .xterm-screen")
    return view


def key(view: View, name: str) -> None:
    """Taps a key of the row."""
    view.page.tap(f"#keys [data-key='{name}']")


def test_the_row_of_keys_on_a_phone(paged: Web, chromium: Chromium) -> None:
    view = taken_up(chromium.opened(paged.link(paged.session()), phone(chromium)))
    assert view.page.is_visible("#keys")
    view.line('sleep 1000; echo "ended: $?"')
    wait_for(lambda: "sleep 1000" in view.text(), name="the echo")
    key(view, "ctrl")
    assert view.page.get_attribute("#keys [data-key=ctrl]", "aria-pressed") == "true"
    view.type("c")
    # The shell gives the whole line up; Ctrl counted for one key only.
    view.expect(r"^\^C$")
    assert view.page.get_attribute("#keys [data-key=ctrl]", "aria-pressed") == "false"
    view.line("echo c$((1 + 1))")
    view.expect("^c2$")
    view.line("clear; echo again $((2 + 2))")
    view.expect("^again 4$")
    key(view, "ArrowUp")
    key(view, "ArrowUp")
    wait_for(lambda: view.text().endswith("$ echo c$((1 + 1))"), name="the line before")
    key(view, "ArrowDown")
    key(view, "Home")
    view.type("echo back;")
    key(view, "End")
    view.page.keyboard.press("Enter")
    view.expect("^again 4$")
    (paged.rig.directory / "a-name-to-complete").write_text("completed\n")
    view.type("cat a-name-to")
    key(view, "Tab")
    wait_for(lambda: "a-name-to-complete" in view.text(), name="the completion")
    view.page.keyboard.press("Enter")
    view.expect("^completed$")
    # A key of the row does not take the focus: the on-screen keyboard stays.
    assert view.eval("() => document.activeElement.className") == "xterm-helper-textarea"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_or_hard_to_read_on_a_phone(paged: Web, chromium: Chromium, scheme: str) -> None:
    first, second = paged.session(), paged.session(name=f"a-name-of-the-greatest-length-{scheme}-012345678901234567")
    view = chromium.view(phone(chromium, color_scheme=scheme))
    looked: dict[str, list[Any]] = {}

    def look(what: str) -> None:
        looked[what] = [f"{role} without a name" for role in nameless(view)] + faint(view)
        looked[what] += ["wider than the screen"] * sideways(view)

    view.page.goto(paged.url)
    view.page.locator("#welcome").wait_for()
    look("the page without any session")
    view.page.goto(paged.link("--all"))
    view.page.locator("#session-rows .open", has_text=second).wait_for()
    look("the list")
    view.page.tap(f"#session-rows .open:text-is('{first}')")
    view.attached()
    taken_up(view).line("clear; printf '%s' \"$(stty size)\"")
    look("a session")
    cols, rows = view.size()
    view.expect(f"^{rows} {cols}")
    assert cols >= 40
    view.page.tap("#tool-menu")
    view.page.locator("#menu").wait_for()
    look("the menu")
    view.page.tap("#menu [data-item=rename]")
    view.page.locator("#ask").wait_for()
    look("a question")
    view.page.tap("#ask [data-answer=cancel]")
    view.page.tap("#tool-menu")
    view.page.tap("#menu [data-item=search]")
    view.page.locator(".panel:not([hidden]) .find").wait_for()
    look("the search")
    view.page.tap("#tab-home")
    view.page.locator("#session-rows .open", has_text=second).tap()
    view.attached()
    taken_up(view).line("exit 7")
    view.page.locator(".panel:not([hidden]) .strip").wait_for()
    look("the end")
    assert len(looked) == 7
    assert {what: faults for what, faults in looked.items() if faults} == {}


def test_a_word_that_is_hard_to_read_would_be_seen(paged: Web, chromium: Chromium) -> None:
    """The control of what looks for names, contrast and width."""
    view = chromium.view(phone(chromium))
    view.page.goto(paged.url)
    view.page.locator("#welcome").wait_for()
    assert (faint(view), nameless(view), sideways(view)) == ([], [], False)
    view.eval("() => { document.querySelector('#welcome h1').style.color = '#999'; }")
    assert [text for text, _ in faint(view)] == ["No session yet"]
    view.eval("() => document.querySelector('#tool-menu').removeAttribute('aria-label')")
    view.eval("() => document.querySelector('#tool-menu').removeAttribute('title')")
    assert nameless(view) == ["button"]
    view.eval("() => { document.querySelector('#link-field').style.width = '400px'; }")
    view.eval("() => { document.querySelector('#link-field').style.flex = 'none'; }")
    assert sideways(view)


def test_a_finger_scrolls_the_terminal_and_not_the_page(paged: Web, chromium: Chromium) -> None:
    view = taken_up(chromium.opened(paged.link(paged.session()), phone(chromium)))
    view.line("seq -f 'number %g' 300")
    view.expect("^number 300$")
    top = "() => { const { buffer } = seen().terminal; return buffer.active.baseY - buffer.active.viewportY; }"
    assert view.eval(top) == 0
    swipe = {"x": 180, "y": 250, "xDistance": 0, "yDistance": 200, "speed": 1500, "gestureSourceType": "touch"}
    view.devtools.send("Input.synthesizeScrollGesture", swipe)
    wait_for(lambda: view.eval(top) > 3, name="what was printed before")
    assert view.eval("() => [scrollX, scrollY]") == [0, 0]


# ---- the keyboard alone ------------------------------------------------------------------------------------------


def focused(view: View) -> str:
    """What has the focus, by its id or its text."""
    name: str = view.eval("() => document.activeElement.id || document.activeElement.textContent.trim()")
    return name


def test_everything_by_the_keyboard(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    view = chromium.view()
    view.page.goto(paged.link("--all"))
    view.page.locator("#session-rows .open", has_text=name).first.wait_for()
    press = view.page.keyboard.press

    def tab_to(wanted: str, *, most: int = 60) -> None:
        for _ in range(most):
            if focused(view) == wanted:
                return
            press("Tab")
        raise AssertionError(f"{wanted} cannot be reached: {focused(view)}")

    tab_to(name)
    # Where the focus is can be seen.
    assert view.eval("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press("Enter")
    view.attached()
    view.line("echo typed")
    view.expect("^typed$")
    # Tab and Escape belong to the program; the documented keys leave.
    (paged.rig.directory / "only-this-one").write_text("tabbed\n")
    view.type("cat only-this")
    press("Tab")
    wait_for(lambda: "only-this-one" in view.text(), name="the completion")
    press("Enter")
    view.expect("^tabbed$")
    press("Control+Shift+Enter")
    assert view.eval("() => document.activeElement.getAttribute('role')") == "tab"
    assert view.eval("() => document.activeElement.getAttribute('aria-selected')") == "true"
    press("ArrowLeft")
    assert focused(view) == "tab-home"
    assert view.page.is_visible("#home")
    press("ArrowRight")
    tab_to("tool-menu")
    press("Enter")
    view.page.locator("#menu").wait_for()
    press("ArrowUp")
    press("Escape")
    assert focused(view) == "tool-menu"
    press("Control+Shift+0")
    assert view.page.is_visible("#home")
    press("Control+Shift+1")
    view.line("echo typed again")
    view.expect("^typed again$")
    press("Control+Shift+F")
    view.type("tabbed")
    wait_for(lambda: view.page.inner_text(".panel:not([hidden]) .find-count") == "1 of 1", name="what was found")
    press("Escape")
    view.line("exit 5")
    view.page.locator(".panel:not([hidden]) .strip").wait_for()
    assert "status 5" in view.page.inner_text(".panel:not([hidden]) .strip")
    press("Control+Shift+Enter")
    tab_to("Close tab")
    press("Enter")
    assert view.eval("() => sterna.tabs.length") == 0
