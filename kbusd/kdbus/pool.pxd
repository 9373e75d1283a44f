from libc.stdint cimport int64_t

cdef class Slice:
    cdef readonly int64_t offset, size
    cdef readonly bint accounted
    cdef bint held, published  # by the bus; by the client; if neither, it is free
    cdef Slice before, behind

cdef class Pool:
    cdef readonly int64_t size, accounted
    cdef dict _busy  # offset -> Slice
    cdef list _free  # Slices by size, those of the same by offset
    cpdef Slice alloc(self, int64_t size, bint accounted)
    cpdef tuple publish(self, Slice slice)
    cpdef release(self, Slice slice)
    cpdef free(self, object offset)
    cdef _drop(self, Slice slice)
    cdef Py_ssize_t _place(self, int64_t size, int64_t offset) except -1

cdef class _Share:
    cdef int64_t memory, messages, fds

cdef class Quota:
    cdef Pool _pool
    cdef dict _shares  # by user
    cpdef check(self, int64_t user, int64_t memory, int64_t fds)
    cpdef add(self, int64_t user, int64_t memory, int64_t fds)
    cpdef remove(self, int64_t user, int64_t memory, int64_t fds)

cdef _join(Slice before, Slice behind)
