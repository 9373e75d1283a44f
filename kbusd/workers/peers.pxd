from libc.stdint cimport uint8_t, uint64_t

from kbusd.rings.broadcast cimport Broadcast
from kbusd.rings.bulk cimport Bulk, BulkView
from kbusd.rings.clock cimport Clock
from kbusd.rings.fanout cimport Fanout, Subscriber
from kbusd.rings.frame cimport FrameHead
from kbusd.rings.merge cimport Merge
from kbusd.rings.ring cimport Ring, RingReader
from kbusd.rings.status cimport StatusPage, StatusView
from kbusd.workers.waiting cimport Waiting

cdef enum:
    # A body above this travels through the bulk area if the peer has one, or else as a sealed
    # memfd. Per message of 64 KiB both ways, the bus spends 37 us by the ring and 43 by the area; of
    # 256 KiB, which no ring takes, 120 by the area and 500 by memfds (tests/bench, payload).
    LARGE_BODY = 98304

cdef class Peer:
    cdef readonly long long id
    cdef readonly str name
    cdef public object connection
    cdef Ring ring
    cdef RingReader reader
    cdef StatusView view
    # Our ends of what we share, streams all of them: the bell, the side socket for descriptors, and the carrier for
    # pages of large bodies. -1 and None before READY.
    cdef int bell
    cdef object side
    cdef int carry
    cdef bint refuses  # descriptors: the kernel does, at our end of the bell
    cdef int bell_at  # where Peers has the bell; -1 if it is not listened to
    cdef int their_slot
    cdef Bulk bulk
    cdef BulkView bulk_view
    cdef readonly int slot, broadcast_slot
    cdef Subscriber subscriber
    cdef readonly int state
    cdef bint touched, late, accused
    cdef bint apart  # behind an endpoint: gets signals by its ring alone
    cdef uint64_t full_at, full_for
    cdef object backlog
    cdef readonly size_t backlog_bytes
    cdef dict templates
    cdef unsigned int noted[64]
    cdef unsigned int notes
    cdef void ring_bell(self) noexcept
    cdef int put(self, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds, Clock clock) except -2
    cdef bint _write(self, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds) except -1
    cpdef int flush(self) except -2
    cdef object _send_fds(self, object stamp, tuple fds)
    cdef tuple receive_fds(self, Py_ssize_t count)
    cdef void note(self, unsigned int serial) noexcept
    cdef bint take_note(self, unsigned int serial) noexcept
    cdef const uint8_t *bulk_body(self, FrameHead *head) except NULL

cdef class Peers:
    cdef Clock clock
    cdef Merge merge
    cdef StatusPage status
    cdef Waiting waiting
    cdef Broadcast broadcast
    cdef Broadcast silent
    cdef Fanout fanout
    cdef object replica, asking, journal
    cdef Peer me
    cdef dict known, by_source
    cdef list bells_of, no_bells  # whose bells are listened to, None where there is none; where that is
    cdef set meeting, unsure
    cdef list touched, backlogged, full, bulks, lost, unmet
    cdef int slow
    cdef bint begun
    cdef uint64_t stall_ns, stall_until, begun_at
    cdef void publish(self, tuple subscribers, bytes envelope, FrameHead *head, const uint8_t *body, tuple fds, bint shared) except *
    cdef void _publish_large(self, tuple subscribers, bytes envelope, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef uint8_t *_reserve(self, tuple subscribers, size_t length) except? NULL
    cdef bint send(self, Peer peer, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds) except -1
    cdef void _put(self, Peer peer, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds) except *
    cdef void must_send(self, Peer peer, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds) except *
    cdef void begin(self, uint64_t stamp) noexcept
    cdef void end(self) noexcept
    cdef void bells(self) except *
    cdef void rung(self, unsigned int source) except *
    cdef Bulk bulk(self, Peer peer, size_t length)
    cdef bint tidy(self) except -1
    cdef bint waits(self) except -1
    cdef bint _is_full(self) except -1
    cdef bint are_met(self, list peers) except -1
