"""House rules no linter knows: sizes, a reason beside every lint ignore, nothing of one machine in the tree."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

FILE_MAX_LINES = 800
FUNCTION_MAX_LINES = 70

# What a checkout grows by itself (see .gitignore); everything else in the tree is ours.
_GROWN = frozenset(
    {
        ".git", ".venv", ".lock-venv", "__pycache__", "build", "dist", "node_modules",
        ".mypy_cache", ".ruff_cache", ".pytest_cache", ".import_linter_cache", ".hypothesis", ".fuzz",
    }
)  # fmt: skip

# Written in parts, so that this file does not hold what it forbids.
_MACHINE_PATH = re.compile(r"(?<![\w.~$}/*-])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me"]) + r")(?![\w.-])")
_REGISTRIES = tuple(
    name + "." + end
    for name, end in (
        ("py" + "pi", "org"), ("python" + "hosted", "org"), ("npm" + "js", "org"), ("npm" + "js", "com"),
        ("yarn" + "pkg", "com"), ("crates", "io"), ("registry-1" + ".docker", "io"), ("gh" + "cr", "io"),
        ("quay", "io"), ("deb.debian", "org"), ("proxy.golang", "org"),
    )
)  # fmt: skip
_SHARED = "../" + "shared"

# A reason is at least eight characters after the codes.
_REASON = r"\s*\w.{7,}"
_NOQA_WITH_REASON = re.compile(r"#\s*noqa:\s*[A-Z]+[0-9]+(?:\s*,\s*[A-Z]+[0-9]+)*\s*(?:--?|–|—|#|:|\()" + _REASON)
_TYPE_IGNORE_WITH_REASON = re.compile(r"#\s*type:\s*ignore\[[\w, -]+\]\s*#" + _REASON)
_RUFF_CODE = re.compile(r'^\s*"[A-Z]{1,4}[0-9]{0,4}",?\s*(.*)$')


def tree_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and not _GROWN.intersection(parts) and not any(part.endswith(".egg-info") for part in parts):
            yield path


def python_files(*folders: str) -> list[Path]:
    return [path for path in tree_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def long_functions(source: str) -> list[str]:
    """Names the functions of more than FUNCTION_MAX_LINES lines, from `def` to the last line of the body."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_MAX_LINES:
                found.append(f"{node.name} (line {node.lineno}): {lines} lines")
    return found


def bare_ignores(source: str) -> list[str]:
    """Lists the comments that silence a checker without saying why, or without naming what they silence."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        for mark, good in ((r"#\s*noqa", _NOQA_WITH_REASON), (r"#\s*type:\s*ignore", _TYPE_IGNORE_WITH_REASON)):
            if re.search(mark, token.string, re.IGNORECASE) and not good.search(token.string):
                found.append(f"line {token.start[0]}: {token.string}")
        if re.search(r"#\s*(?:ruff|flake8):\s*noqa|#\s*mypy:\s*ignore", token.string):
            found.append(f"line {token.start[0]}: {token.string} (a whole file)")
    return found


def foreign_text(text: str, *, shared_allowed: bool) -> list[str]:
    """Lists what belongs to one machine, not to the project: paths, registries' hosts, the folder beside it."""
    found = [match.group() for match in _MACHINE_PATH.finditer(text)]
    found += [host for host in _REGISTRIES if host in text]
    if not shared_allowed and _SHARED in text:
        found.append(_SHARED)
    return found


def test_files_and_functions_are_short() -> None:
    faults = []
    for path in python_files("src", "tests"):
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        lines = len(source.splitlines())
        if lines > FILE_MAX_LINES:
            faults.append(f"{name}: {lines} lines")
        faults += [f"{name}: {fault}" for fault in long_functions(source)]
    assert not faults, "\n".join(faults)


def test_every_lint_ignore_says_why() -> None:
    faults = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in python_files("src", "tests", "bench", "examples", "scripts")
        for fault in bare_ignores(path.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


def test_every_ignore_of_the_configuration_says_why() -> None:
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.ruff.lint]", 1)[1]
    section = section.split("\nignore = [", 1)[1].split("[tool.ruff.lint.pydocstyle]", 1)[0]
    codes = [match for match in map(_RUFF_CODE.match, section.splitlines()) if match]
    assert len(codes) > 10
    assert [match.group() for match in codes if not re.fullmatch("#" + _REASON, match.group(1))] == []


def test_nothing_of_a_machine_is_in_the_tree() -> None:
    faults = []
    for path in tree_files():
        name = path.relative_to(ROOT)
        text = path.read_bytes().decode("utf-8", errors="replace")
        faults += [f"{name}: {fault}" for fault in foreign_text(text, shared_allowed=name.parts[0] == "tests")]
    assert not faults, "\n".join(faults)


def test_control_a_long_function_is_found() -> None:
    body = "    pass\n" * (FUNCTION_MAX_LINES - 1)
    assert long_functions(f"def f():\n{body}") == []
    assert long_functions(f"async def f():\n{body}    pass\n") == [f"f (line 1): {FUNCTION_MAX_LINES + 1} lines"]


@pytest.mark.parametrize(
    "comment",
    ["noqa", "noqa: S603", "noqa: S603 - why", "type: ignore", "type: ignore[arg-type]", "type: ignore  # no code here",
     "ruff: noqa: S101 - the whole file"],
)  # fmt: skip
def test_control_an_ignore_without_reason_is_found(comment: str) -> None:
    assert bare_ignores(f"x = 1  # {comment}\n")


@pytest.mark.parametrize(
    "comment",
    ["noqa: S603 - argv from this file", "noqa: S102, S307 -- own text", "type: ignore[arg-type]  # its stub is wrong"],
)  # fmt: skip
def test_an_ignore_with_reason_is_fine(comment: str) -> None:
    assert bare_ignores(f"x = 1  # {comment}\n") == []


def test_control_foreign_text_is_found() -> None:
    for folder in ("wo" + "rk", "ro" + "ot", "ho" + "me"):
        assert foreign_text(f"open('/{folder}/x')", shared_allowed=True) == [f"/{folder}"]
        assert foreign_text(f"see docs/{folder}/x, ~/{folder}", shared_allowed=True) == []
    for host in _REGISTRIES:
        assert host in foreign_text(f"https://{host}/simple", shared_allowed=True)
    assert foreign_text(_SHARED + "/x", shared_allowed=False) == [_SHARED]
    assert foreign_text(_SHARED + "/x", shared_allowed=True) == []
