# cython: boundscheck=False
"""Another worker, as this one sees it: the two rings between them, its doorbell, the side socket.

Frames that find no room, or no introduction yet, wait in a backlog in order. The peer is hostile:
what it claims of positions is checked by the rings, what it sends by whoever reads it; a peer
that breaks the rules is dropped, which its own client notices and nobody else.
"""

import array
import os
import socket
import struct
from collections import deque

import cython
from cython.cimports.kbusd.rings.clock import Clock
from cython.cimports.kbusd.rings.doorbell import ring_doorbell
from cython.cimports.kbusd.rings.fanout import Subscriber
from cython.cimports.kbusd.rings.frame import MESSAGE, FrameHead
from cython.cimports.kbusd.rings.ring import Ring, RingReader
from cython.cimports.kbusd.rings.status import StatusView
from cython.cimports.libc.stdint import uint8_t
from cython.cimports.libc.string import memcpy, memset

from kbusd.rings.values import Frame

NEW = 0  # known by the log alone
ASKED = 1  # Introduce is on its way
READY = 2  # rings are mapped
GONE = 3  # its connection ended

HEAD = cython.declare(cython.size_t, 40)
_STAMP = struct.Struct("<Q")


class HostilePeer(Exception):
    """A peer's worker broke the rules of the rings; the text says which."""


@cython.cclass
class Template:
    """What this worker has decided about one envelope of one peer: the header its client sees, or
    why it sees nothing. Holds for one `epoch` of names and policy."""


@cython.cclass
class Peer:
    """State is NEW, ASKED, READY or GONE."""

    def __init__(self, id, name, connection):
        self.id = id
        self.name = name
        self.connection = connection
        self.state = NEW
        self.doorbell = -1
        self.backlog = deque()
        self.backlog_bytes = 0
        self.templates = {}
        self.touched = False

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
        doorbell: int,
        side: socket.socket,
    ) -> None:
        """The peer's half has come: frames may flow."""
        self.reader = reader
        self.view = view
        self.subscriber = subscriber
        self.doorbell = doorbell
        self.side = side
        self.their_slot = their_slot
        self.ring.attach(view, their_slot)
        self.state = READY

    def forget(self) -> None:
        """Drop what was introduced; descriptors that wait are closed."""
        if self.doorbell >= 0:
            os.close(self.doorbell)
            self.side.close()
        self.doorbell = -1
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

    def gone(self) -> None:
        self.forget()
        self.state = GONE

    def again(self) -> None:
        """The introduction failed; a later message may ask again."""
        self.forget()
        self.state = NEW

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
            raise HostilePeer(f"the side socket failed: {error.strerror}") from None
        return True

    def receive_fds(self, count: cython.size_t) -> tuple:
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
            for fd in fds:
                os.close(fd)
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

    def ring_bell(self) -> None:
        """Wake the peer's worker if it sleeps."""
        if self.view.sleeping():
            ring_doorbell(self.doorbell)
