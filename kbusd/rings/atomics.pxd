# C11 atomics and fences (stdatomic.h); see atomics.h.
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "atomics.h" nogil:
    uint64_t load_acquire(const uint64_t *p) noexcept
    void store_release(uint64_t *p, uint64_t v) noexcept
    bint exchange_if(uint64_t *p, uint64_t expected, uint64_t wanted) noexcept
    uint32_t load_acquire32(const uint32_t *p) noexcept
    void store_release32(uint32_t *p, uint32_t v) noexcept
    void fence_acquire() noexcept
    void fence_release() noexcept
    void fence_seq_cst() noexcept
    void copy_words(void *to, const void *source, size_t words) noexcept
