/* C11 atomics on words of shared memory, for Cython. Each caller names the access it pairs with. */
#ifndef KBUSD_ATOMICS_H
#define KBUSD_ATOMICS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "rings need lock-free 64-bit atomics");

static inline uint64_t load_acquire(const uint64_t *p)
{
    return atomic_load_explicit((const _Atomic uint64_t *)p, memory_order_acquire);
}

static inline void store_release(uint64_t *p, uint64_t v)
{
    atomic_store_explicit((_Atomic uint64_t *)p, v, memory_order_release);
}

/* Whether `*p` was `expected` and is `wanted` now. */
static inline int exchange_if(uint64_t *p, uint64_t expected, uint64_t wanted)
{
    return atomic_compare_exchange_strong_explicit((_Atomic uint64_t *)p, &expected, wanted,
                                                   memory_order_acq_rel, memory_order_acquire);
}

static inline uint32_t load_acquire32(const uint32_t *p)
{
    return atomic_load_explicit((const _Atomic uint32_t *)p, memory_order_acquire);
}

static inline void store_release32(uint32_t *p, uint32_t v)
{
    atomic_store_explicit((_Atomic uint32_t *)p, v, memory_order_release);
}

static inline void fence_acquire(void) { atomic_thread_fence(memory_order_acquire); }
static inline void fence_release(void) { atomic_thread_fence(memory_order_release); }
static inline void fence_seq_cst(void) { atomic_thread_fence(memory_order_seq_cst); }

/* Copy 8-aligned words that another process may be changing: each word is read exactly once. */
static inline void copy_words(void *to, const void *from, size_t words)
{
    uint64_t *t = to;
    const uint64_t *f = from;
    for (size_t i = 0; i < words; i++)
        t[i] = atomic_load_explicit((const _Atomic uint64_t *)(f + i), memory_order_relaxed);
}

#endif
