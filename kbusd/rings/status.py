"""The status page: how far a worker has read each of its rings, and whether it sleeps.

One page range per worker, written by it alone and mapped read-only by its peers (StatusView), who
range-check what they read: a worker that lies about itself gets its own rings stopped.
Layout: u32 `sleeping`, at byte 64 an array of u64 positions, one slot for each ring read, then
another of u64 counts, for each ring's slot how many bodies in its bulk area are done with.
"""

from __future__ import annotations

import cython
from cython.cimports.kbusd.rings.atomics import (
    fence_seq_cst,
    load_acquire,
    load_acquire32,
    store_release,
    store_release32,
)
from cython.cimports.kbusd.rings.libc import close
from cython.cimports.kbusd.rings.memfd import PAGE, map_whole, unmap_whole
from cython.cimports.libc.stdint import uint32_t, uint64_t

from kbusd.rings import memfd
from kbusd.rings.memfd import RingError
from kbusd.rings.values import StatusStatistics

SLOTS_AT = cython.declare(cython.int, 64)  # away from `sleeping`: another cache line
SLOTS = cython.declare(cython.int, 8192)  # 64 KiB of addresses; pages exist once they are used
SIZE = cython.declare(cython.size_t, 0)
SIZE = (SLOTS_AT + 2 * SLOTS * 8 + PAGE - 1) // PAGE * PAGE


@cython.cclass
class StatusPage:
    """Mine. Raises OSError when made."""

    def __cinit__(self):
        self.fd = -1

    def __init__(self):
        self.fd = memfd.make("kbusd-status", SIZE)
        self.page = map_whole(self.fd, SIZE, True)
        if self.page == cython.NULL:
            raise OSError("a status page could not be mapped")
        memfd.seal(self.fd)
        self.slots = cython.cast(cython.pointer(uint64_t), self.page + SLOTS_AT)
        self.free = []
        self.top = 0

    def __dealloc__(self):
        unmap_whole(self.page, SIZE)
        if self.fd >= 0:
            close(self.fd)

    def take_slot(self) -> cython.int:
        """A slot that nobody uses, at position 0. Raises RingError if all are taken."""
        slot: cython.int
        if self.free:
            slot = self.free.pop()
        elif self.top < SLOTS:
            slot = self.top
            self.top += 1
        else:
            raise RingError(f"all {SLOTS} slots of the status page are taken")
        self.set(slot, 0)
        return slot

    def free_slot(self, slot: cython.int) -> None:
        if not 0 <= slot < self.top or slot in self.free:
            raise ValueError(f"slot {slot} is not taken")
        self.free.append(slot)

    def set(self, slot, value) -> cython.void:
        """I have read up to `value`. `slot` is one of take_slot's."""
        # Pairs with StatusView.position: what I read is read before my producer overwrites it.
        store_release(self.slots + slot, value)

    def set_bulk(self, slot, count) -> cython.void:
        """I am done with `count` bodies. Whoever used the count of a slot sets it to 0 before
        `free_slot`."""
        # Pairs with Bulk.reserve: a body is copied before my producer overwrites it.
        store_release(self.slots + SLOTS + slot, count)

    def publish(self, slot: cython.int, value: uint64_t) -> None:
        """`set` for Python. Raises ValueError for a slot that is not taken."""
        if not 0 <= slot < self.top:
            raise ValueError(f"slot {slot} is not taken")
        self.set(slot, value)

    def publish_bulk(self, slot: cython.int, count: uint64_t) -> None:
        """`set_bulk` for Python. Raises ValueError for a slot that is not taken."""
        if not 0 <= slot < self.top:
            raise ValueError(f"slot {slot} is not taken")
        self.set_bulk(slot, count)

    def set_sleeping(self, on) -> cython.void:
        """Before sleeping: set, then look at all heads once more. After it: clear."""
        store_release32(cython.cast(cython.pointer(uint32_t), self.page), on)
        if on:
            # Pairs with the fence in StatusView.sleeping: my flag, then their heads; they
            # publish their heads, then look at my flag.
            fence_seq_cst()

    def sleep(self, on: bool) -> None:
        """`set_sleeping` for Python."""
        self.set_sleeping(on)

    def fileno(self) -> int:
        return self.fd

    def statistics(self) -> StatusStatistics:
        return StatusStatistics(SLOTS, self.top - len(self.free), self.page[0] != 0)


@cython.cclass
class StatusView:
    """A peer's, read-only; the descriptor stays the caller's. Raises RingError when made."""

    def __init__(self, fd: cython.int):
        memfd.check_seals(fd, SIZE, SIZE)
        self.page = map_whole(fd, SIZE, False)
        if self.page == cython.NULL:
            raise RingError("a peer's status page could not be mapped")
        self.slots = SLOTS

    def __dealloc__(self):
        unmap_whole(self.page, SIZE)

    def sleeping(self) -> cython.bint:
        """Whether the peer sleeps. Call after publishing: the fence is in here."""
        # Pairs with the fence in StatusPage.set_sleeping.
        fence_seq_cst()
        return load_acquire32(cython.cast(cython.pointer(cython.const[uint32_t]), self.page)) != 0

    def place(self, slot) -> cython.pointer(cython.const[uint64_t]):
        """Where the peer publishes `slot`. Raises RingError if there is no such slot."""
        if not 0 <= slot < SLOTS:
            raise RingError(f"a status page has no slot {slot}")
        return cython.cast(cython.pointer(cython.const[uint64_t]), self.page + SLOTS_AT) + slot

    def bulk_place(self, slot) -> cython.pointer(cython.const[uint64_t]):
        """Where the peer counts the bodies of `slot`. Raises RingError if there is no such slot."""
        return self.place(slot) + SLOTS

    def position(self, slot) -> uint64_t:
        """What the peer claims to have read; 0 for a slot that does not exist. Check the range."""
        if not 0 <= slot < SLOTS:
            return 0
        # Pairs with StatusPage.set.
        return load_acquire(
            cython.cast(cython.pointer(cython.const[uint64_t]), self.page + SLOTS_AT) + slot
        )

    def asleep(self) -> bool:
        """`sleeping` for Python."""
        return self.sleeping()

    def look(self, slot: cython.int) -> int:
        """`position` for Python."""
        return self.position(slot)
