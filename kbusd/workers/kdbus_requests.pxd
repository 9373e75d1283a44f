from libc.stdint cimport uint32_t, uint64_t

from kbusd.rings.promises cimport Promises

cdef class Request:
    cdef readonly uint64_t unique, argument
    cdef readonly uint32_t tid, command, out_size
    cdef readonly bytes data    # of the struct, what the kernel has brought
    cdef object _waits_for
    cdef bint _interrupted
    cdef readonly list looked_at  # of the caller's memory: what to send along the next time
    cdef Requests _device
    cdef list _known
    cdef bytes _seen            # the beginning of the struct, as it is
    cdef _looked(self, uint64_t address, uint64_t size, bytes found)
    cdef bytes _find(self, uint64_t address, uint64_t size)
    cdef answer(self, int result, object stores)
    cdef _end(self, int result, bytes reply)

cdef class Requests:
    cdef readonly object line, session
    cdef public object pool     # what the client maps, since HELLO
    cdef public object entering  # called with who says HELLO
    cdef readonly dict held, _asked
    cdef Py_ssize_t storing     # answers that are to be in the caller's memory first
    cdef list _pushed
    cdef dict _guesses
    cdef uint32_t _told, _shown  # events: to who polls, and behind the pool
    cdef object _told_of        # how many had arrived then
    cdef Promises _promises     # to the supervisor; None: it makes none
    cdef bytes _recv            # the last ordinary RECV
    cdef _may_promise(self, object fds)
    cpdef promise(self)
    cpdef recall(self)
    cdef _request(self, bytes raw, tuple ahead)
    cdef _at_once(self, Request held)
    cdef _send(self, Request held)
    cdef _other(self, object request)
    cdef _ended(self, Request held, object result)
    cdef answered(self, uint64_t unique, bytes reply)
    cdef _guess(self, Request request)
    cpdef show_events(self)
    cpdef push(self, object offset, object size)
    cpdef ask(self, uint64_t unique, object message)
    cdef _given(self, object message, object fds)
