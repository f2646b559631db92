"""The token that every request carries: where it comes from and where it is kept."""

from __future__ import annotations

import os
from errno import ENOSPC

from sterna.limits import REMOTE_TOKEN_MAX_BYTES
from sterna.remote.directories import remove
from sterna.remote.failure import StartError
from sterna.remote.gotext import errno_text, failure

FILE_NAME = "daemon.token"


def read_descriptor(descriptor: int) -> bytes:
    """Returns everything that a descriptor gives until its end. Raises `StartError`."""
    token = b""
    try:
        while piece := os.read(descriptor, 65_536):
            token += piece
            if len(token) > REMOTE_TOKEN_MAX_BYTES:
                raise StartError("read --token-fd: the token is too long")
    except OSError as error:
        raise StartError(f"read --token-fd: read token-fd: {errno_text(error.errno or 0)}") from error
    return token


def content(path: str) -> bytes:
    """Returns what stands in a token's file. Raises `StartError`."""
    try:
        with open(path, "rb") as file:
            return file.read(REMOTE_TOKEN_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        operation = "read" if isinstance(error, IsADirectoryError) else "open"
        raise StartError(f"read --token-file: {failure(operation, path, error)}") from error


def read_file(path: str) -> tuple[bytes, str]:
    """Returns the content of a file that is then deleted, and what went wrong with that. Raises `StartError`."""
    token = content(path)
    try:
        os.unlink(path)
    except OSError as error:
        return token, failure("remove", path, error)
    return token, ""


def checked(raw: bytes) -> bytes:
    """Returns the token without the line ends at its end. Raises `StartError` for an empty one."""
    token = raw.rstrip(b"\r\n")
    if not token:
        raise StartError("token is empty")
    return token


def persist(token: bytes, directory: str) -> str:
    """Writes the token to its file in `directory`, readable for its owner only; returns what went wrong."""
    path = os.path.join(directory, FILE_NAME)
    temporary = f"{path}-{os.urandom(5).hex()}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(descriptor, token) < len(token):
                raise OSError(ENOSPC, os.strerror(ENOSPC))
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except OSError as error:
        remove(temporary)
        return failure("write", temporary, error)
    return ""
