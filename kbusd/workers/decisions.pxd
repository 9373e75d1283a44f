from libc.stdint cimport uint8_t

from kbusd.wire.header cimport Header
from kbusd.workers.peers cimport Peer

cdef class Route:
    cdef bytes envelope
    cdef object facts
    cdef Peer peer
    cdef tuple subscribers
    cdef tuple eavesdroppers  # None: nobody
    cdef bint to_bus
    cdef bint to_self
    cdef bint broadcast
    cdef bint depends
    cdef bint met
    cdef object error
    cdef object activate
    cdef Peer spends  # whose call is answered by what policy refuses; else None
    cdef object moves  # the name that it is sent to, if that has an activator; else None
    cdef tuple refusals
    cdef long long epoch
    cdef long long matches

cdef class Template:
    cdef bytes raw  # the envelope, encoded
    cdef bytes header
    cdef bytes signature
    cdef size_t header_length
    cdef int type
    cdef bint big_endian
    cdef bint broadcast
    cdef bint subscribed
    cdef bint depends
    cdef bint answers       # a call or a signal with a reply serial
    cdef object refusal
    cdef object unasked     # why it is refused if it answers nothing
    cdef long long epoch
    cdef long long mine

cdef bytes key_of(uint8_t *data, const Header *header)
