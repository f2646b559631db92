"""Runs a node without one of its checks, for the controls of the tests of races and refusals only.

Usage: broken_node.py BREAK STATE SOCKETS PORT; BREAK is one of BREAKS.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

from sterna.ids import DeviceId
from sterna.node.clients import ClientConnection
from sterna.node.config import NodeConfig
from sterna.node.doorkeeper import Doorkeeper, Visitor
from sterna.node.pods import PodRegistry
from sterna.node.store import AttachmentRow, SessionRow, Store, TicketRow
from sterna.protocol import codec
from sterna.protocol.attachment import Attachment
from sterna.protocol.messages import ResumeBody, Signed
from sterna.protocol.session import Session
from sterna.transport.places import Places
from sterna.trust import device, tokens


def forget_requests() -> None:
    """Breaks CONNECT's memory: each repetition is a new request."""
    Store.find_request = lambda self, *_args: None  # type: ignore[method-assign]  # that is the point


def let_everybody_win() -> None:
    """Breaks the race: neither counter nor race id is looked at."""

    def resume(self: Doorkeeper, signed: Signed, body: ResumeBody) -> AttachmentRow:
        row = self._store.attachment(body.attachment)  # type: ignore[arg-type]  # 16 bytes
        assert row is not None
        return row

    Doorkeeper.resume = resume  # type: ignore[method-assign]  # that is the point


def take_late_frames() -> None:
    """Breaks displacement: frames of a connection that was displaced go to the session like any other."""
    original, forget = ClientConnection._attached, Session._forget

    def remember(self: Session, attachment: Attachment) -> None:
        forget(self, attachment)
        attachment.session = self

    def attached(self: ClientConnection, attachment: Attachment, *args: Any) -> None:
        session = attachment.session
        current = session.attachments.get(attachment.id) if session is not None else None
        original(self, current if current is not None else attachment, *args)

    Session._forget = remember  # type: ignore[method-assign]  # that is the point
    ClientConnection._attached = attached  # type: ignore[assignment,method-assign]  # the same


def deliver_twice() -> None:
    """Breaks the lane at the node: input that was forwarded before is forwarded again, under a new position."""
    original = Session.client_input

    def careless(self: Session, attachment: Attachment, kind: int, seq: int, payload: bytes, now: int) -> None:
        lane = attachment.lane
        if lane is not None and seq < lane.next:
            seq = lane.next
        original(self, attachment, kind, seq, payload, now)

    Session.client_input = careless  # type: ignore[method-assign]  # that is the point


def believe_frames() -> None:
    """Breaks the checksum: each that comes is right."""
    vars(codec)["crc16"] = lambda *_args: mock.ANY


def believe_devices() -> None:
    """Breaks the proof of CONNECT and RESUME: each signature is genuine."""
    device.verify = lambda *_args: True


def believe_tokens() -> None:
    """Breaks the proof of access tokens: each signature is genuine."""
    original = tokens.verify_token

    def verify(*args: Any) -> tokens.Grant:
        with mock.patch.object(tokens, "Ed25519PublicKey"):
            return original(*args)

    vars(tokens)["verify_token"] = verify


def forget_revocation() -> None:
    """Breaks revocation: a device is shown out, and may come back."""
    Store.revoke_device = lambda self, *_args: True  # type: ignore[method-assign]  # that is the point


def mix_tenants() -> None:
    """Breaks the wall between tenants: whoever knows a session's name or uid gets it."""

    def allowed(self: ClientConnection, visitor: Visitor, row: SessionRow, mode: str) -> bool:
        return visitor.may_use(row.agent, mode)

    ClientConnection._allowed = allowed  # type: ignore[method-assign]  # that is the point


def trust_everybody() -> None:
    """Breaks the look at the owner: any user's socket is an agent."""
    PodRegistry.trusts = lambda self, *_args: True  # type: ignore[method-assign]  # that is the point


def let_many_be_silent() -> None:
    """Breaks the bound on what one address may have open without a word."""
    Places.at = lambda *_args: 0  # type: ignore[method-assign]  # that is the point


def lend_tickets() -> None:
    """Breaks the binding of a ticket to the device that used it first."""
    original = Store.redeem_ticket

    def redeem(self: Store, hashed: bytes, device: DeviceId, now: int) -> TicketRow | None:
        self._db.write("UPDATE tickets SET device = NULL WHERE hash = ?", (hashed,))
        return original(self, hashed, device, now)

    Store.redeem_ticket = redeem  # type: ignore[assignment,method-assign]  # the same


BREAKS = {
    "frames": believe_frames,
    "devices": believe_devices,
    "tokens": believe_tokens,
    "revoked": forget_revocation,
    "tenants": mix_tenants,
    "owners": trust_everybody,
    "silent": let_many_be_silent,
    "tickets": lend_tickets,
    "requests": forget_requests,
    "race": let_everybody_win,
    "late": take_late_frames,
    "twice": deliver_twice,
}


def main() -> None:
    from sterna.cli.loop import run
    from sterna.cli.serve import serve_node

    name, state, sockets, port = sys.argv[1:5]
    BREAKS[name]()
    config = NodeConfig(port=int(port), quic_port=0, state=os.path.join(state, "node"), sockets=sockets)
    os.makedirs(config.state, 0o700, exist_ok=True)
    run(serve_node(config, lambda about: print(f"listening on {about.port}", flush=True)))


if __name__ == "__main__":
    main()
