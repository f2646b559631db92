"""The sans-IO core takes time, randomness and bytes as arguments: it imports nothing that could fetch them itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

FORBIDDEN = (
    "asyncio", "logging", "random", "secrets", "select", "selectors",
    "socket", "ssl", "subprocess", "threading", "time",
)  # fmt: skip

# Runs in a fresh interpreter: argv is the source folder, the package, and the forbidden modules.
# Two nets: an import written in our own code raises (also of a module that is loaded already); and a module that our
# code drags in through the standard library is found in sys.modules afterwards. What the native packages of the core
# import for themselves is loaded before, so it is neither.
PROGRAM = """
import builtins, importlib, importlib.util, pkgutil, sys

source, package, *forbidden = sys.argv[1:]
sys.path.insert(0, source)
own = package.partition(".")[0]
zstd = "backports.zstd" if sys.version_info < (3, 14) else "compression.zstd"
for name in ("msgspec", "msgspec.msgpack", "fastcrc", zstd):
    importlib.import_module(name)
before = set(sys.modules)
real_import = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and importer.partition(".")[0] == own and name.partition(".")[0] in forbidden:
        raise ImportError(f"{importer} imports {name}")
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
root = importlib.import_module(package)
modules = [package] + [found.name for found in pkgutil.walk_packages(root.__path__, package + ".")]
for name in modules:
    importlib.import_module(name)
dragged = sorted(name for name in set(sys.modules) - before if name.partition(".")[0] in forbidden)
if dragged:
    sys.exit(f"{package} drags in {', '.join(dragged)}")
print(len(modules))
"""


def import_all(source: Path, package: str) -> subprocess.CompletedProcess[str]:
    """Imports every module of `package` under the hook, in an interpreter of its own."""
    command = [sys.executable, "-I", "-B", "-c", PROGRAM, os.fspath(source), package, *FORBIDDEN]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def forbidden_imports(folder: Path) -> list[str]:
    """Names the forbidden imports written anywhere in the folder, also those inside functions."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            found += [
                f"{path.name}:{node.lineno} imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN
            ]
    return found


def test_the_core_imports_without_a_clock_socket_or_randomness() -> None:
    result = import_all(SOURCE, "sterna.protocol")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(list((SOURCE / "sterna/protocol").rglob("*.py")))


def test_no_function_of_the_core_imports_them_later() -> None:
    assert forbidden_imports(SOURCE / "sterna/protocol") == []


@pytest.mark.parametrize("module", FORBIDDEN)
def test_control_a_direct_import_fails(tmp_path: Path, module: str) -> None:
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up/__init__.py").touch()
    (tmp_path / "made_up/core.py").write_text(f"from {module} import *\n")
    assert f"made_up.core imports {module}" in import_all(tmp_path, "made_up").stderr
    assert forbidden_imports(tmp_path) == [f"core.py:1 imports {module}"]


def test_control_a_leaf_that_imports_one_for_the_core_fails(tmp_path: Path) -> None:
    (tmp_path / "made_up/core").mkdir(parents=True)
    (tmp_path / "made_up/__init__.py").touch()
    (tmp_path / "made_up/leaf.py").write_text("import time\n")
    (tmp_path / "made_up/core/__init__.py").write_text("from made_up import leaf\n")
    assert "made_up.leaf imports time" in import_all(tmp_path, "made_up.core").stderr


def test_control_the_standard_library_may_not_drag_them_in(tmp_path: Path) -> None:
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up/__init__.py").write_text("import http.client\n")
    assert "made_up drags in" in import_all(tmp_path, "made_up").stderr


def test_control_an_import_inside_a_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "core.py").write_text("def now() -> int:\n    import time\n    return time.time_ns()\n")
    assert forbidden_imports(tmp_path) == ["core.py:2 imports time"]
