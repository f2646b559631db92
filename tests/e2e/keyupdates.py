"""One side of a TLS connection that sends KeyUpdates (RFC 8446, section 4.6.3) and nothing else; Python's ssl cannot.

python keyupdates.py PORT COUNT              as a client
python keyupdates.py CHAIN.PEM KEY.PEM COUNT as a server, for the first connection on which something is said
"""

from __future__ import annotations

import ctypes
import ctypes.util
import socket
import sys

from sterna.protocol.frame import Type, encode

ALPN = b"\x0aclawterm/1"
_WANT_READ = 2
_PEM = 1
_FLOOD_MAX_BYTES = 1 << 24

lib = ctypes.CDLL(ctypes.util.find_library("ssl") or "libssl.so.3")
crypto = ctypes.CDLL(ctypes.util.find_library("crypto") or "libcrypto.so.3")


def declare() -> None:
    """Tells ctypes about the functions that take or return pointers."""
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for module, name, result, *arguments in (
        (lib, "TLS_client_method", pointer),
        (lib, "TLS_server_method", pointer),
        (lib, "SSL_CTX_new", pointer, pointer),
        (lib, "SSL_CTX_use_certificate_chain_file", number, pointer, text),
        (lib, "SSL_CTX_use_PrivateKey_file", number, pointer, text, number),
        (lib, "SSL_new", pointer, pointer),
        (lib, "SSL_set_bio", None, pointer, pointer, pointer),
        (lib, "SSL_set_alpn_protos", number, pointer, text, ctypes.c_uint),
        (lib, "SSL_set_connect_state", None, pointer),
        (lib, "SSL_set_accept_state", None, pointer),
        (lib, "SSL_do_handshake", number, pointer),
        (lib, "SSL_get_error", number, pointer, number),
        (lib, "SSL_key_update", number, pointer, number),
        (lib, "SSL_read", number, pointer, text, number),
        (lib, "SSL_write", number, pointer, text, number),
        (crypto, "BIO_new", pointer, pointer),
        (crypto, "BIO_s_mem", pointer),
        (crypto, "BIO_ctrl_pending", ctypes.c_size_t, pointer),
        (crypto, "BIO_read", number, pointer, text, number),
        (crypto, "BIO_write", number, pointer, text, number),
    ):
        function = getattr(module, str(name))
        function.restype = result
        function.argtypes = arguments


class Side:
    """A TLS connection on a socket; with `chain` and `key` (PEM files) the server's side."""

    def __init__(self, sock: socket.socket, chain: str = "", key: str = "") -> None:
        self.sock = sock
        context = lib.SSL_CTX_new(lib.TLS_server_method() if chain else lib.TLS_client_method())
        if chain and not (
            lib.SSL_CTX_use_certificate_chain_file(context, chain.encode()) == 1
            and lib.SSL_CTX_use_PrivateKey_file(context, key.encode(), _PEM) == 1
        ):
            sys.exit("the certificate or its key cannot be used")
        self.tls = lib.SSL_new(context)
        self.come, self.go = crypto.BIO_new(crypto.BIO_s_mem()), crypto.BIO_new(crypto.BIO_s_mem())
        lib.SSL_set_bio(self.tls, self.come, self.go)
        if chain:
            lib.SSL_set_accept_state(self.tls)
        else:
            lib.SSL_set_alpn_protos(self.tls, ALPN, len(ALPN))
            lib.SSL_set_connect_state(self.tls)
        self.buffer = ctypes.create_string_buffer(1 << 20)

    def made(self) -> bytes:
        size = crypto.BIO_read(self.go, self.buffer, len(self.buffer))
        return self.buffer.raw[:size] if size > 0 else b""

    def shake(self) -> bool:
        """Does the handshake; False if the other side leaves before its end."""
        while (result := lib.SSL_do_handshake(self.tls)) != 1:
            if lib.SSL_get_error(self.tls, result) != _WANT_READ:
                sys.exit("the handshake failed")
            self.sock.sendall(self.made())
            data = self.sock.recv(65536)
            if not data:
                return False
            crypto.BIO_write(self.come, data, len(data))
        self.sock.sendall(self.made())
        return True

    def spoken_to(self) -> bool:
        """Waits until the other side says something after the handshake, which may have come with its end."""
        return bool(crypto.BIO_ctrl_pending(self.come) or self.sock.recv(65536))

    def flood(self, count: int, last: bytes = b"") -> None:
        """Sends `count` KeyUpdates at once, then `last`, and says whether it was sent away or answered, or neither."""
        updates = bytearray()
        for _ in range(count):
            lib.SSL_key_update(self.tls, 0)
            lib.SSL_do_handshake(self.tls)
            if len(updates) < _FLOOD_MAX_BYTES:
                updates += self.made()
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            self.sock.sendall(updates)
            if last:
                lib.SSL_write(self.tls, last, len(last))
                self.sock.sendall(self.made())
            self.sock.settimeout(5)
            while data := self.sock.recv(65536):
                crypto.BIO_write(self.come, data, len(data))
                if lib.SSL_read(self.tls, self.buffer, len(self.buffer)) > 0:
                    print("answered", flush=True)
                    return
        except TimeoutError:
            print("taken", flush=True)
        except OSError:
            print("refused", flush=True)
        else:
            print("refused", flush=True)


def client(port: int, count: int) -> None:
    """Connects, floods, and asks for an answer."""
    side = Side(socket.create_connection(("127.0.0.1", port), 10))
    if not side.shake():
        sys.exit("the other side left in the handshake")
    print("connected", flush=True)
    side.flood(count, encode(Type.PING, 0, 0, b"there?"))


def server(chain: str, key: str, count: int) -> None:
    """Prints its port, and floods the first client that says something."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        side = Side(listener.accept()[0], chain, key)
        if side.shake() and side.spoken_to():
            break
        side.sock.close()
    print("connected", flush=True)
    side.flood(count)


if __name__ == "__main__":
    declare()
    if len(sys.argv) == 3:
        client(int(sys.argv[1]), int(sys.argv[2]))
    else:
        server(sys.argv[1], sys.argv[2], int(sys.argv[3]))
