"""TLS on a non-blocking socket, so many bytes at a time: what a peer sends cannot keep OpenSSL from coming back.

`ssl.SSLSocket` reads records until there is application data. A peer that sends none but KeyUpdates (RFC 8446, section
4.6.3: 27 bytes, some 8 µs) stays within one call for as long as it sends, and the whole process with it. Here OpenSSL
sees what was read from the socket before, one piece for each call, and nothing else.
"""

from __future__ import annotations

import socket
import ssl
from typing import cast

PIECE_BYTES = 16 * 1024 + 512
"""Read from the socket at once: a whole record (RFC 8446, section 5.2). What OpenSSL's buffers grow to stays theirs."""
SEND_BYTES = 16 * 1024
BARREN_MAX_BYTES = 64 * 1024
"""What a peer may have sent besides application data: no honest one sends so much."""
_PAID_BYTES = 256  # ... and what each record of data makes up for, beside its own length
_HANDSHAKE_STEPS = 4


class TlsSocket:
    """A TLS connection over a connected, non-blocking socket, with the methods of `ssl.SSLSocket` that a pump needs.

    `piece` is how many bytes are read from the socket at once; more cost less time, and their memory for ever. After
    `recv_into` had nothing more to give, all that was read from the socket is used up: it may be polled again.
    `unsent` says that bytes wait for the socket to take them; `flush` sends them.
    """

    __slots__ = ("_barren", "_in", "_out", "_piece", "_tls", "_unsent", "raw")

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool = False, piece: int = PIECE_BYTES
    ) -> None:
        self.raw = sock
        self._piece = piece
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server_side)
        self._unsent = b""
        self._barren = 0

    @property
    def object(self) -> ssl.SSLObject:
        """The TLS state, to be asked for certificates and names."""
        return self._tls

    @property
    def family(self) -> int:
        """The address family of the socket."""
        return self.raw.family

    @property
    def more(self) -> bool:
        """Whether `recv_into` may have more to give without the socket."""
        return bool(self._in.pending)

    @property
    def unsent(self) -> bool:
        """Whether something waits for the socket to take it."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """Returns the socket's descriptor."""
        return self.raw.fileno()

    def do_handshake(self) -> None:
        """Goes on with the handshake; SSLWantReadError while it is not done, OSError when it cannot be."""
        for _ in range(_HANDSHAKE_STEPS):
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._push()
                self._fill()
            except ssl.SSLError:
                self._push()  # the alert that says why
                raise
            else:
                self._barren = 0
                self._push()
                return
        # What is left in the socket makes it readable again.
        raise ssl.SSLWantReadError

    def recv_into(self, view: memoryview) -> int:
        """Returns how many bytes of application data it put into `view`, 0 at the end.

        BlockingIOError when there is none now, ConnectionAbortedError when the peer sends records without any.
        """
        count = -1
        # Where nothing was left, OpenSSL need not say so: its exception costs as much as a small record.
        for piece in (False, True) if self._in.pending or self._tls.pending() else (True,):
            if piece and not self._fill(barren=True):
                return 0
            try:
                count = cast("int", self._tls.read(len(view), cast("bytearray", view)))
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError:
                self._push()  # the alert that says why
                raise
            self._barren = max(0, self._barren - count - _PAID_BYTES)
            break
        else:
            self._push()  # answers to what came
        if self._barren - self._in.pending > BARREN_MAX_BYTES:
            raise ConnectionAbortedError("it sends TLS records without data")
        if count < 0:
            raise BlockingIOError
        return count  # 0 for a close_notify

    def _fill(self, *, barren: bool = False) -> bool:
        """Reads one piece from the socket for OpenSSL; False at the end."""
        data = self.raw.recv(self._piece)
        if not data:
            if barren:
                return False
            raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF in the handshake")
        self._barren += len(data)
        if self._barren > BARREN_MAX_BYTES and not barren:
            raise ConnectionAbortedError("its TLS handshake is too long")
        self._in.write(data)
        return True

    def send(self, data: memoryview) -> int:
        """Takes at most SEND_BYTES of `data` and returns how many; BlockingIOError while earlier ones wait."""
        if self._unsent:
            self.flush()
        piece = data[:SEND_BYTES]
        taken = self._tls.write(piece)
        self._push()
        return taken

    def flush(self) -> None:
        """Sends what waits; BlockingIOError if the socket does not take all of it."""
        self._push()
        if self._unsent:
            raise BlockingIOError

    def _push(self) -> None:
        if self._out.pending:
            self._unsent += self._out.read()
        if self._unsent:
            try:
                sent = self.raw.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return
            self._unsent = self._unsent[sent:]

    def shutdown(self, how: int) -> None:
        """Shuts the socket down, as socket.shutdown; the peer sees the end of the connection."""
        self.raw.shutdown(how)

    def getsockopt(self, *args: int) -> int | bytes:
        """Asks the socket, as socket.getsockopt."""
        return self.raw.getsockopt(*args)

    def setsockopt(self, level: int, name: int, value: int) -> None:
        """Sets an option of the socket, as socket.setsockopt."""
        self.raw.setsockopt(level, name, value)

    def close(self) -> None:
        """Closes the socket."""
        self.raw.close()
