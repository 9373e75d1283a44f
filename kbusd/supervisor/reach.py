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
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress

from kbusd.cuse import replies
from kbusd.rings import entries, memfd
from kbusd.rings.line import LineError, close_all
from kbusd.supervisor import caller, calls
from kbusd.supervisor.holder import Holder

MAX_THREADS = 32
MAX_STUCK_PER_UID = 8
MAX_COPY = 32 << 20
SMALL_COPY = 64 << 10  # what goes in a message; more goes by memfd
MAX_PUSH = 256 << 10  # in one write; more are several


class Aside:
    """Keeps a thread free for everything else while some do what may never end."""

    def __init__(self, start_thread: Callable[[], None], threads: int) -> None:
        self._start = start_thread
        self._threads = threads
        self._stuck: Counter[int] = Counter()  # by uid
        self._lock = threading.Lock()

    @contextmanager
    def work(self, uid: int) -> Iterator[None]:
        """Do something for this uid. Raises LineError if too much of that takes too long."""
        with self._lock:
            if self._stuck[uid] == MAX_STUCK_PER_UID or self._stuck.total() == MAX_THREADS - 1:
                raise LineError(f"{self._stuck[uid]} requests of uid {uid} are stuck already")
            self._stuck[uid] += 1
            if self._stuck.total() == self._threads:
                self._threads += 1
                self._start()
        try:
            yield
        finally:
            with self._lock:
                self._stuck[uid] -= 1


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
        for fd in caller.descriptors(tid, numbers):
            fds.append(fd)
            if not ours.isdisjoint(calls.devices_of(fd)):
                raise OSError(errno.ELOOP, "a file of our own")
    except OSError as error:
        number = error.errno or errno.EBADF
    try:
        holder.send(entries.Given(unique, number), [] if number else fds)
    finally:
        close_all(fds)
