# ruff: noqa: F821  (names without a definition here come from .pxd files)
"""Where threads do what may never end (reach.py); sees when the one that listens does not come back.

A thread says so before it reaches into a client, and again when it is back. Another looks every
TICK_SECONDS, while there is traffic, whether the listener is still at the same piece of work: without
Python's lock, so as to cost nobody anything.
"""

import threading

import cython
from cython.cimports.cpython.pythread import PyThread_get_thread_ident
from cython.cimports.kbusd.supervisor.libc import nanosleep, timespec
from cython.cimports.libc.stdint import int64_t

from kbusd.rings.line import LineError

MAX_THREADS = 32
MAX_STUCK_PER_UID = 8
TICK_SECONDS = 0.002
_TICK_NS = cython.declare(cython.long, 2_000_000)


@cython.cclass
class Aside:
    def __init__(self, take_over):
        """`take_over`: have another thread listen."""
        self.event = -1
        self.stuck = {}
        self.take_over = take_over
        self.watched = True
        self.wanted = threading.Semaphore(0)
        self.lock = threading.Lock()
        threading.Thread(target=self._watch, name="kbusd-watch", daemon=True).start()

    def work(self, uid: int64_t):
        """Do something for this uid. Raises LineError if too much of that takes too long."""
        work: Work = Work.__new__(Work)
        work.aside = self
        work.uid = uid
        return work

    def enter(self, uid: int64_t):
        """See `work`."""
        count: cython.int = self.stuck.get(uid, 0)
        if count == MAX_STUCK_PER_UID or self.inside == MAX_THREADS - 1:
            raise LineError(f"{count} requests of uid {uid} are stuck already")
        self.stuck[uid] = count + 1
        self.inside += 1
        self.begun += 1
        if PyThread_get_thread_ident() == self.listener:
            self.at = self.begun
        if not self.watched:
            self.watched = True
            self.wanted.release()

    def leave(self, uid: int64_t):
        """See `work`."""
        self.stuck[uid] -= 1
        self.inside -= 1
        if PyThread_get_thread_ident() == self.listener:
            self.at = 0
        else:
            with self.lock:
                pass  # another thread takes over, and first sees to it that our event is off

    def let_go(self):
        """What this thread is going to do has to do with no other event of its descriptor."""
        if PyThread_get_thread_ident() == self.listener:
            self.event = -1

    def _watch(self):
        while True:
            if self._look():
                try:
                    self.take_over()
                finally:
                    self.lock.release()
            elif not self.watched:
                self.wanted.acquire()

    def _look(self) -> cython.bint:
        """Whether the listener is stuck, who is not it any more, and waits for `lock` should he come
        back. If not, nobody is at work, and nobody needs to be watched."""
        tick: timespec
        before: int64_t = -1
        count: int64_t = -1
        tick.tv_sec = 0
        tick.tv_nsec = _TICK_NS
        while True:
            with cython.nogil:
                while True:
                    nanosleep(cython.address(tick), cython.NULL)
                    if self.at == before if self.at else self.begun == count:
                        break
                    before = self.at
                    count = self.begun
            # With Python's lock, nobody comes or goes from here on.
            if self.at != 0 and self.at == before and self.lock.acquire(False):
                self.listener = 0
                self.at = 0
                return True
            if self.at == 0 and self.begun == count:
                self.watched = False
                return False
            before = self.at
            count = self.begun


@cython.cclass
class Work:
    """Aside.work, several times in each of a client's calls: a generator would take as long again."""

    def __enter__(self):
        self.aside.enter(self.uid)

    def __exit__(self, kind, error, trace):
        self.aside.leave(self.uid)
