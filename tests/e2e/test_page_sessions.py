"""A session in the browser: opened by a link, and never lost, whatever happens to the node, the network or the tab."""

from __future__ import annotations

import base64
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.browser import Chromium, View, Web, fails, needed, slices
from tests.e2e.exact_rig import new_seed
from tests.e2e.rig import wait_for
from tests.e2e.screens import attach_words

pytestmark = needed

QUIET_SECONDS = 1.0
OFFLINE_SECONDS = 10.0


def test_a_link_opens_its_session_and_leaves_no_trace(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    link = paged.link(name)
    view = chromium.opened(link)
    view.line("echo it is $((6 * 7))")
    view.expect("^it is 42$")
    assert view.tab()["name"] == name
    # The address bar, and the history of the tab with what was typed to get there.
    assert view.page.url == paged.url
    entries = view.devtools.send("Page.getNavigationHistory")["entries"]
    assert [entry["url"] for entry in entries if entry["url"] != "about:blank"] == [paged.url]
    ticket = dict(field.split("=", 1) for field in link.partition("#")[2].split("&"))["t"]
    view.page.reload()
    view.attached()
    view.expect("^it is 42$")
    assert len(view.requests) > 4
    assert len(view.sockets) > 1
    assert [text for text in [*view.requests, *view.sockets, view.page.content()] if ticket in text] == []
    # Whoever finds the link later (browsers list what was visited) is not let in with it.
    finder = chromium.view()
    finder.page.goto(link)
    finder.wait("seen()?.state === 'failed'")
    assert finder.text() == ""


# ---- numbered lines while something fails ------------------------------------------------------------------------

_LINES = """
import os, sys, time
stop, sent = sys.argv[1:]
with open(sent, "wb") as copy:
    os.write(1, b"<" + b"<<\\n")
    number = 0
    while not os.path.exists(stop):
        number += 1
        line = b"line %d of what nobody may lose\\n" % number
        copy.write(line)
        os.write(1, line)
        time.sleep(0.005)
    os.write(1, b">" + b">>\\n")
"""


class Lines:
    """A program that writes numbered lines, 200 a second, into a view's session, and what it wrote."""

    def __init__(self, paged: Web, view: View, name: str) -> None:
        program, self._stop, self._sent = (paged.rig.directory / f"{name}.{end}" for end in ("py", "stop", "sent"))
        program.write_text(_LINES)
        self._view = view
        view.line(f"clear; python3 {program} {self._stop} {self._sent}")
        view.expect("^line 20 ")

    def end(self) -> bytes:
        """Ends it; returns what it wrote as a terminal passes it on."""
        self._stop.touch()
        self._view.expect("^>>>$")
        return self._sent.read_bytes().replace(b"\n", b"\r\n")


Fault = Callable[[View], None]
Spoiled = dict[str, str | int]


def flowing(paged: Web, chromium: Chromium, fail: Fault, spoiled: Spoiled | None = None) -> tuple[bytes, bytes]:
    """Lets something fail while lines flow; returns what came and what was written."""
    name = paged.session()
    view = chromium.opened(paged.link(name))
    view.collect(spoiled)
    lines = Lines(paged, view, name)
    fail(view)
    # It works again: what is typed is answered by the program, not only kept.
    sent = lines.end()
    view.line("echo back $((40 + 2))")
    view.expect("^back 42$")
    assert view.tab()["state"] == "open"
    assert view.message() == ""
    assert view.eval("() => collected.breaks") == 0
    came = slices(view.collected(), b"<<<\r\n", b">>>\r\n")
    return came, sent


def killing(paged: Web, rng: random.Random) -> Fault:
    """Kills the node and starts it again."""

    def fail(view: View) -> None:
        view.expect(f"^line {rng.randrange(30, 120)} ")
        paged.rig.kill_node()
        view.wait("seen().state === 'trouble'")
        assert re.fullmatch(r"Reconnecting for [1-3] s; what you type is kept\.", wait_for(view.message, name="a word"))
        paged.start()
        view.wait("seen().state === 'open'")
        came = view.length()
        view.wait(f"collected.length > {came + 500}")

    return fail


def test_the_page_goes_on_when_the_node_is_killed(paged: Web, chromium: Chromium) -> None:
    came, sent = flowing(paged, chromium, killing(paged, random.Random(new_seed())))
    assert came == sent
    print(f"{len(came)} bytes")


@pytest.mark.parametrize("times", [0, 2], ids=["dropped", "doubled"])
def test_a_lost_or_doubled_event_would_be_seen(paged: Web, chromium: Chromium, times: int) -> None:
    """The control: one event of the client is dropped or doubled by the collector."""
    came, sent = flowing(paged, chromium, lambda view: None, {"text": "line 15 ", "times": times})
    assert came != sent
    assert abs(len(came) - len(sent)) >= 30


def test_the_page_goes_on_after_ten_seconds_offline(paged: Web, chromium: Chromium) -> None:
    said: list[tuple[float, float, str]] = []  # for how long it was offline at least and at most, and what it said

    def fail(view: View) -> None:
        begins = time.monotonic()
        view.page.context.set_offline(True)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < OFFLINE_SECONDS:
            text = view.message()
            said.append((passed, time.monotonic() - begins, text))
            view.page.wait_for_timeout(100)
        view.page.context.set_offline(False)
        view.wait("seen().state === 'open'")
        came = view.length()
        view.wait(f"collected.length > {came + 500}")

    came, sent = flowing(paged, chromium, fail)
    assert came == sent
    print(f"{len(came)} bytes")
    assert {text for _, most, text in said if most < QUIET_SECONDS - 0.2} == {""}
    late = [text for least, _, text in said if least > QUIET_SECONDS + 1]
    assert all(re.fullmatch(r"Offline for \d+ s; what you type is kept\.", text) for text in late), late
    shown = [int(text.split()[2]) for text in late]
    assert shown == sorted(shown)
    assert shown[-1] >= OFFLINE_SECONDS - 2


def test_what_is_typed_while_offline_arrives_once(paged: Web, chromium: Chromium) -> None:
    name = paged.session()
    view = chromium.opened(paged.link(name))
    path = paged.rig.directory / f"{name}.typed"
    view.page.context.set_offline(True)
    view.line(f"echo once >> {path}")
    view.page.context.set_offline(False)
    wait_for(path.exists, name="the file")
    view.line("echo done")
    view.expect("^done$")
    assert path.read_text() == "once\n"


# ---- other tabs and devices --------------------------------------------------------------------------------------


def test_a_closed_tab_comes_back_without_its_link(paged: Web, chromium: Chromium) -> None:
    first = chromium.opened(paged.link(paged.session()))
    first.page.close()
    view = chromium.opened(paged.link(paged.session()), first.page.context)
    view.line(
        'for i in $(seq 60); do echo -e "row $i \\e[3$((i % 8))min colour\\e[0m 漢字"; done; cd /; cat > /dev/null'
    )
    view.expect("^row 60 ")
    view.type("half a line")
    before = view.expect("half a line$")
    uid = view.tab()["uid"]
    device = view.page.context
    view.page.close()
    again = chromium.view(device)
    again.open(paged.url)
    again.expect("half a line$")
    assert again.tab()["uid"] == uid
    assert again.text() == before
    # What was open beside it is there, too.
    assert again.eval("() => sterna.tabs.map((tab) => tab.active)") == [False, True]


def test_two_tabs_share_a_session(paged: Web, chromium: Chromium) -> None:
    """Neither displaces the other, on one device and on two."""
    name = paged.session()
    one = chromium.opened(paged.link(name))
    two = chromium.opened(paged.url, one.page.context)
    other = chromium.opened(paged.link(name))
    for number, view in enumerate((one, two, other), 1):
        view.page.bring_to_front()
        view.line(f"echo from $(({number} * 111))")
        for each in (one, two, other):
            each.expect(f"^from {number * 111}$")
    assert {view.tab()["state"] for view in (one, two, other)} == {"open"}
    assert len(paged.about(name)["attachments"]) == 3
    one.wait("document.querySelector('#presence').textContent === '2 other devices'")
    assert one.text() == two.text() == other.text()


def test_the_terminal_and_the_browser_take_turns(paged: Web, chromium: Chromium) -> None:
    """Suspended on the terminal, resumed in the browser, and back: one session that has seen everything."""
    name = paged.session()
    terminal = paged.rig.terminal(*attach_words(paged.rig, name)[3:], cols=90, rows=30)
    terminal.type("a=from-terminal; echo $a-$((1 + 1))\r")
    terminal.expect("from-terminal-2")
    terminal.type("\r~d")
    assert terminal.wait() == 0
    view = chromium.opened(paged.link(name))
    view.expect("^from-terminal-2$")
    view.line("b=from-page; echo $a $b $((2 + 2))")
    view.expect("^from-terminal from-page 4$")
    uid = view.tab()["uid"]
    view.page.close()
    again = paged.rig.terminal(*attach_words(paged.rig, name)[3:], cols=90, rows=30)
    again.expect("from-terminal from-page 4")
    again.type("echo $a $b $((3 + 3))\r")
    again.expect("from-terminal from-page 6")
    assert paged.about(name)["uid"] == uid


# ---- sizes -------------------------------------------------------------------------------------------------------


def told(view: View) -> tuple[int, int]:
    """The size that the program sees, which it is asked for."""
    view.line('clear; echo "<$(stty size)>"')
    text = view.expect(r"^<\d+ \d+>$")
    found = re.findall(r"^<(\d+) (\d+)>$", text, re.MULTILINE)[-1]
    return int(found[1]), int(found[0])


def fills(view: View) -> bool:
    """Tells whether the terminal fills its room: no row or column more would fit, and nothing is cut off."""
    gaps = view.eval(
        """() => {
          const host = document.querySelector(".panel:not([hidden]) .screen").getBoundingClientRect();
          const screen = document.querySelector(".panel:not([hidden]) .xterm-screen").getBoundingClientRect();
          const { terminal } = seen();
          const [w, h] = [screen.width / terminal.cols, screen.height / terminal.rows];
          return [(host.right - screen.right) / w, (host.bottom - screen.bottom) / h, screen.top - host.top];
        }"""
    )
    right, below, above = map(float, gaps)
    return 0 <= right < 4 and 0 <= below < 1 and 0 <= above < 2


_COLOURS = """
async (picture) => {
  const bitmap = await createImageBitmap(new Blob([Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0))]));
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const found = new Set();
  for (let at = 0; at < data.length; at += 4) found.add(`rgb(${data[at]}, ${data[at + 1]}, ${data[at + 2]})`);
  return [...found];
}
"""


def colours(view: View, selector: str, rows: int) -> set[str]:
    """The colours of the lowest rows of pixels of something."""
    box = view.page.locator(selector).bounding_box()
    assert box is not None
    picture = view.page.screenshot(clip={**box, "y": box["y"] + box["height"] - rows, "height": rows})
    return set(view.eval(_COLOURS, base64.b64encode(picture).decode()))


def test_the_program_sees_the_size_of_the_page(paged: Web, chromium: Chromium) -> None:
    view = chromium.opened(paged.link(paged.session()))
    first = told(view)
    assert first == view.size()
    assert wait_for(lambda: fills(view), name="a terminal that fills the page")
    for width, height in ((700, 420), (1500, 900)):
        view.page.set_viewport_size({"width": width, "height": height})
        wait_for(lambda: fills(view), name="a terminal that fills the page")
        wait_for(lambda: told(view) == view.size(), name="the program's size")
        assert view.size() != first
        # Below the last row there is the terminal's own colour.
        ground = view.eval("() => getComputedStyle(document.querySelector('.panel:not([hidden])')).backgroundColor")
        assert colours(view, ".panel:not([hidden])", 3) == {ground}
        wait_for(lambda: view.page.inner_text("#size") == "{}×{}".format(*view.size()), 3, name="the size that is told")


def test_who_types_last_decides_the_size(paged: Web, chromium: Chromium) -> None:
    """The page shows a session that has the terminal's size as it is, and takes it over by typing."""
    name = paged.session()
    view = chromium.opened(paged.link(name))
    own = told(view)
    terminal = paged.rig.terminal(*attach_words(paged.rig, name)[3:], cols=60, rows=20)
    terminal.type('echo "<$(stty size)>"\r')
    terminal.expect("<20 60>")
    wait_for(lambda: view.size() == (60, 20), name="the page in the terminal's size")
    assert "60×20" in view.page.inner_text("#size")
    wait_for(lambda: told(view) == own, name="the page's size again")
    wait_for(lambda: view.size() == own, name="the page in its own size")


def test_controls_of_these_tests(paged: Web, chromium: Chromium, tmp_path: Path) -> None:
    """A mark that is missing or doubled, and a text that never comes, are failures."""
    assert fails(lambda: slices(b"<<<a", b"<<<", b">>>"))
    assert fails(lambda: slices(b"<<<a>>><<<", b"<<<", b">>>"))
    view = chromium.opened(paged.link(paged.session()))
    assert fails(lambda: view.expect("never", 0.3))
    assert len(colours(view, "#bar", 20)) > 3
