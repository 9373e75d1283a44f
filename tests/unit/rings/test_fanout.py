"""Fan-out with demotion, against the simplest model: each reader gets what was sent to it, in
the order in which it was sent, once; whatever the sizes, and whoever sleeps for how long."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.rings.status import StatusView

from .worker import MARK, Worker, introduce

READERS = 3

sizes = st.one_of(st.integers(4, 200), st.integers(4, 1900))
targets = st.lists(st.integers(1, READERS), unique=True, min_size=1)
steps = st.one_of(
    st.tuples(st.just("unicast"), st.integers(1, READERS), sizes),
    st.tuples(st.just("signal"), targets, sizes),
    st.tuples(st.just("join"), st.integers(1, READERS), st.just(0)),
    st.tuples(st.just("demote"), st.integers(1, READERS), st.just(0)),
    st.tuples(st.just("flush"), st.integers(1, READERS), st.just(0)),
    st.tuples(st.just("scan"), st.integers(1, READERS), st.just(0)),
    st.tuples(st.just("read"), st.integers(1, READERS), st.integers(1, 8)),
    st.tuples(st.just("release"), st.integers(1, READERS), st.just(0)),
)


def make() -> dict[int, Worker]:
    workers = {name: Worker(name, 4096, 4096) for name in range(READERS + 1)}
    for name in range(1, READERS + 1):
        introduce(workers[0], workers[name])
    return workers


class Run:
    """Interleaves the sender's steps with each reader's; a reader can stop between two frames."""

    def __init__(self) -> None:
        self.workers = make()
        self.sender = self.workers[0]
        self.sent: dict[int, list[int]] = {name: [] for name in range(1, READERS + 1)}
        self.got: dict[int, list[int]] = {name: [] for name in range(1, READERS + 1)}
        self.serial = 0

    def body(self, to: list[int], size: int) -> bytes:
        """The receivers first, so that a reader can tell what its rules do not match."""
        return bytes(to).ljust(READERS, b"\0").ljust(size, b"x")

    def step(self, what: str, who: int | list[int], size: int) -> None:
        sender = self.sender
        match what:
            case "unicast" | "signal":
                self.serial += 1
                to = [who] if isinstance(who, int) else who
                for name in to:
                    self.sent[name].append(self.serial)
                if isinstance(who, int):
                    sender.unicast(who, self.body(to, size), self.serial)
                else:
                    sender.signal(who, self.body(to, size), self.serial)
            case "join":
                sender.join(who)
            case "demote":
                if sender.to[who].subscriber.joined:
                    sender.demote(who)
            case "flush":
                sender.to[who].flush()
            case "scan":
                self.workers[who].merge.scan()
            case "read":
                for _ in range(size):
                    if not self.read(who):
                        break
            case "release":
                self.workers[who].merge.release()
        sender.end()

    def read(self, name: int) -> bool:
        taken = self.workers[name].merge.one()
        if taken is None:
            return False
        frame = taken[1]
        assert frame.kind != MARK
        if name in frame.body[:READERS]:
            self.got[name].append(frame.serial)
        return True

    def finish(self) -> None:
        done = False
        while not done:
            done = True
            for name in range(1, READERS + 1):
                merge = self.workers[name].merge
                done &= self.sender.to[name].flush()
                done &= self.sender.end()
                merge.scan()
                while self.read(name):
                    pass
                merge.release()
                done &= not merge.more()
        for name in range(1, READERS + 1):
            assert self.workers[name].merge.put_aside() == []
            assert self.got[name] == self.sent[name]


@settings(max_examples=400, deadline=None)
@given(st.lists(steps, min_size=20, max_size=250))
def test_everything_arrives_once_and_in_order(plan: list[tuple[str, int | list[int], int]]) -> None:
    run = Run()
    for name in range(1, READERS + 1):
        run.sender.join(name)
    for what, who, size in plan:
        run.step(what, who, size)
        for name in run.got:
            assert run.got[name] == run.sent[name][: len(run.got[name])]
    run.finish()


def test_one_that_sleeps_holds_up_nobody_and_misses_nothing() -> None:
    run = Run()
    for name in range(1, READERS + 1):
        run.sender.join(name)
    for _ in range(500):
        run.step("signal", [1, 2, 3], 100)
        run.step("unicast", 1, 100)
        run.sender.fanout.broadcast.close_many()  # it has waited long enough for 1
        for name in (2, 3):
            run.step("scan", name, 0)
            run.step("read", name, 100)
            run.step("release", name, 0)
        assert run.got[2] == run.sent[2]
    assert run.got[1] == []
    assert run.sender.fanout.statistics().demotions > 0
    run.finish()


def test_unicast_before_a_demotion_waits_for_the_signals_before_it() -> None:
    """The Ring holds u(2) and then the copies of s(1), s(3): what the reader gets is 1, 2, 3."""
    run = Run()
    run.sender.join(1)
    run.workers[1].merge.take()
    run.step("signal", [1], 1000)
    run.step("unicast", 1, 1000)
    run.step("signal", [1], 1000)
    run.sender.demote(1)
    run.sender.join(2)
    for _ in range(6):
        run.step("signal", [2], 1900)  # overwrites all that was there
    assert run.workers[1].merge.scan() == 1
    assert run.workers[1].merge.statistics().held > 0
    run.finish()
    assert run.got[1] == [1, 2, 3]


def test_a_demotion_that_has_not_come_whole_is_waited_for() -> None:
    run = Run()
    run.sender.join(1)
    run.workers[1].merge.take()
    run.step("signal", [1], 1900)
    run.step("unicast", 1, 1900)
    run.step("unicast", 1, 1900)  # the Ring is full
    run.sender.join(2)
    for _ in range(6):
        run.step("signal", [2], 1900)  # demotes 1: the copy waits at the sender
    assert run.sender.to[1].waiting
    assert run.workers[1].merge.take() == []
    assert run.sender.to[1].flush()
    run.finish()
    assert run.got[1] == [1, 2, 3]


def test_a_reader_that_nothing_concerned_goes_on_where_the_mark_says() -> None:
    run = Run()
    run.sender.join(1)
    run.sender.join(2)
    for _ in range(20):
        run.step("signal", [2], 1900)
    assert run.sender.to[1].subscriber.joined
    run.step("signal", [1, 2], 10)
    run.finish()
    assert len(run.got[1]) == 1


@pytest.mark.parametrize("claim", [2**63, 2**64 - 1])
def test_a_reader_that_claims_too_much_is_not_spared(claim: int) -> None:
    run = Run()
    run.sender.join(1)
    run.step("signal", [1], 100)
    run.workers[1].status.publish(1, claim)
    run.sender.fanout.limit()
    assert run.sender.to[1].subscriber.broken
    assert not run.sender.to[1].subscriber.joined
    assert not StatusView(run.workers[1].status.fd).asleep()


def test_a_position_inside_a_frame_gives_away_nothing_beyond_the_broadcast() -> None:
    """Where to begin is the reader's word: a lie makes it broken, or yields what it may read."""
    for claim in range(8, 2000, 8):
        run = Run()
        run.sender.join(1)
        run.step("signal", [1], 1900)
        run.step("signal", [1], 100)
        run.workers[1].status.publish(1, claim)
        frames = run.sender.fanout.take_out(run.sender.to[1].subscriber)
        assert run.sender.to[1].subscriber.broken or sum(len(f[2]) for f in frames) < 4096


