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


Going = dict[int, bool]
"""By their numbers, the requests at whose callers a thread is at work; not those that were answered meanwhile. Whether one may
be: not while one writes into its caller's memory. That has its effect, so its caller must not hear that it has none; and must
not end before it, as his thread may be another's then."""


def attend(
    aside: Aside, holder: Holder, order: Order, tid: int, ours: Set[int], going: Going
) -> None:
    """As `serve`; not at a caller who has his answer (`tid` -1), nor if too much is stuck. Raises LineError."""
    begin(order.unique, going, not isinstance(order, entries.Store))
    try:
        if tid < 0:
            return refuse(holder, order)
        with aside.work(holder.uid):
            serve(holder, order, tid, ours, going)
    except Crowded:
        refuse(holder, order)
    finally:
        going.pop(order.unique, None)


def serve(holder: Holder, order: Order, tid: int, ours: Set[int], going: Going) -> None:
    """Do it at this thread, and answer. `ours`: our own devices' numbers. Raises LineError."""
    match order:
        case entries.Copy():
            _copy(holder, tid, order, going)
        case entries.Store():
            _store(holder, tid, order)
        case entries.Take():
            _take(holder, tid, order, ours, going)


def refuse(holder: Holder, order: Order) -> None:
    """Not now. Who asks again does so from the beginning, so it must not be said of what has an effect."""
    match order:
        case entries.Copy(unique):
            holder.say(entries.Copied(unique, errno.EAGAIN, (), b""))
        case entries.Store(unique):
            holder.say(entries.Stored(unique, errno.ENOMEM))
        case entries.Take(unique):
            holder.say(entries.Given(unique, errno.EAGAIN))


def begin(unique: int, going: Going, may_be_answered: bool) -> None:
    """Nobody is at work there yet: its worker has been asked, and asks for one thing at a time. Raises LineError."""
    if unique in going:
        raise LineError(f"meddled with request {unique} before it was asked")
    going[unique] = may_be_answered


def facts(
    aside: Aside, holder: Holder, tid: int, unique: int, going: Going
) -> entries.Facts | entries.Stored:
    """Of a thread, in whose memory some of them are; nothing if they can't be had now. Not if it has its answer:
    by then `tid` is -1, or it may be gone, and another in its place. Raises LineError."""
    begin(unique, going, tid >= 0)
    found: dict[str, bytes] = {}
    with suppress(Crowded), aside.work(holder.uid):
        found = caller.facts(tid) if tid >= 0 else found
    known = going.pop(unique, False)
    return entries.Facts(unique, found) if known else entries.Stored(unique, errno.EINTR)


def check_ahead(wish: entries.Ahead, known: Mapping[int, Wish]) -> Wish:
    """Raises LineError."""
    total = wish.at_argument + _total(wish.ranges)
    count = len(known) + (wish.command not in known)
    if not (wish.at_argument >= 0 and total <= MAX_AHEAD and count <= MAX_AHEAD_COMMANDS):
        raise LineError(f"wants {total} bytes ahead, for {count} commands")
    if len(wish.ranges) > MAX_RANGES:
        raise LineError(f"wants {len(wish.ranges)} ranges ahead")
    return Wish(wish.at_argument, wish.ranges)


def _copy(holder: Holder, tid: int, order: entries.Copy, going: Going) -> None:
    """Memory of a thread, for Copy. Raises LineError."""
    unique, ranges = order.unique, order.ranges
    wanted = _total(ranges)
    buffer = bytearray(wanted) if wanted <= SMALL_COPY else mmap.mmap(-1, wanted)
    number = got = 0
    try:
        got = calls.read_memory(tid, ranges, buffer)
    except OSError as error:
        number = 0 if error.errno == errno.EFAULT else error.errno or errno.EPERM
    if not going.pop(unique, False):
        number, got = errno.EINTR, 0
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


def _store(holder: Holder, tid: int, order: entries.Store) -> None:
    """Bytes into the memory of a thread, for Store. Raises LineError."""
    ranges = tuple((address, len(data)) for address, data in order.parts)
    wanted = _total(ranges)
    try:
        done = calls.write_memory(tid, ranges, b"".join(data for _, data in order.parts))
        number = 0 if done == wanted else errno.EFAULT
    except OSError as error:
        number = error.errno or errno.EPERM
    holder.say(entries.Stored(order.unique, number))


def _total(ranges: tuple[tuple[int, int], ...]) -> int:
    total = sum(size for _, size in ranges)
    sane = all(0 <= address < 1 << 64 and size >= 0 for address, size in ranges)
    if not sane or total > MAX_COPY or len(ranges) > calls.MAX_RANGES:
        raise LineError(f"asked for {len(ranges)} ranges of {total} bytes")
    return total


def _take(holder: Holder, tid: int, order: entries.Take, ours: Set[int], going: Going) -> None:
    """Descriptors of a thread, for Take."""
    fds: list[int] = []
    number = 0
    try:
        for fd in caller.descriptors(tid, order.numbers, ours):
            fds.append(fd)
            if not ours.isdisjoint(calls.devices_of(fd)):  # another thread has put it there
                raise OSError(errno.ELOOP, "a device of our own")
    except OSError as error:
        number = error.errno or errno.EBADF
    number = number if going.pop(order.unique, False) else errno.EINTR
    try:
        if number or not holder.lend(entries.Given(order.unique, 0), fds, len(fds) * FD_COUNTS):
            holder.say(entries.Given(order.unique, number or errno.EAGAIN))
    finally:
        close_all(fds)
