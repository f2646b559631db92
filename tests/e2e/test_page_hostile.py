"""What web sites and programs may not do to the page: take its links away, hang it, or fill its memory."""

from __future__ import annotations

import base64
import os
import sys

from tests.e2e.browser import Chromium, View, Web, needed
from tests.e2e.rig import wait_for

pytestmark = needed

STALL_MAX_MS = 1_000
HUGE = 2147483647

_GRANTS = """
async () => {
  const database = await new Promise((done) => {
    const asked = indexedDB.open("sterna-page", 1);
    asked.onsuccess = () => done(asked.result);
  });
  const asked = database.transaction("grants").objectStore("grants").getAll();
  return new Promise((done) => asked.onsuccess = () => done(asked.result.map(({ ticket, name }) => [ticket, name])));
}
"""
_FRAGMENT = """
(hash) => new Promise((done) => {
  addEventListener("hashchange", () => done(location.hash), { once: true });
  location.hash = hash;
})
"""
_LINES = """
(data) => new Promise((done) => {
  const { terminal } = seen();
  terminal.write(data, () => {
    const { active } = terminal.buffer;
    const lines = [];
    for (let y = 0; y < terminal.rows; y++) {
      const line = active.getLine(active.baseY + y);
      lines.push([line.translateToString(), line.getCell(0).getBgColor()]);
    }
    done([lines, active.cursorX, active.cursorY]);
  });
})
"""
_BEAT = """
() => {
  window.stall = 0;
  let last = performance.now();
  setInterval(() => {
    const now = performance.now();
    window.stall = Math.max(window.stall, now - last);
    last = now;
  }, 10);
}
"""


# ---- links that the user did not open ----------------------------------------------------------------------------


def ticket(link: str) -> str:
    return link.split("t=")[1].split("&", maxsplit=1)[0]


def kept(view: View) -> dict[str, str]:
    """The tickets that the browser keeps, with what they are called."""
    found: list[tuple[str, str]] = view.eval(_GRANTS)
    return dict(found)


def stray() -> str:
    """A ticket of nobody."""
    return base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")


def test_a_link_from_elsewhere_takes_nothing_away(paged: Web, chromium: Chromium) -> None:
    mine, theirs = paged.session(), paged.session()
    own, foreign = paged.link("--all"), paged.link(theirs)
    view = chromium.view()
    view.page.goto(own)  # the first one is used without a question
    view.page.locator("#session-rows .open", has_text=mine).wait_for()
    assert list(kept(view)) == [ticket(own)]
    # What a redirect of any web site does: a ticket that says of itself that it is for everything.
    lures = [f"{paged.url}#t={secret}" for secret in (ticket(foreign), stray())]
    for lure in lures:
        view.page.goto("about:blank")
        view.page.goto(lure)
        view.page.locator("#add-link").wait_for()
        # No second question on top of the first; its secret is gone by the time that anybody is told of it.
        assert view.eval(_FRAGMENT, f"#t={stray()}") == ""
        view.page.locator("#session-rows .open", has_text=mine).wait_for()
        view.page.keyboard.press("Enter")  # a key that was meant for something else says no
        view.page.locator("#add-link").wait_for(state="detached")
        assert list(kept(view)) == [ticket(own)]
    # Who wants it has both, is told which is which, and keeps the own one.
    view.page.goto("about:blank")
    view.page.goto(lures[1])
    assert "all sessions, since now" in view.page.inner_text("#add-link")
    view.page.click("#add-link [data-answer=yes]")
    rows = view.page.locator("#invites li")
    wait_for(lambda: rows.count() == 2 and view.page.locator("#problems p").count(), name="both links")
    assert set(kept(view)) == {ticket(own), ticket(lures[1])}
    rows.filter(has_text=": 0 sessions").get_by_role("button").click()
    wait_for(lambda: list(kept(view)) == [ticket(own)], name="one link")
    view.page.locator("#session-rows .open", has_text=mine).wait_for()
    view.page.locator("#problems p").wait_for(state="detached")
    # A link that was pasted into the page was meant.
    view.page.fill("#link-field", foreign)
    view.page.click("#link-form button")
    view.attached()
    assert set(kept(view)) == {ticket(own), ticket(foreign)}
    assert view.tab()["name"] == theirs


