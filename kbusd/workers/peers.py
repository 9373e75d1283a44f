# cython: boundscheck=False
"""Other workers, as this one sees them, and how frames get to them.

`Peer` is one: the two rings between us, and what we share: the bell, the side socket, the carrier. Frames that find no room, or
no introduction yet, wait in its backlog in order. `Peers` are all that we know: introductions, and
the sending of frames to one or to all subscribers of a signal, by Ring or Broadcast, in the order
that fanout.py explains. Peers are hostile: what they claim of positions is checked by the rings, what
they send by whoever reads it; a peer that breaks the rules is dropped, which its own client notices
and nobody else. What was asked of a peer that is lost is for the engine to answer (`lost`).
"""

import array
import errno
import os
import socket
import struct
from collections import deque

import cython
from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize
from cython.cimports.kbusd.rings.broadcast import Broadcast, BroadcastReader
from cython.cimports.kbusd.rings.bulk import (
    BULK_FRESH,
    BULK_LARGE,
    BULK_MOST,
    BULK_SIZE,
    Bulk,
    BulkView,
)
from cython.cimports.kbusd.rings.clock import Clock, monotonic
from cython.cimports.kbusd.rings.doorbell import GIFTS, OVER, Heard, hear, refuses, ring_doorbell
from cython.cimports.kbusd.rings.fanout import Fanout, Subscriber
from cython.cimports.kbusd.rings.frame import STOP, FrameHead
from cython.cimports.kbusd.rings.merge import Merge
from cython.cimports.kbusd.rings.pagepipe import is_guarded
from cython.cimports.kbusd.rings.ring import Ring, RingReader
from cython.cimports.kbusd.rings.status import StatusPage, StatusView
from cython.cimports.kbusd.workers.libc import EPOLLIN
from cython.cimports.kbusd.workers.waiting import Waiting
from cython.cimports.libc.stdint import uint8_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcpy, memset

from kbusd.rings import entries, memfd
from kbusd.rings.doorbell import part_all
from kbusd.rings.journal import Journal
from kbusd.rings.line import close_all
from kbusd.rings.memfd import RingError
from kbusd.rings.values import Frame
from kbusd.workers.errors import LIMITS_EXCEEDED, NO_REPLY, NO_REPLY_DISCONNECTED, Gone

NEW = cython.declare(cython.int, 0)  # known by the log alone
ASKED = cython.declare(cython.int, 1)  # Introduce is on its way
READY = cython.declare(cython.int, 2)  # rings are mapped
GONE = cython.declare(cython.int, 3)  # its connection ended

MESSAGE = cython.declare(cython.int, 1)
MARK = cython.declare(cython.int, 3)
LARGE = cython.declare(cython.int, 4)
COPY = cython.declare(cython.int, 5)
BULK = cython.declare(cython.int, 7)
LARGE_COPY = cython.declare(cython.int, 8)

HEAD = cython.declare(cython.size_t, 40)
BELLS = cython.declare(cython.uint, 0x80000000)  # and above: the sources of events of bells
MEMFDS = 3  # of each half of an introduction: ring, status page, Broadcast
SHARED = 3  # by both: bell, side socket, carrier
SILENT_SIZE = cython.declare(cython.size_t, 65536)  # a page, at least
NOTES = cython.declare(cython.int, 64)  # as many as `noted` has in peers.pxd
MAX_BULKS = cython.declare(cython.size_t, 4)  # areas that a worker has at once, one of them large
IDLE_TIDIES = cython.declare(cython.int, 3)  # an area goes when `tidy` found it unused so often
TOO_MANY = "too many descriptors are on the way that nobody has taken yet"
LINES_PER_SECOND = 10  # of one worker in the log: a client that is refused again and again is known
# While a peer is being introduced, or has no room, our client's next messages wait this long: so
# that order holds across receivers, and a peer that hangs holds up nobody for longer.
STALL_NS = 250_000_000
BACKLOG = cython.declare(cython.size_t, 4 << 20)  # our quota of what waits for one peer
SUSPECT = cython.declare(cython.size_t, 2 << 20)  # from here on the broker is asked whether it runs
# A peer whose quota is used up has so long in its life to make room. More than the broker needs to
# end a worker that is stopped (broker/probes.py): this is for one that runs and takes nothing.
PATIENCE_NS = cython.declare(uint64_t, 10_000_000_000)
_STAMP = struct.Struct("<Q")


