"""An agent that writes exactly what a test wants: each line typed names a file, whose bytes go to the terminal."""

from __future__ import annotations

import os
import tty


def main() -> None:
    tty.setraw(0)
    os.write(1, b"ready\r\n")
    line = b""
    while True:
        typed = os.read(0, 1)
        if typed not in (b"\r", b"\n"):
            line += typed
            continue
        with open(line, "rb") as file:
            data = file.read()
        line = b""
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
