# cython: boundscheck=False
"""The D-Bus socket: a worker's front end to a client that speaks the D-Bus wire format.

On the way in `_messages` cuts the client's bytes, `_message` checks one and gives it to the engine; on
the way out `hand_over` sees to it that a client that does not read costs only who sends to it
(shares.py), and `_emit` writes a frame: the header from the envelope that was judged, then the body.
The client's bytes are hostile, and checked whole before they go anywhere; a frame's body is checked
here, since here it is copied.
"""

import os

import cython
from cython.cimports.kbusd.rings.bulk import BULK_LARGE, BULK_MOST, Area, Bulk, BulkView
from cython.cimports.kbusd.rings.frame import FrameHead
from cython.cimports.kbusd.rings.memfd import large_map
from cython.cimports.kbusd.wire.body import check as check_body
from cython.cimports.kbusd.wire.body import opaque_from
from cython.cimports.kbusd.wire.header import Header, message_length, scan
from cython.cimports.kbusd.workers.decisions import Template
from cython.cimports.kbusd.workers.early import granted, is_hello, say_hello
from cython.cimports.kbusd.workers.engine import Engine
from cython.cimports.kbusd.workers.input import Input
from cython.cimports.kbusd.workers.libc import (
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    SO_SNDBUF,
    SOL_SOCKET,
    munmap,
    setsockopt,
)
from cython.cimports.kbusd.workers.output import Output
from cython.cimports.kbusd.workers.peers import LARGE_BODY, Peer
from cython.cimports.libc.stdint import uint8_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcpy

from kbusd.rings import entries
from kbusd.rings import envelope as envelopes
from kbusd.rings.line import close_all
from kbusd.wire import body as wire_body
from kbusd.wire import header as wire_header
from kbusd.workers import driver as drivers
from kbusd.workers import monitors
from kbusd.workers.errors import LIMITS_EXCEEDED, Gone
from kbusd.workers.peers import HostilePeer
from kbusd.workers.replica import BUS_NAME, unique_name
from kbusd.workers.shares import Shares

CALL = cython.declare(cython.int, 1)
RETURN = cython.declare(cython.int, 2)
ERROR = cython.declare(cython.int, 3)
SIGNAL = cython.declare(cython.int, 4)
NO_REPLY = cython.declare(cython.int, 1)

LARGE = cython.declare(cython.int, 4)
BULK = cython.declare(cython.int, 7)
LARGE_COPY = cython.declare(cython.int, 8)

CLIENT = cython.declare(cython.uint, 0)

# A body above this is received straight into the bulk area, if the client sends such ones in a row.
BULK_LEAST = cython.declare(cython.size_t, 24576)
PREFIX = cython.declare(cython.size_t, 1024)  # of a body in the bulk area, copied in any case
PIPE_LEAST = cython.declare(cython.size_t, 32768)  # what is shorter is copied as fast
# What our client's socket holds once large bodies are sent to it, or as much as net.core.wmem_max
# allows; the kernel doubles it. It wakes us less often to send on.
SEND_BUFFER = cython.declare(cython.int, 524288)
WIDE_LEAST = cython.declare(cython.size_t, 32 * 524288)  # of max_outgoing_bytes
MAX_MESSAGE = cython.declare(cython.size_t, 128 << 20)  # D-Bus specification, "Message Protocol"
# A client in the middle of a write gives so much at once; if it pauses, look so often for more.
PIECE = cython.declare(cython.size_t, 16384)
LOOKS = cython.declare(cython.int, 12)
# Whose it is that waits for our client is counted if it is more than this, or an eighth of the limit.
UNCOUNTED = cython.declare(cython.size_t, 131072)

EXPECTED = cython.declare(uint64_t, 100_000)  # look so long for the answer to Hello

BUS_PATH = "/org/freedesktop/DBus"
FULL_TEXT = "The sender's share of the destination's queue is full (limit max_outgoing_bytes)"


@cython.cfunc
@cython.exceptval(check=False)
def _store(place: cython.pointer(uint8_t), value: uint32_t, big: cython.bint) -> cython.void:
    if big:
        value = _swapped(value)
    memcpy(place, cython.address(value), 4)


@cython.cfunc
@cython.exceptval(check=False)
def _swapped(value: uint32_t) -> uint32_t:
    return (value << 24) | ((value & 0xFF00) << 8) | ((value >> 8) & 0xFF00) | (value >> 24)


