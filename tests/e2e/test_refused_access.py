"""Who may not: tokens, tickets, signatures and attachments of others, while another session goes on unharmed."""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sterna import limits
from sterna.errors import Code
from sterna.protocol import messages
from sterna.protocol.frame import Type
from sterna.protocol.messages import Accept, Close, Error, Resize, Resumed, Signal, Signed
from sterna.trust import base64url
from sterna.trust.device import DeviceKey, next_counter
from sterna.trust.tokens import TokenKey
from tests.e2e.raw_client import Raw, Site, new_device, unharmed
from tests.e2e.rig import Rig

pytestmark = pytest.mark.xdist_group("refused-access")

TRIES_PER_ADDRESS = 18
ADDRESSES = 12
ATTEMPTS = 3


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        yield Site(rig)


@pytest.fixture
def source() -> str:
    """An address of this machine of its own, so that the failures of one test do not slow another down."""
    return f"127.{secrets.randbelow(250) + 2}.{secrets.randbelow(256)}.{secrets.randbelow(250) + 2}"


def refused(answer: object) -> tuple[int, str]:
    """The code and sentence of a refusal."""
    assert isinstance(answer, Error), answer
    return answer.code, answer.message


def resume(site: Site, device: DeviceKey, accept: Accept, attachment: bytes, source: str, **changes: Any) -> object:
    """A RESUME on a connection of its own."""
    with site.client(device=device, source=source) as raw:
        return raw.resume(1, accept, attachment, **changes)


class Victim:
    """An attached client with a session, a known attachment id, and 5 bytes echoed."""

    def __init__(self, site: Site, **changes: Any) -> None:
        self.site = site
        self.attachment = os.urandom(16)
        self.raw = site.client()
        self.accept = self.raw.connect(attachment=self.attachment, **changes)
        self.position = 0
        self.check()

    def check(self) -> None:
        """It is still attached, on the same connection, and its bytes come once and in order."""
        data = b"%04d " % (self.position % 9999)
        assert self.raw.echo(data, self.position) == data
        self.position += len(data)

    def close(self) -> None:
        self.raw.close()


@pytest.fixture
def victim(site: Site) -> Iterator[Victim]:
    found = Victim(site)
    yield found
    found.close()


# ---- tokens ----------------------------------------------------------------------------------------------------


def forged_token(site: Site, tmp_path: Path) -> str:
    """A token as the node would sign it, signed by another key."""
    directory = tmp_path / "other"
    directory.mkdir(mode=0o700)
    return TokenKey.load(os.fspath(directory)).issue("local", ("*",), ("drive",), now_s=int(time.time()))


def altered_token(site: Site) -> str:
    """A genuine token of tenant `other` whose tenant was changed to `local`."""
    _, payload, signature = site.issue("other").split(".")
    claims = msgspec.msgpack.decode(base64url.decode(payload, 4096) or b"")
    claims[0] = "local"
    return f"st1.{base64url.encode(msgspec.msgpack.encode(claims))}.{signature}"


def test_wrong_expired_and_foreign_tokens(site: Site, source: str, tmp_path: Path) -> None:
    other = site.issue("other")
    wishes: list[tuple[str, dict[str, Any], Code]] = [
        ("", {}, Code.DENIED),
        ("guess", {}, Code.DENIED),
        ("lt1." + "A" * 43, {}, Code.DENIED),
        ("A" * 43, {}, Code.DENIED),
        ("x" * (limits.TOKEN_MAX_BYTES + 1), {}, Code.TOO_LARGE),
        (site.token[:-1], {}, Code.DENIED),
        (site.token + "\n", {}, Code.DENIED),
        (other[:-3] + ("B" if other[-3] == "A" else "A") + other[-2:], {}, Code.DENIED),
        (forged_token(site, tmp_path), {}, Code.DENIED),
        (altered_token(site), {}, Code.DENIED),
        (site.issue("local", ttl=-5), {}, Code.EXPIRED),
        (other, {"tenant": "local"}, Code.DENIED),
        (other, {}, Code.NO_AGENT),
        (site.issue("local", "other*"), {}, Code.DENIED),
        (site.issue("local", modes=("watch",)), {}, Code.DENIED),
    ]
    with unharmed(site):
        for token, changes, code in wishes:
            with site.client(credential=token, source=source) as raw:
                found, message = refused(raw.ask(**changes))
                assert found == code, (token[:20], message)
                assert token[:12] not in message or not token
        with site.client(credential=site.issue("local", ttl=60), source=source) as raw:
            raw.connect()  # the expired one's twin


