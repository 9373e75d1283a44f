from libc.stdint cimport uint64_t

cdef class Looking:
    cdef readonly uint64_t for_ns  # how long to look now; 0: not at all
    cdef readonly uint64_t not_before  # this time
    cdef uint64_t most_ns, contended_ns, pause, least_pause, most_pause
    cdef void gave_way(self, uint64_t before, uint64_t now) noexcept nogil
    cdef void expect(self, uint64_t ns) noexcept nogil
    cdef void slept(self, uint64_t begin, uint64_t end) noexcept nogil
