from libc.stdint cimport uint32_t, uint64_t

cdef class Calls:
    cdef dict asked
    cdef object due
    cdef size_t most
    cdef uint64_t reply_ns
    cdef bint are_many(self) except -1
    cdef bint open(self, uint32_t serial, long long callee) except -1
    cdef bint wait_for(self, uint32_t serial, long long callee) except -1
    cdef bint close(self, uint32_t serial, long long callee) except -1
    cdef bint fail(self, uint32_t serial, long long callee) except -1
    cdef void forget(self, uint32_t serial) except *
    cdef void clear(self) except *
    cdef list close_all_of(self, long long callee)
    cdef list late(self)
    cdef int left(self) except -2
