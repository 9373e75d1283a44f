"""A peer that has been taken over: it can write all that its rings let it, and hurts only itself."""

from __future__ import annotations

import mmap
import os
import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.rings import memfd
from kbusd.rings.broadcast import Broadcast, BroadcastReader
from kbusd.rings.clock import Clock
from kbusd.rings.memfd import RingError
from kbusd.rings.merge import Merge
from kbusd.rings.ring import Ring, RingReader
from kbusd.rings.status import StatusPage, StatusView
from kbusd.rings.values import Frame

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 2 * PAGE
MARK = 3


class Scribbler:
    """A ring or Broadcast whose owner kept a writable mapping, as every producer does."""

    def __init__(self, size: int = SIZE) -> None:
        self.fd = memfd.make("hostile", PAGE + size)
        self.memory = mmap.mmap(self.fd, PAGE + size)
        memfd.seal(self.fd)

    def word(self, at: int, value: int) -> None:
        self.memory[at : at + 8] = struct.pack("<Q", value & (2**64 - 1))

    def frame(
        self,
        at: int,
        stamp: int,
        length: int | None = None,
        kind: int = 1,
        envelope: int = 0,
        body: int = 0,
        aux: int = 0,
    ) -> int:
        """Write a head at position `at`; the position behind the frame."""
        if length is None:
            length = (40 + envelope + body + 7) & ~7
        head = struct.pack("<IBBHQIIIIQ", length, kind, 0, 0, stamp, 0, 0, envelope, body, aux)
        self.memory[PAGE + at : PAGE + at + 40] = head
        return at + length

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


def honest(merge: Merge, status: StatusPage, clock: Clock) -> Ring:
    ring = Ring(65536)
    slot = status.take_slot()
    ring.connect(StatusView(status.fd), slot)
    merge.add(RingReader(ring.fd, status, slot))
    return ring


@pytest.fixture
def stage() -> tuple[Merge, StatusPage, Clock]:
    clock = Clock()
    return Merge(clock), StatusPage(), clock


BAD_FRAMES = [
    {"length": 0},
    {"length": 32},
    {"length": 44},
    {"length": 2**32 - 8},
    {"length": SIZE + 8},
    {"kind": 0},
    {"length": 48, "envelope": 9},
    {"length": 48, "body": 9},
    {"length": 48, "envelope": 2**32 - 1, "body": 2**32 - 1},
    {"length": 48, "envelope": 2**32 - 40, "body": 0},
]


@pytest.mark.parametrize("bad", BAD_FRAMES)
@pytest.mark.parametrize("broadcast", [False, True])
def test_a_frame_out_of_range_is_refused(
    stage: tuple[Merge, StatusPage, Clock], bad: dict[str, int], broadcast: bool
) -> None:
    merge, status, clock = stage
    hostile = Scribbler()
    good = honest(merge, status, clock)
    reader = (
        BroadcastReader(hostile.fd)
        if broadcast
        else RingReader(hostile.fd, status, status.take_slot())
    )
    merge.add(reader)
    hostile.frame(0, 1, **bad)
    hostile.word(0, 48)
    good.write(Frame(1, clock.tick(), b"", b"good"))
    assert [frame.body for _, frame in merge.take()] == [b"good"]
    assert [(each, reason[:7]) for each, reason in merge.put_aside()] == [(reader, "a frame")]
    assert not merge.more()
    with pytest.raises(RingError):
        reader.read()
    hostile.close()


@pytest.mark.parametrize("head", [2**64 - 1, 2**63, SIZE + 8, SIZE + 48, 1, 39, 8])
@pytest.mark.parametrize("broadcast", [False, True])
def test_a_head_out_of_range_is_refused(
    stage: tuple[Merge, StatusPage, Clock], head: int, broadcast: bool
) -> None:
    merge, status, _ = stage
    hostile = Scribbler()
    reader = (
        BroadcastReader(hostile.fd)
        if broadcast
        else RingReader(hostile.fd, status, status.take_slot())
    )
    merge.add(reader)
    hostile.frame(0, 1, body=8)
    hostile.word(0, head)
    assert merge.take() == []
    assert [each for each, _ in merge.put_aside()] == [reader]
    hostile.close()


