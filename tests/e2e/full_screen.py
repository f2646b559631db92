"""A full-screen program like htop, but one that shows the same at every run: meters, a coloured table, keys, the mouse.

Arrows and Page keys move, `l` redraws 300 times as fast as it can, `t` sets the title, `q` or F10 leaves.
"""

from __future__ import annotations

import contextlib
import curses
import locale
import sys

NAMES = (
    "systemd",
    "bash --norc",
    "vim notes.txt",
    "数据库 服务",
    "cafe\u0301 au lait",
    "python3 -m http.server",
    "😀 emoji",
)
FRAMES = 300


class Monitor:
    def __init__(self, window: curses.window) -> None:
        self.window = window
        self.selected = 0
        self.frame = 0
        self.keys = 0
        self.last = "none"
        curses.curs_set(0)
        curses.use_default_colors()
        for pair in range(1, 8):
            curses.init_pair(pair, pair, -1)
        curses.init_pair(8, 0, 2)
        curses.init_pair(9, 231, 24)
        curses.mousemask(curses.ALL_MOUSE_EVENTS)

    def draw(self) -> None:
        window = self.window
        rows, cols = window.getmaxyx()
        window.erase()
        for meter in range(4):
            full = (self.frame * 7 + meter * 13) % max(cols // 2 - 8, 1)
            self._put(meter, 0, f"{meter + 1:3}[", curses.A_BOLD)
            self._put(meter, 4, "|" * full, curses.color_pair(2 + meter))
            self._put(meter, cols // 2 - 3, f"{full:2}%]")
        self._put(1, cols // 2 + 2, f"keys {self.keys} last {self.last} frame {self.frame}")
        window.move(4, 0)
        window.hline(curses.ACS_HLINE, cols)
        header = f"{'PID':>7} {'USER':<8} {'CPU%':>5} COMMAND"
        self._put(5, 0, header.ljust(cols - 1), curses.color_pair(8))
        for row in range(6, rows - 1):
            self._row(row, row - 6, cols)
        for number, name in ((1, "Help"), (2, "Setup"), (5, "Tree"), (10, "Quit")):
            column = number * 7 - 7
            self._put(rows - 1, column, f"F{number}")
            self._put(rows - 1, column + len(f"F{number}"), f"{name:<4}", curses.A_REVERSE)
        window.refresh()

    def _row(self, row: int, index: int, cols: int) -> None:
        load = (self.frame + index) * 31 % 1000 / 10
        line = f"{1000 + index * 37:>7} user{index % 3:<4} {load:>5} {NAMES[index % len(NAMES)]}"
        style = curses.color_pair(1 + index % 7) | (curses.A_BOLD if index % 2 else curses.A_NORMAL)
        if index == self.selected:
            style = curses.color_pair(9) | curses.A_UNDERLINE
            self._put(row, 0, " " * (cols - 1), style)
        self._put(row, 0, line, style)

    def _put(self, row: int, column: int, text: str, style: int = 0) -> None:
        rows, cols = self.window.getmaxyx()
        if row < rows and 0 <= column < cols - 1:
            with contextlib.suppress(curses.error):  # a wide character at the edge of a narrow terminal
                self.window.addnstr(row, column, text, cols - 1 - column, style)

    def run(self) -> None:
        while True:
            self.draw()
            key = self.window.getch()
            self.keys += key != curses.KEY_RESIZE
            if key in (ord("q"), curses.KEY_F10):
                return
            if key == curses.KEY_MOUSE:
                _, x, y, _, state = curses.getmouse()
                self.last = f"mouse {x},{y},{state}"
            elif key == curses.KEY_RESIZE:
                self.window.clearok(True)
            else:
                self.last = curses.keyname(key).decode()
            self._act(key)

    def _act(self, key: int) -> None:
        step = {curses.KEY_UP: -1, curses.KEY_DOWN: 1, curses.KEY_PPAGE: -5, curses.KEY_NPAGE: 5}.get(key, 0)
        self.selected = max(0, self.selected + step)
        if key == ord("l"):
            for _ in range(FRAMES):
                self.frame += 1
                self.draw()
        elif key == ord("t"):
            sys.stdout.write("\x1b]2;a title — 标题\x07")
            sys.stdout.flush()


if __name__ == "__main__":
    locale.setlocale(locale.LC_ALL, "")
    curses.wrapper(lambda window: Monitor(window).run())
