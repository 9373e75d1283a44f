"""What is on its way to who has a name now: when it is all there, or nothing more will come."""

from __future__ import annotations

import pytest

from kbusd.workers.kdbus_coming import NOTE, Coming, Moved, read, write

SOURCE, A, B = 1, 2, 3


@pytest.fixture
def ends() -> list[bool]:
    return []


@pytest.fixture
def coming(ends: list[bool]) -> Coming:
    return Coming(SOURCE, 0, lambda: ends.append(True))


def test_it_has_come_when_each_sender_has_sent_what_was_announced(
    coming: Coming, ends: list[bool]
) -> None:
    waits = [coming.wait(), coming.wait()]
    coming.came(A)
    assert not ends  # nobody has said yet how much there is
    coming.told({A: 2, B: 1})
    for sender in (B, B):
        coming.came(sender)
        assert not any(wait.settled for wait in waits)  # one's do not count for another's
    coming.came(A)
    assert ends == [True]
    assert all(wait.settled for wait in waits)
    assert coming.wait().settled
    coming.came(A)
    coming.end()
    assert ends == [True]


def test_it_has_come_if_there_was_nothing(coming: Coming, ends: list[bool]) -> None:
    coming.told({})
    assert ends == [True]


def test_nobody_is_waited_for_who_is_gone(coming: Coming, ends: list[bool]) -> None:
    coming.told({A: 2})
    coming.came(A)
    coming.gone(A)
    assert ends == [True]


def test_whoever_had_the_name_and_is_gone_says_no_more(coming: Coming, ends: list[bool]) -> None:
    coming.gone(SOURCE)
    assert ends == [True]


def test_a_note_says_what_was_written() -> None:
    moved = Moved("com.example.Name", {A: 2, B: 1})
    assert read(write(moved)) == moved


@pytest.mark.parametrize(
    "rest", [b"", b"\x92\xa1a", b"\x92\xa1a\x81\xa1b\x01", b"\x92\xa1\xff\x80"]
)
def test_a_note_that_no_honest_worker_writes_says_nothing(rest: bytes) -> None:
    assert read(NOTE + rest) is None
