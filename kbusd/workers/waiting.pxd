from libc.stdint cimport uint32_t, uint64_t

from kbusd.rings.looking cimport Looking
from kbusd.rings.merge cimport Merge
from kbusd.rings.status cimport StatusPage
from kbusd.workers.libc cimport epoll_event

cdef class Waiting:
    cdef Merge merge
    cdef StatusPage status
    cdef readonly int epoll
    cdef int held
    cdef Looking looking
    cdef void for_requests(self) except *
    cdef void watch(self, int fd, unsigned int source, uint32_t events) except *
    cdef void change(self, int fd, unsigned int source, uint32_t events) noexcept
    cdef void forget(self, int fd) noexcept
    cdef int wait(self, epoll_event *events, int timeout) except -1
    cdef int _poll(self, epoll_event *events) noexcept
    cdef uint64_t _yield(self, uint64_t before) noexcept
    cdef bint give_way(self) noexcept
    cdef int _sleep(self, epoll_event *events, int timeout) noexcept
