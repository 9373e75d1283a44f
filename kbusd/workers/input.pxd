from libc.stdint cimport uint8_t

from kbusd.rings.bulk cimport Bulk
from kbusd.rings.pagepipe cimport PagePipe

cdef class Input:
    cdef uint8_t *data
    cdef size_t start, end, capacity, peak, peak_fds
    cdef list fds
    cdef bint broken, large_next
    cdef const uint8_t *large
    cdef uint8_t *chunk
    cdef Bulk bulk
    cdef PagePipe pipe
    cdef bint pipe_used
    cdef size_t large_have, large_need
    cdef readonly int large_fd
    cdef int receive(self, int fd) except -2
    cdef void make_room(self, size_t total) except *
    cdef void begin_bulk(self, size_t header, size_t body, uint8_t *place, Bulk bulk) except *
    cdef void begin_pipe(self) except *
    cdef void begin_large(self, size_t header, size_t body) except *
    cdef void _begun(self, size_t header, size_t body, size_t have) noexcept
    cdef void _store(self, uint8_t *data, size_t length) except *
    cdef const uint8_t *whole(self) except NULL
    cdef void end_large(self) except *
    cdef tuple first_fds(self, size_t count)
    cdef tuple take_fds(self, size_t count)
    cdef bint trim(self) except -1
    cdef int _take(self, uint8_t *control, size_t length) except -2
