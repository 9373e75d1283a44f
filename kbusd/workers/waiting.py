# cython: boundscheck=False
"""How a worker waits: it looks for work for a moment, then sleeps until a descriptor or a doorbell.

Whether looking pays is learnt (rings/looking.py). Frames in the rings are work, too, and
ring the doorbell of a worker only if its status page says that it sleeps.
"""

import cython
from cython.cimports.kbusd.rings.clock import monotonic
from cython.cimports.kbusd.rings.looking import Looking
from cython.cimports.kbusd.rings.merge import Merge
from cython.cimports.kbusd.rings.status import StatusPage
from cython.cimports.kbusd.workers.libc import (
    EINTR,
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    EPOLL_CTL_DEL,
    EPOLL_CTL_MOD,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    epoll_wait,
    errno,
    sched_yield,
)
from cython.cimports.libc.stdint import uint64_t

MOST_EVENTS = cython.declare(cython.int, 8)
# To look for, in ns; when somebody computes on our core; and for how many times the cost of that not to look. What a
# client sends by a socket comes sooner than what another process has to pass on.
LOOKING = (50_000, 200_000, (100, 100))
LOOKING_FOR_REQUESTS = (100_000, 500_000, (20, 320))
# Where a peer has promised something, look for it so often, mostly in vain for less than 10 µs; then
# leave the core to whoever it waits for.
HELD_LOOKS = cython.declare(cython.int, 50)


@cython.cclass
class Waiting:
    """`merge` knows what stands in the rings; `status` says to peers whether we sleep."""

    def __init__(self, merge: Merge, status: StatusPage):
        self.merge = merge
        self.status = status
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        self.looking = Looking(*LOOKING)

    def for_requests(self) -> cython.void:
        """What comes is passed on by the supervisor, who is woken for it first."""
        self.looking = Looking(*LOOKING_FOR_REQUESTS)

    def watch(self, fd, source, events) -> cython.void:
        """From now on `wait` gives events of `fd` with `source` in their data. Raises OSError."""
        event: epoll_event
        event.events = events
        event.data.u32 = source
        if epoll_ctl(self.epoll, EPOLL_CTL_ADD, fd, cython.address(event)) < 0:
            raise OSError(errno, "epoll_ctl")

    def change(self, fd, source, events) -> cython.void:
        """Other events of a descriptor that is watched."""
        event: epoll_event
        event.events = events
        event.data.u32 = source
        epoll_ctl(self.epoll, EPOLL_CTL_MOD, fd, cython.address(event))

    def forget(self, fd) -> cython.void:
        event: epoll_event
        epoll_ctl(self.epoll, EPOLL_CTL_DEL, fd, cython.address(event))

    def wait(self, events, timeout) -> cython.int:
        """Wait for at most `timeout` ms, -1 as long as it takes. Fills in up to 8 `events` and
        returns their number; 0 also if there is something in the rings. Raises OSError."""
        count: cython.int = 0
        self.held = self.held + 1 if self.merge.holding else 0
        if self.looking.for_ns and not self.held:
            count = self._poll(events)
        if count == 0:
            count = self._sleep(events, timeout)
        if count == -1 and errno != EINTR:
            raise OSError(errno, "epoll_wait")
        return count if count > 0 else 0

    def _poll(self, events) -> cython.int:
        """Look for something to do without sleeping, for `looking.for_ns` at the most: events as
        epoll_wait(2) gives them, -2 if a ring has something, 0 if time is up.

        Whoever else can run goes first; the wake-up that a short wait saves costs more than it."""
        count: cython.int
        now: uint64_t = monotonic()
        until: uint64_t = now + self.looking.for_ns
        pending: cython.bint
        while True:
            pending = self.merge.pending()
            # What the client wrote before a frame came goes before it, so look at the client last.
            count = epoll_wait(self.epoll, events, MOST_EVENTS, 0)
            if count != 0 or pending or now >= until:
                return count if count != 0 else -2 if pending else 0
            now = self._yield(now)

    def _yield(self, before) -> uint64_t:
        """Let whoever else can run go first: the time after it."""
        sched_yield()
        now: uint64_t = monotonic()
        self.looking.gave_way(before, now)
        return now

    def give_way(self) -> cython.bint:
        """Let whoever else can run go first; False if we had better sleep."""
        now: uint64_t = monotonic()
        return now >= self.looking.not_before and self._yield(now) >= self.looking.not_before

    def _sleep(self, events, timeout) -> cython.int:
        """Sleep until something comes; how long it was decides how long `_poll` will look."""
        count: cython.int
        begin: uint64_t = monotonic()
        self.status.set_sleeping(True)  # pairs with Peer.ring_bell: publish, fence, look
        if self.merge.pending():
            timeout = 1 if self.held > HELD_LOOKS else 0
        count = epoll_wait(self.epoll, events, MOST_EVENTS, timeout)
        self.status.set_sleeping(False)
        if timeout != 0:
            self.looking.slept(begin, monotonic())
        return count
