# cython: boundscheck=False
# ruff: noqa: F821  (names without a definition here come from .pxd files)
"""Which descriptor of an epoll has something to read, for its handler: looked for a moment, then slept for.

A client's call takes two wake-ups of ours, one after the other, and to be woken costs more than what is
done then. Whether looking pays is learnt as workers learn it (kbusd/rings/looking.py).
"""

import os

import cython
from cython.cimports.cpython.pythread import PyThread_get_thread_ident
from cython.cimports.kbusd.rings.looking import Looking
from cython.cimports.kbusd.supervisor.aside import Aside
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
from cython.cimports.kbusd.supervisor.relay import Room
from cython.cimports.libc.stdint import uint64_t

RETRY_MS = cython.declare(cython.int, 10)  # after so long, who is slow is tried again
WATCH_MS = cython.declare(cython.int, 1000)  # and what is watched is looked at
MANY = cython.declare(cython.int, 1024)  # events, after which it is, too

# ns. Where each wake-up has to start a core of a virtual machine, a worker's answer takes 100 to 150 µs. Who only
# shares our core is done within half a ms; who computes keeps it for one to four.
MOST = 200_000
CONTENDED = 500_000
PAUSE = (20, 320)  # so that a look that is in vain costs 5 % at first, then less than 1 %


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _now() -> uint64_t:
    time: timespec
    clock_gettime(CLOCK_MONOTONIC, cython.address(time))
    return time.tv_sec * 1_000_000_000 + time.tv_nsec


@cython.cclass
class Ready:
    """For one thread. `epoll`: its descriptor, which stays the caller's."""

    def __init__(self, epoll: cython.int):
        self.epoll = epoll
        self.looking = Looking(MOST, CONTENDED, PAUSE)

    def serve(self, devices, aside: Aside, handlers: dict, slow: set) -> None:
        """Listen, as that which is known to `aside`, till that is another one."""
        me: cython.ulong = PyThread_get_thread_ident()
        room: Room = Room()
        count: cython.uint = 0
        closings = devices.closings
        aside.listener = me
        while aside.listener == me:
            aside.event = fd = self._wait(
                RETRY_MS
                if slow or closings.busy or aside.left
                else (WATCH_MS if devices.watched else -1)
            )
            count += 1
            handler = handlers.get(fd)
            if handler is not None:  # else it was forgotten meanwhile, or time is up
                on = True
                try:
                    on = handler(room)
                except Exception as error:  # noqa: BLE001 (one client's event must not be the end of all)
                    devices.bug(error)
                if on is not None and (not on or aside.listener != me):
                    devices.turn(fd, handler, on)
                handler = None  # and with it a node that has been withdrawn
            if slow or closings.busy or aside.left or fd < 0 or count % MANY == 0:
                devices.flush()

    def _wait(self, timeout) -> cython.int:
        """The descriptor; -1 after `timeout` ms without any, if that is not -1. Raises OSError."""
        event: epoll_event
        count: cython.int
        with cython.nogil:
            count = self._look(cython.address(event)) if self.looking.for_ns else 0
            if count == 0:
                count = self._sleep(cython.address(event), timeout)
        if count < 0 and errno != EINTR:
            number: cython.int = errno
            raise OSError(number, os.strerror(number))
        return event.data.fd if count > 0 else -1

    def _look(self, event) -> cython.int:
        """Without sleeping; whoever else can run goes first."""
        count: cython.int
        now: uint64_t = _now()
        until: uint64_t = now + self.looking.for_ns
        before: uint64_t
        while True:
            count = epoll_wait(self.epoll, event, 1, 0)
            if count != 0 or now >= until:
                return count
            before = now
            sched_yield()
            now = _now()
            self.looking.gave_way(before, now)

    def _sleep(self, event, timeout) -> cython.int:
        begin: uint64_t = _now()
        count: cython.int = epoll_wait(self.epoll, event, 1, timeout)
        self.looking.slept(begin, _now())
        return count
