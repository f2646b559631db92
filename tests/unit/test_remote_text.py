from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from sterna.remote.environment import child_environment, find_command
from sterna.remote.files import mode_text
from sterna.remote.flags import FlagError, duration, duration_text, integer, parse, usage
from sterna.remote.git import repo_slug
from sterna.remote.gotext import clean, errno_text, expand, join, quote, trim


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("a b", '"a b"'), ('"\\', r'"\"\\"'), ("\a\b\f\n\r\t\v", r'"\a\b\f\n\r\t\v"'),
        ("\x00\x1f\x7f", r'"\x00\x1f\x7f"'),
        ("é€😀\ufffd", '"é€😀\ufffd"'), ("\xa0\u200b\u2028\xad", r'"\u00a0\u200b\u2028\u00ad"'),
        ("\U000e0001", r'"\U000e0001"'),
        ("\udcff", r'"\xff"'), ("<&>", '"<&>"'), ("\u3000", r'"\u3000"'), ("\u0301", '"\u0301"'),
    ],
)  # fmt: skip
def test_quoting(text: str, quoted: str) -> None:
    assert quote(text) == quoted


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [
        ("", "."),
        ("/", "/"),
        ("//", "/"),
        ("//a", "/a"),
        ("/..", "/"),
        ("a/..", "."),
        ("../a", "../a"),
        ("a//b/./c/..", "a/b"),
        ("/a/", "/a"),
    ],
)
def test_paths_are_cleaned_lexically(path: str, cleaned: str) -> None:
    assert clean(path) == cleaned


def test_joined_paths_are_clean_and_stay_below() -> None:
    assert join("./fdir", "a") == "fdir/a"
    assert join("/d", "/abs/x") == "/d/abs/x"
    assert join("/d", "../evil") == "/evil"
    assert join("", "") == ""


def test_only_a_leading_tilde_alone_or_before_a_slash_is_expanded() -> None:
    home = "/users/me/"
    assert expand("~", home) == home
    assert expand("~/", home) == "/users/me"
    assert expand("~/f/", home) == "/users/me/f"
    assert expand("~/../x", home) == "/users/x"
    for same in ("", "a/~", "~user/f", "$HOME", "/x/"):
        assert expand(same, home) == same
    assert expand("~/f", "") == "~/f"


def test_texts_of_error_numbers_begin_small() -> None:
    assert errno_text(errno.ENOENT) == "no such file or directory"
    assert errno_text(errno.ENOTEMPTY) == "directory not empty"
    assert errno_text(errno.EIO) == "input/output error"
    assert errno_text(errno.EREMCHG)[0].islower()


def test_white_space_is_trimmed_as_unicode_defines_it() -> None:
    assert trim("\u2003 a\x1c\n\x85") == "a\x1c"


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        (stat.S_IFREG | 0o644, "-rw-r--r--"), (stat.S_IFDIR | 0o755, "drwxr-xr-x"),
        (stat.S_IFREG | 0o4755, "urwxr-xr-x"),
        (stat.S_IFREG | 0o2755, "grwxr-xr-x"), (stat.S_IFDIR | 0o1777, "dtrwxrwxrwx"),
        (stat.S_IFCHR | 0o666, "Dcrw-rw-rw-"),
        (stat.S_IFBLK | 0o660, "Drw-rw----"), (stat.S_IFIFO | 0o644, "prw-r--r--"),
        (stat.S_IFSOCK | 0o755, "Srwxr-xr-x"),
        (stat.S_IFREG, "----------"), (stat.S_IFDIR | 0o7777, "dugtrwxrwxrwx"),
    ],
)  # fmt: skip
def test_modes(mode: int, text: str) -> None:
    assert mode_text(mode) == text


@pytest.mark.parametrize(
    ("url", "slug"),
    [
        ("https://github.com/o/r.git", "o/r"), ("https://user:pw@GitHub.com/o/r/", "o/r"),
        ("ssh://git@github.com/o/r", "o/r"),
        ("git://github.com/o/r.git//", "o/r"), ("git@github.com:o-x/r_.y.git", "o-x/r_.y"), ("github.com:o/r", "o/r"),
        ("http://github.com/o/r", "o/r"), ("https://github.com:443/o/r", ""),
        ("https://github.com/o/r/s", ""), ("https://github.com/o", ""),
        ("https://gitlab.com/o/r", ""), ("https://github.com.evil.com/o/r", ""), ("ftp://github.com/o/r", ""),
        ("file:///github.com/o/r", ""),
        ("https://github.com/-o/r", ""), ("https://github.com/o-/r", ""), ("https://github.com/o/-r", ""),
        ("https://github.com/o/..", ""),
        ("https://github.com/o/r.wiki.git", ""), ("https://github.com/o_x/r", ""),
        ("/srv/github.com/o/r", ""), ("", ""),
        ("https://github.com/o/.git", ""), ("https://github.com/o/r.git.git", "o/r.git"),
    ],
)  # fmt: skip
def test_the_slug_is_that_of_a_repository_on_one_host_only(url: str, slug: str) -> None:
    assert repo_slug(url) == slug


