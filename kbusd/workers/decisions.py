# cython: boundscheck=False
"""What a worker has decided about one kind of message, and the deciding: once per kind, off the hot path.

A kind of what our client sends is a header without what varies from one message to the next: `Route`
says whom it goes to. A kind of what a peer sends is an envelope: `Template` says whether our client
gets it, and the header that it gets. Both hold for one `epoch` of names and policy. Routing and
policy themselves are in routing.py. An envelope is hostile: decoded by type, and its parts checked
by building a header from them.
"""

from __future__ import annotations

import cython
import msgspec
from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize
from cython.cimports.kbusd.workers.peers import Peer
from cython.cimports.libc.stdint import uint8_t
from cython.cimports.libc.string import memcpy, memset

from kbusd.rings import envelope as envelopes
from kbusd.rings import memfd
from kbusd.rings.memfd import RingError
from kbusd.wire import body as wire_body
from kbusd.wire import header as wire_header
from kbusd.workers.errors import ACCESS_DENIED, Gone
from kbusd.workers.introspection import PEER
from kbusd.workers.peers import HostilePeer
from kbusd.workers.replica import BUS_ID, BUS_NAME

CALL, RETURN, ERROR, SIGNAL = range(1, 5)
MAX_MESSAGE = 128 << 20  # D-Bus specification, "Message Protocol"
MAX_KEPT = cython.declare(cython.int, 1024)  # kinds of a peer, or of our client


@cython.cclass
class Route:
    """Whom the messages with one header go to. Holds for one `epoch` of names and policy, and for
    a broadcast also for one version of the match rules."""


@cython.cclass
class Template:
    """What this worker has decided about one envelope of one peer: the header its client sees, or
    why it sees nothing. Holds for one `epoch` of names and policy."""


def key_of(data, header):
    """What messages of one kind have in common: the header without body length, serials and flags.
    `data` is changed meanwhile."""
    varying: uint8_t[16]
    memcpy(varying, data, 12)
    memset(data + 4, 0, 8)  # body length and serial
    data[2] = 0  # flags
    if header.reply_serial_at:
        memcpy(varying + 12, data + header.reply_serial_at, 4)
        memset(data + header.reply_serial_at, 0, 4)
    key: bytes = PyBytes_FromStringAndSize(
        cython.cast(cython.p_char, data), 16 + header.fields_length
    )
    memcpy(data, varying, 12)
    if header.reply_serial_at:
        memcpy(data + header.reply_serial_at, varying + 12, 4)
    return key


def decide(router, peers, epoch, key, reply_at, flags, fds, body, big_endian) -> Route:
    """The route of a message of our client, whose header without what varies is `key`, the reply
    serial at `reply_at` of it. Raises Gone."""
    replica = router.replica
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
        answers=reply_at != 0 and (parsed.type == CALL or parsed.type == SIGNAL),
    )
    route = Route()
    route.facts = envelope
    route.envelope = envelopes.encode(envelope)
    route.epoch = epoch
    route.matches = replica.matches_version
    to_nobody = envelope.destination is None and (
        envelope.type != SIGNAL or envelope.interface == PEER
    )
    if replica.me == 0 and envelope.destination != BUS_NAME and not to_nobody:
        raise Gone("sent a message other than Hello before Hello")
    decision = router.decide(
        envelope,
        flags,
        fds,
        lambda: wire_body.match_arguments(body, envelope.signature, big_endian),
    )
    route.error = decision.error
    route.activate = decision.activate
    route.refusals = decision.refusals
    if decision.spends is not None:
        route.spends = peers.peer(decision.spends)
    route.broadcast = decision.broadcast
    route.depends = decision.depends
    if decision.eavesdroppers:
        route.eavesdroppers = tuple([peers.peer(id) for id in decision.eavesdroppers])
    if decision.broadcast:
        route.subscribers = tuple([peers.peer(id) for id in decision.targets])
    elif decision.targets == (BUS_ID,):
        route.to_bus = True
    elif decision.targets == (replica.me,):
        route.to_self = True
    elif decision.targets:
        route.peer = peers.peer(decision.targets[0])
        if envelope.destination in replica.activators:
            route.moves = envelope.destination
    return route


