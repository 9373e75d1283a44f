from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    STEPS = 2
    MAX_REQUEST = 64
    MAX_REPLY = 96

# One request and what it is answered with, as it stands in the page: in words, for copy_words.
cdef struct Step:
    uint32_t command
    uint32_t asked    # bytes of `request`
    uint32_t length   # bytes of `reply`
    uint32_t padding
    uint64_t word     # for `keep`
    uint64_t offset   # in the pool, what is to be renewed in the client's page cache
    uint64_t size
    uint8_t request[64]
    uint64_t head[2]  # room for what comes before the reply
    uint8_t reply[96]

cdef class Promises:
    cdef uint8_t *page
    cdef uint64_t *word
    cdef Step *steps
    cdef public bint offered  # the worker's own note
    cdef bint find(self, uint32_t command, const uint8_t *request, size_t size, Step *step) noexcept
    cdef bint keep(self, uint64_t seen) noexcept
    cdef bint begun(self) noexcept
