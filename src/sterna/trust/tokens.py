"""Access tokens: what somebody may do on a node, signed by a key the node knows (docs/protocol.md, section 4)."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sterna import paths
from sterna.errors import Code, ConfigError, TrustError, UsageError
from sterna.ids import check_tenant
from sterna.limits import TOKEN_MAX_BYTES
from sterna.trust import base64url
from sterna.trust.keyfile import load_ed25519
from sterna.trust.local import LOCAL_TENANT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

DRIVE = "drive"
WATCH = "watch"
MODES = frozenset((DRIVE, WATCH))

KEY_FILE = "token.key"
GLOBS_MAX = 32
GLOB_STARS_MAX = 4
TOKEN_KEYS_MAX = 16
TOKEN_FILE_MAX_BYTES = 1024 * 1024
TOKEN_FILE_MAX_LINES = 4_096
SECRET_MIN_CHARS = 16
TOKEN_ID_BYTES = 16

_PREFIX = "st1."
# What is signed begins with this, so that no other signature of the same key can be taken for a token.
_CONTEXT = b"sterna access token 1\0"
_SIGNATURE_BYTES = 64
_HASHED = "sha256:"
_GLOB = re.compile(r"[A-Za-z0-9._*?-]{1,64}\Z")
_DENIED = "The access token is not valid here: check that all of it was copied, or ask for a new one."


class Grant(msgspec.Struct, frozen=True, gc=False):
    """What a token allows: a tenant, agents (globs), modes; `expires` in Unix seconds, 0 = never; `token` is its id."""

    tenant: str
    agents: tuple[str, ...]
    modes: frozenset[str]
    expires: int
    token: str

    def allows(self, tenant: str, agent: str, mode: str) -> bool:
        """Tells whether the holder may use an agent in a mode; who may drive may also watch."""
        return (
            tenant == self.tenant
            and (mode in self.modes or (mode == WATCH and DRIVE in self.modes))
            and any(fnmatchcase(agent, glob) for glob in self.agents)
        )


class _Claims(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The signed part of a token, as a MessagePack array in this order."""

    tenant: str
    agents: tuple[str, ...]
    modes: tuple[str, ...]
    expires: int
    id: str
    issued: int


_decoder = msgspec.msgpack.Decoder(_Claims)


class TokenKey:
    """The key with which a node signs access tokens; `public` (32 bytes) lets other nodes accept them."""

    __slots__ = ("_private", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()

    @classmethod
    def load(cls, directory: str) -> TokenKey:
        """Returns the token key kept in a node's state directory, made on first use (0600).

        Raises TrustError if the file is open to others or damaged, StorageError if the disk fails.
        """
        return cls(load_ed25519(os.path.join(directory, KEY_FILE)))

    def issue(self, tenant: str, agents: Iterable[str], modes: Iterable[str], *, now_s: int, expires: int = 0) -> str:
        """Returns a new token for a tenant's agents (globs) and modes, until `expires` (Unix seconds, 0 = never).

        Raises UsageError if a name, glob or mode is impossible, the expiry has passed, or the token would be too long.
        """
        if expires and expires <= now_s:
            raise UsageError("The token would already have expired: give a later time, or 0 for never.")
        claims = _Claims(
            tenant=check_tenant(tenant),
            agents=check_globs(agents),
            modes=tuple(sorted(check_modes(modes))),
            expires=expires,
            id=os.urandom(TOKEN_ID_BYTES).hex(),
            issued=now_s,
        )
        payload = msgspec.msgpack.encode(claims)
        signature = self._private.sign(_CONTEXT + payload)
        token = f"{_PREFIX}{base64url.encode(payload)}.{base64url.encode(signature)}"
        if len(token) > TOKEN_MAX_BYTES:
            raise UsageError(f"The token would be longer than {TOKEN_MAX_BYTES} bytes: name fewer agents.")
        return token

    def verify(self, token: str, now_s: int, revoked: Collection[str] = frozenset()) -> Grant:
        """Returns what a token of this key allows; see `verify_token`."""
        return verify_token(token, (self.public,), now_s, revoked)


def check_globs(agents: Iterable[str]) -> tuple[str, ...]:
    """Returns the globs for agents' names if they are some, few and cheap to match; else UsageError."""
    globs = tuple(dict.fromkeys(agents))
    if not 0 < len(globs) <= GLOBS_MAX:
        raise UsageError(f"A token names 1 to {GLOBS_MAX} agents or globs.")
    for glob in globs:
        if not _GLOB.match(glob) or glob.count("*") > GLOB_STARS_MAX:
            raise UsageError(
                f"{glob[:80]!r} is no glob for agents: use up to 64 letters, digits, . _ - ? and {GLOB_STARS_MAX} *."
            )
    return globs


def check_modes(modes: Iterable[str]) -> frozenset[str]:
    """Returns the modes if they are `drive`, `watch` or both; else UsageError."""
    found = frozenset(modes)
    if not found or not found <= MODES:
        raise UsageError("The modes of a token are drive, watch, or both.")
    return found


def verify_token(token: str, publics: Sequence[bytes], now_s: int, revoked: Collection[str] = frozenset()) -> Grant:
    """Returns what a token allows that one of the keys `publics` signed; `now_s` is Unix time in seconds.

    Raises TrustError: `DENIED` alike for garbage, a bad signature and an unknown key; only who holds a genuine token
    learns that it is `EXPIRED` or `REVOKED`.
    """
    claims = _genuine(token, publics[:TOKEN_KEYS_MAX])
    if claims is None:
        raise _refused(Code.DENIED, _DENIED)
    if claims.id in revoked:
        raise _refused(Code.REVOKED, "The access token was revoked: ask for a new one.")
    if claims.expires and claims.expires <= now_s:
        raise _refused(Code.EXPIRED, "The access token has expired: ask for a new one.")
    try:
        tenant, agents, modes = check_tenant(claims.tenant), check_globs(claims.agents), check_modes(claims.modes)
    except UsageError:
        raise _refused(Code.DENIED, _DENIED) from None
    return Grant(tenant, agents, modes, claims.expires, claims.id)


def _genuine(token: str, publics: Sequence[bytes]) -> _Claims | None:
    """Returns the claims if the signature is one of ours; they are decoded only after that."""
    if len(token) > TOKEN_MAX_BYTES or not token.startswith(_PREFIX):
        return None
    payload_text, _, signature_text = token[len(_PREFIX) :].partition(".")
    payload = base64url.decode(payload_text, TOKEN_MAX_BYTES)
    signature = base64url.decode(signature_text, _SIGNATURE_BYTES)
    if payload is None or signature is None:
        return None
    for public in publics:
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, _CONTEXT + payload)
            return _decoder.decode(payload)
        except (InvalidSignature, UnsupportedAlgorithm, ValueError):
            continue
    return None


