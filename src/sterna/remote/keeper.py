"""The daemon's side of its holder: finds or starts it, has it start children, takes up those of the daemon before."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import sys
import time
from errno import EMFILE, EPROTO
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from sterna.limits import (
    REMOTE_HOLDER_END_SECONDS,
    REMOTE_HOLDER_GREETING_SECONDS,
    REMOTE_HOLDER_REPLY_SECONDS,
)
from sterna.remote import holding
from sterna.remote.child import PipeError
from sterna.remote.directories import remove
from sterna.remote.durable import About, DurableChild, DurablePtyChild
from sterna.remote.failure import StartError
from sterna.remote.gotext import bytes_of
from sterna.remote.holding import HoldingError
from sterna.remote.loop import READ
from sterna.remote.spawn import spawn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sterna.remote.log import Log
    from sterna.remote.loop import Loop

_CODE: Final = "import sys; sys.path.insert(0, sys.argv[1]); from sterna.remote.holder import main; main()"
_RETRY_SECONDS: Final = 0.02
_ATTEMPTS: Final = 3
_REAP_SECONDS: Final = 0.1


class Session:
    """A connection to one holder. What is told to a holder that has gone is lost with it, and nothing is raised."""

    def __init__(self, sock: socket.socket, log: Log) -> None:
        self._socket, self._log = sock, log
        self.lost = False
        self.greeted = False
        sock.settimeout(REMOTE_HOLDER_GREETING_SECONDS)
        holding.send(sock, [holding.HELLO])

    def fileno(self) -> int:
        """Returns the socket's descriptor."""
        return self._socket.fileno()

    def greet(self) -> list[DurableChild]:
        """Returns the processes that the holder has when this is called first. Raises `StartError`, `OSError`."""
        if self.greeted:
            return []
        self.greeted = True
        (version, count), _ = holding.receive(self._socket)
        if version != holding.VERSION:
            raise StartError("the processes are held by another version of this program: end them with that one first")
        children = [self._borrow(*holding.receive(self._socket)) for _ in range(int(count))]
        self._socket.settimeout(REMOTE_HOLDER_REPLY_SECONDS)
        return children

    def settled(self) -> bool:
        """Takes the first answer if it waits. Returns whether the holder is still there."""
        try:
            if not self.greeted and self.greet():
                self._give_up()
            self._socket.setblocking(False)
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self._socket.settimeout(REMOTE_HOLDER_REPLY_SECONDS)

    def _borrow(self, items: list[bytes], came: list[int]) -> DurableChild:
        _, handle, pid, is_open, about = items
        if len(came) != is_open.count(b"1"):
            for descriptor in came:
                os.close(descriptor)
            raise PipeError(EMFILE, os.strerror(EMFILE))
        descriptors = iter(came)
        lent = [next(descriptors) if flag == ord("1") else -1 for flag in is_open]
        known = msgspec.json.decode(about, type=About)
        return (DurablePtyChild if known.terminal else DurableChild)(self, int(handle), int(pid), known, lent)

    def start(self, items: Sequence[bytes]) -> DurableChild:
        """Has a child started. Raises `PipeError`, `OSError` as `Child.start`."""
        if self.greet():  # a holder that is no new one, and what it has is known under another session
            self._give_up()
        answer, came = self._ask(items)
        if answer[0] == holding.FAILED:
            number = int(answer[2])
            raise (PipeError if answer[1] == b"pipe" else OSError)(number, os.strerror(number))
        try:
            return self._borrow(answer, came)
        except PipeError:
            self.tell(holding.DROP, int(answer[1]))
            raise

    def status(self, handle: int) -> int | None:
        """Returns the exit code of a child, −1 when there is no holder to know it, None while it runs."""
        try:
            answer, _ = self._ask([holding.STATUS, str(handle).encode()])
        except OSError:
            return -1
        return int(answer[0]) if answer[0] else None

    def _ask(self, items: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
        if self.lost:
            raise HoldingError(EPROTO, "the holder has gone")
        try:
            holding.send(self._socket, items)
            return holding.receive(self._socket)
        except TimeoutError:
            self._give_up()
        except OSError:
            self.lost = True
            raise

    def _give_up(self) -> NoReturn:
        """Ends this daemon, which loses nothing; going on without a holder that may yet go on would."""
        self._log.error("[durable] The holder does not answer: the next daemon takes its processes up")
        os._exit(1)

    def tell(self, what: bytes, *numbers: int) -> None:
        """Tells the holder something that it does not answer."""
        if self.lost:
            return
        try:
            holding.send(self._socket, [what, *(str(number).encode() for number in numbers)])
        except TimeoutError:
            self._give_up()
        except OSError:
            self.lost = True

    def end(self) -> None:
        """Ends the holder with everything that it has, and waits for that for a moment."""
        self.tell(holding.END)
        try:
            self._socket.settimeout(REMOTE_HOLDER_END_SECONDS + 1)
            while self._socket.recv(65_536):
                pass
        except OSError:
            pass

    def close(self) -> None:
        """Gives up the connection."""
        self.lost = True
        self._socket.close()


class Keeper:
    """Starts durable children.

    Parameters: `path`, of the daemon's socket; `environment`, of the holder itself, entries `NAME=value`.
    """

    def __init__(self, loop: Loop, log: Log, path: str, environment: list[bytes]) -> None:
        self._loop, self._log = loop, log
        self._path = path + holding.SUFFIX
        self._environment = environment
        self._pid = 0  # of a holder that this daemon has started
        self._session: Session | None = None

    def open(self) -> list[DurableChild]:
        """Returns the children that a holder has, in the order of their start; starts one if there is none.

        Raises `StartError`.
        """
        if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            raise StartError("-durable needs files of any size: lift their limit with ulimit -f unlimited")
        for attempt in range(_ATTEMPTS):
            session = None
            try:
                session, is_new = self._connect()
                children = [] if is_new else session.greet()
            except OSError as error:
                if session is None or isinstance(error, TimeoutError) or attempt == _ATTEMPTS - 1:
                    raise StartError(f"cannot reach the holder of the processes at {self._path}: {error}") from error
                session.close()  # that holder was just about to end
            else:
                self._attend(session)
                return children
        raise AssertionError

    def start(
        self,
        executable: bytes,
        argv: Sequence[bytes],
        env: Sequence[bytes],
        cwd: bytes,
        process_id: str,
        command: str,
        size: tuple[int, int] | None,
    ) -> DurableChild:
        """Starts a child that is known by an id and a command, with a terminal of a size or with pipes.

        Raises `PipeError`, `OSError` as `Child.start`.
        """
        if self._session is None or self._session.lost:
            self._attend(self._connect()[0])
        assert self._session is not None
        about = msgspec.json.encode(About(process_id, command, time.time(), size is not None))
        wanted = b"" if size is None else b"%d %d" % size
        count = str(len(argv)).encode()
        return self._session.start([holding.START, executable, _absolute(cwd), about, wanted, count, *argv, *env])

    def end(self) -> None:
        """Ends the holder with everything that it has."""
        if self._session is not None:
            self._session.end()

    # ------------------------------------------------------------------------------------------------------- sessions

    def _attend(self, session: Session) -> None:
        self._release()
        self._session = session
        self._loop.watch(session.fileno(), READ, lambda _events: self._readable(session))

    def _readable(self, session: Session) -> None:
        """The holder has answered the greeting, or has gone: it says nothing else on its own."""
        if session is self._session and not session.settled():
            self._release()
            self._log.warn("[durable] The holder has ended: its processes now last only as long as this daemon")

    def _release(self) -> None:
        if self._session is not None:
            self._loop.forget(self._session.fileno())
            self._session.close()
            self._session = None
        if self._pid:
            self._reap(self._pid)
            self._pid = 0

    def _reap(self, pid: int) -> None:
        """Reaps a holder, whose socket closes a moment before it can be."""
        if not os.waitpid(pid, os.WNOHANG)[0]:
            self._loop.later(_REAP_SECONDS, lambda: self._reap(pid))

    def _connect(self) -> tuple[Session, bool]:
        """Returns a session, and whether its holder is new. Raises `OSError`."""
        with _Lock(os.path.dirname(self._path) or "."):
            sock = self._reach()
            is_new = sock is None
            if sock is None:
                self._start_holder()
                sock = self._reach()
                if sock is None:
                    raise HoldingError(EPROTO, "it does not start")
            return Session(sock, self._log), is_new

    def _reach(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(bytes_of(self._path))
            if holding.peer(sock)[1] != os.getuid():
                raise HoldingError(EPROTO, "it belongs to another user")
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            return None
        except OSError:
            sock.close()
            raise
        return sock

    def _start_holder(self) -> None:
        """Starts a holder at a socket that listens already, so that nobody has to wait for it."""
        remove(self._path)
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, open(os.devnull, "r+b") as null:
            before = os.umask(0o177)
            try:
                listener.bind(bytes_of(self._path))
            finally:
                os.umask(before)
            listener.listen(8)
            argv = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _CODE, root, self._path]
            streams = listener.fileno(), null.fileno(), null.fileno()
            words = [bytes_of(word) for word in argv]
            self._pid = spawn(words[0], words, self._environment, b"", streams, session=True)


class _Lock:
    """Lets one daemon at a time look for a holder in a directory. Whoever has had it for too long is passed over."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        self._descriptor = os.open(bytes_of(self._directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        deadline = time.monotonic() + REMOTE_HOLDER_END_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(_RETRY_SECONDS)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _absolute(cwd: bytes) -> bytes:
    """Returns a directory as the holder may see it: relative ones are seen from this daemon's own."""
    try:
        return os.path.join(os.getcwdb(), cwd)
    except OSError:
        return cwd  # of a daemon whose directory has gone
