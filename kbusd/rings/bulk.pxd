from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kbusd.rings.pagepipe cimport Carrier, PagePipe
from kbusd.rings.status cimport StatusPage, StatusView

cdef enum:
    BULK_SIZE = 4194304  # of an area
    BULK_MOST = 2097152  # longest body that goes through one
    BULK_LARGE = 16777216  # of a large area, and the longest body that goes through that
cdef extern from *:
    """
    #define BULK_FRESH (UINT64_C(1) << 63)
    """
    const uint64_t BULK_FRESH  # in `aux`: the area is new, its memfd is the frame's last descriptor

cdef class Bulk:
    cdef readonly int fd
    cdef readonly bint broken
    cdef readonly size_t size
    cdef uint8_t *base
    cdef const uint64_t *claimed
    cdef StatusView reader
    cdef object spans
    cdef uint64_t sent, done
    cdef size_t reserved, reserved_at
    cdef bint told, piping
    cdef int dry
    cdef PagePipe pipe
    cdef readonly Carrier carrier
    cdef size_t piped, piped_at
    cdef readonly int idle
    cdef int open(self, size_t size, int carrier) noexcept
    cdef void close_fd(self) noexcept
    cdef uint8_t *reserve(self, size_t length) except? NULL
    cdef uint64_t commit(self) except 0
    cdef void cancel(self) noexcept
    cdef bint begin_pipe(self, size_t at, PagePipe pipe) except -1
    cdef Py_ssize_t splice_from(self, int source, size_t most) noexcept
    cdef void take_back(self) noexcept
    cdef bint carry(self) noexcept
    cdef bint release(self) except -1
    cdef int _settle(self) except -1

cdef class Area:
    cdef const uint8_t *base
    cdef size_t size
    cdef Carrier carrier

cdef class BulkView:
    cdef Area area
    cdef int lent
    cdef uint64_t later
    cdef StatusPage mine
    cdef int slot
    cdef uint64_t count
    cdef readonly size_t piped, piped_at
    cdef void open(self, int fd, int carrier) except *
    cdef bint announce(self, const uint8_t *data, size_t size, uint64_t aux) noexcept
    cdef bint drain(self) except -1
    cdef bytes whole(self, const uint8_t *body, size_t length)
    cdef void release(self) noexcept
    cdef const uint8_t *place(self, uint64_t aux) noexcept
    cdef Area lend(self)
    cdef void back(self, Area area) noexcept
    cdef void done(self) noexcept
    cdef void close(self) noexcept