class HostilePeer(Exception):
    """A peer's worker broke the rules of the rings; the text says which."""


@cython.cclass
class Peer:
    """State is NEW, ASKED, READY or GONE."""

    def __init__(self, id, name, connection):
        self.id = id
        self.name = name
        self.connection = connection
        self.state = NEW
        self.bell = self.carry = self.bell_at = -1
        self.backlog = deque()
        self.backlog_bytes = 0
        self.templates = {}
        self.touched = False
        self.accused = False
        self.full_at = 0
        self.full_for = 0
        self.notes = 0
        memset(self.noted, 0, cython.sizeof(self.noted))

    def asked(self, ring: Ring, slot: int, broadcast_slot: int) -> None:
        """Our half of the introduction is made and on its way."""
        self.ring = ring
        self.slot = slot
        self.broadcast_slot = broadcast_slot
        self.state = ASKED

    def ready(
        self,
        reader: RingReader,
        view: StatusView,
        their_slot: int,
        subscriber: Subscriber,
        bell: int,
        side: socket.socket,
        carry: int,
    ) -> None:
        """The peer's half has come: frames may flow."""
        self.reader = reader
        self.view = view
        self.subscriber = subscriber
        self.bell = bell
        self.side = side
        self.carry = carry
        self.their_slot = their_slot
        self.ring.attach(view, their_slot)
        self.state = READY

    def forget(self) -> int:
        """Drop what was introduced; descriptors that wait are closed. Returns how many sockets stay open for what
        the peer has left in them."""
        kept = 0
        if self.bell >= 0:
            left = [self.bell, self.side.detach()]
            if is_guarded(self.carry):
                os.close(
                    self.carry
                )  # bytes at most are in it, and what is announced of them is still sent
            else:
                left.append(self.carry)
            kept = part_all(left)
        self.bell = self.carry = -1
        self.side = None
        self.ring = None
        self.reader = None
        self.view = None
        self.bulk = None
        self.bulk_view = None
        self.subscriber = None
        for held in self.backlog:
            for fd in held[3]:
                os.close(fd)
        self.backlog.clear()
        self.backlog_bytes = 0
        self.templates = {}
        return kept

    def gone(self) -> int:
        self.state = GONE
        return self.forget()

    def again(self) -> int:
        """The introduction failed; a later message may ask again."""
        self.state = NEW
        return self.forget()

    def statistics(self) -> dict:
        return {
            "id": self.id,
            "state": self.state,
            "backlog_frames": len(self.backlog),
            "backlog_bytes": self.backlog_bytes,
        }

    def put(
        self,
        head: cython.pointer(FrameHead),
        envelope: bytes,
        body: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
        clock: Clock,
    ) -> cython.int:
        """Send a frame: 1 it stands in the ring, 0 it waits. `fds` stay the caller's.

        A copy of a frame of the Broadcast (`aux`) has its stamp; every other gets one here."""
        if head.kind != MESSAGE or head.aux == 0:
            head.stamp = clock.next()
        if self.state == READY and not self.backlog:
            if self._write(head, envelope, body, fds):
                return 1
            # Look again: the reader may have made room before it could see that we want it.
            self.ring.want_space(True)
            if self._write(head, envelope, body, fds):
                self.ring.want_space(False)
                return 1
        kept = tuple([os.dup(fd) for fd in fds])
        self.backlog.append(
            (
                cython.cast(cython.p_char, head)[: cython.sizeof(FrameHead)],
                envelope,
                cython.cast(cython.p_char, body)[: head.body_length],
                kept,
            )
        )
        self.backlog_bytes += HEAD + len(envelope) + head.body_length
        return 0

    def write(self, frame: Frame, clock: Clock) -> bool:
        """`put` for Python, of a frame without descriptors; the clock gives its stamp."""
        head: FrameHead
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = frame.kind
        head.body_length = len(frame.body)
        body: cython.p_char = frame.body
        data = cython.cast(cython.pointer(cython.const[uint8_t]), body)
        return self.put(cython.address(head), frame.envelope, data, (), clock) == 1

    def _write(
        self,
        head: cython.pointer(FrameHead),
        envelope: bytes,
        body: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
    ) -> cython.bint:
        envelope_length: cython.size_t = len(envelope)
        text: cython.p_char = envelope
        total: cython.size_t = (HEAD + envelope_length + head.body_length + 7) & ~7
        place: cython.pointer(uint8_t) = self.ring.reserve(total)
        if place == cython.NULL:
            return False
        head.length = total
        head.envelope_length = envelope_length
        if fds and not self._send_fds(head.stamp, fds):
            return False
        memcpy(place, head, HEAD)
        memcpy(place + HEAD, text, envelope_length)
        memcpy(place + HEAD + envelope_length, body, head.body_length)
        self.ring.commit()
        return True

    def _send_fds(self, stamp: object, fds: tuple) -> object:
        """Descriptors go ahead of their frame on the side socket, marked with its stamp."""
        try:
            self.side.sendmsg(
                [_STAMP.pack(stamp)],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))],
                socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT,
            )
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                return False  # it is not the peer's fault
            raise HostilePeer(f"the side socket failed: {error.strerror}") from None
        return True

    def receive_fds(self, count: cython.Py_ssize_t) -> tuple:
        """The descriptors of the frame that is being read. Raises HostilePeer."""
        try:
            _, ancillary, flags, _ = self.side.recvmsg(
                8, socket.CMSG_SPACE(4 * 256), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except OSError as error:
            raise HostilePeer(f"descriptors are missing: {error.strerror}") from None
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % 4])
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or len(fds) != count:
            # Not closed, which may take for ever; so many come once from a peer.
            raise HostilePeer(f"{len(fds)} descriptors came with a frame that counts {count}")
        return tuple(fds)

    def flush(self) -> cython.int:
        """Write what waits, as far as there is room: 1 nothing waits any more, 0 something does."""
        head: FrameHead
        asked: cython.bint = False
        while self.backlog:
            raw, envelope, body, fds = self.backlog[0]
            source: cython.p_char = raw
            text: cython.p_char = body
            memcpy(cython.address(head), source, cython.sizeof(FrameHead))
            if not self._write(
                cython.address(head),
                envelope,
                cython.cast(cython.pointer(cython.const[uint8_t]), text),
                fds,
            ):
                if asked:
                    return 0
                self.ring.want_space(True)
                asked = True
                continue  # look again, as in `put`
            self.backlog.popleft()
            self.backlog_bytes -= HEAD + len(envelope) + len(body)
            for fd in fds:
                os.close(fd)
        self.ring.want_space(False)
        return 1

    def note(self, serial) -> cython.void:
        """Our client sent the peer this, for which it awaits no reply: a refusal of it, and of nothing
        that we did not send, is believed. Of many in a row the last are known."""
        self.noted[self.notes % NOTES] = serial
        self.notes += 1

    def take_note(self, serial) -> cython.bint:
        """Whether that was noted; it is forgotten."""
        i: cython.int
        for i in range(NOTES):
            if self.noted[i] == serial and serial != 0:
                self.noted[i] = 0
                return True
        return False

    def ring_bell(self) -> cython.void:
        """Wake the peer's worker if it sleeps."""
        if self.view.sleeping():
            ring_doorbell(self.bell)

    def bulk_begins(self, mine: StatusPage, aux: uint64_t, fds: tuple) -> tuple:
        """Map the peer's new bulk area or let go of the old one, if its frame says so; the
        descriptors that are left. Raises HostilePeer."""
        if aux & BULK_FRESH:
            if self.bulk_view is None:
                self.bulk_view = BulkView(mine, self.slot)
            try:
                self.bulk_view.open(fds[len(fds) - 1], self.carry)
            except RingError as error:
                close_all(fds)
                raise HostilePeer(str(error)) from None
            os.close(fds[len(fds) - 1])
            fds = fds[: len(fds) - 1]
        if aux & 0xFFFFFFFF == 0 and self.bulk_view is not None:
            self.bulk_view.release()
        return fds

    def bulk_body(self, head):
        """Where a body stands in the peer's bulk area, which the peer can write to at any time.
        Raises HostilePeer."""
        body: cython.pointer(cython.const[uint8_t]) = cython.NULL
        if self.bulk_view is not None:
            body = self.bulk_view.place(head.aux)
        if body == cython.NULL:
            raise HostilePeer("a body out of the bounds of its bulk area")
        return body


