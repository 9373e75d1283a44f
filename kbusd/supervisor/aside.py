# ruff: noqa: F821  (names without a definition here come from .pxd files)
"""Where threads do what may never end (reach.py); sees when the one that listens does not come back.

A thread says so before it reaches into a client, and again when it is back. Another looks every
TICK_SECONDS, while there is traffic, whether the listener is still at the same piece of work: without
Python's lock, so as to cost nobody anything.
"""

import threading

import cython
from cython.cimports.cpython.pythread import PyThread_get_thread_ident
from cython.cimports.kbusd.supervisor.libc import close, nanosleep, timespec
from cython.cimports.libc.stdint import int64_t

MAX_THREADS = 32
MAX_STUCK_PER_UID = 8
TICK_SECONDS = 0.002
_TICK_NS = cython.declare(cython.long, 2_000_000)


class Crowded(Exception):
    """Too much is stuck already. Whoever is at the other end need not be to blame for that."""


@cython.cclass
class Aside:
    def __init__(self, take_over, start):
        """`take_over`: see to it that the event of `event` is off; `start`: have another thread listen, or
        raise RuntimeError."""
        self.event = -1
        self.stuck = {}
        self.left = []
        self.take_over = take_over
        self.start = start
        self.watched = True
        self.wanted = threading.Semaphore(0)
        self.lock = threading.Lock()
        threading.Thread(target=self._watch, name="kbusd-watch", daemon=True).start()

    def work(self, uid: int64_t):
        """Do something for this uid. Raises Crowded if too much of that takes too long."""
        work: Work = Work.__new__(Work)
        work.aside = self
        work.uid = uid
        return work

    def enter(self, uid: int64_t):
        """See `work`. Nobody gets more than half of the threads that are left. What is sure to end counts for
        itself: its uid is ~uid."""
        count: cython.int = self.stuck.get(uid, 0)
        if self._full(uid, count):
            raise Crowded(f"{count} requests of uid {uid} are stuck already")
        self.stuck[uid] = count + 1
        self.inside += uid >= 0
        self.begun += 1
        if PyThread_get_thread_ident() == self.listener:
            self.at = self.begun
        if not self.watched:
            self.watched = True
            self.wanted.release()

    def leave(self, uid: int64_t):
        """See `work`."""
        count: cython.int = self.stuck.pop(uid) - 1
        if count:
            self.stuck[uid] = count
        self.inside -= uid >= 0
        if PyThread_get_thread_ident() == self.listener:
            self.at = 0
        else:
            with self.lock:
                pass  # another thread takes over, and first sees to it that our event is off

    def _full(self, uid, count) -> cython.bint:
        return count >= MAX_STUCK_PER_UID or (
            uid >= 0 and 2 * count >= MAX_THREADS - 1 - self.inside
        )

    def close(self, uid: int64_t, fd: cython.int):
        """Close it for this uid, who may have seen to it that this takes for ever; later, if too much
        does already."""
        if self._full(uid, self.stuck.get(uid, 0)):
            self.left.append((uid, fd))
            return
        self.enter(uid)
        with cython.nogil:
            close(fd)
        self.leave(uid)

    def owes(self, uid: int64_t):
        """Whether there is something to be closed for this uid that could not be yet."""
        return any(each == uid for each, _ in self.left)

    def close_left(self):
        """Try again to close what could not be."""
        for _ in range(len(self.left)):
            if self.left:  # else another thread does the same
                self.close(*self.left.pop(0))

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
                while not self._started():
                    self._nap()  # whoever comes back meanwhile ends, which makes room
            elif not self.watched:
                self.wanted.acquire()

    def _started(self) -> cython.bint:
        try:
            self.start()
        except RuntimeError:
            return False
        return True

    def _nap(self):
        tick: timespec
        tick.tv_sec = 0
        tick.tv_nsec = _TICK_NS
        with cython.nogil:
            nanosleep(cython.address(tick), cython.NULL)

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