def test_a_connect_of_another_node_or_key_is_denied(site: Site, source: str) -> None:
    with unharmed(site):
        for broken in ("node", "context", "key", "signature", "body"):
            with site.client(source=source) as raw:
                body = raw.connect_body(
                    node=os.urandom(32) if broken == "node" else site.node_id,
                    context=messages.CONTEXT_RESUME if broken == "context" else messages.CONTEXT_CONNECT,
                    key=new_device().public if broken == "key" else raw.device.public,
                )
                packed = messages.pack(body)
                signature = raw.device.sign(messages.CONTEXT_CONNECT, site.node_id, packed)
                if broken == "signature":
                    signature = bytes(64)
                if broken == "body":
                    packed = packed.replace(b"echo", b"evil")
                raw.say(Type.CONNECT, 1, Signed(packed, signature))
                assert refused(raw.answer(1))[0] == Code.DENIED, broken
                assert raw.ended()


def test_another_tenant_sees_and_touches_nothing(site: Site, victim: Victim, source: str) -> None:
    accept = victim.accept
    with unharmed(site), site.client(credential=site.issue("other"), source=source) as raw:
        raw.connect(want="call")
        assert raw.call("list") == {"sessions": [], "agents": [], "next": 0}
        unknown = refused(raw.ask(handle=2, want="join", uid=os.urandom(16)))
        assert refused(raw.ask(handle=3, want="join", uid=accept.uid)) == unknown
        assert refused(raw.ask(handle=4, want="join", name=accept.name)) == unknown
        assert refused(raw.ask(handle=5, want="named", name=accept.name))[0] == Code.NO_AGENT
        for method in ("info", "close", "displace", "share"):
            params = {"session": accept.uid.hex()}
            error = raw.call(method, **params)
            assert isinstance(error, Error), method
            assert error.code == Code.NOT_FOUND, method
        assert raw.call("rename", session=accept.name, name="mine").code == Code.NOT_FOUND
        assert raw.call("revoke", device=victim.raw.device.id.hex()).code == Code.NOT_FOUND
        assert raw.call("token", tenant="local").code == Code.DENIED
        assert raw.call("drain").code == Code.DENIED
        assert raw.call("devices")["devices"][0]["self"]
        victim.check()


# ---- stolen names ----------------------------------------------------------------------------------------------


def test_a_stolen_attachment_opens_nothing(site: Site, victim: Victim, source: str) -> None:
    """Somebody who knows uid, attachment and device id, of another tenant or of the same one, changes nothing."""
    accept, attachment = victim.accept, victim.attachment
    with unharmed(site):
        thief = new_device()
        for tenant in ("other", "local"):
            with site.client(credential=site.issue(tenant), device=thief, source=source) as raw:
                raw.connect(want="call")
                denied = refused(raw.resume(2, accept, os.urandom(16)))
                assert denied[0] == Code.DENIED
                assert refused(raw.resume(3, accept, attachment)) == denied
                assert refused(raw.resume(4, accept, attachment, device=bytes(victim.raw.device.id))) == denied
                victim.check()
        with site.client(device=thief, source=source) as raw:
            taken = raw.ask(want="join", uid=accept.uid, attachment=attachment)
            assert refused(taken)[0] == Code.EXISTS
        victim.check()


def test_a_repeated_request_does_not_take_another_attachment(site: Site, victim: Victim, source: str) -> None:
    """A device of the tenant joins honestly, then repeats that request under the victim's attachment id."""
    accept, request = victim.accept, os.urandom(16)
    with unharmed(site), site.client(source=source) as raw:
        raw.connect(want="join", uid=accept.uid, request=request)
        again = raw.ask(handle=2, want="join", uid=accept.uid, request=request, attachment=victim.attachment)
        assert refused(again)[0] == Code.BAD_REQUEST
        victim.check()
    victim.check()


