from libc.stdint cimport uint64_t

cdef uint64_t monotonic() noexcept

cdef class Clock:
    cdef readonly uint64_t last
    cdef uint64_t next(self) noexcept
    cdef bint witness(self, uint64_t stamp) noexcept
