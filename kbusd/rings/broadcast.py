# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""Broadcast: bytes in a memfd from one producer to any number of read-only consumers.

As a Ring, but the producer may overwrite what somebody has not read yet: its `tail` is the lowest
position that still holds what was written there. A consumer copies a frame out and then looks
at `tail` again: if it has passed, the copy is worth nothing and the reader was overrun. Who must
not be overrun is the producer's business (`limit`, fanout.py); of the control log, nobody: who
was overrun there loads a snapshot.

A producer that puts one message into several rings is between the first and the last of them for
a moment; `begin` and `end` say so to all who map its Broadcast. (Else a subscriber could get the
answer of another one before the signal that it answers; merge.py waits for the end.)

Control page: u64 head, u32 want_space, at byte 16 u64 tail, u64 begun; one cache line.
"""

from __future__ import annotations

import cython
from cython.cimports.kbusd.rings.atomics import (
    copy_words,
    fence_acquire,
    fence_release,
    fence_seq_cst,
    load_acquire,
    load_acquire32,
    store_release,
    store_release32,
)
from cython.cimports.kbusd.rings.frame import HEAD, FrameHead, frame_length, sound
from cython.cimports.kbusd.rings.libc import close
from cython.cimports.kbusd.rings.memfd import PAGE, map_twice, unmap_twice
from cython.cimports.libc.stdint import int64_t, uint8_t, uint32_t, uint64_t
from cython.cimports.libc.stdlib import free, malloc
from cython.cimports.libc.string import memcpy, memset

from kbusd.rings import memfd
from kbusd.rings.memfd import RingError
from kbusd.rings.values import BroadcastStatistics, Frame, ReaderStatistics

MAX_SIZE = cython.declare(cython.size_t, 64 * 1024 * 1024)  # more than any honest peer asks for
WANT_AT = cython.declare(cython.int, 8)
TAIL_AT = cython.declare(cython.int, 16)
BEGUN_AT = cython.declare(cython.int, 24)
NOBODY = 2**64 - 1  # the limit when no reader is to be spared


class Overrun(RingError):
    """The producer has overwritten what this reader had not read yet."""


@cython.cclass
class Broadcast:
    """The producer's side. `size` is a power of two of at least a page. Raises OSError."""

    def __cinit__(self):
        self.fd = -1

    def __init__(self, size: cython.size_t = 1024 * 1024, name: str = "kbusd-broadcast"):
        if size < PAGE or size > MAX_SIZE or size & (size - 1):
            raise ValueError(f"a Broadcast of {size} bytes")
        self.fd = memfd.make(name, PAGE + size)
        self.size = size
        self.base = map_twice(self.fd, size, True)
        if self.base == cython.NULL:
            raise OSError("a Broadcast could not be mapped")
        memfd.seal(self.fd)
        self.data = self.base + PAGE

    def __dealloc__(self):
        unmap_twice(self.base, self.size)
        if self.fd >= 0:
            close(self.fd)

    def reserve(self, length, limit) -> cython.pointer(uint8_t):
        """Room for a frame of `length` bytes, a multiple of 8, that overwrites nothing at or
        behind position `limit`; NULL if there is none. The room is the caller's until `commit`."""
        end: uint64_t = self.position + length
        if length > self.size:
            return cython.NULL
        if end - self.tail > self.size:
            if end - self.size > limit:
                self.full += 1
                return cython.NULL
            self.tail = end - self.size
            # Release: who sees that it was overrun sees what was sent by Ring instead before.
            store_release(cython.cast(cython.pointer(uint64_t), self.base + TAIL_AT), self.tail)
            # Pairs with the fence in BroadcastReader.copy: whoever has copied a byte that we write
            # from here on sees this tail.
            fence_release()
        self.reserved = length
        return self.data + (self.position & (self.size - 1))

    def commit(self) -> cython.void:
        """The reserved frame is complete: consumers may read it."""
        self.position += self.reserved
        self.reserved = 0
        self.frames += 1
        # Pairs with BroadcastReader.head: whoever sees the new head sees the frame.
        store_release(cython.cast(cython.pointer(uint64_t), self.base), self.position)

    def want_space(self, on) -> cython.void:
        """Ask the consumers to ring when they have read something; then look again."""
        store_release32(cython.cast(cython.pointer(uint32_t), self.base + WANT_AT), on)
        if on:
            # Pairs with the fence in BroadcastReader.producer_waits.
            fence_seq_cst()

    def begin(self, stamp) -> cython.void:
        """What follows, with stamps from `stamp` on, goes into more than one ring, until `end`."""
        # Pairs with BroadcastReader.begun: whoever sees a frame that follows sees this.
        store_release(cython.cast(cython.pointer(uint64_t), self.base + BEGUN_AT), stamp)
        fence_release()

    def end(self) -> cython.void:
        """It stands in all of them."""
        # Pairs with BroadcastReader.begun: whoever sees this sees all frames before.
        store_release(cython.cast(cython.pointer(uint64_t), self.base + BEGUN_AT), 0)

    def append(self, kind: int, stamp: int, envelope: bytes, body: bytes) -> int:
        """Write one frame, whoever has not read what it overwrites; the position behind it.

        Raises ValueError for a frame larger than the whole."""
        if not self.write(Frame(kind, stamp, envelope, body), NOBODY):
            raise ValueError(f"a frame of {len(envelope) + len(body)} bytes")
        return self.position

    def write(self, frame: Frame, limit: uint64_t) -> bool:
        """Write one frame (`position` is ignored); False if that would pass `limit`."""
        head: FrameHead
        envelope: bytes = frame.envelope
        body: bytes = frame.body
        head.length = frame_length(len(envelope), len(body))
        head.kind = frame.kind
        head.flags = frame.flags
        head.fds = frame.fds
        head.stamp = frame.stamp
        head.serial = frame.serial
        head.reply_serial = frame.reply_serial
        head.envelope_length = len(envelope)
        head.body_length = len(body)
        head.aux = frame.aux
        place: cython.pointer(uint8_t) = self.reserve(head.length, limit)
        if place == cython.NULL:
            return False
        memcpy(place, cython.address(head), HEAD)
        memcpy(place + HEAD, cython.cast(cython.p_char, envelope), len(envelope))
        memcpy(place + HEAD + len(envelope), cython.cast(cython.p_char, body), len(body))
        self.commit()
        return True

    def open_many(self, stamp: int) -> None:
        """`begin` for Python."""
        self.begin(stamp)

    def close_many(self) -> None:
        """`end` for Python."""
        self.end()

    def close_fd(self) -> None:
        """After hand-over: the mapping stays."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def fileno(self) -> int:
        return self.fd

    def statistics(self) -> BroadcastStatistics:
        return BroadcastStatistics(self.size, self.position, self.frames, self.tail, self.full)


@cython.cclass
class BroadcastReader:
    """A consumer's side; `fd` stays the caller's. `position` is where to begin.

    Raises RingError when made. Nobody else sees `position`: where the producer is to spare this
    reader, publish it in a slot of the status page."""

    def __init__(self, fd: cython.int, position: uint64_t = 0):
        size: int64_t = memfd.check_seals(fd, 2 * PAGE, PAGE + MAX_SIZE) - PAGE
        if size & (size - 1):
            raise RingError(f"a Broadcast has {size} bytes, which is no power of two")
        self.base = map_twice(fd, size, False)
        if self.base == cython.NULL:
            raise RingError("a peer's Broadcast could not be mapped")
        self.size = size
        self.data = self.base + PAGE
        self.position = position

    def __dealloc__(self):
        unmap_twice(self.base, self.size)

    def seek(self, position: uint64_t) -> None:
        """Read on from `position`, the beginning of a frame."""
        self.position = position

    def head(self) -> uint64_t:
        """How far the producer has written. Not checked: `look` and `copy` do."""
        # Pairs with Broadcast.commit.
        return load_acquire(cython.cast(cython.pointer(cython.const[uint64_t]), self.base))

    def tail(self) -> uint64_t:
        """The lowest position that can still be read."""
        # Pairs with Broadcast.reserve.
        return load_acquire(
            cython.cast(cython.pointer(cython.const[uint64_t]), self.base + TAIL_AT)
        )

    def begun(self) -> uint64_t:
        """The stamp from which on frames may stand in some rings and not yet in others; or 0."""
        # Pairs with Broadcast.begin and end. Look at this before the heads.
        return load_acquire(
            cython.cast(cython.pointer(cython.const[uint64_t]), self.base + BEGUN_AT)
        )

    def producer_waits(self) -> cython.bint:
        """Whether the producer waits for readers to get on. Call after publishing my position."""
        # Pairs with the fence in Broadcast.want_space.
        fence_seq_cst()
        return (
            load_acquire32(cython.cast(cython.pointer(cython.const[uint32_t]), self.base + WANT_AT))
            != 0
        )

    def look(self, at, upto, out) -> cython.int:
        """Copy the head of the frame at `at` before `upto`: 1, 0 none, HOSTILE or OVERRUN."""
        available: uint64_t = upto - at
        if available == 0:
            return 0
        if available <= self.size:
            copy_words(out, self.data + (at & (self.size - 1)), HEAD // 8)
            # Pairs with the fence in Broadcast.reserve.
            fence_acquire()
        if self.tail() > at:
            return -2
        return 1 if available <= self.size and sound(out, available) else -1

    def copy(self, upto, out, to, room) -> cython.int:
        """Copy the next frame before `upto`, its head to `out` and what follows to `to`.

        1, 0 there is none, HOSTILE, OVERRUN, or NO_ROOM if it needs more than `room` bytes."""
        code: cython.int = self.look(self.position, upto, out)
        if code != 1:
            return code
        if out.length - HEAD > room:
            return -3
        memcpy(to, self.data + (self.position & (self.size - 1)) + HEAD, out.length - HEAD)
        # Pairs with the fence in Broadcast.reserve.
        fence_acquire()
        return 1 if self.tail() <= self.position else -2

    def advance(self, length) -> cython.void:
        """Done with the frame of `length` bytes that `look` or `copy` gave."""
        self.position += length
        self.frames += 1

    def read(self) -> Frame | None:
        """Take the next frame. Raises Overrun, or RingError if the producer broke a rule."""
        head: FrameHead
        memset(cython.address(head), 0, HEAD)
        upto: uint64_t = self.head()
        code: cython.int = self.look(self.position, upto, cython.address(head))
        if code == 0:
            return None
        buffer: cython.pointer(uint8_t) = cython.NULL
        try:
            if code == 1:
                buffer = cython.cast(cython.pointer(uint8_t), malloc(head.length))
                if buffer == cython.NULL:
                    raise MemoryError
                code = self.copy(upto, cython.address(head), buffer, head.length)
            if code == -2:
                raise Overrun(f"overwritten up to {self.tail()}, read up to {self.position}")
            if code != 1:
                raise RingError("a Broadcast holds a frame or a head out of range")
            text: cython.p_char = cython.cast(cython.p_char, buffer)
            start: cython.size_t = head.envelope_length
            envelope = text[:start]
            body = text[start : start + head.body_length]
        finally:
            free(buffer)
        self.advance(head.length)
        return Frame(
            head.kind,
            head.stamp,
            envelope,
            body,
            self.position,
            head.flags,
            head.fds,
            head.serial,
            head.reply_serial,
            head.aux,
        )

    def statistics(self) -> ReaderStatistics:
        return ReaderStatistics(
            self.size, self.position, self.frames, (self.head() - self.position) & (2**64 - 1)
        )