@cython.cfunc
@cython.exceptval(check=False)
def _insert_reply_serial(
    place: cython.pointer(uint8_t), source: cython.p_char, length: cython.size_t, big: cython.bint
) -> cython.void:
    """The header at `source` with the field REPLY_SERIAL before the others, its value still to come."""
    fields: uint32_t
    memcpy(cython.address(fields), source + 12, 4)
    memcpy(place, source, 16)
    memcpy(place + 16, cython.cast(cython.p_char, b"\x05\x01u\0"), 4)
    memcpy(place + 24, source + 16, length - 16)
    _store(place + 12, (_swapped(fields) if big else fields) + 8, big)


@cython.cclass
class DBusSocket(Engine):
    """Serves one client on a Unix socket; see Engine."""

    def __init__(self, context, line, **options):
        Engine.__init__(self, context, line, **options)
        self.input = Input()
        self.output = Output()
        self.shares = Shares(0)

    def serve(self, client, supervisor, credentials, rest, fds, unix_fds) -> None:
        """Serve the authenticated client on descriptor `client` until it goes. `rest` and `fds` are
        what was read too much; `unix_fds`: descriptors were negotiated."""
        self.unix_fds = unix_fds
        self.attach(client, supervisor, credentials)
        self.reading = True
        if rest or fds:
            self.input.feed(rest, fds)
            self.stopped = True
        self.run()

    def take_limits(self, limits):
        """What the configuration allows; it may change while we serve."""
        self.max_message = min(limits["max_message_size"], MAX_MESSAGE)
        self.max_fds = min(limits["max_message_unix_fds"], 253)
        self.max_outgoing = self.shares.limit = limits["max_outgoing_bytes"]
        self.uncounted = min(self.max_outgoing // 8, UNCOUNTED)
        # No more than we may have; the rest is for peers. What waits goes to the client before there are so many.
        self.max_outgoing_fds = min(limits["max_outgoing_unix_fds"], self.context.files * 2 // 3)
        self.fd_cost = self.max_outgoing // (self.max_outgoing_fds or 1)

    def from_client(self, events) -> cython.void:
        """The socket is ready."""
        if not events & (EPOLLIN | EPOLLHUP | EPOLLERR):
            return
        self._receive()
        self._messages()
        if self.input.large_have < self.input.large_need and not self.leaving:
            if self.input.bulk is not None and self.input.bulk.piping:
                self._stay()
            else:
                self._receive()
            self._messages()

    def go_on(self) -> cython.void:
        """Go on with what was received."""
        self._messages()

    def watch_client(self) -> cython.void:
        """Ask for what we can use: input unless it must wait, output while something is left."""
        reading: cython.bint = not self.waits()
        writing: cython.bint = self.output.pending > 0 and not self.output.refused
        self.retry = self.output.refused  # of which no event tells the end
        if reading != self.reading or writing != self.writing:
            self.waiting.change(
                self.client, CLIENT, (EPOLLIN if reading else 0) | (EPOLLOUT if writing else 0)
            )
            self.reading = reading
            self.writing = writing

    def tidy_client(self) -> cython.bint:
        """Give back memory of the output; True: some is left, or waits."""
        left: cython.bint = self.input.trim()
        return self.output.trim() or left or self.output.pending > self.uncounted

    def count(self):
        """For statistics: see entries.Counted."""
        return (
            entries.Queued(
                self.input.count(),
                self.input.waiting(),
                self.input.pending_fds(),
                self.input.peak,
                self.input.peak_fds,
            ),
            entries.Queued(
                self.output.messages,
                min(self.output.pending, 0xFFFFFFFF),
                self.output.fds,
                min(self.output.peak, 0xFFFFFFFF),
                self.output.peak_fds,
            ),
        )

    # -- in ------------------------------------------------------------------------------------

    def _receive(self) -> cython.bint:
        """False if the client has left."""
        if self.input.receive(self.client) >= 0:
            return True
        if self.input.broken:
            raise Gone("broke a rule of descriptor passing")
        self.client_left()
        return False

    def _stay(self) -> cython.void:
        """Take in a body for a pipe as long as the client writes on, and nobody else wants us: on its core
        it goes on while we yield, on another its next piece is about to come."""
        had: cython.size_t = self.input.large_have
        tries: cython.int = 0
        while self._receive() and self.input.large_have < self.input.large_need:
            tries = tries + 1 if self.input.large_have - had < PIECE else 1
            had = self.input.large_have
            if tries > LOOKS or self.merge.pending() or not self.waiting.give_way():
                return

    def _messages(self) -> cython.void:
        """Handle every whole message that the client has sent."""
        data: cython.pointer(uint8_t)
        have: cython.size_t
        total: cython.longlong
        if not self.begun:
            if self.input.start == self.input.end:
                return
            self._begin()
        self.stopped = False
        while True:
            if self.input.large_need:
                if self.input.large_have < self.input.large_need:
                    return
                data = self.input.data + self.input.start
                have = self.input.end - self.input.start
                if self.waits() or not self._message(data, have, True):
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
            if cython.cast(cython.size_t, total) > self.max_message:
                raise Gone(
                    f"sent a message of {total} bytes, over the limit max_message_size"
                    f" of {self.max_message}"
                )
            if cython.cast(cython.size_t, total) > have:
                if not self._begin_large(data, total, have):
                    self.input.make_room(total)
                return
            if self.waits() or not self._message(data, total, False):
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
        place: cython.pointer(uint8_t)
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
        if body_length <= BULK_LARGE:
            bulk: Bulk = self.bulk_for(data, cython.address(header))
            place = cython.NULL if bulk is None else bulk.reserve(body_length)
            if place != cython.NULL:
                self.input.begin_bulk(header.header_length, body_length, place, bulk)
                self._try_pipe(data, cython.address(header), place)
                return True
        if body_length <= LARGE_BODY:
            return False
        try:
            self.input.begin_large(header.header_length, body_length)
        except OSError as error:
            raise Gone(f"no memory for a message of {total} bytes: {error.strerror}") from None
        self.tidy_later()
        return True

    def _try_pipe(
        self,
        data: cython.pointer(uint8_t),
        header: cython.pointer(Header),
        place: cython.pointer(uint8_t),
    ) -> cython.void:
        """Let the rest of the body at `place` go through pipes, if any bytes of it are valid."""
        have: cython.size_t = self.input.large_have
        if (
            header.unix_fds
            or self.input.bulk.carrier is None
            or header.body_length - have < PIPE_LEAST
            or header.body_length > BULK_MOST
        ):
            return
        if opaque_from(
            place,
            have if have < PREFIX else PREFIX,
            header.body_length,
            data + header.signature_at,
            header.signature_len,
            header.endian == 66,
        ):
            self.input.begin_pipe()

    def _message(
        self,
        data: cython.pointer(uint8_t),
        size: cython.size_t,
        large: cython.bint,
    ) -> cython.bint:
        """Check a message and pass it on; False if it must wait.

        `large`: its body is apart, in the bulk area or in a memfd."""
        header: Header
        body: cython.pointer(cython.const[uint8_t])
        code: cython.int
        bulk: Bulk = None
        large_fd: cython.int = -1
        fds: tuple = ()
        code = scan(data, size, cython.address(header))
        if code < 0:
            raise Gone(f"sent an invalid message: {wire_header.reason(code)}")
        body = self.input.whole() if large else data + header.header_length
        if not large or self.input.bulk is None or self.input.bulk.piped == 0:  # else it is opaque
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
        if header.unix_fds:
            fds = self._fds(header.unix_fds)
        if large:
            bulk = self.input.bulk
            large_fd = self.input.large_fd
        if not self.pass_on(data, cython.address(header), body, fds, large_fd, bulk):
            return False
        if header.unix_fds:
            close_all(self.input.take_fds(header.unix_fds))
        if large:
            self.input.end_large()
            if bulk is not None:
                bulk.cancel()
            else:
                os.close(self.input.take_large())
        return True

    def _fds(self, count) -> tuple:
        """The descriptors of the next message, not taken yet."""
        if not self.unix_fds:
            raise Gone("sent descriptors without having negotiated them")
        if count > self.max_fds:
            raise Gone(
                f"sent {count} descriptors in one message, over the limit"
                f" max_message_unix_fds of {self.max_fds}"
            )
        fds = self.input.first_fds(count)
        if len(fds) < count:
            raise Gone(f"sent {len(fds)} descriptors with a message that counts {count}")
        return fds

    # -- out -----------------------------------------------------------------------------------

    def flush(self) -> cython.void:
        """Send what the socket takes."""
        if self.output.pending and not self.leaving and self.output.flush(self.client) < 0:
            self.client_left()
        if self.output.cheat is not None:
            self._drop_cheat()

    def _drop_cheat(self):
        cheat = self.output.take_cheat()
        for item in list(self.peers.known.values()):
            peer: Peer = item
            if peer.bulk_view is cheat:
                self.peers.drop(peer, "took back a body that it had announced")

    def _widen(self) -> cython.void:
        """Our client gets large bodies. Not where the limit of what may wait for it is small: no share
        counts what its socket holds."""
        size: cython.int = SEND_BUFFER
        if not self.widened and self.max_outgoing >= WIDE_LEAST:
            self.widened = True
            setsockopt(
                self.client, SOL_SOCKET, SO_SNDBUF, cython.address(size), cython.sizeof(cython.int)
            )

    def relieve(self) -> cython.void:
        """Send what the socket takes if much waits."""
        if self._crowded():
            self.flush()
            self.tidy_later()

    def hand_over(self, peer, template, head, body, fds) -> cython.void:
        """A frame that policy allows, for our client. Raises HostilePeer."""
        before: cython.size_t
        if self._crowded() and not self._may_wait(peer, template, head.serial, head.flags):
            close_all(fds)
            if template.type == RETURN or template.type == ERROR:
                self.error(head.reply_serial, LIMITS_EXCEEDED, FULL_TEXT)
            return
        before = self.output.pending
        self._emit(template, head, body, fds, peer.bulk_view if head.kind == BULK else None)
        amount: cython.size_t = self.output.pending - before
        if before <= self.uncounted:
            self.relieve()  # what the socket takes at once need not be counted
            amount = min(amount, self.output.pending)
        if self._crowded():
            self._count(peer, template, amount + head.fds * self.fd_cost)

    def show(self, template, head, body, fds) -> cython.void:
        """A copy for our client as a monitor. Raises HostilePeer."""
        if self._over_the_limit():
            raise Gone(f"does not read what it monitors: {self._what_waits()}")
        self._emit(template, head, body, fds, None)

    def overhear(self, template, head, body, fds) -> cython.void:
        """A copy for our client who eavesdrops: what waits of them, it asked for. Raises HostilePeer."""
        before: cython.size_t = self.output.pending
        self._emit(template, head, body, fds, None)
        if self._crowded():
            self._count_own(self.output.pending - before + head.fds * self.fd_cost)

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
        # The header of an answer has room for the field REPLY_SERIAL; others seldom carry it.
        answers: cython.bint = template.type == RETURN or template.type == ERROR
        added: cython.size_t = 8 if head.reply_serial and not answers else 0
        n: cython.size_t = template.header_length + added
        length: cython.size_t = head.body_length
        source: cython.p_char = template.header
        signature: cython.p_char = template.signature
        mapping: cython.pointer(uint8_t) = cython.NULL
        place: cython.pointer(uint8_t)
        code: cython.int
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
        if length > LARGE_BODY:
            self.tidy_later()
        if fds:
            self.output.begin_with_fds(fds)
        self.output.messages += 1
        own: cython.size_t = length  # how much of the body is to be copied
        if view is not None and view.piped:
            own = view.piped_at
            self.tidy_later()  # it takes a pipe
        place = self.output.reserve(n if mapping != cython.NULL else n + own)
        if added:
            _insert_reply_serial(place, source, n - added, template.big_endian)
        else:
            memcpy(place, source, n)
        area: Area = None
        if view is not None:
            self._widen()
            copied: cython.size_t = length if length < PREFIX else PREFIX
            if view.piped and copied > view.piped_at:
                copied = view.piped_at
            memcpy(place + n, body, copied)
            own = opaque_from(
                place + n,
                copied,
                length,
                cython.cast(cython.pointer(cython.const[uint8_t]), signature),
                len(template.signature),
                template.big_endian,
            )
            area = view.lend() if 0 < own < length else None
            if view.piped:
                if area is None:
                    self.output.drop_fds()
                    raise HostilePeer("a body in a carrier that has to be checked, or one too many")
                # Not once more what was looked at.
                own = view.piped_at
                memcpy(place + n + copied, body + copied, own - copied)
            elif area is None:
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
        if head.reply_serial:
            _store(place + 20, head.reply_serial, template.big_endian)
        if mapping != cython.NULL:
            self.output.commit(n)
            self.output.add_mapping(mapping, length, length)
        else:
            self.output.commit(n + own)
            if area is None:
                return
            if view.piped == 0:
                self.output.add_lent(body + own, length - own, view, area)
                return
            self.output.add_piped(view.piped, view, area)
            own += view.piped
            view.piped = 0
            if own < length:
                memcpy(self.output.reserve(length - own), body + own, length - own)
                self.output.commit(length - own)

    # -- Hello (early.py) ----------------------------------------------------------------------

    def _begin(self) -> cython.void:
        """Our client has said something for the first time."""
        self.begun = True
        # As the first request: it has been asked for the policy if ours was out of date.
        usual = not (self.credentials.endpoint or self.credentials.anonymous)
        if self.log is not None and usual and self.asking.untouched():
            self._ask_early()
        self.begin()
        self.driver.takes_fds = self.unix_fds
        if self.hello_serial:
            self.asked = self.put_off = self.busy = True
            self._join()
            self.waiting.looking.expect(EXPECTED)

    def _ask_early(self) -> cython.void:
        """If that is Hello, ask for it: nothing can keep us from that, and nobody is to see it before the
        broker does. Of who is behind an endpoint the broker's answer is another."""
        header: Header
        data: cython.pointer(uint8_t) = self.input.data + self.input.start
        have: cython.longlong = self.input.end - self.input.start
        size: cython.longlong = message_length(data) if have >= 16 else -1
        if not 0 < size <= have or size > self.context.configuration.limits["max_message_size"]:
            return
        if scan(data, size, cython.address(header)) < 0 or not is_hello(
            data, cython.address(header)
        ):
            return
        self.before = self.log.head()
        if say_hello(self.broker):
            self.asking.said = 1
            self.hello_serial = header.serial

    def before_answer(self) -> cython.void:
        """Pass Hello on, of which the broker has heard already."""
        if self.put_off:
            self.put_off = self.busy = False
            self.waiting.looking.expect(0)
            self._messages()
            if self.told is not None:
                self.hello = None  # whoever watches since then has come after it

    def has_joined(self) -> cython.void:
        """While the broker answers: write what our client will be told, if nobody else has to see it first and policy
        has nothing against it."""
        replica = self.replica
        if self.hello_serial == 0 or self.output.pending:
            return
        if replica.monitors or replica.eavesdroppers or replica.apart:
            return
        reply, signal = _granted(self.next_id)
        if not self.router.admit_from_bus(reply) and not self.router.admit_from_bus(signal):
            self.draft = self._draft(self.next_id)

    def _draft(self, id) -> bytes:
        reply, signal = _granted(id)
        body = wire_body.string(reply.destination)
        number = self.monitors.serial
        return _message(reply, number + 1, self.hello_serial, body) + _message(
            signal, number + 2, 0, body
        )

    def before_broker(self) -> cython.void:
        """If it grants Hello, tell our client."""
        if self.draft is None:
            return
        draft, self.draft = self.draft, None
        id: cython.longlong = granted(self.broker)
        if id > 0:
            self.told = draft if id == self.next_id else self._draft(id)
            self._put(self.told)
            self.flush()

    # -- the bus itself ------------------------------------------------------------------------

    def act(self, actions):
        """What the bus driver wants done: messages of the bus to our client, questions to the broker."""
        for action in actions:
            kind = type(action)
            if kind is drivers.Return:
                self._bus_message(
                    RETURN,
                    action.reply_serial,
                    None,
                    None,
                    action.signature,
                    action.body,
                    fds=action.fds,
                )
            elif kind is drivers.Error:
                self.error(action.reply_serial, action.name, action.text)
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
                self.ask_for_driver(action)
            elif kind is drivers.Alone:
                self._answer_alone(action.answer)

    def error(self, reply_serial, name, text):
        """The answer to our client's message `reply_serial`."""
        self._bus_message(ERROR, reply_serial, None, name, "s", wire_body.string(text))

    def _bus_message(
        self, type, reply_serial, member, error_name, signature, body, destination=None, fds=()
    ):
        """A message from the bus itself to our client. `fds` are ours to close."""
        number = self.monitors.next_serial()
        if type != SIGNAL:
            destination = self.driver.name
        facts = _from_bus(type, destination, member, error_name, signature or "")
        # Of the bus's signals a monitor's worker makes its own copies, and the answers to them.
        if self.loaded and type != SIGNAL and self.told is None:
            self.monitors.show(facts, number, reply_serial, body, fds)
        if self.loaded and not self.monitor and self.told is None:
            refusal = self.router.admit_from_bus(facts)
            if refusal is not None:
                if type != SIGNAL:
                    self.monitors.show_refusal(BUS_NAME, number, refusal)
                close_all(fds)
                return
        self._tell(facts, number, reply_serial, body, fds)
        if self.monitor and type == SIGNAL:
            for refusal in self.router.refused_from_bus(
                facts, lambda: wire_body.match_arguments(body, signature, False)
            ):
                self._tell(
                    monitors.denial(BUS_NAME),
                    self.monitors.next_serial(),
                    number,
                    wire_body.string(refusal),
                )

    def _answer_alone(self, answer):
        """To a call that had no destination."""
        failed = type(answer) is drivers.Error
        name, signature = (answer.name, "s") if failed else (None, answer.signature)
        body = wire_body.string(answer.text) if failed else answer.body
        type_ = ERROR if failed else RETURN
        facts = envelopes.Envelope(type_, False, None, None, None, None, name, signature)
        self._tell(facts, self.monitors.next_serial(), answer.reply_serial, body)

    def _tell(self, facts, serial, reply_serial, body: bytes, fds: tuple = ()):
        message: bytes = _message(facts, serial, reply_serial, body, len(fds))
        if self.told is not None:
            if not self.told.startswith(message):
                raise Gone("was told something else than the bus says")
            self.told = self.told[len(message) :] or None
            return
        if fds:
            self.output.begin_with_fds(fds)
        self._put(message)
        self.output.messages += 1
        if self._crowded():
            self._count_own(len(message))

    def _put(self, message: bytes):
        data: cython.p_char = message
        length: cython.size_t = len(message)
        memcpy(self.output.reserve(length), data, length)
        self.output.commit(length)

    # -- a client that does not read -----------------------------------------------------------

    def _crowded(self) -> cython.bint:
        """Whether so much waits for our client that it matters whose it is."""
        return self.output.pending > self.uncounted or self.output.fds * 8 > self.max_outgoing_fds

    def _over_the_limit(self) -> cython.bint:
        """Whether too much waits in all, the socket having taken what it can."""
        weight: cython.size_t = self.output.pending + self.output.fds * self.fd_cost
        if weight <= self.max_outgoing:
            return False
        self.flush()
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
        self.flush()
        if not self._over_its_share(peer):
            return True
        if self.shares.first_refusal(peer.id):
            self.peers.say(f"{peer.name} is over its share of what waits: {self._what_waits()}")
        if template.type == CALL and not flags & NO_REPLY:
            self.refuse(peer, serial, LIMITS_EXCEEDED, FULL_TEXT)
        return False

    def _over_its_share(self, peer: Peer) -> bool:
        self.shares.release(self.output.sent)
        return self.shares.over(_user(peer), peer.id)

    def _count(self, peer: Peer, template: Template, amount):
        """`amount` more waits for our client."""
        self.shares.release(self.output.sent)
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
        self.shares.release(self.output.sent)
        self.shares.charge_own(amount, self.output.sent + self.output.pending)
        if self._over_the_limit():
            self.shares.release(self.output.sent)
            if self.shares.own * 2 > self.max_outgoing:
                raise Gone(f"does not read its signals: {self._what_waits()}")


def _from_bus(type, destination, member, error_name, signature):
    """The envelope of a message from the bus itself."""
    return envelopes.Envelope(
        type,
        False,
        destination,
        BUS_PATH if type == SIGNAL else None,
        BUS_NAME if type == SIGNAL else None,
        member,
        error_name,
        signature,
    )


def _granted(id):
    """The envelopes of what is told whose Hello is granted."""
    name = unique_name(id)
    return (
        _from_bus(RETURN, name, None, None, "s"),
        _from_bus(SIGNAL, name, "NameAcquired", None, "s"),
    )


def _message(facts, serial, reply_serial, body: bytes, fds=0) -> bytes:
    """A message from the bus itself as our client gets it."""
    header = wire_header.build(
        ord("l"),
        facts.type,
        NO_REPLY,
        facts.path,
        facts.interface,
        facts.member,
        facts.error_name,
        facts.destination,
        BUS_NAME if facts.destination or facts.type == SIGNAL else None,
        facts.signature,
        fds,
        reply_serial != 0,
        reply_serial,
        serial,
        len(body),
    )
    return header + body


def _user(peer: Peer) -> int:
    return -1 if peer.connection is None else peer.connection.credentials.uid
