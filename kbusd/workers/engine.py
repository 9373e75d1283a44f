# cython: boundscheck=False
"""The engine of a worker: the bus on one side, and on the other a front end that knows its client.

It takes checked D-Bus messages from the front end and gives it checked D-Bus messages; what the client
speaks is no concern of its. A message goes down this file in the order in which it travels:
`pass_on` finds out whom it goes to, `_forward` has it written to a ring (peers.py); in the receiver's
worker `_inbound` merges rings and log, `_deliver` checks a frame again and hands it over.

A front end is a subclass: it calls `prepare`, `run`, `waits` and `pass_on`, and is called for what
stands at the end of this file.

Everything that comes out of a ring is hostile, and copied out of shared memory before it is checked.
"""

import os
import select

import cython
import msgspec
from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize
from cython.cimports.kbusd.rings.broadcast import BroadcastReader
from cython.cimports.kbusd.rings.bulk import BULK_FRESH, Bulk
from cython.cimports.kbusd.rings.clock import Clock, monotonic
from cython.cimports.kbusd.rings.frame import FrameHead
from cython.cimports.kbusd.rings.merge import Merge
from cython.cimports.kbusd.rings.status import StatusPage
from cython.cimports.kbusd.wire.header import Header
from cython.cimports.kbusd.workers.calls import Calls
from cython.cimports.kbusd.workers.decisions import Route, Template, key_of
from cython.cimports.kbusd.workers.libc import EPOLLIN, epoll_event, give_back
from cython.cimports.kbusd.workers.monitors import Monitors
from cython.cimports.kbusd.workers.peers import Peer, Peers
from cython.cimports.kbusd.workers.waiting import Waiting
from cython.cimports.libc.stdint import uint8_t, uint64_t
from cython.cimports.libc.string import memcpy, memset

from kbusd.policy.decide import ClientPolicy
from kbusd.rings import entries, memfd
from kbusd.rings import envelope as envelopes
from kbusd.rings.doorbell import part
from kbusd.rings.line import LineError, close_all
from kbusd.wire import body as wire_body
from kbusd.workers import behind, decisions
from kbusd.workers import driver as drivers
from kbusd.workers.activation import Activating, Held, Kept
from kbusd.workers.asking import Asking
from kbusd.workers.errors import (
    ACCESS_DENIED,
    LIMITS_EXCEEDED,
    NO_REPLY,
    NO_REPLY_DISCONNECTED,
    NO_REPLY_TIMEOUT,
    NOT_REGISTERED,
    NOT_SUPPORTED,
    SAME_SERIAL,
    Gone,
)
from kbusd.workers.introspection import PEER
from kbusd.workers.peers import STALL_NS, HostilePeer
from kbusd.workers.replica import BUS_NAME, Replica, ReplicaError, eavesdrops
from kbusd.workers.routing import Router

CALL = cython.declare(cython.int, 1)
RETURN = cython.declare(cython.int, 2)
ERROR = cython.declare(cython.int, 3)
SIGNAL = cython.declare(cython.int, 4)
WANTS_NO_REPLY = cython.declare(cython.int, 1)
NO_AUTO_START = cython.declare(cython.int, 2)

MESSAGE = cython.declare(cython.int, 1)
LARGE = cython.declare(cython.int, 4)
COPY = cython.declare(cython.int, 5)
REFUSED = cython.declare(cython.int, 6)
SPENT = cython.declare(cython.int, 11)
ACK = cython.declare(cython.int, 10)
BULK = cython.declare(cython.int, 7)
LARGE_COPY = cython.declare(cython.int, 8)

READY = cython.declare(cython.int, 2)

# What is ready: the data of an event.
CLIENT = cython.declare(cython.uint, 0)
BROKER = cython.declare(cython.uint, 2)
SUPERVISOR = cython.declare(cython.uint, 3)
BELLS = cython.declare(cython.uint, 0x80000000)  # and above: peers.py

# What large messages leave behind is looked at so often.
TIDY_NS = cython.declare(uint64_t, 1_000_000_000)
LEAVE_NS = cython.declare(uint64_t, 2_000_000_000)
MAX_ROUTES = cython.declare(cython.int, 1024)
ROUNDS = cython.declare(cython.int, 64)  # of reading all rings, before something else has its turn

NO_FDS_TEXT = (
    "Tried to send message with Unix file descriptors to a client that doesn't support that."
)

_CHANGES = frozenset(
    (
        entries.ConnectionRemoved,
        entries.NameOwnerChanged,
        entries.QueueChanged,
        entries.MonitorAttached,
        entries.EndpointChanged,
        entries.NamePolicyChanged,
        entries.CustomChanged,
        entries.PolicyChanged,
        entries.LabelApart,
    )
)
_RULES = frozenset((entries.MatchAdded, entries.MatchRemoved))
decode_snapshot = msgspec.msgpack.Decoder(entries.Snapshot).decode
decode_entry = msgspec.msgpack.Decoder(entries.LogEntry).decode
encode_refusal = msgspec.msgpack.Encoder().encode
decode_refusal = msgspec.msgpack.Decoder(tuple[str, str]).decode


@cython.cfunc
def _bytes(data: cython.pointer(cython.const[uint8_t]), length: cython.size_t) -> bytes:
    return PyBytes_FromStringAndSize(cython.cast(cython.p_char, data), length)


@cython.cfunc
def _raw(head: cython.pointer(FrameHead)) -> bytes:
    return _bytes(cython.cast(cython.pointer(uint8_t), head), cython.sizeof(FrameHead))


