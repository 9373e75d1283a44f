from libc.stdint cimport int64_t

cdef class Queue:
    cdef dict _entries  # arrival -> message
    cdef readonly list _urgent  # heap of (priority, arrival), some of them gone
    cdef int64_t _arrivals, _lost
    cpdef push(self, object message, int64_t priority)
    cpdef tuple peek(self, object priority=*)
    cpdef remove(self, object ticket)
    cpdef take_lost(self)
