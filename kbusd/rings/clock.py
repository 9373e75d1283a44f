# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""The hybrid logical clock: stamps that follow both time and cause.

A stamp is max(CLOCK_MONOTONIC in ns, the highest stamp seen + 1). One process sees its own stamps
and those of the frames it delivers, so whatever it sends has a higher stamp than all that it could
be a reaction to. A stamp far in the future is a lie and is not taken over: it would push every
clock of the bus ahead.
"""

from __future__ import annotations

import cython
from cython.cimports.kbusd.rings.libc import CLOCK_MONOTONIC, clock_gettime, timespec
from cython.cimports.libc.stdint import uint64_t

# Honest clocks run ahead of the time by some ns at most (the +1s); this is far above any of that.
MAX_AHEAD = cython.declare(uint64_t, 1_000_000_000)


def monotonic() -> uint64_t:
    """CLOCK_MONOTONIC in ns."""
    now: timespec
    clock_gettime(CLOCK_MONOTONIC, cython.address(now))
    return cython.cast(uint64_t, now.tv_sec) * 1_000_000_000 + now.tv_nsec


@cython.cclass
class Clock:
    """One per process. `last` is the highest stamp given out or witnessed."""

    def next(self) -> uint64_t:
        """The stamp for what happens now."""
        now: uint64_t = monotonic()
        self.last = now if now > self.last else self.last + 1
        return self.last

    def witness(self, stamp: uint64_t) -> cython.bint:
        """A frame with `stamp` was delivered. False: it is more than 1 s ahead of time, a lie."""
        if stamp > self.last:
            if stamp > monotonic() + MAX_AHEAD:
                return False
            self.last = stamp
        return True

    def tick(self) -> int:
        """`next` for Python."""
        return self.next()

    def see(self, stamp: int) -> bool:
        """`witness` for Python."""
        return self.witness(stamp)
