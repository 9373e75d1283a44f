from libc.stdint cimport uint32_t

from kbusd.rings.frame cimport FrameHead
from kbusd.workers.peers cimport Peers

cdef class Monitors:
    cdef Peers peers
    cdef object replica
    cdef uint32_t serial
    cdef void copy(self, object facts, FrameHead *head, bytes body, tuple fds, long long sender) except *
