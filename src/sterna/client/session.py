"""Makes the machine for one attachment: who we are, which session is meant, and what to say in CONNECT."""

from __future__ import annotations

import os
import socket
import time

from sterna.client.endpoint import Endpoint, client_state
from sterna.ids import clean_label
from sterna.protocol.client import ClientMachine, Saved
from sterna.protocol.messages import CONTEXT_CONNECT, ConnectBody, Mode, Want
from sterna.trust.device import DeviceKey, next_counter, raise_counter

_FORWARDED = ("LANG", "LANGUAGE", "COLORTERM", "TZ")


class Wish:
    """Which session is wanted: an agent's latest, one by name (made if absent), a new one, or one to join."""

    __slots__ = ("agent", "argv", "cwd", "name", "uid", "want")

    def __init__(
        self,
        want: Want,
        *,
        agent: str = "",
        name: str | None = None,
        uid: bytes | None = None,
        argv: list[str] | None = None,
        cwd: str | None = None,
    ) -> None:
        self.want: Want = want
        self.agent = agent
        self.name = name
        self.uid = uid
        self.argv = argv
        self.cwd = cwd


def forwarded_environment() -> dict[str, str]:
    """Returns the variables about language and colour that a remote program should see as the user's terminal does."""
    return {k: v for k, v in os.environ.items() if k in _FORWARDED or k.startswith("LC_")}


def device_label() -> str:
    """Returns what this installation calls itself to others: the user's name and the host's."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or _login()
    return clean_label(f"{user}@{socket.gethostname()}")


def _login() -> str:
    import pwd  # rarely needed

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def make_machine(
    endpoint: Endpoint,
    wish: Wish,
    *,
    state: str | None = None,
    size: tuple[int, int] = (0, 0),
    term: str = "",
    mode: Mode = "drive",
    exact: bool = False,
    displace: bool = False,
    output: int | None = None,
    saved: Saved | None = None,
) -> ClientMachine:
    """Returns a machine that connects to `endpoint` and attaches as wished; `size` in columns and rows (0: no
    terminal).

    `state` is the base of the client's own state. `exact` asks for every byte, from position `output` or the oldest
    kept. `saved` goes on with an earlier process's attachment, or repeats its CONNECT whose answer it may not have had.
    Raises TrustError or StorageError when the device key cannot be used.
    """
    directory = client_state(state)
    key = DeviceKey.load(directory)
    if endpoint.session is not None:
        wish = Wish("join", uid=endpoint.session)
    body = ConnectBody(
        context=CONTEXT_CONNECT, node=endpoint.node_id, request=saved.request if saved is not None else os.urandom(16),
        key=key.public, attachment=saved.attachment if saved is not None else os.urandom(16),
        credential=endpoint.credential, agent=wish.agent, want=wish.want, name=wish.name, uid=wish.uid,
        label=device_label(), mode="watch" if endpoint.watch else mode, exact=exact, displace=displace, output=output,
        cols=size[0], rows=size[1], term=term, argv=wish.argv, cwd=wish.cwd, env=forwarded_environment(),
    )  # fmt: skip

    def sign(context: str, signed: bytes) -> bytes:
        return key.sign(context, endpoint.node_id, signed)

    return ClientMachine(
        body,
        device=key.id,
        sign=sign,
        counter=lambda: next_counter(directory, time.time_ns()),
        raise_counter=lambda value: raise_counter(directory, value),
        random=os.urandom,
        now=time.monotonic_ns(),
        saved=saved,
    )
