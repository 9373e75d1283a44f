from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kbusd.rings.broadcast cimport BroadcastReader
from kbusd.rings.bulk cimport Bulk
from kbusd.rings.clock cimport Clock
from kbusd.rings.frame cimport FrameHead
from kbusd.rings.merge cimport Merge
from kbusd.wire.header cimport Header
from kbusd.workers.calls cimport Calls
from kbusd.workers.decisions cimport Route, Template
from kbusd.workers.monitors cimport Monitors
from kbusd.workers.peers cimport Peer, Peers
from kbusd.workers.waiting cimport Waiting

cdef class Engine:
    cdef object context, replica, asking, driver, router, credentials, activating, kept, hello, unheard
    cdef object sight  # of a client behind an endpoint
    cdef Clock clock
    cdef Merge merge
    cdef Peers peers
    cdef Waiting waiting
    cdef Monitors monitors
    cdef BroadcastReader log
    cdef Calls calls
    cdef dict routes
    cdef set again  # serials of messages that have moved with a name: monitors have seen them before
    cdef Route undone   # of a message that waits, which `decide` has looked at already
    cdef bytes undone_key
    cdef unsigned int undone_serial
    cdef int client, supervisor, fetching
    cdef long long id, epoch
    cdef long long matches, mine  # versions of the replica
    cdef bint busy, leaving, everyone, loaded
    cdef bint asked, joined  # for Hello; and we know the state of the bus already
    cdef bint knows     # some state of it, up to where we have read the log
    cdef int broker     # our line to it
    cdef bytes state    # of the bus, as the broker told it before Hello
    cdef object next_id # that we may get
    cdef uint64_t before  # how far the log was when we asked
    cdef bint monitor   # our client is one
    cdef bint monitored, overheard  # somebody is, or has rules with eavesdrop='true'
    cdef bint unix_fds  # our client takes descriptors
    cdef bint more      # stands in the rings still
    cdef bint stopped   # whole messages of our client wait for us
    cdef bint retry     # what waits for our client, now and then
    cdef uint64_t tidy_at, leave_until
    cdef list said      # by the broker
    cdef object answer  # of the broker's, to which the log has not come yet
    cdef uint64_t answer_at
    cdef uint64_t log_stamp  # of the last entry of the log that was read
    cdef list later     # answers behind that one
    cdef list retired   # who has become a monitor, and has names still

    cdef void _loop(self) except *
    cdef void has_joined(self) except *
    cdef void before_broker(self) except *
    cdef void before_answer(self) except *
    cdef int _timeout(self) except -2
    cdef bint waits(self) except -1
    cdef void tidy_later(self) noexcept
    cdef bint _up_to_date(self) except -1
    cdef bint pass_on(self, uint8_t *data, Header *header, const uint8_t *body, tuple fds, int large_fd, Bulk bulk) except -1
    cdef Bulk bulk_for(self, uint8_t *data, Header *header)
    cdef bint _looks(self) except -1
    cdef bint _are_met(self, Route route) except -1
    cdef Route _route(self, uint8_t *data, Header *header, const uint8_t *body)
    cdef void _forward(self, Route route, Header *header, const uint8_t *body, tuple fds, int large_fd, Bulk bulk) except *
    cdef void _let_overhear(self, tuple eavesdroppers, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds) except *
    cdef void _to_myself(self, bytes envelope, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef void _send(self, Peer peer, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds, bint wants_reply) except *
    cdef object _spend(self, Peer peer, reply_serial)
    cdef object _send_held(self, object held, FrameHead *head, bint again)
    cdef void _inbound(self) except *
    cdef void _deliver(self, Peer peer, FrameHead *head, const uint8_t *payload, tuple own_fds) except *
    cdef Template _judged(self, judge, Peer peer, key, bytes raw, FrameHead *head, const uint8_t *payload, tuple fds)
    cdef void _deliver_copy(self, Peer peer, FrameHead *head, const uint8_t *payload, tuple fds) except *
    cdef void _overhear(self, Peer peer, FrameHead *head, const uint8_t *payload, tuple fds) except *

    # What a front end says; see engine.py.
    cdef void from_client(self, uint32_t events) except *
    cdef void other(self, unsigned int source) except *
    cdef void go_on(self) except *
    cdef void watch_client(self) except *
    cdef void flush(self) except *
    cdef void relieve(self) except *
    cdef void hand_over(self, Peer peer, Template template, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef void show(self, Template template, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef void overhear(self, Template template, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef bint tidy_client(self) except -1
