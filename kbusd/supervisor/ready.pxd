from libc.stdint cimport int64_t

from kbusd.supervisor.libc cimport epoll_event

cdef class Ready:
    cdef int epoll
    cdef int64_t look_ns  # how long to look before sleeping
    cdef int64_t look_from  # and not before this time
    cdef int _wait(self, int timeout) except -2
    cdef int _look(self, epoll_event *event) noexcept nogil
    cdef int _sleep(self, epoll_event *event, int timeout) noexcept nogil
