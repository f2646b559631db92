"""The files of the page: read once from the package, with exact types and what browsers may keep of them.

They are compressed, too, once: nothing of a visitor or a session is in them, so their length tells nobody anything.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
"""By a file name's end; others are not served."""

_PACKED_ALREADY = (".ico", ".png", ".woff2")
_GZIP_LEVEL = 6

STATIC = os.path.join(os.path.dirname(__file__), "static")
_INDEX = "index.html"
_KEPT = "public, max-age=31536000, immutable"
_ASKED_AGAIN = "no-cache"
# A name with a hash in it, as build tools write it (app.3f9c2d1a.js, app-3F9C2D1A.js), never gets other content.
_HASHED = re.compile(r".*[.-](?:[0-9a-f]{8,64}|[0-9A-Z]{8})(?:\.[a-z0-9]+)+\Z")


class Page:
    """One file as it is sent: as it is, and `packed` with gzip (None where that saves nothing)."""

    __slots__ = ("_tag", "cache", "content", "packed", "type")

    def __init__(self, name: str, content: bytes) -> None:
        end = os.path.splitext(name)[1]
        packed = gzip.compress(content, _GZIP_LEVEL, mtime=0) if end not in _PACKED_ALREADY else content
        self.content = content
        self.packed = packed if len(packed) < len(content) else None
        self.type = TYPES[end]
        self._tag = hashlib.sha256(content).hexdigest()[:32]
        self.cache = _KEPT if _HASHED.match(name) else _ASKED_AGAIN

    def etag(self, *, packed: bool) -> str:
        """Returns the ETag of either form: different ones, as their bytes are (RFC 9110, section 8.8.3.3)."""
        return f'"{self._tag}-gzip"' if packed else f'"{self._tag}"'


def takes_gzip(accepted: str) -> bool:
    """Tells whether an Accept-Encoding header takes gzip (RFC 9110, section 12.5.3)."""
    found: dict[str, bool] = {}
    for item in accepted.lower().split(","):
        coding, _, weight = item.partition(";")
        found[coding.strip()] = re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight) is None
    return found.get("gzip", found.get("*", False))


def load(directory: str = STATIC) -> dict[str, Page]:
    """Returns every file by its path on the server; `/` is index.html."""
    pages: dict[str, Page] = {}
    for folder, _folders, names in os.walk(directory):
        for name in names:
            if os.path.splitext(name)[1] not in TYPES:
                continue
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                pages["/" + os.path.relpath(path, directory).replace(os.sep, "/")] = Page(name, file.read())
    if f"/{_INDEX}" in pages:
        pages["/"] = pages.pop(f"/{_INDEX}")
    return pages
