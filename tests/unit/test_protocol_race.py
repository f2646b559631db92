"""The race for a connection: quick where the network fails, patient where the node is busy."""

from __future__ import annotations

from sterna.protocol.race import Race
from sterna.units import MILLISECOND, SECOND


def attempts(race: Race, start: int, end: int, connected_after: int | None) -> list[int]:
    """When attempts begin between two times, if each is taken by the node's machine so much later (None: by nobody)."""
    found: list[int] = []
    answers: list[int] = []
    for now in range(start, end, 10 * MILLISECOND):
        while answers and answers[0] <= now:
            answers.pop(0)
            race.connected(now)
        if race.take(now):
            found.append(now)
            if connected_after == 0:
                race.connected(now)
            elif connected_after is not None:
                answers.append(now + connected_after)
    return found


def test_a_dead_network_is_asked_every_50_ms() -> None:
    race = Race(bytes)
    race.begin(0)
    assert len(attempts(race, 0, 5 * SECOND, None)) == 100


def test_a_node_that_takes_connections_but_does_not_answer_is_asked_ever_more_rarely() -> None:
    race = Race(bytes)
    race.begin(0)
    assert attempts(race, 0, 60 * SECOND, 0) == [t * SECOND for t in (0, 1, 3, 7, 15, 23, 31, 39, 47, 55)]


def test_the_answers_to_one_burst_count_once() -> None:
    race = Race(bytes)
    race.begin(0)
    begun = attempts(race, 0, 10 * SECOND, 120 * MILLISECOND)
    # Three are under way before the first one's answer; then rests of 1, 2 and 4 s, each after such a burst.
    assert len(begun) <= 12
    assert begun[:3] == [0, 50 * MILLISECOND, 100 * MILLISECOND]
    assert begun[3] >= SECOND


def test_the_next_race_begins_quickly_again() -> None:
    race = Race(bytes)
    race.begin(0)
    attempts(race, 0, 20 * SECOND, 0)
    race.end()
    race.begin(30 * SECOND)
    assert attempts(race, 30 * SECOND, 35 * SECOND, 0) == [30 * SECOND, 31 * SECOND, 33 * SECOND]


def test_a_refusal_ends_the_rest() -> None:
    race = Race(bytes)
    race.begin(0)
    assert race.take(0)
    race.connected(0)
    race.failed(0, refused=True)
    assert race.take(0)