def _refused(code: Code, message: str) -> TrustError:
    error = TrustError(message)
    error.code = code
    return error


class TokenFile:
    """A file of fixed tokens for small set-ups: lines `tenant secret agents modes`, `#` begins a comment.

    `agents` are globs and `modes` names, each joined by commas. Instead of a secret its hash may stand there, as
    `sha256:` and 64 hex digits. Only hashes are kept in memory.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Sequence[tuple[bytes, Grant]]) -> None:
        self._entries = tuple(entries)

    @classmethod
    def load(cls, path: str) -> TokenFile:
        """Returns the tokens in a file; it must be the user's own and closed to others (0600).

        Raises TrustError if it is open to others, ConfigError (file and line, never the secret) if it is missing or
        makes no sense.
        """
        content = paths.read_private(path, TOKEN_FILE_MAX_BYTES, follow=True)
        if content is None:
            raise ConfigError(f"The token file {path} does not exist: make it, or leave the option out.")
        entries: list[tuple[bytes, Grant]] = []
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            fields = line.split("#", 1)[0].split()
            if not fields:
                continue
            if len(entries) == TOKEN_FILE_MAX_LINES:
                raise ConfigError(f"The token file {path} has more than {TOKEN_FILE_MAX_LINES} tokens.")
            try:
                entries.append(_entry(fields))
            except UsageError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
        return cls(entries)

    def lookup(self, secret: str) -> Grant | None:
        """Returns what a secret allows, or None; all entries are compared, each in constant time."""
        digest = hashlib.sha256(secret[: TOKEN_MAX_BYTES + 1].encode("utf-8", "replace")).digest()
        found: Grant | None = None
        for known, grant in self._entries:
            if hmac.compare_digest(known, digest):
                found = grant
        return found


def _entry(fields: list[str]) -> tuple[bytes, Grant]:
    if len(fields) != 4:
        raise UsageError("Expected four fields: tenant, secret, agents, modes.")
    tenant, secret, agents, modes = fields
    if secret.startswith(_PREFIX):
        raise UsageError(f"A secret that begins with {_PREFIX} would be taken for a signed token: choose another.")
    if secret.startswith(_HASHED):
        try:
            digest = bytes.fromhex(secret[len(_HASHED) :])
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise UsageError("Expected 64 hex digits after sha256: in the second field.")
    elif not SECRET_MIN_CHARS <= len(secret) <= TOKEN_MAX_BYTES:
        raise UsageError(f"The secret has fewer than {SECRET_MIN_CHARS} or more than {TOKEN_MAX_BYTES} characters.")
    else:
        digest = hashlib.sha256(secret.encode("utf-8", "replace")).digest()
    grant = Grant(
        tenant=check_tenant(tenant),
        agents=check_globs(agents.split(",")),
        modes=check_modes(modes.split(",")),
        expires=0,
        # Part of the hash of the hash: a name for logs and revocation which gives nothing away.
        token="file-" + hashlib.sha256(digest).hexdigest()[:16],
    )
    return digest, grant


class Access:
    """All a node accepts as a token: its own key's and those of trusted keys, its token file's, and the local one."""

    __slots__ = ("_file", "_local", "_publics")

    def __init__(
        self, publics: Sequence[bytes] = (), *, file: TokenFile | None = None, local: str | None = None
    ) -> None:
        if len(publics) > TOKEN_KEYS_MAX:
            raise ConfigError(f"A node trusts at most {TOKEN_KEYS_MAX} token keys.")
        self._publics = tuple(publics)
        self._file = file
        self._local = local.encode("ascii") if local is not None else None

    def grant(self, token: str, now_s: int, revoked: Collection[str] = frozenset()) -> Grant:
        """Returns what a token of any kind allows; raises TrustError as `verify_token` does."""
        if self._local is not None and hmac.compare_digest(self._local, token.encode("utf-8", "replace")):
            return LOCAL_GRANT
        if token.startswith(_PREFIX):
            return verify_token(token, self._publics, now_s, revoked)
        found = self._file.lookup(token) if self._file is not None else None
        if found is None:
            raise _refused(Code.DENIED, _DENIED)
        if found.token in revoked:
            raise _refused(Code.REVOKED, "The access token was revoked: ask for a new one.")
        return found


LOCAL_GRANT = Grant(LOCAL_TENANT, ("*",), MODES, 0, "local")
