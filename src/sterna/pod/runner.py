"""Runs one program for one session: its PTY or pipes, its screen, its end."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Mapping

from sterna import limits
from sterna.errors import UsageError
from sterna.pod.program import DRAIN_MAX_SECONDS, DRAIN_QUIET_SECONDS, ExitStatus, Kind, Program, program_environment
from sterna.pod.screen import LazyScreen, ScreenCopy
from sterna.pod.server import PodServer
from sterna.protocol import messages
from sterna.protocol.compress import compress
from sterna.protocol.frame import Type
from sterna.protocol.link import Link
from sterna.protocol.podside import Input, PodSession

_PTY_BYTES = 4_095  # what a PTY gives at once, at most
_BATCH_BYTES = 16 * _PTY_BYTES  # with its header just four TLS records
_SHORT_BYTES = 2_048
_IDLE_SECONDS = 0.25
_ESCALATE_SECONDS = 3.0
_ENDED_POLL_SECONDS = 0.02
_EOF_AGAIN_SECONDS = 0.3
_EOF_AGAIN_MAX_SECONDS = 5.0
_BACKLOG_MAX_BYTES = 1024 * 1024
_RESIZE_EVERY_SECONDS = limits.RESIZE_EVERY_MS / 1000
_DRAW_EVERY_SECONDS = limits.REPAINT_EVERY_MS / 1000
_EOF = int(Type.EOF)
_SIGNAL = int(Type.SIGNAL)

Asked = tuple[int, Link | None]
"""Who asked for a picture: the CAPTURE's token, and the node's connection that it came on."""


class ProgramRunner:
    """A program under a PTY (kind `pty`) or on pipes (kind `stream`), as the runner of one session."""

    __slots__ = (
        "_asked", "_asked_brief", "_behind", "_deadline", "_draw_at", "_drawing", "_ending", "_eof", "_held", "_idle",
        "_line_start", "_loop", "_over", "_program", "_quiet", "_reading", "_reflows", "_resizing", "_screen",
        "_server", "_session", "_size", "_status", "_draw_timer", "_waiting", "_writing",
    )  # fmt: skip

    def __init__(self, server: PodServer, session: PodSession, program: Program, screen: LazyScreen | None) -> None:
        self._server = server
        self._session = session
        self._program = program
        self._screen = screen
        self._loop = server.reactor.loop
        self._waiting: deque[Input] = deque()
        self._writing = False
        self._behind = False
        self._asked: list[Asked] = []
        self._asked_brief: list[Asked] = []
        self._drawing: _Drawing | None = None
        self._draw_at = 0.0
        self._draw_timer: asyncio.TimerHandle | None = None
        self._held = 0
        self._reflows = 0
        self._size = session.cols, session.rows
        self._resizing: asyncio.TimerHandle | None = None
        self._eof = self._over = False
        self._reading = False
        self._line_start = True
        self._status: ExitStatus | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._quiet: asyncio.TimerHandle | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._loop.add_reader(program.pidfd, self._exited)
        self._read_on()

    # ---- output ------------------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        held = self._held or self._reflows or self._eof or self._over or self._ahead() <= 0
        if not (self._reading or held) and self._program.read_fd >= 0:
            self._reading = True
            self._loop.add_reader(self._program.read_fd, self._readable)

    def _ahead(self) -> int:
        """Returns how many bytes may be read until the picture is drawn that is being drawn.

        One window: so whoever gets it has room for all that came meanwhile, and the node's ring still holds that.
        """
        if self._drawing is None or self._drawing.position < 0:
            return limits.WINDOW_BYTES
        return self._drawing.position + limits.WINDOW_BYTES - self._session.out.end

    def _read_off(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._program.read_fd)

    def _readable(self) -> None:
        self._server.reactor.run(self._read)

    def _read(self) -> None:
        """Reads what the program wrote, many small pieces into one frame, never more than there is room for."""
        if not self._reading:
            return
        session = self._session
        room = min(session.out.room, _BATCH_BYTES)
        if room <= 0:
            session.starved = True
            self._read_off()
            return
        room = min(room, self._ahead())
        if room <= 0:
            self._read_off()
            return
        fd, view, size, ended = self._program.read_fd, self._server.reactor.view, 0, False
        try:
            while size < room and (room - size >= _PTY_BYTES or room < _PTY_BYTES):
                # Into one buffer, as a new 64 KiB object for each read costs more than it.
                count = os.readv(fd, [view[size:room]])
                if not count:
                    ended = True
                    break
                size += count
                if count < _SHORT_BYTES:
                    break
        except BlockingIOError:
            pass
        except OSError:
            ended = True  # EIO: nobody holds the terminal's other side any more (pty(7))
        if size:
            self._emit(bytes(view[:size]))
        if ended:
            self._eof = True
            self._read_off()
            self._drained()
        elif self._status is not None:
            self._wait_quiet()

    def _emit(self, data: bytes) -> None:
        self._server.output(self._session, data)
        screen = self._screen
        if screen is None:
            return
        screen.feed(data)
        if screen.due:
            self._catch_up(screen)
        if not self._session.audience:
            # With nobody attached nobody answers the program's questions, so our own terminal does.
            reply = screen.replies()
            if reply:
                self._give(reply)
        if self._idle is None:
            self._idle = self._loop.call_later(_IDLE_SECONDS, self._rest, self._session.out.end)

    def _catch_up(self, screen: LazyScreen) -> None:
        """Has the screen fed beside us; a program that outruns even that waits, so that memory stays bounded."""
        if not self._behind:
            self._behind = True
            self._server.beside(screen.catch_up, self._caught_up)
        elif screen.backlog >= _BACKLOG_MAX_BYTES:
            self._read_off()

    def _caught_up(self) -> None:
        self._behind = False
        screen = self._screen
        if screen is not None and screen.due:
            self._catch_up(screen)
        if not self._session.starved and (screen is None or screen.backlog < _BACKLOG_MAX_BYTES):
            self._read_on()

    def _rest(self, end: int) -> None:
        """Packs the screen away once the program has been quiet for a moment."""
        if self._session.out.end == end:
            self._idle = None
            if self._screen is not None and not self._screen.resting:
                self._server.beside(self._screen.idle, _nothing)
        else:
            self._idle = self._loop.call_later(_IDLE_SECONDS, self._rest, self._session.out.end)

    def roomy(self) -> None:
        """Reads again: the node has taken output."""
        self._read_on()
        self._read()

    # ---- input -------------------------------------------------------------------------------------------------

    def input(self, item: Input) -> None:
        """Gives input to the program, in order; what it does not take waits."""
        if self._waiting or not self._deliver(item):
            self._waiting.append(item)

    def _deliver(self, item: Input) -> bool:
        """Returns whether the program has all of an input now."""
        self._input_goes_on()
        if item.kind == _SIGNAL:
            self._signal(item.data)
        elif item.kind == _EOF:
            # A stream's descriptor is closed here: a watch left on it would belong to the next program that gets its
            # number.
            self._write_off()
            item.data = self._program.eof(at_line_start=self._line_start)
            item.kind = int(Type.DATA)
            if self._program.kind == "pty":
                self._ending = self._loop.call_later(_EOF_AGAIN_SECONDS, self._eof_again, _EOF_AGAIN_SECONDS)
        if item.kind != _SIGNAL and item.data:
            written = self._write(item.data)
            if written < len(item.data):
                item.data = item.data[written:]
                return False
        self._server.handled(item)
        return True

    def _input_goes_on(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def _eof_again(self, seconds: float) -> None:
        """Says once more that there is no input: a terminal forgets it when a program changes its mode meanwhile.

        A closed pipe is at its end for every read; so is this terminal, as long as nobody types.
        """
        self._write(self._program.eof())
        seconds = min(seconds * 2, _EOF_AGAIN_MAX_SECONDS)
        self._ending = self._loop.call_later(seconds, self._eof_again, seconds)

    def _write(self, data: bytes) -> int:
        """Writes what the program takes now; returns how many bytes, all of them if it takes none any more."""
        fd = self._program.write_fd
        if fd < 0:
            return len(data)
        try:
            written = os.write(fd, data)
        except BlockingIOError:
            written = 0
        except OSError:
            return len(data)  # EPIPE, EIO: the program has closed its input or is gone
        if written:
            self._line_start = data[written - 1] in (10, 13)
        if written < len(data) and not self._writing:
            self._writing = True
            self._loop.add_writer(fd, self._writable)
        return written

    def _writable(self) -> None:
        self._server.reactor.run(self._write_on)

    def _write_on(self) -> None:
        while self._waiting:
            if not self._deliver(self._waiting[0]):
                return
            self._waiting.popleft()
        self._write_off()

    def _write_off(self) -> None:
        if self._writing:
            self._writing = False
            if self._program.write_fd >= 0:
                self._loop.remove_writer(self._program.write_fd)

    def _give(self, reply: bytes) -> None:
        """Writes an answer of our own terminal; a program that does not read it loses it, as on a real one."""
        if not self._waiting and self._program.write_fd >= 0:
            try:
                os.write(self._program.write_fd, reply)
            except OSError:
                return

    def _signal(self, payload: bytes) -> None:
        try:
            self._program.signal(messages.unpack(messages.Signal, payload).name)
        except UsageError:
            return  # a name we do not pass on: taken, and nothing happens

    # ---- size, screen ------------------------------------------------------------------------------------------

    def resized(self) -> None:
        """Sets the terminal's size: at once, or after a moment if it changed just now; the last one counts."""
        if self._resizing is None:
            self._resize()

    def _resize(self) -> None:
        """Sets the size if it is another one; the screen is laid out anew beside the loop.

        Nothing is read meanwhile: what was read before belongs on the old screen, what the program prints for the new
        size on the new one.
        """
        if self._resizing is not None:
            self._resizing.cancel()
            self._resizing = None
        size, screen = (self._session.cols, self._session.rows), self._screen
        if size == self._size or self._over:
            return
        self._size = size
        self._program.resize(*size)
        self._resizing = self._loop.call_later(_RESIZE_EVERY_SECONDS, self._resize_on)
        if screen is not None:
            self._reflows += 1
            self._read_off()
            self._server.beside(lambda: screen.resize(*size), self._reflowed)

    def _resize_on(self) -> None:
        self._resizing = None
        self._resize()

    def _reflowed(self) -> None:
        self._reflows -= 1
        if not self._session.starved:
            self._read_on()

    def audience(self) -> None:
        """Lets our own terminal answer only what is asked from now on, if nobody is attached."""
        if self._screen is not None:
            self._screen.forget_replies()

    def capture(self, token: int, scrollback: bool) -> None:
        """Sends what repaints the screen at the end of the output so far, as soon as it is drawn."""
        session, drawing = self._session, self._drawing
        if self._screen is None:
            session.send_snapshot(token, session.out.end, b"", False)
            return
        self._resize()  # it has to fit who asks
        asked = token, session.link
        if not scrollback:
            self._asked_brief.append(asked)
            if len(self._asked_brief) == 1:
                self._draw_brief(self._screen)
        elif drawing is not None and (drawing.position, drawing.size) == (session.out.end, self._size):
            drawing.asked.append(asked)
        else:
            self._asked.append(asked)
            self._draw()

    def _draw_brief(self, screen: LazyScreen) -> None:
        """Draws the screen alone, for all who ask for that until it is done: nothing is read meanwhile."""
        size = self._size
        drawn: list[bytes] = []
        self._hold()

        def done() -> None:
            self._release()
            if size != self._size and self._screen is not None:
                self._draw_brief(screen)
                return
            asked, self._asked_brief = self._asked_brief, []
            self._send(asked, self._session.out.end, drawn)

        self._server.beside(lambda: drawn.append(compress(screen.snapshot(False))), done)

    def _draw(self) -> None:
        """Begins a picture with scroll-back: one at a time, and not too often, as each is work for a whole second."""
        screen = self._screen
        if screen is None or self._drawing is not None or self._draw_timer is not None or not self._asked:
            return
        wait = self._draw_at - self._loop.time()
        if wait > 0:
            self._draw_timer = self._loop.call_later(wait, self._draw_again)
        else:
            self._drawing = _Drawing(self, screen)
            self._server.draw(self._drawing)

    def _draw_again(self) -> None:
        self._draw_timer = None
        self._server.reactor.run(self._draw)

    def begin_drawing(self, drawing: _Drawing) -> bool:
        """Notes what a picture shows, on its turn: all output so far; nothing is read until the screen is copied."""
        drawing.asked, self._asked = self._reachable(self._asked), []
        if self._screen is None or not drawing.asked:
            self._drawing = None
            return False
        self._draw_at = self._loop.time() + _DRAW_EVERY_SECONDS
        drawing.position, drawing.size = self._session.out.end, self._size
        self._hold()
        return True

    def copied(self) -> None:
        """Goes on reading while the copy is drawn."""
        self._release()

    def drawn(self, drawing: _Drawing) -> None:
        """Sends a picture; those who asked for it later than output came have waited for the next one."""
        self._drawing = None
        self._send(drawing.asked, drawing.position, drawing.data)
        if not self._session.starved:
            self._read_on()
        self._draw()

    def _send(self, asked: list[Asked], position: int, drawn: list[bytes]) -> None:
        for token, _link in self._reachable(asked):
            self._session.send_snapshot(token, position, drawn[0] if drawn else b"", bool(drawn))

    def _reachable(self, asked: list[Asked]) -> list[Asked]:
        """Returns who asked on the connection that there is: the node asks again on its next one."""
        return [one for one in asked if one[1] is self._session.link]

    def _hold(self) -> None:
        self._held += 1
        self._read_off()

    def _release(self) -> None:
        self._held -= 1
        if not self._session.starved:
            self._read_on()

    # ---- the end -----------------------------------------------------------------------------------------------

    def _exited(self) -> None:
        self._server.reactor.run(self._reap)

    def _reap(self) -> None:
        status = self._program.poll_exit()
        if status is None:
            return
        self._loop.remove_reader(self._program.pidfd)
        self._status = status
        self._deadline = self._loop.time() + DRAIN_MAX_SECONDS
        if self._eof:
            self._drained()
        else:
            self._wait_quiet()

    def _wait_quiet(self) -> None:
        """The program has ended but somebody may hold its output open: a second without a byte is the end."""
        if self._quiet is not None:
            self._quiet.cancel()
        left = max(0.0, min(DRAIN_QUIET_SECONDS, self._deadline - self._loop.time()))
        self._quiet = self._loop.call_later(left, self._quiet_now)

    def _quiet_now(self) -> None:
        if not self._reading:
            # Not the program is quiet but we do not listen: the node, or our own screen, has to catch up first.
            self._deadline = self._loop.time() + DRAIN_MAX_SECONDS
            self._wait_quiet()
            return
        self._server.reactor.run(self._drained)

    def _drained(self) -> None:
        """Ends the session's output once the program has ended too; its last screen is drawn first."""
        if self._status is None or self._over:
            return
        self._over = True
        self._stop_watching()
        self._write_off()
        self._waiting.clear()
        self._program.close()
        screen = self._screen
        if screen is None or not self._session.out.end:
            self.finish(b"")
            return
        self._draw_at = 0.0  # who waits still gets a picture: the end is sent after it
        self._draw()
        self._server.draw(_LastScreen(self, screen))

    def finish(self, final: bytes) -> None:
        """Ends the session; `final` (zstd) repaints the last screen."""
        status = self._status
        assert status is not None
        self._screen = None
        now = self._server.now()
        self._server.machine.acknowledge_due(self._session, now, True)
        self._session.finish(status.code, status.signal, now, final)

    def _stop_watching(self) -> None:
        self._read_off()
        for timer in (self._idle, self._quiet, self._ending, self._resizing, self._draw_timer):
            if timer is not None:
                timer.cancel()
        self._idle = self._quiet = self._ending = self._resizing = self._draw_timer = None

    def close(self) -> None:
        """Ends the program, more firmly every few seconds, and lets go of it."""
        self._over = True
        self._stop_watching()
        self._screen = None
        self._asked.clear()
        self._asked_brief.clear()
        if self._program.pidfd < 0:
            return
        if self._status is None:
            self._loop.remove_reader(self._program.pidfd)
            _terminate(self._loop, self._program)
        else:
            self._write_off()
            self._program.close()


