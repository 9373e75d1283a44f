from libc.stdint cimport uint8_t, uint64_t

from kbusd.rings.broadcast cimport Broadcast
from kbusd.rings.status cimport StatusView

cdef class Subscriber:
    cdef StatusView view
    cdef const uint64_t *claimed
    cdef uint64_t floor
    cdef readonly uint64_t wanted
    cdef readonly bint joined, broken
    cdef readonly object owner
    cdef uint64_t position(self, uint64_t head) noexcept

cdef class Fanout:
    cdef readonly Broadcast broadcast
    cdef list joined
    cdef uint64_t lowest, demotions
    cdef uint64_t join(self, Subscriber subscriber) except *
    cdef uint8_t *reserve(self, size_t length) except? NULL
    cdef void commit(self) noexcept
    cpdef void want(self, Subscriber subscriber) noexcept
    cdef void rescan(self) except *
    cdef list late(self, size_t length)
    cdef list demote(self, Subscriber subscriber)
