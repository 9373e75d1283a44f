"""A connection's pool: which bytes of it are in use, and how much of it each sender may fill.

Bookkeeping only, after ipc/kdbus/pool.c and kdbus_conn_quota_inc in connection.c (the manual page is
kdbus.pool(7)); whoever owns the memory writes it. A pool is cut into slices of a multiple of 8 bytes,
neighbours that are free are one. The smallest free slice that suffices is taken, of equal ones the
first. A slice is in use until both have let go of it: the bus with `release`, the client, to whom it
was shown by `publish`, with `free`. The contents are never looked at, since the client may have
been able to write them.

What others queue is accounted: half of the pool is kept from it, and one sending user gets a third
of what is left of the other half, its own share counted as left.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, insort
from dataclasses import dataclass

import msgspec

from kbusd.kdbus import abi
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.layout import align8

KERNEL_USER = 0
"""The account of the bus's own messages."""


class Statistics(msgspec.Struct, frozen=True):
    """Bytes of the pool, of those in use, of those that queued messages hold; slices in use."""

    size: int
    used: int
    accounted: int
    slices: int


@dataclass(slots=True, eq=False)
class Slice:
    """`size` bytes in use from `offset`."""

    offset: int
    size: int
    accounted: bool
    held: bool = True  # by the bus
    published: bool = False


class Pool:
    """The slices of a pool of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.accounted = 0
        self._busy: dict[int, Slice] = {}
        self._free = [(size, 0)]  # (size, offset), sorted
        self._free_from = {0: size}  # offset -> size
        self._free_to = {size: 0}  # end -> offset

    def alloc(self, size: int, accounted: bool) -> Slice:
        """A slice of at least `size` (one or more) bytes. Raises Errno EXFULL."""
        size = align8(size)
        at = bisect_left(self._free, (size, -1))
        if at == len(self._free):
            raise Errno(errno.EXFULL, f"no {size} bytes in a row are free in the pool")
        found, offset = self._free[at]
        self._take(found, offset)
        if found > size:
            self._give(found - size, offset + size)
        slice = self._busy[offset] = Slice(offset, size, accounted)
        if accounted:
            self.accounted += size
        return slice

    def publish(self, slice: Slice) -> tuple[int, int]:
        """Show a slice to the client, who must free it. Returns its offset and size."""
        slice.published = True
        return slice.offset, slice.size

    @property
    def empty(self) -> tuple[int, int]:
        """The offset and size that stand for no slice; the client may free them to no effect."""
        return self.size, 0

    def release(self, slice: Slice) -> None:
        """The bus lets go of a slice that it holds."""
        slice.held = False
        if slice.accounted:
            self.accounted -= slice.size
        self._drop(slice)

    def free(self, offset: int) -> None:
        """The client lets go of what was published at `offset`. Raises Errno ENXIO if nothing was."""
        if offset == self.size:
            return
        slice = self._busy.get(offset)
        if slice is None or not slice.published:
            raise Errno(errno.ENXIO, f"nothing that could be freed begins at {offset}")
        slice.published = False
        self._drop(slice)

    def statistics(self) -> Statistics:
        """What is in use now."""
        used = sum(slice.size for slice in self._busy.values())
        return Statistics(self.size, used, self.accounted, len(self._busy))

    def _drop(self, slice: Slice) -> None:
        if slice.held or slice.published:
            return
        del self._busy[slice.offset]
        offset, end = slice.offset, slice.offset + slice.size
        if end in self._free_from:
            following = self._free_from[end]
            self._take(following, end)
            end += following
        if offset in self._free_to:
            before = self._free_to[offset]
            self._take(offset - before, before)
            offset = before
        self._give(end - offset, offset)

    def _give(self, size: int, offset: int) -> None:
        insort(self._free, (size, offset))
        self._free_from[offset] = size
        self._free_to[offset + size] = offset

    def _take(self, size: int, offset: int) -> None:
        del self._free[bisect_left(self._free, (size, offset))]
        del self._free_from[offset]
        del self._free_to[offset + size]


@dataclass(slots=True)
class _Share:
    memory: int = 0
    messages: int = 0
    fds: int = 0


class Quota:
    """What each sending user has queued in one connection's pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._shares: dict[int, _Share] = {}

    def check(self, user: int, memory: int, fds: int) -> None:
        """Raise Errno if `user` may not queue a message of `memory` bytes with `fds` descriptors.

        ENOBUFS: too many bytes or messages; EMFILE: too many descriptors.
        """
        share = self._shares.get(user) or _Share()
        left = self._pool.size // 2 - self._pool.accounted
        most = (left + share.memory) // 3
        if left < 0 or most < share.memory + memory:
            raise Errno(
                errno.ENOBUFS,
                f"user {user} has {share.memory} of the receiver's pool; with {memory} more it "
                f"would be over its share of {max(most, 0)} bytes",
            )
        if share.messages >= abi.MAX_MESSAGES_PER_USER:
            raise Errno(
                errno.ENOBUFS, f"user {user} has {share.messages} messages queued at the receiver"
            )
        if share.fds + fds > abi.MAX_FDS_PER_USER:
            raise Errno(
                errno.EMFILE, f"user {user} has {share.fds} descriptors on the way to the receiver"
            )

    def add(self, user: int, memory: int, fds: int) -> None:
        """Count a message. Raises Errno as `check` does, and then counts nothing."""
        self.check(user, memory, fds)
        share = self._shares.setdefault(user, _Share())
        share.memory += memory
        share.messages += 1
        share.fds += fds

    def remove(self, user: int, memory: int, fds: int) -> None:
        """A message that was added is no longer queued."""
        share = self._shares[user]
        share.memory -= memory
        share.messages -= 1
        share.fds -= fds
        if not share.messages:
            del self._shares[user]
