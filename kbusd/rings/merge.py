# cython: boundscheck=False
"""Merge: what stands in all inbound rings and the log, in causal order.

If f1 happened before f2 then f1 has the lower stamp and was published first. A reader that looks at
one head after the other can see f2 and miss f1, whose ring it had looked at before. So it looks at
all heads twice. Whatever happened before a frame that the first scan saw is there by the second.
Where the second finds something new, everything below the lowest new stamp is the same in both
scans and so lacks nothing: that much is delivered, in the order of stamps, the rest at the next
gather. (DESIGN.md, "Order"; there the scan is repeated until two agree, which a busy sender can
put off. To cut at the lowest new stamp needs no third scan and rests on the same argument.)

Sources are hostile. One whose frames break a rule, whose stamps do not rise or lie in the future,
is put aside and reported by `take_broken`. One that keeps the cut below everything else by
publishing old stamps all the time is left out of account after a few scans: it loses its own place
in the order and nobody else's.
"""

from __future__ import annotations

import cython
from cython.cimports.kbusd.rings.atomics import load_acquire
from cython.cimports.kbusd.rings.broadcast import BroadcastReader
from cython.cimports.kbusd.rings.clock import Clock
from cython.cimports.kbusd.rings.frame import FrameHead
from cython.cimports.kbusd.rings.ring import RingReader
from cython.cimports.libc.stdint import uint8_t, uint64_t
from cython.cimports.libc.stdlib import free, realloc
from cython.cimports.libc.string import memset

EVERYTHING = cython.declare(uint64_t, 2**64 - 1)
MAX_BLAME = cython.declare(
    cython.int, 3
)  # an honest worker is held up between stamp and commit once
MAX_SCANS = cython.declare(cython.int, 64)

REASONS = {
    -1: "a frame, or the head, is out of range",
    -2: "overrun: frames were overwritten before they were read",
    -3: "stamps do not rise from frame to frame",
    -4: "a stamp is more than 1 s ahead of time",
}


