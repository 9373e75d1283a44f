from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kbusd.rings.frame cimport FrameHead
from kbusd.workers.dbus_socket cimport DBusSocket
from kbusd.workers.decisions cimport Template
from kbusd.workers.peers cimport Peer

cdef class DeviceEngine(DBusSocket):
    cdef object front
    cdef public uint64_t promised_ns  # how long `catch_up` waits for what peers have promised
    cdef uint64_t telling  # the stamp of the entry of the log that the front is told of
    cdef int _timeout(self) except -2
    cdef void from_client(self, uint32_t events) except *
    cdef void other(self, unsigned int source) except *
    cdef void _inbound(self) except *
    cdef void watch_client(self) except *
    cdef void flush(self) except *
    cdef void relieve(self) except *
    cdef void hand_over(self, Peer peer, Template template, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef void show(self, Template template, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef void _deliver(self, Peer peer, FrameHead *head, const uint8_t *payload, tuple own_fds) except *
    cdef void _parcel(self, Peer peer, FrameHead *head, const uint8_t *payload) except *