def test_a_mark_beyond_the_broadcast_is_a_lie() -> None:
    run = Run()
    run.sender.to[1].put(
        __import__("kbusd.rings.values", fromlist=["Frame"]).Frame(MARK, 1, b"", b"", aux=4096)
    )
    assert run.workers[1].merge.take() == []
    assert [reason for _, reason in run.workers[1].merge.put_aside()] == [
        "a frame, a position or the head is out of range"
    ]
    assert struct.calcsize("<IBBHQIIIIQ") == 40


def test_a_sender_that_is_not_at_the_end_holds_up_others_and_not_itself() -> None:
    """What has begun waits for a full Ring elsewhere; here it is delivered, what answers it not."""
    run = Run()
    introduce(run.workers[2], run.workers[3])
    run.step("unicast", 1, 1900)
    run.step("unicast", 1, 1900)  # the Ring to 1 is full
    run.step("signal", [1, 2, 3], 1000)
    assert [frame.serial for _, frame in run.workers[2].merge.take()] == [3]
    run.workers[2].unicast(3, bytes(READERS), 4)
    assert [frame.serial for _, frame in run.workers[3].merge.take()] == [3]
    assert run.workers[3].merge.take() == []
    assert run.workers[3].merge.holding
    run.workers[1].merge.take()
    assert run.sender.to[1].flush()
    assert run.sender.end()
    assert [frame.serial for _, frame in run.workers[3].merge.take()] == [4]