# ---- RESUME ----------------------------------------------------------------------------------------------------


def test_forged_resumes(site: Site, victim: Victim, source: str) -> None:
    raw, accept, attachment = victim.raw, victim.accept, victim.attachment
    with unharmed(site):
        denied = refused(resume(site, raw.device, accept, os.urandom(16), source))
        for changes in (
            {"uid": os.urandom(16)}, {"device": os.urandom(32)}, {"node": os.urandom(32)}, {"race": b"short"},
            {"context": messages.CONTEXT_CONNECT}, {"attachment": b"x"}, {"attachment": b""},
        ):  # fmt: skip
            with site.client(device=raw.device, source=source) as forger:
                body = msgspec.structs.replace(forger.resume_body(accept, attachment), **changes)
                packed = messages.pack(body)
                signature = raw.device.sign(messages.CONTEXT_RESUME, site.node_id, packed)
                forger.say(Type.RESUME, 1, Signed(packed, signature))
                assert refused(forger.answer(1)) == denied, changes
        with site.client(device=raw.device, source=source) as forger:
            genuine = messages.unpack(Signed, forger.signed(forger.resume_body(accept, attachment)))
            changed = genuine.body.replace(accept.uid, os.urandom(16))
            forger.say(Type.RESUME, 1, Signed(changed, genuine.sig))
            assert refused(forger.answer(1)) == denied
        with site.client(source=source) as forger:
            body = forger.resume_body(accept, attachment, device=bytes(raw.device.id))
            forger.send(Type.RESUME, 1, 0, forger.signed(body))
            assert refused(forger.answer(1)) == denied, "all of it is right but the key that signed it"
        assert refused(resume(site, new_device(), accept, attachment, source)) == denied
        victim.check()


def test_a_replayed_resume_changes_nothing_even_after_kill_9(source: str) -> None:
    """The bytes of a RESUME that was answered, sent again: at once, after a later one, after the node's death."""
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        rig.start_node()
        site = Site(rig)
        victim = Victim(site)
        accept, attachment, device = victim.accept, victim.attachment, victim.raw.device
        recorded = victim.raw.signed(victim.raw.resume_body(accept, attachment, output=victim.position))

        def replay() -> tuple[Code, int | None]:
            with site.client(source=source) as thief:
                thief.send(Type.RESUME, 1, 0, recorded)
                answer = thief.answer(1)
                assert isinstance(answer, Error), answer
                return Code(answer.code), answer.value

        victim.raw.send(Type.RESUME, 2, 0, recorded)
        assert isinstance(victim.raw.answer(2), Resumed)
        assert replay() == (Code.SUPERSEDED, None)
        later = time.time_ns() + 5
        assert isinstance(victim.raw.resume(3, accept, attachment, counter=later, output=victim.position), Resumed)
        assert replay() == (Code.STALE, later)
        victim.raw.send(Type.DATA, 3, victim.position, b"there")
        assert victim.raw.data(5, handle=3) == b"there"
        rig.restart_node(kill=True)
        assert replay() == (Code.STALE, later)
        # Its owner comes back with the next counter, which the replay did not use up.
        with site.client(device=device) as owner:
            answer = owner.resume(1, accept, attachment, counter=later + 1, output=victim.position + 5)
            assert isinstance(answer, Resumed), answer
            assert answer.input == victim.position + 5
            assert owner.echo(b"again", victim.position + 5) == b"again"
        victim.close()


