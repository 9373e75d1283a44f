from libc.stdint cimport uint8_t

from kbusd.rings.bulk cimport BulkView
from kbusd.rings.frame cimport FrameHead
from kbusd.workers.dbus_socket cimport Engine
from kbusd.workers.peer cimport Peer, Template

cdef class DeviceEngine(Engine):
    cdef object front
    cdef Peer current
    cdef void _loop(self) except *
    cdef int _timeout(self) except -2
    cdef void _flush(self) except *
    cdef void _deliver(self, Peer peer, FrameHead *head, const uint8_t *payload, tuple own_fds) except *
    cdef void _emit(self, Template template, FrameHead *head, const uint8_t *body, tuple fds, BulkView view) except *
    cdef void _parcel(self, Peer peer, FrameHead *head, const uint8_t *payload) except *