def test_flags() -> None:
    flags = parse(
        ["-serve", "--socket", "/s", "-token-fd=0x3", "-git-timeout", "1m30s", "-keep-children=F", "--", "-zzz"]
    )
    assert flags.bools["serve"]
    assert not flags.bools["keep-children"]
    assert flags.texts["socket"] == "/s"
    assert flags.ints["token-fd"] == 3
    assert flags.seconds("git-timeout") == 90
    assert flags.given == {"serve", "socket", "token-fd", "git-timeout", "keep-children"}
    assert parse([]).ints["cli-keep"] == 3
    assert not parse(["word", "-serve"]).bools["serve"]
    assert parse(["-stop", "-socket", "-x"]).texts["socket"] == "-x"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-zzz"], "flag provided but not defined: -zzz"), (["--zzz=1"], "flag provided but not defined: -zzz"),
        (["-socket"], "flag needs an argument: -socket"), (["---serve"], "bad flag syntax: ---serve"),
        (["-=x"], "bad flag syntax: -=x"),
        (["-serve=maybe"], 'invalid boolean value "maybe" for -serve: parse error'),
        (["-token-fd", "x"], 'invalid value "x" for flag -token-fd: parse error'),
        (["-cli-keep", "9223372036854775808"],
        'invalid value "9223372036854775808" for flag -cli-keep: value out of range'),
        (["-git-timeout=5"], 'invalid value "5" for flag -git-timeout: parse error'), (["-h"], ""),
    ],
)  # fmt: skip
def test_wrong_flags(words: list[str], text: str) -> None:
    with pytest.raises(FlagError) as caught:
        parse(words)
    assert str(caught.value) == text


def test_the_usage_names_every_flag() -> None:
    assert usage("p").startswith("Usage of p:\n  -bridge\n")
    assert "  -cli-keep int\n    \tversions to keep, 0 for all (default 3)\n" in usage("p")


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("-1", -1), ("0x1F", 31), ("0b11", 3), ("0o17", 15), ("017", 15), ("1_000", 1000), ("+5", 5)],
)
def test_integers_of_flags(text: str, value: int) -> None:
    assert integer(text) == value


def test_durations() -> None:
    assert duration("1h2m3.5s") == 3723_500_000_000
    assert duration("-1.5h") == -5400 * 10**9
    assert duration("0") == 0
    assert duration(".5ms") == 500_000
    for wrong in ("", "5", "s", "1x", "-", ".s", "1s2"):
        with pytest.raises(ValueError, match="parse error"):
            duration(wrong)
    assert [duration_text(duration(text)) for text in ("60s", "90m", "1500ms", "250ms", "0", "2h3s")] == [
        "1m0s", "1h30m0s", "1.5s", "250ms", "0s", "2h0m3s",
    ]  # fmt: skip


def test_the_environment_of_children() -> None:
    own = [b"A=1", b"PATH=/bin", b"odd", b"A=2"]
    assert child_environment(own, b"/login", {"B": "x=y", "A": "3", "C=D": ""}) == [
        b"odd", b"CLAUDE_SSH_DAEMON_CHILD=1", b"PATH=/login", b"B=x=y", b"A=3", b"C=D=",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="exec: environment variable contains NUL"):
        child_environment(own, b"", {"A": "\0"})


def test_commands_are_looked_up_as_a_shell_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name, mode in (("tool", 0o755), ("data", 0o644)):
        (tmp_path / "bin" / name).touch(mode)
        (tmp_path / "bin" / name).chmod(mode)
    path = f"/nowhere:{tmp_path}/bin/"
    assert find_command("tool", path) == f"{tmp_path}/bin/tool"
    assert find_command("./any/thing", path) == "./any/thing"
    for name, text in (
        ("data", 'exec: "data": executable file not found in $PATH'),
        ("a\0b", 'exec: "a\\x00b": executable file not found in $PATH'),
        (".", 'exec: ".": executable file not found in $PATH'), ("/", 'exec: "/": is a directory'),
    ):  # fmt: skip
        with pytest.raises(LookupError) as caught:
            find_command(name, path)
        assert str(caught.value) == text
    monkeypatch.chdir(tmp_path / "bin")
    with pytest.raises(LookupError, match="cannot run executable found relative to current directory"):
        find_command("tool", os.pathsep + "/bin")
