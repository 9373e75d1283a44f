from libc.stdint cimport uint8_t, uint64_t

from kbusd.rings.frame cimport FrameHead

cdef enum:
    HOSTILE = -1  # the producer broke a rule
    OVERRUN = -2  # the producer has overwritten what was to be read
    NO_ROOM = -3  # the frame is larger than the buffer given

cdef class Broadcast:
    cdef readonly int fd
    cdef readonly size_t size
    cdef readonly uint64_t position, tail
    cdef uint8_t *base
    cdef uint8_t *data
    cdef uint64_t frames, full
    cdef size_t reserved
    cdef uint8_t *reserve(self, size_t length, uint64_t limit) noexcept
    cdef void commit(self) noexcept
    cdef void want_space(self, bint on) noexcept
    cdef void begin(self, uint64_t stamp) noexcept
    cdef void end(self) noexcept

cdef class BroadcastReader:
    cdef readonly size_t size
    cdef readonly uint64_t position
    cdef const uint8_t *base
    cdef const uint8_t *data
    cdef uint64_t frames
    cdef uint64_t head(self) noexcept
    cdef uint64_t tail(self) noexcept
    cdef uint64_t begun(self) noexcept
    cdef bint producer_waits(self) noexcept
    cdef int look(self, uint64_t at, uint64_t upto, FrameHead *out) noexcept
    cdef int copy(self, uint64_t upto, FrameHead *out, uint8_t *to, size_t room) noexcept
    cdef void advance(self, size_t length) noexcept
