"""What is asked after a file was closed waits for its effect."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kbusd.cuse import abi
from kbusd.supervisor import closing
from kbusd.supervisor.closing import MAX_FOR_OTHERS, MAX_LANES, Closings
from kbusd.supervisor.domains import HOST
from tests.unit.cuse.requests_of import request

LOOKUP, IOCTL = abi.LOOKUP, abi.IOCTL


class Play:
    """Closings, and a connection that is asked."""

    domain = HOST

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []
        self.given: list[int] = []
        self.unique = 0
        self.closings = Closings(self.listen, self.jobs.append)

    def listen(self, fd: int, handler: Any) -> None:
        self.bell, self.handler = fd, handler

    def give(self, raw: bytes) -> None:
        self.given.append(int.from_bytes(raw[8:16], "little"))

    def opened(self, number: int, uid: int = 1, owned: bool = False) -> Any:
        self.closings.opened(number)
        owns = (lambda: None) if owned else None
        return SimpleNamespace(number=number, uid=uid, bus="", owned=owns, end=lambda **_: -1)

    def close(self, number: int, uid: int = 1, owned: bool = False) -> None:
        self.closings.close(self.opened(number, uid, owned), HOST)

    def asks(self, uid: int, opcode: int = IOCTL) -> int:
        """The number of a request that waits; 0 if it does not."""
        self.unique += 1
        data = bytes(40) if opcode == LOOKUP else abi.IOCTL_IN.pack(77, 0, 0, 0, 0, 0)
        raw = request(opcode, unique=self.unique, uid=uid, data=data)
        return self.unique if self.closings.postpone(self, raw) else 0

    def goes_on(self) -> list[int]:
        """Those that wait no more."""
        self.given.clear()
        for _ in range(100):
            self.handler(None)
        return sorted(self.given)


@pytest.fixture
def play() -> Iterator[Play]:
    play = Play()
    yield play
    os.close(play.bell)
    os.close(play.closings._ring)


def test_each_waits_for_what_was_closed_before_it(play: Play) -> None:
    assert play.asks(1) == 0
    play.close(1)
    first = play.asks(1)
    play.close(2)
    second, other = play.asks(1), play.asks(2)
    assert play.asks(2, LOOKUP) == 0  # nothing that it would see
    play.closings.left(2)
    assert play.goes_on() == []
    play.closings.left(1)
    assert play.goes_on() == [first, second, other]
    assert play.asks(1) == 0 and not play.closings.busy


def test_who_looks_for_nodes_waits_for_those_that_go(play: Play) -> None:
    play.close(1, owned=True)
    waits = play.asks(2, LOOKUP)
    play.closings.left(1)
    assert play.goes_on() == []
    play.jobs.pop()()
    assert play.goes_on() == [waits]


def test_that_the_broker_said_left_was_counted_twice_if_the_file_was_closed_meanwhile(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its connection had made was taken for gone before it was."""
    holder = play.opened(1, owned=True)
    real = play.closings._lock

    class Between:
        """Lets the file be closed as soon as what is done with `left` lets go of the lock."""

        def __enter__(self) -> None:
            real.acquire()

        def __exit__(self, *_: object) -> None:
            real.release()
            monkeypatch.setattr(play.closings, "_lock", real)
            play.closings.close(holder, HOST)

    monkeypatch.setattr(play.closings, "_lock", Between())
    play.closings.left(1)
    waits = play.asks(1, LOOKUP)
    assert waits
    play.jobs.pop()()
    assert play.goes_on() == [waits]


def test_nobody_waits_for_who_closes_many_files_but_himself(play: Play) -> None:
    for number in range(MAX_FOR_OTHERS + 1):
        play.close(number)
    assert play.asks(2) == 0
    own = play.asks(1)
    play.closings.left(0)
    assert play.asks(2)
    for number in range(1, MAX_FOR_OTHERS + 1):
        play.closings.left(number)
    assert own in play.goes_on()


def test_nobody_waits_for_many_users(play: Play) -> None:
    """For each request each of them was looked at, with a lock that all need."""
    for uid in range(MAX_LANES + 1):
        play.close(uid, uid)
    assert play.asks(MAX_LANES + 2) == 0
    assert play.asks(3)


def test_who_was_slow_once_was_remembered_for_ever(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(closing.time, "monotonic", lambda: now[0])
    play.close(1)
    own = play.asks(1)
    now[0] += closing.WAIT_SECONDS + 1
    play.closings.expire()
    assert play.goes_on() == [own]
    play.close(2)
    assert play.asks(2) == 0 and play.asks(1)
    now[0] += closing.TARDY_SECONDS
    play.closings.expire()  # gives up on that, too
    now[0] += closing.TARDY_SECONDS
    play.closings.expire()
    assert play.closings._tardy == {}
