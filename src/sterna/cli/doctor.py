"""`sterna doctor`: looks at this machine, the state, the node and its agents, and says what to do."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import click

from sterna.errors import Code, SternaError

if TYPE_CHECKING:
    import ssl

Level = Literal["OK", "WARN", "FAIL"]

_ADVICE = {
    Code.REVOKED: "remove the key (device.key in the directory `client` of the state), then ask for access anew",
    Code.DENIED: "the node's local.token was replaced: start the node again, with the same --state",
}
_COLOURS = {"OK": 32, "WARN": 33, "FAIL": 31}
_ASK_SECONDS = 3.0
_FILES_MIN = 4_096
_DISK_FAIL_BYTES = 64 * 1024**2
_DISK_WARN_BYTES = 1024**3
_CERTIFICATE_WARN_DAYS = 7
_QUOTA_WARN = 0.9
_PTY_WARN = 0.8
_EPOCH_SECONDS = 1_735_689_600  # 2025: no machine that runs this was set up before
_NEEDED = ("msgspec", "cryptography", "click", "fastcrc", "asyncinotify", "prometheus-client")
_BETTER = {
    "uvloop": "the node is slower without it",
    "pyghostty": "screens are kept by the slower pyte",
}


class Finding:
    """One thing that was looked at: how it is, and what to do about it ("" if nothing)."""

    __slots__ = ("do", "level", "name", "text")

    def __init__(self, level: Level, name: str, text: str, do: str = "") -> None:
        self.level = level
        self.name = name
        self.text = text
        self.do = do


@click.command()
@click.option("--state", type=click.Path(file_okay=False), envvar="STERNA_STATE", help="Directory of keys and state.")
@click.option("--config", "config_path", type=click.Path(dir_okay=False), help="The node's TOML file, to be checked.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor(state: str | None, config_path: str | None, as_json: bool) -> int:
    """Check this machine and say what to do; exit status 1 if something fails.

    Nothing is changed, and nothing leaves this machine.
    """
    findings = list(examine(state, config_path))
    failed = sum(each.level == "FAIL" for each in findings)
    if as_json:
        checks = [{"name": f.name, "level": f.level, "text": f.text, "do": f.do} for f in findings]
        click.echo(json.dumps({"checks": checks, "failed": failed}))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for each in findings:
            click.echo(_line(each, colour))
    return 1 if failed else 0


def _line(each: Finding, colour: bool) -> str:
    level = f"{each.level:<5}"
    if colour:
        level = f"\x1b[{_COLOURS[each.level]}m{level}\x1b[0m"
    return f"{level} {each.name:<12} {each.text}" + (f"\n{'':<19}-> {each.do}" if each.do else "")


def examine(state: str | None = None, config_path: str | None = None) -> Iterator[Finding]:
    """Yields everything that was looked at; a check that breaks is a finding itself."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _libraries, lambda: _config(config_path), lambda: _state(state), lambda: _device(state),
        lambda: _node(state), lambda: _database(state), lambda: _journal(state, config_path), lambda: _disk(state),
        _clock, _terminal, _limits, _logout,
    ]  # fmt: skip
    for check in checks:
        try:
            yield from check()
        except SternaError as error:
            yield Finding("FAIL", "check", str(error))
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            yield Finding("FAIL", "check", f"{place}{error.strerror or type(error).__name__}")


# ---- software ---------------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    import platform
    import ssl

    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    do = "" if good else "install Python 3.11 or newer"
    yield Finding("OK" if good else "FAIL", "python", f"{platform.python_implementation()} {version}", do)
    if ssl.HAS_TLSv1_3:
        yield Finding("OK", "tls", f"{ssl.OPENSSL_VERSION} with TLS 1.3")
    else:
        yield Finding(
            "FAIL", "tls", f"{ssl.OPENSSL_VERSION} has no TLS 1.3", "use a Python with OpenSSL 1.1.1 or newer"
        )


def _libraries() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    found: list[str] = []
    for name in (*_NEEDED, *_BETTER):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name in _BETTER:
                yield Finding("WARN", "libraries", f"{name} is missing: {_BETTER[name]}", f"install {name}")
            else:
                yield Finding("FAIL", "libraries", f"{name} is missing", "install sterna again with its dependencies")
    yield Finding("OK", "libraries", ", ".join(found))


def _config(path: str | None) -> Iterator[Finding]:
    from sterna import paths
    from sterna.node.config import FILE_NAME, load

    chosen = path or os.path.join(paths.config_path(), FILE_NAME)
    try:
        load({}, os.environ, path)
    except SternaError as error:
        yield Finding("FAIL", "config", str(error), "correct it, or remove the setting")
        return
    yield Finding(
        "OK", "config", f"{chosen} is good" if os.path.exists(chosen) else "no file, defaults and environment"
    )


# ---- files ------------------------------------------------------------------------------------------------------


def _base(state: str | None) -> str:
    from sterna import paths

    return os.path.abspath(state) if state is not None else paths.state_path()


