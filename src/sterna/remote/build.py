"""What the daemon says about itself."""

from __future__ import annotations

import os
import time
from typing import Final

import sterna

_ARCHES: Final = {"x86_64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386", "armv7l": "arm", "armv6l": "arm"}

PLATFORM: Final = "linux"


def version() -> str:
    """Returns the daemon's version."""
    return sterna.__version__


def built() -> str:
    """Returns when the daemon was installed, in UTC."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(os.stat(__file__).st_mtime))
    except OSError:
        return "unknown"


def arch() -> str:
    """Returns the machine's architecture by the name the contract gives it (GOARCH)."""
    machine = os.uname().machine
    return _ARCHES.get(machine, machine)


def version_line(override: str) -> str:
    """Returns what -version prints; `override` is the id that the configuration wants it to show."""
    if override:
        return f"claude-ssh {override} (via Claustrum {version()}, built {built()})"
    return f"claustrum {version()} (built {built()})"
