from libc.stdint cimport uint8_t

from kbusd.rings.frame cimport FrameHead

cdef class Held:
    cdef FrameHead head
    cdef bytes payload

cdef class CatchUp:
    cdef object unicast, broadcast
    cdef readonly size_t held
    cdef void keep(self, bint copy, const FrameHead *head, const uint8_t *payload) except *
    cdef void drop(self, bint copy) except *
