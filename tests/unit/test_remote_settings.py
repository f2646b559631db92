"""Flags that bound, `claustrum.conf`, and the levels of the log."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sterna.limits import REMOTE_CONFIG_MAX_BYTES
from sterna.remote import config
from sterna.remote.daemon import git_seconds
from sterna.remote.flags import Flags, parse
from sterna.remote.log import Log

SHA = "0123456789ABCDEF" * 2 + "01234567"


def configured(tmp_path: Path, text: str, *words: str) -> tuple[Flags, str]:
    """Returns the flags and the version override that a file with `text` and these words give."""
    (tmp_path / config.NAME).write_text(text)
    flags = parse(list(words))
    return flags, config.apply(config.read(str(tmp_path / config.NAME)), flags)


@pytest.mark.parametrize("flag", ["max-extract-bytes", "max-cli-bytes"])
def test_a_bound_below_zero_is_none(flag: str) -> None:
    assert parse([f"-{flag}", "-1"]).ints[flag] == 0
    assert parse([f"-{flag}", "1"]).ints[flag] == 1


@pytest.mark.parametrize("flag", ["git-timeout", "cli-probe-timeout", "cli-download-timeout", "libc-probe-timeout"])
def test_a_time_out_below_zero_is_none(flag: str) -> None:
    assert parse([f"-{flag}=-1s"]).seconds(flag) == 0
    assert parse([f"-{flag}=1s"]).seconds(flag) == 1


def test_numbers_that_bound_nothing_may_be_negative() -> None:
    flags = parse(["-token-fd", "-1", "-cli-keep=-2", "-strict", "-git-timeout", "-1s"])
    assert (flags.ints["token-fd"], flags.ints["cli-keep"], git_seconds(flags)) == (-1, -2, 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("1", True), ("YES", True), ("On", True),
        ("false", False), ("0", False), ("No", False), ("OFF", False),
    ],
)  # fmt: skip
def test_words_for_yes_and_no(tmp_path: Path, text: str, value: bool) -> None:
    for key in ("keep-children", "listen-pipe", "files-read-regular-only", "durable", "strict", "extensions"):
        before = "off" if value else "on"
        assert configured(tmp_path, f"{key} = {before}\n {key.upper()}={text} \n")[0].bools[key] == value


@pytest.mark.parametrize(
    ("key", "valid", "value", "invalid"),
    [
        ("keep-children", "on", True, ["maybe", "", "yess", "t"]),
        ("metrics-addr", "h:1", "h:1", ["", "h:\x7f", "h:é", "h:\t1"]),
        ("max-extract-bytes", "7", 7, ["-1", "x", "", "7k"]),
        ("max-cli-bytes", "0x10", 16, ["-1", "1.5", "9223372036854775808"]),
        ("git-timeout", "2s", 2 * 10**9, ["-1s", "2", ""]),
        ("cli-probe-timeout", "1m", 60 * 10**9, ["-1ns"]),
        ("cli-download-timeout", "3ms", 3 * 10**6, ["3 ms"]),
        ("libc-probe-timeout", "1h", 3600 * 10**9, ["never"]),
        ("version-override", SHA, SHA.lower(), [SHA[1:], SHA + "0", SHA[1:] + "g", SHA + SHA[:23], SHA + SHA]),
    ],
)  # fmt: skip
def test_an_invalid_line_leaves_a_valid_one_alone(
    tmp_path: Path, key: str, valid: str, value: object, invalid: list[str]
) -> None:
    def got(*values: str) -> object:
        flags, override = configured(tmp_path, "".join(f"{key} = {text}\n" for text in values))
        return override if key == "version-override" else {**flags.bools, **flags.texts, **flags.ints}[key]

    for wrong in invalid:
        assert got(wrong) == (0 if isinstance(value, int) else ""), wrong
        assert got(valid, wrong) == got(wrong, valid) == value, wrong


def test_of_valid_lines_the_last_one_counts_and_a_flag_beats_them(tmp_path: Path) -> None:
    text = "git-timeout = 1s\ngit-timeout = 2s\nmax-cli-bytes = 5\nmetrics-addr = h:1\nstrict = on\n#durable = on\n"
    flags, _ = configured(tmp_path, text, "-max-cli-bytes", "9", "-metrics-addr", "", "-strict=false")
    assert flags.seconds("git-timeout") == 2
    assert (flags.ints["max-cli-bytes"], flags.texts["metrics-addr"]) == (9, "")
    assert not flags.bools["strict"]
    assert not flags.bools["durable"]
    assert configured(tmp_path, f"version-override = {SHA + SHA[:24]}")[1] == (SHA + SHA[:24]).lower()


def test_what_is_behind_64_kib_of_a_file_is_not_read(tmp_path: Path) -> None:
    line = "keep-children = on"
    for more, value in ((0, True), (1, False)):
        flags, _ = configured(tmp_path, "#" * (REMOTE_CONFIG_MAX_BYTES - len(line) - 1 + more) + f"\n{line}\n")
        assert flags.bools["keep-children"] == value
    assert REMOTE_CONFIG_MAX_BYTES == 64 * 1024


# ------------------------------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize(
    ("level", "tags"),
    [
        ("debug", "DEBUG INFO  WARN  ERROR"), ("", "DEBUG INFO  WARN  ERROR"), ("loud", "DEBUG INFO  WARN  ERROR"),
        ("info", "INFO  WARN  ERROR"), ("INFO", "INFO  WARN  ERROR"),
        ("warn", "WARN  ERROR"), ("warning", "WARN  ERROR"), ("Warning", "WARN  ERROR"), ("error", "ERROR"),
    ],
)  # fmt: skip
def test_lines_below_the_level_are_not_written(level: str, tags: str) -> None:
    source, sink = os.pipe()
    log = Log(level, sink)
    for write in (log.debug, log.info, log.warn, log.error):
        write("[a] b")
    log.plain("as it is")
    os.close(sink)
    with open(source, "rb") as file:
        *lines, last = file.read().decode().split("\n")[:-1]
    matches = [re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d (.{5}) \[a\] b", line) for line in lines]
    assert " ".join(match[1] for match in matches if match) == tags
    assert (None in matches, last) == (False, "as it is")