def test_a_head_that_goes_back_is_refused(stage: tuple[Merge, StatusPage, Clock]) -> None:
    merge, status, _ = stage
    hostile = Scribbler()
    reader = RingReader(hostile.fd, status, status.take_slot())
    merge.add(reader)
    end = hostile.frame(0, 1, body=8)
    hostile.word(0, end)
    assert len(merge.take()) == 1
    hostile.word(0, 0)
    assert merge.take() == []
    assert len(merge.put_aside()) == 1
    hostile.close()


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_scribbles_crash_nobody(rng: random.Random, following: bool) -> None:
    """Bytes at random over heads, stamps, MARKs, copies, tails: each take ends, and in order."""
    clock = Clock()
    merge = Merge(clock, 0)
    status = StatusPage()
    good = honest(merge, status, clock)
    ring, cast = Scribbler(), Scribbler()
    reader = RingReader(ring.fd, status, status.take_slot())
    merge.add(reader, BroadcastReader(cast.fd), status.take_slot())
    if following:
        ring.word(0, ring.frame(0, 1, kind=MARK))
    sent, got = [], []
    for step in range(40):
        target = rng.choice((ring, cast))
        match rng.randrange(6):
            case 0:
                target.word(rng.choice((0, 8, 16, 24)), rng.choice((0, 40, 48, 8192, 2**64 - 8)))
            case 1:
                at = rng.randrange(0, SIZE - 48, 8)
                target.memory[PAGE + at : PAGE + at + 40] = rng.randbytes(40)
            case 2:
                at = rng.randrange(0, SIZE - 200, 8)
                target.frame(
                    at, rng.randrange(2**40), kind=rng.randrange(6), body=rng.randrange(99)
                )
            case 3:
                target.frame(0, clock.tick(), kind=rng.choice((1, 3)), aux=rng.randrange(9000))
                target.word(0, 40)
            case _:
                sent.append(step)
                good.write(Frame(1, clock.tick(), b"", bytes([step])))
        got += [frame.body[0] for each, frame in merge.take() if each is not reader]
    for _ in range(100):
        got += [frame.body[0] for each, frame in merge.take() if each is not reader]
    assert got == sent
    ring.close()
    cast.close()


@pytest.mark.parametrize("ahead", [2_000_000_000, 2**62, -1])
def test_stamps_in_the_future_hurt_the_liar(
    stage: tuple[Merge, StatusPage, Clock], ahead: int
) -> None:
    merge, status, clock = stage
    good = honest(merge, status, clock)
    liar = honest(merge, status, clock)
    liar.write(Frame(1, 2**64 - 1 if ahead < 0 else clock.tick() + ahead, b"", b"lie"))
    for body in (b"1", b"2", b"3"):
        good.write(Frame(1, clock.tick(), b"", body))
        assert [frame.body for _, frame in merge.take()] == [body]
    assert [reason for _, reason in merge.put_aside()] == ["a stamp is more than 1 s ahead of time"]
    assert clock.tick() <= time.monotonic_ns()


def test_stamps_that_do_not_rise_are_refused(stage: tuple[Merge, StatusPage, Clock]) -> None:
    merge, status, clock = stage
    liar = honest(merge, status, clock)
    liar.write(Frame(1, 100, b"", b"a"))
    liar.write(Frame(1, 100, b"", b"b"))
    assert [frame.body for _, frame in merge.take()] == [b"a"]
    assert [reason for _, reason in merge.put_aside()] == ["stamps do not rise from frame to frame"]


def test_a_promise_that_is_not_kept_costs_others_little(
    stage: tuple[Merge, StatusPage, Clock],
) -> None:
    """`begin` without `end`, again and again with other stamps: others wait 20 ms, then a part."""
    merge, status, clock = stage
    good = honest(merge, status, clock)
    ring, cast = Scribbler(), Broadcast(PAGE)
    merge.add(
        RingReader(ring.fd, status, status.take_slot()),
        BroadcastReader(cast.fd),
        status.take_slot(),
    )
    begin = time.monotonic()
    waited = 0.0
    rounds = 0
    promise = 1
    while time.monotonic() - begin < 1.0:
        promise += 1
        cast.open_many(promise)
        good.write(Frame(1, clock.tick(), b"", b""))
        start = time.monotonic()
        while not merge.take():
            waited += time.monotonic() - start
            start = time.monotonic()
            promise += 1
            cast.open_many(promise)
        rounds += 1
    assert rounds > 1000
    assert waited < 0.3
    ring.close()


