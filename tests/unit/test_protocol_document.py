"""docs/protocol.md says what the code does: its tables are written from it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sterna.errors import Code
from sterna.protocol.frame import Type
from sterna.protocol.states import Cause

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")


def tables(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts/protocol_tables"), "--check"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=50, check=False, env={"PYTHONPATH": str(ROOT / "src")}
    )


def test_the_tables_are_fresh() -> None:
    result = tables(ROOT)
    assert result.returncode == 0, result.stderr


def test_the_sections_that_the_code_names_are_there() -> None:
    heads = set(re.findall(r"^## (\d)\. ", DOCUMENT, re.MULTILINE))
    assert heads == set("123456")
    for path in sorted((ROOT / "src").rglob("*.py")):
        for named in re.findall(r"protocol\.md, sections? (\d)", path.read_text(encoding="utf-8")):
            assert named in heads, f"{path.name} names section {named}"


def test_everything_is_named() -> None:
    for kind in Type:
        assert f"| 0x{kind:02X} | {kind.name} |" in DOCUMENT
    for code in Code:
        assert f"| {int(code)} | `{code.name.lower()}` |" in DOCUMENT
    for cause in Cause:
        assert cause.value in DOCUMENT


@pytest.mark.parametrize(
    ("old", "new"), [("| 0x07 | ACK |", "| 0x08 | ACK |"), ("| `position` | u63 |", "| `position` | int |")]
)
def test_control_a_stale_table_is_found(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/protocol_tables", tmp_path / "scripts/protocol_tables")
    assert old in DOCUMENT
    (tmp_path / "docs/protocol.md").write_text(DOCUMENT.replace(old, new, 1), encoding="utf-8")
    assert tables(tmp_path).returncode == 1
    (tmp_path / "docs/protocol.md").write_text(DOCUMENT, encoding="utf-8")
    assert tables(tmp_path).returncode == 0
