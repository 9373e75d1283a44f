# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""Ring: bytes in a memfd from one producer to one consumer; unicast frames.

Positions are byte counts that only grow; a frame stands at its position modulo the size. The
data is mapped twice back to back, so that every frame lies in a row. The first page holds the
producer's words: its head, and whether it wants space. The consumer publishes its position in
its own status page. What either side reads of the other is range-checked.
"""

import cython
from cython.cimports.kbusd.rings.atomics import (
    copy_words,
    fence_seq_cst,
    load_acquire,
    store_release,
)
from cython.cimports.kbusd.rings.frame import HEAD, FrameHead, frame_length, sound
from cython.cimports.kbusd.rings.libc import close
from cython.cimports.kbusd.rings.memfd import PAGE, map_twice, unmap_twice
from cython.cimports.kbusd.rings.status import StatusPage, StatusView
from cython.cimports.libc.stdint import int64_t, uint8_t, uint64_t
from cython.cimports.libc.string import memcpy

from kbusd.rings import memfd
from kbusd.rings.memfd import RingError
from kbusd.rings.values import Frame, ReaderStatistics, RingStatistics

MAX_SIZE = cython.declare(cython.size_t, 64 * 1024 * 1024)  # more than any honest peer asks for
WANT_AT = cython.declare(cython.int, 8)


@cython.cclass
class Ring:
    """The producer's side. `size` is a power of two of at least a page. Raises OSError.

    Frames written before `attach` wait in the ring. No page but the first exists until written."""

    def __cinit__(self):
        self.fd = -1

    def __init__(self, size: cython.size_t = 262144, name: str = "kbusd-ring"):
        if size < PAGE or size > MAX_SIZE or size & (size - 1):
            raise ValueError(f"a ring of {size} bytes")
        self.fd = memfd.make(name, PAGE + size)
        self.size = size
        self.base = map_twice(self.fd, size, True)
        if self.base == cython.NULL:
            raise OSError("a ring could not be mapped")
        memfd.seal(self.fd)
        self.data = self.base + PAGE

    def __dealloc__(self):
        unmap_twice(self.base, self.size)
        if self.fd >= 0:
            close(self.fd)

    def attach(self, reader: StatusView, slot: cython.int) -> cython.void:
        """The consumer publishes its position in `slot` of `reader`. Raises RingError."""
        self.claimed = reader.place(slot)
        self.reader = reader

    def reserve(self, length) -> cython.pointer(uint8_t):
        """Room for a frame of `length` bytes, a multiple of 8; NULL if there is none now.

        The room is the caller's until `commit` or the next `reserve`."""
        claim: uint64_t
        if self.position - self.tail + length > self.size:
            self.full += 1
            if self.claimed == cython.NULL or self.broken:
                return cython.NULL
            # Pairs with RingReader.publish: the reader is done with what we overwrite.
            claim = load_acquire(self.claimed)
            if claim - self.tail > self.position - self.tail:
                self.broken = True  # behind what it has read before, or ahead of our head
                return cython.NULL
            self.tail = claim
            if self.position - self.tail + length > self.size:
                return cython.NULL
        self.reserved = length
        return self.data + (self.position & (self.size - 1))

    def commit(self) -> cython.void:
        """The reserved frame is complete: the consumer may read it."""
        self.position += self.reserved
        self.reserved = 0
        self.frames += 1
        # Pairs with RingReader.head: whoever sees the new head sees the frame.
        store_release(cython.cast(cython.pointer(uint64_t), self.base), self.position)

    def want_space(self, on) -> cython.void:
        """Frames wait for room: ask the consumer to ring when it has read something. Then try
        `reserve` once more before sleeping; clear it when the last that waits is committed.

        So that no other frame of this producer overtakes one that waits, say it before publishing
        any. Across producers order holds if this one sends nothing new in the meantime."""
        # Pairs with RingReader.producer_waits: off means that all before is in the ring.
        store_release(cython.cast(cython.pointer(uint64_t), self.base + WANT_AT), on)
        if on:
            # Pairs with the fence in RingReader.publish: my flag, then its position; it publishes
            # its position, then looks at my flag.
            fence_seq_cst()

    def close_fd(self) -> None:
        """After hand-over: the mapping stays."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def fileno(self) -> int:
        return self.fd

    def connect(self, reader: StatusView, slot: cython.int) -> None:
        """`attach` for Python."""
        self.attach(reader, slot)

    def write(self, frame: Frame) -> bool:
        """Write one frame (`position` is ignored); False if there is no room now."""
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
        place: cython.pointer(uint8_t) = self.reserve(head.length)
        if place == cython.NULL:
            return False
        memcpy(place, cython.address(head), HEAD)
        memcpy(place + HEAD, cython.cast(cython.p_char, envelope), len(envelope))
        memcpy(place + HEAD + len(envelope), cython.cast(cython.p_char, body), len(body))
        self.commit()
        return True

    def wait_for_space(self, on: bool) -> None:
        """`want_space` for Python."""
        self.want_space(on)

    def statistics(self) -> RingStatistics:
        return RingStatistics(
            self.size,
            self.position,
            self.frames,
            self.position - self.tail,
            self.full,
            self.broken,
        )


@cython.cclass
class RingReader:
    """The consumer's side of a peer's ring; `fd` stays the caller's. Raises RingError.

    `mine` and `slot` are where I publish my position; other slots are other rings'."""

    def __init__(self, fd: cython.int, mine: StatusPage, slot: cython.int):
        size: int64_t = memfd.check_seals(fd, 2 * PAGE, PAGE + MAX_SIZE) - PAGE
        if size & (size - 1):
            raise RingError(f"a ring has {size} bytes, which is no power of two")
        self.base = map_twice(fd, size, False)
        if self.base == cython.NULL:
            raise RingError("a peer's ring could not be mapped")
        self.size = size
        self.data = self.base + PAGE
        self.mine = mine
        self.slot = slot
        mine.publish(slot, 0)

    def __dealloc__(self):
        unmap_twice(self.base, self.size)

    def head(self) -> uint64_t:
        """How far the producer has written. Not checked: `peek` does."""
        # Pairs with Ring.commit.
        return load_acquire(cython.cast(cython.pointer(cython.const[uint64_t]), self.base))

    def look(self, at, upto, out) -> cython.int:
        """Copy the head of the frame at `at` before `upto`: 1, 0 there is none, -1 hostile."""
        available: uint64_t = upto - at
        if available == 0:
            return 0
        if available > self.size or available < HEAD:
            return -1
        copy_words(out, self.data + (at & (self.size - 1)), HEAD // 8)
        return 1 if sound(out, available) else -1

    def peek(self, upto, out, payload) -> cython.int:
        """The next frame before `upto`, which was `head`: 1, 0 there is none, -1 it is hostile.

        `out` is a copy. `payload` (may be NULL) points into shared memory, which a hostile
        producer can still change: copy first, check the copy."""
        code: cython.int = self.look(self.position, upto, out)
        if code == 1:
            self.peeked = out.length
            if payload != cython.NULL:
                payload[0] = self.data + (self.position & (self.size - 1)) + HEAD
        return code

    def advance(self) -> cython.void:
        """Done with the frame that `peek` gave."""
        self.position += self.peeked
        self.frames += self.peeked != 0
        self.peeked = 0

    def publish(self) -> cython.bint:
        """Let the producer reuse what I am done with. True: it waits for that, ring it."""
        self.mine.set(self.slot, self.position)
        # Pairs with the fence in Ring.want_space.
        fence_seq_cst()
        return self.producer_waits()

    def producer_waits(self) -> cython.bint:
        """Whether the producer holds frames that found no room."""
        # Pairs with Ring.want_space. Look at this before `head`: off, then all is before head.
        return (
            load_acquire(cython.cast(cython.pointer(cython.const[uint64_t]), self.base + WANT_AT))
            != 0
        )

    def read(self) -> Frame | None:
        """Take the next frame, copied. Raises RingError if the producer broke a rule."""
        head: FrameHead
        payload: cython.pointer(cython.const[uint8_t])
        code: cython.int = self.peek(self.head(), cython.address(head), cython.address(payload))
        if code == 0:
            return None
        if code < 0:
            raise RingError("a peer's ring holds a frame or a head out of range")
        envelope = cython.cast(cython.p_char, payload)[: head.envelope_length]
        start: cython.size_t = head.envelope_length
        body = cython.cast(cython.p_char, payload)[start : start + head.body_length]
        self.advance()
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

    def release(self) -> bool:
        """`publish` for Python."""
        return self.publish()

    def statistics(self) -> ReaderStatistics:
        return ReaderStatistics(
            self.size, self.position, self.frames, (self.head() - self.position) & (2**64 - 1)
        )
