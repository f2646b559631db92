"""Share links: where a session is and the one-time secret that opens it, for another device or person.

The secret stands in the fragment (`#…`), which browsers never send and servers never log.
"""

from __future__ import annotations

import re

from sterna.errors import UsageError
from sterna.ids import NODE_ID_BYTES, UID_BYTES, NodeId, SessionUid, check_agent
from sterna.trust import base64url
from sterna.trust.tickets import TICKET_BYTES

LINK_MAX_CHARS = 2_048
LINK_FIELDS_MAX = 32
HTTPS_PORT = 443
SESSION_PORT = 7220
PORT_MAX = 65_535

# Scheme, host (a name, an IPv4 address, or an IPv6 address in brackets), port, query, fragment. No user, no path.
_LINK = re.compile(
    r"(https|sterna)://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?/?(?:\?([^#]*))?(?:#(.*))?\Z"
)
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45})\Z")
_FIELD = re.compile(r"([a-z])=([A-Za-z0-9._-]{1,128})\Z")
_MODES = ("drive", "watch")


class ShareLink:
    """A share link's content; what it does not say is None.

    `port` is the one in the address (of the web page in an https link), `session_port` the one of the session protocol
    for terminals. Its repr hides the ticket.
    """

    __slots__ = ("agent", "host", "mode", "node_id", "port", "session", "session_port", "ticket")

    def __init__(
        self,
        host: str,
        port: int,
        *,
        ticket: str | None = None,
        node_id: NodeId | None = None,
        session: SessionUid | None = None,
        session_port: int | None = None,
        agent: str | None = None,
        mode: str | None = None,
    ) -> None:
        """Raises UsageError if a value cannot stand in a link."""
        self.host = host.strip("[]")
        if not _HOST.match(self.host):
            raise UsageError(f"{host[:80]!r} is no host name or address for a link.")
        self.port = _check_port(port)
        self.session_port = _check_port(session_port if session_port is not None else port)
        for value, size, what in ((node_id, NODE_ID_BYTES, "node id"), (session, UID_BYTES, "session")):
            if value is not None and len(value) != size:
                raise UsageError(f"The {what} of a link has {size} bytes.")
        if ticket is not None:
            _secret(ticket, TICKET_BYTES, "ticket")
        if mode is not None and mode not in _MODES:
            raise UsageError(f"The mode of a link is drive or watch, not {mode[:40]!r}.")
        self.ticket = ticket
        self.node_id = node_id
        self.session = session
        self.agent = check_agent(agent) if agent is not None else None
        self.mode = mode

    def web(self) -> str:
        """Returns the link for browsers: `https://host:port/#t=…&n=…&s=…`, all but the address in the fragment."""
        fields = [*self._ticket_field(), *self._fields()]
        if self.session_port != self.port:
            fields.append(f"p={self.session_port}")
        return f"https://{self._authority(self.port)}/" + ("#" + "&".join(fields) if fields else "")

    def terminal(self) -> str:
        """Returns the link for the terminal client: `sterna://host:port/?n=…&s=…#t=…`, the secret in the fragment."""
        query, fragment = "&".join(self._fields()), "".join(self._ticket_field())
        link = f"sterna://{self._authority(self.session_port)}/"
        return link + (f"?{query}" if query else "") + (f"#{fragment}" if fragment else "")

    def _authority(self, port: int) -> str:
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def _ticket_field(self) -> list[str]:
        return [f"t={self.ticket}"] if self.ticket is not None else []

    def _fields(self) -> list[str]:
        fields: list[str] = []
        if self.node_id is not None:
            fields.append(f"n={base64url.encode(self.node_id)}")
        if self.session is not None:
            fields.append(f"s={base64url.encode(self.session)}")
        if self.agent is not None:
            fields.append(f"a={self.agent}")
        if self.mode is not None:
            fields.append(f"m={self.mode}")
        return fields

    def __repr__(self) -> str:
        return f"ShareLink({self._authority(self.port)}, {'with' if self.ticket is not None else 'no'} ticket)"