def _state(state: str | None) -> Iterator[Finding]:
    base = _base(state)
    bad = False
    for path in (base, os.path.join(base, "node"), os.path.join(base, "client"), os.path.join(base, "node", "journal")):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            continue
        except PermissionError:
            text = f"{path} cannot be looked at by user {os.geteuid()}"
            yield Finding("FAIL", "state", text, "run it as the state's owner, or choose another with --state")
            return
        if not stat.S_ISDIR(found.st_mode):
            yield Finding("FAIL", "state", f"{path} is not a directory", "move it away")
        elif found.st_uid != os.geteuid():
            yield Finding("FAIL", "state", f"{path} belongs to user {found.st_uid}", "choose another with --state")
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield Finding("FAIL", "state", f"{path} can be written to by others", f"chmod go-w {path}")
        elif found.st_mode & 0o077:
            yield Finding("WARN", "state", f"{path} can be listed by others", f"chmod 700 {path}")
        else:
            continue
        bad = True
    if not bad:
        yield Finding("OK", "state", base if os.path.isdir(base) else f"{base} will be made on first use")


def _device(state: str | None) -> Iterator[Finding]:
    from sterna.trust.device import KEY_FILE, DeviceKey

    directory = os.path.join(_base(state), "client")
    if not os.path.exists(os.path.join(directory, KEY_FILE)):
        yield Finding("OK", "device", "no key yet, made on first use")
        return
    try:
        key = DeviceKey.load(directory)
    except SternaError as error:
        yield Finding("FAIL", "device", str(error))
        return
    yield Finding("OK", "device", f"this device is {key.id.hex()[:16]}")


def _database(state: str | None) -> Iterator[Finding]:
    directory = os.path.join(_base(state), "node")
    found = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    aside = [name for name in found if ".db.damaged-" in name and not name.endswith(("-wal", "-shm"))]
    if aside:
        text = f"{len(aside)} damaged one(s) moved aside: the sessions, devices and links in it are lost"
        yield Finding("WARN", "database", text, f"check the disk, then remove {os.path.join(directory, aside[-1])}*")


def _journal(state: str | None, config_path: str | None) -> Iterator[Finding]:
    from sterna.node.config import NodeConfig, load

    try:
        quota = load({}, os.environ, config_path).journal_quota_bytes
    except SternaError:
        quota = NodeConfig().journal_quota_bytes
    directory = os.path.join(_base(state), "node", "journal")
    if not os.path.isdir(directory):
        return
    with os.scandir(directory) as entries:
        size = sum(entry.stat().st_size for entry in entries if entry.name.startswith("arena-"))
    text = f"{_size(size)} of {_size(quota)} reserved"
    if size > quota * _QUOTA_WARN:
        yield Finding("WARN", "journal", text, "close sessions (`sterna ls`), or raise journal_quota_bytes")
    else:
        yield Finding("OK", "journal", text)


def _disk(state: str | None) -> Iterator[Finding]:
    path = _base(state)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    found = os.statvfs(path)
    free = found.f_bavail * found.f_frsize
    text = f"{_size(free)} free at {path}"
    if free < _DISK_FAIL_BYTES:
        yield Finding("FAIL", "disk", text, "make room: sessions are kept in memory only while the disk is full")
    elif free < _DISK_WARN_BYTES:
        yield Finding("WARN", "disk", text, "make room, or lower journal_quota_bytes")
    else:
        yield Finding("OK", "disk", text)


def _size(count: int) -> str:
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


# ---- node and agents --------------------------------------------------------------------------------------------


def _node(state: str | None) -> Iterator[Finding]:
    from sterna.cli.up import running_pid
    from sterna.client.calls import Caller
    from sterna.client.endpoint import DEFAULT_PORT, LOCAL_SOCKET, Endpoint, state_of_node
    from sterna.trust.local import read_local_token
    from sterna.trust.pins import local_pin

    directory = state_of_node(state)
    path = os.path.join(directory, LOCAL_SOCKET)
    pin = local_pin(directory) if os.path.isdir(directory) else None
    token = read_local_token(directory) if pin is not None else None
    if pin is None or token is None or not os.path.exists(path):
        yield Finding("WARN", "node", "no node runs here", "sterna up")
        yield from _port("127.0.0.1", DEFAULT_PORT)
        return
    local = Endpoint("this machine", [(socket.AF_UNIX, path)], pin.node_id, context=None, credential=token)
    try:
        with Caller(local, state=state, timeout=_ASK_SECONDS) as caller:
            about = caller.call("node")
            agents = caller.call("list")["agents"]
    except SternaError as error:
        yield Finding("FAIL", "node", str(error), _ADVICE.get(error.code, "sterna up"))
        return
    up = int(time.time()) - int(about["started"])
    host, port = str(about["host"]), int(about["port"])
    sessions = int(about["sessions"])
    pid = running_pid(directory)
    text = f"pid {pid}, listens on {host} port {port}, up {up // 3600} h {up // 60 % 60} min, {sessions} sessions"
    yield Finding("OK", "node", text)
    yield from _certificate(host, port, pin.context())
    if about.get("no_quic"):
        yield Finding("WARN", "quic", str(about["no_quic"]), "sessions stay on TCP until the node is started anew")
    elif "no_quic" in about:  # else it is a node of an older version
        quic = int(about["quic_port"])
        yield Finding("OK", "quic", f"listens on UDP port {quic}" if quic else "turned off")
    for agent in agents:
        if agent["ready"]:
            yield Finding("OK", "agent", f"{agent['name']} answers")
        else:
            yield Finding(
                "FAIL", "agent", f"{agent['name']} does not answer", "look at its log beside the state, start it again"
            )
    if not agents:
        yield Finding("WARN", "agent", "no agent is there", "sterna pod --agent main -- $SHELL")


