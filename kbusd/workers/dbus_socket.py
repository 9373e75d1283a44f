# cython: boundscheck=False
"""The engine of a D-Bus worker: one client's socket on one side, the bus's rings on the other.

A message goes down this file in the order in which it travels: `_messages` cuts the client's
bytes, `_message` checks one, `_route` finds out whom it goes to, `_forward` writes it to a ring;
in the receiver's worker `_inbound` merges rings and log, `_deliver` checks a frame again, `_emit`
writes it for the client. Everything that comes in on either side is hostile: the client's bytes
are checked whole before they go anywhere, frames are copied out of shared memory first.
"""

import os
import socket
from collections import deque

import cython
import msgspec
from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize
from cython.cimports.kbusd.rings.broadcast import Broadcast, BroadcastReader
from cython.cimports.kbusd.rings.bulk import BULK_FRESH, BULK_MOST, Area, Bulk, BulkView
from cython.cimports.kbusd.rings.clock import Clock, monotonic
from cython.cimports.kbusd.rings.doorbell import Doorbell
from cython.cimports.kbusd.rings.fanout import Fanout, Subscriber
from cython.cimports.kbusd.rings.frame import STOP, FrameHead
from cython.cimports.kbusd.rings.memfd import large_map
from cython.cimports.kbusd.rings.merge import Merge
from cython.cimports.kbusd.rings.ring import Ring, RingReader
from cython.cimports.kbusd.rings.status import StatusPage, StatusView
from cython.cimports.kbusd.wire.body import check as check_body
from cython.cimports.kbusd.wire.body import opaque_from
from cython.cimports.kbusd.wire.header import Header, message_length, scan
from cython.cimports.kbusd.workers.input import Input
from cython.cimports.kbusd.workers.libc import (
    EINTR,
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    EPOLL_CTL_DEL,
    EPOLL_CTL_MOD,
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    epoll_wait,
    errno,
    munmap,
    sched_yield,
)
from cython.cimports.kbusd.workers.output import Output
from cython.cimports.kbusd.workers.peer import Peer, Template
from cython.cimports.libc.stdint import uint8_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcpy, memset

from kbusd.policy.decide import ClientPolicy
from kbusd.rings import entries, memfd
from kbusd.rings import envelope as envelopes
from kbusd.rings.journal import Journal
from kbusd.rings.line import LineError, close_all
from kbusd.rings.memfd import RingError
from kbusd.wire import body as wire_body
from kbusd.wire import header as wire_header
from kbusd.workers import driver as drivers
from kbusd.workers.peer import HostilePeer
from kbusd.workers.replica import BUS_ID, BUS_NAME, Replica, ReplicaError
from kbusd.workers.routing import ACCESS_DENIED, Router
from kbusd.workers.shares import Shares

CALL = cython.declare(cython.int, 1)
RETURN = cython.declare(cython.int, 2)
ERROR = cython.declare(cython.int, 3)
SIGNAL = cython.declare(cython.int, 4)
NO_REPLY = cython.declare(cython.int, 1)
NO_AUTO_START = cython.declare(cython.int, 2)

MESSAGE = cython.declare(cython.int, 1)
MARK = cython.declare(cython.int, 3)
LARGE = cython.declare(cython.int, 4)
COPY = cython.declare(cython.int, 5)
REFUSED = cython.declare(cython.int, 6)
BULK = cython.declare(cython.int, 7)
LARGE_COPY = cython.declare(cython.int, 8)

NEW = cython.declare(cython.int, 0)
ASKED = cython.declare(cython.int, 1)
READY = cython.declare(cython.int, 2)
GONE = cython.declare(cython.int, 3)

HEAD = cython.declare(cython.size_t, 40)
FROM_CLIENT, FROM_PEERS, FROM_BROKER, FROM_SUPERVISOR = range(4)
CLIENT = cython.declare(cython.uint, 0)
PEERS = cython.declare(cython.uint, 1)
BROKER = cython.declare(cython.uint, 2)
SUPERVISOR = cython.declare(cython.uint, 3)

# A body above this travels through the bulk area if the peer has one, or else as a sealed memfd. Per
# message of 64 KiB both ways, the bus spends 37 µs by the ring and 43 by the area; of 256 KiB, which
# no ring takes, 120 by the area and 500 by memfds (tests/bench, payload).
LARGE_BODY = cython.declare(cython.size_t, 98304)
# A body above this is received straight into the bulk area, if the client sends such ones in a row.
BULK_LEAST = cython.declare(cython.size_t, 24576)
PREFIX = cython.declare(cython.size_t, 1024)  # of a body in the bulk area, copied in any case
MAX_MESSAGE = cython.declare(cython.size_t, 128 << 20)  # D-Bus specification, "Message Protocol"
MAX_BULKS = cython.declare(cython.size_t, 4)  # areas that a worker has at once, 4 MiB each
# What large messages leave behind is looked at so often; a bulk area goes after so many looks
# without use, and the spare segment of the output at the first.
TIDY_NS = cython.declare(uint64_t, 1_000_000_000)
IDLE_TIDIES = cython.declare(cython.int, 3)
MAX_ROUTES = cython.declare(cython.int, 1024)
# While a peer is being introduced, or has no room, our client's next messages wait this long: so
# that order holds across receivers, and a peer that hangs holds up nobody for longer.
STALL_NS = cython.declare(uint64_t, 250_000_000)
# How long a worker looks for work before it sleeps: grown while sleeps turn out short, as a
# hypervisor does (halt polling); nothing once one lasted longer.
POLL_LEAST = cython.declare(uint64_t, 10_000)
POLL_MOST = cython.declare(uint64_t, 50_000)
# Where a peer has promised something, look for it so often, mostly in vain for less than 10 µs; then
# leave the core to whoever it waits for.
HELD_LOOKS = cython.declare(cython.int, 50)
CONTENDED = cython.declare(uint64_t, 200_000)
POLL_PAUSE = cython.declare(uint64_t, 1_000_000_000)
LEAVE_NS = cython.declare(uint64_t, 2_000_000_000)
# Whose it is that waits for our client is counted if it is more than this, or an eighth of the limit.
UNCOUNTED = cython.declare(cython.size_t, 131072)
LINES_PER_SECOND = 10  # of one worker in the log: a client that is refused again and again is known
BACKLOG = cython.declare(cython.size_t, 4 << 20)  # a sender's quota of what waits for one peer

BUS_PATH = "/org/freedesktop/DBus"
NO_REPLY_ERROR = "org.freedesktop.DBus.Error.NoReply"
LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
NOT_SUPPORTED = "org.freedesktop.DBus.Error.NotSupported"
TIMED_OUT_TEXT = "Message did not receive a reply (timeout by message bus)"
NO_FDS_TEXT = (
    "Tried to send message with Unix file descriptors to a client that doesn't support that."
)
FULL_TEXT = "The sender's share of the destination's queue is full (limit max_outgoing_bytes)"
DISCONNECTED_TEXT = "Message recipient disconnected from message bus without replying"


_CHANGES = frozenset(
    (
        entries.ConnectionRemoved,
        entries.NameOwnerChanged,
        entries.QueueChanged,
        entries.MonitorAttached,
        entries.PolicyChanged,
    )
)
msgspec_replace = msgspec.structs.replace
decode_snapshot = msgspec.msgpack.Decoder(entries.Snapshot).decode
decode_entry = msgspec.msgpack.Decoder(entries.LogEntry).decode
encode_refusal = msgspec.msgpack.Encoder().encode
decode_refusal = msgspec.msgpack.Decoder(tuple[str, str]).decode


class Gone(Exception):
    """The client's connection ends here; the text is for the log."""


@cython.cclass
class Route:
    """Whom the messages with one header go to. Holds for one `epoch` of names and policy, and for
    a broadcast also for one version of the match rules."""


@cython.cfunc
def _bytes(data: cython.pointer(cython.const[uint8_t]), length: cython.size_t) -> bytes:
    return PyBytes_FromStringAndSize(cython.cast(cython.p_char, data), length)


@cython.cfunc
@cython.exceptval(check=False)
def _store(place: cython.pointer(uint8_t), value: uint32_t, big: cython.bint) -> cython.void:
    if big:
        value = (
            ((value & 0xFF) << 24)
            | ((value & 0xFF00) << 8)
            | ((value >> 8) & 0xFF00)
            | (value >> 24)
        )
    memcpy(place, cython.address(value), 4)


