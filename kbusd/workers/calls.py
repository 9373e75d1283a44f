# cython: boundscheck=False
"""The calls of our client that nobody has answered yet: who may answer which, and until when.

A reply is let in because it was asked for, by this list and not by the word of the callee's worker.
"""

from collections import deque

import cython
from cython.cimports.kbusd.rings.clock import monotonic
from cython.cimports.libc.stdint import uint64_t


@cython.cclass
class Calls:
    """By serial. Callees are ids of connections, our own among them."""

    def __init__(self):
        self.callees = {}
        self.due = deque()

    def limit(self, most: int, timeout: int) -> None:
        """At most `most` at once, each for `timeout` ms, if that is above 0."""
        self.most = most
        self.reply_ns = max(timeout, 0) * 1_000_000

    def are_many(self) -> cython.bint:
        """Whether there are as many as there may be."""
        return cython.cast(cython.size_t, len(self.callees)) >= self.most

    def open(self, serial, callee) -> cython.void:
        """Our client has called `callee`."""
        self.callees[serial] = callee
        if self.reply_ns:
            self.due.append((monotonic() + self.reply_ns, serial, callee))

    def wait_for(self, serial, callee) -> cython.bint:
        """Whether call `serial` is open and for `callee` to answer."""
        return self.callees.get(serial) == callee

    def close(self, serial) -> cython.bint:
        """Call `serial` is answered; False if it was not open."""
        return self.callees.pop(serial, None) is not None

    def close_all_of(self, callee) -> list:
        """Nobody will answer what `callee` was asked: the serials."""
        serials = [each for each, asked in self.callees.items() if asked == callee]
        for serial in serials:
            del self.callees[serial]
        return serials

    def late(self) -> list:
        """Serials of calls that were not answered in time; they are closed."""
        now: uint64_t = monotonic()
        serials = []
        while self.due and self.due[0][0] <= now:
            _, serial, callee = self.due.popleft()
            if self.wait_for(serial, callee):
                del self.callees[serial]
                serials.append(serial)
        return serials

    def left(self) -> cython.int:
        """How many ms there are until `late` has something; -1 if it never will."""
        now: uint64_t = monotonic()
        while self.due:
            at, serial, callee = self.due[0]
            if self.wait_for(serial, callee):
                return 1 + (at - now) // 1_000_000 if at > now else 0
            self.due.popleft()
        return -1
