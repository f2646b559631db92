"""`sterna service`: the node as a service of the user's systemd, so that sessions survive logout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

import click

from sterna.errors import StorageError, UsageError

UNIT = "sterna.service"
_SYSTEMD = "/run/systemd/system"
_LINGER = "/var/lib/systemd/linger"
_LOGIND = ("/usr/lib/systemd", "/usr/local/lib/systemd", "/run/systemd", "/etc/systemd")
_CONFIG_MAX_BYTES = 65_536
_KILL = re.compile(r"^\s*KillUserProcesses\s*=\s*(\S+)", re.MULTILINE)
_PLAIN = re.compile(r"[A-Za-z0-9@_./:=,+~-]+\Z")

_TEXT = """\
# Written by `sterna service install`; docs/operations.md says more.
[Unit]
Description=Sterna: terminal and agent sessions that survive
Documentation=man:systemd.service(5)
After=network-online.target

[Service]
Type=exec
ExecStart={command}
# The programs live in the agent's process: restarting or updating the node leaves them alone, `sterna down` ends them.
KillMode=process
Restart=on-failure
RestartSec=1
# `sterna up` drains on SIGTERM and needs no longer than this.
TimeoutStopSec=20
LimitNOFILE=65536
{environment}
[Install]
WantedBy=default.target
"""


def lingers(directory: str = _LINGER) -> bool:
    """Tells whether the user's systemd manager runs on after logout (loginctl(1), enable-linger)."""
    return os.path.exists(os.path.join(directory, _user()))


def logout_hint(
    environ: Mapping[str, str] = os.environ, *, systemd: str = _SYSTEMD, linger: str = _LINGER,
    logind: Sequence[str] = _LOGIND,
) -> str | None:  # fmt: skip
    """Returns what to do where logging out would end sessions that were begun in this login, or None.

    Looks at a few files only: the answer of logind itself would cost a process.
    """
    if not os.path.isdir(systemd) or "SSH_CONNECTION" not in environ or lingers(linger) or not kills(logind):
        return None
    return "Logging out ends all your processes here (KillUserProcesses=yes): run `loginctl enable-linger` once."


def kills(directories: Sequence[str] = _LOGIND) -> bool:
    """Tells whether logind is configured to end a user's processes at logout (logind.conf(5), KillUserProcesses)."""
    files: dict[str, str] = {}
    for directory in directories:
        main = os.path.join(directory, "logind.conf")
        if os.path.isfile(main):
            files["\0"] = main
        drop = os.path.join(directory, "logind.conf.d")
        if os.path.isdir(drop):
            files.update({name: os.path.join(drop, name) for name in os.listdir(drop) if name.endswith(".conf")})
    value = "no"
    # The main file first, then all drop-ins by name, whichever directory they are in.
    for name in sorted(files):
        try:
            with open(files[name], encoding="utf-8", errors="replace") as file:
                found = _KILL.findall(file.read(_CONFIG_MAX_BYTES))
        except OSError:
            continue
        value = found[-1] if found else value
    return value.lower() in ("yes", "true", "1", "on")


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def unit_text(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Returns the unit that runs `command`; raises UsageError for words that systemd would read differently."""
    variables = "".join(f"Environment={_quoted(f'{k}={v}')}\n" for k, v in environment.items())
    return _TEXT.format(command=" ".join(_quoted(word).replace("$", "$$") for word in command), environment=variables)


def _quoted(word: str) -> str:
    """Returns a word as systemd reads it back (systemd.syntax(7), "Quoting"; systemd.unit(5), "Specifiers")."""
    if not word.isprintable():
        raise UsageError("A systemd unit cannot hold control characters: choose other words.")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return word if _PLAIN.match(word) else f'"{escaped}"'


def unit_path(environ: Mapping[str, str] = os.environ) -> str:
    """Returns where the user's unit lives (systemd.unit(5), "User Unit Search Path")."""
    base = environ.get("XDG_CONFIG_HOME", "")
    if not base.startswith("/"):
        base = os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "systemd", "user", UNIT)


def _systemctl(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Runs systemctl for the user; None where there is no systemd to talk to."""
    if not os.path.isdir(_SYSTEMD):
        return None
    try:
        return subprocess.run(
            ["systemctl", "--user", *words], capture_output=True, text=True, timeout=30, check=False  # noqa: S607 -- the user's own
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None


@click.group()
def service() -> None:
    """The node as a service of your systemd: it starts with the machine and survives logout."""


@service.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=7220, show_default=True, type=click.IntRange(1, 65535), help="TCP port.")
@click.option("--state", type=click.Path(file_okay=False), envvar="STERNA_STATE", help="Directory of keys and state.")
@click.option("--print", "only_print", is_flag=True, help="Print the unit instead of installing it.")
@click.argument("command", nargs=-1)
def install(host: str, port: int, state: str | None, only_print: bool, command: tuple[str, ...]) -> None:
    """Install and start the service; its agent runs COMMAND (default: your shell)."""
    from sterna import paths

    words = [sys.executable, "-m", "sterna", "up", "--host", host, "--port", str(port)]
    words += ["--state", os.path.abspath(state)] if state is not None else []
    words += ["--", *(command or (os.environ.get("SHELL") or "/bin/sh", "-l"))]
    text = unit_text(words, {k: os.environ[k] for k in ("LANG", "LC_ALL", "PATH") if os.environ.get(k)})
    if only_print:
        click.echo(text, nl=False)
        return
    path = unit_path()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as error:
        raise StorageError(f"The directory {os.path.dirname(path)} cannot be made: {error.strerror}.") from None
    paths.atomic_write(path, text.encode(), 0o644)
    click.echo(f"Wrote {path}.")
    done = _systemctl("daemon-reload")
    done = _systemctl("enable", "--now", UNIT) if done is not None and done.returncode == 0 else done
    if done is None:
        click.echo(f"systemd does not run here; where it does: systemctl --user enable --now {UNIT}")
    elif done.returncode:
        raise StorageError(f"systemctl could not start it: {done.stderr.strip() or done.returncode}")
    else:
        click.echo("It runs; `sterna attach` is ready.")
    if not lingers():
        click.echo("So that it starts with the machine and survives logout: loginctl enable-linger")


@service.command()
def uninstall() -> None:
    """Stop and remove the service; sessions stay until `sterna down`."""
    path = unit_path()
    if not os.path.lexists(path):
        raise UsageError("The service is not installed.")
    _systemctl("disable", "--now", UNIT)
    os.unlink(path)
    _systemctl("daemon-reload")
    click.echo(f"Removed {path}; `sterna down` ends the programs as well.")


@service.command()
def status() -> int:
    """Show whether the service is installed and runs; exit status 1 if it does not run."""
    path = unit_path()
    if not os.path.exists(path):
        click.echo("The service is not installed: sterna service install")
        return 1
    state = _systemctl("is-active", UNIT)
    word = state.stdout.strip() if state is not None else "unknown (systemd does not run here)"
    click.echo(f"{path}: {word}")
    click.echo("It survives logout." if lingers() else "It ends at logout: loginctl enable-linger")
    return 0 if word == "active" else 1
