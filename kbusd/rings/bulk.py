# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""The bulk area: warm shared memory for the large bodies that one worker sends to another.

A fresh page costs more than what is copied into it (a MiB of them some 400 µs, a copy 30), so the
sender's worker receives its client's body into pages that it keeps; the receiver's maps them read-
only, copies the body out and then checks the copy. A frame of kind BULK says where the body
stands: `aux` is offset << 32 | length; length 0 means that the area is given up. An area is told
of by its first frame (BULK_FRESH). For bodies above BULK_MOST there is a larger one instead. A body that no bytes can make invalid, such as "ay", is not
even copied: its receiver's worker lends it to the client's queue, which sends it from there.

Better still, most of such a body does not enter the area: it goes through pipes and the carrier
(pagepipe.py). Its room is reserved all the same, for its beginning, for what finds no room in the sender's
pipe or the carrier, and for all of it if it turns out to be for somebody else. Such a frame has two u32 as its
body: where in the message's body the part begins that is in the carrier, and its length. Only one is
on its way at a time, and only while nothing of the area is in use; so the carrier is empty before.

What a frame took is free once the receiver has counted the frame as done, in its status page; the
Ring's position does not say that, as a reader that catches up takes frames out before their turn
(fanout.py, rule 7). Space is given out in order, and from the start whenever all of it is free,
so that question and answer use the same pages again. The receiver trusts the seals and the size;
an offset out of range is the sender's fault, a count out of range the receiver's.
"""

from __future__ import annotations

from collections import deque

import cython
from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize
from cython.cimports.kbusd.rings.atomics import load_acquire
from cython.cimports.kbusd.rings.libc import EAGAIN, close
from cython.cimports.kbusd.rings.memfd import (
    RING_SEALS,
    add_seals,
    create,
    map_whole,
    unmap_whole,
)
from cython.cimports.kbusd.rings.pagepipe import make_carrier, make_pipe
from cython.cimports.kbusd.rings.status import StatusPage, StatusView
from cython.cimports.libc.stdint import uint8_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcpy

from kbusd.rings import memfd
from kbusd.rings.memfd import RingError
from kbusd.rings.values import BulkStatistics

ALIGN = cython.declare(cython.size_t, 64)
DRY = cython.declare(cython.int, 8)


@cython.cclass
class Bulk:
    """The sender's side; counts go on from one area to the next. `idle` is the caller's to raise
    and is 0 after each use that needs an area of that `size`. Raises RingError for a slot that does not exist."""

    def __cinit__(self):
        self.fd = -1

    def __init__(self, reader: StatusView, slot: cython.int):
        self.reader = reader
        self.claimed = reader.bulk_place(slot)
        self.spans = deque()

    def __dealloc__(self):
        unmap_whole(self.base, self.size)
        self.close_fd()

    def open(self, size, carrier) -> cython.int:
        """Have an area of `size` bytes (BULK_SIZE or BULK_LARGE): 0 or -errno. No page of it exists yet.

        `carrier`: our end of one, which stays the caller's, or -1."""
        if self.base != cython.NULL:
            return 0
        code: cython.int = create(b"kbusd-bulk", size)
        if code < 0:
            return code
        self.fd = code
        self.size = size
        self.base = map_whole(self.fd, size, True)
        code = -12 if self.base == cython.NULL else add_seals(self.fd, RING_SEALS)
        if code < 0:
            unmap_whole(self.base, size)
            self.base = cython.NULL
            self.size = 0
            self.close_fd()
        self.told = False
        self.carrier = make_carrier(carrier) if code >= 0 else None
        if self.carrier is not None:
            self.carrier.widen()
        return code

    def close_fd(self) -> cython.void:
        """After hand-over: the mapping stays."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def reserve(self, length) -> cython.pointer(uint8_t):
        """Room for a body, the caller's until `commit` or `cancel`; NULL if there is none now.

        One at a time. The room stays mapped as long as this object lives or is not released."""
        at: cython.size_t
        first: cython.size_t
        last: cython.size_t
        need: cython.size_t = (length + ALIGN - 1) & ~(ALIGN - 1)
        if self.base == cython.NULL or self.reserved or length == 0:
            return cython.NULL
        if length > (self.size if self.size > BULK_SIZE else BULK_MOST):
            return cython.NULL
        self._settle()
        if self.broken:
            return cython.NULL
        at = 0
        if self.spans:
            first = self.spans[0][0]
            at = self.spans[len(self.spans) - 1][1]
            last = self.spans[len(self.spans) - 1][0]
            if last < first:  # it has gone round
                if first - at < need:
                    return cython.NULL
            elif self.size - at < need:
                if first < need:
                    return cython.NULL
                at = 0
        self.reserved = length
        self.reserved_at = at
        if length > BULK_MOST or self.size == BULK_SIZE:
            self.idle = 0
        return self.base + at

    def commit(self) -> uint64_t:
        """The reserved room is filled, and a frame with the `aux` returned is about to be sent.

        If that has BULK_FRESH, `fd` goes with it. Raises ValueError if nothing is reserved."""
        if self.reserved == 0:
            raise ValueError("no room in the bulk area is reserved")
        aux: uint64_t = cython.cast(uint64_t, self.reserved_at) << 32 | self.reserved
        end: cython.size_t = (self.reserved_at + self.reserved + ALIGN - 1) & ~(ALIGN - 1)
        self.spans.append((self.reserved_at, end))
        self.sent += 1
        self.reserved = 0
        if not self.told:
            self.told = True
            aux |= BULK_FRESH
        self.piping = False
        self.piped = 0
        return aux

    def cancel(self) -> cython.void:
        """The reserved room is not needed after all, nor what is in the pipe."""
        self.take_back()
        self.reserved = 0

    def begin_pipe(self, at, pipe) -> cython.bint:
        """Of the body that room is reserved for, let what is behind byte `at` go through `pipe`, which
        is empty again after `carry` or `cancel`; False if that is not possible now."""
        self.piping = (
            self.reserved > 0 and self.carrier is not None and not self.spans and pipe.inside == 0
        )
        self.pipe = pipe
        self.piped = 0
        self.piped_at = at
        return self.piping

    def splice_from(self, source, most) -> cython.Py_ssize_t:
        """PagePipe.fill. While that moves something the body's bytes come this way, and once it
        can't, the rest belongs into the reserved room."""
        moved: cython.Py_ssize_t = self.pipe.fill(source, most)
        if moved > 0:
            self.piped += moved
            self.dry = 0
        elif moved == -EAGAIN:
            # It is most often the socket that has nothing more; if for long, look at the pipe.
            self.dry += 1
            if self.dry % DRY == 0 and self.pipe.full():
                self.piping = False
        elif moved < 0:
            self.piping = False
        return moved

    def take_back(self) -> cython.void:
        """Have what is in the pipe in the reserved room after all."""
        if self.piped:
            self.pipe.take(self.base + self.reserved_at + self.piped_at)
        self.pipe = None
        self.piping = False
        self.piped = 0

    def carry(self) -> cython.bint:
        """Move what is in the pipe on to the receiver's worker, before `commit`: whether anything of it
        goes that way. What finds no room is in the reserved room then."""
        whole: cython.size_t = self.piped
        while self.piped and self.pipe.inside:
            if self.pipe.pour(self.carrier.fd) <= 0:
                self.piped = whole - self.pipe.inside
                self.pipe.take(self.base + self.reserved_at + self.piped_at + self.piped)
        self.pipe = None
        self.piping = False
        return self.piped > 0

    def release(self) -> cython.bint:
        """Give the area up, unless something of it is in use. True: tell the receiver, by a frame
        with `aux` 0."""
        if self.base == cython.NULL or self.reserved:
            return False
        self._settle()
        if self.spans:
            return False
        unmap_whole(self.base, self.size)
        self.base = cython.NULL
        self.size = 0
        self.carrier = None
        self.close_fd()
        return self.told

    def _settle(self) -> cython.int:
        """Free what the receiver is done with."""
        # Pairs with BulkView.done: it has copied what we overwrite.
        claim: uint64_t = load_acquire(self.claimed)
        if claim - self.done > self.sent - self.done:
            self.broken = True  # less than it has counted before, or more than we have sent
            return 0
        while self.done != claim:
            self.spans.popleft()
            self.done += 1
        return 0

    # -- for Python ------------------------------------------------------------------------------

    def make(self, large: bool = False, carrier: int = -1) -> None:
        """`open` for Python. Raises OSError."""
        code: cython.int = self.open(BULK_LARGE if large else BULK_SIZE, carrier)
        if code < 0:
            raise OSError(-code, "a bulk area could not be had")

    def put(self, body: bytes) -> int | None:
        """Copy a body in: the `aux` of its frame, or None if there is no room now."""
        room: cython.pointer(uint8_t) = self.reserve(len(body))
        if room == cython.NULL:
            return None
        memcpy(room, cython.cast(cython.p_char, body), len(body))
        return self.commit()

    def put_carried(
        self, body: bytes, at: int, source: int, keep: bool = False
    ) -> tuple[int, int, int]:
        """As `put`, but what is behind byte `at` of it comes from a socket, and goes by the carrier unless
        it is to be kept: the frame's `aux`, and what the carrier has: from which byte on, how many.

        Raises ValueError if there is no room."""
        room: cython.pointer(uint8_t) = self.reserve(len(body))
        whole: cython.pointer(uint8_t) = cython.cast(
            cython.pointer(uint8_t), cython.cast(cython.p_char, body)
        )
        have: cython.size_t = at
        length: cython.size_t = len(body)
        if room == cython.NULL:
            raise ValueError("no room in the bulk area")
        memcpy(room, whole, have)
        if self.begin_pipe(have, make_pipe()):
            while have < length and self.splice_from(source, length - have) > 0:
                have = at + self.piped
        memcpy(room + have, whole + have, length - have)
        if keep:
            self.take_back()
        self.carry()
        count: cython.size_t = self.piped
        return self.commit(), at, count

    def give_up(self) -> bool:
        """`release` for Python."""
        return self.release()

    def rest(self) -> None:
        """One more period without use."""
        self.idle += 1

    def statistics(self) -> BulkStatistics:
        return BulkStatistics(self.base != cython.NULL, self.sent, self.done, self.broken)


