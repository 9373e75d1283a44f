from libc.stdint cimport uint8_t, uint64_t

cdef uint64_t siphash(const uint8_t *data, size_t size, uint64_t key0, uint64_t key1) noexcept nogil
cdef uint64_t _word(const uint8_t *data, size_t size) noexcept nogil
cdef int _width(size_t size) noexcept nogil
