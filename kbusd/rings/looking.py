"""How long to look for something to do before sleeping: learnt, as a hypervisor learns it (halt polling).

To be woken often takes longer than what is done then. So the time to look grows while sleeps turn out short, and is
nothing once one was long: who has nothing to do does not look. Who looks lets everybody else go first, by
sched_yield(2). If that takes long, somebody computes on this core: who yields waits for a whole slice of his, who
sleeps is woken ahead of him. So there is a pause. But on a virtual machine it takes long as well because the host
ran something else, some ten times a second, and between processes that share a core for a client because of each other.
So the pause is short, and doubles while the next looks soon fare no better.
"""

import cython
from cython.cimports.libc.stdint import uint64_t

LEAST = cython.declare(uint64_t, 10_000)  # ns
RARE = cython.declare(
    uint64_t, 32
)  # times what it costs, before which it was not: the pause is the shortest again


@cython.cclass
class Looking:
    """Times are in ns. `most`: to look no longer than that, nor for what takes longer to come. `contended`: to give
    way takes no longer if nobody computes. `pause`, the shortest and the longest, are times what that has cost."""

    def __init__(self, most: uint64_t, contended: uint64_t, pause: tuple[int, int]):
        self.most_ns = most
        self.contended_ns = contended
        self.least_pause, self.most_pause = pause
        self.pause = self.least_pause

    def gave_way(self, before, now) -> cython.void:
        """To somebody else, from one time to the other."""
        cost: uint64_t = now - before
        if cost > self.contended_ns:
            if before > self.not_before + RARE * cost:
                self.pause = self.least_pause
            else:
                self.pause = min(2 * self.pause, self.most_pause)
            self.for_ns = 0
            self.not_before = now + self.pause * cost

    def slept(self, begin, end) -> cython.void:
        """From one time to the other, till there was something to do."""
        if end - begin >= self.most_ns:
            self.for_ns = 0
        elif self.for_ns < self.most_ns and begin >= self.not_before:
            self.for_ns = self.for_ns * 2 if self.for_ns else LEAST

    def expect(self, ns) -> cython.void:
        """Something is about to come: look for it so long, this once. 0: it has come."""
        self.for_ns = ns

    def note_gave_way(self, before: uint64_t, now: uint64_t) -> None:
        """`gave_way` for Python."""
        self.gave_way(before, now)

    def note_slept(self, begin: uint64_t, end: uint64_t) -> None:
        """`slept` for Python."""
        self.slept(begin, end)