def test_a_restored_backup_recovers_through_stale(site: Site, victim: Victim, tmp_path: Path) -> None:
    """A device whose counter file is older than what the node saw learns the number, and is back."""
    directory = tmp_path / "device"
    directory.mkdir(mode=0o700)
    ahead = time.time_ns() + 3600 * 10**9
    accept, attachment = victim.accept, victim.attachment
    raw = victim.raw
    assert isinstance(raw.resume(2, accept, attachment, counter=ahead, output=victim.position), Resumed)
    counter = next_counter(os.fspath(directory), time.time_ns())
    with unharmed(site), site.client(device=raw.device) as restored:
        answer = restored.resume(1, accept, attachment, counter=counter, output=victim.position)
        assert isinstance(answer, Error)
        assert (answer.code, answer.value) == (Code.STALE, ahead)
        # Nothing was displaced by that; the same connection goes on with a number above it.
        raw.send(Type.DATA, 2, victim.position, b"there")
        assert raw.data(5, handle=2) == b"there"
        after = restored.resume(2, accept, attachment, counter=ahead + 1, output=victim.position + 5)
        assert isinstance(after, Resumed)
        assert restored.echo(b"back", victim.position + 5, handle=2) == b"back"


def test_unknown_session_wrong_key_and_wrong_tenant_look_the_same(site: Site, victim: Victim) -> None:
    """Same sentence, same time, over 216 interleaved tries each."""

    def measure(attempt: int, times: Times, answers: Answers) -> None:
        for address in range(ADDRESSES):
            source = f"127.77.{attempt}.{address + 1}"
            with site.client(source=source) as near, site.client(source=source, credential=site.issue("other")) as far:
                near.connect(want="call")
                far.connect(want="call")
                for handle in range(2, 2 + TRIES_PER_ADDRESS):
                    for name, raw, attachment in (
                        ("unknown", near, os.urandom(16)),
                        ("wrong key", near, victim.attachment),
                        ("wrong tenant", far, victim.attachment),
                    ):
                        on = handle * 2 + (name != "unknown")
                        payload = raw.signed(raw.resume_body(victim.accept, attachment))
                        times[name].append(timed(raw, Type.RESUME, on, payload, answers))

    check_same(measure)


def test_joining_an_unknown_and_a_foreign_session_looks_the_same(site: Site, victim: Victim) -> None:
    def measure(attempt: int, times: Times, answers: Answers) -> None:
        with site.client(credential=site.issue("other")) as raw:
            raw.connect(want="call")
            for handle in range(2, 2 + TRIES_PER_ADDRESS * ADDRESSES * 2):
                name, uid = ("unknown", os.urandom(16)) if handle % 2 else ("foreign", victim.accept.uid)
                payload = raw.signed(raw.connect_body(want="join", uid=uid))
                times[name].append(timed(raw, Type.CONNECT, handle, payload, answers))

    check_same(measure)


Times = defaultdict[str, list[float]]
Answers = set[tuple[int, str]]


def timed(raw: Raw, kind: int, handle: int, payload: bytes, answers: Answers) -> float:
    """How long a refusal takes."""
    start = time.perf_counter()
    raw.send(kind, handle, 0, payload)
    answer = raw.answer(handle)
    seconds = time.perf_counter() - start
    answers.add(refused(answer))
    return seconds


def check_same(measure: Callable[[int, Times, Answers], None]) -> None:
    """All answers are one; in the best of three measurements the slowest kind takes less than twice the fastest.

    A busy machine disturbs one measurement; a node that looks something up for one kind only shows in all of them.
    """
    answers: Answers = set()
    ratios: list[float] = []
    for attempt in range(ATTEMPTS):
        times: Times = defaultdict(list)
        measure(attempt, times, answers)
        medians = {name: statistics.median(found) * 1e6 for name, found in times.items()}
        print({name: f"{median:.0f} µs" for name, median in medians.items()})
        assert len(answers) == 1, answers
        assert min(map(len, times.values())) >= 200
        ratios.append(max(medians.values()) / min(medians.values()))
        if ratios[-1] < 2:
            return
    raise AssertionError(f"one kind of refusal takes longer than another: {ratios}")


