# cython: boundscheck=False
"""The engine of a kdbus worker: the bus's side is that of every worker, the client's is a device line.

D-Bus messages for D-Bus clients go the way that they go from a socket: as wire format into `input`, and
down `dbus_socket.py`. Messages between kdbus clients travel as parcels (kdbus/parcel.py), in frames of
their own kind, which only go to workers that the log calls kdbus ones; each is acknowledged, because
SEND(2) tells its caller whether the message is in the receiver's pool. What arrives is handed to the
front (`kdbus_device.py`): as bytes that are checked, or else are said not to be.
"""

import os

import cython
from cython.cimports.kbusd.rings.clock import monotonic
from cython.cimports.kbusd.rings.frame import FrameHead
from cython.cimports.kbusd.wire.body import check as check_body
from cython.cimports.kbusd.workers.dbus_socket import DBusSocket
from cython.cimports.kbusd.workers.libc import EPOLLERR, EPOLLHUP, EPOLLIN, sched_yield
from cython.cimports.kbusd.workers.peers import Peer
from cython.cimports.libc.stdint import uint8_t, uint64_t
from cython.cimports.libc.string import memset

from kbusd.rings import entries, memfd
from kbusd.rings import envelope as envelopes
from kbusd.rings.line import close_all
from kbusd.rings.memfd import RingError
from kbusd.wire import header as wire_header
from kbusd.workers import driver as drivers
from kbusd.workers.peers import HostilePeer

PARCEL = cython.declare(cython.int, 9)
ACK = cython.declare(cython.int, 10)
LARGE = cython.declare(cython.int, 4)
BULK = cython.declare(cython.int, 7)
COPY = cython.declare(cython.int, 5)
READY = cython.declare(cython.int, 2)

CLIENT = cython.declare(cython.uint, 0)  # as the engine has it
WATCHED = cython.declare(cython.uint, 16)  # and above: a descriptor of our client's, by its number

LARGE_BODY = cython.declare(cython.Py_ssize_t, 65536)  # vectors above this travel as a memfd
MAX_ACKS = cython.declare(cython.size_t, 1 << 20)  # bytes that wait for a peer that does not run
PROMISED_NS = cython.declare(uint64_t, 5_000_000)
MAX_MESSAGE = 128 << 20


@cython.cfunc
def _bytes(data: cython.pointer(cython.const[uint8_t]), length: cython.size_t) -> bytes:
    return cython.cast(cython.p_char, data)[:length]


