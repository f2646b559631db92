"""`sterna.client.blocking.connect(…)`: sessions for scripts without an event loop; no threads either.

The connection lives while the script is inside one of these methods; when it was elsewhere for long, the node may have
given the connection up, and the next call resumes it without losing a byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType

from sterna.client.conversation import Attached, Conversation, Happening, make_plan, usual_state
from sterna.client.driver import PollDriver
from sterna.client.endpoint import Endpoint
from sterna.client.session import make_machine
from sterna.errors import SternaError
from sterna.protocol.client import ClientMachine
from sterna.protocol.messages import Mode
from sterna.units import SECOND

_LEAVE_SECONDS = 3.0


class BlockingSession(Attached):
    """A session that this program is attached to, through any failure of the network; made by `connect`.

    Iterating over it, or `read`, gives the output; what was given counts as handled when the caller asks for more.
    `with` leaves politely at its end: the session goes on without us. Timeouts are in seconds and raise TimeoutError.
    """

    def __init__(
        self, machine: ClientMachine, endpoint: Endpoint, on_event: Callable[[Happening], None] | None = None
    ) -> None:
        self._machine = machine
        self._conversation = Conversation(machine, on_event)
        self._driver = PollDriver(machine, endpoint, self._conversation.event)

    # ---- what it is --------------------------------------------------------------------------------------------

    @property
    def unread(self) -> bool:
        """Whether output is here already that `read` will return at once."""
        return self._conversation.unread

    @property
    def ended(self) -> bool:
        """Whether the session ended; output may still wait to be read."""
        return self._conversation.close is not None

    def events(self) -> list[Happening]:
        """Returns what happened beside the bytes since the last call: Gap, Uncertain, Trouble, Notice."""
        found = list(self._conversation.happenings)
        self._conversation.happenings.clear()
        return found

    # ---- output ------------------------------------------------------------------------------------------------

    def read(self, limit: int = -1, *, timeout: float | None = None) -> bytes:
        """Returns output as soon as there is some, at most `limit` bytes (-1: all there is); b"" after the end.

        Raises RefusedError when the node ended the attachment. Asking for more acknowledges what was returned before.
        """
        conversation = self._conversation
        conversation.handled(time.monotonic_ns())
        found: list[bytes] = []

        def take() -> bool:
            data = conversation.take(limit)
            if data is not None:
                found.append(data)
            return bool(found)

        self._until(take, timeout)
        if not found[0]:
            conversation.confirm(time.monotonic_ns())
            self._driver.settle()
        return found[0]

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read():
            yield data

    # ---- input -------------------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview, *, timeout: float | None = None) -> None:
        """Sends input; returns once all of it is in the window (256 KiB not yet handled by the program).

        Output that comes meanwhile is kept. Raises RefusedError after the end, UsageError when only watching.
        """
        view = memoryview(data).cast("B")

        def put() -> bool:
            nonlocal view
            self._conversation.check_writable()
            piece = bytes(view[: max(self._machine.input.room, 0) + 1])
            view = view[self._machine.write(piece, time.monotonic_ns()) :]
            return not view

        self._until(put, timeout)
        self._driver.settle()

    def eof(self, *, timeout: float | None = None) -> None:
        """Ends the input: Ctrl-D on a terminal, the end of standard input elsewhere."""
        self._mark(lambda: self._machine.eof(time.monotonic_ns()), timeout)

    def signal(self, name: str, *, timeout: float | None = None) -> None:
        """Sends a signal by name (INT, TERM, …) to the foreground program, in order with the input."""
        self._mark(lambda: self._machine.signal(name.upper().removeprefix("SIG"), time.monotonic_ns()), timeout)

    def _mark(self, mark: Callable[[], bool], timeout: float | None) -> None:
        def put() -> bool:
            self._conversation.check_writable()
            return self._machine.input.room > 0 and mark()

        self._until(put, timeout)
        self._driver.settle()

    def drain(self, *, timeout: float | None = None) -> None:
        """Waits until the program has taken all input that was written; raises RefusedError if that cannot be."""

        def done() -> bool:
            if self._machine.input.base == self._machine.input.end:
                return True
            self._conversation.check_writable()
            return False

        self._until(done, timeout)

    def resize(self, cols: int, rows: int) -> None:
        """Tells the size of our terminal in cells."""
        self._machine.resize(cols, rows)
        self._driver.settle()

    # ---- the end -----------------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Leaves: the session goes on, and a later `connect` finds it. What was read counts as handled."""
        self._conversation.handled(time.monotonic_ns())
        self._leave()

    def _leave(self) -> None:
        conversation = self._conversation
        try:
            if conversation.close is not None:
                conversation.confirm(time.monotonic_ns())
            elif not conversation.over and conversation.accept is not None:
                self._machine.suspend(time.monotonic_ns())
                self._until(lambda: conversation.over, _LEAVE_SECONDS)
        except TimeoutError:
            pass
        finally:
            self.abort()

    def leave_unread(self) -> None:
        """Leaves without having dealt with the output: also the end of an ended session is left for somebody else."""
        if self._conversation.close is None:
            self._leave()
        else:
            self.abort()

    def close(self, *, timeout: float | None = None) -> int | None:
        """Ends the session for good, its program too; returns the exit status if any. Unread output is lost."""
        conversation = self._conversation
        asked = -1

        def ask() -> bool:
            nonlocal asked
            if conversation.over:
                return True
            conversation.check_writable()
            active = self._machine.active
            if active is not None and active != asked:
                self._machine.close(time.monotonic_ns())
                asked = active
            return False

        self._until(ask, timeout)
        if conversation.error is not None:
            self.abort()
            raise conversation.error
        while conversation.take():
            pass
        self.suspend()
        return conversation.exit_status

    def abort(self) -> None:
        """Drops the connection without a word; the session goes on."""
        self._conversation.left = True
        self._driver.close()

    def __enter__(self) -> BlockingSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.suspend()
        elif issubclass(kind, KeyboardInterrupt):
            self.abort()
        else:
            self._leave()  # what was read last is not acknowledged: it was not dealt with

    # ---- waiting -----------------------------------------------------------------------------------------------

    def _until(self, done: Callable[[], bool], timeout: float | None) -> None:
        """Lets the driver work until `done()`; TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic_ns() + int(timeout * SECOND)
        self._driver.settle()
        while not done():
            if deadline is not None and time.monotonic_ns() >= deadline:
                raise TimeoutError("Nothing came of it in time.")
            self._driver.turn(deadline)

    def open(self, timeout: float | None) -> None:
        """Waits until the session is there; raises what stands against it."""
        conversation = self._conversation
        self._until(lambda: conversation.accept is not None or conversation.over, timeout)
        conversation.check_open()


def connect(  # noqa: PLR0913  # everything that the command line can say, by name
    target: str | None = None,
    *,
    agent: str = "main",
    name: str | None = None,
    new: bool = False,
    mode: Mode = "drive",
    exact: bool = True,
    state: str | None = None,
    host: str | None = None,
    port: int | None = None,
    link: str | None = None,
    token: str | None = None,
    size: tuple[int, int] | None = None,
    term: str = "",
    argv: list[str] | None = None,
    cwd: str | None = None,
    output: int | None = None,
    displace: bool = False,
    quic_port: int | None = None,
    timeout: float | None = None,
    on_event: Callable[[Happening], None] | None = None,
) -> BlockingSession:
    """Attaches to a session and returns it once it is there; everything as in `sterna.connect`.

    Raises SternaError with what to do, and TimeoutError after `timeout` seconds.
    """
    state = usual_state(state)
    plan = make_plan(
        target, agent=agent, name=name, new=new, state=state, host=host, port=port, link=link, token=token, argv=argv,
        cwd=cwd, quic_port=quic_port,
    )  # fmt: skip
    for wish in plan.wishes:
        machine = make_machine(
            plan.endpoint, wish, state=state, size=size or (0, 0), term=term, mode=mode, exact=exact, displace=displace,
            output=output,
        )  # fmt: skip
        session = BlockingSession(machine, plan.endpoint, on_event)
        try:
            session.open(timeout)
        except SternaError as error:
            session.abort()
            if plan.goes_on(wish, error):
                continue
            raise plan.refusal(error) from None
        except BaseException:
            session.abort()
            raise
        return session
    raise AssertionError("a plan has at least one wish")
