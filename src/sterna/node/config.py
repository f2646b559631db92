"""The node's settings: flags over environment over TOML file over defaults."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, inspect

from sterna import limits, paths
from sterna.errors import ConfigError, SternaError, UsageError
from sterna.ids import check_tenant

ENVIRONMENT_PREFIX = "STERNA_NODE_"
FILE_NAME = "node.toml"
QUIC_PORT = 7221
WEB_PORT = 7222
FILE_MAX_BYTES = 1024 * 1024
LIST_MAX = 64
_TEXT_MAX_CHARS = 4_096
_SECRETS = frozenset(("token",))
_KEEPER_SCHEMES = ("https", "http")
_ANY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104 -- compared with, not bound to
_LISTS = ("names", "web_names")
_GIB = 1024**3
_WORD = re.compile(r"[!-~]+\Z")
_JOURNAL_MIN_BYTES = 128 * 1024


def _about(text: str, *, ge: int | None = None, le: int | None = None) -> Meta:
    """Returns what the documentation says about a setting, and its bounds."""
    return Meta(description=text, ge=ge, le=le)


_Text = Annotated[str, Meta(max_length=_TEXT_MAX_CHARS)]


class NodeConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a node can be told; sizes are in bytes, times in seconds.

    `tenant_uids` maps a tenant to the user ids whose processes may serve its agents; empty: only the node's own user.
    """

    host: Annotated[str, _about("Address to listen on; `0.0.0.0` or `::` for all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, _about("TCP port; 0 takes any free one.", ge=0, le=65_535)] = 7220
    quic_port: Annotated[int, _about("UDP port of QUIC; 0: none.", ge=0, le=65_535)] = QUIC_PORT
    web_port: Annotated[int, _about("Port of the web page (usually 7222); 0: none.", ge=0, le=65_535)] = 0
    web_host: Annotated[str, _about("Address that the web page listens on (default: `host`).")] = ""
    web_names: Annotated[
        list[str], _about("Further names under which the web page may be opened: those of a reverse proxy.")
    ] = []
    state: Annotated[str, _about("Directory of keys and journal (default: `$XDG_STATE_HOME/sterna/node`).")] = ""
    sockets: Annotated[str, _about("Directory of the pods' sockets (default: `$XDG_RUNTIME_DIR/sterna`).")] = ""
    keeper: Annotated[str, _about("URL of the Keeper; without one the node works on its own.")] = ""
    token: Annotated[
        str, _about("What the node proves itself with to the Keeper: `@FILE` (0600), or the token itself.")
    ] = ""
    token_file: Annotated[str, _about("File of fixed access tokens, 0600: `tenant secret agents modes`.")] = ""
    tls_cert: Annotated[str | None, _about("PEM file of a public authority's certificate (with its chain).")] = None
    tls_key: Annotated[str | None, _about("PEM file of its key, if it is not in the same file.")] = None
    names: Annotated[list[str], _about("Further host names and addresses in the node's certificate.")] = []
    tenant_uids: Annotated[
        dict[str, list[int]], _about("Which users' processes may serve a tenant's agents; empty: only the node's user.")
    ] = {}
    on_full: Annotated[
        Literal["overwrite", "pause"],
        _about("What happens when nobody reads and the ring is full: the oldest output goes, or the agent waits."),
    ] = "overwrite"
    ring_bytes: Annotated[
        int, _about("Output kept per session.", ge=limits.CHUNK_MAX_BYTES, le=_GIB)
    ] = limits.RING_BYTES  # fmt: skip
    spill_bytes: Annotated[
        int, _about("Output kept beyond the ring while somebody still has to read it.", ge=0, le=64 * _GIB)
    ] = limits.SPILL_BYTES  # fmt: skip
    journal_quota_bytes: Annotated[
        int, _about("Disk space for all sessions together.", ge=_JOURNAL_MIN_BYTES, le=1024 * _GIB)
    ] = limits.JOURNAL_QUOTA_BYTES  # fmt: skip
    retention_seconds: Annotated[
        int, _about("How long an ended session is kept; 0: for ever.", ge=0, le=10 * 366 * 86_400)
    ] = limits.RETENTION_SECONDS  # fmt: skip
    cold_seconds: Annotated[
        int, _about("After how long a quiet session that nobody is attached to leaves memory.", ge=1, le=86_400)
    ] = 60  # fmt: skip
    unauthenticated_max: Annotated[
        int, _about("Connections without a proof in all; the oldest makes room.", ge=1, le=limits.CONNECTIONS_MAX)
    ] = 1024  # fmt: skip
    unauthenticated_per_address: Annotated[
        int, _about("Connections from one address that have not said anything yet.", ge=1, le=limits.CONNECTIONS_MAX)
    ] = 256  # fmt: skip
    metrics_host: Annotated[str, _about("Address of the metrics.")] = "127.0.0.1"
    metrics_port: Annotated[int, _about("Port of the metrics (Prometheus, `/metrics`); 0: none.", ge=0, le=65_535)] = 0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _about("What is logged, as JSON lines on standard error.")
    ] = "info"  # fmt: skip

    def __post_init__(self) -> None:
        if not self.state:
            self.state = os.path.join(paths.state_path(), "node")
        if not self.sockets:
            self.sockets = paths.runtime_path(self.state)

    def hosts(self) -> list[str]:
        """Returns the names and addresses that the certificate is for."""
        return [*(host for host in (self.host, self.web_host) if host not in _ANY_ADDRESS), *self.names]

    def web_hosts(self) -> list[str]:
        """Returns the names and addresses under which the web page may be opened, besides loopback."""
        return [*self.hosts(), *self.web_names]

    def tenants(self) -> dict[int, frozenset[str]] | None:
        """Returns which tenants' agents each user id may serve; None: only this process's user, any tenant."""
        if not self.tenant_uids:
            return None
        found: dict[int, set[str]] = {}
        for tenant, uids in self.tenant_uids.items():
            for uid in uids:
                found.setdefault(uid, set()).add(tenant)
        return {uid: frozenset(names) for uid, names in found.items()}


class Setting:
    """One setting as documentation and errors name it: key in the file, variable, default, meaning."""

    __slots__ = ("about", "default", "expected", "key", "type", "variable")

    def __init__(self, field: msgspec.structs.FieldInfo) -> None:
        self.key = field.name
        self.variable = ENVIRONMENT_PREFIX + field.name.upper()
        self.type = field.type
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory
        self.default: Any = default() if callable(default) else default
        self.about = next((m.description for m in field.type.__metadata__ if m.description), "") or ""
        self.expected = _expected(inspect.type_info(field.type))

    def decode(self, value: object, *, text: bool, where: str) -> Any:
        """Returns a value as this setting's type; `text` says that it comes from a place that knows only text.

        Raises ConfigError that names `where` and the key and what was expected, but never a secret.
        """
        if text and isinstance(value, str):
            value = self._from_text(value, where)
        try:
            return msgspec.convert(value, self.type, strict=not text)
        except msgspec.ValidationError:
            raise self._wrong(value, where) from None

    def _from_text(self, value: str, where: str) -> object:
        """Returns lists as `a,b` and maps as `tenant=uid,…` as what they mean; the rest as it is."""
        if self.key in _LISTS:
            return [part.strip() for part in value.split(",") if part.strip()]
        if self.key != "tenant_uids":
            return value
        found: dict[str, list[str]] = {}
        for part in value.split(","):
            tenant, equals, uid = part.strip().partition("=")
            if not equals:
                raise self._wrong(value, where)
            found.setdefault(tenant.strip(), []).append(uid.strip())
        return found

    def _wrong(self, value: object, where: str) -> ConfigError:
        shown = "this" if self.key in _SECRETS else repr(value)[:80]
        return ConfigError(f"{where}: {self.key} cannot be {shown}: expected {self.expected}.")


def _expected(type_: inspect.Type) -> str:
    """Returns what a type takes, in words."""
    if isinstance(type_, inspect.Metadata):
        return _expected(type_.type)
    if isinstance(type_, inspect.IntType):
        if type_.ge is not None and type_.le is not None:
            return f"a whole number from {type_.ge} to {type_.le}"
        return "a whole number"
    if isinstance(type_, inspect.LiteralType):
        return " or ".join(f'"{value}"' for value in type_.values)
    if isinstance(type_, inspect.ListType):
        return "a list of texts"
    if isinstance(type_, inspect.DictType):
        return "a table of lists of user ids, one for each tenant (as text: tenant=uid,tenant=uid)"
    return "a text"


SETTINGS: dict[str, Setting] = {field.name: Setting(field) for field in msgspec.structs.fields(NodeConfig)}
"""Every setting by its key."""


def load(
    flags: Mapping[str, object] | None = None, environ: Mapping[str, str] = os.environ, path: str | None = None
) -> NodeConfig:
    """Returns the node's configuration: flags (None: not given) over `STERNA_NODE_…` over the file over defaults.

    `path` is the TOML file; without it `node.toml` in the configuration directory is taken if it exists. Raises
    ConfigError, which names the place, the key and what was expected, and TrustError for a token open to others.
    """
    values = _from_file(path, environ)
    where = dict.fromkeys(values, path or FILE_NAME)
    for key, setting in SETTINGS.items():
        if environ.get(setting.variable):
            values[key] = setting.decode(environ[setting.variable], text=True, where=setting.variable)
            where[key] = setting.variable
        if flags is not None and flags.get(key) not in (None, ()):
            values[key] = setting.decode(flags[key], text=True, where="The command line")
            where[key] = "The command line"
    _check(values, where)
    return NodeConfig(**values)


def _from_file(path: str | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings in the TOML file."""
    chosen = path if path is not None else os.path.join(paths.config_path(environ), FILE_NAME)
    try:
        with open(chosen, "rb") as file:
            content = file.read(FILE_MAX_BYTES + 1)
    except FileNotFoundError:
        if path is None:
            return {}
        raise ConfigError(f"The configuration file {chosen} does not exist: make it, or leave --config out.") from None
    except OSError as error:
        raise ConfigError(f"The configuration file {chosen} cannot be read: {error.strerror}.") from error
    if len(content) > FILE_MAX_BYTES:
        raise ConfigError(f"The configuration file {chosen} is larger than {FILE_MAX_BYTES} bytes.")
    try:
        table = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{chosen} is not valid TOML: {error}.") from None
    values: dict[str, Any] = {}
    for key, value in table.items():
        setting = SETTINGS.get(key)
        if setting is None:
            near = get_close_matches(key, SETTINGS, 1)
            hint = f"did you mean {near[0]}?" if near else "docs/operations.md lists all settings."
            raise ConfigError(f"{chosen}: there is no setting {key[:80]!r}; {hint}")
        values[key] = setting.decode(value, text=False, where=chosen)
    if values.get("token", "@").startswith("@") is False:
        # A file with a secret in it must be private; read_private says how.
        paths.read_private(chosen, FILE_MAX_BYTES, follow=True)
    return values


def _check(values: dict[str, Any], where: Mapping[str, str]) -> None:
    """Checks what no single type says, and replaces `~` and token files by what they stand for."""

    def wrong(key: str, why: str) -> ConfigError:
        return ConfigError(f"{where[key]}: {key} {why}.")

    for key in ("state", "sockets", "token_file", "tls_cert", "tls_key"):
        if values.get(key):
            values[key] = os.path.expanduser(values[key])
    for key, value in values.items():
        if isinstance(value, str) and (len(value) > _TEXT_MAX_CHARS or not value.isprintable()):
            raise wrong(key, f"is no text for a setting: expected at most {_TEXT_MAX_CHARS} printable characters")
    for key in ("host", "metrics_host"):
        if values.get(key) == "":
            raise wrong(key, "is empty: expected an address, as 127.0.0.1 or 0.0.0.0")
    if values.get("keeper"):
        _check_keeper(values["keeper"], where["keeper"])
    if values.get("token"):
        values["token"] = read_token(values["token"], where["token"])
    if values.get("tls_key") and not values.get("tls_cert"):
        raise wrong("tls_key", "is of no use without tls_cert: expected both, or none")
    for key in _LISTS:
        if len(values.get(key, ())) > LIST_MAX:
            raise wrong(key, f"has too many entries: expected at most {LIST_MAX}")
    if values.get("web_port") and values["web_port"] == values.get("port"):
        raise wrong("web_port", "is also the port of the sessions: expected another one, or 0 for no web page")
    for tenant, uids in values.get("tenant_uids", {}).items():
        try:
            check_tenant(tenant)
        except UsageError as error:
            raise wrong("tenant_uids", f"names an impossible tenant: {str(error).rstrip('.')}") from None
        if not all(0 <= uid < 1 << 32 for uid in uids):
            raise wrong("tenant_uids", f"has impossible user ids for {tenant}: expected 0 to 4294967295")
    quota = values.get("journal_quota_bytes", limits.JOURNAL_QUOTA_BYTES)
    if values.get("ring_bytes", limits.RING_BYTES) > quota:
        key = "ring_bytes" if "ring_bytes" in values else "journal_quota_bytes"
        raise wrong(key, "does not fit: expected ring_bytes to be at most journal_quota_bytes")


def _check_keeper(url: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in _KEEPER_SCHEMES and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good, parts = False, urlsplit("")
    if not good:
        raise ConfigError(f"{where}: keeper is no URL of a Keeper: expected https://host[:port].")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"{where}: keeper has more than host, port and path: expected the secret in token, not in the URL."
        )


def read_token(value: str, where: str) -> str:
    """Returns the token that `value` is or, as `@FILE`, names; raises SternaError if the file is open to others."""
    if not value.startswith("@"):
        token = value
    else:
        path = os.path.expanduser(value[1:])
        try:
            content = paths.read_private(path, limits.TOKEN_MAX_BYTES, follow=True)
        except SternaError as error:
            error.args = (f"{where}: token: {error}",)
            raise
        if content is None:
            raise ConfigError(f"{where}: token names {path}, which does not exist: expected a file of mode 0600.")
        token = content.decode("utf-8", "replace").strip()
    if not 0 < len(token) <= limits.TOKEN_MAX_BYTES or not _WORD.match(token):
        raise ConfigError(f"{where}: token is empty or damaged: expected one word of printable ASCII.")
    return token
