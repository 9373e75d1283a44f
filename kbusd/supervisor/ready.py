# cython: boundscheck=False
# ruff: noqa: F821  (names without a definition here come from .pxd files)
"""Which descriptor of an epoll has something to read: looked for a moment, then slept for.

A client's call takes two wake-ups of ours, one after the other, and to be woken costs more than what is
done then. Whether looking pays is learnt as workers learn it (kbusd/workers/waiting.py): the time grows
while sleeps turn out short, and is nothing once one was long, or if somebody else wants the core.
"""

import os

import cython
from cython.cimports.kbusd.supervisor.libc import (
    CLOCK_MONOTONIC,
    EINTR,
    clock_gettime,
    epoll_event,
    epoll_wait,
    errno,
    sched_yield,
    timespec,
)
from cython.cimports.libc.stdint import int64_t

LEAST = cython.declare(int64_t, 10_000)
MOST = cython.declare(int64_t, 50_000)
CONTENDED = cython.declare(int64_t, 200_000)
PAUSE = cython.declare(int64_t, 1_000_000_000)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _now() -> int64_t:
    time: timespec
    clock_gettime(CLOCK_MONOTONIC, cython.address(time))
    return time.tv_sec * 1_000_000_000 + time.tv_nsec


@cython.cclass
class Ready:
    """For one thread at a time. `epoll`: its descriptor, which stays the caller's."""

    def __init__(self, epoll: cython.int):
        self.epoll = epoll

    def wait(self, timeout: cython.int):
        """The descriptor; -1 after `timeout` ms without any, if that is not -1. Raises OSError."""
        event: epoll_event
        count: cython.int
        with cython.nogil:
            count = self._look(cython.address(event)) if self.look_ns else 0
            if count == 0:
                count = self._sleep(cython.address(event), timeout)
        if count < 0 and errno != EINTR:
            number: cython.int = errno
            raise OSError(number, os.strerror(number))
        return event.data.fd if count > 0 else -1

    def _look(self, event) -> cython.int:
        """Without sleeping; whoever else can run goes first."""
        count: cython.int
        now: int64_t = _now()
        until: int64_t = now + self.look_ns
        before: int64_t
        while True:
            count = epoll_wait(self.epoll, event, 1, 0)
            if count != 0 or now >= until:
                return count
            before = now
            sched_yield()
            now = _now()
            if now - before > CONTENDED:
                self.look_ns = 0
                self.look_from = now + PAUSE

    def _sleep(self, event, timeout) -> cython.int:
        """How long it was decides how long `_look` will look."""
        begin: int64_t = _now()
        count: cython.int = epoll_wait(self.epoll, event, 1, timeout)
        if _now() - begin >= MOST:
            self.look_ns = 0
        elif self.look_ns < MOST and begin >= self.look_from:
            self.look_ns = self.look_ns * 2 if self.look_ns else LEAST
        return count
