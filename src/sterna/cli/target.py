"""Which node and which session a command means."""

from __future__ import annotations

from sterna.client.endpoint import Endpoint, find
from sterna.client.session import Wish
from sterna.trust.links import is_link

DEFAULT_AGENT = "main"


def choose(
    target: str | None, *, name: str | None, fresh: bool, state: str | None, host: str | None, port: int | None
) -> tuple[Endpoint, Wish]:
    """Returns the node and the wish for `attach` and its kin; raises SternaError with what to do."""
    if target is not None and is_link(target):
        return find(state=state, link=target), Wish("join")
    if target is not None and ("@" in target or target.startswith("ssh://")):
        from sterna.cli.ssh import reach

        endpoint, target = reach(target, state=state, port=port)
    else:
        endpoint = find(state=state, host=host, port=port)
    agent = target or DEFAULT_AGENT
    if name is not None:
        return endpoint, Wish("named", agent=agent, name=name)
    if fresh:
        return endpoint, Wish("new", agent=agent)
    return endpoint, Wish("latest", agent=agent)
