from kbusd.rings.looking cimport Looking
from kbusd.supervisor.libc cimport epoll_event

cdef class Ready:
    cdef int epoll
    cdef Looking looking
    cdef int _wait(self, int timeout) except -2
    cdef int _look(self, epoll_event *event) noexcept nogil
    cdef int _sleep(self, epoll_event *event, int timeout) noexcept nogil