@cython.cclass
class Engine:
    """Serves one client. Made before lock-down, without a client; `run` then goes on to its end.

    `stall_ns`: how long at most our client's next message waits for one peer."""

    def __init__(self, context, line, stall_ns: uint64_t = STALL_NS):
        self.context = context
        self.clock = Clock()
        self.merge = Merge(self.clock)
        self.replica = Replica()
        self.asking = Asking(line)
        self.waiting = Waiting(self.merge, StatusPage())
        self.peers = Peers(
            self.clock, self.merge, self.waiting, self.replica, self.asking, stall_ns
        )
        self.log = BroadcastReader(context.log_fd, 0)
        self.monitors = Monitors(self.peers, self.replica)
        self.activating = Activating()
        self.kept = Kept()
        self.unheard = {}  # serial -> a call to the bus that some overhear if it is granted
        self.routes = {}
        self.said = []
        self.later = []
        self.retired = []
        self.calls = Calls()

    def descriptors(self) -> list:
        """What must stay open through lock-down."""
        return [self.waiting.epoll, *self.peers.descriptors()]

    def leave_log(self) -> None:
        """Our client is behind an endpoint. It may not get at the log of all by taking us over; the broker
        gives us another one with the answer to Hello."""
        self.log = None

    # -- life ----------------------------------------------------------------------------------

    def prepare(self, client, supervisor, credentials) -> None:
        """Whom to serve: `client` is the descriptor to watch for it, `supervisor` our line to there,
        which may be the same."""
        self.attach(client, supervisor, credentials)
        self.begin()

    def attach(self, client, supervisor, credentials) -> None:
        """The first part of `prepare`, till the client says something."""
        self.client = client
        self.supervisor = supervisor
        self.credentials = credentials
        self.broker = self.asking.line.fileno()
        self.waiting.watch(self.broker, BROKER, EPOLLIN)
        self.waiting.watch(client, CLIENT, EPOLLIN)
        if supervisor != client:
            self.waiting.watch(supervisor, SUPERVISOR, EPOLLIN)

    def begin(self) -> None:
        """The second part of `prepare`: what is needed to judge what it says."""
        credentials = self.credentials
        policy = self._take_policy()
        self.router = self.make_router(policy)
        if credentials.endpoint:
            self.sight = behind.Sight(self.replica, credentials.endpoint)
            self.router.sight = self.sight
            self.driver = behind.BehindDriver(
                self.replica, self.context.bus, credentials, self.sight
            )
        else:
            self.driver = drivers.Driver(self.replica, self.context.bus, credentials)

    def in_force(self, generation):
        """The context with the configuration in force, which is of this generation, or a later one; before
        there is a client."""
        if generation != self.context.generation:
            self._fetch_policy()
        return self.context

    def make_router(self, policy: ClientPolicy) -> Router:
        """Who decides whom our client's messages go to."""
        label = self.context.bus.label.decode(errors="replace")
        names = self.context.name_policies(self.replica)
        return Router(self.replica, policy, self.peers.say, label, names)

    def run(self) -> None:
        """Serve the client until it goes."""
        reason = ""
        try:
            self._loop()
        except Gone as error:
            reason = str(error)
        except EOFError:
            return  # the broker is gone: the bus ends
        self.peers.broadcast.end()
        if self.peers.silent is not None:
            self.peers.silent.end()
        try:
            self.flush()
            self.asking.line.send(entries.Leaving(0, reason))
            self.asking.line.flush()
        except (Gone, OSError):
            pass
        # Our client's names are free from here on; that this process ends takes a while longer.
        self.asking.line.discard()
        part(self.asking.line.sock.detach())

    def _loop(self) -> cython.void:
        events: epoll_event[8]
        source: cython.uint
        i: cython.int
        while True:
            self._inbound()
            if self.said:
                self._take_said()
            if self.tidy_at and monotonic() >= self.tidy_at:
                self._tidy()
            if self.stopped:
                self.go_on()
            if self.calls.due:
                for serial in self.calls.late():
                    self.error(serial, NO_REPLY, NO_REPLY_TIMEOUT)
            self.peers.bells()
            if self.peers.unmet:
                self.peers.give_up()
            while self.peers.lost:
                self._answer_for_the_lost()
                self.peers.bells()
            self.flush()
            if self.leaving:
                self._leave()
            else:
                self.watch_client()
            for i in range(self.waiting.wait(events, self._timeout())):
                source = events[i].data.u32
                if source == CLIENT:
                    self.from_client(events[i].events)
                elif source >= BELLS:
                    self.peers.rung(source)
                elif source == BROKER:
                    self._from_broker()
                elif source == SUPERVISOR:
                    raise Gone("the bus ends")
                else:
                    self.other(source)

    def client_left(self):
        """The client has closed. What it sent before is still delivered: some of it may wait for
        an introduction, or for room; for so long its connection stays."""
        self.leaving = True
        self.peers.stall_until = 0
        self.leave_until = monotonic() + LEAVE_NS
        self.waiting.forget(self.client)

    def _leave(self):
        """End, if nothing that the client sent waits any more, or has waited too long."""
        if not (self.peers.meeting or self.peers.backlogged or self.busy or self.stopped):
            raise Gone("")
        if monotonic() > self.leave_until:
            raise Gone("left while what it had sent could not be delivered")

    def waits(self) -> cython.bint:
        """Whether our client's next message must wait."""
        return self.busy or self.fetching > 0 or self.peers.waits()

    def _timeout(self) -> cython.int:
        """How long to wait, in ms; -1 as long as it takes."""
        timeout: cython.int = -1
        # What came up since its turn in this loop, as while a message of our client's was passed on:
        # nothing will wake us for that.
        if self.more or self.said or self.peers.lost or self.peers.unmet:
            return 0
        now: uint64_t
        if self.merge.holding:
            return 1  # a peer has promised something and does not ring when it has come
        if self.answer is not None or (self.stopped and not self.waits()):
            return 0
        if self.calls.due:
            timeout = self.calls.left()
        if self.leaving or self.peers.full or self.retry:
            timeout = 50
        elif self.peers.stall_until:
            now = self.clock.next()
            timeout = 50
            if now < self.peers.stall_until:
                timeout = 1 + (self.peers.stall_until - now) // 1_000_000
        if self.tidy_at:
            now = monotonic()
            left: cython.int = (self.tidy_at - now) // 1_000_000 + 1 if now < self.tidy_at else 0
            if timeout < 0 or left < timeout:
                timeout = left
        return timeout

    def tidy_later(self) -> cython.void:
        """Much was used, whose memory is to be given back when it idles."""
        if self.tidy_at == 0:
            self.tidy_at = monotonic() + TIDY_NS

    def _tidy(self):
        """Give back what large messages, or many, have left behind and nobody has used for a while."""
        left: cython.bint = self.tidy_client()
        left |= self.peers.tidy()
        if not left:
            give_back()
        self.tidy_at = monotonic() + TIDY_NS if left else 0

    # -- from our client -----------------------------------------------------------------------

    def pass_on(self, data, header, body, fds, large_fd, bulk) -> cython.bint:
        """Send on a message of our client that was checked; False if it must wait.

        The header in front of `data` was scanned into `header`. The body is at `body`, and also in
        `large_fd`, sealed, or reserved in `bulk`, if there is one. All stays the caller's."""
        route: Route
        if not self._up_to_date():
            return False
        if bulk is not None and self.overheard:  # and rules may look at the body
            bulk.take_back()
            bulk = None
        route = self._route(data, header, body)
        if (not route.met or self.monitored) and not self._are_met(route):
            if self.peers.waits():
                return False
        kept: Bulk = bulk
        if route.peer is None or self.monitored or self.overheard:
            large_fd = -1
            bulk = None
        elif bulk is not None and (bulk is not route.peer.bulk or route.moves is not None):
            bulk = None
        self.undone = None
        if bulk is None and kept is not None:
            kept.take_back()
        self._forward(route, header, body, fds, large_fd, bulk)
        return True

    def _up_to_date(self) -> cython.bint:
        """Read on in the log, before we decide by it; False if something has to be fetched first, or what
        stands there is still held back, for what a peer has promised."""
        if self.loaded and self.log.head() != self.log.position:
            head: uint64_t = self.log.head()
            self._inbound()
            if self.log.position < head:
                return False
        return self.fetching == 0

    def bulk_for(self, data, header) -> Bulk:
        """The bulk area to which the body of a message can be received, whose header is here: it
        stands where its receiver's worker will read it. None if there is none. Whether the message
        goes there is only decided by `pass_on`: names may have moved by then."""
        route: Route
        if not self.loaded or header.type == SIGNAL or self.monitor:
            return None
        if self.monitored or self.overheard:
            return None
        if self._looks():  # the body must be here to decide
            return None
        if not self._up_to_date():
            return None
        route = self._route(data, header, cython.NULL)
        if route.peer is None or route.peer.state != READY or route.moves is not None:
            return None
        bulk: Bulk = self.peers.bulk(route.peer, header.body_length)
        if bulk is not None:
            self.tidy_later()
        return bulk

    def _looks(self) -> cython.bint:
        """Whether what our client may call depends on the arguments."""
        sight = self.sight
        return sight is not None and sight.looks_at_args

    def _are_met(self, route) -> cython.bint:
        """Whether all whom a message concerns are introduced."""
        peers: list = [route.peer] if route.peer is not None else list(route.subscribers or ())
        peers += route.eavesdroppers or ()
        peers += [self.peers.peer(id) for id in self.replica.monitors]
        route.met = self.peers.are_met(peers)
        return route.met

    def _route(
        self,
        data: cython.pointer(uint8_t),
        header: cython.pointer(Header),
        body: cython.pointer(cython.const[uint8_t]),
    ) -> Route:
        """The route of a message: kept under the bytes of its header without what varies."""
        route: Route
        key: bytes = key_of(data, header)
        route = self.routes.get(key)
        if (
            route is not None
            and route.epoch == self.epoch
            and not route.depends
            and (not route.broadcast or route.matches == self.matches)
        ):
            return route
        if (
            self.undone is not None
            and self.undone_serial == header.serial
            and self.undone_key == key
            and self.undone.epoch == self.epoch
            and (not self.undone.broadcast or self.undone.matches == self.matches)
        ):
            return self.undone  # what a rule logs, it logs once
        route = decisions.decide(
            self.router,
            self.peers,
            self.epoch,
            key,
            header.reply_serial_at,
            header.flags,
            header.unix_fds,
            _bytes(body, header.body_length)
            if header.type == SIGNAL or self.overheard or self._looks()
            else b"",
            header.endian == 66,
        )
        if route.depends:
            self.undone = route
            self.undone_key = key
            self.undone_serial = header.serial
        if len(self.routes) >= MAX_ROUTES:
            self.routes.clear()
        # A refusal for want of an owner depends on the flags; it is decided anew each time.
        if route.error is None and route.activate is None:
            self.routes[key] = route
        return route

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
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = MESSAGE
        head.flags = header.flags
        head.fds = header.unix_fds
        head.serial = header.serial
        head.reply_serial = header.reply_serial
        head.body_length = header.body_length
        if route.eavesdroppers is not None and not route.to_bus:
            self._let_overhear(route.eavesdroppers, cython.address(head), route.envelope, body, fds)
        if self.monitored and self._is_shown(route, header.type, header.serial):
            head.stamp = self.clock.next()
            content: bytes = _bytes(body, header.body_length)
            self.monitors.copy(route.facts, cython.address(head), content, fds, self.id)
            if self.peers.slow:
                self.peers.begin(head.stamp)  # a monitor is not to see the answer first
        elif not self.loaded:
            self.hello = (route.facts, _raw(cython.address(head)))
        wants: cython.bint = header.type == CALL and not header.flags & WANTS_NO_REPLY
        if route.peer is not None:
            if wants:
                if self.calls.are_many():
                    self.error(
                        header.serial,
                        LIMITS_EXCEEDED,
                        "The maximum number of pending replies per connection has been reached",
                    )
                    return
                if not self.calls.open(header.serial, route.peer.id):
                    self.error(header.serial, ACCESS_DENIED, SAME_SERIAL)
                    return
            else:
                route.peer.note(header.serial)
            if route.moves is not None:
                content = _bytes(body, header.body_length)
                held = Held(route.facts, wants, _raw(cython.address(head)), content, fds)
                self.kept.keep(route.moves, header.serial, held)
            if large_fd >= 0:
                head.kind = LARGE
                head.aux = header.body_length
                head.body_length = 0
                fds = (*fds, large_fd)
            elif bulk is not None:
                head.kind = BULK
                head.body_length = 0
            self._send(route.peer, cython.address(head), route.envelope, body, fds, wants)
        elif route.broadcast:
            for text in route.refusals:
                self.monitors.show_refusal(self.driver.name, header.serial, text)
            self.peers.publish(
                route.subscribers,
                route.envelope,
                cython.address(head),
                body,
                fds,
                self.everyone
                and not route.refusals
                and not self.replica.policies  # of kdbus: some may not see it, and map the Broadcast
                and self.credentials.label not in self.replica.restrained,
            )
            if self.peers.me in route.subscribers:
                self._to_myself(route.envelope, cython.address(head), body, fds)
        elif route.to_bus:
            done = self._call_bus(
                route, header.type, header.serial, header.flags, _bytes(body, header.body_length)
            )
            if not self.loaded:
                pass  # who overhears Hello has it of `_tell_of_hello`
            elif route.eavesdroppers is not None and done is None and not fds:
                content = _bytes(body, header.body_length)
                self.unheard[header.serial] = route, _raw(cython.address(head)), content
            elif route.eavesdroppers is not None and done is not False:
                self._let_overhear(
                    route.eavesdroppers, cython.address(head), route.envelope, body, fds
                )
        elif route.to_self:
            if wants:
                if not self.calls.open(header.serial, self.id):
                    self.error(header.serial, ACCESS_DENIED, SAME_SERIAL)
                    return
            self._to_myself(route.envelope, cython.address(head), body, fds)
        elif route.activate is not None:
            content = _bytes(body, header.body_length)
            self._activate(
                route.activate,
                Held(route.facts, wants, _raw(cython.address(head)), content, fds),
            )
        elif route.error is not None:
            if route.spends is not None:
                self._spend(route.spends, header.reply_serial)
            # whatever it is, and whether it wants a reply or not
            self.error(header.serial, route.error[0], route.error[1])

    def _is_shown(self, route: Route, type: cython.int, serial) -> cython.bint:
        """Whether monitors see it: once, and not what is said to nobody, as dbus-daemon has it."""
        if route.facts.destination is None and (type != SIGNAL or route.to_bus):
            return False
        return self.again is None or serial not in self.again

    def _let_overhear(self, eavesdroppers, head, envelope, body, fds) -> cython.void:
        """Copies of a message for those who eavesdrop; they are not to see its answer first."""
        copy: FrameHead
        if head.stamp == 0:
            head.stamp = self.clock.next()
        copy = head[0]
        copy.kind = COPY
        copy.aux = cython.cast(uint64_t, self.id)
        for peer in eavesdroppers:
            if peer is self.peers.me:
                self._to_myself(envelope, cython.address(copy), body, fds)
            else:
                self.peers.must_send(peer, cython.address(copy), envelope, body, fds)
        if self.peers.slow:
            self.peers.begin(head.stamp)

    def _to_myself(self, envelope, head, body, fds) -> cython.void:
        payload: bytes = envelope + _bytes(body, head.body_length)
        data: cython.p_char = payload
        head.envelope_length = len(envelope)
        self._deliver(
            self.peers.me,
            head,
            cython.cast(cython.pointer(cython.const[uint8_t]), data),
            tuple([os.dup(fd) for fd in fds]),
        )

    def _spend(self, peer: Peer, reply_serial):
        """Policy has refused our client's answer to a call of the peer's, which nobody may answer any more."""
        head: FrameHead
        if peer is self.peers.me:
            self.calls.close(reply_serial, self.id)
        elif peer.state == READY:  # or it has never called us
            memset(cython.address(head), 0, cython.sizeof(FrameHead))
            head.kind = SPENT
            head.reply_serial = reply_serial
            self._send(peer, cython.address(head), b"", cython.NULL, (), False)

    def _send(self, peer, head, envelope, body, fds, wants_reply) -> cython.void:
        """One of our client's messages to one peer, or what our worker says to that of the peer. Raises Gone."""
        if self.peers.send(peer, head, envelope, body, fds):
            return
        if wants_reply and self.calls.close(head.serial, peer.id):
            self.error(head.serial, LIMITS_EXCEEDED, f"too much waits for {peer.name}")
        else:
            self.peers.must_send(peer, head, envelope, body, fds)  # which says why it can't

    # -- the bus itself ------------------------------------------------------------------------

    def _call_bus(self, route: Route, type, serial, flags, body):
        """False if it has failed already, None if the broker is asked first whether it does."""
        facts = route.facts
        if type != CALL:
            if facts.destination is None and facts.interface == PEER:
                self.act([drivers.not_of_peer(serial)])
            elif self.driver.me == 0 and facts.destination is not None:
                self.error(serial, ACCESS_DENIED, NOT_REGISTERED)
            return True  # the bus expects no signals and no replies
        actions = self.driver.call(
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
        self._act_and_note(actions)
        if not actions or isinstance(actions[0], drivers.Ask):
            waits = not actions or actions[0].token.held
            return None if waits and not flags & WANTS_NO_REPLY else True
        return not isinstance(actions[0], drivers.Error)

    def _act_and_note(self, actions):
        if self.unheard:
            self._let_overhear_granted(actions)
        self.act(actions)
        # What the client says next must not overtake what it has just changed.
        self.busy = self.driver.busy

    def _let_overhear_granted(self, actions):
        """Who eavesdrops sees what the bus was asked for once that is granted, and before the answer."""
        head: FrameHead
        route: Route
        for action in actions:
            granted = isinstance(action, drivers.Return)
            if not granted and not isinstance(action, drivers.Error):
                continue
            kept = self.unheard.pop(action.reply_serial, None)
            if kept is None or not granted:
                continue
            route, raw, body = kept
            there = tuple([p for p in route.eavesdroppers if p.id in self.replica.connections])
            source: cython.p_char = raw
            data: cython.p_char = body
            memcpy(cython.address(head), source, cython.sizeof(FrameHead))
            self._let_overhear(
                there,
                cython.address(head),
                route.envelope,
                cython.cast(cython.pointer(cython.const[uint8_t]), data),
                (),
            )

    def ask_for_driver(self, action):
        """Ask the broker what the driver wants to know (drivers.Ask)."""
        hello: cython.bint = type(action.request) is entries.Hello
        if hello and self.log is not None and not self.asking.said:
            self.before = self.log.head()
        self.asking.ask(
            action.request,
            lambda answer, fds: self._answer_driver(action.token, answer, fds),
        )
        if hello:
            self.asked = True
            self._join()

    def get_ready(self) -> None:
        """While there is no client yet: take over the state of the bus, which the broker tells."""
        try:
            self._hear()
        except EOFError:
            return  # it says so again
        self._take_said()
        self._take_over(0)

    def _join(self):
        """The same while the broker answers Hello, and what is new since. No one hears of that, as our client
        is nobody yet."""
        if self.loaded or not self.asked or not (self.state or self.knows):
            return
        self._take_over(self.before)
        self.joined = True
        self.has_joined()

    def _take_over(self, until: uint64_t):
        """The state that we were told, and what the log has said since, up to there."""
        state, self.state = self.state, b""
        try:
            if state:
                self.replica.load(decode_snapshot(state))
                self.log.seek(self.replica.position)
                self.knows = True
            while self.knows and self.log.position < until:
                frame = self.log.read()
                entry = decode_entry(frame.body)
                self.replica.apply(entry)
                self.replica.position = frame.position
                if type(entry) is entries.ConnectionAdded:
                    self.next_id = entry.id + 1
        except (msgspec.MsgspecError, ReplicaError) as error:
            raise Gone(f"the broker talks nonsense: {error}") from None
        except memfd.RingError:
            pass  # the log has gone round; if the answer has no new state, `_behind` asks for it

    def _answer_driver(self, token, answer, fds):
        snapshot = b""
        passed: tuple = ()
        hello: cython.bint = isinstance(token.request, entries.Hello)
        if hello and fds:
            snapshot = memfd.read(fds[0])
            if self.log is None:
                self.log = BroadcastReader(fds[1], 0)
        elif hello and type(answer) is entries.Reply and not self.joined:
            raise Gone("the broker talks nonsense: an answer to Hello without a snapshot")
        elif fds:
            passed = tuple([os.dup(fd) for fd in fds])
        try:
            actions = self.driver.answer(token, answer, snapshot, passed)
        except (msgspec.MsgspecError, ReplicaError, TypeError) as error:
            raise Gone(f"the broker talks nonsense: {error}") from None
        if hello and self.replica.me and not self.loaded:
            self._loaded()
            self._inbound()  # the snapshot may be older than a monitor
            if (self.monitored or self.overheard) and self.hello is not None:
                self._tell_of_hello(*self.hello)
        self._act_and_note(actions)

    def _tell_of_hello(self, facts, raw):
        """Before it was answered we did not know who watches."""
        head: FrameHead
        source: cython.p_char = raw
        memcpy(cython.address(head), source, cython.sizeof(FrameHead))
        if self.monitored:
            self.monitors.copy(facts, cython.address(head), b"", (), self.id)
        decision = self.router.decide(facts, 0, 0, tuple)
        if decision.eavesdroppers:
            watching = tuple([self.peers.peer(id) for id in decision.eavesdroppers])
            envelope = envelopes.encode(facts)
            self._let_overhear(watching, cython.address(head), envelope, cython.NULL, ())

    def _look_who_watches(self):
        """Monitors and eavesdroppers have to be looked at only if there are some; and of which match rules a
        decision was made is compared for each signal."""
        self.matches = self.replica.matches_version
        self.mine = self.replica.my_version
        self.monitored = bool(self.replica.monitors)
        self.overheard = bool(self.replica.eavesdroppers)

    def _loaded(self):
        """Hello was answered: we are somebody, and follow the log from the snapshot on."""
        self.loaded = True
        self.id = self.replica.me
        connection = self.replica.connections.get(self.id)
        self.peers.me = Peer(self.id, f":1.{self.id}", connection)
        self._look_who_watches()
        self._follow(self.replica.position)
        self._catch_up_with_policy()

    # -- activation ----------------------------------------------------------------------------

    def _activate(self, name, message):
        """Hold a message until its destination is started; its order among its kind is kept."""
        if (refusal := self.activating.refusal(name, message)) is not None:
            head: FrameHead
            source: cython.p_char = message.head
            memcpy(cython.address(head), source, cython.sizeof(FrameHead))
            self.error(head.serial, LIMITS_EXCEEDED, refusal)
        elif self.activating.hold(name, message):
            self.driver.look_for(name)
            self.busy = self.driver.busy
            self.asking.ask(
                entries.StartService(0, name, True), lambda answer, _: self._activated(name, answer)
            )

    def _activated(self, name, answer):
        head: FrameHead
        for held in self.activating.take(name):
            source: cython.p_char = held.head
            memcpy(cython.address(head), source, cython.sizeof(FrameHead))
            if isinstance(answer, entries.Failure):
                self.error(head.serial, answer.error, answer.message)
            else:
                self._send_held(held, cython.address(head), False)
            close_all(held.fds)
        self._act_and_note(self.driver.found(name))

    def _send_held(self, held, head, again):
        """Send a message that was held; its destination may have an owner now. `again`: who eavesdrops has
        it already."""
        facts = held.envelope
        decision = self.router.decide(
            facts,
            NO_AUTO_START,
            len(held.fds),
            lambda: wire_body.match_arguments(held.body, facts.signature, facts.big_endian),
        )
        if decision.error is not None:
            if decision.spends is not None:
                self._spend(self.peers.peer(decision.spends), head.reply_serial)
            self.error(head.serial, decision.error[0], decision.error[1])
            return
        envelope: bytes = envelopes.encode(held.envelope)
        head.stamp = 0
        data: cython.p_char = held.body
        place = cython.cast(cython.pointer(cython.const[uint8_t]), data)
        peer: Peer = self.peers.peer(decision.targets[0])
        if held.wants_reply:
            if not self.calls.open(head.serial, peer.id):
                self.error(head.serial, ACCESS_DENIED, SAME_SERIAL)
                return
        else:
            peer.note(head.serial)
        if decision.eavesdroppers and not again:
            watching = tuple([self.peers.peer(id) for id in decision.eavesdroppers])
            self._let_overhear(watching, head, envelope, place, held.fds)
        if peer is self.peers.me:
            self._to_myself(envelope, head, place, held.fds)
        else:
            self._send(peer, head, envelope, place, held.fds, held.wants_reply)

    def _send_again(self, name, old):
        """A name went from its activator to an owner, or back: so does what nobody has read of it."""
        head: FrameHead
        kept = self.kept.take(name)
        for serial, held in kept.items():
            source: cython.p_char = held.head
            memcpy(cython.address(head), source, cython.sizeof(FrameHead))
            # Unless it has failed meanwhile.
            if not held.wants_reply or self.calls.close(serial, old):
                self._send_held(held, cython.address(head), True)
                if self.replica.connections[self.replica.names[name]].kdbus is not None:
                    self.kept.keep(name, serial, held)
            close_all(held.fds)
        had = self.replica.connections.get(old)
        if kept and had is not None and had.kdbus is not None and old != self.id:
            # Who had it keeps it till we say so, as we might have gone (kdbus_bus.py).
            memset(cython.address(head), 0, cython.sizeof(FrameHead))
            head.kind = ACK
            self._send(
                self.peers.peer(old),
                cython.address(head),
                b"again:" + name.encode(),
                cython.NULL,
                (),
                False,
            )

    # -- the broker ----------------------------------------------------------------------------

    def _from_broker(self):
        """One a turn: most often there is one, and our client waits for what it brings."""
        if self.joined and not self.loaded:
            self.before_broker()
        self.asking.line.flush()
        if self.answer is None:
            self._hear()

    def _hear(self) -> cython.bint:
        """Keep what the broker says next, till what it caused has been read in the log."""
        try:
            received = self.asking.line.receive()
        except LineError as error:
            raise Gone(f"the broker broke a rule: {error}") from None
        if received is None:
            return False
        self._keep(received)
        return True

    def _keep(self, received):
        message = received[0]
        if type(message) is not entries.Reply or not message.stamp or not self.loaded:
            self.said.append(received)
        elif self.answer is None:
            self.answer, self.answer_at = message, message.stamp
        else:
            self.later.append(received)

    def _wait_for(self, request):
        """The broker's answer to this request; what else it says has its turn after that."""
        line = self.asking.line
        arrived = select.poll()
        while True:
            arrived.register(line, select.POLLIN | (select.POLLOUT if line.queue else 0))
            arrived.poll()
            try:
                line.flush()
                received = line.receive()
            except LineError as error:
                raise Gone(f"the broker broke a rule: {error}") from None
            if received is None:
                continue
            message = received[0]
            if isinstance(message, entries.Reply | entries.Failure) and message.request == request:
                return received
            self._keep(received)

    def _answered(self):
        """The answer's turn has come, between what stands in the log and in the rings."""
        answer, self.answer = self.answer, None
        if self.later:
            self._keep(self.later.pop(0))
        self.asking.answered(answer, [])

    def _take_said(self):
        """What else the broker has said."""
        while self.said:
            message, fds = self.said.pop(0)
            try:
                self._broker_says(message, fds)
            except LineError as error:
                raise Gone(f"the broker broke a rule: {error}") from None
            finally:
                self.peers.release(fds)

    def _broker_says(self, message, fds):
        kind = type(message)
        if kind is entries.Reply or kind is entries.Failure:
            if not self.loaded:
                self.before_answer()
            self.asking.answered(message, fds)
        elif kind is entries.Introduction:
            self.peers.introduced_by(message, fds)
        elif kind is entries.Withdrawn:
            self.peers.withdrawn(message.peer)
        elif kind is entries.State:
            self.state, self.next_id = message.snapshot, message.next
            self._join()
        elif kind is entries.Probe:
            self.asking.line.send(entries.Running(0))
        elif kind is entries.Count:
            self.asking.line.send(entries.Counted(0, *self.count()))

    # -- from the bus --------------------------------------------------------------------------

    def _inbound(self) -> cython.void:
        """Deliver what stands in the rings and in the log, in the order of their stamps."""
        head: FrameHead
        payload: cython.pointer(cython.const[uint8_t])
        peer: Peer
        rounds: cython.int = 0
        if not self.loaded:
            return
        self.more = False
        position: uint64_t = self.log.head()
        while self.merge.gather() > 0:
            # The broker says an answer before it writes on in the log.
            while self.busy and self.answer is None and self._hear():
                pass
            while True:
                source = self.merge.next(cython.address(head), cython.address(payload))
                if source is None:
                    break
                while (
                    self.answer is not None
                    and head.stamp > self.answer_at
                    and (source is self.log or self._is_caused_read())
                ):
                    self._answered()
                if source is self.log:
                    self.log_stamp = head.stamp
                    self._log_entry(_bytes(payload + head.envelope_length, head.body_length))
                    continue
                peer = self.peers.by_source[source]
                try:
                    self._deliver(peer, cython.address(head), payload, None)
                    if head.kind == BULK and peer.bulk_view is not None and head.aux & 0xFFFFFFFF:
                        if peer.bulk_view.piped and not peer.bulk_view.drain():
                            raise HostilePeer("took back a body that it had announced")
                        peer.bulk_view.done()
                except HostilePeer as error:
                    self.peers.drop(peer, str(error))
            self.merge.publish()
            self.relieve()
            rounds += 1
            if rounds >= ROUNDS and self.log.position >= position:
                self.more = True  # a flood keeps us from nothing else that we have to do
                break
        while self.answer is not None and not self.more and self._is_caused_read():
            self._answered()
        if not self.merge.broken:
            return
        for source, text in self.merge.take_broken():
            if source is self.log:
                self._behind()
            else:
                self.peers.drop(self.peers.by_source[source], text)

    def _is_caused_read(self) -> cython.bint:
        """Whether what the answer tells the end of has been read in the log. It stands there, but while a peer
        has promised something, the log is held back, and is not to be overtaken by the answer."""
        return (
            self.log_stamp >= self.answer_at
            or self.log.position == self.log.head()
            or self.fetching > 0
        )

    def _behind(self):
        """The log has gone round before we read it: start again from a snapshot."""
        self.fetching += 1  # our client's next message is not to be judged by what is out of date
        self.asking.ask(entries.FetchSnapshot(0), self._resync)

    def _resync(self, answer, fds):
        self.fetching -= 1
        snapshot = memfd.read(fds[0])
        actions = self.driver.resync(snapshot)
        self.epoch += 1
        self._look_who_watches()
        self._follow(self.replica.position)
        for id in [id for id in self.peers.known if id not in self.replica.connections]:
            self._peer_left(id)
        self._catch_up_with_policy()
        self._act_and_note(actions)

    def _follow(self, position):
        """Read the log from `position` on."""
        self.merge.remove(self.log)
        self.log.seek(position)
        self.merge.add(self.log)

    def _log_entry(self, raw):
        entry = decode_entry(raw)
        kind = type(entry)
        if kind in _CHANGES or (kind in _RULES and eavesdrops(entry.rule)):
            self.epoch += 1
        try:
            actions = self.driver.entry(entry)
        except ReplicaError as error:
            raise Gone(f"the log contradicts itself: {error}") from None
        self._look_who_watches()
        if self.peers.me.connection is None:
            self.peers.me.connection = self.replica.connections.get(self.id)
        if kind is entries.PolicyChanged:
            self._catch_up_with_policy()
        elif kind is entries.NameOwnerChanged:
            if entry.old and entry.new and entry.activator in (entry.old, entry.new):
                self._send_again(entry.name, entry.old)
        elif kind is entries.MonitorAttached:
            if entry.id == self.id:
                self.monitor = True
                self.calls.clear()
            elif entry.id in self.peers.known:
                self.retired.append(entry.id)
        self._act_and_note(actions)
        if self.retired:
            self._answer_for_the_retired()
        if kind is entries.ConnectionRemoved:
            self._peer_left(entry.id)  # the client hears first who went, then what nobody answers

    def _catch_up_with_policy(self):
        """Have the policy in force, if ours is another: we may be older than it, and know of it by a
        snapshot alone."""
        if self.replica.policy_generation != self.context.generation:
            self._fetch_policy()
            self._take_policy()
            self.epoch += 1

    def _fetch_policy(self):
        """The configuration was read again. Waits for it: whatever comes next, from our client or for it, is for
        the new policy."""
        answer, fds = self._wait_for(self.asking.ask(entries.FetchPolicy(0), None))
        try:
            if isinstance(answer, entries.Failure):
                raise Gone(f"no policy: {answer.message}")
            self.context = self.context.with_configuration(memfd.read(fds[0]), answer.value)
        finally:
            close_all(fds)

    def _take_policy(self):
        configuration = self.context.configuration
        policy = ClientPolicy(configuration.policy, self.credentials)
        self.everyone = policy.allows_everything_to_send
        if self.router is not None:
            self.router.policy = policy
        limits = configuration.limits
        self.calls.limit(limits["max_replies_per_connection"], limits["reply_timeout"])
        self.activating.limits = limits
        self.take_limits(limits)
        return policy

    def _peer_left(self, id):
        """A connection ended; what it had sent is delivered, what we asked of it will not be."""
        if self.peers.left(id):
            self._fail_pending(id, NO_REPLY, NO_REPLY_DISCONNECTED)

    def _answer_for_the_retired(self):
        """Who became a monitor answers nobody; our client hears that once it has heard which names that one has lost."""
        waited_for = set(self.replica.given_up.values())
        for id in [id for id in self.retired if id not in waited_for]:
            self.retired.remove(id)
            self._fail_pending(id, NO_REPLY, NO_REPLY_DISCONNECTED)

    def _answer_for_the_lost(self):
        lost = self.peers.lost[:]
        self.peers.lost.clear()
        for id, error, text in lost:
            self._fail_pending(id, error, text)

    def _fail_pending(self, id, error, text):
        """What we asked of connection `id` is answered with an error."""
        for serial in self.calls.close_all_of(id):
            self.error(serial, error, text)

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
            if head.aux & BULK_FRESH or head.aux & 0xFFFFFFFF == 0:
                fds = peer.bulk_begins(self.peers.status, head.aux, fds)
            if head.aux & 0xFFFFFFFF == 0:
                close_all(fds)
                return
            try:
                body = peer.bulk_body(head)
                if head.body_length and not peer.bulk_view.announce(
                    payload + head.envelope_length, head.body_length, head.aux
                ):
                    raise HostilePeer("a body in a carrier that is none, or of the wrong length")
                head.body_length = 0
            except HostilePeer:
                close_all(fds)
                raise
        if head.kind == ACK and head.reply_serial == 0:
            close_all(fds)
            self._is_read(_bytes(payload, head.envelope_length))
            return
        if head.kind == REFUSED:
            close_all(fds)
            self._peer_refused(peer, head.reply_serial, _bytes(payload, head.envelope_length))
            return
        if head.kind == SPENT:
            close_all(fds)
            self.calls.close(head.reply_serial, peer.id)
            return
        if head.serial == 0:
            close_all(fds)
            raise HostilePeer("a message without a serial")
        if (head.kind == COPY or head.kind == LARGE_COPY) and self.monitor:
            self._deliver_copy(peer, head, payload, fds)
            return
        if self.monitor:
            close_all(fds)
            return  # a monitor is nobody's destination
        if head.kind == COPY or head.kind == LARGE_COPY:
            self._overhear(peer, head, payload, fds)
            return
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
            or (template.broadcast and template.mine != self.mine)
        ):
            template = self._judged(decisions.judge, peer, key, envelope, head, payload, fds)
        if template.type == RETURN or template.type == ERROR:
            if not self.calls.wait_for(head.reply_serial, peer.id):
                close_all(fds)
                # Nobody asked, or somebody else was asked.
                text = self.router.unasked(
                    envelopes.decode(template.raw), peer.connection, head.fds
                )
                self.refuse(peer, head.serial, ACCESS_DENIED, text)
                return
            self.calls.close(head.reply_serial, peer.id)
        elif template.answers != (head.reply_serial != 0):
            close_all(fds)
            raise HostilePeer("an envelope and a frame that do not agree on the reply serial")
        elif template.answers and not template.broadcast:
            # The call that it answers is answered, and a reply to it one that nobody asked for.
            if not self.calls.close(head.reply_serial, peer.id) and template.unasked is not None:
                close_all(fds)
                self.peers.say(template.unasked)
                self.refuse(peer, head.serial, ACCESS_DENIED, template.unasked)
                return
        if template.refusal is not None:
            close_all(fds)
            if template.type == CALL and not head.flags & WANTS_NO_REPLY:
                self.refuse(peer, head.serial, ACCESS_DENIED, template.refusal)
            return
        if template.broadcast and not template.subscribed:
            close_all(fds)
            return
        if head.fds and not self.unix_fds:
            close_all(fds)
            if not template.broadcast:
                self.peers.say(f"{peer.name} sent descriptors, which our client does not take")
                self.refuse(peer, head.serial, NOT_SUPPORTED, NO_FDS_TEXT)
            return
        self.hand_over(peer, template, head, body, fds)

    def _judged(
        self,
        judge,
        peer: Peer,
        key,
        raw: bytes,
        head: cython.pointer(FrameHead),
        payload: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
    ) -> Template:
        """What becomes of a frame, by one of `decisions`. Raises HostilePeer; the descriptors are then
        closed."""
        large: cython.bint = head.kind == LARGE or head.kind == LARGE_COPY
        body: bytes = _bytes(payload + head.envelope_length, head.body_length)
        large_fd = fds[len(fds) - 1] if large else -1
        try:
            return judge(self.router, peer, self.epoch, key, raw, head.fds, body, large_fd)
        except HostilePeer:
            close_all(fds)
            raise

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
            name = BUS_NAME if sender == -1 else peer.name
            try:
                template = decisions.copy(peer, key, raw, name, head.fds)
            except HostilePeer:
                close_all(fds)
                raise
        if not self.unix_fds and fds:
            close_all(fds)
            return
        self.show(template, head, payload + head.envelope_length, fds)

    def _overhear(
        self,
        peer: Peer,
        head: cython.pointer(FrameHead),
        payload: cython.pointer(cython.const[uint8_t]),
        fds: tuple,
    ) -> cython.void:
        """A message of the peer's to another, which our client sees if it eavesdrops."""
        template: Template
        if head.aux != cython.cast(uint64_t, peer.id):
            close_all(fds)
            raise HostilePeer("a copy of another's message")
        raw = _bytes(payload, head.envelope_length)
        key = (raw, head.fds, peer.id)
        template = peer.templates.get(key)
        if template is None or template.epoch != self.epoch or template.depends:
            template = self._judged(decisions.overhear, peer, key, raw, head, payload, fds)
        if not template.subscribed or (head.fds and not self.unix_fds):
            close_all(fds)
            return
        self.overhear(template, head, payload + head.envelope_length, fds)

    def refuse(self, peer: Peer, serial, error, text):
        """Tell the sender's worker that its message was not delivered; it answers its client."""
        head: FrameHead
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = REFUSED
        head.reply_serial = serial
        if peer is self.peers.me:
            self.calls.close(serial, peer.id)
            self.error(serial, error, text)
            return
        refusal: bytes = encode_refusal((error, text))
        if not self.peers.send(peer, cython.address(head), refusal, cython.NULL, ()):
            # It sends and does not read: that is not to be our client's fault.
            self.peers.drop(peer, f"it leaves {peer.backlog_bytes} bytes of refusals unread")

    def _is_read(self, note):
        """A kdbus client has read what ours sent to a name that has an activator (kdbus_bus.py)."""
        if note[:5] == b"read:":
            self.kept.read(int.from_bytes(note[5:], "little"))

    def _peer_refused(self, peer: Peer, serial, raw):
        waits: cython.bint = self.calls.wait_for(serial, peer.id)
        if not (waits or peer.take_note(serial)):
            return
        self.kept.read(serial)
        try:
            error, text = decode_refusal(raw)
        except ValueError:
            raise HostilePeer("a refusal that does not decode") from None
        if error not in (ACCESS_DENIED, LIMITS_EXCEEDED, NOT_SUPPORTED) or "\0" in text:
            raise HostilePeer(f"a refusal with the error {error!r}, {text!r}")
        if error != NOT_SUPPORTED:
            self.calls.close(serial, peer.id)
        elif waits and not self.calls.fail(serial, peer.id):
            return
        self.error(serial, error, text)

    # -- what a front end says -----------------------------------------------------------------

    def take_limits(self, limits: dict) -> None:
        """Limits of the configuration, at the beginning and when it has changed."""
        raise NotImplementedError

    def has_joined(self) -> cython.void:
        """The state of the bus is known, and Hello has been asked for."""

    def before_broker(self) -> cython.void:
        """The broker says something after that."""

    def before_answer(self) -> cython.void:
        """The answer to Hello is about to be dealt with."""

    def from_client(self, events) -> cython.void:
        """The client's descriptor is ready: epoll_wait(2)'s `events`."""
        raise NotImplementedError

    def other(self, source) -> cython.void:
        """What the front end itself waits for is ready."""
        raise NotImplementedError

    def go_on(self) -> cython.void:
        """Go on with what of the client has `stopped`, as it had to wait."""
        raise NotImplementedError

    def watch_client(self) -> cython.void:
        """Say what to wait for: what `from_client` is to be called for."""
        raise NotImplementedError

    def flush(self) -> cython.void:
        """Give the client what waits for it, as far as it takes it."""
        raise NotImplementedError

    def relieve(self) -> cython.void:
        """`flush` if much waits: more may be coming in for long."""
        raise NotImplementedError

    def hand_over(self, peer, template, head, body, fds) -> cython.void:
        """A frame of a peer that our client may have; `fds` are the front end's now. The body is
        still to be copied and then checked. Raises HostilePeer."""
        raise NotImplementedError

    def show(self, template, head, body, fds) -> cython.void:
        """The same of a copy for our client as a monitor."""
        raise NotImplementedError

    def overhear(self, template, head, body, fds) -> cython.void:
        """The same of a copy for our client who eavesdrops, of a message to another."""
        raise NotImplementedError

    def act(self, actions: list) -> None:
        """What the bus driver wants done; drivers.Ask is `ask_for_driver`'s."""
        raise NotImplementedError

    def error(self, reply_serial: int, name: str, text: str) -> None:
        """Our client's message `reply_serial` has failed."""
        raise NotImplementedError

    def count(self) -> tuple:
        """What waits from the client and for it (entries.Queued)."""
        raise NotImplementedError

    def tidy_client(self) -> cython.bint:
        """Give back memory that was not used since the last time; True: some is left."""
        raise NotImplementedError
