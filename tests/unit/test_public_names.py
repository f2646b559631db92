"""The library's interface: these names and no others, and nothing heavy before one is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sterna

# A change here is a change of the interface: say so in the changelog.
NAMES = {
    "AgentError": "sterna.errors",
    "Code": "sterna.errors",
    "ConfigError": "sterna.errors",
    "ConnectionLostError": "sterna.errors",
    "Gap": "sterna.protocol.client",
    "Notice": "sterna.protocol.client",
    "ProtocolError": "sterna.errors",
    "RefusedError": "sterna.errors",
    "Session": "sterna.client.aio",
    "SternaError": "sterna.errors",
    "StorageError": "sterna.errors",
    "TrustError": "sterna.errors",
    "Trouble": "sterna.protocol.client",
    "Uncertain": "sterna.protocol.client",
    "UsageError": "sterna.errors",
    "connect": "sterna.client.aio",
}


def test_the_names_are_pinned() -> None:
    assert set(sterna.__all__) == {*NAMES, "__version__"}
    assert dir(sterna) == sorted(sterna.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_comes_from_where_it_is_kept(name: str) -> None:
    value = getattr(sterna, name)
    assert (value.__module__, value.__name__) == (NAMES[name], name)
    assert value.__doc__


def test_control_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'conect'"):
        _ = sterna.conect  # type: ignore[attr-defined]  # the mistake is the point


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    ours = {name for name in imported_by("import sterna") if name.startswith("sterna.")}
    assert ours == set()


@pytest.mark.parametrize("module", ["sterna.client.calls", "sterna.client.blocking", "sterna.cli.commands"])
def test_scripts_pay_for_no_event_loop(module: str) -> None:
    heavy = {"asyncio", "dataclasses", "rich", "segno", "uvloop", "sqlite3", "cryptography.x509"}
    assert imported_by(f"import {module}") & heavy == set()


def test_a_plain_attach_starts_without_the_library_of_command_lines() -> None:
    # No node is there: it comes as far as finding that out.
    code = "import sys\nsys.argv = ['sterna', 'attach', '--host', '192.0.2.1', '--state', '/nonexistent', %s]\n"
    code += "from sterna.cli.main import main\ntry: main()\nexcept SystemExit: pass"
    plain = imported_by(code % "'--name', 'x'")
    assert "sterna.client.endpoint" in plain
    assert not {"click", "inspect", "typing_extensions"} & plain
    assert "click" in imported_by(code % "'--help'")


def test_control_connect_does_need_the_event_loop() -> None:
    assert "asyncio" in imported_by("import sterna; sterna.connect")
