"""A journal against a simple model: any order of calls, restarts included, near 2**31 and 2**32 too."""

from __future__ import annotations

import shutil
import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sterna.errors import StorageError
from sterna.journal import Journal, JournalFullError, Log, LostBytesError
from sterna.journal.format import ARENA_MIN_BYTES
from sterna.journal.interface import keep_floor
from sterna.limits import CHUNK_MAX_BYTES
from tests.journal_stream import check_right, stream

NUMBERS = st.integers(0, 3)
STARTS = st.sampled_from((0, 1, 2**31 - 4_097, 2**31 - 1, 2**32 - 65_536, 2**32 - 1, 2**32))
RINGS = st.sampled_from((1, 4_096, 50_000, 200_000))
SPILLS = st.sampled_from((0, 1, 100_000))
SIZES = st.one_of(
    st.integers(0, 40), st.sampled_from((4_095, 4_096, 4_097, 16_384, 65_535, 65_536, 65_537)), st.integers(0, 150_000)
)


class Model:
    """What a log must hold: its bytes follow from key and position, so the bounds are enough."""

    def __init__(self, key: int, start: int, ring: int, spill: int) -> None:
        self.key = key
        self.start = start
        self.end = start
        self.ring = ring
        self.spill = spill
        self.keep: int | None = None
        # The highest position that may have been forgotten: grows with every append, also with one that failed.
        self.floor = start
        self.tail = start

    def forget(self, end: int) -> None:
        self.floor = max(self.floor, keep_floor(end, self.ring, self.spill, self.keep))


class JournalMachine(RuleBasedStateMachine):
    """Two arenas and a half are the quota, so that logs of some 100 KB fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.path = tempfile.mkdtemp(prefix="journal-")
        self.models: dict[int, Model] = {}
        self.keys = 0
        self.journal = self.start()

    def start(self) -> Journal:
        return Journal(self.path, quota_bytes=ARENA_MIN_BYTES * 5 // 2, arena_bytes=ARENA_MIN_BYTES)

    def teardown(self) -> None:
        try:
            for number in self.models:
                self.journal.remove(number)
            assert (self.journal.used_bytes, self.journal.arenas) == (0, 1)
        finally:
            self.journal.close()
            shutil.rmtree(self.path)

    def log(self, number: int) -> tuple[Log, Model] | None:
        model = self.models.get(number)
        if model is None:
            try:
                self.journal.open(number)
            except StorageError:
                return None
            raise AssertionError(f"log {number} should not exist")
        log = self.journal.open(number, ring_bytes=model.ring, spill_bytes=model.spill)
        assert log.damaged == []
        assert log.end == model.end
        return log, model

    @initialize(starts=st.tuples(STARTS, STARTS, STARTS), ring=RINGS, spill=SPILLS)
    def begin(self, starts: tuple[int, int, int], ring: int, spill: int) -> None:
        for number, start in enumerate(starts):
            self.create(number, start, ring, spill)

    @rule(number=NUMBERS, start=STARTS, ring=RINGS, spill=SPILLS)
    def create(self, number: int, start: int, ring: int, spill: int) -> None:
        try:
            log = self.journal.create(number, ring_bytes=ring, spill_bytes=spill, start=start)
        except JournalFullError:
            assert number not in self.models
            assert self.journal.used_bytes > ARENA_MIN_BYTES
        except StorageError:
            assert number in self.models
        else:
            assert number not in self.models
            assert (log.tail, log.end) == (start, start)
            self.keys += 1
            self.models[number] = Model(self.keys, start, ring, spill)

    @rule(number=NUMBERS, size=SIZES, kind=st.sampled_from((bytes, bytearray, memoryview)))
    def append(self, number: int, size: int, kind: type[bytes] | type[bytearray] | type[memoryview]) -> None:
        if found := self.log(number):
            log, model = found
            model.forget(model.end + size)
            try:
                log.append(kind(stream(model.key, model.end, size)))
            except JournalFullError:
                assert log.end == model.end
                assert self.journal.used_bytes > ARENA_MIN_BYTES // 2
            else:
                model.end += size
                assert log.end == model.end

    @rule(number=NUMBERS, back=st.integers(-10, 400_000), limit=st.integers(0, 100_000))
    def read(self, number: int, back: int, limit: int) -> None:
        if found := self.log(number):
            log, model = found
            position = model.end - back
            try:
                data = log.read(position, limit)
            except LostBytesError as error:
                named = (error.start, error.end)
                assert named == (position, log.tail)
            except ValueError:
                assert position > model.end or position < 0
            else:
                assert data == stream(model.key, position, len(data))
                assert len(data) <= limit
                assert bool(data) == (limit > 0 and position < model.end)

    @rule(number=NUMBERS, back=st.one_of(st.none(), st.integers(0, 300_000)))
    def keep_from(self, number: int, back: int | None) -> None:
        if found := self.log(number):
            log, model = found
            model.keep = None if back is None else max(0, model.end - back)
            log.keep_from(model.keep)
            model.forget(model.end)

    @rule(number=NUMBERS)
    def pack(self, number: int) -> None:
        if found := self.log(number):
            before = found[0].stored_bytes
            found[0].pack()
            assert found[0].stored_bytes <= before

    @rule(number=NUMBERS)
    def release(self, number: int) -> None:
        if found := self.log(number):
            found[0].release()
            found[1].keep = None

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        self.journal.remove(number)
        self.models.pop(number, None)

    @rule()
    def restart(self) -> None:
        used = self.journal.used_bytes
        self.journal.close()
        self.journal = self.start()
        assert self.journal.used_bytes == used
        for model in self.models.values():
            model.keep = None

    @invariant()
    def logs_are_those_of_the_model(self) -> None:
        assert sorted(self.journal.logs()) == sorted(self.models)
        assert self.journal.reserved_bytes <= self.journal.quota_bytes
        assert self.journal.faults.total() == 0

    @rule()
    def check_everything(self) -> None:
        stored = 0
        for number in self.models:
            found = self.log(number)
            assert found
            log, model = found
            assert model.tail <= log.tail <= max(model.floor, model.start)
            model.tail = log.tail
            held = log.end - log.tail
            assert held <= model.ring + model.spill + 2 * CHUNK_MAX_BYTES
            assert check_right(log, model.key) == []
            stored += log.stored_bytes
        assert stored == self.journal.used_bytes


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=150, stateful_step_count=50)
