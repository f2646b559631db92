"""What both ends of a TLS connection have in common (docs/protocol.md, section 4): TLS 1.3 and nothing older."""

from __future__ import annotations

import ssl

ALPN = "clawterm/1"


def harden(context: ssl.SSLContext, alpn: tuple[str, ...]) -> None:
    """Restricts a context to TLS 1.3 without compression, offering or accepting the protocols `alpn`, best first.

    Early data (0-RTT) is off in OpenSSL until it is asked for, and without session tickets there is nothing to use it
    with.
    """
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.set_alpn_protocols(list(alpn))
