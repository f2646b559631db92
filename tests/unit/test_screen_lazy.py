"""A session's screen: collects cheaply, answers when asked, packs itself away, and loses nothing."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sterna import limits
from sterna.pod import libghostty, screen
from sterna.pod.screen import KEEP_BYTES, PENDING_MAX_BYTES, LazyScreen, ScreenCopy, engine_name, open_terminal

if TYPE_CHECKING:
    from sterna.pod.snapshot import Row

PROMPT = b"\x1b]0;user@host: ~\x07\x1b[01;32muser@host\x1b[00m:\x1b[01;34m~\x1b[00m$ "


def test_shows_everything_however_it_was_fed() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    r = random.Random(seed)
    data = b"".join(b"\x1b[%dmline %d \xe4\xb8\xad\r\n" % (r.randrange(30, 38), n) for n in range(3000))
    whole = open_terminal(80, 24)
    whole.feed(data)
    lazy = LazyScreen(80, 24)
    position = 0
    while position < len(data):
        step = r.choice([1, 7, 4092, 20_000])
        lazy.feed(data[position : position + step])
        position += step
        if r.random() < 0.3:
            lazy.idle()
        if r.random() < 0.1:
            lazy.replies()
    assert lazy.snapshot() == whole.snapshot()
    assert lazy.text() == whole.text()


def test_little_output_needs_no_engine() -> None:
    lazy = LazyScreen(80, 24)
    lazy.feed(PROMPT)
    lazy.idle()
    assert lazy.resting
    assert lazy._packed is None
    assert "user@host:~$" in lazy.text()
    assert lazy.title() == "user@host: ~"


def test_much_output_is_fed_at_once_and_packed_at_rest() -> None:
    lazy = LazyScreen(80, 24)
    lazy.feed(b"x" * PENDING_MAX_BYTES)
    lazy.feed(b"y")
    assert lazy.backlog == PENDING_MAX_BYTES + 1
    lazy.catch_up()
    assert lazy.backlog == 0
    busy = lazy.resting
    lazy.idle()
    assert (busy, lazy.resting) == (False, True)
    assert lazy._packed is not None
    assert len(lazy._packed) < KEEP_BYTES
    assert lazy.text().endswith("xy")


def test_answers_only_what_was_asked_since() -> None:
    lazy = LazyScreen(80, 24)
    lazy.feed(b"\x1b[c")
    lazy.replies()  # somebody was attached until now: their terminal has answered
    lazy.feed(b"plain")
    assert lazy.replies() == b""
    lazy.feed(b"\r\nab\x1b[6")
    assert lazy.replies() == b""
    lazy.feed(b"n")
    assert lazy.replies() == b"\x1b[2;3R", "a query in two pieces"
    assert lazy.replies() == b""
    lazy.feed(b"\x1b[c")
    assert lazy.answer_queries(b"\x1b[5n") == b"\x1b[0n"


def test_a_query_begun_before_the_rest_is_answered_after_it() -> None:
    lazy = LazyScreen(80, 24)
    lazy.feed(b"\x1b[")
    lazy.replies()
    lazy.idle()
    lazy.feed(b"6n")
    assert lazy.replies() == b"\x1b[1;1R"


def test_unread_answers_do_not_pile_up() -> None:
    lazy = LazyScreen(80, 24)
    for _ in range(3):
        lazy.feed(b"\x1b[c" * 400_000)
    assert len(lazy.replies()) <= limits.CONTROL_MAX_BYTES


def test_resize_comes_after_what_was_written_before() -> None:
    lazy, exact = LazyScreen(10, 5), open_terminal(10, 5)
    for target in (lazy, exact):
        target.feed(b"0123456789abc")
        target.resize(20, 5)
        target.feed(b"d")
    assert lazy.snapshot() == exact.snapshot()
    assert lazy.text().startswith("0123456789abcd")
    lazy.resize(0, 10**9)
    assert (lazy.cols, lazy.rows) == (1, limits.SIZE_MAX_CELLS)


def test_a_snapshot_too_large_goes_without_scroll_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SNAPSHOT_MAX_BYTES", 5_000)
    lazy = LazyScreen(80, 24)
    lazy.feed(b"".join(b"line %d\r\n" % n for n in range(2000)))
    data = lazy.snapshot()
    assert b"line 1999" in data
    assert len(data) < 5_000


def test_what_gets_too_large_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    if engine_name() != "ghostty":
        pytest.skip("libghostty-vt is not there")
    from sterna.pod import screen_ghostty

    looked: list[object] = []
    styled = screen_ghostty._RenderState._styled

    def counted(*args: Any, **options: Any) -> Row:
        looked.append(args)
        return styled(*args, **options)

    monkeypatch.setattr(screen_ghostty._RenderState, "_styled", counted)
    monkeypatch.setattr(limits, "SNAPSHOT_MAX_BYTES", 20_000)
    lazy = LazyScreen(80, 24)
    lazy.feed(b"".join(b"\x1b[31mline\x1b[32m %d\r\n" % n for n in range(5_000)))
    data = lazy.snapshot()
    assert b"line" in data
    assert len(data) < 5_000
    # Some 30 bytes a line: about 700 are looked at, then those of the screen.
    assert 500 < len(looked) < 1_200


def test_a_copy_shows_its_moment_while_the_screen_goes_on() -> None:
    if engine_name() != "ghostty":
        pytest.skip("only libghostty-vt can be copied")
    seed = random.randrange(1 << 32)
    print("seed", seed)
    r = random.Random(seed)
    lazy, whole = LazyScreen(80, 24), open_terminal(80, 24)
    copies: list[tuple[ScreenCopy, bytes, bytes]] = []
    ends = ["\r\n", "\x1b[H", "\x1b[?1049h", "\x1b[?1049l"]
    data = "".join(f"\x1b[3{r.randrange(8)}mline {n} \u6570\x1b[m{r.choice(ends)}" for n in range(2000)).encode()
    at = 0
    while at < len(data):
        step = r.randrange(1, 9000)
        lazy.feed(data[at : at + step])
        whole.feed(data[at : at + step])
        at += step
        if r.random() < 0.3:
            lazy.idle()
        copy = lazy.copy()
        assert copy is not None
        copies.append((copy, whole.snapshot(), whole.snapshot(scrollback=False)))
    for copy, with_lines, alone in copies:
        assert copy.snapshot() == with_lines
        assert copy.snapshot(False) == alone
        copy.close()


def test_replies_are_forgotten_without_waiting_for_who_draws() -> None:
    lazy = LazyScreen(80, 24)
    lazy.feed(b"\x1b[c")
    held, free = threading.Event(), threading.Event()

    def draw() -> None:
        with lazy._lock:
            held.set()
            assert free.wait(20)

    worker = threading.Thread(target=draw)
    worker.start()
    assert held.wait(20)
    waiter = threading.Thread(target=lazy.forget_replies, daemon=True)
    waiter.start()
    waiter.join(10)
    stuck = waiter.is_alive()
    free.set()
    worker.join()
    assert not stuck
    assert lazy.replies() == b""
    lazy.feed(b"\x1b[5n")
    assert lazy.replies() == b"\x1b[0n"


@pytest.mark.parametrize("fed", [False, True])
def test_only_what_is_asked_after_forgetting_is_answered(fed: bool) -> None:
    lazy = LazyScreen(80, 24)
    lazy.feed(b"\x1b[c\r\nab\x1b[6")
    if fed:
        lazy.catch_up()
    lazy.forget_replies()
    lazy.feed(b"n\x1b[5n")
    if fed:
        lazy.catch_up()
    assert lazy.replies() == b"\x1b[2;3R\x1b[0n"
    lazy.forget_replies()
    assert lazy.replies() == b""


def test_unfinished_output_is_known() -> None:
    lazy = LazyScreen(80, 24)
    assert lazy.at_ground()
    lazy.feed(b"\xe4\xb8")
    assert not lazy.at_ground()
    lazy.feed(b"\xad")
    assert lazy.at_ground()


def anonymous_bytes() -> int:
    with open("/proc/self/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not tell Pss_Anon")


@pytest.mark.parametrize("lines", [0, 300])
def test_an_idle_session_costs_a_few_kibibytes(lines: int) -> None:
    def session(number: int) -> LazyScreen:
        lazy = LazyScreen(80, 24)
        lazy.feed(
            b"".join(b"line %d of %d \x1b[31mwith colour\x1b[0m and more\r\n" % (n, number) for n in range(lines))
        )
        lazy.feed(PROMPT)
        lazy.replies()
        lazy.idle()
        return lazy

    warm = [session(n) for n in range(20)]
    gc.collect()
    before = anonymous_bytes()
    kept = [session(n) for n in range(200)]
    gc.collect()
    each = (anonymous_bytes() - before) / len(kept)
    print(f"{each:.0f} bytes a session with {lines} lines")
    assert each < 8 * 1024
    assert len(warm) == 20


def test_the_engine_is_loaded_only_when_wanted() -> None:
    code = (
        "import sys; from sterna.pod.screen import LazyScreen; s = LazyScreen(80, 24); s.feed(b'x'); s.idle();"
        "sys.exit(any(m in sys.modules for m in ('ctypes', 'pyghostty', 'pyte', 'cffi')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


def test_without_the_library_the_simpler_engine_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise libghostty.EngineMissingError("gone")

    monkeypatch.setattr(libghostty, "load", missing)
    screen.engine_name.cache_clear()
    try:
        lazy = LazyScreen(20, 5)
        lazy.feed(b"hello\x1b[6n")
        assert lazy.replies() == b"\x1b[1;6R"
        lazy.idle()
        assert lazy.text().startswith("hello")
        assert b"hello" in lazy.snapshot()
    finally:
        screen.engine_name.cache_clear()
