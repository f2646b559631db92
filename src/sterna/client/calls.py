"""Asks a node questions (CALL and RESULT, docs/protocol.md, section 6): one blocking connection, no event loop."""

from __future__ import annotations

import os
import ssl
import time
from typing import TYPE_CHECKING, Any

import msgspec

from sterna.client.endpoint import Endpoint, client_state, stranger, unreachable
from sterna.client.line import Line
from sterna.client.session import device_label
from sterna.errors import Code, ConnectionLostError, ProtocolError, RefusedError
from sterna.protocol import messages
from sterna.protocol.codec import Frame
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.messages import CONTEXT_CONNECT, Call, ConnectBody, Result, Signed
from sterna.trust.device import DeviceKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

TIMEOUT_SECONDS = 10.0
PAGES_MAX = 1_000


class Caller:
    """A connection on which CALLs are made; `with Caller(endpoint) as caller:` closes it.

    `timeout` bounds, in seconds, the connection and then each call. Making it connects and proves who we are: raises
    ConnectionLostError, TrustError or RefusedError.
    """

    def __init__(self, endpoint: Endpoint, *, state: str | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        self.endpoint = endpoint
        self._timeout = timeout
        self._link = Link()
        self._frames: list[Frame] = []
        self._ids = 0
        self._line = self._connect(time.monotonic() + timeout)
        try:
            self._prove(state)
        except BaseException:
            self._line.close()
            raise

    def __enter__(self) -> Caller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._line.close()

    def call(self, method: str, **params: Any) -> Any:
        """Returns the value of one CALL; the node's refusal is raised as RefusedError with the node's own sentence."""
        self._line.deadline = time.monotonic() + self._timeout
        self._ids += 1
        self._link.send_message(Type.CALL, 0, Call(self._ids, method, msgspec.Raw(messages.pack(params))))
        self._send()
        while True:
            kind, _handle, _seq, payload = self._frame()
            if kind == Type.RESULT:
                result = messages.unpack(Result, payload)
                if result.id == self._ids:
                    if result.error is not None:
                        raise _refusal(result.error)
                    return messages.shown(msgspec.msgpack.decode(result.value))

    def pages(self, method: str, key: str, *, after: int = 0, **params: Any) -> Iterator[Any]:
        """Yields the items of a list that comes in pages: `key` names them in each, `next` says where the next begins.

        Raises ProtocolError when the pages have no end.
        """
        for _ in range(PAGES_MAX):
            page = self.call(method, after=after, **params)
            yield from page[key]
            following = page.get("next", 0)
            if not following:
                return
            if following <= after:
                break
            after = following
        raise ProtocolError(Code.PROTOCOL, f"The node's list of {key} has no end.")

    def listing(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Returns the sessions that are not closed, and the agents, as the node describes them."""
        page = self.call("list")
        sessions, agents, after = list(page["sessions"]), page["agents"], page["next"]
        if after:
            sessions += self.pages("list", "sessions", after=after)
        return sessions, agents

    # ---- the connection ----------------------------------------------------------------------------------------

    def _connect(self, deadline: float) -> Line:
        reason: ConnectionLostError | None = None
        for address in self.endpoint.addresses:
            try:
                return Line(address, self.endpoint.context, deadline)
            except ssl.SSLCertVerificationError:
                raise stranger(self.endpoint) from None
            except OSError as error:
                reason = self._failed(error)
        raise reason or ConnectionLostError(f"The node at {self.endpoint.name} has no address.")

    def _failed(self, error: OSError) -> ConnectionLostError:
        if isinstance(error, TimeoutError):
            text = f"The node at {self.endpoint.name} did not answer within {self._timeout:g} seconds."
            return ConnectionLostError(text)
        if self.endpoint.context is None:
            return ConnectionLostError("No node runs here any more: start it again with `sterna up`.")
        return unreachable(self.endpoint.name, error)

    def _prove(self, state: str | None) -> None:
        endpoint = self.endpoint
        key = DeviceKey.load(client_state(state))
        body = messages.pack(
            ConnectBody(
                context=CONTEXT_CONNECT, node=endpoint.node_id, request=os.urandom(16), key=key.public,
                attachment=os.urandom(16), credential=endpoint.credential, want="call", label=device_label(),
                mode="watch" if endpoint.watch else "drive",
            )
        )  # fmt: skip
        self._link.send_message(Type.CONNECT, 1, Signed(body, key.sign(CONTEXT_CONNECT, endpoint.node_id, body)))
        self._send()
        while self._frame()[0] != Type.ACCEPT:
            pass

    def _send(self) -> None:
        try:
            self._line.send(b"".join(self._link.data_to_send()))
        except OSError as error:
            raise self._failed(error) from None

    def _frame(self) -> Frame:
        """Returns the next frame; an ERROR is raised, a PING answered."""
        while True:
            while not self._frames:
                self._receive()
            frame = self._frames.pop(0)
            if frame[0] == Type.ERROR:
                raise _refusal(messages.unpack(messages.Error, frame[3]))
            if frame[0] != Type.PING:
                return frame
            self._link.send(Type.PONG, 0, 0, frame[3])
            self._send()

    def _receive(self) -> None:
        try:
            data = self._line.receive()
        except OSError as error:
            raise self._failed(error) from None
        if not data:
            raise ConnectionLostError(f"The node at {self.endpoint.name} ended the connection; try again.")
        self._frames += self._link.receive(data)
        if self._link.closing and not self._frames:
            raise ProtocolError(
                Code.PROTOCOL, f"What answers at {self.endpoint.name} is no node: its bytes make no sense."
            )


def _refusal(error: messages.Error) -> RefusedError:
    code = Code(error.code) if error.code in Code._value2member_map_ else Code.INTERNAL
    text, address = messages.shown(error.message), messages.shown(error.address)
    return RefusedError(code, text, retry_after=error.retry_after, address=address, value=error.value)


def pick(sessions: list[dict[str, Any]], which: str, agents: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    """Returns the session that a script means: by its uid, its name, or the latest one of the agent with that name.

    `sessions` and `agents` are what the node lists; one that goes on is preferred to one that ended. Where a session
    of one agent is called as another agent is, that other agent's session is meant: nobody shall type into a program
    of an agent that was not named. Raises RefusedError if none fits.
    """
    for session in sessions:
        if session["uid"] == which:
            return session
    named = next((session for session in sessions if session["name"] == which), None)
    if named is not None and named["agent"] == which:
        return named
    of_agent = [session for session in sessions if session["agent"] == which]
    if of_agent:
        return max(of_agent, key=lambda session: (session["state"] != "exited", session["changed"]))
    ours = any(agent["name"] == which for agent in agents)
    if named is None and ours:
        text = f"The agent {which!r} has no session: `sterna attach {which}` begins one."
        raise RefusedError(Code.NOT_FOUND, text)
    if named is None:
        text = f"There is no session or agent {which[:80]!r}: `sterna ls` shows what there is."
        raise RefusedError(Code.NOT_FOUND, text)
    if ours:
        text = f"The agent {which!r} has no session, and the one so called is another agent's: give its uid."
        raise RefusedError(Code.NOT_FOUND, text)
    return named
