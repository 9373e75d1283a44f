from libc.stdint cimport uint8_t, uint64_t

from kbusd.rings.frame cimport FrameHead
from kbusd.rings.status cimport StatusPage, StatusView

cdef class Ring:
    cdef readonly int fd
    cdef readonly size_t size
    cdef readonly bint broken
    cdef uint8_t *base
    cdef uint8_t *data
    cdef const uint64_t *claimed
    cdef StatusView reader
    cdef uint64_t position, tail, reserved, frames, full
    cdef void attach(self, StatusView reader, int slot) except *
    cdef uint8_t *reserve(self, size_t length) noexcept
    cdef void commit(self) noexcept
    cdef void want_space(self, bint on) noexcept

cdef class RingReader:
    cdef readonly size_t size
    cdef readonly uint64_t position
    cdef uint8_t *base
    cdef const uint8_t *data
    cdef StatusPage mine
    cdef int slot
    cdef uint64_t peeked, frames
    cdef uint64_t head(self) noexcept
    cdef int look(self, uint64_t at, uint64_t upto, FrameHead *out) noexcept
    cdef int peek(self, uint64_t upto, FrameHead *out, const uint8_t **payload) noexcept
    cdef void advance(self) noexcept
    cdef bint publish(self) noexcept
    cdef bint producer_waits(self) noexcept
