"""What is done for the workers of devices at a caller whose request they hold: copy, take, look.

Privileged: reaches into another process, by the kernel's leave for ptrace(2). What comes from there is
passed on unread. All of it may take for ever: a client's memory may be a file of ours, or of a file
system that never answers, and so may be its descriptors, which even closing waits for. So aside.py
keeps count of the threads that are stuck.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping, Set
from contextlib import suppress

from kbusd.rings import entries, memfd
from kbusd.rings.line import LineError, close_all
from kbusd.supervisor import caller, calls
from kbusd.supervisor.aside import Aside, Crowded
from kbusd.supervisor.holder import Holder
from kbusd.supervisor.relay import MAX_AHEAD, MAX_RANGES, Wish

MAX_COPY = 32 << 20
SMALL_COPY = 64 << 10  # what goes in a message; more goes by memfd
MAX_AHEAD_COMMANDS = 16


FD_COUNTS = 1 << 20  # as so many bytes of memory, while nobody has read it

Order = entries.Copy | entries.Store | entries.Take


def serve(holder: Holder, order: Order, tid: int, ours: Set[int]) -> None:
    """Do it at this thread, and answer. `ours`: our own devices' numbers. Raises LineError."""
    match order:
        case entries.Copy(unique, ranges):
            _copy(holder, tid, unique, ranges)
        case entries.Store(unique, parts):
            _store(holder, tid, unique, parts)
        case entries.Take(unique, numbers):
            _take(holder, tid, unique, numbers, ours)


def refuse(holder: Holder, order: Order) -> None:
    """Not now. Who asks again does so from the beginning, so it must not be said of what has an effect."""
    match order:
        case entries.Copy(unique):
            holder.say(entries.Copied(unique, errno.EAGAIN, (), b""))
        case entries.Store(unique):
            holder.say(entries.Stored(unique, errno.ENOMEM))
        case entries.Take(unique):
            holder.say(entries.Given(unique, errno.EAGAIN))


def facts(aside: Aside, uid: int, tid: int) -> dict[str, bytes]:
    """Of a thread, in whose memory some of them are; nothing if they can't be had now."""
    with suppress(Crowded), aside.work(uid):
        return caller.facts(tid)
    return {}


def check_ahead(wish: entries.Ahead, known: Mapping[int, Wish]) -> Wish:
    """Raises LineError."""
    total = wish.at_argument + _total(wish.ranges)
    count = len(known) + (wish.command not in known)
    if not (wish.at_argument >= 0 and total <= MAX_AHEAD and count <= MAX_AHEAD_COMMANDS):
        raise LineError(f"wants {total} bytes ahead, for {count} commands")
    if len(wish.ranges) > MAX_RANGES:
        raise LineError(f"wants {len(wish.ranges)} ranges ahead")
    return Wish(wish.at_argument, wish.ranges)


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
    data = memoryview(buffer)[:got]
    if wanted <= SMALL_COPY:
        holder.say(entries.Copied(unique, number, tuple(sizes), bytes(data)))
        return
    fd = memfd.sealed("kbusd-copy", data)  # written without Python's lock
    try:
        if not holder.lend(entries.Copied(unique, number, tuple(sizes), b""), [fd], wanted):
            holder.say(entries.Copied(unique, errno.EAGAIN, (), b""))
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
    holder.say(entries.Stored(unique, number))


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
        if number or not holder.lend(entries.Given(unique, 0), fds, len(fds) * FD_COUNTS):
            holder.say(entries.Given(unique, number or errno.EAGAIN))
    finally:
        close_all(fds)
