from libc.stdint cimport uint8_t, uint64_t

from kbusd.rings.bulk cimport Area, BulkView
from kbusd.rings.pagepipe cimport PagePipe
from kbusd.workers.libc cimport msghdr

cdef class Segment:
    cdef uint8_t *data
    cdef size_t start, end, capacity
    cdef bint mapped, full, piped
    cdef tuple fds
    cdef BulkView lender
    cdef Area area

cdef class Output:
    cdef list segments
    cdef Segment tail, spare
    cdef PagePipe pipe
    cdef bint spare_used, pipe_used
    cdef readonly bint refused
    cdef readonly BulkView cheat
    cdef readonly size_t pending, fds, peak, peak_fds
    cdef readonly unsigned int messages
    cdef readonly uint64_t sent
    cdef uint8_t *reserve(self, size_t length) except NULL
    cdef void commit(self, size_t length) noexcept
    cdef void begin_with_fds(self, tuple fds) except *
    cdef void drop_fds(self) except *
    cdef void add_mapping(self, uint8_t *data, size_t length, size_t mapped_length) except *
    cdef void add_lent(self, const uint8_t *data, size_t length, BulkView lender, Area area) except *
    cdef void add_piped(self, size_t length, BulkView lender, Area area) except *
    cdef int _pour(self, int fd) except -2
    cdef void _fill(self, Py_ssize_t which) except *
    cdef bint _copy(self, Py_ssize_t which) except -1
    cdef void _make_up(self, Py_ssize_t which) except *
    cdef void _together(self, Segment segment) except *
    cdef int flush(self, int fd) except -2
    cdef void _attach(self, msghdr *header, uint8_t *control, tuple fds) except *
    cdef Segment _large(self, size_t length)
    cdef void _retire(self, Segment segment) except *
    cdef bint trim(self) except -1
    cdef void _sent(self, size_t sent) except *