def _port(host: str, port: int) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            yield Finding("WARN", "port", f"{host} port {port}: {error.strerror}", "sterna up --port with another one")
            return
    yield Finding("OK", "port", f"{host} port {port} is free")


def _certificate(host: str, port: int, context: ssl.SSLContext) -> Iterator[Finding]:
    """Connects as a client would, over TCP and TLS, and looks at the certificate."""
    import ssl

    place = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- looked up, not bound to
    try:
        with socket.create_connection((place, port), timeout=_ASK_SECONDS) as sock, context.wrap_socket(sock) as tls:
            found = tls.getpeercert() or {}
    except ssl.SSLError as error:
        yield Finding("FAIL", "tls", f"port {port} is not our node's: {error.reason}", "see what listens there")
        return
    except OSError as error:
        text = f"{place} port {port} does not answer: {error.strerror or error}"
        yield Finding("FAIL", "tls", text, "check the firewall of this machine")
        return
    days = int((ssl.cert_time_to_seconds(str(found["notAfter"])) - time.time()) // 86_400)
    level: Level = "OK" if days >= _CERTIFICATE_WARN_DAYS else "WARN"
    do = "" if level == "OK" else "start the node again: it renews its certificate 30 days before the end"
    yield Finding(level, "certificate", f"valid for {days} more days", do)


# ---- surroundings -----------------------------------------------------------------------------------------------


def _clock() -> Iterator[Finding]:
    now = time.time()
    if now < _EPOCH_SECONDS:
        yield Finding(
            "FAIL", "clock", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)), "set the clock: certificates fail"
        )
    else:
        yield Finding("OK", "clock", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)))


def _terminal() -> Iterator[Finding]:
    import locale

    try:
        locale.setlocale(locale.LC_CTYPE, "")
        codeset = locale.nl_langinfo(locale.CODESET)
    except locale.Error:
        codeset = "unknown: the locale is not installed"
    if codeset.upper().replace("-", "") == "UTF8":
        yield Finding("OK", "locale", codeset)
    else:
        yield Finding("WARN", "locale", codeset, "export LC_ALL=C.UTF-8, or install your locale")
    term = os.environ.get("TERM", "")
    if term in ("", "dumb", "unknown") and sys.stdout.isatty():
        yield Finding(
            "WARN", "terminal", f"TERM is {term or 'not set'}", "use a terminal, or export TERM=xterm-256color"
        )
    else:
        yield Finding("OK", "terminal", f"TERM={term}" if term else "none")
    if os.environ.get("STERNA_SESSION"):
        text = f"this is within the session {os.environ['STERNA_SESSION'][:80]}"
        yield Finding(
            "WARN", "nested", text, "an attach from here shows a session within a session: `~~.` reaches the inner one"
        )
    if os.environ.get("TMUX") or os.environ.get("STY"):
        name = "tmux" if os.environ.get("TMUX") else "screen"
        yield Finding(
            "OK", "nested", f"within {name}: its scroll-back and clipboard settings apply to what is attached here"
        )


def _limits() -> Iterator[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES_MIN:
        many = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        text = f"{soft} files may be open, {many} at most; each session takes 3"
        yield Finding("WARN", "files", text, f"ulimit -n {_FILES_MIN} before `sterna up`, or LimitNOFILE= in the unit")
    else:
        yield Finding("OK", "files", f"{soft} may be open")
    try:
        with (
            open("/proc/sys/kernel/pty/nr", encoding="ascii") as nr,
            open("/proc/sys/kernel/pty/max", encoding="ascii") as most,
        ):
            used, limit = int(nr.read()), int(most.read())
    except (OSError, ValueError):
        return
    full = used > limit * _PTY_WARN
    do = "sysctl kernel.pty.max, or close sessions" if full else ""
    yield Finding("WARN" if full else "OK", "terminals", f"{used} of {limit} in use", do)


def _logout() -> Iterator[Finding]:
    from sterna.cli.service import kills, lingers, logout_hint

    hint = logout_hint()
    if hint is not None:
        yield Finding("WARN", "logout", "logging out ends your sessions", "loginctl enable-linger")
    elif os.path.isdir("/run/systemd/system"):
        yield Finding(
            "OK", "logout", "sessions survive it" if lingers() or not kills() else "sessions of this login survive"
        )