def test_what_one_tab_forgot_another_does_not_bring_back(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    link = paged.link(name)
    first = chromium.opened(link)
    device = first.page.context
    wait_for(lambda: kept(first) == {ticket(link): name}, name="the session's name")
    first.page.click(".tab-close")
    other = chromium.view(device)
    other.page.goto(paged.url)
    other.attached()  # the page opens its only session by itself
    other.page.click(".tab-close")
    assert paged.rig.sterna("rename", name, f"{name}-renamed").returncode == 0
    first.page.locator("#link-rows button", has_text="Forget").click()
    wait_for(lambda: kept(first) == {}, name="the forgotten link")
    other.page.click("#tab-home")
    other.page.locator("#link-rows .open", has_text=name).click()
    other.attached()
    wait_for(lambda: other.tab()["name"] == f"{name}-renamed", name="the new name")
    assert kept(other) == {}


# ---- output that would hang the page -----------------------------------------------------------------------------


def alike(view: View, begin: str, huge: str, enough: str) -> None:
    """Checks that two ways to say something lead to the same screen and cursor."""
    filled = "\x1bc" + "\r\n".join(f"row {at} of the screen" for at in range(60))
    shown = [view.eval(_LINES, f"{filled}{begin}{what}") for what in (huge, enough)]
    assert shown[0] == shown[1]
    assert shown[0] != view.eval(_LINES, f"{filled}{begin}")


def test_huge_counts_are_what_a_screen_can_show(paged: Web, chromium: Chromium) -> None:
    view = chromium.opened(paged.link(paged.session("sleep", "1000")))
    cols, rows = view.size()
    for final in "STLM@PXIZ":
        begin = "\x1b[5;60H" if final == "Z" else "\x1b[5;3H"
        alike(view, begin, f"\x1b[{HUGE}{final}", f"\x1b[{max(rows, cols)}{final}")
        if final in "STLM":
            alike(view, f"\x1b[3;10r{begin}", f"\x1b[{HUGE}{final}", f"\x1b[8{final}")
            # All at once is as one by one, and what comes in has the colours that xterm gives it.
            lines, *_ = view.eval(_LINES, f"\x1bc\x1b[44m\x1b[3{final}")
            assert sum(colour == 4 for _, colour in lines) == (0 if final == "T" else 3)
            for count in (3, 6, 8):
                alike(view, f"\x1b[3;10r{begin}\x1b[44m", f"\x1b[{count}{final}", f"\x1b[{final}" * count)
    for char, width in (("x", 1), ("漢", 2)):
        each = cols // width
        enough = HUGE % each + each * (rows + 2)
        alike(view, f"\r\n{char}", f"\x1b[{HUGE}b", char * enough)


def test_links_of_a_program_are_bounded(paged: Web, chromium: Chromium) -> None:
    view = chromium.opened(paged.link(paged.session("sleep", "1000")))
    linked = """(data) => new Promise((done) => {
      const { terminal } = seen();
      const cell = (x) => terminal.buffer.active.getLine(terminal.buffer.active.baseY).getCell(x);
      terminal.write(data, () => done([0, 1, 2].map((x) => Boolean(cell(x).isUnderline()))));
    })"""
    link = "\x1b]8;;http://host/{}\x07{}"
    end = "\x1b]8;;\x07"
    assert view.eval(linked, f"\x1bc{link.format(1, 'a')}{end}b") == [True, False, False]
    before = view.heap()
    for turn in range(2):
        many = "".join(link.format(f"{turn}-{at}", "a\r") for at in range(30_000))
        # What comes after too many is no link at all, and none of those before.
        assert view.eval(linked, f"{many}\x1b[3Gb{link.format('last', 'c')}{end}\r")[2] is False
    assert view.heap() - before < 40_000_000
    assert view.eval(linked, f"\x1b[2J\x1b[H{link.format(2, 'a')}{end}b") == [True, False, False]
    assert view.eval(linked, f"\x1b[2J\x1b[H{link.format('x' * 5_000, 'a')}{end}b") == [False, False, False]


STORMS = rf"""
import sys, termios
lines = termios.tcgetattr(0)
lines[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, lines)
for storm in (
    "".join(f"\x1b[{HUGE}{{final}}" for final in "STLMIZ") * 100,
    "x\x1b[{HUGE}b" * 1_000,
    "a" + "\u0301" * 30_000,
    "".join(f"\x1b]4;{{i % 256}};rgb:{{i % 200 + 16:02x}}/00/00\x07" for i in range(5_000)),
    "\x1b]4;" + "1;" * 500_000 + "\x07",
    "\x1bc" * 125_000 + "x\x1bc" * 125_000,
):
    number = input()
    print(storm + "\x1b[?7h\x1b[H\x1b[2Jpassed " + number, flush=True)
input()
"""


def test_a_program_cannot_hang_the_page(paged: Web, chromium: Chromium) -> None:
    path = paged.rig.directory / "storms.py"
    path.write_text(STORMS)
    view = chromium.opened(paged.link(paged.session(sys.executable, str(path))))
    view.page.set_default_timeout(8_000)
    view.eval(_BEAT)
    stalls: list[float] = []
    for number in range(STORMS.count(",\n")):
        view.line(str(number))
        # Not by `expect`: a page that hangs would never answer it.
        view.page.wait_for_function(
            "(wanted) => seen().terminal.buffer.active.getLine(seen().terminal.buffer.active.baseY)"
            ".translateToString(true) === wanted",
            arg=f"passed {number}",
            polling=50,
        )
        stalls.append(view.eval("() => { const { stall } = window; window.stall = 0; return stall; }"))
    assert len(stalls) == 6
    assert max(stalls) < STALL_MAX_MS, stalls


ASKER = r"""
import os, time, tty
tty.setraw(0)
os.read(0, 1)
print("\x1b[6n" * 100_000 + "\x1b[H\x1b[2Jasked", flush=True)
time.sleep(1_000)
"""


def test_answers_that_nobody_reads_are_not_kept_without_bound(paged: Web, chromium: Chromium) -> None:
    path = paged.rig.directory / "asker.py"
    path.write_text(ASKER)
    view = chromium.opened(paged.link(paged.session(sys.executable, str(path))))
    view.type("\n")  # who typed last answers
    view.expect("asked")
    waiting = "seen().session.inputs.reduce((sum, { what }) => sum + what.data.length, 0)"
    assert view.eval(f"() => {waiting}") <= 25_000
