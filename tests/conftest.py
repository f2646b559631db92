"""What all tests share: both event loops, a watch on blocking calls, hypothesis without a clock of its own.

The time limit of a test (60 s, pytest-timeout) and warnings as errors are set in pyproject.toml.
"""

from __future__ import annotations

import inspect
import os
import signal
import stat
import sys
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from blockbuster import BlockBuster

if TYPE_CHECKING:
    from collections.abc import Iterator

# A slow machine is no failure (pytest-timeout bounds the whole test); the blob reproduces a failing example anywhere.
hypothesis.settings.register_profile("sterna", deadline=None, print_blob=True)
hypothesis.settings.load_profile("sterna")

# Who runs the tests may ignore them (nohup; a shell's `&`), and programs under test would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

_BACKENDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(
        ("asyncio", {"use_uvloop": True}),
        id="uvloop",
        marks=pytest.mark.skipif(sys.platform == "win32", reason="uvloop does not exist for Windows"),
    ),
]

# Calls on the loop that may block, each for its reason; sleeping, locks, blocking sockets, pipes and terminals may not.
_ALLOWED = (
    ("sqlite3.", "the node's metadata is written on the loop: WAL with synchronous=NORMAL does not wait for the disk"),
    ("io.", "configuration, key and token files are a few hundred bytes on a local disk, read once"),
    ("os.path.", "names of local files"),
    *(
        (f"os.{name}", "entries of the local state and socket directories")
        for name in (
            "access",
            "getcwd",
            "link",
            "listdir",
            "mkdir",
            "readlink",
            "remove",
            "rename",
            "replace",
            "rmdir",
            "scandir",
            "stat",
            "statvfs",
            "symlink",
            "unlink",
        )
    ),
)


@pytest.fixture(params=_BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Every async test runs on stock asyncio and on uvloop; a test that needs one of them overrides this fixture."""
    return request.param


def _cannot_block(fd: int, *_args: object) -> bool:
    return not os.get_blocking(fd) or stat.S_ISREG(os.fstat(fd).st_mode)


def watch_blocking_calls() -> BlockBuster:
    """Returns a watch, not yet activated, that raises BlockingError where sterna blocks a running event loop."""
    watch = BlockBuster("sterna")
    for prefix, _reason in _ALLOWED:
        for name in [name for name in watch.functions if name.startswith(prefix)]:
            del watch.functions[name]
    # The journal's arenas are regular files: reads and writes of the page cache. Pipes and terminals stay watched.
    for name in ("os.read", "os.write"):
        watch.functions[name].can_block_predicate = _cannot_block
    return watch


@pytest.fixture(autouse=True)
def _no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    if not inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        yield
        return
    watch = watch_blocking_calls()
    watch.activate()
    try:
        yield
    finally:
        watch.deactivate()
