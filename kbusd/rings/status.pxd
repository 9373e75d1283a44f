from libc.stdint cimport uint8_t, uint64_t

cdef class StatusPage:
    cdef readonly int fd
    cdef uint8_t *page
    cdef uint64_t *slots
    cdef list free
    cdef int top
    cdef void set(self, int slot, uint64_t value) noexcept
    cdef void set_bulk(self, int slot, uint64_t count) noexcept
    cdef void set_sleeping(self, bint on) noexcept

cdef class StatusView:
    cdef const uint8_t *page
    cdef readonly int slots
    cdef bint sleeping(self) noexcept
    cdef uint64_t position(self, int slot) noexcept
    cdef const uint64_t *place(self, int slot) except NULL
    cdef const uint64_t *bulk_place(self, int slot) except NULL
