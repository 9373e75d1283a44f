# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""Fan-out: who reads my Broadcast, how far they are, and what becomes of one that is late.

The rules, for a publisher P with its Broadcast B and a reader R with its Ring from P. Positions
are B's byte counts.

P, for each R:
 1. R is *apart* or *joined*. It begins apart: all that R is to get from P goes by Ring.
 2. To join, P puts MARK(aux = B's head) into R's Ring, behind what waits for it. From then on
    signals for R need only be in B. P counts R as being at that position until R publishes a
    higher one. A position beyond B's head is a lie: R is `broken` and P drops it. Frames that
    wait for R's Ring wait with want_space on, which is set before B's head moves.
 3. B overwrites nothing that a joined R has not read. If R is in the way (P may wait for it a
    while), P *demotes* it: for each frame from R's position to the last one meant for R, a
    copy of it, with the same stamp and with aux = the position behind it in B, goes by Ring;
    then a MARK: that of a new join (2), or MARK(aux = STOP). Only when all that is in the Ring,
    or waits for it, may B's tail pass R's position.
 4. While R is apart, a signal for R goes by Ring. If it stands in B too, its aux says where, and
    B gets it first, or later but before `end`. Else aux is 0, as in any unicast frame.

R, with b = how far it has read B; merge.py does this:
 5. R begins apart. At MARK(aux): b = max(b, aux), and R *follows* B: it reads it from b on. At
    MARK(STOP) it is apart.
 6. A copy with aux <= b is dropped: R has had it. One with aux > b in its turn in the Ring is the
    next frame, with b = aux, if R is apart; if R follows, it waits there until R has come as
    far in B.
 7. R follows and finds tail > b: it was overrun. Rule 3 says that all it misses is in the Ring or
    waits for it, but perhaps behind unicast frames with higher stamps. So R *catches up*: it
    takes frames out of the Ring into two queues, copies and unicast, and delivers none of P's
    until the MARK has come. Then it goes on in the order of stamps, first from the queues.
    If the Ring is empty, want_space off and no MARK has come, P broke rule 3.
 8. R follows, and want_space was on before R looked at the Ring: a frame in B may be behind one
    that waits at P. R takes it only if the Ring has something for R to compare it with.

Nothing is lost: what B may overwrite is in the Ring before (3, 4); what R skips at a MARK was
not meant for it or came before the MARK (2, 3). Nothing comes twice: by 6, each position of B is
passed once. Nothing overtakes: B and the copies have rising stamps; unicast frames in the Ring
have rising stamps; R only ever delivers the lower of the two heads, and by 7 it knows both.

Order across senders: one message is not in all Rings at the same moment, so P says
Broadcast.begin before the first and end when it is in all of them, not when it waits for one of
them, and R waits for the end before it delivers frames of others with higher stamps, as it does
for the MARK of rule 7. While something waits for a Ring, P sends nothing new. All these waits have a limit; where a worker hangs for
longer, what waits for it comes late for others, but still in P's order.
"""

from __future__ import annotations

import cython
from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize
from cython.cimports.kbusd.rings.atomics import load_acquire
from cython.cimports.kbusd.rings.broadcast import Broadcast
from cython.cimports.kbusd.rings.frame import HEAD, FrameHead, sound
from cython.cimports.kbusd.rings.status import StatusView
from cython.cimports.libc.stdint import uint8_t, uint64_t
from cython.cimports.libc.string import memcpy

from kbusd.rings.values import FanoutStatistics

NOBODY = cython.declare(uint64_t, 2**64 - 1)
STOP = 2**64 - 1  # frame.pxd has it for C


@cython.cclass
class Subscriber:
    """A reader of my Broadcast: publishes its position in `slot` of `view`. Raises RingError.

    `owner` is the caller's; `wanted` the position behind the last frame that is meant for it."""

    def __init__(self, view: StatusView, slot: cython.int, owner: object = None):
        self.claimed = view.place(slot)
        self.view = view
        self.owner = owner

    def position(self, head) -> uint64_t:
        """How far it has read, as far as it can be believed."""
        # Pairs with StatusPage.set: it is done with what we overwrite.
        claim: uint64_t = load_acquire(self.claimed)
        if claim > head:
            self.broken = True
        elif claim > self.floor:
            self.floor = claim
        return self.floor


@cython.cclass
class Fanout:
    """The joined subscribers of `broadcast`; nobody else may write to it."""

    def __init__(self, broadcast: Broadcast):
        self.broadcast = broadcast
        self.joined = []
        self.lowest = NOBODY

    def join(self, subscriber: Subscriber) -> uint64_t:
        """`subscriber` reads the Broadcast from now on: put a MARK with this aux into its Ring.

        Raises ValueError if it has joined already or is broken."""
        if subscriber.joined or subscriber.broken:
            raise ValueError("a subscriber that has joined already, or that broke the rules")
        subscriber.floor = subscriber.wanted = self.broadcast.position
        subscriber.joined = True
        self.joined.append(subscriber)
        self.lowest = min(self.lowest, subscriber.floor)
        return subscriber.floor

    def leave(self, subscriber: Subscriber) -> None:
        """`subscriber` is gone, or apart: it is not spared any more."""
        if subscriber.joined:
            subscriber.joined = False
            self.joined.remove(subscriber)
            if not self.joined:
                self.lowest = NOBODY

    def want(self, subscriber) -> cython.void:
        """The frame committed last is meant for `subscriber`."""
        subscriber.wanted = self.broadcast.position

    def rescan(self) -> cython.void:
        """Look again how far all have read. Those that lie are taken out, and `broken`."""
        subscriber: Subscriber
        liars = None
        position: uint64_t
        self.lowest = NOBODY
        for subscriber in self.joined:
            position = subscriber.position(self.broadcast.position)
            if subscriber.broken:
                liars = [subscriber] if liars is None else [*liars, subscriber]
            elif position < self.lowest:
                self.lowest = position
        if liars is not None:
            for subscriber in liars:
                self.leave(subscriber)

    def reserve(self, length) -> cython.pointer(uint8_t):
        """Room in the Broadcast for `length` bytes; NULL if somebody is in the way: see `late`."""
        place: cython.pointer(uint8_t) = self.broadcast.reserve(length, self.lowest)
        if place == cython.NULL:
            self.rescan()
            place = self.broadcast.reserve(length, self.lowest)
        return place

    def commit(self) -> cython.void:
        self.broadcast.commit()

    def late(self, length) -> list:
        """Who is in the way of `length` bytes more."""
        subscriber: Subscriber
        head: uint64_t = self.broadcast.position
        size: uint64_t = self.broadcast.size
        found: list = []
        self.rescan()
        for subscriber in self.joined:
            if subscriber.floor + size < head + length:
                found.append(subscriber)
        return found

    def demote(self, subscriber: Subscriber) -> list:
        """Rule 3: what `subscriber` has not read, as (head, envelope, body), to go by its Ring.

        Put all of it there, then a MARK, or in wait with want_space on, before the next `reserve`.
        Empty also if the subscriber turns out to be `broken`."""
        head: FrameHead
        at: uint64_t
        available: uint64_t
        place: cython.pointer(uint8_t)
        text: cython.p_char
        frames: list = []
        if not subscriber.joined:
            return frames
        at = subscriber.position(self.broadcast.position)
        self.leave(subscriber)
        self.demotions += 1
        while at < subscriber.wanted and not subscriber.broken:
            available = subscriber.wanted - at
            place = self.broadcast.data + (at & (self.broadcast.size - 1))
            memcpy(cython.address(head), place, HEAD)
            # Where it begins is what the subscriber says: it need not be the head of a frame.
            if not sound(cython.address(head), available):
                subscriber.broken = True
                return []
            at += head.length
            head.aux = at
            text = cython.cast(cython.p_char, place) + HEAD
            frames.append(
                (
                    PyBytes_FromStringAndSize(
                        cython.cast(cython.p_char, cython.address(head)), HEAD
                    ),
                    PyBytes_FromStringAndSize(text, head.envelope_length),
                    PyBytes_FromStringAndSize(text + head.envelope_length, head.body_length),
                )
            )
        return frames

    def add(self, subscriber: Subscriber) -> int:
        """`join` for Python."""
        return self.join(subscriber)

    def in_the_way(self, length: int) -> list:
        """`late` for Python."""
        return self.late(length)

    def take_out(self, subscriber: Subscriber) -> list:
        """`demote` for Python."""
        return self.demote(subscriber)

    def limit(self) -> int:
        """The lowest position that somebody may still read, looked up anew."""
        self.rescan()
        return self.lowest

    def statistics(self) -> FanoutStatistics:
        return FanoutStatistics(len(self.joined), self.demotions, self.broadcast.statistics())