def test_old_stamps_without_end_cost_others_little(stage: tuple[Merge, StatusPage, Clock]) -> None:
    """Another process publishes frames with tiny stamps as fast as it can: always something new
    that is older than all others have."""
    merge, status, clock = stage
    good = honest(merge, status, clock)
    slot = status.take_slot()
    flood = Ring(16384)
    flood.connect(StatusView(status.fd), slot)
    merge.add(RingReader(flood.fd, status, slot))
    pid = os.fork()
    if pid == 0:
        stamp = 0
        while True:
            stamp += 1
            if not flood.write(Frame(1, stamp, b"", b"x")):
                stamp -= 1
    try:
        delivered = 0
        longest = 0.0
        begin = time.monotonic()
        while time.monotonic() - begin < 1.0:
            good.write(Frame(1, clock.tick(), b"", b"good"))
            start = time.monotonic()
            while not any(frame.body == b"good" for _, frame in merge.take()):
                pass
            longest = max(longest, time.monotonic() - start)
            delivered += 1
        assert delivered > 5
        assert longest < 0.5
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("claim", [2**64 - 1, 2**63, 4096, 48])
def test_a_consumer_that_claims_too_much_stops_its_own_ring(claim: int) -> None:
    status = StatusPage()
    slot = status.take_slot()
    ring = Ring(PAGE)
    ring.connect(StatusView(status.fd), slot)
    ring.write(Frame(1, 1, b"", b""))
    status.publish(slot, claim)
    while ring.write(Frame(1, 1, b"", bytes(8))) and ring.statistics().written < 3 * PAGE:
        pass
    assert ring.broken == (claim != 48)
    if ring.broken:
        status.publish(slot, ring.statistics().written)
        assert not ring.write(Frame(1, 1, b"", b""))


def test_a_consumer_that_takes_back_what_it_has_read_stops_its_own_ring() -> None:
    status = StatusPage()
    slot = status.take_slot()
    ring = Ring(PAGE)
    ring.connect(StatusView(status.fd), slot)
    while ring.write(Frame(1, 1, b"", bytes(8))):
        pass
    status.publish(slot, 960)
    while ring.write(Frame(1, 1, b"", bytes(8))):
        pass
    assert not ring.broken
    status.publish(slot, 480)
    assert not ring.write(Frame(1, 1, b"", bytes(8)))
    assert ring.broken


def test_an_overrun_without_a_word_is_a_lie(stage: tuple[Merge, StatusPage, Clock]) -> None:
    merge, status, clock = stage
    good = honest(merge, status, clock)
    ring, cast = Scribbler(), Scribbler()
    merge.add(
        RingReader(ring.fd, status, status.take_slot()),
        BroadcastReader(cast.fd),
        status.take_slot(),
    )
    ring.word(0, ring.frame(0, 1, kind=MARK))
    assert merge.take() == []
    assert merge.statistics().following == 1
    cast.word(16, 4096)
    cast.word(0, 4096 + 48)
    good.write(Frame(1, clock.tick(), b"", b"good"))
    assert [frame.body for _, frame in merge.take()] == [b"good"]
    assert [reason for _, reason in merge.put_aside()] == [
        "its Broadcast has overtaken us without a demotion"
    ]
    ring.close()
    cast.close()


def test_what_changes_while_it_is_read_is_no_frame(
    stage: tuple[Merge, StatusPage, Clock],
) -> None:
    """The head was judged in the scan; another one stands there when it is its turn."""
    merge, status, _ = stage
    hostile = Scribbler()
    merge.add(RingReader(hostile.fd, status, status.take_slot()))
    hostile.word(0, hostile.frame(0, 1, body=8))
    assert merge.scan() == 1
    hostile.frame(0, 2, body=8)
    assert merge.one() is None
    assert len(merge.put_aside()) == 1
    hostile.close()


def test_a_copy_of_what_never_comes_is_a_lie(stage: tuple[Merge, StatusPage, Clock]) -> None:
    merge, status, clock = stage
    good = honest(merge, status, clock)
    ring, cast = Scribbler(), Broadcast(PAGE)
    reader = RingReader(ring.fd, status, status.take_slot())
    merge.add(reader, BroadcastReader(cast.fd), status.take_slot())
    end = ring.frame(0, 1, kind=MARK)
    ring.word(0, ring.frame(end, 2, aux=48, body=8))
    cast.open_many(clock.tick() + 10**9)
    begin = time.monotonic()
    while not (broken := merge.put_aside()):
        good.write(Frame(1, clock.tick(), b"", b""))
        merge.take()
        assert time.monotonic() - begin < 5
    assert [each for each, _ in broken] == [reader]
    ring.close()


def test_who_was_given_up_before_is_not_reported_as_broken(
    stage: tuple[Merge, StatusPage, Clock],
) -> None:
    """Its reader may drop a peer for what a frame says while the scan objects to the next one."""
    merge, status, clock = stage
    liar = Scribbler()
    reader = RingReader(liar.fd, status, status.take_slot())
    merge.add(reader)
    good = honest(merge, status, clock)
    liar.frame(0, clock.tick(), length=0)
    liar.word(0, 48)
    good.write(Frame(1, clock.tick(), b"", b"good"))
    assert [frame.body for _, frame in merge.take()] == [b"good"]
    merge.remove(reader)
    assert merge.put_aside() == []
    liar.close()