@cython.cclass
class Area:
    """A peer's bulk area, mapped read-only as long as somebody uses it."""

    def __dealloc__(self):
        unmap_whole(self.base, self.size)


NOT_LENT = cython.declare(cython.int, 0)
LENDING = cython.declare(cython.int, 1)  # the frame at hand
LENT = cython.declare(cython.int, 2)  # a frame before


@cython.cclass
class BulkView:
    """The receiver's side. `slot` of `mine` is that of the sender's Ring."""

    def __init__(self, mine: StatusPage, slot: cython.int):
        self.mine = mine
        self.slot = slot

    def open(self, fd: cython.int, carrier: cython.int) -> cython.void:
        """Map a new area instead of the old. `fd` and our end of the carrier (or -1) stay the
        caller's. Raises RingError."""
        size: cython.size_t = memfd.check_seals(fd, BULK_SIZE, BULK_LARGE)
        self.release()
        area: Area = Area()
        area.size = size
        area.base = map_whole(fd, size, False)
        if area.base == cython.NULL:
            raise RingError("a peer's bulk area could not be mapped")
        area.carrier = make_carrier(carrier)
        self.area = area

    def release(self) -> cython.void:
        self.area = None  # what is lent of it stays mapped
        self.count += self.later
        if self.lent == LENT:
            self.count += 1
        self.lent = NOT_LENT
        self.later = 0
        self.piped = 0

    def place(self, aux) -> cython.pointer(cython.const[uint8_t]):
        """Where a frame's body stands, in shared memory: copy first, check the copy. NULL if the
        frame is wrong about it."""
        at: uint64_t = (aux & ~BULK_FRESH) >> 32
        length: uint64_t = aux & 0xFFFFFFFF
        if self.area is None or length == 0 or length > self.area.size:
            return cython.NULL
        if at > self.area.size - length:
            return cython.NULL
        return self.area.base + at

    def announce(self, data, size, aux) -> cython.bint:
        """The frame at hand says in its `size` bytes at `data` what of its body is in the carrier:
        `piped` bytes from `piped_at` on, to be taken out in any case. False if it is wrong."""
        part: uint32_t[2]
        length: uint64_t = aux & 0xFFFFFFFF
        if size != 8 or self.area is None or self.area.carrier is None:
            return False
        memcpy(part, data, 8)
        if part[0] == 0 or part[1] == 0 or cython.cast(uint64_t, part[0]) + part[1] > length:
            return False
        if part[1] > BULK_MOST:
            return False
        self.piped_at = part[0]
        self.piped = part[1]
        return True

    def drain(self) -> cython.bint:
        """Nobody wants what is in the carrier; False if it is not there."""
        return len(self.whole(cython.NULL, self.piped)) > 0

    def whole(self, body, length) -> bytes:
        """The body at hand, of `length` bytes at `body` (if not NULL) and in the carrier, copied; empty
        if it is not there."""
        data: bytes = PyBytes_FromStringAndSize(cython.NULL, length)
        place: cython.pointer(uint8_t) = cython.cast(
            cython.pointer(uint8_t), cython.cast(cython.p_char, data)
        )
        count: cython.size_t = self.piped
        if body != cython.NULL:
            memcpy(place, body, length)
            place += self.piped_at
        self.piped = 0
        return data if count == 0 or self.area.carrier.take(place, count) else b""

    def lend(self) -> Area:
        """The body of the frame at hand stays in use until `back`; None if one is lent already.
        Those behind it are not free before it is."""
        if self.lent != NOT_LENT:
            return None
        self.lent = LENDING
        return self.area

    def back(self, area: Area) -> cython.void:
        """What was lent of `area` is not used any more."""
        if area is not self.area:
            return
        if self.lent == LENT:
            self.count += 1 + self.later
            self.later = 0
            self.mine.set_bulk(self.slot, self.count)
        self.lent = NOT_LENT

    def done(self) -> cython.void:
        """One more frame is dealt with, its body copied, lent or not wanted."""
        if self.lent == LENDING:
            self.lent = LENT
        elif self.lent == LENT:
            self.later += 1
        else:
            self.count += 1
            self.mine.set_bulk(self.slot, self.count)

    def close(self) -> cython.void:
        """Before the slot is somebody else's."""
        self.release()
        self.mine.set_bulk(self.slot, 0)

    # -- for Python ------------------------------------------------------------------------------

    def map(self, fd: int, carrier: int = -1) -> None:
        """`open` for Python."""
        self.open(fd, carrier)

    def read_carried(self, aux: int, told: bytes) -> bytes:
        """`read` of a frame that says by `told` what the carrier has; empty if that is not true."""
        place: cython.pointer(cython.const[uint8_t]) = self.place(aux)
        data: cython.p_char = told
        if place == cython.NULL or not self.announce(
            cython.cast(cython.pointer(cython.const[uint8_t]), data), len(told), aux
        ):
            raise RingError("a body out of the bounds of the bulk area, or of the carrier")
        body = self.whole(place, aux & 0xFFFFFFFF)
        self.done()
        return body

    def read(self, aux: int) -> bytes:
        """Copy a frame's body out and count it. Raises RingError if it is out of range."""
        place: cython.pointer(cython.const[uint8_t]) = self.place(aux)
        if place == cython.NULL:
            raise RingError("a body out of the bounds of the bulk area")
        length: cython.size_t = aux & 0xFFFFFFFF
        body = cython.cast(cython.p_char, place)[:length]
        self.done()
        return body

    def keep(self, aux: int) -> tuple[object, bytes]:
        """Lend a frame's body and count the frame: what `give_back` wants, and a copy of the body."""
        place: cython.pointer(cython.const[uint8_t]) = self.place(aux)
        if place == cython.NULL:
            raise RingError("a body out of the bounds of the bulk area")
        length: cython.size_t = aux & 0xFFFFFFFF
        area = self.lend()
        self.done()
        return area, cython.cast(cython.p_char, place)[:length]

    def give_back(self, area: object) -> None:
        """`back` for Python."""
        self.back(area)

    def shut(self) -> None:
        """`close` for Python."""
        self.close()
