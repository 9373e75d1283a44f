"""The pool against a model that knows bytes only; quotas by the kernel's own formula."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kbusd.kdbus import abi
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.pool import KERNEL_USER, Pool, Quota, Slice
from tests.unit.kdbus.refused import refused

SIZE = 512


class PoolMachine(RuleBasedStateMachine):
    """The model is one owner for each 8 bytes, and who holds each slice."""

    slices = Bundle("slices")

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(SIZE)
        self.bytes: list[Slice | None] = [None] * (SIZE // 8)
        self.holders: dict[Slice, set[str]] = {}

    def runs(self) -> list[tuple[int, int]]:
        """Free runs, as (length, start) in units of 8 bytes."""
        found = []
        start = 0
        for at in range(SIZE // 8 + 1):
            if at == SIZE // 8 or self.bytes[at] is not None:
                if at > start:
                    found.append((at - start, start))
                start = at + 1
        return found

    @rule(target=slices, size=st.integers(1, 200), accounted=st.booleans())
    def alloc(
        self, size: int, accounted: bool
    ) -> Slice | hypothesis.stateful.MultipleResults[Slice]:
        units = -(-size // 8)
        fitting = sorted(run for run in self.runs() if run[0] >= units)
        if not fitting:
            with refused("EXFULL"):
                self.pool.alloc(size, accounted)
            return hypothesis.stateful.multiple()
        slice = self.pool.alloc(size, accounted)
        assert (slice.offset, slice.size) == (fitting[0][1] * 8, units * 8)
        for at in range(slice.offset // 8, slice.offset // 8 + units):
            assert self.bytes[at] is None
            self.bytes[at] = slice
        self.holders[slice] = {"bus"}
        return slice

    def drop(self, slice: Slice, holder: str) -> None:
        self.holders[slice].remove(holder)
        if not self.holders[slice]:
            del self.holders[slice]
            self.bytes = [None if each is slice else each for each in self.bytes]

    @rule(slice=slices)
    def publish(self, slice: Slice) -> None:
        if "bus" in self.holders.get(slice, ()):
            assert self.pool.publish(slice) == (slice.offset, slice.size)
            self.holders[slice].add("client")

    @rule(slice=slices)
    def release(self, slice: Slice) -> None:
        if "bus" in self.holders.get(slice, ()):
            self.pool.release(slice)
            self.drop(slice, "bus")

    @rule(offset=st.integers(0, SIZE // 8 + 1).map(lambda at: at * 8) | st.integers(0, 1 << 64))
    def free(self, offset: int) -> None:
        if offset == SIZE:
            self.pool.free(offset)
            return
        here = next((each for each in self.holders if each.offset == offset), None)
        if here is None or "client" not in self.holders[here]:
            with refused("ENXIO"):
                self.pool.free(offset)
        else:
            self.pool.free(offset)
            self.drop(here, "client")

    @invariant()
    def sums(self) -> None:
        found = self.pool.statistics()
        accounted = [
            each for each in self.holders if each.accounted and "bus" in self.holders[each]
        ]
        assert found.used == 8 * sum(each is not None for each in self.bytes)
        assert found.accounted == sum(each.size for each in accounted)
        assert found.slices == len(self.holders)


TestPool = PoolMachine.TestCase
TestPool.settings = hypothesis.settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_neighbours_become_one_again() -> None:
    pool = Pool(4096)
    slices = [pool.alloc(1024, accounted=True) for _ in range(4)]
    with refused("EXFULL"):
        pool.alloc(1, accounted=False)
    for at in (1, 3, 0, 2):
        pool.release(slices[at])
    assert pool.alloc(4096, accounted=False).offset == 0


def test_no_slice_can_be_freed_to_no_effect() -> None:
    pool = Pool(4096)
    offset, size = pool.empty
    assert size == 0
    pool.free(offset)
    with refused("ENXIO"):
        pool.free(0)
    with refused("ENXIO"):
        pool.free(4097)


def fill(pool: Pool, quota: Quota, user: int, size: int) -> int:
    """Queue messages of `size` bytes until the quota stops it; returns how many."""
    count = 0
    while True:
        try:
            quota.add(user, size, 0)
        except Errno:
            return count
        pool.alloc(size, accounted=True)
        count += 1


def test_one_sender_gets_a_third_of_half_the_pool() -> None:
    """As kdbus_test_pool_quota has it: 2 MiB and a head at a time into a pool of 16 MiB."""
    pool = Pool(16 << 20)
    quota = Quota(pool)
    assert fill(pool, quota, 1, (2 << 20) + 104) == 1
    quota.add(1, 104, 0)
    assert fill(pool, quota, 2, 1 << 20) == 1  # a third of what is left


def test_half_of_the_pool_stays_free_of_all_senders_together() -> None:
    pool = Pool(1 << 20)
    quota = Quota(pool)
    for user in range(1, 40):
        fill(pool, quota, user, 1024)
    assert pool.statistics().used <= 1 << 19
    pool.alloc(1 << 19, accounted=False)  # the owner's half


def test_messages_and_descriptors_of_a_user_are_counted() -> None:
    pool = Pool(16 << 20)
    quota = Quota(pool)
    for _ in range(abi.MAX_MESSAGES_PER_USER):
        quota.add(1, 64, 0)
    with refused("ENOBUFS", "256 messages"):
        quota.add(1, 64, 0)
    quota.remove(1, 64, 0)
    quota.add(1, 64, 0)
    quota.add(KERNEL_USER, 64, abi.MAX_FDS_PER_USER)
    with refused("EMFILE"):
        quota.add(KERNEL_USER, 64, 1)


@pytest.mark.parametrize("accounted", [0, 100, 3000])
@hypothesis.given(memory=st.integers(0, 2048), more=st.integers(1, 2048))
def test_the_kernels_formula(accounted: int, memory: int, more: int) -> None:
    """kdbus_conn_quota_inc: available, accounted and what the user has, as 64-bit numbers."""
    pool = Pool(4096)
    quota = Quota(pool)
    if memory:
        try:
            quota.add(7, memory, 0)
        except Errno:
            return
    if accounted:
        pool.alloc(accounted, accounted=True)
    held = pool.statistics().accounted
    allowed = False
    if held <= 2048:
        available = (2048 - held + memory) // 3
        allowed = available >= memory and available - memory >= more
    try:
        quota.check(7, more, 0)
        passed = True
    except Errno:
        passed = False
    assert passed == allowed