def is_link(text: str) -> bool:
    """Tells whether a command's argument is meant as a link (and not as the name of an agent or session)."""
    return text.startswith(("https://", "sterna://"))


def parse_link(text: str) -> ShareLink:
    """Returns the content of a share link of either form; unknown fields are ignored, for links from newer nodes.

    Raises UsageError if it is none; its text never contains the secret.
    """
    match = _LINK.match(text) if len(text) <= LINK_MAX_CHARS else None
    if match is None:
        raise UsageError("This is no share link: expected https://host:port/#… or sterna://host:port/…, whole.")
    scheme, host, port_text, query, fragment = match.groups()
    port = int(port_text) if port_text else (HTTPS_PORT if scheme == "https" else SESSION_PORT)
    public, secret = _split(query or ""), _split(fragment or "")
    if "t" in public:
        raise UsageError("The ticket of this link stands before the #, where servers log it: ask for a new link.")
    if public.keys() & secret.keys():
        raise UsageError("The share link says something twice: copy it again as a whole.")
    fields = {**public, **secret}
    node_id, session = fields.get("n"), fields.get("s")
    return ShareLink(
        host,
        port,
        ticket=fields.get("t"),
        node_id=NodeId(_secret(node_id, NODE_ID_BYTES, "node id")) if node_id is not None else None,
        session=SessionUid(_secret(session, UID_BYTES, "session")) if session is not None else None,
        session_port=_port_field(fields.get("p")),
        agent=fields.get("a"),
        mode=fields.get("m"),
    )


def _split(text: str) -> dict[str, str]:
    """Returns the fields `k=value&…`; values need no escapes, so there are none."""
    fields: dict[str, str] = {}
    parts = text.split("&") if text else []
    if len(parts) > LINK_FIELDS_MAX:
        raise UsageError(f"The share link has more than {LINK_FIELDS_MAX} fields: copy it again as a whole.")
    for part in parts:
        match = _FIELD.match(part)
        if match is None or match[1] in fields:
            raise UsageError("The share link is damaged or incomplete: copy it again as a whole.")
        fields[match[1]] = match[2]
    return fields


def _secret(text: str, size: int, what: str) -> bytes:
    """Decodes a field of exactly `size` bytes; the error names the field, never its value."""
    data = base64url.decode(text, size)
    if data is None or len(data) != size:
        raise UsageError(f"The {what} in the share link is damaged or incomplete: copy it again as a whole.")
    return data


def _port_field(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit() or len(text) > 5:
        raise UsageError("The port in the share link is not a number: copy it again as a whole.")
    return int(text)


def _check_port(port: int) -> int:
    if not 0 < port <= PORT_MAX:
        raise UsageError(f"{port} is no port: use 1 to {PORT_MAX}.")
    return port


def unreachable_reason(host: str) -> str | None:
    """Returns why another device cannot reach a node at `host`, as half a sentence, or None if it may.

    Takes names, IPv4 (also the short forms of inet_aton(3)) and IPv6 addresses, with or without brackets and zone.
    """
    # Imported here: only `share` asks, and ipaddress takes 2 ms.
    import ipaddress
    import socket

    name = host.strip().strip("[]").partition("%")[0].lower().rstrip(".")
    if name in ("", "*"):
        return "it names no address at all"
    if name == "localhost" or name.endswith((".localhost", ".localdomain")):
        return "it is a name that every device has for itself"
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(name))
        except (OSError, ValueError):
            return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped if mapped is not None else address
    if address.is_loopback:
        return "it is a loopback address, which every device has for itself"
    if address.is_unspecified or (address.version == 4 and address.packed[0] == 0):
        return "it means all addresses of this machine and none in particular"
    if address.is_link_local:
        return "it is a link-local address, which means something only on one network cable"
    if address.is_multicast:
        return "it is a multicast address, which is no single machine's"
    if str(address) == "255.255.255.255":
        return "it is the broadcast address, which is no single machine's"
    return None
