"""Status pages, clock: the small parts."""

from __future__ import annotations

import time

import pytest

from kbusd.rings.clock import Clock
from kbusd.rings.memfd import RingError
from kbusd.rings.status import StatusPage, StatusView


def test_a_peer_sees_what_i_publish() -> None:
    mine = StatusPage()
    slots = [mine.take_slot() for _ in range(5000)]
    view = StatusView(mine.fd)
    for slot in slots:
        mine.publish(slot, slot * 3)
    assert all(view.look(slot) == slot * 3 for slot in slots)
    assert not view.asleep()
    mine.sleep(True)
    assert view.asleep()
    mine.sleep(False)
    assert not view.asleep()


def test_a_slot_is_taken_once_and_begins_at_zero() -> None:
    mine = StatusPage()
    first, second = mine.take_slot(), mine.take_slot()
    mine.publish(first, 7)
    mine.free_slot(first)
    assert mine.take_slot() == first
    assert StatusView(mine.fd).look(first) == 0
    assert second != first
    for slot in (2, -1, 100_000):
        with pytest.raises(ValueError, match="not taken"):
            mine.free_slot(slot)
        with pytest.raises(ValueError, match="not taken"):
            mine.publish(slot, 1)
    assert mine.statistics().taken == 2


def test_slots_end() -> None:
    mine = StatusPage()
    with pytest.raises(RingError, match="are taken"):
        for _ in range(100_000):
            mine.take_slot()


def test_a_slot_out_of_range_is_no_address() -> None:
    mine = StatusPage()
    view = StatusView(mine.fd)
    assert [view.look(slot) for slot in (-1, 8192, 2**31 - 1)] == [0, 0, 0]


def test_stamps_rise_and_follow_time_and_cause() -> None:
    clock, other = Clock(), Clock()
    stamps = [clock.tick() for _ in range(10_000)]
    assert stamps == sorted(set(stamps))
    assert abs(stamps[-1] - time.monotonic_ns()) < 1_000_000_000
    ahead = time.monotonic_ns() + 500_000_000
    assert other.see(ahead)
    assert other.tick() == ahead + 1
    assert other.tick() == ahead + 2


def test_a_stamp_from_the_future_is_a_lie_and_changes_nothing() -> None:
    clock = Clock()
    before = clock.tick()
    for stamp in (time.monotonic_ns() + 3_000_000_000, 2**63, 2**64 - 1):
        assert not clock.see(stamp)
    assert before < clock.tick() <= time.monotonic_ns()
