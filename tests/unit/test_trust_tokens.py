"""sterna.trust.tokens, tickets and local: who may do what, and that nothing else opens anything."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sterna import paths
from sterna.errors import Code, ConfigError, StorageError, TrustError, UsageError
from sterna.limits import TOKEN_MAX_BYTES
from sterna.trust import base64url, tokens
from sterna.trust.local import LOCAL_FILE, LOCAL_TENANT, create_local_token, read_local_token
from sterna.trust.tickets import TICKET_CHARS, TICKET_HASH_BYTES, new_ticket, ticket_hash
from sterna.trust.tokens import DRIVE, LOCAL_GRANT, WATCH, Access, Grant, TokenFile, TokenKey, verify_token

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_800_000_000
SECRET = "correct-horse-battery"


@pytest.fixture
def key() -> TokenKey:
    return TokenKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def refusal(call: object, *args: object) -> tuple[Code, str]:
    assert callable(call)
    with pytest.raises(TrustError) as caught:
        call(*args)
    return caught.value.code, str(caught.value)


def signed(key: TokenKey, claims: object, context: bytes = b"sterna access token 1\0") -> str:
    payload = msgspec.msgpack.encode(claims)
    signature = key._private.sign(context + payload)
    return f"st1.{base64url.encode(payload)}.{base64url.encode(signature)}"


def test_token_grants_what_it_says(key: TokenKey) -> None:
    token = key.issue("acme", ["build-*", "shell"], [WATCH], now_s=NOW, expires=NOW + 60)
    grant = key.verify(token, NOW + 59)
    assert (grant.tenant, grant.agents, grant.modes, grant.expires) == (
        "acme",
        ("build-*", "shell"),
        frozenset({WATCH}),
        NOW + 60,
    )
    assert len(bytes.fromhex(grant.token)) == tokens.TOKEN_ID_BYTES
    assert grant.allows("acme", "shell", WATCH)
    assert grant.allows("acme", "build-7", WATCH)
    assert not grant.allows("acme", "shell", DRIVE)
    assert not grant.allows("acme", "shell2", WATCH)
    assert not grant.allows("acme", "Shell", WATCH)
    assert not grant.allows("other", "shell", WATCH)
    assert not grant.allows("acme", "shell", "")


def test_who_may_drive_may_watch(key: TokenKey) -> None:
    grant = key.verify(key.issue("acme", ["*"], [DRIVE], now_s=NOW), NOW)
    assert grant.allows("acme", "any", DRIVE)
    assert grant.allows("acme", "any", WATCH)


def test_format_is_pinned(key: TokenKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", bytes)
    token = key.issue("acme", ["*"], [DRIVE, WATCH], now_s=NOW, expires=NOW + 60)
    assert token == (
        "st1.lqRhY21lkaEqkqVkcml2ZaV3YXRjaM5rSdI82SAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMM5rSdIA"
        ".sFNg8u3f8o4l7FQKkg1MHxvWR23naAig9jnakvJojiYDb_jMc74_fcyJIRQA6CnuXbFvC-MW-w_ppeDehvNOAw"
    )
    assert verify_token(token, [key.public], NOW).token == "00" * 16


def test_two_tokens_are_never_the_same(key: TokenKey) -> None:
    assert key.issue("acme", ["*"], [DRIVE], now_s=NOW) != key.issue("acme", ["*"], [DRIVE], now_s=NOW)


def test_expiry_and_revocation(key: TokenKey) -> None:
    token = key.issue("acme", ["*"], [DRIVE], now_s=NOW, expires=NOW + 60)
    identity = key.verify(token, NOW).token
    assert refusal(key.verify, token, NOW + 60)[0] is Code.EXPIRED
    assert refusal(key.verify, token, NOW, {identity})[0] is Code.REVOKED
    assert key.verify(token, NOW, {"another"}).token == identity
    for_ever = key.issue("acme", ["*"], [DRIVE], now_s=NOW)
    assert key.verify(for_ever, 1 << 40).expires == 0


def test_garbage_bad_signature_and_unknown_key_get_one_answer(key: TokenKey) -> None:
    token = key.issue("acme", ["*"], [DRIVE], now_s=NOW, expires=NOW + 60)
    head, payload, signature = token.split(".")
    stranger = TokenKey(Ed25519PrivateKey.generate())
    other = key.issue("acme", ["*"], [DRIVE], now_s=NOW).split(".")
    bad = [
        "", "st1", "st1.", "st1..", "x", "\0", "ü" * 40, "st2" + token[3:], token.upper(), token + ".", token + "=",
        token + "\n", " " + token, f"{head}.{payload}", f"{head}.{payload}.", f"{head}..{signature}",
        f"{head}.{other[1]}.{signature}", f"{head}.{payload}.{other[2]}", f"{head}.{signature}.{payload}",
        f"{head}.{payload}.{signature}.{signature}", token[:-1], token * 20, "st1." + "A" * TOKEN_MAX_BYTES,
        stranger.issue("acme", ["*"], [DRIVE], now_s=NOW),
        # An expired or revoked token that is not genuine does not say so.
        stranger.issue("acme", ["*"], [DRIVE], now_s=NOW - 100, expires=NOW - 50),
    ]  # fmt: skip
    answers = {refusal(key.verify, text, NOW) for text in bad}
    assert len(answers) == 1
    assert answers.pop()[0] is Code.DENIED


def test_several_keys(key: TokenKey) -> None:
    second = TokenKey(Ed25519PrivateKey.generate())
    for each in (key, second):
        token = each.issue("acme", ["*"], [DRIVE], now_s=NOW)
        assert verify_token(token, [key.public, second.public], NOW).tenant == "acme"
        assert verify_token(token, [b"junk", bytes(32), key.public, second.public], NOW).tenant == "acme"
        assert refusal(verify_token, token, [], NOW)[0] is Code.DENIED


@pytest.mark.parametrize(
    "claims",
    [
        None, {}, [], "x", ["acme"], ["acme", ["*"], ["drive"], 0, "id"], ["acme", ["*"], ["drive"], 0, "id", 0, 1],
        ["ac_me", ["*"], ["drive"], 0, "id", 0], ["acme", [], ["drive"], 0, "id", 0], ["acme", ["*"], [], 0, "id", 0],
        ["acme", ["*"], ["root"], 0, "id", 0], ["acme", ["[a"], ["drive"], 0, "id", 0],
        ["acme", ["*" * 30], ["drive"], 0, "id", 0], ["acme", ["a"] * 3 + list("bcdefghijklmnopqrstuvwxyzABCDEFGHIJ"),
        ["drive"], 0, "id", 0], ["acme", "*", ["drive"], 0, "id", 0], ["acme", ["*"], ["drive"], "0", "id", 0],
    ],
)  # fmt: skip
def test_signed_nonsense_is_denied(key: TokenKey, claims: object) -> None:
    assert refusal(key.verify, signed(key, claims), NOW)[0] is Code.DENIED


def test_signature_for_another_purpose_is_denied(key: TokenKey) -> None:
    claims = ["acme", ["*"], ["drive"], 0, "id", 0]
    assert key.verify(signed(key, claims), NOW).token == "id"
    assert refusal(key.verify, signed(key, claims, b""), NOW)[0] is Code.DENIED
    assert refusal(key.verify, signed(key, claims, b"clawterm/1 CONNECT"), NOW)[0] is Code.DENIED


@pytest.mark.parametrize(
    ("tenant", "agents", "modes", "expires"),
    [
        ("a_b", ["*"], [DRIVE], 0), ("", ["*"], [DRIVE], 0), ("acme", [], [DRIVE], 0), ("acme", [""], [DRIVE], 0),
        ("acme", ["a b"], [DRIVE], 0), ("acme", ["[x]"], [DRIVE], 0), ("acme", ["*****"], [DRIVE], 0),
        ("acme", ["x" * 65], [DRIVE], 0), ("acme", [f"a{n}" for n in range(33)], [DRIVE], 0), ("acme", ["*"], [], 0),
        ("acme", ["*"], ["write"], 0), ("acme", ["*"], [DRIVE], NOW), ("acme", ["*"], [DRIVE], -1),
    ],
)  # fmt: skip
def test_impossible_tokens_are_not_issued(
    key: TokenKey, tenant: str, agents: list[str], modes: list[str], expires: int
) -> None:
    with pytest.raises(UsageError):
        key.issue(tenant, agents, modes, now_s=NOW, expires=expires)


def test_largest_token_fits(key: TokenKey) -> None:
    agents = [f"{number:02}" + "x" * 62 for number in range(tokens.GLOBS_MAX)]
    token = key.issue("t" * 63, agents, [DRIVE, WATCH], now_s=NOW)
    assert len(token) <= TOKEN_MAX_BYTES
    assert key.verify(token, NOW).agents == tuple(agents)


def test_expensive_globs_stay_cheap() -> None:
    grant = Grant("acme", ("*a*a*a*a" + "?" * 55 + "b",) * tokens.GLOBS_MAX, frozenset({DRIVE}), 0, "id")
    assert not grant.allows("acme", "a" * 63, DRIVE)


def test_key_is_kept_private(tmp_path: Path) -> None:
    first = TokenKey.load(str(tmp_path))
    token = first.issue("acme", ["*"], [DRIVE], now_s=NOW)
    assert TokenKey.load(str(tmp_path)).verify(token, NOW).tenant == "acme"
    path = tmp_path / tokens.KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o604)
    with pytest.raises(TrustError, match="open to other users"):
        TokenKey.load(str(tmp_path))


def token_file(tmp_path: Path, text: str) -> str:
    path = str(tmp_path / "tokens")
    paths.atomic_write(path, text.encode())
    return path


def test_token_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"hashed-secret-of-mine").hexdigest()
    text = f"# tenants\n\nacme {SECRET} shell,build-* drive # all\n  beta\tsha256:{digest}  *  watch\n"
    file = TokenFile.load(token_file(tmp_path, text))
    grant = file.lookup(SECRET)
    assert grant is not None
    assert (grant.tenant, grant.agents, grant.modes, grant.expires) == (
        "acme",
        ("shell", "build-*"),
        frozenset({DRIVE}),
        0,
    )
    assert SECRET not in repr(grant)
    other = file.lookup("hashed-secret-of-mine")
    assert other is not None
    assert (other.tenant, other.modes) == ("beta", frozenset({WATCH}))
    assert other.token != grant.token
    for wrong in ("", SECRET[:-1], SECRET + " ", "acme", digest, f"sha256:{digest}", "\ud800", "x" * 1_000_000):
        assert file.lookup(wrong) is None


@pytest.mark.parametrize(
    "line",
    ["acme", f"acme {SECRET}", f"acme {SECRET} *", f"acme {SECRET} * drive watch", f"a_b {SECRET} * drive",
     f"acme {SECRET} [x] drive", f"acme {SECRET} * root", "acme short * drive", "acme sha256:00 * drive",
     "acme sha256:zz * drive", f"acme {SECRET} , drive", f"acme st1.{SECRET} * drive"],
)  # fmt: skip
def test_token_file_errors_name_the_line_and_not_the_secret(tmp_path: Path, line: str) -> None:
    path = token_file(tmp_path, f"# one\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        TokenFile.load(path)
    assert f"{path}, line 2: " in str(caught.value)
    assert SECRET not in str(caught.value)


def test_token_file_has_to_be_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = token_file(tmp_path, f"acme {SECRET} * drive\nbeta {SECRET}2 * drive\n")
    assert TokenFile.load(path).lookup(SECRET) is not None
    os.chmod(path, 0o640)
    with pytest.raises(TrustError, match="open to other users"):
        TokenFile.load(path)
    os.chmod(path, 0o600)
    monkeypatch.setattr(tokens, "TOKEN_FILE_MAX_LINES", 1)
    with pytest.raises(ConfigError, match="more than 1 tokens"):
        TokenFile.load(path)
    monkeypatch.setattr(tokens, "TOKEN_FILE_MAX_BYTES", 10)
    with pytest.raises(StorageError, match="larger than 10 bytes"):
        TokenFile.load(path)
    with pytest.raises(ConfigError, match="does not exist"):
        TokenFile.load(str(tmp_path / "absent"))


def test_access_takes_every_kind(key: TokenKey, tmp_path: Path) -> None:
    file = TokenFile.load(token_file(tmp_path, f"beta {SECRET} * watch\n"))
    local = create_local_token(str(tmp_path / "node"))
    access = Access([key.public], file=file, local=local)
    token = key.issue("acme", ["*"], [DRIVE], now_s=NOW, expires=NOW + 60)
    assert access.grant(token, NOW).tenant == "acme"
    assert access.grant(SECRET, NOW).tenant == "beta"
    assert access.grant(local, NOW) == LOCAL_GRANT
    assert LOCAL_GRANT.allows(LOCAL_TENANT, "anything", DRIVE)
    assert not LOCAL_GRANT.allows("acme", "anything", WATCH)
    wrong = [
        "",
        "x",
        local[:-1],
        local + " ",
        create_local_token(str(tmp_path / "other")),
        "\ud800",
        token[:-1],
        "st1.",
    ]
    assert len({refusal(access.grant, text, NOW) for text in wrong}) == 1
    assert refusal(access.grant, token, NOW + 60)[0] is Code.EXPIRED
    assert refusal(access.grant, SECRET, NOW, {access.grant(SECRET, NOW).token})[0] is Code.REVOKED


def test_access_to_nothing(key: TokenKey) -> None:
    access = Access()
    for text in ("", SECRET, "lt1.", key.issue("acme", ["*"], [DRIVE], now_s=NOW)):
        assert refusal(access.grant, text, NOW)[0] is Code.DENIED
    with pytest.raises(ConfigError, match="at most"):
        Access([key.public] * 17)


def test_local_token_is_made_once(tmp_path: Path) -> None:
    directory = str(tmp_path / "node")
    assert read_local_token(str(tmp_path)) is None
    token = create_local_token(directory)
    assert create_local_token(directory) == read_local_token(directory) == token
    assert stat.S_IMODE(os.stat(f"{directory}/{LOCAL_FILE}").st_mode) == 0o600
    os.chmod(f"{directory}/{LOCAL_FILE}", 0o640)
    with pytest.raises(TrustError, match="open to other users"):
        read_local_token(directory)


@pytest.mark.parametrize("content", [b"", b"lt1.", b"lt1.AAAA", b"\xff" * 43, b"xx1." + b"A" * 43, b"lt1." + b"=" * 43])
def test_damaged_local_token_is_an_error(tmp_path: Path, content: bytes) -> None:
    paths.atomic_write(str(tmp_path / LOCAL_FILE), content)
    with pytest.raises(TrustError, match="damaged"):
        read_local_token(str(tmp_path))


def test_tickets() -> None:
    text, stored = new_ticket()
    assert (len(text), len(stored)) == (TICKET_CHARS, TICKET_HASH_BYTES)
    assert ticket_hash(text) == stored
    assert stored not in base64url.encode(stored).encode() + text.encode()
    assert new_ticket()[0] != text
    for junk in ("", text[:-1], text + "A", text + "=", " " + text, "ü" * 43, "=" * 43, "A" * 42 + "B", "x" * 100_000):
        with pytest.raises(TrustError, match="ticket"):
            ticket_hash(junk)
