from libc.stdint cimport int64_t, uint8_t

cdef size_t PAGE
cdef int RING_SEALS, LARGE_SEALS

cdef int create(const char *name, size_t size) noexcept
cdef int add_seals(int fd, int seals) noexcept nogil
cdef int64_t sealed_size(int fd, int seals) noexcept
cdef uint8_t *map_whole(int fd, size_t size, bint writable) noexcept
cdef uint8_t *map_twice(int fd, size_t size, bint writable) noexcept
cdef void unmap_whole(const uint8_t *where, size_t size) noexcept
cdef void unmap_twice(const uint8_t *where, size_t size) noexcept

cdef const uint8_t *large_map(int fd, size_t size) noexcept
cdef void large_unmap(const uint8_t *where, size_t size) noexcept
