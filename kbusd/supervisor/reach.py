"""What is done for the workers of devices at a caller whose request they hold: copy, take, look.

Privileged: reaches into another process, by the kernel's leave for ptrace(2). What comes from there is
passed on unread. All of it may take for ever: a client's memory may be a file of ours, or of a file
system that never answers, and so may be its descriptors, which even closing waits for. So `Aside`
keeps count of the threads that are stuck.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Set
from contextlib import suppress

from kbusd.cuse import replies
from kbusd.rings import entries, memfd
from kbusd.rings.line import LineError, close_all
from kbusd.supervisor import caller, calls
from kbusd.supervisor.holder import Holder

MAX_THREADS = 32
TICK_SECONDS = 0.002
MAX_STUCK_PER_UID = 8
MAX_COPY = 32 << 20
SMALL_COPY = 64 << 10  # what goes in a message; more goes by memfd
MAX_AHEAD = 8 << 10
MAX_AHEAD_RANGES = 8
MAX_AHEAD_COMMANDS = 16
MAX_PUSH = 256 << 10  # in one write; more are several


class _Work:
    """Aside.work, several times in each of a client's calls: a generator would take as long again."""

    __slots__ = ("_aside", "_uid")

    def __init__(self, aside: Aside, uid: int) -> None:
        self._aside, self._uid = aside, uid

    def __enter__(self) -> None:
        self._aside.enter(self._uid)

    def __exit__(self, *_: object) -> None:
        self._aside.leave(self._uid)


class Aside:
    """Where threads do what may never end; sees when the one that listens does not come back."""

    def __init__(self, take_over: Callable[[], None]) -> None:
        """`take_over`: have another thread listen."""
        self.listener = 0  # the thread's number
        self._take_over = take_over
        self._inside: dict[int, int] = {}  # by thread: the how manieth piece of work it is at
        self._begun = 0
        self._stuck: Counter[int] = Counter()  # by uid
        self._lock = threading.Lock()
        self._watched = True
        self._wanted = threading.Semaphore()
        threading.Thread(target=self._watch, name="kbusd-watch", daemon=True).start()

    def work(self, uid: int) -> _Work:
        """Do something for this uid. Raises LineError if too much of that takes too long."""
        return _Work(self, uid)

    def enter(self, uid: int) -> None:
        """See `work`."""
        with self._lock:
            if self._stuck[uid] == MAX_STUCK_PER_UID or len(self._inside) == MAX_THREADS - 1:
                raise LineError(f"{self._stuck[uid]} requests of uid {uid} are stuck already")
            self._stuck[uid] += 1
            self._begun += 1
            self._inside[threading.get_ident()] = self._begun
            if not self._watched:
                self._watched = True
                self._wanted.release()

    def leave(self, uid: int) -> None:
        """See `work`."""
        with self._lock:
            self._stuck[uid] -= 1
            del self._inside[threading.get_ident()]

    def _watch(self) -> None:
        """Every moment, as long as there is work."""
        while True:
            self._wanted.acquire()
            before = count = -1
            while self._watched:
                time.sleep(TICK_SECONDS)
                with self._lock:
                    now = self._inside.get(self.listener, 0)
                    if now and now == before:
                        self.listener = 0
                        self._take_over()
                    self._watched = bool(now) or self._begun != count
                    before, count = now, self._begun


Wish = entries.Copy | entries.Store | entries.Take | entries.AskFacts


def serve(holder: Holder, wish: Wish, tid: int, ours: Set[int]) -> None:
    """Do it at this thread, and answer. `ours`: our own devices' numbers. Raises LineError."""
    match wish:
        case entries.Copy(unique, ranges):
            _copy(holder, tid, unique, ranges)
        case entries.Store(unique, parts):
            _store(holder, tid, unique, parts)
        case entries.Take(unique, numbers):
            _take(holder, tid, unique, numbers, ours)
        case entries.AskFacts(unique):
            holder.send(entries.Facts(unique, caller.facts(tid)))


Parts = tuple[tuple[int, bytes], ...]
"""Memory of a caller: addresses, and what is there."""


