"""The node's settings: flags over environment over TOML file over defaults."""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from sterna import limits, paths


class NodeConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a node can be told; sizes are in bytes, times in seconds.

    `tenant_uids` maps a tenant to the user ids whose processes may serve its agents; empty: only the node's own user.
    """

    host: str = "127.0.0.1"
    port: int = 7220
    web_port: int = 7222
    state: str = ""
    sockets: str = ""
    keeper: str = ""
    token_file: str = ""
    tls_cert: str | None = None
    tls_key: str | None = None
    names: list[str] = []
    tenant_uids: dict[str, list[int]] = {}
    on_full: Literal["overwrite", "pause"] = "overwrite"
    ring_bytes: int = limits.RING_BYTES
    spill_bytes: int = limits.SPILL_BYTES
    journal_quota_bytes: int = limits.JOURNAL_QUOTA_BYTES
    retention_seconds: int = limits.RETENTION_SECONDS
    cold_seconds: int = 60
    unauthenticated_max: int = 1024
    unauthenticated_per_address: int = 256
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if not self.state:
            self.state = os.path.join(paths.state_path(), "node")
        if not self.sockets:
            self.sockets = paths.runtime_path(self.state)

    def hosts(self) -> list[str]:
        """Returns the names and addresses that the certificate is for."""
        wildcard = self.host in ("0.0.0.0", "::", "")
        return [*([] if wildcard else [self.host]), *self.names]

    def tenants(self) -> dict[int, frozenset[str]] | None:
        """Returns which tenants' agents each user id may serve; None: only this process's user, any tenant."""
        if not self.tenant_uids:
            return None
        found: dict[int, set[str]] = {}
        for tenant, uids in self.tenant_uids.items():
            for uid in uids:
                found.setdefault(uid, set()).add(tenant)
        return {uid: frozenset(names) for uid, names in found.items()}