def test_failures_are_limited_per_address(site: Site, victim: Victim) -> None:
    with unharmed(site):
        answers = []
        for _ in range(limits.FAILURES_PER_MINUTE_MAX + 3):
            with site.client(credential="guess", source="127.88.0.1") as raw:
                answers.append(raw.ask())
        codes = [refused(answer)[0] for answer in answers]
        assert codes == [Code.DENIED] * limits.FAILURES_PER_MINUTE_MAX + [Code.RATE_LIMITED] * 3
        last = answers[-1]
        assert isinstance(last, Error)
        assert last.retry_after is not None
        # Who is genuine is let in from there all the same, new or back again; who fails is not told why.
        attachment = os.urandom(16)
        with site.client(source="127.88.0.1") as raw:
            accept = raw.connect(attachment=attachment)
            device = raw.device
        assert isinstance(resume(site, device, accept, attachment, "127.88.0.1"), Resumed)
        assert refused(resume(site, new_device(), accept, attachment, "127.88.0.1"))[0] == Code.RATE_LIMITED
        assert refused(resume(site, device, accept, os.urandom(16), "127.88.0.1"))[0] == Code.RATE_LIMITED
        with site.client(credential=site.issue("local", ttl=-5), source="127.88.0.1") as raw:
            assert refused(raw.ask())[0] == Code.RATE_LIMITED
        with site.client(source="127.88.0.2") as raw:
            raw.connect()
        victim.check()


# ---- revoked ---------------------------------------------------------------------------------------------------


def test_a_revoked_device_is_out(site: Site, source: str) -> None:
    victim = Victim(site)
    raw, accept, attachment = victim.raw, victim.accept, victim.attachment
    with unharmed(site), site.client() as owner:
        owner.connect(want="call")
        with site.client(device=raw.device) as caller:
            caller.connect(want="call")
            assert owner.call("revoke", device=raw.device.id.hex())
            assert raw.code(1) == Code.REVOKED
            assert caller.code() == Code.REVOKED  # without having asked for anything
            assert caller.ended()
        assert refused(resume(site, raw.device, accept, attachment, source))[0] == Code.REVOKED
        with site.client(device=raw.device, source=source) as again:
            assert refused(again.ask())[0] == Code.REVOKED
        with contextlib.suppress(OSError):  # its connection has ended
            raw.send(Type.DATA, 1, victim.position, b"late")
        assert raw.ended()
        other = owner.connect(handle=2, want="join", uid=accept.uid, output=0)
        assert owner.data(victim.position, handle=2) == b"0000 "
        assert other.head == victim.position
    raw.close()


# ---- watching --------------------------------------------------------------------------------------------------


def test_a_watcher_only_watches(site: Site, victim: Victim) -> None:
    accept = victim.accept
    with unharmed(site):
        for kind, payload in (
            (Type.DATA, b"typed"),
            (Type.SIGNAL, messages.pack(Signal("KILL"))),
            (Type.EOF, b""),
            (Type.CLOSE, messages.pack(Close())),
        ):
            with site.client() as raw:
                raw.connect(want="join", uid=accept.uid, mode="watch")
                raw.send(kind, 1, 0, payload)
                assert raw.code(1) == Code.READ_ONLY, kind
                victim.check()
                # That ended its attachment: nothing more comes.
                assert raw.alive()
                assert not [frame for frame in raw._frames if frame[0] == Type.DATA]
        victim.check()


def test_a_watcher_does_not_resize(site: Site) -> None:
    site.rig.start_pod("tty", "sh", "-c", "while :; do stty size; sleep 0.05; done")
    with site.client() as driver, site.client() as watcher:
        accept = driver.connect(agent="tty", exact=True, cols=90, rows=30)
        seen = b""
        while b"30 90" not in seen:
            seen += driver.data(1)
        watcher.connect(want="join", uid=accept.uid, mode="watch", exact=False, cols=40, rows=10, term="xterm")
        watcher.say(Type.RESIZE, 1, Resize(41, 11))
        assert watcher.alive()
        # The node dealt with it before it answered. Nobody types: whoever did would give the program its own size.
        seen = b""
        while seen.count(b"\n") < 6:
            seen += driver.data(1)
        assert set(seen.split(b"\r\n")[1:-1]) == {b"30 90"}
        # Control: the one who drives is heard, so what the program prints is its terminal's size now.
        driver.say(Type.RESIZE, 1, Resize(91, 31))
        while b"31 91" not in seen:
            seen += driver.data(1)


# ---- tickets ---------------------------------------------------------------------------------------------------


