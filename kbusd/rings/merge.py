# cython: boundscheck=False
# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""Merge: what stands in all inbound rings and the log, in causal order.

If f1 happened before f2 then f1 has the lower stamp and was published first. A reader that looks at
one head after the other can see f2 and miss f1, whose ring it had looked at before. So it looks at
all heads twice. Whatever happened before a frame that the first scan saw is there by the second.
Where the second finds something new, everything below the lowest new stamp is the same in both
scans and so lacks nothing: that much is delivered, in the order of stamps, the rest at the next
gather. (DESIGN.md, "Order"; there the scan is repeated until two agree, which a busy sender can
put off. To cut at the lowest new stamp needs no third scan and rests on the same argument.)
A sender that promises frames which are not there yet, because it is between `Broadcast.begin` and
`end` or because it has overrun us and the copies are to come, cuts at their stamp in the same way;
between `begin` and `end` only what others send, since its own frames stand in its own order.

A peer is one source: its Ring and, where it has one for us, its Broadcast, read by the rules 5 to 8
of fanout.py. The control log is another. Sources are hostile. One whose frames break a rule, whose
stamps do not rise or lie in the future, is put aside and reported by `take_broken`. One that keeps
the cut below everything else, by old stamps or promises, is left out of account
after some ms: it loses its own place in the order and nobody else's.
"""

from __future__ import annotations

import cython
from cython.cimports.kbusd.rings.atomics import load_acquire
from cython.cimports.kbusd.rings.broadcast import BroadcastReader
from cython.cimports.kbusd.rings.catchup import CatchUp, Held
from cython.cimports.kbusd.rings.clock import Clock, monotonic
from cython.cimports.kbusd.rings.doorbell import ring_doorbell
from cython.cimports.kbusd.rings.frame import MARK, MESSAGE, STOP, FrameHead
from cython.cimports.kbusd.rings.ring import RingReader
from cython.cimports.libc.stdint import int64_t, uint8_t, uint64_t
from cython.cimports.libc.stdlib import free, realloc
from cython.cimports.libc.string import memset

from kbusd.rings.values import Frame, MergeStatistics

EVERYTHING = cython.declare(uint64_t, 2**64 - 1)
MAX_SCANS = cython.declare(cython.int, 64)
QUICK_SCANS = cython.declare(cython.int, 16)
# A peer may make us wait this part of the time, up to `patience` at once.
REFILL = cython.declare(int64_t, 20)
# What we take in of a peer whose demotion is not complete; more than honest workers let wait.
MAX_HELD = cython.declare(cython.size_t, 64 * 1024 * 1024)

APART = cython.declare(cython.int, 0)
FOLLOWING = cython.declare(cython.int, 1)
CATCHING_UP = cython.declare(cython.int, 2)

# Where a source's next frame comes from.
NOWHERE = cython.declare(cython.int, 0)
RING = cython.declare(cython.int, 1)
RING_COPY = cython.declare(cython.int, 2)
BROADCAST = cython.declare(cython.int, 3)
HELD_UNICAST = cython.declare(cython.int, 4)
HELD_COPY = cython.declare(cython.int, 5)
BLOCKED = cython.declare(cython.int, 6)  # a copy of what comes next in the Broadcast

REASONS = {
    -1: "a frame, a position or the head is out of range",
    -2: "overrun: what was not read yet is overwritten",
    -3: "stamps do not rise from frame to frame",
    -4: "a stamp is more than 1 s ahead of time",
    -5: "a demotion that does not end",
    -6: "its Broadcast has overtaken us without a demotion",
}


@cython.cclass
class Merge:
    """`clock` witnesses the stamps of what is delivered. `patience` (ns): how long at most one peer
    can make the others' frames wait for what it promises; some turns of the scheduler.

    gather, then next until None, then publish."""

    def __init__(self, clock: Clock = None, patience: int64_t = 20_000_000):
        self.clock = clock
        self.patience = patience
        self.current = -1
        self.readers = []
        self.broken = []

    def __dealloc__(self):
        free(self.table)
        free(self.ready)
        free(self.buffer)

    def add(
        self,
        reader: object,
        broadcast: BroadcastReader = None,
        slot: cython.int = -1,
        doorbell: cython.int = -1,
    ) -> None:
        """Merge what comes from a peer's RingReader, or from the log's BroadcastReader.

        broadcast: the same peer's; followed once a MARK says from where. slot: of the status page,
        where to publish how far it is read. doorbell: the peer's, rung when it waits for room; it
        stays the caller's. Ends the batch."""
        ring: RingReader
        source: cython.pointer(Source)
        self._settle()
        self.count = 0
        self._grow()
        source = self.table + self.sources
        memset(source, 0, cython.sizeof(Source))
        source.reader = cython.cast(cython.p_void, reader)
        source.slot = slot
        source.doorbell = doorbell
        source.state = APART
        source.budget = self.patience
        source.refilled = monotonic()
        if isinstance(reader, RingReader):
            ring = reader
            source.ring = source.reader
            source.unicast.position = ring.position
            source.unicast.head_at = cython.cast(cython.pointer(cython.const[uint64_t]), ring.base)
        elif isinstance(reader, BroadcastReader) and broadcast is None:
            broadcast = reader
            source.state = FOLLOWING
        else:
            raise TypeError("a source is a RingReader, or the BroadcastReader of the log")
        if broadcast is not None:
            source.cast = cython.cast(cython.p_void, broadcast)
            source.broadcast.head_at = cython.cast(
                cython.pointer(cython.const[uint64_t]), broadcast.base
            )
            source.broadcast.position = broadcast.position
        self.readers.append([reader, broadcast, None])
        self.sources += 1

    def _grow(self) -> cython.void:
        room: cython.int
        if self.sources < self.room:
            return
        room = self.room * 2 if self.room else 8
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

    def remove(self, reader: object) -> None:
        """Forget `reader`, if it is a source. Ends the batch: what is left comes again."""
        index: cython.int = self._index(reader)
        if index < 0:
            return
        # Who is told of a source that he has given up already would give it up twice.
        self.broken = [each for each in self.broken if each[0] is not reader]
        self._settle()
        self.kept = self.readers[index]  # the payload that `next` gave may still be in use
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

    def _break(self, source, code) -> cython.void:
        """Put the source aside: it broke a rule."""
        source.bad = True
        self.broken.append((cython.cast(object, source.reader), REASONS[code]))

    def take_broken(self) -> list:
        """(reader, reason) of sources that broke a rule since the last call; they are removed."""
        broken = self.broken
        self.broken = []
        for reader, _ in broken:
            self.remove(reader)
        return broken

    # -- scanning ------------------------------------------------------------------------------

    def gather(self) -> cython.int:
        """Scan all heads. How many sources have something to deliver; then call `next`.

        0 and `holding`: what is there must wait for what a peer promises. Gather again when rung,
        or after a ms: a peer need not ring when it has kept its promise."""
        head: FrameHead
        source: cython.pointer(Source)
        i: cython.int
        cause: cython.int
        scan: cython.int
        code: cython.int
        promised: uint64_t
        excluded: cython.bint
        found: cython.bint
        self._settle()
        self.kept = None
        self.count = 0
        self.holding = False
        for i in range(self.sources):
            self.table[i].distrusted = False
        for scan in range(MAX_SCANS):
            self.again = False
            found = False
            for i in range(self.sources):
                source = self.table + i
                if source.bad:
                    continue
                self._scan(source)
                source.unicast.seen = source.unicast.newer
                source.broadcast.seen = source.broadcast.newer
                source.waits = source.waits_newer
                found |= (
                    source.unicast.seen != source.unicast.position
                    or source.broadcast.seen != source.broadcast.position
                    or (source.held != cython.NULL and self._holds(source))
                )
            if self.again:
                continue
            if not found:
                self.blocked = 0
                return 0
            self.cut = self.begun = self.begun_next = EVERYTHING
            cause = self.beginner = -1
            for i in range(self.sources):
                source = self.table + i
                if source.bad:
                    continue
                if source.cast != cython.NULL and source.ring != cython.NULL:
                    promised = cython.cast(BroadcastReader, source.cast).begun()
                    if promised and not source.distrusted:
                        self._has_begun(i, promised)
                self._scan(source)
                if self.again:
                    break
                if source.state == CATCHING_UP:
                    # No look at its Ring: what was seen there may have been taken out just now,
                    # and overwritten.
                    promised = self._promised(source)
                    if promised < self.cut and not source.distrusted:
                        self.cut = promised
                        cause = i
                    continue
                if source.unicast.newer != source.unicast.seen and not source.distrusted:
                    code = cython.cast(RingReader, source.ring).look(
                        source.unicast.seen, source.unicast.newer, cython.address(head)
                    )
                    if code != 1:
                        self._break(source, code)
                        continue
                    if head.stamp < self.cut:
                        self.cut = head.stamp
                        cause = i
                if source.broadcast.newer != source.broadcast.seen and not source.distrusted:
                    code = cython.cast(BroadcastReader, source.cast).look(
                        source.broadcast.seen, source.broadcast.newer, cython.address(head)
                    )
                    if code == -2:
                        self._overrun(source)
                        break
                    if code != 1:
                        self._break(source, code)
                        continue
                    if head.stamp < self.cut:
                        self.cut = head.stamp
                        cause = i
            if self.again:
                continue
            if self.begun < self.cut:
                cause = self.beginner
            self.lowered = True
            while self.lowered and not self.again:
                self.lowered = False
                self.count = 0
                excluded = False
                for i in range(self.sources):
                    source = self.table + i
                    if (
                        source.unicast.seen == source.unicast.position
                        and source.broadcast.seen == source.broadcast.position
                        and source.held == cython.NULL
                    ):
                        source.excluded = False
                        continue
                    if self._first(source):
                        self.ready[self.count] = i
                        self.count += 1
                    if source.excluded:
                        excluded = True
                        if cause < 0:
                            cause = i  # it waits for itself
                    if self.lowered:
                        cause = i
                        break
            if self.again:
                self.count = 0
                continue
            if not excluded or cause < 0:
                self.blocked = 0
                return self.count
            # Mostly a matter of less than a µs: look again some times at once.
            if self.count == 0 and scan < QUICK_SCANS:
                continue
            source = self.table + cause
            if self._wait_for(source):
                self.holding = self.count == 0
                return self.count
            source.distrusted = True
        self.count = 0
        return 0

    def _has_begun(self, i, stamp) -> cython.void:
        """Source `i` puts something with stamps from `stamp` on into several rings."""
        if stamp < self.begun:
            self.begun_next = self.begun
            self.begun = stamp
            self.beginner = i
        elif stamp < self.begun_next:
            self.begun_next = stamp

    def _holds(self, source) -> cython.bint:
        """Whether frames were taken out of the source's Ring that can be delivered now."""
        held: CatchUp = cython.cast(CatchUp, source.held)
        return source.state != CATCHING_UP and held.held > 0

    def _promised(self, source) -> uint64_t:
        """Rule 7: what is missing of a source that catches up has stamps from here on."""
        held: CatchUp = cython.cast(CatchUp, source.held)
        first: Held
        stamp: uint64_t = source.broadcast.last + 1
        if held.unicast:
            first = held.unicast[0]
            stamp = min(stamp, first.head.stamp)
        return stamp or 1

    def _scan(self, source) -> cython.int:
        """Look at the source's heads: into `newer`. Sets `again` if its state changes."""
        position: uint64_t = source.broadcast.position
        source.broadcast.newer = position
        if source.state == FOLLOWING:
            source.broadcast.newer = load_acquire(source.broadcast.head_at)
            # Before we look at the Ring: who is overrun must find the demotion there.
            if (
                source.broadcast.newer != position
                and cython.cast(BroadcastReader, source.cast).tail() > position
            ):
                self._overrun(source)
                if source.bad:
                    return 0
        if source.state == CATCHING_UP:
            self._catch_up(source)
        if source.ring != cython.NULL:
            # Rule 8: after the Broadcast's head and before the Ring's.
            if source.broadcast.newer != position:
                source.waits_newer = cython.cast(RingReader, source.ring).producer_waits()
            # Pairs with Ring.commit.
            source.unicast.newer = load_acquire(source.unicast.head_at)
        return 0

    def _wait_for(self, source) -> cython.bint:
        """Whether the source may go on to make others wait; the time since the last call for
        which somebody had to wait is on its account."""
        now: uint64_t = monotonic()
        source.budget += (now - source.refilled) // REFILL
        source.budget = min(source.budget, self.patience)
        source.refilled = now
        if self.blocked:
            source.budget -= now - self.blocked
        self.blocked = now
        if source.budget <= 0:
            source.overdrawn = True
        elif source.budget >= self.patience // 2:
            source.overdrawn = False
        return not source.overdrawn

    def _overrun(self, source) -> cython.int:
        """Rule 7: it follows no more, but catches up. The log has no Ring: it is lost."""
        self.again = True
        source.broadcast.newer = source.broadcast.position
        source.broadcast.seen = source.broadcast.position
        if source.ring == cython.NULL:
            self._break(source, -2)
            return 0
        source.state = CATCHING_UP
        if source.held == cython.NULL:
            held: CatchUp = CatchUp()
            self.readers[source - self.table][2] = held
            source.held = cython.cast(cython.p_void, held)
        return 0

    def _catch_up(self, source) -> cython.int:
        """Rule 7: take what is in the Ring into the two queues, up to the MARK."""
        head: FrameHead
        payload: cython.pointer(cython.const[uint8_t])
        held: CatchUp = cython.cast(CatchUp, source.held)
        ring: RingReader = cython.cast(RingReader, source.ring)
        code: cython.int
        is_copy: cython.bint
        # Before the head: off, then all that was demoted is before the head.
        waits: cython.bint = ring.producer_waits()
        upto: uint64_t = ring.head()
        while True:
            code = ring.peek(upto, cython.address(head), cython.address(payload))
            if code == 0:
                break
            if code < 0:
                self._break(source, code)
                return 0
            if head.kind == MARK:
                self._skip(source, head.length)
                return self._mark(source, head.aux)
            is_copy = head.kind == MESSAGE and head.aux != 0
            if not is_copy or head.aux > source.broadcast.position:
                held.keep(is_copy, cython.address(head), payload)
            if is_copy and head.aux > source.broadcast.position:
                source.broadcast.position = head.aux
            self._skip(source, head.length)
            if held.held > MAX_HELD:
                self._break(source, -5)
                return 0
        source.broadcast.newer = source.broadcast.seen = source.broadcast.position
        self._publish_one(source)
        if not waits:
            self._break(source, -6)
        return 0

    def _mark(self, source, aux) -> cython.int:
        """Rule 5. What is behind the MARK must be looked at anew."""
        broadcast: BroadcastReader
        if source.cast == cython.NULL:
            return 0
        broadcast = cython.cast(BroadcastReader, source.cast)
        self.again = True
        if aux == STOP:
            source.state = APART
        else:
            if aux > broadcast.head():
                self._break(source, -1)
                return 0
            source.state = FOLLOWING
            source.broadcast.position = max(source.broadcast.position, aux)
        broadcast.position = source.broadcast.position
        source.broadcast.newer = source.broadcast.seen = source.broadcast.position
        return 0

    def _skip(self, source, length) -> cython.void:
        """Done with the frame of `length` bytes that is first in the Ring."""
        ring: RingReader = cython.cast(RingReader, source.ring)
        ring.peeked = length
        ring.advance()
        source.unicast.position = ring.position
        source.unpublished = True

    # -- delivering ----------------------------------------------------------------------------

    def _first(self, source) -> cython.bint:
        """Find the source's next frame: `turn` and `stamp`. True: it may be delivered."""
        copy_stamp: uint64_t = 0
        unicast_stamp: uint64_t = 0
        copy: cython.int
        unicast: cython.int
        others: uint64_t
        source.excluded = False
        if source.bad or source.state == CATCHING_UP:
            return False
        unicast = self._first_unicast(source, cython.address(unicast_stamp))
        if self.again or source.bad:
            return False
        copy = self._first_copy(source, cython.address(copy_stamp))
        if copy == BROADCAST and unicast == NOWHERE and source.waits:
            # Rule 8. What others send may depend on it: that waits, too.
            if copy_stamp < self.cut and not source.distrusted:
                self.cut = copy_stamp
                self.lowered = True
            return False
        if self.again or source.bad:
            return False
        if copy == NOWHERE and (unicast == NOWHERE or unicast == BLOCKED):
            return False
        if (
            unicast == NOWHERE
            or unicast == BLOCKED
            or (copy != NOWHERE and copy_stamp <= unicast_stamp)
        ):
            source.turn = copy
            source.stamp = copy_stamp
        else:
            source.turn = unicast
            source.stamp = unicast_stamp
        if source.stamp <= (
            source.unicast.last
            if source.turn == RING or source.turn == HELD_UNICAST
            else source.broadcast.last
        ):
            self._break(source, -3)
            return False
        if source.stamp == EVERYTHING:
            self._break(source, -4)  # nothing could come after it
            return False
        others = self.begun_next if source - self.table == self.beginner else self.begun
        source.excluded = source.stamp >= self.cut or source.stamp >= others
        return not source.excluded

    def _first_unicast(self, source, stamp) -> cython.int:
        """What is first of the unicast frames and of what else comes by Ring."""
        head: FrameHead
        held: CatchUp
        frame: Held
        ring: RingReader
        code: cython.int
        if source.held != cython.NULL:
            held = cython.cast(CatchUp, source.held)
            if held.unicast:
                frame = held.unicast[0]
                stamp[0] = frame.head.stamp
                return HELD_UNICAST
        if source.ring == cython.NULL:
            return NOWHERE
        ring = cython.cast(RingReader, source.ring)
        while source.unicast.position != source.unicast.seen:
            code = ring.look(source.unicast.position, source.unicast.seen, cython.address(head))
            if code != 1:
                self._break(source, code)
                return NOWHERE
            if head.kind == MARK:
                self._skip(source, head.length)
                self._mark(source, head.aux)
                if self.again:
                    return NOWHERE
                continue
            stamp[0] = head.stamp
            if head.kind != MESSAGE or head.aux == 0:
                return RING
            if source.cast != cython.NULL and head.aux <= source.broadcast.position:
                self._skip(source, head.length)
                continue
            if source.state != FOLLOWING:
                return RING_COPY
            if self._ahead(source, head.aux):
                return NOWHERE
            return BLOCKED
        return NOWHERE

    def _ahead(self, source, aux) -> cython.bint:
        """Rule 4: a copy of what is not in the Broadcast yet, as may be between `begin` and `end`.
        Else, or if that takes too long, it is a lie."""
        broadcast: BroadcastReader = cython.cast(BroadcastReader, source.cast)
        if aux <= broadcast.head():
            return False
        # The order pairs with Broadcast.end: after it, the head has moved.
        if (broadcast.begun() == 0 and aux > broadcast.head()) or source.distrusted:
            self._break(source, -1)
        else:
            source.excluded = True
        return True

    def _first_copy(self, source, stamp) -> cython.int:
        """What is first in the Broadcast, or of the copies that were taken out of the Ring."""
        head: FrameHead
        held: CatchUp
        frame: Held
        code: cython.int
        if source.held != cython.NULL:
            held = cython.cast(CatchUp, source.held)
            if held.broadcast:
                frame = held.broadcast[0]
                stamp[0] = frame.head.stamp
                return HELD_COPY
        if source.state != FOLLOWING or source.broadcast.position == source.broadcast.seen:
            return NOWHERE
        code = cython.cast(BroadcastReader, source.cast).look(
            source.broadcast.position, source.broadcast.seen, cython.address(head)
        )
        if code == 1:
            stamp[0] = head.stamp
            return BROADCAST
        if code == -2:
            self._overrun(source)
        else:
            self._break(source, code)
        return NOWHERE

    def next(self, head, payload):
        """What `add` was given for the source of the next frame; None at the end of the batch.

        `head` is a copy. `payload` is good until the next call; of a Ring it lies in shared memory
        that a hostile peer can still change: copy first, check the copy."""
        source: cython.pointer(Source)
        i: cython.int
        best: cython.int
        code: cython.int
        if self.current >= 0:
            i = self.current
            self._settle()
            self.again = self.lowered = False
            if not self._first(self.table + i):
                # A change of state, or a lower cut: what comes next must be looked at anew.
                self.count = 0 if self.again or self.lowered else self.count - 1
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
            code = self._take(source, head, payload)
            if code == 1 and self.clock is not None and not self.clock.witness(head.stamp):
                code = -4
            if code == 1:
                self.current = self.ready[best]
                self.length = head.length
                self.aux = head.aux
                return cython.cast(object, source.reader)
            if code == -2:
                self._overrun(source)
                self.count = 0
                break
            self._break(source, code)
            self.count -= 1
            self.ready[best] = self.ready[self.count]
        return None

    def _take(self, source, head, payload) -> cython.int:
        """The source's next frame, which `_first` found: 1, or what is wrong with it."""
        held: CatchUp
        frame: Held
        broadcast: BroadcastReader
        code: cython.int
        if source.turn == HELD_UNICAST or source.turn == HELD_COPY:
            held = cython.cast(CatchUp, source.held)
            frame = held.unicast[0] if source.turn == HELD_UNICAST else held.broadcast[0]
            head[0] = frame.head
            payload[0] = cython.cast(
                cython.pointer(cython.const[uint8_t]), cython.cast(cython.p_char, frame.payload)
            )
            return 1
        if source.turn == BROADCAST:
            broadcast = cython.cast(BroadcastReader, source.cast)
            broadcast.position = source.broadcast.position
            code = broadcast.copy(source.broadcast.seen, head, self.buffer, self.capacity)
            if code == -3:
                buffer = cython.cast(cython.pointer(uint8_t), realloc(self.buffer, head.length))
                if buffer == cython.NULL:
                    raise MemoryError
                self.buffer = buffer
                self.capacity = head.length
                code = broadcast.copy(source.broadcast.seen, head, self.buffer, self.capacity)
            payload[0] = self.buffer
            if code == 1 and (head.stamp != source.stamp or head.kind == MARK):
                return -1  # changed after it was published
            return code
        code = cython.cast(RingReader, source.ring).peek(source.unicast.seen, head, payload)
        if code == 1 and (
            head.stamp != source.stamp
            or head.kind == MARK
            or (head.kind == MESSAGE and head.aux != 0) != (source.turn == RING_COPY)
        ):
            return -1
        return code

    def _settle(self) -> cython.void:
        """The frame that `next` gave is done with."""
        source: cython.pointer(Source)
        broadcast: BroadcastReader
        held: CatchUp
        if self.current < 0:
            return
        source = self.table + self.current
        self.current = -1
        if source.turn == RING or source.turn == HELD_UNICAST:
            source.unicast.last = source.stamp
        else:
            source.broadcast.last = source.stamp
        if source.turn == RING:
            self._skip(source, self.length)
        elif source.turn == RING_COPY:
            self._skip(source, self.length)
            source.broadcast.position = source.broadcast.seen = self.aux
        elif source.turn == BROADCAST:
            broadcast = cython.cast(BroadcastReader, source.cast)
            broadcast.advance(self.length)
            source.broadcast.position = broadcast.position
            source.unpublished = True
        else:
            held = cython.cast(CatchUp, source.held)
            held.drop(source.turn == HELD_COPY)

    def publish(self) -> cython.int:
        """Let the producers reuse what was delivered; ring those that wait for it.

        In the middle of a batch, too: then all but the frame that `next` gave last."""
        i: cython.int
        for i in range(self.sources):
            if self.table[i].unpublished:
                self._publish_one(self.table + i)
        return 0

    def _publish_one(self, source) -> cython.void:
        ring: RingReader
        waits: cython.bint
        source.unpublished = False
        if source.ring == cython.NULL:
            return
        ring = cython.cast(RingReader, source.ring)
        if source.slot >= 0:
            ring.mine.set(source.slot, source.broadcast.position)
        waits = ring.publish()
        if source.slot >= 0:
            waits |= cython.cast(BroadcastReader, source.cast).producer_waits()
        if waits and source.doorbell >= 0:
            ring_doorbell(source.doorbell)

    def pending(self) -> cython.bint:
        """Whether there is something to gather. Ask after StatusPage.set_sleeping(True).

        Rings once more the producers whose Ring is empty and who say that they wait for room."""
        i: cython.int
        waits: cython.bint
        source: cython.pointer(Source)
        for i in range(self.sources):
            source = self.table + i
            if source.bad:
                continue
            waits = False
            if source.ring != cython.NULL:
                if load_acquire(source.unicast.head_at) != source.unicast.position:
                    return True
                waits = cython.cast(RingReader, source.ring).producer_waits()
                if waits and source.doorbell >= 0:
                    ring_doorbell(source.doorbell)
            if (
                source.state == FOLLOWING
                and not waits
                and load_acquire(source.broadcast.head_at) != source.broadcast.position
            ):
                return True
            if source.held != cython.NULL and self._holds(source):
                return True
        return False

    # -- for Python ----------------------------------------------------------------------------

    def scan(self) -> int:
        """`gather` for Python."""
        return self.gather()

    def one(self) -> tuple | None:
        """`next` for Python: (reader, Frame) or None."""
        head: FrameHead
        payload: cython.pointer(cython.const[uint8_t])
        reader = self.next(cython.address(head), cython.address(payload))
        if reader is None:
            return None
        text: cython.p_char = cython.cast(cython.p_char, payload)
        start: cython.size_t = head.envelope_length
        frame = Frame(
            head.kind,
            head.stamp,
            text[:start],
            text[start : start + head.body_length],
            0,
            head.flags,
            head.fds,
            head.serial,
            head.reply_serial,
            head.aux,
        )
        return reader, frame

    def release(self) -> None:
        """`publish` for Python."""
        self.publish()

    def take(self) -> list:
        """What can be delivered now, as (reader, Frame), in order; published."""
        frames: list = []
        if self.gather() > 0:
            taken = self.one()
            while taken is not None:
                frames.append(taken)
                taken = self.one()
        self.publish()
        return frames

    def more(self) -> bool:
        """`pending` for Python."""
        return self.pending()

    def put_aside(self) -> list:
        """`take_broken` for Python."""
        return self.take_broken()

    def statistics(self) -> MergeStatistics:
        i: cython.int
        states: cython.int[3] = [0, 0, 0]
        held: cython.size_t = 0
        for i in range(self.sources):
            states[self.table[i].state] += 1
            if self.table[i].held != cython.NULL:
                held += cython.cast(CatchUp, self.table[i].held).held
        return MergeStatistics(self.sources, states[FOLLOWING], states[CATCHING_UP], held)