class _Drawing:
    """A picture with scroll-back: who asked for it, and the position and size that it shows once it has begun."""

    __slots__ = ("_copy", "_runner", "_screen", "asked", "data", "position", "size")

    def __init__(self, runner: ProgramRunner, screen: LazyScreen) -> None:
        self._runner = runner
        self._screen = screen
        self._copy: ScreenCopy | None = None
        self.asked: list[Asked] = []
        self.position = -1
        self.size = 0, 0
        self.data: list[bytes] = []

    def begin(self) -> bool:
        """Notes the position."""
        return self._runner.begin_drawing(self)

    def copy(self) -> None:
        """Copies the screen, or draws it right away if its engine cannot be copied."""
        self._copy = self._screen.copy()
        if self._copy is None:
            self._paint(self._screen)

    def copied(self) -> None:
        """Lets the program go on."""
        self._runner.copied()

    def paint(self) -> None:
        """Draws the copy."""
        if self._copy is not None:
            self._paint(self._copy)
            self._copy.close()

    def painted(self) -> None:
        """Sends it."""
        self._runner.drawn(self)

    def _paint(self, source: LazyScreen | ScreenCopy) -> None:
        self.data.append(compress(source.snapshot(True)))


class _LastScreen(_Drawing):
    """What repaints a screen for good, with as much scroll-back as is allowed to be kept."""

    __slots__ = ()

    def begin(self) -> bool:
        """Nothing is read any more."""
        return True

    def copied(self) -> None:
        """Nothing goes on."""

    def painted(self) -> None:
        """Ends the session."""
        self._runner.finish(self.data[0] if self.data else b"")

    def _paint(self, source: LazyScreen | ScreenCopy) -> None:
        data = compress(source.snapshot(True, final=True))
        self.data.append(data if len(data) <= limits.FINAL_MAX_BYTES else compress(source.snapshot(False, final=True)))


