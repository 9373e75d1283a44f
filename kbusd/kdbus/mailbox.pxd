from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint64_t

from kbusd.kdbus.pool cimport Pool, Quota, Slice
from kbusd.kdbus.queue cimport Queue

cdef class Entry:
    cdef readonly Slice slice
    cdef readonly int64_t user, memory, counted
    cdef public object fds, fds_at, expects, answers, kept
    cdef public bint incomplete, no_reply

cdef class Mailbox:
    cdef readonly Pool pool
    cdef readonly Quota quota
    cdef readonly Queue queue
    cdef readonly object memory
    cdef public int untold      # of those in the queue, how many tell that no reply comes
    cdef readonly dict installing  # by slice: where numbers of descriptors are to be written
    cdef public object hand
    cdef Py_buffer view
    cpdef Entry place(self, tuple header, object parts, int64_t fds, object dst_name, bytes notice,
                      bytes attached, int64_t user, bint accounted)
    cpdef Entry unqueue(self, object ticket)
    cpdef recv(self, bytes command)
    cpdef free(self, bytes command)
    cdef _read(self, object ticket, Entry entry)
    cpdef promise(self, bytes command)
    cpdef received(self, bint freed)
