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

import errno

import cython
import msgspec
from cython.cimports.libc.stdint import int64_t

from kbusd.kdbus import abi
from kbusd.kdbus.errors import Errno

KERNEL_USER = 0
"""The account of the bus's own messages."""


class Statistics(msgspec.Struct, frozen=True):
    """Bytes of the pool, of those in use, of those that queued messages hold; slices in use."""

    size: int
    used: int
    accounted: int
    slices: int


@cython.cclass
class Slice:
    """`size` bytes from `offset`, in use or free."""

    def __init__(self, offset: int64_t, size: int64_t, accounted: cython.bint):
        self.offset = offset
        self.size = size
        self.accounted = accounted


@cython.cclass
class Pool:
    """The slices of a pool of `size` bytes."""

    def __init__(self, size: int64_t):
        self.size = size
        self._busy = {}
        self._free = [Slice(0, size, False)]

    def alloc(self, size, accounted):
        """A slice of at least `size` (one or more) bytes. Raises Errno EXFULL."""
        size = (size + 7) & ~cython.cast(int64_t, 7)
        at: cython.Py_ssize_t = self._place(size, -1)
        if at == len(self._free):
            raise Errno(errno.EXFULL, f"no {size} bytes in a row are free in the pool")
        free: Slice = self._free.pop(at)
        slice: Slice = Slice(free.offset, size, accounted)
        slice.held = True
        _join(free.before, slice)
        if free.size > size:
            free.offset += size
            free.size -= size
            _join(slice, free)
            self._free.insert(self._place(free.size, free.offset), free)
        else:
            _join(slice, free.behind)
        self._busy[slice.offset] = slice
        if accounted:
            self.accounted += size
        return slice

    def publish(self, slice):
        """Show a slice to the client, who must free it. Returns its offset and size."""
        slice.published = True
        return slice.offset, slice.size

    @property
    def empty(self):
        """The offset and size that stand for no slice; the client may free them to no effect."""
        return self.size, 0

    def release(self, slice):
        """The bus lets go of a slice that it holds."""
        slice.held = False
        if slice.accounted:
            self.accounted -= slice.size
        self._drop(slice)

    def free(self, offset):
        """The client lets go of what was published at `offset`. Raises Errno ENXIO if nothing was."""
        if offset == self.size:
            return
        slice: Slice = self._busy.get(offset)
        if slice is None or not slice.published:
            raise Errno(errno.ENXIO, f"nothing that could be freed begins at {offset}")
        slice.published = False
        self._drop(slice)

    def statistics(self):
        """What is in use now."""
        used = sum([slice.size for slice in self._busy.values()])
        return Statistics(self.size, used, self.accounted, len(self._busy))

    def _drop(self, slice):
        if slice.held or slice.published:
            return
        del self._busy[slice.offset]
        free: Slice = Slice(slice.offset, slice.size, False)
        before: Slice = slice.before
        behind: Slice = slice.behind
        if behind is not None and not (behind.held or behind.published):
            del self._free[self._place(behind.size, behind.offset)]
            free.size += behind.size
            behind = behind.behind
        if before is not None and not (before.held or before.published):
            del self._free[self._place(before.size, before.offset)]
            free.offset = before.offset
            free.size += before.size
            before = before.before
        _join(before, free)
        _join(free, behind)
        self._free.insert(self._place(free.size, free.offset), free)

    def _place(self, size, offset) -> cython.Py_ssize_t:
        """Where in the order of the free ones a slice belongs."""
        each: Slice
        low: cython.Py_ssize_t = 0
        high: cython.Py_ssize_t = len(self._free)
        middle: cython.Py_ssize_t
        while low < high:
            middle = (low + high) // 2
            each = self._free[middle]
            if each.size < size or (each.size == size and each.offset < offset):
                low = middle + 1
            else:
                high = middle
        return low


def _join(before, behind):
    """One comes right behind the other; None is the end of the pool."""
    if before is not None:
        before.behind = behind
    if behind is not None:
        behind.before = before


@cython.cclass
class _Share:
    def __init__(self):
        self.memory = self.messages = self.fds = 0


@cython.cclass
class Quota:
    """What each sending user has queued in one connection's pool."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._shares = {}

    def check(self, user, memory, fds):
        """Raise Errno if `user` may not queue a message of `memory` bytes with `fds` descriptors.

        ENOBUFS: too many bytes or messages; EMFILE: too many descriptors.
        """
        share: _Share = self._shares.get(user) or _Share()
        left: int64_t = self._pool.size // 2 - self._pool.accounted
        most: int64_t = (left + share.memory) // 3
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

    def add(self, user, memory, fds):
        """Count a message. Raises Errno as `check` does, and then counts nothing."""
        self.check(user, memory, fds)
        share: _Share = self._shares.get(user)
        if share is None:
            share = self._shares[user] = _Share()
        share.memory += memory
        share.messages += 1
        share.fds += fds

    def remove(self, user, memory, fds):
        """A message that was added is no longer queued."""
        share: _Share = self._shares[user]
        share.memory -= memory
        share.messages -= 1
        share.fds -= fds
        if not share.messages:
            del self._shares[user]