@cython.cclass
class Merge:
    """`clock` witnesses the stamps of what is delivered.

    gather, then next until None, then publish. A source is a RingReader or a BroadcastReader."""

    def __init__(self, clock: Clock = None):
        self.clock = clock
        self.current = -1
        self.readers = []
        self.broken = []

    def __dealloc__(self):
        free(self.table)
        free(self.ready)
        free(self.buffer)

    def add(self, reader: object) -> None:
        """Merge what comes from `reader`, from its position on. Ends the batch."""
        ring: RingReader
        broadcast: BroadcastReader
        source: cython.pointer(Source)
        self._settle()
        if self.sources == self.room:
            room: cython.int = self.room * 2 if self.room else 8
            table = cython.cast(
                cython.pointer(Source), realloc(self.table, room * cython.sizeof(Source))
            )
            if table == cython.NULL:
                raise MemoryError
            self.table = table
            ready = cython.cast(cython.p_int, realloc(self.ready, room * cython.sizeof(cython.int)))
            if ready == cython.NULL:
                raise MemoryError
            self.ready = ready
            self.room = room
        source = self.table + self.sources
        memset(source, 0, cython.sizeof(Source))
        source.reader = cython.cast(cython.p_void, reader)
        if isinstance(reader, RingReader):
            ring = reader
            source.is_ring = True
            source.position = ring.position
            source.head_at = cython.cast(cython.pointer(cython.const[uint64_t]), ring.base)
        elif isinstance(reader, BroadcastReader):
            broadcast = reader
            source.position = broadcast.position
            source.head_at = cython.cast(cython.pointer(cython.const[uint64_t]), broadcast.base)
        else:
            raise TypeError("a source is a RingReader or a BroadcastReader")
        self.readers.append(reader)
        self.sources += 1
        self.count = 0

    def remove(self, reader: object) -> None:
        """Forget `reader`, if it is a source. Ends the batch: what is left comes again."""
        index: cython.int = self._index(reader)
        if index < 0:
            return
        if self.current == index:
            self.held = reader  # its payload may still be in use
        self._settle()
        self.count = 0
        self.sources -= 1
        self.table[index] = self.table[self.sources]
        self.readers[index] = self.readers[self.sources]
        self.readers.pop()

    def _index(self, reader) -> cython.int:
        i: cython.int
        for i in range(self.sources):
            if self.table[i].reader == cython.cast(cython.p_void, reader):
                return i
        return -1

    def _look(self, source, at, upto, head) -> cython.int:
        if source.is_ring:
            return cython.cast(RingReader, source.reader).look(at, upto, head)
        return cython.cast(BroadcastReader, source.reader).look(at, upto, head)

    def _break(self, source, code) -> cython.void:
        source.bad = True
        self.broken.append((cython.cast(object, source.reader), REASONS[code]))

    def _settle(self) -> cython.void:
        """The frame that `next` gave is done with."""
        source: cython.pointer(Source)
        if self.current < 0:
            return
        source = self.table + self.current
        self.current = -1
        if source.bad:
            return
        source.position += self.length
        source.last = source.stamp
        source.unpublished = True
        if source.is_ring:
            cython.cast(RingReader, source.reader).peeked = self.length
            cython.cast(RingReader, source.reader).advance()
        else:
            cython.cast(BroadcastReader, source.reader).advance(self.length)

    def _first(self, index) -> cython.bint:
        """Find the stamp of the source's next frame. True: it can be delivered."""
        head: FrameHead
        source: cython.pointer(Source) = self.table + index
        code: cython.int
        if source.bad or source.position == source.seen:
            return False
        code = self._look(source, source.position, source.seen, cython.address(head))
        if code == 1 and head.stamp <= source.last:
            code = -3
        if code != 1:
            self._break(source, code)
            return False
        source.stamp = head.stamp
        return head.stamp < self.cut

    def gather(self) -> cython.int:
        """Scan all heads. How many sources have something to deliver; then call `next`."""
        head: FrameHead
        source: cython.pointer(Source)
        i: cython.int
        scan: cython.int
        lowest: cython.int
        code: cython.int
        found: cython.bint = False
        self._settle()
        self.held = None
        self.count = 0
        for i in range(self.sources):
            source = self.table + i
            source.seen = load_acquire(source.head_at)
            source.blame = 0
            found |= source.seen != source.position and not source.bad
        if not found:
            return 0
        for scan in range(MAX_SCANS):
            self.cut = EVERYTHING
            lowest = -1
            for i in range(self.sources):
                source = self.table + i
                source.newer = load_acquire(source.head_at)
                if source.newer == source.seen or source.bad:
                    continue
                code = self._look(source, source.seen, source.newer, cython.address(head))
                if code != 1:
                    self._break(source, code)
                elif head.stamp < self.cut and source.blame < MAX_BLAME:
                    self.cut = head.stamp
                    lowest = i
            for i in range(self.sources):
                if self._first(i):
                    self.ready[self.count] = i
                    self.count += 1
            if self.count or lowest < 0:
                break
            self.table[lowest].blame += 1
            for i in range(self.sources):
                self.table[i].seen = self.table[i].newer
        return self.count

    def next(self, head, payload):
        """The source of the next frame, or None at the end of the batch.

        `head` is a copy. `payload` is good until the next call; of a Ring it lies in shared memory
        that a hostile peer can still change: copy first, check the copy."""
        source: cython.pointer(Source)
        ring: RingReader
        broadcast: BroadcastReader
        i: cython.int
        best: cython.int
        code: cython.int
        if self.current >= 0:
            # Only the source that was read last can have another frame first.
            i = self.current
            self._settle()
            if not self._first(i):
                self.count -= 1
                for best in range(self.count):
                    if self.ready[best] == i:
                        self.ready[best] = self.ready[self.count]
                        break
        while self.count > 0:
            best = 0
            for i in range(1, self.count):
                if self.table[self.ready[i]].stamp < self.table[self.ready[best]].stamp:
                    best = i
            source = self.table + self.ready[best]
            if source.is_ring:
                ring = cython.cast(RingReader, source.reader)
                code = ring.peek(source.seen, head, payload)
            else:
                broadcast = cython.cast(BroadcastReader, source.reader)
                code = broadcast.copy(source.seen, head, self.buffer, self.capacity)
                if code == -3:
                    buffer = cython.cast(cython.pointer(uint8_t), realloc(self.buffer, head.length))
                    if buffer == cython.NULL:
                        raise MemoryError
                    self.buffer = buffer
                    self.capacity = head.length
                    code = broadcast.copy(source.seen, head, self.buffer, self.capacity)
                payload[0] = self.buffer
            if code == 1 and head.stamp != source.stamp:
                code = -3  # changed after it was published
            if code == 1 and self.clock is not None and not self.clock.witness(head.stamp):
                code = -4
            if code == 1:
                self.current = self.ready[best]
                self.length = head.length
                return cython.cast(object, source.reader)
            self._break(source, code)
            self.count -= 1
            self.ready[best] = self.ready[self.count]
        return None

    def publish(self) -> cython.int:
        """Let the producers reuse what was delivered."""
        i: cython.int
        source: cython.pointer(Source)
        self._settle()
        for i in range(self.sources):
            source = self.table + i
            if source.unpublished:
                source.unpublished = False
                if source.is_ring:
                    cython.cast(RingReader, source.reader).publish()
        return 0

    def pending(self) -> cython.bint:
        """Whether there is something to gather. Ask after StatusPage.set_sleeping(True)."""
        i: cython.int
        source: cython.pointer(Source)
        for i in range(self.sources):
            source = self.table + i
            if not source.bad and load_acquire(source.head_at) != source.position:
                return True
        return False

    def take_broken(self) -> list:
        """Sources that broke a rule since the last call, each with the reason; they are removed."""
        broken = self.broken
        self.broken = []
        for reader, _ in broken:
            self.remove(reader)
        return broken
