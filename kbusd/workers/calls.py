# cython: boundscheck=False
"""The calls of our client that nobody has answered yet: who may answer which, and until when.

A reply is let in because it was asked for, by this list and not by the word of the callee's worker.
"""

from collections import deque

import cython
from cython.cimports.kbusd.rings.clock import monotonic
from cython.cimports.libc.stdint import uint32_t, uint64_t


@cython.cclass
class Calls:
    """By callee and serial: a client may ask several with one serial. Callees are ids of connections, our own
    among them."""

    def __init__(self):
        self.asked = {}
        self.due = deque()

    def limit(self, most: int, timeout: int) -> None:
        """At most `most` at once, each for `timeout` ms, if that is above 0."""
        self.most = most
        self.reply_ns = max(timeout, 0) * 1_000_000

    def are_many(self) -> cython.bint:
        """Whether there are as many as there may be."""
        return cython.cast(cython.size_t, len(self.asked)) >= self.most

    def open(self, serial, callee) -> cython.bint:
        """Our client has called `callee`; False if it did so with this serial and has no answer yet."""
        key = _key(serial, callee)
        if key in self.asked:
            return False
        self.asked[key] = True
        if self.reply_ns:
            self.due.append((monotonic() + self.reply_ns, key))
        return True

    def wait_for(self, serial, callee) -> cython.bint:
        """Whether call `serial` is open and for `callee` to answer."""
        return _key(serial, callee) in self.asked

    def close(self, serial, callee) -> cython.bint:
        """`callee` has answered call `serial`; False if it was not open."""
        return self.asked.pop(_key(serial, callee), None) is not None

    def fail(self, serial, callee) -> cython.bint:
        """Our client is told that `callee` did not get call `serial`, which stays open, as it does on dbus-daemon;
        False if it was told so before, or it is not open."""
        key = _key(serial, callee)
        if not self.asked.get(key, False):
            return False
        self.asked[key] = False
        return True

    def forget(self, serial) -> cython.void:
        """Whoever was asked, nobody waits for the answer any more."""
        for key in [key for key in self.asked if key & 0xFFFFFFFF == serial]:
            del self.asked[key]

    def clear(self) -> cython.void:
        """Our client wants no answers any more."""
        self.asked.clear()
        self.due.clear()

    def close_all_of(self, callee) -> list:
        """Nobody will answer what `callee` was asked: the serials."""
        first: object = _key(0, callee)
        keys = [key for key in self.asked if first <= key <= first + 0xFFFFFFFF]
        for key in keys:
            del self.asked[key]
        return [key & 0xFFFFFFFF for key in keys]

    def late(self) -> list:
        """Serials of calls that were not answered in time; they are closed."""
        now: uint64_t = monotonic()
        serials = []
        while self.due and self.due[0][0] <= now:
            _, key = self.due.popleft()
            if self.asked.pop(key, None) is not None:
                serials.append(key & 0xFFFFFFFF)
        return serials

    def left(self) -> cython.int:
        """How many ms there are until `late` has something; -1 if it never will."""
        now: uint64_t = monotonic()
        while self.due:
            at, key = self.due[0]
            if key in self.asked:
                return 1 + (at - now) // 1_000_000 if at > now else 0
            self.due.popleft()
        return -1


@cython.cfunc
def _key(serial: uint32_t, callee: cython.longlong) -> object:
    return cython.cast(uint64_t, callee) << 32 | serial