def _nothing() -> None:
    """What follows work that nobody waits for."""


def _terminate(loop: asyncio.AbstractEventLoop, program: Program) -> None:
    """Sends HUP, TERM, KILL, three seconds apart, until the program has ended, then closes its descriptors."""
    timer: asyncio.TimerHandle | None = None

    def again() -> None:
        nonlocal timer
        program.terminate()
        timer = loop.call_later(_ESCALATE_SECONDS, again)

    def ended() -> None:
        if program.poll_exit() is not None:
            loop.remove_reader(program.pidfd)
            if timer is not None:
                timer.cancel()
            program.close()

    loop.add_reader(program.pidfd, ended)
    again()


class ProgramStarter:
    """Starts runners for one pod: the default command, and how much a session may choose itself.

    `command` runs where a session names none; `cwd` is the directory where none is named.
    """

    def __init__(self, command: list[str], *, kind: Kind, cwd: str, env: Mapping[str, str], agent: str = "") -> None:
        self._command = command
        self._kind: Kind = kind
        self._cwd = cwd
        self._env = dict(env)
        self._agent = agent
        self._programs: list[Program] = []

    def __call__(self, server: PodServer, session: PodSession, request: messages.Open) -> ProgramRunner:
        """Starts the program of a new session; AgentError or UsageError when that cannot be done."""
        extra = {k: v for k, v in request.env.items() if k in _FORWARDED or k.startswith("LC_")}
        extra["STERNA_SESSION"] = request.name
        extra["STERNA_SESSION_UID"] = request.uid.hex()
        if self._agent:
            extra["STERNA_AGENT"] = self._agent
        env = program_environment(
            self._env, term=request.term[: limits.TERM_MAX_CHARS] or "xterm-256color", extra=extra
        )
        cwd = request.cwd or self._cwd
        program = Program.start(
            request.argv or self._command, kind=self._kind, cwd=cwd, env=env, cols=session.cols, rows=session.rows
        )
        self._programs = [known for known in self._programs if known.pidfd >= 0]
        self._programs.append(program)
        screen = LazyScreen(session.cols, session.rows) if self._kind == "pty" else None
        return ProgramRunner(server, session, program, screen)

    async def wait_ended(self) -> None:
        """Waits until every program has ended, after the server was closed."""
        while any(program.pidfd >= 0 for program in self._programs):  # noqa: ASYNC110  # once, at the very end
            await asyncio.sleep(_ENDED_POLL_SECONDS)


_FORWARDED = frozenset({"LANG", "LANGUAGE", "COLORTERM", "TZ"})
