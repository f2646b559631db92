"""The watch on blocking calls must be able to fail, and must let the allowed calls through."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import types
from typing import TYPE_CHECKING, Any

import blockbuster
import pytest

import sterna

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def in_sterna(source: str, **names: Any) -> Callable[[], Any]:
    """A function whose file is in the package, as the watch sees it, and whose body is `source`."""
    module = types.ModuleType("sterna.made_up")
    vars(module).update(names)
    filename = os.path.join(next(iter(sterna.__path__)), "made_up.py")
    exec(compile(f"def call():\n    return {source}\n", filename, "exec"), vars(module))  # noqa: S102 - text from this file
    call: Callable[[], Any] = vars(module)["call"]
    return call


async def test_sleep_on_the_loop_is_an_error() -> None:
    with pytest.raises(blockbuster.BlockingError, match=r"time\.sleep"):
        in_sterna("__import__('time').sleep(0)")()


async def test_blocking_socket_is_an_error_and_a_non_blocking_one_is_not() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.send(b"x")
        read = in_sterna("end.recv(1)", end=left)
        with pytest.raises(blockbuster.BlockingError, match=r"socket\.recv"):
            read()
        left.setblocking(False)
        assert read() == b"x"


async def test_blocking_pipe_is_an_error() -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(blockbuster.BlockingError, match=r"os\.write"):
            in_sterna("os.write(fd, b'x')", os=os, fd=write_end)()
    finally:
        os.close(read_end)
        os.close(write_end)


async def test_local_files_and_sqlite_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert in_sterna("os.write(fd, b'text')", os=os, fd=fd)() == 4
    finally:
        os.close(fd)
    assert in_sterna("path.read_text()", path=path)() == "text"
    with sqlite3.connect(tmp_path / "db") as database:
        assert in_sterna("db.execute('select 1').fetchone()", db=database)() == (1,)
    database.close()


def test_without_a_loop_blocking_is_fine() -> None:
    in_sterna("__import__('time').sleep(0)")()


async def test_both_loops_are_used(anyio_backend_name: str, request: pytest.FixtureRequest) -> None:
    loop = type(asyncio.get_running_loop()).__module__
    assert anyio_backend_name == "asyncio"
    assert loop.startswith("uvloop" if "uvloop" in request.node.name else "asyncio")
