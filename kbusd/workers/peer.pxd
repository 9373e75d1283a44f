from libc.stdint cimport uint8_t

from kbusd.rings.bulk cimport Bulk, BulkView
from kbusd.rings.clock cimport Clock
from kbusd.rings.fanout cimport Subscriber
from kbusd.rings.frame cimport FrameHead
from kbusd.rings.ring cimport Ring, RingReader
from kbusd.rings.status cimport StatusView

cdef class Template:
    cdef bytes header
    cdef bytes signature
    cdef size_t header_length
    cdef int type
    cdef bint big_endian
    cdef bint broadcast
    cdef bint subscribed
    cdef bint depends
    cdef object refusal
    cdef object envelope
    cdef long long epoch
    cdef long long mine

cdef class Peer:
    cdef readonly long long id
    cdef readonly str name
    cdef public object connection
    cdef Ring ring
    cdef RingReader reader
    cdef StatusView view
    cdef int doorbell
    cdef object side
    cdef int their_slot
    cdef Bulk bulk
    cdef BulkView bulk_view
    cdef readonly int slot, broadcast_slot
    cdef Subscriber subscriber
    cdef readonly int state
    cdef bint touched, late
    cdef object backlog
    cdef readonly size_t backlog_bytes
    cdef dict templates
    cdef int put(self, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds, Clock clock) except -2
    cdef bint _write(self, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds) except -1
    cpdef int flush(self) except -2
    cdef object _send_fds(self, object stamp, tuple fds)
    cdef tuple receive_fds(self, size_t count)
