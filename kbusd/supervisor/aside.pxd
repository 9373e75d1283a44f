from libc.stdint cimport int64_t, uint64_t

cdef class Aside:
    # All of it is changed by who has Python's lock. The watcher reads `at` and `begun` without.
    cdef public unsigned long listener  # the thread's number
    cdef public int event  # the descriptor that it deals with; -1: it may come again meanwhile
    cdef int64_t at  # the how manieth piece of work the listener is at; 0: none
    cdef int64_t begun
    cdef int inside  # threads that are at what may never end
    cdef bint watched
    cdef readonly dict stuck  # how many are at work, by uid
    cdef readonly list left  # (uid, descriptor) of what could not be closed yet
    cdef object take_over, start, wanted
    cdef object lock  # held while another thread takes over
    cpdef enter(self, int64_t uid)
    cpdef leave(self, int64_t uid)
    cpdef let_go(self)
    cpdef close(self, int64_t uid, int fd)
    cdef bint _full(self, int64_t uid, int count) noexcept
    cdef bint _started(self) except -1
    cdef _nap(self)
    cdef bint _look(self) except -1

cdef class Work:
    cdef Aside aside
    cdef int64_t uid
