"""What is asked after a file was closed waits for its effect."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kbusd.cuse import abi
from kbusd.sandbox import kernel
from kbusd.supervisor import closing
from kbusd.supervisor.closing import MAX_FOR_OTHERS, MAX_LANES, Closings
from kbusd.supervisor.domains import HOST
from tests.bus import procs
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
        end, pid = (lambda **_: -1), os.getpid()
        return SimpleNamespace(number=number, uid=uid, pid=pid, bus="", owned=owns, end=end)

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


class Machine:
    """What the clock says, and for how long a worker has waited for a processor, and run; -1: it sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.delayed, self.ran = 1000.0, 50.0, -1
        monkeypatch.setattr(closing.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(closing.kernel, "delayed", lambda _: (self.delayed, self.ran))


def test_who_was_slow_once_was_remembered_for_ever(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    play.close(1)
    own = play.asks(1)
    machine.now += closing.WAIT_SECONDS + 1
    play.closings.expire()
    assert play.goes_on() == [own]
    play.close(2)
    assert play.asks(2) == 0 and play.asks(1)
    machine.now += closing.TARDY_SECONDS
    play.closings.expire()  # gives up on that, too
    machine.now += closing.TARDY_SECONDS
    play.closings.expire()
    assert play.closings._tardy == {}


@pytest.mark.parametrize("ended", [False, True])
def test_who_asked_on_a_busy_machine_saw_what_was_closed_a_second_ago(
    play: Play, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """Its worker had hardly run yet, or had ended, and the broker had not."""
    machine = Machine(monkeypatch)
    play.close(1)
    waits = play.asks(2)
    for _ in range(8):
        machine.now += 1
        machine.delayed = math.inf if ended else machine.delayed + 0.9
        play.closings.expire()
        assert play.goes_on() == []
    play.closings.left(1)
    assert play.goes_on() == [waits]
    play.close(2)
    assert play.asks(2)  # and no other waits the less for that user


def waited(play: Play, machine: Machine, delayed: float, ran: int) -> float:
    """How long somebody waits for a worker that waits so much of the time, and runs so much in between."""
    play.close(1)
    waits, begun = play.asks(1), machine.now
    while not (given := play.goes_on()):
        machine.now += closing.LOOK_SECONDS
        machine.delayed += delayed * closing.LOOK_SECONDS
        machine.ran += ran
        play.closings.expire()
    assert given == [waits]
    return machine.now - begun


@pytest.mark.parametrize(("delayed", "waits"), [(0.0, 1.0), (0.3, 1.0 / 0.7), (1.0, 10.0)])
def test_who_is_waited_for_must_not_sleep_nor_run_for_long(
    play: Play, monkeypatch: pytest.MonkeyPatch, delayed: float, waits: float
) -> None:
    machine = Machine(monkeypatch)
    assert waited(play, machine, delayed, 0) == pytest.approx(waits, abs=0.05)
    machine.ran = 5
    assert waited(play, machine, delayed, 1) == pytest.approx(waits, abs=0.05)


def test_who_has_not_got_a_processor_yet_is_waited_for(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts that when it is over."""
    machine = Machine(monkeypatch)
    machine.ran = 5
    assert waited(play, machine, 0.0, 0) == pytest.approx(10.0, abs=0.05)


def test_a_process_that_has_ended_is_delayed_for_ever() -> None:
    """Its parent may not have seen it yet."""
    delayed, ran = kernel.delayed(os.getpid())
    assert 0 <= delayed < 3600 and ran > 0
    asleep, awake = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(awake)
        os.read(asleep, 1)
        os._exit(0)
    os.close(asleep)
    procs.eventually(lambda: kernel.delayed(pid)[1] == -1, "it sleeps")
    os.close(awake)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert kernel.delayed(pid) == (math.inf, -1)
    os.waitpid(pid, 0)
    assert kernel.delayed(pid) == (math.inf, -1)
