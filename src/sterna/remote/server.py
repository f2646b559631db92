"""The listening socket and the connections that came in through it."""

from __future__ import annotations

import os
import socket
from errno import EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM
from typing import TYPE_CHECKING, Final

from sterna.remote.connection import Budget, Connection
from sterna.remote.directories import remove
from sterna.remote.gotext import bytes_of, errno_text
from sterna.remote.loop import READ

if TYPE_CHECKING:
    from collections.abc import Callable

    from sterna.remote.log import Log
    from sterna.remote.loop import Loop
    from sterna.remote.metrics import Metrics
    from sterna.remote.socketkeeper import SocketKeeper

_ACCEPTS: Final = 16  # in one turn
_RETRY_SECONDS: Final = 0.1  # after the descriptors ran out
_BACKLOG: Final = 4096


class Server:
    """Accepts clients and hands their lines to `handle`.

    Parameters: `strict`, whether only clients of the daemon's own user are accepted, and a half-close leaves them their
    replies.
    """

    def __init__(
        self,
        loop: Loop,
        log: Log,
        metrics: Metrics,
        handle: Callable[[Connection, bytes], None],
        *,
        strict: bool = False,
    ) -> None:
        self._loop, self._log, self._metrics, self._handle = loop, log, metrics, handle
        self._may_connect: Callable[[int], bool] | None = None
        self._connection = Connection
        if strict:
            from sterna.remote.strict import LingeringConnection, may_connect, peer_user

            self._connection, self._may_connect, self._peer_user = LingeringConnection, may_connect, peer_user
        self._keeper: SocketKeeper | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connections: set[Connection] = set()
        self._budget = Budget()

    def listen(self, path: str) -> None:
        """Listens at `path` in place of whatever was there, readable and writable for its owner only.

        Raises `OSError` whose text is the contract's.
        """
        remove(path)
        before = os.umask(0o177)
        try:
            self._listener.bind(bytes_of(path))
        except OSError as error:
            raise OSError(f"listen unix {path}: bind: {errno_text(error.errno or EINVAL)}") from error
        finally:
            os.umask(before)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        os.chmod(bytes_of(path), 0o600)
        self._loop.watch(self._listener.fileno(), READ, self._accept)
        if self._may_connect is not None:
            from sterna.remote.socketkeeper import SocketKeeper

            self._keeper = SocketKeeper(self._loop, self._log, path)

    def _accept(self, _events: int) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _peer = self._listener.accept()
            except OSError as error:
                if error.errno in {EMFILE, ENFILE, ENOBUFS, ENOMEM}:
                    self._rest(error)
                return
            if self._may_connect is not None and not self._may_connect(user := self._peer_user(sock)):
                self._log.warn(f"[Server] Refused a connection of user {user}")
                sock.close()
                continue
            sock.setblocking(False)
            self._metrics.connections += 1
            self._log.info("[Server] New connection from: @")
            self._connections.add(self._connection(self._loop, sock, self._handle, self._gone, self._budget))

    def _rest(self, error: OSError) -> None:
        """Descriptors ran out: new clients wait in the queue until others have gone."""
        self._log.error(f"[Server] Accept error: {errno_text(error.errno or 0)}")
        self._loop.forget(self._listener.fileno())
        self._loop.later(_RETRY_SECONDS, self._accept_again)

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.watch(self._listener.fileno(), READ, self._accept)

    def _gone(self, connection: Connection, reason: str) -> None:
        self._connections.discard(connection)
        if connection.problem:
            self._log.warn(f"[frameSink] write failed, detaching: {connection.problem}")
        if reason:
            self._log.warn(f"[Server] scanner error on @: {reason}")
        self._log.info("[Server] Connection closed: @")

    def close_listener(self) -> None:
        """Accepts nobody any more."""
        if self._keeper is not None:
            self._keeper.close()
        if self._listener.fileno() >= 0:
            self._loop.forget(self._listener.fileno())
            self._listener.close()

    def close_connections(self) -> None:
        """Ends all connections."""
        for connection in list(self._connections):
            connection.close()
