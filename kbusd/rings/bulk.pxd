from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kbusd.rings.status cimport StatusPage, StatusView

cdef enum:
    BULK_SIZE = 4194304  # of an area
    BULK_MOST = 2097152  # longest body that goes through one
cdef extern from *:
    """
    #define BULK_FRESH (UINT64_C(1) << 63)
    """
    const uint64_t BULK_FRESH  # in `aux`: the area is new, its memfd is the frame's last descriptor

cdef class Bulk:
    cdef readonly int fd
    cdef readonly bint broken
    cdef uint8_t *base
    cdef const uint64_t *claimed
    cdef StatusView reader
    cdef object spans
    cdef uint64_t sent, done
    cdef size_t reserved, reserved_at
    cdef bint told
    cdef readonly int idle
    cdef int open(self) noexcept
    cdef void close_fd(self) noexcept
    cdef uint8_t *reserve(self, size_t length) except? NULL
    cdef uint64_t commit(self) except 0
    cdef void cancel(self) noexcept
    cdef bint release(self) except -1
    cdef int _settle(self) except -1

cdef class Area:
    cdef const uint8_t *base

cdef class BulkView:
    cdef Area area
    cdef int lent
    cdef uint64_t later
    cdef StatusPage mine
    cdef int slot
    cdef uint64_t count
    cdef void open(self, int fd) except *
    cdef void release(self) noexcept
    cdef const uint8_t *place(self, uint64_t aux) noexcept
    cdef Area lend(self)
    cdef void back(self, Area area) noexcept
    cdef void done(self) noexcept
    cdef void close(self) noexcept
