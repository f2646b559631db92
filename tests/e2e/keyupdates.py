"""A TLS client that sends KeyUpdates (RFC 8446, section 4.6.3) and nothing else; Python's own ssl cannot.

python keyupdates.py PORT COUNT
"""

from __future__ import annotations

import ctypes
import ctypes.util
import socket
import sys

ALPN = b"\x0aclawterm/1"
_WANT_READ = 2


def main(port: int, count: int) -> None:
    """Connects, sends `count` KeyUpdates as fast as the other side takes them, and says whether it was sent away."""
    lib = ctypes.CDLL(ctypes.util.find_library("ssl") or "libssl.so.3")
    crypto = ctypes.CDLL(ctypes.util.find_library("crypto") or "libcrypto.so.3")
    pointer = ctypes.c_void_p
    for module, name in (
        (lib, "TLS_client_method"), (lib, "SSL_CTX_new"), (lib, "SSL_new"), (crypto, "BIO_new"), (crypto, "BIO_s_mem"),
    ):  # fmt: skip
        getattr(module, name).restype = pointer
    lib.SSL_CTX_new.argtypes = lib.SSL_new.argtypes = crypto.BIO_new.argtypes = [pointer]
    lib.SSL_set_bio.argtypes = [pointer, pointer, pointer]
    lib.SSL_set_alpn_protos.argtypes = [pointer, ctypes.c_char_p, ctypes.c_uint]
    for name in ("SSL_set_connect_state", "SSL_do_handshake"):
        getattr(lib, name).argtypes = [pointer]
    lib.SSL_get_error.argtypes = lib.SSL_key_update.argtypes = [pointer, ctypes.c_int]
    crypto.BIO_read.argtypes = crypto.BIO_write.argtypes = [pointer, ctypes.c_char_p, ctypes.c_int]
    tls = lib.SSL_new(lib.SSL_CTX_new(lib.TLS_client_method()))
    come, go = crypto.BIO_new(crypto.BIO_s_mem()), crypto.BIO_new(crypto.BIO_s_mem())
    lib.SSL_set_bio(tls, come, go)
    lib.SSL_set_alpn_protos(tls, ALPN, len(ALPN))
    lib.SSL_set_connect_state(tls)
    buffer = ctypes.create_string_buffer(1 << 20)

    def made() -> bytes:
        size = crypto.BIO_read(go, buffer, len(buffer))
        return buffer.raw[:size] if size > 0 else b""

    sock = socket.create_connection(("127.0.0.1", port), 10)
    while (result := lib.SSL_do_handshake(tls)) != 1:
        if lib.SSL_get_error(tls, result) != _WANT_READ:
            sys.exit("the handshake failed")
        sock.sendall(made())
        data = sock.recv(65536)
        crypto.BIO_write(come, data, len(data))
    sock.sendall(made())
    print("connected", flush=True)
    updates = bytearray()
    for _ in range(count):
        lib.SSL_key_update(tls, 0)
        lib.SSL_do_handshake(tls)
        if len(updates) < 1 << 24:
            updates += made()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        sock.sendall(updates)
        sock.settimeout(5)
        while sock.recv(65536):
            pass
    except TimeoutError:
        print("taken", flush=True)
    except OSError:
        print("refused", flush=True)
    else:
        print("refused", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