@cython.cclass
class Peers:
    """All that our client has to do with. `me` is our own connection, None before Hello.

    `lost`: (id, error name, text): what was asked of the connection is to be answered with that.
    `stall_ns`: how long at most our client's next message waits for one peer."""

    def __init__(
        self, clock: Clock, merge: Merge, waiting: Waiting, replica, asking, stall_ns: uint64_t
    ):
        self.clock = clock
        self.merge = merge
        self.waiting = waiting
        self.replica = replica
        self.asking = asking
        self.journal = Journal("kbusd-worker", per_second=LINES_PER_SECOND)
        self.stall_ns = stall_ns
        self.status = waiting.status
        self.broadcast = Broadcast()
        self.fanout = Fanout(self.broadcast)
        self.silent = None
        self.known = {}
        self.by_source = {}
        self.bells_of = []
        self.no_bells = []
        self.meeting = set()
        self.unsure = set()  # who introduced themselves, and may not have our half yet
        self.touched = []
        self.backlogged = []
        self.full = []
        self.bulks = []
        self.lost = []
        self.unmet = []  # whom we could not ask to be introduced to

    def descriptors(self) -> list:
        """What must stay open through lock-down."""
        return [self.status.fd, self.broadcast.fd]

    def peer(self, id) -> Peer:
        """The connection `id`, which there is or was."""
        if id == self.replica.me:
            return self.me
        peer = self.known.get(id)
        if peer is None:
            connection = self.replica.connections.get(id)
            peer = self.known[id] = Peer(id, f":1.{id}", connection)
        return peer

    def say(self, text):
        """A line for the admin."""
        self.journal.say(f":1.{self.replica.me}: {text}")

    # -- sending -------------------------------------------------------------------------------

    def publish(self, subscribers, envelope, head, body, fds, shared) -> cython.void:
        """A signal to its subscribers: written once into the Broadcast for those who read it, by
        Ring for those who do not yet; by Ring for all where some must not see it (not `shared`), or
        where it has descriptors or a large body. Raises Gone."""
        place: cython.pointer(uint8_t) = cython.NULL
        text: cython.p_char = envelope
        length: cython.size_t = len(envelope)
        peer: Peer
        count: cython.size_t = len(subscribers)
        if head.body_length > LARGE_BODY and count:
            # One memfd for all of them.
            own = memfd.sealed(b"kbusd-body", _bytes(body, head.body_length))
            try:
                self._publish_large(subscribers, envelope, head, body, (*fds, own))
            finally:
                os.close(own)
            return
        head.stamp = self.clock.next()
        if count > 1 and shared and not fds:
            head.envelope_length = length
            head.length = (HEAD + length + head.body_length + 7) & ~7
            place = self._reserve(subscribers, head.length)
        self.begin(head.stamp)
        if place != cython.NULL:
            head.aux = self.broadcast.position + head.length
        for item in subscribers:
            peer = cython.cast(Peer, item)
            if peer is self.me:
                continue
            if place == cython.NULL or peer.subscriber is None or not peer.subscriber.joined:
                self.must_send(peer, head, envelope, body, fds)
        if place != cython.NULL:
            head.aux = 0
            memcpy(place, head, HEAD)
            memcpy(place + HEAD, text, length)
            memcpy(place + HEAD + length, body, head.body_length)
            self.fanout.commit()
            for item in subscribers:
                peer = cython.cast(Peer, item)
                if peer.subscriber is not None and peer.subscriber.joined:
                    self.fanout.want(peer.subscriber)
                    if not peer.touched:
                        peer.touched = True
                        self.touched.append(peer)
        self.end()

    def _publish_large(self, subscribers, envelope, head, body, fds) -> cython.void:
        large: FrameHead = head[0]
        peer: Peer
        large.kind = LARGE
        large.aux = head.body_length
        large.body_length = 0
        self.begin(self.clock.next())
        for item in subscribers:
            peer = cython.cast(Peer, item)
            if peer is not self.me:
                self.must_send(peer, cython.address(large), envelope, body, fds)
        self.end()

    def _reserve(self, subscribers, length) -> cython.pointer(uint8_t):
        """Room in the Broadcast; NULL if fewer than two of the subscribers read it. Those that can
        join do; those that are in the way go on by Ring."""
        place: cython.pointer(uint8_t)
        peer: Peer
        joined: cython.size_t = 0
        for item in subscribers:
            peer = cython.cast(Peer, item)
            if peer.state == READY and not peer.subscriber.joined:
                self._join(peer)
            if peer.subscriber is not None and peer.subscriber.joined:
                joined += 1
        if joined < 2:
            return cython.NULL
        place = self.fanout.reserve(length)
        if place == cython.NULL:
            for subscriber in self.fanout.late(length):
                self._demote(subscriber)
            place = self.fanout.reserve(length)
        return place

    def _join(self, peer: Peer):
        """From the MARK on, the peer reads our Broadcast. Not if there is no room for that: a MARK that waits,
        of a peer that is not spared yet, would have it read what is overwritten by then."""
        head: FrameHead
        if peer.backlog or peer.subscriber.broken or peer.apart:
            return
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = MARK
        head.aux = self.broadcast.position
        head.stamp = self.clock.next()
        if peer._write(cython.address(head), b"", cython.NULL, ()):
            self.fanout.join(peer.subscriber)

    def _demote(self, subscriber: Subscriber):
        """A subscriber that has not read on: what it misses goes by its Ring (fanout.py, rule 3)."""
        head: FrameHead
        peer: Peer = subscriber.owner
        for raw, envelope, body in self.fanout.demote(subscriber):
            source: cython.p_char = raw
            data: cython.p_char = body
            memcpy(cython.address(head), source, cython.sizeof(FrameHead))
            place = cython.cast(cython.pointer(cython.const[uint8_t]), data)
            self.must_send(peer, cython.address(head), envelope, place, ())
        if subscriber.broken:
            self.drop(peer, "a position beyond the end of our Broadcast")
            return
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = MARK
        head.aux = STOP
        self.must_send(peer, cython.address(head), b"", cython.NULL, ())

    def send(self, peer, head, envelope, body, fds) -> cython.bint:
        """One frame to one peer; asks for an introduction if there was none. False, and nothing is
        sent, if our quota of what waits for it is used up."""
        if peer.backlog_bytes > SUSPECT and not peer.accused:
            self._accuse(peer)
        if peer.backlog_bytes > BACKLOG:
            return False
        self._put(peer, head, envelope, body, fds)
        return True

    def _accuse(self, peer: Peer):
        """It takes little or nothing: if its worker does not run, the broker has it ended."""
        peer.accused = True
        self.asking.line.send(entries.Stuck(0, peer.id))

    def _put(self, peer, head, envelope, body, fds) -> cython.void:
        """One frame to one peer, or to what waits for it."""
        copy: FrameHead = head[0]
        own: cython.int = -1
        part: uint32_t[2]
        if peer.state == GONE:
            return
        if (head.kind == MESSAGE or head.kind == COPY) and head.body_length > LARGE_BODY:
            own = memfd.sealed(b"kbusd-body", _bytes(body, head.body_length))
            if head.kind == COPY:
                copy.kind = LARGE_COPY
            else:
                copy.kind = LARGE
                copy.aux = head.body_length
            copy.body_length = 0
            fds = (*fds, own)
        elif head.kind == BULK and peer.bulk.reserved:
            if peer.bulk.carry():
                part[0] = peer.bulk.piped_at
                part[1] = peer.bulk.piped
                copy.body_length = 8
                body = cython.cast(cython.pointer(cython.const[uint8_t]), part)
            copy.aux = peer.bulk.commit()
            if copy.aux & BULK_FRESH:
                fds = (*fds, peer.bulk.fd)
        try:
            if not peer.put(cython.address(copy), envelope, body, fds, self.clock):
                if peer.state == NEW:
                    self.introduce(peer)
                self._hold_back(peer)
            elif not peer.touched:
                peer.touched = True
                self.touched.append(peer)
        except HostilePeer as error:
            self.drop(peer, str(error))
        finally:
            if own >= 0:
                os.close(own)
            if copy.aux & BULK_FRESH and copy.kind == BULK and peer.bulk is not None:
                peer.bulk.close_fd()

    def must_send(self, peer, head, envelope, body, fds) -> cython.void:
        """`send` what nobody waits for an answer to, even beyond the quota: it would be lost unseen.
        Our client's next message then waits."""
        if self.send(peer, head, envelope, body, fds):
            return
        if peer not in self.full:
            self._accuse(peer)
            self.full.append(peer)
            peer.full_at = monotonic()
        self._put(peer, head, envelope, body, fds)

    def begin(self, stamp) -> cython.void:
        """What follows goes to more than one ring, with stamps from `stamp` on."""
        if not self.begun:
            self.begun = True
            self.begun_at = stamp
            self.broadcast.begin(stamp)
            if self.silent is not None:
                self.silent.begin(stamp)

    def end(self) -> cython.void:
        """It stands in all of them: not while some of it waits, unless for one that is late."""
        if self.begun and not self.slow:
            self.begun = False
            self.broadcast.end()
            if self.silent is not None:
                self.silent.end()

    def bells(self) -> cython.void:
        """Wake the workers that got frames; once, however many frames."""
        peer: Peer
        if self.backlogged:
            still = []
            self.slow = 0
            for item in self.backlogged:
                peer = cython.cast(Peer, item)
                if peer.state == READY:
                    self._relieve(peer)
                    if peer.state == READY and not peer.touched:
                        peer.touched = True
                        self.touched.append(peer)
                if peer.backlog:
                    still.append(peer)
                    self.slow += not peer.late
                else:
                    peer.late = False
                    peer.accused = False
            self.backlogged = still
            self.end()
        for item in self.touched:
            peer = cython.cast(Peer, item)
            peer.touched = False
            if peer.state == READY:
                peer.ring_bell()
        self.touched.clear()

    def _relieve(self, peer: Peer):
        """Write what waits for the peer, as far as there is room."""
        try:
            peer.flush()
        except HostilePeer as error:
            self.drop(peer, str(error))

    def _hold_back(self, peer: Peer):
        """Frames wait for the peer's ring, or for its introduction."""
        if peer not in self.backlogged:
            self.backlogged.append(peer)
            if not peer.late:
                self.slow += 1

    # -- large bodies --------------------------------------------------------------------------

    def bulk(self, peer, length) -> Bulk:
        """The bulk area to a peer that is READY, for a body of `length` bytes; None if it can't have one."""
        large: cython.bint = length > BULK_MOST
        if peer.bulk is None:
            peer.bulk = Bulk(peer.view, peer.their_slot)
        if large and peer.bulk.size < BULK_LARGE:
            for item in self.bulks:
                other: Peer = item
                if other.bulk is not None and other.bulk.size > BULK_SIZE:
                    return None
            self._give_back(peer)
        if peer.bulk.base == cython.NULL:
            if peer not in self.bulks:
                if cython.cast(cython.size_t, len(self.bulks)) >= MAX_BULKS:
                    return None
                self.bulks.append(peer)
            if peer.bulk.open(BULK_LARGE if large else BULK_SIZE, peer.carry) < 0:
                return None
        return peer.bulk

    def tidy(self) -> cython.bint:
        """Give back the bulk areas that nobody has used for a while; True: some are left."""
        peer: Peer
        kept = []
        for item in self.bulks:
            peer = cython.cast(Peer, item)
            if peer.bulk is None:
                continue
            peer.bulk.idle += 1
            if peer.bulk.idle > IDLE_TIDIES:
                self._give_back(peer)
            if peer.bulk is not None and peer.bulk.base != cython.NULL:
                kept.append(peer)
        self.bulks = kept
        return len(kept) > 0

    def _give_back(self, peer: Peer):
        """Let go of the bulk area to the peer, unless something of it is in use."""
        head: FrameHead
        if peer.bulk.release():
            memset(cython.address(head), 0, cython.sizeof(FrameHead))
            head.kind = BULK
            self.must_send(peer, cython.address(head), b"", cython.NULL, ())

    # -- waiting for peers ---------------------------------------------------------------------

    def waits(self) -> cython.bint:
        """Whether our client's next message must wait for an introduction or for room. That ends
        with `stall_until`: a peer that hangs holds up nobody for longer."""
        peer: Peer
        if self.full and self._is_full():
            return True
        if not self.meeting and not self.slow:
            self.stall_until = 0
            return False
        now: uint64_t = self.clock.next()
        if self.stall_until == 0:
            self.stall_until = now + self.stall_ns
        if now < self.stall_until:
            return True
        # Nobody is waited for twice, until he has caught up.
        for item in (*self.meeting, *self.backlogged):
            peer = item
            peer.late = True
            self.unsure.discard(peer)
        self.meeting.clear()
        self.slow = 0
        self.stall_until = 0
        self.end()
        return False

    def _is_full(self) -> cython.bint:
        """Whether a peer has its whole quota waiting. That ends when it takes some, when the broker
        has ended its worker, or when its time is over."""
        peer: Peer
        still = []
        now: uint64_t = monotonic()
        for item in self.full:
            peer = item
            if peer.backlog_bytes <= BACKLOG:  # or it is gone
                peer.full_for += now - peer.full_at
            elif peer.full_for + now - peer.full_at > PATIENCE_NS:
                self.drop(peer, f"it leaves {peer.backlog_bytes} bytes untaken")
            else:
                still.append(peer)
        self.full = still
        return len(still) > 0

    def are_met(self, peers) -> cython.bint:
        """Whether all of `peers` are introduced, or are not waited for; asks for introductions.

        A message waits for all whom it concerns: else one of them could react to it before another
        has it, or what our client asks of the bus next could be in the log before it."""
        peer: Peer
        met = True
        for item in peers:
            peer = item
            if peer is self.me or peer.state == GONE or peer.late:
                continue
            if peer.state == READY:
                if peer not in self.unsure:
                    continue
                self.meeting.add(peer)  # till it rings
            elif peer.state == NEW:
                self.introduce(peer)
            met = False
        return met

    # -- introductions -------------------------------------------------------------------------

    def _half(self, peer: Peer):
        """Our half of an introduction: slots and descriptors; kept if the two halves cross."""
        ring = Ring()
        peer.asked(ring, self.status.take_slot(), self.status.take_slot())
        known = peer.connection
        peer.apart = known is None or bool(known.credentials.endpoint or known.custom)
        if peer.apart and self.silent is None:
            self.silent = Broadcast(SILENT_SIZE)
            if self.begun:
                self.silent.begin(self.begun_at)
        return self._what_it_gets(peer)

    def _what_it_gets(self, peer: Peer):
        """Who is behind an endpoint gets a Broadcast that only says what is on its way: what its client
        may not hear stands in the other."""
        broadcast: Broadcast = self.silent if peer.apart else self.broadcast
        return [peer.ring.fd, self.status.fd, broadcast.fd]

    def introduce(self, peer: Peer):
        """Ask for an introduction; frames wait meanwhile."""
        if self.me is None:
            return
        fds = self._half(peer)
        self.meeting.add(peer)
        try:
            self.asking.ask(
                entries.Introduce(0, peer.id, peer.slot, peer.broadcast_slot),
                lambda answer, fds: self._introduced(peer, answer, fds),
                fds,
            )
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            self.unmet.append(peer)

    def give_up(self) -> None:
        """Those whom no descriptors could be sent to, as our user has too many on the way: what was to
        go to them is answered, and a later message asks again."""
        peer: Peer
        unmet, self.unmet = self.unmet, []
        for each in unmet:
            peer = each
            peer.late = True  # no message waits for it to be introduced
            self.say(f"no introduction to {peer.name}: {TOO_MANY}")
            self._introduced(peer, entries.Failure(0, LIMITS_EXCEEDED, TOO_MANY), [])

    def _introduced(self, peer: Peer, answer, fds):
        if peer not in self.unsure:
            self.meeting.discard(peer)
        if peer.state != ASKED:  # the peer's own introduction came first, or the peer went
            return
        if isinstance(answer, entries.Failure):
            self._refused(peer, answer)
            return
        if answer.value is None or len(fds) != MEMFDS + SHARED:
            return
        self._meet(peer, answer.value[0], answer.value[1], fds)
        if peer.state == READY:
            ring_doorbell(peer.bell)  # from here on we see what it writes

    def introduced_by(self, message, fds):
        """A peer wants to reach us: entries.Introduction. Raises Gone."""
        peer: Peer = self.peer(message.peer)
        if peer.state == READY or peer.state == GONE:
            raise Gone(f"the broker introduced {peer.name} twice")
        mine = self._half(peer) if peer.state == NEW else self._what_it_gets(peer)
        try:
            self.asking.line.send(
                entries.Introduced(message.request, peer.slot, peer.broadcast_slot), mine
            )
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            self.say(f"no introduction to {peer.name}: {TOO_MANY}")
            if peer.state == ASKED:
                self._free_slots(peer)
                peer.again()
            return  # the broker gives up waiting for our answer, and says so to both
        self._meet(peer, message.slot, message.broadcast_slot, fds)
        if peer.state == READY:
            self.unsure.add(peer)

    def _meet(self, peer: Peer, their_slot, their_broadcast_slot, fds):
        """Map the peer's half. A half that breaks a rule is the peer's loss alone. What is taken of `fds` does not
        stay in there."""
        ring_fd, status_fd, broadcast_fd, bell, side, carry = fds
        try:
            reader = RingReader(ring_fd, self.status, peer.slot)
            broadcast = BroadcastReader(broadcast_fd, 0)
            view = StatusView(status_fd)
            subscriber = Subscriber(view, their_broadcast_slot, peer)
        except RingError as error:
            self.say(f"refused the rings of {peer.name}: {error}")
            peer.gone()
            return
        del fds[MEMFDS:]  # ours from here on
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, side)
        peer.ready(reader, view, their_slot, subscriber, bell, sock, carry)
        peer.ring.close_fd()
        self.merge.add(reader, broadcast, peer.broadcast_slot, bell)
        self._listen(peer)
        self.by_source[reader] = peer
        if peer.backlog:
            self._hold_back(peer)
        else:
            peer.late = False

    def _listen(self, peer: Peer):
        """From here on the peer's bell wakes us."""
        if self.no_bells:
            peer.bell_at = self.no_bells.pop()
            self.bells_of[peer.bell_at] = peer
        else:
            peer.bell_at = len(self.bells_of)
            self.bells_of.append(peer)
        peer.refuses = refuses(peer.bell)
        self.waiting.watch(peer.bell, BELLS + peer.bell_at, EPOLLIN)

    def rung(self, source) -> cython.void:
        """A peer's bell has rung: `source` of the event says whose."""
        item = self.bells_of[source - BELLS]
        if item is None:
            return  # it was let go of since
        peer: Peer = cython.cast(Peer, item)
        heard: Heard = hear(peer.bell, peer.refuses)
        if peer in self.unsure:
            self._is_sure(peer)
        if heard == OVER:
            self._unheard(peer)  # the log says so, too, if it is gone
        elif heard == GIFTS:
            self.drop(peer, "it sends descriptors along with its bell")

    def _is_sure(self, peer: Peer):
        """No message has to wait for the peer to have our half."""
        self.unsure.discard(peer)
        self.meeting.discard(peer)

    def _unheard(self, peer: Peer):
        if peer.bell_at >= 0:
            self.waiting.forget(peer.bell)
            self.bells_of[peer.bell_at] = None
            self.no_bells.append(peer.bell_at)
            peer.bell_at = -1

    def _refused(self, peer: Peer, failure):
        """No introduction: calls that waited for it are answered."""
        self.lost.append((peer.id, failure.error, failure.message))
        self._free_slots(peer)
        peer.again()

    def withdrawn(self, id):
        """The introduction by `id` is void: the peer's rings are forgotten."""
        peer = self.known.get(id)
        if peer is not None:
            self.detach(peer)
            self._tell(cython.cast(Peer, peer).again(), f"{peer.name} has sent")

    # -- the end of a peer ---------------------------------------------------------------------

    def left(self, id) -> bool:
        """Its connection ended; what it had sent is delivered. False if we did not know it."""
        peer: Peer = self.known.pop(id, None)
        if peer is None:
            return False
        self.detach(peer)
        self._tell(peer.gone(), f"{peer.name} has sent")
        return True

    def drop(self, peer: Peer, text):
        """The peer's worker broke a rule: have nothing to do with it any more."""
        self.say(f"dropped {peer.name}: {text}")
        self.detach(peer)
        self.lost.append((peer.id, NO_REPLY, NO_REPLY_DISCONNECTED))
        self._tell(peer.gone(), f"{peer.name} has sent")

    def release(self, fds: list) -> None:
        """Close what came from the broker and nobody has taken."""
        self._tell(part_all(fds), "was on its way to us")

    def _tell(self, kept: int, what: str):
        if kept:
            self.say(f"{kept} sockets stay open: it might take for ever to close what {what}")

    def detach(self, peer: Peer):
        """Neither its rings nor its bell are looked at any more."""
        self._unheard(peer)
        self._is_sure(peer)
        if peer.reader is not None:
            self.fanout.leave(peer.subscriber)
            self.merge.remove(peer.reader)
            self.by_source.pop(peer.reader, None)
            self._free_slots(peer)

    def _free_slots(self, peer: Peer):
        if peer.bulk_view is not None:
            peer.bulk_view.close()
        self.status.free_slot(peer.slot)
        self.status.free_slot(peer.broadcast_slot)


@cython.cfunc
def _bytes(data: cython.pointer(cython.const[uint8_t]), length: cython.size_t) -> bytes:
    return PyBytes_FromStringAndSize(cython.cast(cython.p_char, data), length)