def judge(router, peer: Peer, epoch, key, raw, fds, body, large_fd) -> Template:
    """What becomes of a message of `peer` with the envelope `raw`: its names, our policy and our
    match rules; these may look at the body, which is not checked yet; it is in `large_fd` if that is
    not -1. Kept under `key`. Raises HostilePeer."""
    replica = router.replica
    if peer.connection is None:  # we knew it by its introduction alone
        peer.connection = replica.connections.get(peer.id)
        if peer.connection is None:
            raise HostilePeer("a message that is older than its connection")
    template = Template()
    envelope = _fill(template, raw, peer.name, fds)
    if not CALL <= envelope.type <= SIGNAL:
        raise HostilePeer(f"a message of type {envelope.type}")
    template.epoch = epoch
    template.mine = replica.my_version
    router.looked = False
    template.refusal = router.admit(
        envelope, peer.connection, fds, lambda: _arguments(body, large_fd, envelope)
    )
    looked = router.looked
    template.broadcast = envelope.destination is None
    if envelope.answers and template.refusal is None and not template.broadcast:
        template.unasked = router.refuses_unasked(envelope, peer.connection, fds)
    if template.broadcast:
        if envelope.type != SIGNAL:
            raise HostilePeer("a broadcast that is not a signal")
        template.subscribed, template.depends = replica.receives(
            SIGNAL,
            peer.id,
            envelope.path,
            envelope.interface,
            envelope.member,
            lambda: _arguments(body, large_fd, envelope),
        )
    template.depends |= looked
    _keep(peer, key, template)
    return template


def overhear(router, peer: Peer, epoch, key, raw, fds, body, large_fd) -> Template:
    """What becomes of a copy for our client, who eavesdrops: what `peer` sends to another. The body is
    not checked yet, as in `judge`. Kept under `key`. Raises HostilePeer."""
    if peer.connection is None:
        peer.connection = router.replica.connections.get(peer.id)
        if peer.connection is None:
            raise HostilePeer("a message that is older than its connection")
    template = Template()
    envelope = _fill(template, raw, peer.name, fds)
    template.epoch = epoch
    template.subscribed, template.depends = router.admit_overheard(
        envelope, peer.connection, fds, lambda: _arguments(body, large_fd, envelope)
    )
    _keep(peer, key, template)
    return template


def copy(peer: Peer, key, raw, sender, fds) -> Template:
    """The header of a copy for our client as a monitor. Kept under `key`. Raises HostilePeer.

    In the name of the bus a worker says only what the bus answers to that worker's own client."""
    template = Template()
    envelope = _fill(template, raw, sender, fds)
    if sender == BUS_NAME and not _answers(envelope, peer.name):
        raise HostilePeer(f"a copy of what the bus is to have said to {envelope.destination}")
    _keep(peer, key, template)
    return template


@cython.cfunc
def _answers(envelope, name):
    """Whether this can be an answer of the bus to the connection `name`, or the refusal of such an
    answer, which is addressed to the bus."""
    denial = (
        envelope.type == ERROR
        and envelope.destination == BUS_NAME
        and envelope.error_name == ACCESS_DENIED
    )
    answer = envelope.type == RETURN or envelope.type == ERROR
    return denial or (answer and envelope.destination == name)


@cython.cfunc
def _fill(template: Template, raw, sender, fds):
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
    template.raw = raw
    template.header = header
    template.header_length = len(header)
    template.signature = envelope.signature.encode()
    template.type = envelope.type
    template.answers = envelope.answers
    template.big_endian = envelope.big_endian
    return envelope


@cython.cfunc
def _keep(peer: Peer, key, template: Template):
    if len(peer.templates) >= MAX_KEPT:
        peer.templates.clear()
    peer.templates[key] = template


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
