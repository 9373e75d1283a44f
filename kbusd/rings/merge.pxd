from libc.stdint cimport uint8_t, uint64_t

from kbusd.rings.clock cimport Clock
from kbusd.rings.frame cimport FrameHead

cdef struct Source:
    void *reader
    const uint64_t *head_at
    uint64_t position, seen, newer, stamp, last
    bint is_ring, bad, unpublished
    int blame

cdef class Merge:
    cdef Clock clock
    cdef Source *table
    cdef int *ready
    cdef int sources, room, count, current
    cdef size_t length
    cdef uint64_t cut
    cdef uint8_t *buffer
    cdef size_t capacity
    cdef list readers, broken
    cdef object held
    cdef int gather(self) except -1
    cdef object next(self, FrameHead *head, const uint8_t **payload)
    cdef int publish(self) except -1
    cdef bint pending(self) noexcept
    cdef int _look(self, Source *source, uint64_t at, uint64_t upto, FrameHead *head) noexcept
    cdef void _settle(self) noexcept
    cdef bint _first(self, int index) noexcept
    cdef void _break(self, Source *source, int code) noexcept
    cdef int _index(self, object reader) except -2
