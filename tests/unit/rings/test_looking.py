"""How long who waits looks before it sleeps."""

from __future__ import annotations

import pytest

from kbusd.rings.looking import Looking

US = 1_000
MS = 1_000_000


@pytest.fixture
def looking() -> Looking:
    return Looking(200 * US, 500 * US, (20, 320))


def _short_sleeps(looking: Looking, at: int, count: int = 8) -> None:
    for _ in range(count):
        looking.note_slept(at, at + 50 * US)


def test_it_looks_longer_while_sleeps_are_short_and_not_at_all_after_a_long_one(
    looking: Looking,
) -> None:
    assert looking.for_ns == 0
    looking.note_slept(0, 50 * US)
    assert looking.for_ns == 10 * US
    _short_sleeps(looking, MS)
    assert 200 * US <= looking.for_ns < 400 * US
    looking.note_slept(2 * MS, 2 * MS + 200 * US)
    assert looking.for_ns == 0


def test_who_gives_way_for_long_does_not_look_for_a_multiple_of_that(looking: Looking) -> None:
    _short_sleeps(looking, 0)
    looking.note_gave_way(1000 * MS, 1001 * MS)
    assert looking.for_ns == 0
    _short_sleeps(looking, 1020 * MS)
    assert looking.for_ns == 0
    _short_sleeps(looking, 1021 * MS)
    assert looking.for_ns > 0


def test_to_give_way_to_who_only_shares_the_core_is_no_reason_to_stop(looking: Looking) -> None:
    _short_sleeps(looking, 0)
    looking.note_gave_way(MS, MS + 400 * US)
    assert looking.for_ns > 0


def test_one_stall_of_the_machine_does_not_stop_it_for_a_second(looking: Looking) -> None:
    for stall in range(1, 20):  # one each 100 ms
        begin = stall * 100 * MS
        looking.note_gave_way(begin, begin + MS)
        assert looking.not_before == begin + MS + 20 * MS


def test_the_pause_doubles_while_somebody_computes(looking: Looking) -> None:
    pauses = []
    now = 1000 * MS
    for _ in range(7):
        looking.note_gave_way(now, now + 3 * MS)
        pauses.append((looking.not_before - now - 3 * MS) // (3 * MS))
        now = looking.not_before + 4 * MS
    assert pauses == [20, 40, 80, 160, 320, 320, 320]