@cython.cclass
class Engine:
    """Serves one client. Made before lock-down, without a client; `serve` then runs to its end.

    `stall_ns`: how long at most our client's next message waits for one peer."""

    def __init__(self, context, line, stall_ns: uint64_t = STALL_NS):
        self.stall_ns = stall_ns
        self.meeting = set()
        self.context = context
        self.line = line
        self.journal = Journal("kbusd-worker", per_second=LINES_PER_SECOND)
        self.clock = Clock()
        self.status = StatusPage()
        self.doorbell = Doorbell()
        self.broadcast = Broadcast()
        self.fanout = Fanout(self.broadcast)
        self.log = BroadcastReader(context.log_fd, 0)
        self.merge = Merge(self.clock)
        self.input = Input()
        self.output = Output()
        self.shares = Shares(0)
        self.replica = Replica()
        self.peers = {}
        self.by_source = {}
        self.routes = {}
        self.pending = {}
        self.requests = {}
        self.activating = {}
        self.touched = []
        self.backlogged = []
        self.bulks = []
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        self.serial = 0
        self.request = 0
        self.due = deque()

    def descriptors(self) -> list:
        """What must stay open through lock-down."""
        return [
            self.epoll,
            self.doorbell.read_fd,
            self.doorbell.write_fd,
            self.status.fd,
            self.broadcast.fd,
        ]

    # -- life ----------------------------------------------------------------------------------

    def serve(self, client, supervisor, credentials, rest, fds, unix_fds) -> None:
        """Serve the authenticated client on descriptor `client` until it goes."""
        self.client = client
        self.supervisor = supervisor
        self.credentials = credentials
        self.unix_fds = unix_fds
        policy = self._take_policy()
        self.router = Router(self.replica, policy, self._say)
        self.driver = drivers.Driver(self.replica, self.context.bus, credentials)
        reason = ""
        try:
            self._register(self.doorbell.read_fd, PEERS, EPOLLIN)
            self._register(self.line.fileno(), BROKER, EPOLLIN)
            self._register(supervisor, SUPERVISOR, EPOLLIN)
            self._register(client, CLIENT, EPOLLIN)
            self.reading = True
            if rest or fds:
                self.input.feed(rest, fds)
                self._messages()
            self._loop()
        except Gone as error:
            reason = str(error)
        except EOFError:
            return  # the broker is gone: the bus ends
        self.broadcast.end()
        try:
            self._flush()
            self.line.send(entries.Leaving(0, reason))
            self.line.flush()
        except (Gone, OSError):
            pass

    def _register(self, fd, source, events):
        event: epoll_event
        event.events = events
        event.data.u32 = source
        if epoll_ctl(self.epoll, EPOLL_CTL_ADD, fd, cython.address(event)) < 0:
            raise OSError(errno, "epoll_ctl")

    def _loop(self) -> cython.void:
        events: epoll_event[8]
        source: cython.uint
        count: cython.int
        i: cython.int
        timeout: cython.int
        while True:
            self._inbound()
            if self.tidy_at and monotonic() >= self.tidy_at:
                self._tidy()
            if self.stopped:
                self._messages()
            self._bells()
            self._flush()
            if self.leaving:
                self._leave()
            else:
                self._watch_client()
            timeout = self._timeout()
            if self.tidy_at:
                timeout = self._until_tidy(timeout)
            if self.stopped and not self._waits():
                timeout = 0
            self.held = self.held + 1 if self.merge.holding else 0
            count = self._poll(events) if self.poll_ns and not self.held else 0
            if count == 0:
                count = self._sleep(events, timeout)
            if count < 0:
                if count == -2 or errno == EINTR:
                    continue
                raise OSError(errno, "epoll_wait")
            for i in range(count):
                source = events[i].data.u32
                if source == CLIENT:
                    if events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR):
                        if self.input.receive(self.client) < 0:
                            self._client_left()
                        self._messages()
                        if self.input.large_have < self.input.large_need and not self.leaving:
                            if self.input.receive(self.client) < 0:
                                self._client_left()
                            self._messages()
                elif source == PEERS:
                    self.doorbell.drain()
                elif source == BROKER:
                    self._from_broker()
                else:
                    raise Gone("the bus ends")

    def _client_left(self):
        """The client has closed. What it sent before is still delivered: some of it may wait for
        an introduction, or for room; for so long its connection stays."""
        event: epoll_event
        if self.input.broken:
            raise Gone("broke a rule of descriptor passing")
        self.leaving = True
        self.stall_until = 0
        self.leave_until = monotonic() + LEAVE_NS
        epoll_ctl(self.epoll, EPOLL_CTL_DEL, self.client, cython.address(event))

    def _leave(self):
        """End, if nothing that the client sent waits any more, or has waited too long."""
        if not (self.meeting or self.backlogged or self.busy):
            raise Gone("")
        if monotonic() > self.leave_until:
            raise Gone("left while what it had sent could not be delivered")

    def _poll(self, events: cython.pointer(epoll_event)) -> cython.int:
        """Look for something to do without sleeping, for `poll_ns` at the most: events as
        epoll_wait(2) gives them, -2 if a ring has something, 0 if time is up.

        Whoever else can run goes first; the wake-up that a short wait saves costs more than it."""
        count: cython.int
        now: uint64_t = monotonic()
        until: uint64_t = now + self.poll_ns
        before: uint64_t
        pending: cython.bint
        while True:
            pending = self.merge.pending()
            # What the client wrote before a frame came goes before it, so look at the client last.
            count = epoll_wait(self.epoll, events, 8, 0)
            if count != 0:
                return count
            if pending:
                return -2
            if now >= until:
                return 0
            before = now
            sched_yield()
            now = monotonic()
            if now - before > CONTENDED:
                # Somebody computes on this core: who yields waits for a whole slice of his,
                # who sleeps is woken ahead of him.
                self.poll_ns = 0
                self.poll_from = now + POLL_PAUSE

    def _sleep(self, events: cython.pointer(epoll_event), timeout: cython.int) -> cython.int:
        """Sleep until something comes; how long it was decides how long `_poll` will look."""
        count: cython.int
        begin: uint64_t = monotonic()
        self.status.set_sleeping(True)  # pairs with Peer.ring_bell: publish, fence, look
        if self.merge.pending():
            timeout = 1 if self.held > HELD_LOOKS else 0
        count = epoll_wait(self.epoll, events, 8, timeout)
        self.status.set_sleeping(False)
        if timeout != 0:
            if monotonic() - begin >= POLL_MOST:
                self.poll_ns = 0
            elif self.poll_ns < POLL_MOST and begin >= self.poll_from:
                self.poll_ns = self.poll_ns * 2 if self.poll_ns else POLL_LEAST
        return count

    def _watch_client(self) -> cython.void:
        """Ask for what we can use: input unless it must wait, output while something is left."""
        event: epoll_event
        reading: cython.bint = not (self._waits())
        writing: cython.bint = self.output.pending > 0
        if reading != self.reading or writing != self.writing:
            event.events = (EPOLLIN if reading else 0) | (EPOLLOUT if writing else 0)
            event.data.u32 = CLIENT
            epoll_ctl(self.epoll, EPOLL_CTL_MOD, self.client, cython.address(event))
            self.reading = reading
            self.writing = writing

    def _expire(self):
        """Answer calls that got no reply in time (limit reply_timeout); ms until the next is due."""
        now = monotonic()
        while self.due:
            at, serial, id = self.due[0]
            if self.pending.get(serial) != id:
                self.due.popleft()
            elif at > now:
                return 1 + (at - now) // 1_000_000
            else:
                self.due.popleft()
                del self.pending[serial]
                self._error(serial, NO_REPLY_ERROR, TIMED_OUT_TEXT)
                self._flush()
        return -1

    def _timeout(self) -> cython.int:
        """Milliseconds for epoll_wait(2)."""
        now: uint64_t
        if self.due:
            left: cython.int = self._expire()
            return left if left >= 0 and not self.stall_until else 50
        if self.merge.holding:
            return 1  # a peer has promised something and does not ring when it has come
        if self.leaving:
            return 50
        if self.stall_until:
            now = self.clock.next()
            if now < self.stall_until:
                return 1 + (self.stall_until - now) // 1_000_000
            return 50
        return -1

    def _until_tidy(self, timeout: cython.int) -> cython.int:
        now: uint64_t = monotonic()
        left: uint64_t = (self.tidy_at - now) // 1_000_000 + 1 if now < self.tidy_at else 0
        if timeout < 0 or left < cython.cast(uint64_t, timeout):
            return left
        return timeout

    def _tidy(self):
        """Give back what large messages have left behind and nobody has used for a while."""
        head: FrameHead
        peer: Peer
        left: cython.bint = self.output.trim()
        kept = []
        for item in self.bulks:
            peer = cython.cast(Peer, item)
            if peer.bulk is None:
                continue
            peer.bulk.idle += 1
            if peer.bulk.idle > IDLE_TIDIES and peer.bulk.release():
                memset(cython.address(head), 0, cython.sizeof(FrameHead))
                head.kind = BULK
                self._send(peer, cython.address(head), b"", cython.NULL, ())
            if peer.bulk is not None and peer.bulk.base != cython.NULL:
                kept.append(peer)
        self.bulks = kept
        self.tidy_at = monotonic() + TIDY_NS if left or kept else 0

    def _waits(self) -> cython.bint:
        return self.busy or self.fetching > 0 or ((self.meeting or self.slow) and self._stalled())

    def _stalled(self) -> cython.bint:
        """Whether our client's next message must wait for an introduction or for room."""
        peer: Peer
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
        self.meeting.clear()
        self.slow = 0
        self.stall_until = 0
        self._end()
        return False

    def _begin(self, stamp: uint64_t) -> cython.void:
        """What follows goes to more than one ring, with stamps from `stamp` on."""
        if not self.begun:
            self.begun = True
            self.broadcast.begin(stamp)

    def _end(self) -> cython.void:
        """It stands in all of them: not while some of it waits, unless for one that is late."""
        if self.begun and not self.slow:
            self.begun = False
            self.broadcast.end()

    def _flush(self) -> cython.void:
        if self.output.pending and not self.leaving and self.output.flush(self.client) < 0:
            self._client_left()

    def _bells(self) -> cython.void:
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
            self.backlogged = still
            self._end()
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
            self._drop(peer, str(error))

    # -- from our client -----------------------------------------------------------------------

    def _messages(self) -> cython.void:
        """Handle every whole message that the client has sent."""
        data: cython.pointer(uint8_t)
        have: cython.size_t
        total: cython.longlong
        self.stopped = False
        while True:
            if self.input.large_need:
                if self.input.large_have < self.input.large_need:
                    return
                data = self.input.data + self.input.start
                have = self.input.end - self.input.start
                if self._waits() or not self._message(data, have, True):
                    self.stopped = True
                    return
                self.input.start = self.input.end
                self.input.large_next = True
                continue
            have = self.input.end - self.input.start
            if have < 16:
                return
            data = self.input.data + self.input.start
            total = message_length(data)
            if total < 0:
                raise Gone(f"sent an invalid message: {wire_header.reason(total)}")
            if total > self.max_message:
                raise Gone(
                    f"sent a message of {total} bytes, over the limit max_message_size"
                    f" of {self.max_message}"
                )
            if cython.cast(cython.size_t, total) > have:
                if not self._begin_large(data, total, have):
                    self.input.make_room(total)
                return
            if self._waits() or not self._message(data, total, False):
                self.stopped = True
                return
            self.input.start += total
            self.input.large_next = cython.cast(cython.size_t, total) > BULK_LEAST

    def _begin_large(
        self, data: cython.pointer(uint8_t), total: cython.size_t, have: cython.size_t
    ) -> cython.bint:
        """If the body is large and the header is here, receive the rest into the bulk area or into
        a memfd."""
        header: Header
        body_length: uint32_t
        code: cython.int
        memcpy(cython.address(body_length), data + 4, 4)
        if data[0] == 66:  # 'B'
            body_length = (
                ((body_length & 0xFF) << 24)
                | ((body_length & 0xFF00) << 8)
                | ((body_length >> 8) & 0xFF00)
                | (body_length >> 24)
            )
        if body_length <= BULK_LEAST or total - body_length > have:
            return False
        code = scan(data, total - body_length, cython.address(header))
        if code < 0:
            raise Gone(f"sent an invalid message: {wire_header.reason(code)}")
        if body_length <= BULK_MOST and self._begin_bulk(cython.address(header), data):
            return True
        if body_length <= LARGE_BODY:
            return False
        try:
            self.input.begin_large(header.header_length, body_length)
        except OSError as error:
            raise Gone(f"no memory for a message of {total} bytes: {error.strerror}") from None
        return True

    def _begin_bulk(
        self, header: cython.pointer(Header), data: cython.pointer(uint8_t)
    ) -> cython.bint:
        """Receive a body where its receiver's worker will read it. Whether it goes there is only
        decided once it is here: names may have moved by then."""
        place: cython.pointer(uint8_t)
        route: Route
        if not self.loaded or header.type == SIGNAL or self.monitor or self.replica.monitors:
            return False
        if self.log.head() != self.log.position:
            self._inbound()
            if self.fetching:
                return False
        route = self._route(data, header, cython.NULL)
        if route.peer is None or route.peer.state != READY:
            return False
        bulk: Bulk = self._bulk(route.peer)
        if bulk is None:
            return False
        place = bulk.reserve(header.body_length)
        if place == cython.NULL:
            return False
        self.input.begin_bulk(header.header_length, header.body_length, place, bulk)
        return True

    def _bulk(self, peer: Peer) -> Bulk:
        """The bulk area to a peer that is READY; None if it can't have one."""
        if peer.bulk is None:
            peer.bulk = Bulk(peer.view, peer.their_slot)
        if peer.bulk.base == cython.NULL:
            if cython.cast(cython.size_t, len(self.bulks)) >= MAX_BULKS or peer.bulk.open() < 0:
                return None
            self.bulks.append(peer)
            if self.tidy_at == 0:
                self.tidy_at = monotonic() + TIDY_NS
        return peer.bulk

    def _message(
        self,
        data: cython.pointer(uint8_t),
        size: cython.size_t,
        large: cython.bint,
    ) -> cython.bint:
        """Check a message and send it on; False if it must wait until peers are introduced.

        `large`: its body is apart, in the bulk area or in a memfd."""
        header: Header
        route: Route
        body: cython.pointer(cython.const[uint8_t])
        code: cython.int
        bulk: Bulk = None
        code = scan(data, size, cython.address(header))
        if code < 0:
            raise Gone(f"sent an invalid message: {wire_header.reason(code)}")
        body = self.input.whole() if large else data + header.header_length
        code = check_body(
            body,
            header.body_length,
            data + header.signature_at,
            header.signature_len,
            header.endian == 66,
            header.unix_fds,
        )
        if code < 0:
            raise Gone(f"sent an invalid message: {wire_header.reason(code)}")
        if self.monitor:
            raise Gone("sent a message although it is a monitor")
        if self.loaded and self.log.head() != self.log.position:
            self._inbound()
            if self.fetching:
                return False
        route = self._route(data, cython.address(header), body)
        if (not route.met or self.replica.monitors) and self._must_wait(route):
            return False
        fds: tuple = ()
        if header.unix_fds:
            fds = self._take_fds(header.unix_fds)
        if large:
            bulk = self.input.bulk
        if (
            not large
            or route.peer is None
            or self.replica.monitors
            or (bulk is not None and bulk is not route.peer.bulk)
        ):
            self._forward(route, cython.address(header), body, fds, -1, None)
        else:
            self._forward(route, cython.address(header), body, fds, self.input.large_fd, bulk)
        if large:
            self.input.end_large()
            if bulk is not None:
                bulk.cancel()
            else:
                os.close(self.input.take_large())
        close_all(fds)
        return True

    def _must_wait(self, route: Route) -> cython.bint:
        """Whether a message must wait until all whom it concerns are introduced.

        Else one of them could react to it before another has it. Waiting ends with `stall_until`:
        a peer that hangs holds up nobody for longer."""
        peer: Peer
        peers = [route.peer] if route.peer is not None else list(route.subscribers or ())
        peers += [self._peer(id) for id in self.replica.monitors]
        waits = False
        for item in peers:
            peer = item
            if peer is self.me or peer.state == READY or peer.state == GONE or peer.late:
                continue
            if peer.state == NEW:
                self._introduce(peer)
            waits = True
        if not waits:
            route.met = True
            return False
        return self._stalled()

    def _take_fds(self, count) -> tuple:
        if not self.unix_fds:
            raise Gone("sent descriptors without having negotiated them")
        if count > self.max_fds:
            raise Gone(
                f"sent {count} descriptors in one message, over the limit"
                f" max_message_unix_fds of {self.max_fds}"
            )
        fds = self.input.take_fds(count)
        if len(fds) < count:
            close_all(fds)
            raise Gone(f"sent {len(fds)} descriptors with a message that counts {count}")
        return fds

    def _route(
        self,
        data: cython.pointer(uint8_t),
        header: cython.pointer(Header),
        body: cython.pointer(cython.const[uint8_t]),
    ) -> Route:
        """The route of a message: kept under the bytes of its header without what varies."""
        route: Route
        varying: uint8_t[16]
        memcpy(varying, data, 12)
        memset(data + 4, 0, 8)  # body length and serial
        data[2] = 0  # flags
        if header.reply_serial_at:
            memcpy(varying + 12, data + header.reply_serial_at, 4)
            memset(data + header.reply_serial_at, 0, 4)
        key = _bytes(data, 16 + header.fields_length)
        memcpy(data, varying, 12)
        if header.reply_serial_at:
            memcpy(data + header.reply_serial_at, varying + 12, 4)
        route = self.routes.get(key)
        if (
            route is not None
            and route.epoch == self.epoch
            and not route.depends
            and (not route.broadcast or route.matches == self.replica.matches_version)
        ):
            return route
        route = self._decide(
            key,
            header.reply_serial_at,
            header.flags,
            header.unix_fds,
            _bytes(body, header.body_length) if header.type == SIGNAL else b"",
            header.endian == 66,
        )
        if len(self.routes) >= MAX_ROUTES:
            self.routes.clear()
        # A refusal for want of an owner depends on the flags; it is decided anew each time.
        if route.error is None and route.activate is None:
            self.routes[key] = route
        return route

    def _decide(self, key, reply_at, flags, fds, body, big_endian) -> Route:
        parsed = wire_header.parse(_with_serials(key, reply_at, big_endian))
        envelope = envelopes.Envelope(
            parsed.type,
            big_endian,
            parsed.destination,
            parsed.path,
            parsed.interface,
            parsed.member,
            parsed.error_name,
            parsed.signature or "",
        )
        route = Route()
        route.facts = envelope
        route.envelope = envelopes.encode(envelope)
        route.epoch = self.epoch
        route.matches = self.replica.matches_version
        if self.replica.me == 0 and envelope.destination != BUS_NAME:
            raise Gone("sent a message other than Hello before Hello")
        decision = self.router.decide(
            envelope,
            flags,
            fds,
            lambda: wire_body.match_arguments(body, envelope.signature, big_endian),
        )
        route.error = decision.error
        route.activate = decision.activate
        route.refusals = decision.refusals
        route.broadcast = decision.broadcast
        route.depends = decision.depends
        if decision.broadcast:
            route.subscribers = tuple([self._peer(id) for id in decision.targets])
        elif decision.targets == (BUS_ID,):
            route.to_bus = True
        elif decision.targets:
            route.peer = self._peer(decision.targets[0])
            route.to_self = route.peer is self.me
            if route.to_self:
                route.peer = None
        return route

    def _peer(self, id) -> Peer:
        if id == self.replica.me:
            return self.me
        peer = self.peers.get(id)
        if peer is None:
            connection = self.replica.connections.get(id)
            peer = self.peers[id] = Peer(id, f":1.{id}", connection)
        return peer

    def _forward(
        self,
        route: Route,
        header: cython.pointer(Header),
        body: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
        large_fd: cython.int,
        bulk: Bulk,
    ) -> cython.void:
        """Send a message on. Its body is at `body`, and also in `large_fd` or reserved in `bulk`,
        if there is one."""
        head: FrameHead
        peer: Peer
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = MESSAGE
        head.flags = header.flags
        head.fds = header.unix_fds
        head.serial = header.serial
        head.reply_serial = header.reply_serial
        head.body_length = header.body_length
        if self.replica.monitors:
            head.stamp = self.clock.next()
            self._copy(
                route.facts,
                _raw(cython.address(head)),
                _bytes(body, header.body_length),
                fds,
                self.id,
            )
            if self.slow:
                self._begin(head.stamp)  # a monitor is not to see the answer first
        elif not self.loaded:
            self.hello = (route.facts, _raw(cython.address(head)))
        if route.peer is not None:
            if header.type == CALL and not header.flags & NO_REPLY:
                if cython.cast(cython.size_t, len(self.pending)) >= self.max_pending:
                    self._error(
                        header.serial,
                        LIMITS_EXCEEDED,
                        "The maximum number of pending replies per connection has been reached",
                    )
                    return
                self.pending[header.serial] = route.peer.id
                if self.reply_ns:
                    self.due.append((monotonic() + self.reply_ns, header.serial, route.peer.id))
            if large_fd >= 0:
                head.kind = LARGE
                head.aux = header.body_length
                head.body_length = 0
                fds = (*fds, large_fd)
            elif bulk is not None:
                head.kind = BULK
                head.body_length = 0
            self._send(route.peer, cython.address(head), route.envelope, body, fds)
        elif route.broadcast:
            for text in route.refusals:
                self._tell_monitors(self.driver.name, header.serial, text)
            self._publish(route, cython.address(head), body, fds)
        elif route.to_bus:
            self._call_bus(
                route, header.type, header.serial, header.flags, _bytes(body, header.body_length)
            )
        elif route.to_self:
            if header.type == CALL and not header.flags & NO_REPLY:
                self.pending[header.serial] = self.me.id
            self._to_myself(route, cython.address(head), body, fds)
        elif route.activate is not None:
            self._activate(
                route,
                header.type,
                header.flags,
                _raw(cython.address(head)),
                _bytes(body, header.body_length),
                fds,
            )
        elif route.error is not None:  # whatever it is, and whether it wants a reply or not
            self._error(header.serial, route.error[0], route.error[1])

    def _publish(
        self,
        route: Route,
        head: cython.pointer(FrameHead),
        body: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
    ) -> cython.void:
        """A signal to its subscribers: written once into the Broadcast for those who read it, by
        Ring for those who do not yet; by Ring for all where some must not see it (policy), or where
        it has descriptors or a large body."""
        place: cython.pointer(uint8_t) = cython.NULL
        text: cython.p_char = route.envelope
        length: cython.size_t = len(route.envelope)
        peer: Peer
        count: cython.size_t = len(route.subscribers)
        if head.body_length > LARGE_BODY and count:
            # One memfd for all of them.
            own = memfd.sealed(b"kbusd-body", _bytes(body, head.body_length))
            try:
                self._publish_large(route, head, body, fds, own)
            finally:
                os.close(own)
            return
        head.stamp = self.clock.next()
        if count > 1 and self.everyone and not route.refusals and not fds:
            head.envelope_length = length
            head.length = (HEAD + length + head.body_length + 7) & ~7
            place = self._reserve(route, head.length)
        self._begin(head.stamp)
        if place != cython.NULL:
            head.aux = self.broadcast.position + head.length
        for item in route.subscribers:
            peer = cython.cast(Peer, item)
            if peer is self.me:
                continue
            if place == cython.NULL or peer.subscriber is None or not peer.subscriber.joined:
                self._send(peer, head, route.envelope, body, fds)
        if place != cython.NULL:
            head.aux = 0
            memcpy(place, head, HEAD)
            memcpy(place + HEAD, text, length)
            memcpy(place + HEAD + length, body, head.body_length)
            self.fanout.commit()
            for item in route.subscribers:
                peer = cython.cast(Peer, item)
                if peer.subscriber is not None and peer.subscriber.joined:
                    self.fanout.want(peer.subscriber)
                    if not peer.touched:
                        peer.touched = True
                        self.touched.append(peer)
        self._end()
        if self.me in route.subscribers:
            self._to_myself(route, head, body, fds)

    def _publish_large(
        self,
        route: Route,
        head: cython.pointer(FrameHead),
        body: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
        own: cython.int,
    ) -> cython.void:
        large: FrameHead = head[0]
        peer: Peer
        large.kind = LARGE
        large.aux = head.body_length
        large.body_length = 0
        self._begin(self.clock.next())
        for item in route.subscribers:
            peer = cython.cast(Peer, item)
            if peer is not self.me:
                self._send(peer, cython.address(large), route.envelope, body, (*fds, own))
        self._end()
        if self.me in route.subscribers:
            self._to_myself(route, head, body, fds)

    def _reserve(self, route: Route, length: cython.size_t) -> cython.pointer(uint8_t):
        """Room in the Broadcast; NULL if fewer than two of the route's subscribers read it. Those
        that can join do; those that are in the way go on by Ring."""
        place: cython.pointer(uint8_t)
        peer: Peer
        joined: cython.size_t = 0
        for item in route.subscribers:
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
        """From the MARK on, the peer reads our Broadcast."""
        head: FrameHead
        if peer.backlog or peer.subscriber.broken:
            return
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = MARK
        head.aux = self.broadcast.position
        if peer.put(cython.address(head), b"", cython.NULL, (), self.clock):
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
            self._send(peer, cython.address(head), envelope, place, ())
        if subscriber.broken:
            self._drop(peer, "a position beyond the end of our Broadcast")
            return
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = MARK
        head.aux = STOP
        self._send(peer, cython.address(head), b"", cython.NULL, ())

    def _send(
        self,
        peer: Peer,
        head: cython.pointer(FrameHead),
        envelope: bytes,
        body: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
    ) -> cython.void:
        """One frame to one peer; asks for an introduction if there was none."""
        copy: FrameHead = head[0]
        own: cython.int = -1
        if peer.state == GONE:
            return
        if peer.backlog_bytes > BACKLOG:
            # The peer's worker does not run. Calls are answered; the rest would be lost unseen.
            if head.reply_serial == 0 and self.pending.pop(head.serial, None) is not None:
                self._error(head.serial, LIMITS_EXCEEDED, f"too much waits for {peer.name}")
                return
            raise Gone(f"sent more than {BACKLOG} bytes to {peer.name}, which does not take them")
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
            copy.aux = peer.bulk.commit()
            if copy.aux & BULK_FRESH:
                fds = (*fds, peer.bulk.fd)
        try:
            if not peer.put(cython.address(copy), envelope, body, fds, self.clock):
                if peer.state == NEW:
                    self._introduce(peer)
                self._hold_back(peer)
            elif not peer.touched:
                peer.touched = True
                self.touched.append(peer)
        except HostilePeer as error:
            self._drop(peer, str(error))
        finally:
            if own >= 0:
                os.close(own)
            if copy.aux & BULK_FRESH and copy.kind == BULK and peer.bulk is not None:
                peer.bulk.close_fd()

    def _to_myself(
        self,
        route: Route,
        head: cython.pointer(FrameHead),
        body: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
    ) -> cython.void:
        payload = route.envelope + _bytes(body, head.body_length)
        data: cython.p_char = payload
        head.envelope_length = len(route.envelope)
        self._deliver(
            self.me,
            head,
            cython.cast(cython.pointer(cython.const[uint8_t]), data),
            tuple([os.dup(fd) for fd in fds]),
        )

    def _copy(self, facts, raw, body: bytes, fds: tuple, sender):
        """A copy of a message for every monitor whose rules match it."""
        head: FrameHead
        source: cython.p_char = raw
        data: cython.p_char = body
        memcpy(cython.address(head), source, cython.sizeof(FrameHead))
        head.kind = COPY
        head.aux = cython.cast(uint64_t, cython.cast(cython.longlong, sender))
        ids, _ = self.replica.watching(
            facts.type,
            sender,
            facts.destination,
            facts.path,
            facts.interface,
            facts.member,
            lambda: wire_body.match_arguments(body, facts.signature, facts.big_endian),
        )
        envelope = envelopes.encode(facts)
        place = cython.cast(cython.pointer(cython.const[uint8_t]), data)
        for id in ids:
            if id != self.id:
                self._send(self._peer(id), cython.address(head), envelope, place, fds)

    # -- the bus itself ------------------------------------------------------------------------

    def _call_bus(self, route: Route, type, serial, flags, body):
        facts = route.facts
        if type != CALL:
            return  # the bus expects no signals and no replies
        self._act_and_note(
            self.driver.call(
                drivers.Call(
                    serial,
                    flags,
                    facts.path,
                    facts.interface,
                    facts.member,
                    facts.signature,
                    body,
                    facts.big_endian,
                    facts.destination,
                )
            )
        )

    def _act_and_note(self, actions):
        self._act(actions)
        # What the client says next must not overtake what it has just changed.
        self.busy = self.driver.busy

    def _act(self, actions):
        for action in actions:
            kind = type(action)
            if kind is drivers.Return:
                self._bus_message(
                    RETURN, action.reply_serial, None, None, action.signature, action.body
                )
            elif kind is drivers.Error:
                self._error(action.reply_serial, action.name, action.text)
            elif kind is drivers.Signal:
                self._bus_message(
                    SIGNAL,
                    0,
                    action.member,
                    None,
                    action.signature,
                    action.body,
                    action.destination,
                )
            elif kind is drivers.Ask:
                token = action.token
                self._ask(
                    action.request,
                    lambda answer, fds, token=token: self._answer_driver(token, answer, fds),
                )

    def _answer_driver(self, token, answer, fds):
        snapshot = memfd.read(fds[0]) if fds else b""
        try:
            actions = self.driver.answer(token, answer, snapshot)
        except (msgspec.MsgspecError, ReplicaError, TypeError) as error:
            raise Gone(f"the broker talks nonsense: {error}") from None
        if snapshot and not self.loaded:
            self._loaded(snapshot)
            self._inbound()  # the snapshot may be older than a monitor
            if self.replica.monitors and self.hello is not None:
                self._copy(*self.hello, b"", (), self.id)
        self._act_and_note(actions)

    def _loaded(self, snapshot):
        """Hello was answered: we are somebody, and follow the log from the snapshot on."""
        self.loaded = True
        self.id = self.replica.me
        connection = self.replica.connections.get(self.id)
        self.me = Peer(self.id, f":1.{self.id}", connection)
        self._follow(decode_snapshot(snapshot).position)

    def _error(self, reply_serial, name, text):
        self._bus_message(ERROR, reply_serial, None, name, "s", wire_body.string(text))

    def _bus_message(
        self, type, reply_serial, member, error_name, signature, body, destination=None
    ):
        """A message from the bus itself to our client."""
        self._count_up()
        if type != SIGNAL:
            destination = self.driver.name
        facts = envelopes.Envelope(
            type,
            False,
            destination,
            BUS_PATH if type == SIGNAL else None,
            BUS_NAME if type == SIGNAL else None,
            member,
            error_name,
            signature or "",
        )
        # Of the bus's signals a monitor's worker makes its own copies, and the answers to them.
        if self.loaded and type != SIGNAL:
            self._show_monitors(facts, self.serial, reply_serial, body)
        if self.loaded and not self.monitor:
            refusal = self.router.admit_from_bus(facts)
            if refusal is not None:
                if type != SIGNAL:
                    self._tell_monitors(BUS_NAME, self.serial, refusal)
                return
        number = self.serial
        self._from_bus(facts, number, reply_serial, body)
        if self.monitor and type == SIGNAL:
            for refusal in self.router.refused_from_bus(
                facts, lambda: wire_body.match_arguments(body, signature, False)
            ):
                self._count_up()
                self._from_bus(_denial(BUS_NAME), self.serial, number, wire_body.string(refusal))

    def _count_up(self):
        """The next serial of the bus towards our client; never 0."""
        self.serial = (self.serial % 0xFFFFFFFF) + 1

    def _from_bus(self, facts, serial, reply_serial, body: bytes):
        header = wire_header.build(
            ord("l"),
            facts.type,
            NO_REPLY,
            facts.path,
            facts.interface,
            facts.member,
            facts.error_name,
            facts.destination,
            BUS_NAME,
            facts.signature,
            0,
            reply_serial != 0,
            reply_serial,
            serial,
            len(body),
        )
        message: bytes = header + body
        data: cython.p_char = message
        length: cython.size_t = len(message)
        memcpy(self.output.reserve(length), data, length)
        self.output.commit(length)
        if self._crowded():
            self._count_own(length)

    def _tell_monitors(self, destination, serial, text):
        """Message `serial` of `destination` was kept from one whom it was not addressed to alone:
        its sender hears nothing, the monitors see the answer that it would have got."""
        if not self.replica.monitors:
            return
        self._count_up()
        self._show_monitors(_denial(destination), self.serial, serial, wire_body.string(text))

    def _show_monitors(self, facts, serial, reply_serial, body: bytes):
        """A message of the bus itself, to monitors alone."""
        head: FrameHead
        if not self.replica.monitors:
            return
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.flags = NO_REPLY
        head.serial = serial
        head.reply_serial = reply_serial
        head.body_length = len(body)
        self._copy(facts, _raw(cython.address(head)), body, (), BUS_ID)

    # -- activation ----------------------------------------------------------------------------

    def _activate(self, route: Route, type, flags, raw, body, fds):
        """Hold a message until its destination is started; its order among its kind is kept."""
        name = route.activate
        held = (route.facts, type, flags, raw, body, tuple([os.dup(fd) for fd in fds]))
        waiting = self.activating.get(name)
        if waiting is not None:
            waiting.append(held)
            return
        self.activating[name] = [held]
        self._ask(
            entries.StartService(0, name, True), lambda answer, _: self._activated(name, answer)
        )

    def _activated(self, name, answer):
        for facts, type, flags, raw, body, fds in self.activating.pop(name, ()):
            head: FrameHead
            source: cython.p_char = raw
            memcpy(cython.address(head), source, cython.sizeof(FrameHead))
            wants_reply = type == CALL and not flags & NO_REPLY
            if isinstance(answer, entries.Failure):
                self._error(head.serial, answer.error, answer.message)
            else:
                self._send_later(facts, wants_reply, raw, body, fds)
            close_all(fds)

    def _send_later(self, facts, wants_reply, raw, body: bytes, fds: tuple):
        """Send a message that was held; its destination may have an owner now."""
        head: FrameHead
        source: cython.p_char = raw
        data: cython.p_char = body
        memcpy(cython.address(head), source, cython.sizeof(FrameHead))
        decision = self.router.decide(facts, NO_AUTO_START, len(fds), tuple)
        if decision.error is not None:
            self._error(head.serial, decision.error[0], decision.error[1])
            return
        route = Route()
        route.envelope = envelopes.encode(facts)
        peer = self._peer(decision.targets[0])
        if wants_reply:
            self.pending[head.serial] = peer.id
        place = cython.cast(cython.pointer(cython.const[uint8_t]), data)
        if peer is self.me:
            self._to_myself(route, cython.address(head), place, fds)
        else:
            self._send(peer, cython.address(head), route.envelope, place, fds)

    # -- the broker ----------------------------------------------------------------------------

    def _from_broker(self):
        try:
            self.line.flush()
            while (received := self.line.receive()) is not None:
                message, fds = received
                if self.loaded:
                    self._inbound()  # what a reply caused stands in the log before it
                try:
                    self._broker_says(message, fds)
                finally:
                    close_all(fds)
        except LineError as error:
            raise Gone(f"the broker broke a rule: {error}") from None

    def _broker_says(self, message, fds):
        kind = type(message)
        if kind is entries.Reply or kind is entries.Failure:
            then = self.requests.pop(message.request, None)
            if then is not None:
                then(message, fds)
        elif kind is entries.Introduction:
            self._introduced_by(message, fds)
        elif kind is entries.Withdrawn:
            peer = self.peers.get(message.peer)
            if peer is not None:
                self._detach(peer)
                cython.cast(Peer, peer).again()

    def _ask(self, request, then):
        """Ask the broker; `then(answer, fds)` is called with its Reply or Failure."""
        self._ask_with(request, (), then)

    def _ask_with(self, request, fds, then):
        self.request += 1
        self.requests[self.request] = then
        self.line.send(msgspec_replace(request, request=self.request), fds)

    # -- introductions -------------------------------------------------------------------------

    def _hold_back(self, peer: Peer):
        """Frames wait for the peer's ring, or for its introduction."""
        if peer not in self.backlogged:
            self.backlogged.append(peer)
            if not peer.late:
                self.slow += 1

    def _half(self, peer: Peer):
        """Our half of an introduction: slots and descriptors; kept if the two halves cross."""
        ring = Ring()
        peer.asked(ring, self.status.take_slot(), self.status.take_slot())
        return [ring.fd, self.doorbell.write_fd, self.status.fd, self.broadcast.fd]

    def _introduce(self, peer: Peer):
        if not self.loaded:
            return
        fds = self._half(peer)
        self.meeting.add(peer)
        self._ask_with(
            entries.Introduce(0, peer.id, peer.slot, peer.broadcast_slot),
            fds,
            lambda answer, fds: self._introduced(peer, answer, fds),
        )

    def _introduced(self, peer: Peer, answer, fds):
        self.meeting.discard(peer)
        if peer.state != ASKED:  # the peer's own introduction came first, or the peer went
            return
        if isinstance(answer, entries.Failure):
            self._refused(peer, answer)
            return
        if answer.value is None or len(fds) != 5:
            return
        self._meet(peer, answer.value[0], answer.value[1], fds)

    def _introduced_by(self, message, fds):
        peer: Peer = self._peer(message.peer)
        if peer.state == READY or peer.state == GONE:
            raise Gone(f"the broker introduced {peer.name} twice")
        if peer.state == NEW:
            mine = self._half(peer)
        else:
            mine = [peer.ring.fd, self.doorbell.write_fd, self.status.fd, self.broadcast.fd]
        self.line.send(entries.Introduced(message.request, peer.slot, peer.broadcast_slot), mine)
        self._meet(peer, message.slot, message.broadcast_slot, fds)

    def _meet(self, peer: Peer, their_slot, their_broadcast_slot, fds):
        """Map the peer's half. A half that breaks a rule is the peer's loss alone."""
        ring_fd, doorbell, status_fd, broadcast_fd, side = fds
        try:
            reader = RingReader(ring_fd, self.status, peer.slot)
            broadcast = BroadcastReader(broadcast_fd, 0)
            view = StatusView(status_fd)
            subscriber = Subscriber(view, their_broadcast_slot, peer)
        except RingError as error:
            self._say(f"refused the rings of {peer.name}: {error}")
            peer.gone()
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, os.dup(side))
        peer.ready(reader, view, their_slot, subscriber, os.dup(doorbell), sock)
        peer.ring.close_fd()
        self.merge.add(reader, broadcast, peer.broadcast_slot, peer.doorbell)
        self.by_source[reader] = peer
        if peer.backlog:
            self._hold_back(peer)
        else:
            peer.late = False

    def _refused(self, peer: Peer, failure):
        """No introduction: calls that waited for it are answered."""
        self._fail_pending(peer, failure.error, failure.message)
        self._free_slots(peer)
        peer.again()

    def _fail_pending(self, peer: Peer, error, text):
        id = peer.id
        for serial in [each for each, callee in self.pending.items() if callee == id]:
            del self.pending[serial]
            self._error(serial, error, text)

    def _detach(self, peer: Peer):
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

    def _drop(self, peer: Peer, text):
        """The peer's worker broke a rule: have nothing to do with it any more."""
        self._say(f"dropped {peer.name}: {text}")
        self._detach(peer)
        self._fail_pending(peer, NO_REPLY_ERROR, DISCONNECTED_TEXT)
        peer.gone()

    def _say(self, text):
        """A line for the admin."""
        self.journal.say(f":1.{self.id}: {text}")

    # -- from the bus --------------------------------------------------------------------------

    def _inbound(self) -> cython.void:
        """Deliver what stands in the rings and in the log, in the order of their stamps."""
        head: FrameHead
        payload: cython.pointer(cython.const[uint8_t])
        peer: Peer
        if not self.loaded:
            return
        while self.merge.gather() > 0:
            while True:
                source = self.merge.next(cython.address(head), cython.address(payload))
                if source is None:
                    break
                if source is self.log:
                    self._log_entry(_bytes(payload + head.envelope_length, head.body_length))
                    continue
                peer = self.by_source[source]
                try:
                    self._deliver(peer, cython.address(head), payload, None)
                    if head.kind == BULK and peer.bulk_view is not None and head.aux & 0xFFFFFFFF:
                        peer.bulk_view.done()
                except HostilePeer as error:
                    self._drop(peer, str(error))
            self.merge.publish()
            if self.output.pending > self.uncounted:
                self._flush()
        for source, text in self.merge.take_broken():
            if source is self.log:
                self._behind()
            else:
                self._drop(self.by_source[source], text)

    def _behind(self):
        """The log has gone round before we read it: start again from a snapshot."""
        self._ask(entries.FetchSnapshot(0), self._resync)

    def _resync(self, answer, fds):
        snapshot = memfd.read(fds[0])
        actions = self.driver.resync(snapshot)
        self.epoch += 1
        self._follow(decode_snapshot(snapshot).position)
        for peer in [
            each for each in self.peers.values() if each.id not in self.replica.connections
        ]:
            self._peer_left(peer)
        self._act_and_note(actions)

    def _follow(self, position):
        """Read the log from `position` on."""
        self.merge.remove(self.log)
        self.log.seek(position)
        self.merge.add(self.log)

    def _log_entry(self, raw):
        entry = decode_entry(raw)
        kind = type(entry)
        if kind in _CHANGES:
            self.epoch += 1
        try:
            actions = self.driver.entry(entry)
        except ReplicaError as error:
            raise Gone(f"the log contradicts itself: {error}") from None
        if self.me.connection is None:
            self.me.connection = self.replica.connections.get(self.id)
        if kind is entries.PolicyChanged:
            self.fetching += 1
            self._ask(entries.FetchPolicy(0), self._new_policy)
        elif kind is entries.ConnectionRemoved:
            peer = self.peers.get(entry.id)
            if peer is not None:
                self._peer_left(peer)
        elif kind is entries.MonitorAttached:
            if entry.id == self.id:
                self.monitor = True
            elif entry.id in self.peers:
                self._fail_pending(self.peers[entry.id], NO_REPLY_ERROR, DISCONNECTED_TEXT)
        self._act_and_note(actions)

    def _new_policy(self, answer, fds):
        """The configuration was read again: its policy holds from the client's next message on."""
        self.fetching -= 1
        if isinstance(answer, entries.Failure):
            raise Gone(f"no policy: {answer.message}")
        self.context = self.context.with_configuration(memfd.read(fds[0]))
        self._take_policy()
        self.epoch += 1

    def _take_policy(self):
        configuration = self.context.configuration
        policy = ClientPolicy(configuration.policy, self.credentials)
        self.everyone = policy.allows_everything_to_send
        if self.router is not None:
            self.router.policy = policy
        limits = configuration.limits
        self.max_message = min(limits["max_message_size"], MAX_MESSAGE)
        self.max_outgoing = self.shares.limit = limits["max_outgoing_bytes"]
        self.uncounted = min(self.max_outgoing // 8, UNCOUNTED)
        self.max_outgoing_fds = limits["max_outgoing_unix_fds"]
        self.fd_cost = self.max_outgoing // max(self.max_outgoing_fds, 1)
        self.max_pending = limits["max_replies_per_connection"]
        self.max_fds = min(limits["max_message_unix_fds"], 253)
        self.reply_ns = max(limits["reply_timeout"], 0) * 1_000_000
        return policy

    def _peer_left(self, peer: Peer):
        """Its connection ended; what it had sent is delivered, what we asked of it will not be."""
        del self.peers[peer.id]
        self._detach(peer)
        self._fail_pending(peer, NO_REPLY_ERROR, DISCONNECTED_TEXT)
        peer.gone()

    def _deliver(
        self,
        peer: Peer,
        head: cython.pointer(FrameHead),
        payload: cython.pointer(cython.const[uint8_t]),
        own_fds: tuple,
    ) -> cython.void:
        """One frame of a peer. Raises HostilePeer if it breaks a rule."""
        template: Template
        fds: tuple = () if own_fds is None else own_fds
        count: cython.size_t = head.fds + (
            1
            if head.kind == LARGE
            or head.kind == LARGE_COPY
            or (head.kind == BULK and head.aux & BULK_FRESH)
            else 0
        )
        body: cython.pointer(cython.const[uint8_t]) = payload + head.envelope_length
        if count and own_fds is None:
            fds = peer.receive_fds(count)
        if head.kind == BULK:
            fds = self._bulk_begins(peer, head.aux, fds)
            if head.aux & 0xFFFFFFFF == 0:
                close_all(fds)
                return
            try:
                body = self._bulk_body(peer, head)
            except HostilePeer:
                close_all(fds)
                raise
        if head.kind == REFUSED:
            close_all(fds)
            self._peer_refused(peer, head.reply_serial, _bytes(payload, head.envelope_length))
            return
        if (head.kind == COPY or head.kind == LARGE_COPY) and self.monitor:
            self._deliver_copy(peer, head, payload, fds)
            return
        if self.monitor:
            close_all(fds)
            return  # a monitor is nobody's destination
        if head.kind != MESSAGE and head.kind != LARGE and head.kind != BULK:
            close_all(fds)
            raise HostilePeer(f"a frame of kind {head.kind}")
        envelope = _bytes(payload, head.envelope_length)
        key = envelope if not head.fds else (envelope, head.fds)
        template = peer.templates.get(key)
        if (
            template is None
            or template.epoch != self.epoch
            or template.depends
            or (template.broadcast and template.mine != self.replica.my_version)
        ):
            try:
                template = self._judge(
                    peer,
                    key,
                    envelope,
                    head.fds,
                    _bytes(payload + head.envelope_length, head.body_length),
                    fds[len(fds) - 1] if head.kind == LARGE else -1,
                )
            except HostilePeer:
                close_all(fds)
                raise
        if template.type == RETURN or template.type == ERROR:
            if self.pending.get(head.reply_serial) != peer.id:
                close_all(fds)
                return  # nobody asked, or somebody else was asked
            del self.pending[head.reply_serial]
        if template.refusal is not None:
            close_all(fds)
            if template.type == CALL and not head.flags & NO_REPLY:
                self._refuse(peer, head.serial, ACCESS_DENIED, template.refusal)
            return
        if template.broadcast and not template.subscribed:
            close_all(fds)
            return
        if head.fds and not self.unix_fds:
            close_all(fds)
            if template.type == CALL and not head.flags & NO_REPLY:
                self._refuse(peer, head.serial, NOT_SUPPORTED, NO_FDS_TEXT)
            return
        if self._crowded() and not self._may_wait(peer, template, head.serial, head.flags):
            close_all(fds)
            if template.type == RETURN or template.type == ERROR:
                self._error(head.reply_serial, LIMITS_EXCEEDED, FULL_TEXT)
            return
        before: cython.size_t = self.output.pending
        self._emit(template, head, body, fds, peer.bulk_view if head.kind == BULK else None)
        if self._crowded():
            self._count(peer, template, self.output.pending - before + head.fds * self.fd_cost)

    def _bulk_begins(self, peer: Peer, aux: uint64_t, fds: tuple) -> tuple:
        """Map the peer's new bulk area or let go of the old one, if its frame says so; the
        descriptors that are left."""
        if aux & BULK_FRESH:
            if peer.bulk_view is None:
                peer.bulk_view = BulkView(self.status, peer.slot)
            try:
                peer.bulk_view.open(fds[len(fds) - 1])
            except RingError as error:
                close_all(fds)
                raise HostilePeer(str(error)) from None
            os.close(fds[len(fds) - 1])
            fds = fds[: len(fds) - 1]
        if aux & 0xFFFFFFFF == 0 and peer.bulk_view is not None:
            peer.bulk_view.release()
        return fds

    def _bulk_body(self, peer: Peer, head: cython.pointer(FrameHead)) -> cython.pointer(
        cython.const[uint8_t]
    ):
        """Where a body stands in the peer's bulk area, which the peer can write to at any time."""
        body: cython.pointer(cython.const[uint8_t]) = cython.NULL
        if peer.bulk_view is not None:
            body = peer.bulk_view.place(head.aux)
        if body == cython.NULL:
            raise HostilePeer("a body out of the bounds of its bulk area")
        return body

    def _deliver_copy(
        self,
        peer: Peer,
        head: cython.pointer(FrameHead),
        payload: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
    ) -> cython.void:
        """A message for our client as a monitor: one of the peer's, or of the bus to the peer."""
        template: Template
        sender: cython.longlong = head.aux
        if sender != peer.id and sender != -1:
            close_all(fds)
            raise HostilePeer(f"a copy of a message of :1.{sender}")
        raw = _bytes(payload, head.envelope_length)
        key = (raw, head.fds, sender)
        template = peer.templates.get(key)
        if template is None:
            template = Template()
            self._fill(template, raw, BUS_NAME if sender == -1 else peer.name, head.fds)
            self._keep(peer, key, template)
        if self._over_the_limit():
            raise Gone(f"does not read what it monitors: {self._what_waits()}")
        if not self.unix_fds and fds:
            close_all(fds)
            return
        self._emit(template, head, payload + head.envelope_length, fds, None)

    def _emit(
        self,
        template: Template,
        head: cython.pointer(FrameHead),
        body: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
        view: BulkView,
    ) -> cython.void:
        """Write a checked frame for our client: the header from the envelope, then the body.

        If that stands in `view`, its peer can still write to it: what must be valid is copied and
        the copy checked; where any bytes are valid they are sent from there."""
        n: cython.size_t = template.header_length
        length: cython.size_t = head.body_length
        source: cython.p_char = template.header
        signature: cython.p_char = template.signature
        mapping: cython.pointer(uint8_t) = cython.NULL
        place: cython.pointer(uint8_t)
        code: cython.int
        if head.serial == 0:
            close_all(fds)
            raise HostilePeer("a message without a serial")
        if head.kind == LARGE or head.kind == LARGE_COPY:
            length = head.aux if head.kind == LARGE else os.fstat(fds[len(fds) - 1]).st_size
            if length <= MAX_MESSAGE:
                mapping = cython.cast(cython.pointer(uint8_t), large_map(fds[len(fds) - 1], length))
            if mapping == cython.NULL:
                close_all(fds)
                raise HostilePeer("a large body that is not sealed, or not as long as it says")
            os.close(fds[len(fds) - 1])
            fds = fds[: len(fds) - 1]
        elif head.kind == BULK:
            length = head.aux & 0xFFFFFFFF
        if self.tidy_at == 0 and length > LARGE_BODY:
            self.tidy_at = monotonic() + TIDY_NS
        if fds:
            self.output.begin_with_fds(fds)
        place = self.output.reserve(n if mapping != cython.NULL else n + length)
        memcpy(place, source, n)
        own: cython.size_t = length  # how much of the body is to be copied
        area: Area = None
        if view is not None:
            own = length if length < PREFIX else PREFIX
            memcpy(place + n, body, own)
            own = opaque_from(
                place + n,
                own,
                length,
                cython.cast(cython.pointer(cython.const[uint8_t]), signature),
                len(template.signature),
                template.big_endian,
            )
            area = view.lend() if 0 < own < length else None
            if area is None:
                own = length
        if mapping == cython.NULL and area is None:
            memcpy(place + n, body, length)
        code = 0
        if area is None:
            code = check_body(
                mapping if mapping != cython.NULL else place + n,
                length,
                cython.cast(cython.pointer(cython.const[uint8_t]), signature),
                len(template.signature),
                template.big_endian,
                head.fds,
            )
        if code < 0:
            if mapping != cython.NULL:
                munmap(mapping, length)
            self.output.drop_fds()
            raise HostilePeer(f"a body that breaks a rule: {wire_header.reason(code)}")
        place[2] = head.flags
        _store(place + 4, length, template.big_endian)
        _store(place + 8, head.serial, template.big_endian)
        # A call or a signal may carry the field, too; their header has no room for it.
        if head.reply_serial and (template.type == RETURN or template.type == ERROR):
            _store(place + 20, head.reply_serial, template.big_endian)
        if mapping != cython.NULL:
            self.output.commit(n)
            self.output.add_mapping(mapping, length, length)
        else:
            self.output.commit(n + own)
            if area is not None:
                self.output.add_lent(body + own, length - own, view, area)

    def _judge(self, peer: Peer, key, raw, fds, body, large_fd) -> Template:
        """Decode an envelope by type, check its names, ask policy and our match rules; these may
        look at the body, which is not checked yet; it is in `large_fd` if that is not -1."""
        if peer.connection is None:  # we knew it by its introduction alone
            peer.connection = self.replica.connections.get(peer.id)
            if peer.connection is None:
                raise HostilePeer("a message that is older than its connection")
        template = Template()
        envelope = self._fill(template, raw, peer.name, fds)
        if not CALL <= envelope.type <= SIGNAL:
            raise HostilePeer(f"a message of type {envelope.type}")
        template.epoch = self.epoch
        template.mine = self.replica.my_version
        template.refusal = self.router.admit(envelope, peer.connection, fds)
        template.broadcast = envelope.destination is None
        if template.broadcast:
            if envelope.type != SIGNAL:
                raise HostilePeer("a broadcast that is not a signal")
            template.subscribed, template.depends = self.replica.receives(
                SIGNAL,
                peer.id,
                envelope.path,
                envelope.interface,
                envelope.member,
                lambda: _arguments(body, large_fd, envelope),
            )
        self._keep(peer, key, template)
        return template

    def _fill(self, template: Template, raw, sender, fds):
        """Decode an envelope by type and build the header that our client will see."""
        try:
            envelope = envelopes.decode(raw)
            header = wire_header.build(
                ord("B") if envelope.big_endian else ord("l"),
                envelope.type,
                0,
                envelope.path,
                envelope.interface,
                envelope.member,
                envelope.error_name,
                envelope.destination,
                sender,
                envelope.signature,
                fds,
                envelope.type == RETURN or envelope.type == ERROR,
                1,
                1,
                0,
            )
        except (ValueError, msgspec.MsgspecError) as error:
            raise HostilePeer(f"an envelope that breaks a rule: {error}") from None
        template.header = header
        template.header_length = len(header)
        template.signature = envelope.signature.encode()
        template.type = envelope.type
        template.big_endian = envelope.big_endian
        return envelope

    def _keep(self, peer: Peer, key, template: Template):
        if len(peer.templates) >= MAX_ROUTES:
            peer.templates.clear()
        peer.templates[key] = template

    def _refuse(self, peer: Peer, serial, error, text):
        """Tell the sender's worker that its call was not delivered; it answers its client."""
        head: FrameHead
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = REFUSED
        head.reply_serial = serial
        if peer is self.me:
            self.pending.pop(serial, None)
            self._error(serial, error, text)
            return
        self._send(peer, cython.address(head), encode_refusal((error, text)), cython.NULL, ())

    def _peer_refused(self, peer: Peer, serial, raw):
        if self.pending.get(serial) != peer.id:
            return
        try:
            error, text = decode_refusal(raw)
        except ValueError:
            raise HostilePeer("a refusal that does not decode") from None
        if error not in (ACCESS_DENIED, LIMITS_EXCEEDED, NOT_SUPPORTED) or "\0" in text:
            raise HostilePeer(f"a refusal with the error {error!r}, {text!r}")
        del self.pending[serial]
        self._error(serial, error, text)

    # -- a client that does not read -----------------------------------------------------------

    def _crowded(self) -> cython.bint:
        """Whether so much waits for our client that it matters whose it is."""
        return self.output.pending > self.uncounted or self.output.fds * 8 > self.max_outgoing_fds

    def _over_the_limit(self) -> cython.bint:
        """Whether too much waits in all, the socket having taken what it can."""
        weight: cython.size_t = self.output.pending + self.output.fds * self.fd_cost
        if weight <= self.max_outgoing:
            return False
        self._flush()
        return self.output.pending + self.output.fds * self.fd_cost > self.max_outgoing

    def _what_waits(self) -> str:
        return (
            f"{self.output.pending} bytes and {self.output.fds} descriptors wait for it (limits"
            f" max_outgoing_bytes={self.max_outgoing}, max_outgoing_unix_fds={self.max_outgoing_fds})"
        )

    def _may_wait(self, peer: Peer, template: Template, serial, flags) -> bool:
        """Whether one more message of the peer's may wait; if not, the peer is told."""
        if self._asked_for(peer, template) or not self._over_its_share(peer):
            return True
        self._flush()
        if not self._over_its_share(peer):
            return True
        if self.shares.first_refusal(peer.id):
            self._say(f"{peer.name} is over its share of what waits: {self._what_waits()}")
        if template.type == CALL and not flags & NO_REPLY:
            self._refuse(peer, serial, LIMITS_EXCEEDED, FULL_TEXT)
        return False

    def _over_its_share(self, peer: Peer) -> bool:
        self.shares.release(self.output.sent)
        return self.shares.over(_user(peer), peer.id)

    def _count(self, peer: Peer, template: Template, amount):
        """`amount` more waits for our client."""
        end = self.output.sent + self.output.pending
        if self._asked_for(peer, template):
            self._count_own(amount)
        else:
            self.shares.charge(_user(peer), peer.id, amount, end)

    def _asked_for(self, peer: Peer, template: Template) -> bool:
        """Whether it is our client's fault if this waits: signals that its rules match, unless
        they are of some other user, who could else flood it off the bus."""
        return template.broadcast and _user(peer) in (0, self.credentials.uid)

    def _count_own(self, amount):
        """`amount` more waits of what our client asked for. If that is the most of what is over
        the limit, it does not read."""
        self.shares.charge_own(amount, self.output.sent + self.output.pending)
        if self._over_the_limit():
            self.shares.release(self.output.sent)
            if self.shares.own * 2 > self.max_outgoing:
                raise Gone(f"does not read its signals: {self._what_waits()}")


def _user(peer: Peer) -> int:
    return -1 if peer.connection is None else peer.connection.credentials.uid


@cython.cfunc
def _raw(head: cython.pointer(FrameHead)) -> bytes:
    return _bytes(cython.cast(cython.pointer(uint8_t), head), cython.sizeof(FrameHead))


def _denial(destination):
    """The envelope of the bus's answer to a message that policy refused."""
    return envelopes.Envelope(ERROR, False, destination, None, None, None, ACCESS_DENIED, "s")


def _arguments(body, large_fd, envelope):
    """What match rules see of a peer's body. Raises HostilePeer if that breaks a rule."""
    try:
        if large_fd >= 0:
            body = memfd.read(large_fd, MAX_MESSAGE)
        return wire_body.match_arguments(body, envelope.signature, envelope.big_endian)
    except (RingError, wire_body.WireError) as error:
        raise HostilePeer(f"a body that breaks a rule: {error}") from None


def _with_serials(key: bytes, reply_at: int, big_endian: bool) -> bytes:
    """A header whose varying parts were zeroed, made valid again so that it can be parsed."""
    one = b"\0\0\0\1" if big_endian else b"\1\0\0\0"
    key = key[:8] + one + key[12:]
    if reply_at:
        key = key[:reply_at] + one + key[reply_at + 4 :]
    return key + bytes(-len(key) % 8)