@cython.cclass
class DeviceEngine(DBusSocket):
    """Takes over what the engine of a spare worker has made, and serves a file instead of a socket."""

    def __init__(self, engine: DBusSocket):
        self.promised_ns = PROMISED_NS
        self.context = engine.context
        self.clock = engine.clock
        self.merge = engine.merge
        self.replica = engine.replica
        self.asking = engine.asking
        self.peers = engine.peers
        self.waiting = engine.waiting
        self.waiting.for_requests()
        self.log = engine.log
        self.said = engine.said
        self.later = engine.later
        self.monitors = engine.monitors
        self.activating = engine.activating
        self.kept = engine.kept
        self.routes = {}
        self.again = set()
        self.calls = engine.calls
        self.input = engine.input
        self.output = engine.output
        self.shares = engine.shares
        self.reading = True

    # -- life ----------------------------------------------------------------------------------

    def serve_device(self, front, device, credentials) -> None:
        """Serve until the file is closed or the connection ends."""
        self.front = front
        self.begun = True  # by `prepare`, before it says anything
        self.prepare(device, device, credentials)
        self.run()

    def entering(self, credentials) -> None:
        """Who says HELLO: not always the one who has opened the file."""
        self.credentials = self.driver.credentials = credentials
        self._take_policy()

    def make_router(self, policy):
        return self.front.make_router(self.replica, policy, self.peers.say)

    def from_client(self, events) -> cython.void:
        """The supervisor passes on requests, or says that the file is closed."""
        if events & (EPOLLIN | EPOLLHUP | EPOLLERR) and not self.front.requests():
            self.front.closed()
            self.client_left()

    def other(self, source) -> cython.void:
        """One of our client's descriptors is readable."""
        self.front.recall()
        self.front.readable(source - WATCHED)

    def _from_broker(self):
        self.front.recall()
        DBusSocket._from_broker(self)

    def _inbound(self) -> cython.void:
        self.front.recall()
        DBusSocket._inbound(self)

    def watch_client(self) -> cython.void:
        """Listen to the supervisor, but while policy is fetched: our client's next command is for the new one."""
        reading: cython.bint = self.fetching == 0
        if reading != self.reading:
            self.waiting.change(self.client, CLIENT, EPOLLIN if reading else 0)
            self.reading = reading

    def flush(self) -> cython.void:
        """What the file's users wait for; it may cause messages."""
        self.front.turn(self.input.end == self.input.start)
        self.peers.bells()

    def relieve(self) -> cython.void:
        """There is no socket."""

    def _timeout(self) -> cython.int:
        """As every worker's, and no longer than the front wants."""
        timeout: cython.int = DBusSocket._timeout(self)
        wanted: cython.int = self.front.timeout()
        return wanted if timeout < 0 or (0 <= wanted < timeout) else timeout

    def catch_up(self) -> None:
        """Take in all that stands in the rings and in the log now, and what a peer is about to write before
        something that stands there. We wait for that, but not long: it may be hostile."""
        self._inbound()
        if self.merge.holding:
            until: uint64_t = monotonic() + self.promised_ns
            while self.merge.holding and monotonic() < until:
                sched_yield()
                self._inbound()

    def end(self) -> None:
        """End once everything that was sent is on its way; the file may stay open."""
        self.client_left()

    # -- to the bus ----------------------------------------------------------------------------

    def sends_again(self, serial: int, on: bool) -> None:
        """Monitors have seen the D-Bus message that is fed with this serial before; or it is on its way."""
        if on:
            self.again.add(serial)
        else:
            self.again.discard(serial)

    def feed(self, message: bytes, fds: list) -> None:
        """A D-Bus message of our client; it may have to wait in `input`. `fds` are ours from now on."""
        self.input.feed(message, fds)
        self._messages()

    def call_bus(self, serial, member, signature, body) -> None:
        """Call the bus driver; the answer comes to the front as `bus_answered`."""
        if self.loaded:
            self._inbound()
        call = drivers.Call(
            serial,
            0,
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            member,
            signature,
            body,
            False,
            "org.freedesktop.DBus",
        )
        self._act_and_note(self.driver.call(call))

    def ask_for_driver(self, action):
        if type(action.request) is entries.Hello:
            action = action._replace(request=self.front.hello)
        DBusSocket.ask_for_driver(self, action)

    def ask(self, request, then) -> None:
        """Ask the broker; `then(answer, fds)` is called with its Reply or Failure."""
        self.asking.ask(request, then)

    def send_parcel(self, id: int, token: int, raw: bytes, data: bytes, fds: tuple) -> None:
        """A parcel to the worker of the kdbus connection `id`. With a token `parcel_answered` is called,
        or `bus_answered` with an error if it can't be delivered. `fds` stay the caller's."""
        head: FrameHead
        text: cython.p_char = data
        peer: Peer = self.peers.peer(id)
        own: cython.int = -1
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = PARCEL
        head.serial = token
        head.body_length = len(data)
        if len(data) > LARGE_BODY:
            own = memfd.sealed(b"kbusd-parcel", data)
            fds = (own, *fds)
            head.aux = len(data)
            head.body_length = 0
        head.fds = len(fds)
        if token:
            self.calls.open(token, id)
        try:
            self._send(
                peer,
                cython.address(head),
                raw,
                cython.cast(cython.pointer(cython.const[uint8_t]), text),
                fds,
                token != 0,
            )
        finally:
            if own >= 0:
                os.close(own)
        self.peers.bells()  # its answer is waited for

    def send_ack(self, id: int, token: int, code: int, note: bytes) -> None:
        """A parcel is in our pool, or is refused with an errno; without a token: `note` (the cookie) is
        that of a call which will not be answered."""
        head: FrameHead
        peer: Peer = self.peers.peer(id)
        if peer.backlog_bytes > MAX_ACKS:
            # It sends and does not read: that is not to be our client's fault.
            self.peers.drop(peer, f"it leaves {peer.backlog_bytes} bytes of answers unread")
            return
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = ACK
        head.reply_serial = token
        head.aux = code
        self._send(peer, cython.address(head), note, cython.NULL, (), False)

    def refuse_call(self, id: int, serial: int, error: str, text: str) -> None:
        """A D-Bus call that our client got will not be answered."""
        DBusSocket.refuse(self, self.peers.peer(id), serial, error, text)

    def copy_to_monitors(self, facts, flags: int, serial: int, reply: int, body: bytes) -> None:
        """What goes to another kdbus client is seen by D-Bus monitors as well."""
        head: FrameHead
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.flags = flags
        head.serial = serial
        head.reply_serial = reply
        head.body_length = len(body)
        self.monitors.copy(facts, cython.address(head), body, (), self.id)

    def watch(self, fd: int) -> None:
        """Tell the front when a descriptor is readable. Raises OSError."""
        self.waiting.watch(fd, WATCHED + fd, EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Before it is closed."""
        self.waiting.forget(fd)

    def forget(self, serial: int) -> None:
        """Nobody waits for the answer to this call any more."""
        self.calls.forget(serial)

    def take_descriptors(self, on: bool) -> None:
        """Whether our client gets messages with descriptors."""
        self.unix_fds = on

    def show(self, template, head, body, fds) -> cython.void:
        """A copy for our client as a monitor. What kdbus clients send, it gets as they sent it."""
        close_all(fds)
        if head.kind == COPY:
            data = _bytes(body, head.body_length)
            facts = envelopes.decode(template.raw)
            self.front.copied(
                head.aux, facts, head.flags, head.serial, head.reply_serial, data, head.stamp
            )

    def overhear(self, template, head, body, fds) -> cython.void:
        """kdbus has no rules that eavesdrop, and nobody adds one for our client."""
        close_all(fds)

    # -- from the bus --------------------------------------------------------------------------

    def _bus_message(
        self, type, reply_serial, member, error_name, signature, body, destination=None, fds=()
    ):
        """What the bus says to our client: answers; signals it learns of by the log."""
        if reply_serial:
            self.front.bus_answered(reply_serial, error_name, body)

    def _log_entry(self, raw):
        self.front.before_entry(raw)
        DBusSocket._log_entry(self, raw)
        self.telling = self.log_stamp
        self.front.after_entry()
        self.telling = 0

    def stamp(self):
        """Of what the bus tells our client now: that of the entry, or of what happens by itself."""
        return self.telling if self.telling else self.clock.next()

    def _deliver(
        self,
        peer: Peer,
        head: cython.pointer(FrameHead),
        payload: cython.pointer(cython.const[uint8_t]),
        own_fds: tuple,
    ) -> cython.void:
        if head.kind == PARCEL:
            self._parcel(peer, head, payload)
        elif head.kind == ACK:
            note = _bytes(payload, head.envelope_length)
            if head.reply_serial == 0:
                self.front.call_dropped(peer.id, note)
            elif self.calls.wait_for(head.reply_serial, peer.id):
                self.calls.close(head.reply_serial, peer.id)
                self.front.parcel_answered(head.reply_serial, head.aux)
        else:
            DBusSocket._deliver(self, peer, head, payload, own_fds)

    def _parcel(
        self,
        peer: Peer,
        head: cython.pointer(FrameHead),
        payload: cython.pointer(cython.const[uint8_t]),
    ) -> cython.void:
        """A message of another kdbus client."""
        fds: tuple = peer.receive_fds(head.fds) if head.fds else ()
        raw = _bytes(payload, head.envelope_length)
        data = _bytes(payload + head.envelope_length, head.body_length)
        rest: tuple = fds
        try:
            if head.aux:
                if not fds:
                    raise HostilePeer("a large parcel without its memfd")
                data = memfd.read(fds[0], MAX_MESSAGE)
                rest = fds[1:]
            code: cython.int = self.front.parcel(peer, raw, data, rest, head.stamp)
        except (RingError, ValueError) as error:
            raise HostilePeer(str(error)) from None
        finally:
            close_all(fds)
        if head.serial and peer.state == READY:
            self.send_ack(peer.id, head.serial, code, b"")

    def hand_over(self, peer, template, head, body, fds) -> cython.void:
        """A D-Bus message for our client: copied out, and its body checked."""
        signature: cython.p_char = template.signature
        try:
            if head.kind == LARGE:
                data = memfd.read(fds[len(fds) - 1], MAX_MESSAGE)
                if cython.cast(uint64_t, len(data)) != head.aux:
                    raise HostilePeer("a large body that is not as long as it says")
            elif head.kind == BULK:
                data = peer.bulk_view.whole(body, head.aux & 0xFFFFFFFF)
                if not data:
                    raise HostilePeer("took back a body that it had announced")
            else:
                data = _bytes(body, head.body_length)
            text: cython.p_char = data
            code: cython.int = check_body(
                cython.cast(cython.pointer(cython.const[uint8_t]), text),
                len(data),
                cython.cast(cython.pointer(cython.const[uint8_t]), signature),
                len(template.signature),
                template.big_endian,
                head.fds,
            )
            if code < 0:
                raise HostilePeer(f"a body that breaks a rule: {wire_header.reason(code)}")
            self.front.dbus_message(
                peer,
                envelopes.decode(template.raw),
                head.flags,
                head.serial,
                head.reply_serial,
                data,
                fds[: head.fds],
                head.stamp,
            )
        except RingError as error:
            raise HostilePeer(str(error)) from None
        finally:
            close_all(fds)
