"""Text as the contract writes it: quoting, paths cleaned lexically, the operating system's error texts."""

from __future__ import annotations

import os
import posixpath
from errno import EINVAL
from unicodedata import category

_SHORT = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def _quoted(char: str) -> str:
    code = ord(char)
    if code in _SHORT:
        return _SHORT[code]
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if category(char)[0] in "LMNPS" or char == " ":
        return char
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def quote(text: str) -> str:
    """Returns `text` in double quotes: printable Unicode raw, everything else escaped (strconv.Quote)."""
    return f'"{"".join(map(_quoted, text))}"'


def trim(text: str) -> str:
    """Returns `text` without the white space at its ends (strings.TrimSpace; U+001C to U+001F are no space)."""
    return text.strip(_SPACE)


def clean(path: str) -> str:
    """Returns the shortest path that is lexically the same (path.Clean); links are not looked at."""
    done = posixpath.normpath(path)
    return done[1:] if done.startswith("//") else done


def join(directory: str, name: str) -> str:
    """Returns the cleaned path of `name` in `directory`; an absolute name stays below it (path.Join)."""
    parts = [part for part in (directory, name) if part]
    return clean("/".join(parts)) if parts else ""


def working_directory() -> str:
    """Returns where relative paths begin; when that is deleted, where it was, as `..` still leads above it."""
    try:
        return text_of(os.getcwdb())
    except FileNotFoundError:
        return text_of(os.readlink(b"/proc/self/cwd").removesuffix(b" (deleted)"))


def absolute(path: str) -> str:
    """Returns the cleaned absolute path, relative ones seen from the working directory."""
    return clean(path) if path.startswith("/") else join(working_directory(), path)


def expand(path: str, home: str) -> str:
    """Returns `path` with a leading `~` or `~/` replaced by `home`; an empty `home` expands nothing."""
    if not home or not path.startswith("~"):
        return path
    if path == "~":
        return home
    return join(home, path[2:]) if path[1] == "/" else path


def bytes_of(text: str) -> bytes:
    """Returns what the operating system is given for a text: UTF-8, with undecodable bytes as they came in."""
    return text.encode("utf-8", "surrogateescape")


def text_of(raw: bytes) -> str:
    """Returns what came from the operating system as text; bytes that are no UTF-8 become lone surrogates."""
    return raw.decode("utf-8", "surrogateescape")


def errno_text(number: int) -> str:
    """Returns the text of an error number, its first letter small unless the word is an acronym."""
    text = os.strerror(number)
    return text[0].lower() + text[1:] if text[:1].isupper() and text[1:2].islower() else text


def number_of(error: OSError | ValueError) -> int:
    """Returns the error number of a failed system call; `ValueError` is Python's word for a NUL in a path."""
    return error.errno or EINVAL if isinstance(error, OSError) else EINVAL


def failure(operation: str, path: str, error: OSError | ValueError) -> str:
    """Returns the error text of an operation on a path, `stat /x: permission denied`."""
    return f"{operation} {path}: {errno_text(number_of(error))}"
