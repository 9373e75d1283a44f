"""Shares of a client's queue: how much a flood gets, what is left to others, and the bookkeeping."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kbusd.workers.shares import Shares

LIMIT = 1_000_000
STEP = 100


def flood(shares: Shares, uid: int, id: int, step: int = STEP) -> int:
    """Send messages of `step` until it is refused; how much was taken."""
    for number in itertools.count():
        if shares.over(uid, id):
            return number * step
        shares.charge(uid, id, step, 0)
    raise AssertionError


def near(got: int, expected: float) -> bool:
    return abs(got - expected) <= STEP + 1


def test_a_single_sender_gets_a_quarter() -> None:
    """Half of all for its user, and half of that for one connection."""
    assert near(flood(Shares(LIMIT), 1000, 1), LIMIT / 4)


def test_the_connections_of_one_user_share_half() -> None:
    shares = Shares(LIMIT)
    got = [flood(shares, 1000, id) for id in range(1, 200)]
    for n, amount in enumerate(got[:50], 1):
        assert near(amount, LIMIT / 2 / (n * (n + 1)))
    assert LIMIT * 0.48 < sum(got) <= LIMIT / 2 + STEP


def test_a_user_with_many_connections_leaves_room_to_others() -> None:
    shares = Shares(LIMIT)
    for id in range(1, 257):
        flood(shares, 1000, id)
    assert flood(shares, 1001, 300) > LIMIT / 13
    assert flood(shares, 1002, 301) > LIMIT / 40


def test_users_that_flood_at_once_get_the_same() -> None:
    shares = Shares(LIMIT)
    got = dict.fromkeys(range(4), 0)
    while any(not shares.over(uid, uid + 1) for uid in got):
        for uid in got:
            if not shares.over(uid, uid + 1):
                shares.charge(uid, uid + 1, STEP, 0)
                got[uid] += STEP
    assert max(got.values()) - min(got.values()) <= STEP


def test_one_message_of_any_size_fits() -> None:
    shares = Shares(LIMIT)
    flood(shares, 1000, 1)
    assert not shares.over(1001, 2)
    shares.charge(1001, 2, 50 * LIMIT, 0)
    assert shares.over(1001, 2)
    assert shares.over(1001, 3)


def test_what_the_client_asked_for_leaves_less_to_senders() -> None:
    shares = Shares(LIMIT)
    shares.charge_own(LIMIT // 2, 1)
    assert near(flood(shares, 1000, 1), LIMIT / 8)
    shares.charge_own(LIMIT, 2)
    assert shares.over(1000, 1)


def test_a_refusal_is_told_once_until_all_is_read() -> None:
    shares = Shares(LIMIT)
    shares.charge(1, 7, 10, 10)
    assert [shares.first_refusal(7), shares.first_refusal(7)] == [True, False]
    shares.release(10)
    assert shares.first_refusal(7)


@given(
    st.lists(
        st.tuples(st.integers(-1, 3), st.integers(1, 5), st.integers(1, 70_000), st.booleans()),
        max_size=60,
    )
)
def test_everything_charged_is_released(messages: list[tuple[int, int, int, bool]]) -> None:
    """At each moment no less than what waits is charged, and at the end nothing."""
    shares = Shares(LIMIT)
    end = 0
    waiting: list[tuple[int, bool, int]] = []
    for uid, id, amount, own in messages:
        end += amount
        waiting.append((end, own, amount))
        if own:
            shares.charge_own(amount, end)
        else:
            shares.charge(uid, 10 * (uid + 2) + id, amount, end)
        sent = end - amount // 2 if id == 5 else 0
        if sent:
            shares.release(sent)
            waiting = [each for each in waiting if each[0] > sent]
        now = shares.statistics()
        assert now.own >= sum(amount for _, own, amount in waiting if own)
        assert now.charged >= sum(amount for _, own, amount in waiting if not own)
        assert now.own + now.charged <= sum(each[2] for each in waiting) + 2 * 70_000
    shares.release(end)
    assert set(shares.statistics().__struct_fields__) == {"users", "senders", "charged", "own"}
    now = shares.statistics()
    assert (now.users, now.senders, now.charged, now.own) == (0, 0, 0, 0)


def test_a_flood_of_small_messages_is_kept_in_few_entries() -> None:
    shares = Shares(1 << 40)
    for n in range(20_000):
        shares.charge(1, 1, 100, 100 * n)
    assert len(shares._queue) <= 2_000_000 // 65536 + 1
