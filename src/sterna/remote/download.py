"""One HTTP download, with the contract's words for what goes wrong."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from sterna.errors import SternaError
from sterna.remote.gotext import errno_text, quote

_READ_BYTES = 256 * 1024


class DownloadError(SternaError):
    """Nothing was downloaded."""


def download(url: str, file: int, seconds: float, max_bytes: int) -> str:
    """Writes what a URL gives to a descriptor and returns the SHA-256 of it in hexadecimal.

    Parameters: `seconds`, a bound of each wait, 0 for none; `max_bytes`, 0 for no bound. Raises `DownloadError`.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise DownloadError(f"download failed: parse {quote(url)}: invalid URL") from error
    if scheme not in {"http", "https"}:
        raise DownloadError(f'download failed: Get {quote(url)}: unsupported protocol scheme "{scheme}"')
    digest, size = hashlib.sha256(), 0
    opener = urllib.request.build_opener()
    try:
        with opener.open(urllib.request.Request(url), timeout=seconds or None) as answer:  # noqa: S310 # checked above
            if answer.status != http.client.OK:
                raise DownloadError(f"download failed with status {answer.status}")
            while data := answer.read(_READ_BYTES):
                size += len(data)
                if max_bytes and size > max_bytes:
                    raise DownloadError("download failed: size limit exceeded")
                digest.update(data)
                os.write(file, data)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"download failed with status {error.code}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(f"download failed: Get {quote(url)}: {_cause(error, url)}") from error
    return digest.hexdigest()


def _cause(error: BaseException, url: str) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return "invalid port"
    host = parts.hostname or ""
    if not host:
        return "http: no Host in request URL"
    if isinstance(reason, socket.gaierror):
        return f"dial tcp: lookup {host}: no such host"
    if isinstance(reason, TimeoutError):
        return "context deadline exceeded"
    if isinstance(reason, http.client.RemoteDisconnected):
        return "EOF"
    if isinstance(reason, http.client.IncompleteRead):
        return "unexpected EOF"
    if isinstance(reason, OSError) and reason.errno:
        return f"dial tcp {host}:{port}: connect: {errno_text(reason.errno)}"
    return str(reason)