def share(site: Site, name: str, **params: Any) -> str:
    with site.client() as owner:
        owner.connect(want="call")
        found = owner.call("share", session=name, **params)
        assert isinstance(found, dict), found
        return str(found["ticket"])


def test_a_ticket_is_for_one_device_and_one_session(site: Site, victim: Victim, source: str) -> None:
    name = victim.accept.name
    other = Victim(site)
    ticket = share(site, name, ttl=60)
    with unharmed(site), site.client(credential=ticket, source=source) as guest:
        found = guest.connect(want="join")
        assert found.uid == victim.accept.uid
        # The same device again, yes; another one, no.
        again = guest.connect(handle=2, want="join")
        assert again.uid == victim.accept.uid
        with site.client(credential=ticket, source=source) as second:
            assert refused(second.ask(want="join"))[0] == Code.DENIED
        # Another session of the tenant, by uid or through CALL, no.
        assert refused(guest.ask(handle=3, want="join", uid=other.accept.uid))[0] == Code.NOT_FOUND
        assert [session["name"] for session in guest.call("list")["sessions"]] == [name]
        for method, params in (
            ("info", {"session": other.accept.name}), ("close", {"session": other.accept.name}),
            ("rename", {"session": other.accept.name, "name": "mine"}),
        ):  # fmt: skip
            assert guest.call(method, **params).code == Code.NOT_FOUND, method
        for method, params in (
            ("share", {"session": name}), ("devices", {}), ("revoke", {"device": "0" * 16}), ("token", {}),
            ("drain", {}),
        ):  # fmt: skip
            assert guest.call(method, **params).code == Code.DENIED, method
        other.check()
        victim.check()
    other.close()


def test_a_ticket_to_watch_does_not_drive(site: Site, victim: Victim, source: str) -> None:
    ticket, device = share(site, victim.accept.name, mode="watch", ttl=60), new_device()
    with unharmed(site), site.client(credential=ticket, device=device, source=source) as guest:
        assert refused(guest.ask(want="join", mode="drive"))[0] == Code.NOT_FOUND
    # It was bound to the first device that came, although that one asked for too much.
    with site.client(credential=ticket, source=source) as guest:
        assert refused(guest.ask(want="join", mode="watch"))[0] == Code.DENIED
    with site.client(credential=ticket, device=device, source=source) as guest:
        assert guest.connect(want="join", mode="watch").uid == victim.accept.uid
    victim.check()


def test_an_expired_ticket(site: Site, victim: Victim, source: str) -> None:
    ticket, longer = share(site, victim.accept.name, ttl=1), share(site, victim.accept.name, ttl=60)
    time.sleep(1.1)
    with unharmed(site), site.client(credential=ticket, source=source) as guest:
        assert refused(guest.ask(want="join"))[0] == Code.DENIED
    with site.client(credential=longer, source=source) as guest:
        guest.connect(want="join")


def test_a_secret_of_a_token_file_may_look_like_a_ticket(source: str) -> None:
    """What `secrets.token_urlsafe(32)` gives has the form of a ticket, and is the usual way to make a secret."""
    secret = secrets.token_urlsafe(32)
    with Rig() as rig:
        rig.start_pod("echo", "cat", kind="stream")
        path = rig.directory / "tokens"
        path.touch(0o600)
        path.write_text(f"local {secret} echo drive\n")
        node_without_up(rig, "--token-file", os.fspath(path))
        site = Site(rig)
        with site.client(credential=secret) as raw:
            raw.connect()
            assert raw.echo(b"in", 0) == b"in"
        with site.client(credential=secrets.token_urlsafe(32), source=source) as raw:
            assert refused(raw.ask())[0] == Code.DENIED


def node_without_up(rig: Rig, *options: str) -> None:
    """Starts `sterna node`, which has more options than `sterna up`."""
    from tests.e2e.rig import Daemon, wait_for

    state = os.fspath(rig.state / "node")
    words = rig.words("node", "--port", str(rig.port), "--state", state, "--sockets", os.fspath(rig.sockets), *options)
    node = rig.node = Daemon(words, rig.env, rig.directory / "node.log")
    wait_for(lambda: "node started" in node.output() or rig._check(node), name="the node")