def check_ahead(wish: entries.Ahead, known: Mapping[int, entries.Ahead]) -> None:
    """Raises LineError."""
    total = wish.at_argument + _total(wish.ranges)
    count = len(known) + (wish.command not in known)
    if not (wish.at_argument >= 0 and total <= MAX_AHEAD and count <= MAX_AHEAD_COMMANDS):
        raise LineError(f"wants {total} bytes ahead, for {count} commands")
    if len(wish.ranges) > MAX_AHEAD_RANGES:
        raise LineError(f"wants {len(wish.ranges)} ranges ahead")


def look(tid: int, wish: entries.Ahead, argument: int) -> Parts:
    """What there is of that at a thread, up to the first range that is not whole."""
    ranges = ((argument, wish.at_argument), *wish.ranges) if wish.at_argument else wish.ranges
    buffer = bytearray(wish.at_argument + sum(size for _, size in wish.ranges))
    try:
        left = calls.read_memory(tid, ranges, buffer)
    except OSError:
        return ()
    found, at = [], 0
    for address, size in ranges:
        if at + size > left:
            break
        found.append((address, bytes(buffer[at : at + size])))
        at += size
    return tuple(found)


def push(fuse: int, holder: Holder, offset: int, size: int) -> None:
    """Bytes of the pool into the page cache of its file."""
    end = offset + size if offset >= 0 else 0
    while offset < end and not holder.released:
        data = os.pread(holder.pool, min(end - offset, MAX_PUSH), offset)
        if not data:
            return  # behind the end of the pool
        with suppress(OSError):  # it is closed meanwhile
            os.write(fuse, replies.store(holder.node, offset, data))
        offset += len(data)


def _copy(holder: Holder, tid: int, unique: int, ranges: tuple[tuple[int, int], ...]) -> None:
    """Memory of a thread, for Copy. Raises LineError."""
    wanted = _total(ranges)
    buffer = bytearray(wanted) if wanted <= SMALL_COPY else mmap.mmap(-1, wanted)
    number = got = 0
    try:
        got = calls.read_memory(tid, ranges, buffer)
    except OSError as error:
        number = 0 if error.errno == errno.EFAULT else error.errno or errno.EPERM
    sizes, left = [], got
    for _, size in ranges:
        sizes.append(min(size, left))
        left -= sizes[-1]
    data = buffer[:got]
    if wanted <= SMALL_COPY:
        holder.send(entries.Copied(unique, number, tuple(sizes), bytes(data)))
        return
    fd = memfd.sealed("kbusd-copy", bytes(data))
    try:
        holder.send(entries.Copied(unique, number, tuple(sizes), b""), [fd])
    finally:
        os.close(fd)


def _store(holder: Holder, tid: int, unique: int, parts: tuple[tuple[int, bytes], ...]) -> None:
    """Bytes into the memory of a thread, for Store. Raises LineError."""
    ranges = tuple((address, len(data)) for address, data in parts)
    wanted = _total(ranges)
    try:
        done = calls.write_memory(tid, ranges, b"".join(data for _, data in parts))
        number = 0 if done == wanted else errno.EFAULT
    except OSError as error:
        number = error.errno or errno.EPERM
    holder.send(entries.Stored(unique, number))


def _total(ranges: tuple[tuple[int, int], ...]) -> int:
    total = sum(size for _, size in ranges)
    sane = all(0 <= address < 1 << 64 and size >= 0 for address, size in ranges)
    if not sane or total > MAX_COPY or len(ranges) > calls.MAX_RANGES:
        raise LineError(f"asked for {len(ranges)} ranges of {total} bytes")
    return total


def _take(holder: Holder, tid: int, unique: int, numbers: tuple[int, ...], ours: Set[int]) -> None:
    """Descriptors of a thread, for Take."""
    fds: list[int] = []
    number = 0
    try:
        for fd in caller.descriptors(tid, numbers, ours):
            fds.append(fd)
            if not ours.isdisjoint(calls.devices_of(fd)):  # another thread has put it there
                raise OSError(errno.ELOOP, "a device of our own")
    except OSError as error:
        number = error.errno or errno.EBADF
    try:
        holder.send(entries.Given(unique, number), [] if number else fds)
    finally:
        close_all(fds)
